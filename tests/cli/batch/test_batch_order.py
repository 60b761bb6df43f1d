"""In which order a batch is answered: what begins alike together, computed once; the longest answers first."""

from __future__ import annotations

import json
import random
import tracemalloc
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import pytest
from fakes.fake_engine import FakeEngine, scheduler, sequence
from fakes.throughput.peak import peak_bytes_of

from shoal.cli.batch.answer_file import AnswerFile
from shoal.cli.batch.batch_order import BatchOrder
from shoal.cli.batch.request_lines import RequestLines

Asked = tuple[str, int]
"""A prompt, and how many tokens its answer may have."""


def ordered(tmp_path: Path, asked: list[Asked]) -> list[Asked]:
    """As a batch of them is answered."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for number, (prompt, most) in enumerate(asked):
            body = {"model": "m", "prompt": prompt, "max_tokens": most}
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    with RequestLines(path) as requests, AnswerFile(tmp_path / "out.jsonl", requests.stat) as out:
        order = [asked[it.number - 1] for it in BatchOrder(requests, out, None).of_model(0)]
    assert sorted(order, key=str) == sorted(asked, key=str)
    return order


def words(source: random.Random, length: int) -> str:
    return "".join(source.choices("abcdefgh ", k=length))


@pytest.fixture
def shared() -> list[Asked]:
    """Six beginnings of 300 bytes, each with four questions for each of four lengths of answers, mixed."""
    source = random.Random(3)
    beginnings = [words(source, 300) for _ in range(6)]
    asked: list[Asked] = [
        (start + words(source, 20), most) for start in beginnings for most in (3, 9, 20, 40) * 4
    ]
    source.shuffle(asked)
    return asked


def test_what_begins_alike_stands_together_whatever_its_answers_may_be(
    tmp_path: Path, shared: list[Asked]
) -> None:
    alone: list[Asked] = [("alone and long " * 30, 1000), ("alone and short " * 30, 1)]
    order = ordered(tmp_path, [*alone[::-1], *shared])
    assert (order[0], order[-1]) == tuple(alone)
    groups = [[most for _, most in its] for _, its in groupby(order[1:-1], lambda one: one[0][:300])]
    assert groups == [[40] * 4 + [20] * 4 + [9] * 4 + [3] * 4] * 6


def test_a_beginning_of_its_prompt_is_computed_once(tmp_path: Path, shared: list[Asked]) -> None:
    """Also where memory has no room for two of them beside what is computed."""
    subject = scheduler(pages=160, sequences=2, queue=2, chunk=64)
    engine = FakeEngine(subject)
    asked = [sequence([ord(one) for one in text], most) for text, most in ordered(tmp_path, shared)]
    for one in asked:
        while len(subject.waiting) + len(subject.running) == 4:
            engine.step()
        engine.submit(one)
    engine.run()
    computed = sum(one.prompt_tokens - one.cached_tokens for one in asked)
    assert computed <= 6 * 300 + len(asked) * 20


def test_a_group_comes_when_its_longest_answer_would(tmp_path: Path) -> None:
    starts = ["a" * 200, "b" * 200, "c" * 200]
    asked: list[Asked] = [
        (start + f"{most} {n}", most)
        for n in range(2)
        for start, most in zip(starts, (30, 300, 3), strict=True)
    ]
    asked += [(starts[2] + "the longest of all", 3000)]
    order = ordered(tmp_path, asked)
    assert [start for start, _ in groupby(order, lambda one: one[0][0])] == ["c", "b", "a"]
    assert order[0] == asked[-1]


def test_in_a_group_of_all_its_parts_have_the_order_that_groups_have(tmp_path: Path) -> None:
    """If every line begins with the same system prompt, no long answer is left over at the end either."""
    source = random.Random(4)
    system, parts = words(source, 500), [words(source, 600) for _ in range(3)]
    asked: list[Asked] = [(system + part + words(source, 9), most) for part in parts for most in (5, 50)]
    asked += [(system + words(source, 700), most) for most in (2, 500, 20, 3000)]
    order = ordered(tmp_path, asked)
    assert [most for _, most in order] == [3000, 500, 50, 5, 50, 5, 50, 5, 20, 2]
    assert [len({text[500:1100] for text, _ in order[i : i + 2]}) for i in (2, 4, 6)] == [1, 1, 1]
    longest = "z" * 9000
    asked = [(longest + words(source, 40), most) for most in (1, 1000, 10, 100)]
    assert [most for _, most in ordered(tmp_path, asked)] == [1000, 100, 10, 1]


def test_without_common_beginnings_the_longest_answers_come_first(tmp_path: Path) -> None:
    """Then those of one length of answers by the digests of their beginnings, and longer texts first."""
    source = random.Random(5)
    asked: list[Asked] = [
        (words(source, source.randrange(8, 3000)), source.randrange(1, 900)) for _ in range(300)
    ]

    def turn(one: Asked) -> tuple[int, bytes, int]:
        text, most = one
        digests = [
            blake2b(text[: 64 << n].encode(), digest_size=4).digest() if len(text) >= 64 << n else bytes(4)
            for n in range(8)
        ]
        return -most.bit_length(), b"".join(digests), -len(text)

    assert ordered(tmp_path, asked) == sorted(asked, key=turn)


def test_a_long_line_is_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * (4 << 20) + b"\n")
    held: list[int] = []

    def looked() -> None:
        for line in requests:
            assert line.text is not None
            held.append(tracemalloc.get_traced_memory()[0])

    with RequestLines(path) as requests:
        peak_bytes_of(looked)
    assert held[0] < 1.5 * (4 << 20)

"""`shoal batch`: every line gets exactly one answer, whatever happens to the process, the files and the lines."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes.cli_fakes import TIMINGS, FakeAnswers, shoal

from shoal.cli.batch import answer_file, batch_verb, request_lines, working_off
from shoal.cli.batch.answer_file import AnswerFile
from shoal.cli.batch.batch_order import BatchOrder
from shoal.cli.batch.request_lines import RequestLines
from shoal.comm.errors import NoDaemon
from shoal.comm.messages import Chat, Done, Generate, Token, TokenLogprob, Usage
from shoal.daemon.errors import DaemonError


class Many(FakeAnswers):
    """Answers every prompt by itself in capitals, several at once in any order. `trouble` may raise at each event, or
    return what a request fails with."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: Callable[[Generate | Chat], DaemonError | None] = lambda request: None
        self.likely: list[int | None] = []
        self.most_likely = 1 << 26
        self.unloadable: dict[str, DaemonError] = {}
        self._source = random.Random(1)

    def load(
        self, model: str, draft: Any, context: Any = None, ranks: Any = None, *, likely: Any = None
    ) -> Any:
        self.likely.append(likely)
        if likely is not None and likely > self.most_likely:
            raise DaemonError("resources", "not so much memory")
        if (error := self.unloadable.get(Path(model).stem)) is not None:
            raise error
        super().load(model, draft, context, ranks)
        return self.status

    def places(self) -> int:
        return 10

    def many(self, requests: Iterator[Any], at_once: int) -> Iterator[Any]:
        under_way: list[tuple[Any, Any]] = []
        coming = True
        while coming or under_way:
            while coming and len(under_way) < 3:
                taken = next(requests, StopIteration)
                coming = taken is not StopIteration
                if taken is None or not coming:
                    break
                self.requests.append(taken[1])
                under_way.append(taken)
            if not under_way:
                continue
            key, request = under_way.pop(self._source.randrange(len(under_way)))
            if (error := self.trouble(request)) is not None:
                yield key, error
                continue
            for word in said(request):
                logprob = TokenLogprob(id=1, text=word, logprob=-0.5, top=[(1, word, -0.5)])
                yield key, Token(text=word, ids=[1], logprobs=[logprob])
            usage = Usage(prompt_tokens=7, completion_tokens=len(said(request)), cached_tokens=2)
            yield key, Done(finish_reason="length", usage=usage, timings=TIMINGS)


def said(request: Generate | Chat) -> list[str]:
    text = str(request.messages[-1]["content"] if isinstance(request, Chat) else request.prompt)
    return [f"{word} " for word in text.upper().split()]


def line(number: int, prompt: str = "", model: str = "m.gguf", **body: Any) -> bytes:
    fields = {"model": model, "prompt": prompt or f"ask {number}"} | body
    asked = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": fields}
    return json.dumps(asked).encode() + b"\n"


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Many:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "other.gguf"):
        Path(name).write_bytes(b"GGUF")
    made = Many()

    @contextmanager
    def in_process(config: Any, library: Any, *, sequences: int) -> Iterator[Many]:
        assert sequences
        yield made

    @contextmanager
    def from_daemon(home: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(batch_verb, "in_process", in_process)
    monkeypatch.setattr(batch_verb, "from_daemon", from_daemon)
    monkeypatch.setattr(working_off, "BUSY_S", 0.0)
    return made


def asked(*lines: bytes) -> None:
    Path("in.jsonl").write_bytes(b"".join(lines))


def answers() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]


def texts() -> dict[str, str]:
    """By custom_id, each of which must have one line."""
    found = answers()
    assert max(Counter(one["custom_id"] for one in found if one["custom_id"]).values()) == 1
    return {
        one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in found if one["response"]
    }


def errors() -> dict[str | None, str]:
    return {one["custom_id"]: one["error"]["message"] for one in answers() if one["error"]}


def run(*more: str) -> Any:
    return shoal("batch", "in.jsonl", "out.jsonl", *more)


def test_what_was_done_earlier_is_part_of_what_is_answered() -> None:
    tally = working_off.Tally(lines=40, left=0, failed=2, now=37)
    assert batch_verb._described(tally).startswith(
        "38 of 40 requests answered, 1 of them earlier · 2 failed, as their lines say · "
    )


def test_no_time_is_foretold_while_most_requests_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    @contextmanager
    def bar(*_: Any, **__: Any) -> Iterator[Callable[[int, Any], None]]:
        yield lambda done, said: seen.append(said)

    monkeypatch.setattr(batch_verb, "counts_bar", bar)
    monkeypatch.setattr(batch_verb.time, "monotonic", lambda: now[0])
    tally = working_off.Tally(lines=40, left=40)
    with batch_verb._progress(tally, quiet=True) as show:
        for finished, under_way in ((3, 16), (20, 16)):
            now[0] += 10.0
            tally.now, tally.left = finished, 40 - finished
            tally.under_way, tally.written_tokens = under_way, 50 * finished
            show()
    assert seen == [["15 tokens/s"], ["20 s left", "1 requests/s", "50 tokens/s"]]


def test_every_request_gets_its_answer(many: Many) -> None:
    chat = {"model": "m.gguf", "messages": [{"role": "user", "content": "hello you"}], "logprobs": True}
    other = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    asked(line(1), line(2, logprobs=1), json.dumps(other).encode())
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(
        "3 of 3 requests answered · 21 prompt tokens, 6 of them shared · 6 tokens ("
    )
    by_id = {one["custom_id"]: one for one in answers()}
    plain = by_id["c1"]
    assert plain["error"] is None
    assert plain["response"]["status_code"] == 200
    body = plain["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [{"index": 0, "text": "ASK 1 ", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    logprobs = by_id["c2"]["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["ASK ", "2 "]
    assert logprobs["text_offset"] == [0, 4]
    assert logprobs["top_logprobs"] == [{"ASK ": -0.5}, {"2 ": -0.5}]
    body = by_id["chat"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "HELLO YOU ", "refusal": None}
    content = body["choices"][0]["logprobs"]["content"]
    assert (content[0]["token"], content[0]["bytes"]) == ("HELLO ", list(b"HELLO "))
    assert {(request.model, request.priority) for request in many.requests} == {("tiny", -1)}


def test_bad_lines_are_reported_and_the_others_done(many: Many) -> None:
    long = b'{"custom_id": "long"' + b" " * (request_lines.REQUEST_BYTES + 5) + b"}\n"
    asked(
        b"\xef\xbb\xbf" + line(1), b"\r\n", b"{\r\n", line(2).replace(b"\n", b"\r\n"), b"\xff\n", b"\0\n", long,
        line(3, n=2), line(2, "again"), line(1), b"[" * 5000 + b"\n", line(4).rstrip(),
    )  # fmt: skip
    result = run("--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert (summary["requests"], summary["answered"], summary["failed"], summary["left"]) == (11, 3, 8, 0)
    found = {one["error"]["line"]: one["error"] for one in answers() if one["error"]}
    assert list(found) == [3, 5, 6, 7, 8, 9, 10, 11]
    assert found[7]["message"] == "the line has 16.8 MB: must be at most 16.8 MB"
    assert (found[8]["code"], found[8]["param"]) == ("unsupported", "n")
    assert found[9]["message"] == "custom_id=c2 is that of line 4 already"
    assert found[10]["message"] == "custom_id=c1 is that of line 1 already"
    answered = [one["custom_id"] for one in answers() if one["response"]]
    assert sorted(answered) == ["c1", "c2", "c4"]
    before = Path("out.jsonl").read_bytes()
    assert run().exit_code == 1
    assert Path("out.jsonl").read_bytes() == before


def test_lines_of_any_depth_fail_alone(many: Many) -> None:
    """Also those that a decoder would take or not, depending on who calls it."""
    lines = [line(1)]
    for depth in range(900, 1000, 2):
        deep = "[" * depth + "]" * depth
        lines.append(line(depth).replace(b'"prompt"', b'"metadata":' + deep.encode() + b',"prompt"'))
        chat = f'{{"model":"m.gguf","messages":[{{"role":"user","content":"x","name":{deep}}}]}}'
        asked_as = f'{{"custom_id":"n{depth}","method":"POST","url":"/v1/chat/completions","body":{chat}}}\n'
        lines.append(asked_as.encode())
    asked(*lines, line(2))
    assert run().exit_code == 1
    assert sorted(texts()) == ["c1", "c2"]
    assert {one["error"]["message"] for one in answers() if one["error"]} == {
        "the line is nested too deep: must be at most 64 deep"
    }


def test_killed_anywhere_and_resumed_it_is_as_if_unbroken(many: Many) -> None:
    """The process dies between any two writes, in the middle of one even."""
    source = random.Random(5)
    count = 40
    asked(*(line(number) if number % 9 else b"{\n" for number in range(count)))
    run()
    whole = texts()
    Path("out.jsonl").unlink()
    for _ in range(8):
        left = source.randrange(12)

        def die(request: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        many.trouble = die
        result = run()
        assert result.exit_code in (130, 1)
        torn = Path("out.jsonl").read_bytes()
        if torn and source.random() < 0.7:
            Path("out.jsonl").write_bytes(torn[: -source.randrange(1, len(torn.splitlines()[-1]))])
    many.trouble = lambda request: None
    assert run().exit_code == 1
    assert texts() == whole
    assert len(answers()) == count
    assert len([one for one in answers() if one["error"]]) == len(range(0, count, 9))


def test_lines_may_be_added_and_no_others_changed(many: Many) -> None:
    asked(line(1), line(2))
    run()
    asked(line(1), line(2), line(3))
    assert run().exit_code == 0
    assert [request.prompt for request in many.requests][-1] == "ask 3"  # type: ignore[union-attr]
    before = Path("out.jsonl").read_bytes()
    for changed in ([line(1), line(2, "other"), line(3)], [line(2), line(3)], [line(1), line(3), line(2)]):
        asked(*changed)
        result = run()
        assert result.exit_code == 2
        assert "is another than when out.jsonl was begun (lines may be added at the end" in result.stderr
    asked(line(1), line(2), line(3))
    assert "or --model, is another" in run("--model", "other.gguf").stderr
    assert Path("out.jsonl").read_bytes() == before
    assert len(many.requests) == 3


def test_what_failed_can_be_tried_again(many: Many) -> None:
    asked(*(line(number) for number in range(6)))
    many.trouble = lambda request: DaemonError("internal", "a disk failed") if "3" in request.prompt else None  # type: ignore[union-attr,operator]
    assert run().exit_code == 1
    assert errors() == {"c3": "a disk failed"}
    assert run().exit_code == 1
    assert len(many.requests) == 6
    many.trouble = lambda request: None
    assert run("--retry-failed").exit_code == 0
    assert len(texts()) == 6
    assert len(many.requests) == 7
    assert not list(Path().glob("*.partial"))


def test_busy_means_later_and_a_daemon_that_goes_means_stop(many: Many) -> None:
    asked(*(line(number) for number in range(6)))
    refused: set[Any] = set()

    def trouble(request: Any) -> DaemonError | None:
        if request.prompt in refused:
            return None
        refused.add(request.prompt)
        return DaemonError("busy", "queue full", retry_after_s=0.0)

    many.trouble = trouble
    assert run().exit_code == 0
    assert len(texts()) == 6
    Path("out.jsonl").unlink()
    for error, code in ((NoDaemon("gone"), 4), (DaemonError("shutting_down", "the daemon is stopping"), 4)):

        def stop(request: Any, error: Any = error) -> DaemonError | None:
            if request.prompt == "ask 3":
                if isinstance(error, DaemonError):
                    return error
                raise error
            return None

        many.trouble = stop
        result = run()
        assert result.exit_code == code
        assert re.search(r"^\d of 6 requests done; the same command goes on$", result.stderr, re.MULTILINE)
        assert "c3" not in texts()
    many.trouble = lambda request: None
    assert run().exit_code == 0
    assert len(texts()) == 6


def test_if_all_fails_it_is_nobodys_own_fault(many: Many) -> None:
    asked(*(line(number) for number in range(60)))
    many.trouble = lambda request: DaemonError("internal", "a disk failed")
    result = run()
    assert result.exit_code == 1
    assert "32 requests in a row have failed, the last one so: a disk failed" in result.stderr
    assert len(errors()) == 32


def test_each_model_answers_its_own(many: Many) -> None:
    many.unloadable["other"] = DaemonError("corrupt", "other.gguf is cut off")
    asked(line(1), line(2, model="nowhere.gguf"), line(3, model="other.gguf"), line(4))
    assert run().exit_code == 1
    assert sorted(texts()) == ["c1", "c4"]
    assert errors()["c3"] == "other.gguf is cut off"
    assert "nowhere.gguf" in str(errors()["c2"])
    assert many.loaded == [str(Path("m.gguf").resolve())]
    Path("out.jsonl").unlink()
    asked(line(1, model="gpt-4o"), line(2, model="gpt-4o"))
    result = run()
    assert result.exit_code == 1
    assert "gpt-4o" in result.stderr
    assert "--model MODEL" in result.stderr
    assert not Path("out.jsonl").exists()
    assert run("--model", "m.gguf").exit_code == 0
    many.unloadable["m"] = DaemonError("resources", "m needs 5 GB")
    asked(line(1))
    Path("out.jsonl").unlink()
    assert run().exit_code == 3
    assert not Path("out.jsonl").exists()


def test_if_no_model_can_be_had_no_line_fails(many: Many) -> None:
    """Not in the middle of a batch either: its file may be on a disk that is not mounted just now."""
    asked(line(1), line(2))
    many.trouble = lambda request: DaemonError("shutting_down", "stopped") if "2" in str(request) else None
    assert run().exit_code == 4
    before = Path("out.jsonl").read_bytes()
    assert before.count(b"\n") == 1
    Path("m.gguf").rename("elsewhere")
    result = run()
    assert (result.exit_code, "--model MODEL" in result.stderr) == (1, True)
    Path("elsewhere").rename("m.gguf")
    many.trouble = lambda request: None
    for code, exit_code in (("bad_request", 2), ("corrupt", 1), ("not_found", 1)):
        many.unloadable["m"] = DaemonError(code, "m is loaded otherwise")  # type: ignore[arg-type]
        result = run()
        assert result.exit_code == exit_code
        assert "m is loaded otherwise" in result.stderr
    assert Path("out.jsonl").read_bytes() == before
    many.unloadable.clear()
    assert run().exit_code == 0
    assert len(texts()) == 2


def test_lines_of_a_model_that_cannot_be_had_fail_wherever_they_stand(many: Many) -> None:
    many.unloadable["other"] = DaemonError("corrupt", "other.gguf is cut off")
    asked(line(1, model="other.gguf"), line(2), line(3, model="other.gguf"))
    assert run().exit_code == 1
    assert (sorted(texts()), sorted(errors(), key=str)) == (["c2"], ["c1", "c3"])


def test_a_model_that_is_given_and_not_there_is_said_as_elsewhere(many: Many) -> None:
    asked(line(1))
    said = run("--model", "nowhere.gguf").stderr
    assert said == shoal("run", "nowhere.gguf", "hi").stderr


@pytest.mark.parametrize("more", [(), ("--local",), ("--retry-failed",)])
def test_a_model_that_is_given_has_a_name(many: Many, more: tuple[str, ...]) -> None:
    asked(line(1))
    result = run("--model", "", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "invalid value for '--model': an empty text names no model" in result.stderr
    assert not many.requests
    assert not Path("out.jsonl").exists()


def test_a_context_that_is_asked_for_bounds_each_answer_whoever_gives_it(many: Many) -> None:
    """A daemon may have the model with more, for others."""
    asked(line(1), line(2))
    for options, bound in ((("--ctx", "32"), 32), ((), None)):
        assert run(*options).exit_code == 0
        assert [request.context_tokens for request in many.requests] == [bound, bound]
        Path("out.jsonl").unlink()
        many.requests.clear()


def test_long_requests_get_their_context_if_that_fits(many: Many) -> None:
    asked(line(1, "x" * 40_000, max_tokens=100), line(2))
    assert run().exit_code == 0
    assert many.likely == [20_100]


def test_one_request_that_fits_nowhere_leaves_the_others_what_they_need(
    many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context is asked for that the model can have, and half of it where there is no memory for that."""
    asked(line(1, "x" * 40_000, max_tokens=100), line(2, max_tokens=1 << 26))
    many.most_likely = 20_000
    assert run().exit_code == 0
    assert many.likely[0] == 1 << 26
    assert (many.likely[-2], many.likely[-1]) == (1 << 15, 1 << 14)
    monkeypatch.setattr("shoal.daemon.loading.checkpoint_facts.longest_context", lambda path: 40_000)
    Path("out.jsonl").unlink()
    many.likely.clear()
    assert run().exit_code == 0
    assert many.likely == [40_000, 20_000]
    many.most_likely = 0
    Path("out.jsonl").unlink()
    assert run().exit_code == 0
    assert many.likely[-2:] == [5000, None]


def test_what_begins_alike_stands_together_and_long_answers_come_first(many: Many) -> None:
    beginnings = [f"{letter} begins like this and goes on " * 3 for letter in "abcd"]
    lines = [line(n, beginnings[n % 4] + str(n), max_tokens=40) for n in range(20)]
    asked(line(90, max_tokens=10), *lines, line(91, max_tokens=1000))
    with (
        RequestLines(Path("in.jsonl")) as requests,
        AnswerFile(Path("out.jsonl"), requests.stat) as out,
    ):
        order = [it.number for it in BatchOrder(requests, out, None).of_model(0)]
    assert (order[0], order[-1]) == (22, 1)
    groups = [(number - 2) % 4 for number in order[1:-1]]
    assert sum(a != b for a, b in pairwise(groups)) == 3
    assert not Path("out.jsonl").exists()


def test_lines_that_failed_may_be_changed_and_no_others(many: Many) -> None:
    asked(line(1), line(2, n=2), line(3))
    assert run().exit_code == 1
    asked(line(1), line(2, n=1), line(3))
    before = Path("out.jsonl").read_bytes()
    result = run()
    assert result.exit_code == 2
    assert "lines that failed may be changed with --retry-failed" in result.stderr
    asked(line(1), line(2, n=1), line(3, "other"))
    assert "line 3 of in.jsonl, or --model, is another" in run("--retry-failed").stderr
    assert Path("out.jsonl").read_bytes() == before
    asked(line(1), line(2, n=1), line(3))
    assert run("--retry-failed").exit_code == 0
    assert sorted(texts()) == ["c1", "c2", "c3"]


# --- files -------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said", "code"),
    [
        (lambda: None, "no such file: in.jsonl", 1),
        (lambda: Path("in.jsonl").mkdir(), "in.jsonl is a directory", 2),
        (lambda: _pipe(Path("in.jsonl")), "in.jsonl is a pipe or a device", 2),
        (lambda: asked(b""), "in.jsonl has no requests", 2),
        (lambda: asked(b"\xef\xbb\xbf\r\n\n"), "in.jsonl has no requests", 2),
        (lambda: asked(line(1).decode().encode("utf-16")), "in.jsonl is UTF-16: it must be UTF-8", 2),
        (lambda: asked(gzip.compress(line(1))), "in.jsonl is compressed (gzip): it must be UTF-8", 2),
        (lambda: asked(b"PK\x03\x04..."), "in.jsonl is compressed (zip): it must be UTF-8", 2),
        (lambda: asked(line(1)) or os.link("in.jsonl", "out.jsonl"), "out.jsonl is the file of requests", 2),
        (
            lambda: asked(line(1)) or Path("out.jsonl").mkdir(),
            "out.jsonl cannot be written: Is a directory",
            2,
        ),
        (lambda: asked(line(1)) or _pipe(Path("out.jsonl")), "out.jsonl is no file", 2),
        (lambda: asked(line(1)) or Path("out.jsonl").symlink_to("/dev/full"), "out.jsonl is no file", 2),
        (
            lambda: asked(line(1)) or Path("out.jsonl").symlink_to("no/x"),
            "out.jsonl cannot be written: No such",
            2,
        ),
        (
            lambda: asked(line(1)) or Path("out.jsonl").write_text("mine"),
            "line 1 is no answer of shoal batch",
            2,
        ),
        (
            lambda: asked(line(1)) or Path("out.jsonl").write_text("{}\n"),
            "line 1 is no answer of shoal batch",
            2,
        ),
        (
            lambda: asked(line(1)) or Path("out.jsonl").write_text('{"x":' + "[" * 100_000 + "\n"),
            "line 1 is no answer of shoal batch",
            2,
        ),
    ],
)
def test_files_that_will_not_do(many: Many, make: Callable[[], object], said: str, code: int) -> None:
    make()
    before = Path("out.jsonl").read_bytes() if Path("out.jsonl").is_file() else None
    result = run()
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not many.requests
    if before is not None:
        assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize(("descriptor", "what"), [(1, "stdout"), (2, "stderr")])
def test_answers_do_not_go_where_the_summary_goes(many: Many, descriptor: int, what: str) -> None:
    asked(line(1))
    kept = os.dup(descriptor)
    try:
        with Path("out.jsonl").open("wb") as out:
            os.dup2(out.fileno(), descriptor)
        result = run()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
    assert result.exit_code == 2
    assert f"out.jsonl is the file that {what} goes to" in result.stderr
    assert not Path("out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("names", "said"), [(("in.jsonl", "-"), "OUT must be a file"), (("-", "out.jsonl"), "IN must be")]
)
def test_streams_are_no_files(many: Many, names: tuple[str, str], said: str) -> None:
    asked(line(1))
    result = shoal("batch", *names)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("-").exists()


def test_two_processes_do_not_write_one_file(many: Many) -> None:
    asked(line(1))
    with Path("out.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = run()
    assert result.exit_code == 3
    assert result.stderr == "shoal: another process writes out.jsonl just now\n"
    assert run().exit_code == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_taken_away_before_it_was_locked_is_not_written(
    many: Many, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Another process ended in between, and has removed its empty file, or replaced it by one without failed lines."""
    asked(line(1))
    Path("out.jsonl").touch()
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        Path("out.jsonl").unlink()
        if replaced:
            Path("out.jsonl").touch()
        lock(descriptor, how)

    with monkeypatch.context() as racing:
        racing.setattr(answer_file.fcntl, "flock", late)
        result = run()
    assert (result.exit_code, result.stderr) == (3, "shoal: another process writes out.jsonl just now\n")
    assert run().exit_code == 0


@pytest.mark.parametrize("every_s", [-1.0, 1e9])
def test_answers_that_go_where_nobody_finds_them_are_no_success(
    many: Many, monkeypatch: pytest.MonkeyPatch, every_s: float
) -> None:
    monkeypatch.setattr(answer_file, "SYNC_S", every_s)
    asked(*(line(number) for number in range(5)))

    def take_away(request: Any) -> None:
        if Path("out.jsonl").exists():
            Path("out.jsonl").rename("elsewhere")

    many.trouble = take_away  # type: ignore[assignment]
    result = run()
    assert result.exit_code == 2
    assert "out.jsonl was moved or removed while it was written" in result.stderr
    Path("elsewhere").rename("out.jsonl")
    many.trouble = lambda request: None
    assert run().exit_code == 0
    assert len(texts()) == 5


def test_lines_are_brought_to_the_disk_though_none_follows(
    many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(line(1))
    synced: list[int] = []
    monkeypatch.setattr(answer_file.os, "fsync", synced.append)
    with (
        RequestLines(Path("in.jsonl")) as requests,
        AnswerFile(Path("out.jsonl"), requests.stat) as out,
    ):
        out.add(b"1")
        out.settle()
        assert not synced
        monkeypatch.setattr(answer_file, "SYNC_S", -1.0)
        out.settle()
        assert synced
        count = len(synced)
        out.settle()
        assert len(synced) == count


def test_files_of_like_names_stay(many: Many) -> None:
    asked(line(1), line(2, n=2))
    for name in ("out.jsonl.partial", "out.jsonl~", "out"):
        Path(name).write_text("mine")
    assert run().exit_code == 1
    assert run("--retry-failed").exit_code == 1
    assert {Path(name).read_text() for name in ("out.jsonl.partial", "out.jsonl~", "out")} == {"mine"}


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "free some space"), (errno.EFBIG, "raise the limit of a file's size (ulimit -f)")],
)
def test_a_full_disk_tears_no_line(
    number: int, hint: str, many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(*(line(number) for number in range(5)))
    written, room = os.write, 900

    def write(descriptor: int, data: Any) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(number, os.strerror(number))
        count = written(descriptor, data[: min(len(data), room)])
        room -= count
        return count

    with monkeypatch.context() as full:
        full.setattr(answer_file.os, "write", write)
        result = run()
    assert result.exit_code == 3
    said = f"out.jsonl cannot be written: {os.strerror(number)} ({hint}; the same command then goes on)"
    assert said in result.stderr
    kept = Path("out.jsonl").read_bytes()
    assert kept.endswith(b"\n")
    assert 0 < len(kept) <= 900
    assert run().exit_code == 0
    assert len(texts()) == 5


def test_requests_that_change_under_way_are_noticed(many: Many) -> None:
    asked(*(line(number) for number in range(9)))

    def change(request: Any) -> None:
        Path("in.jsonl").write_bytes(Path("in.jsonl").read_bytes().replace(b"ask", b"kas"))

    many.trouble = change  # type: ignore[assignment]
    result = run()
    assert result.exit_code == 2
    assert "in.jsonl was changed while it was answered" in result.stderr


def test_a_file_of_many_lines_is_not_held(many: Many) -> None:
    """About a hundred bytes of each line are kept, however long it is."""
    asked(*(line(number, f"{number} " + "x" * 5000) for number in range(400)))
    with (
        RequestLines(Path("in.jsonl")) as requests,
        AnswerFile(Path("out.jsonl"), requests.stat) as out,
    ):
        order = BatchOrder(requests, out, None)
        assert order.lines == 400
        assert order._rows.nbytes <= 100 * 400

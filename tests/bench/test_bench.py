"""The benchmark harness: workers and their calls, turns, figures and the table; nothing is timed."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import table
from engines import worker
from engines.engine_process import EngineFailed, EngineKind
from engines.engine_shoal import Shoal
from fakes import tiny
from harness import machine, scenarios
from harness.figures import Figure, spread
from harness.rows import DEFAULT_MODEL, ROWS, chosen
from harness.run import Run
from inputs.shapes import SHAPES

ECHO = """
from engines import worker

class Echo:
    def repeat(self, text, times):
        print("not an answer")
        return text * times

    def fail(self):
        raise ValueError("on purpose")

    def end(self):
        raise SystemExit

worker.serve(Echo())
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineKind:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(Path(worker.__file__).parent))
    return EngineKind("echo", str(script), sys.executable)


def test_a_worker_answers_calls_and_goes_on_after_errors(echo: EngineKind) -> None:
    with echo.start() as engine:
        assert engine.call("repeat", text="é", times=2) == "éé"
        with pytest.raises(EngineFailed, match=r"echo failed to fail: ValueError: on purpose"):
            engine.call("fail")
        assert engine.call("repeat", text="a", times=1) == "a"


def test_a_worker_that_ends_is_told_of(echo: EngineKind) -> None:
    with echo.start() as engine, pytest.raises(EngineFailed, match="ended while it was asked to end"):
        engine.call("end")


def test_a_python_that_is_not_there() -> None:
    with pytest.raises(EngineFailed, match="/nowhere/python for llama"):
        EngineKind("llama.cpp", "engine_llama.py", "/nowhere/python").start()


def test_every_engine_gets_the_same_prompts() -> None:
    first, second = worker.prompts(2, 5, 100, seed=1)
    assert worker.prompts(2, 5, 100, seed=1) == [first, second]
    assert worker.prompts(1, 5, 100, seed=2) != [first]
    assert len(first) == 5
    assert max(first + second) < 100


def test_shoals_worker_counts_the_tokens_of_all_streams(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "tiny.gguf")
    engine = Shoal()
    engine.load(str(path), context=40, streams=2, threads=1)
    assert engine.begin(streams=2, tokens=10, seed=0)["tokens"] == 20
    advanced = engine.advance(tokens=3)
    assert advanced["tokens"] == 6
    assert advanced["seconds"] > 0
    engine.end()
    assert engine.begin(streams=1, tokens=20, seed=1)["tokens"] == 20
    with pytest.raises(RuntimeError, match="a sequence ended early"):
        engine.advance(tokens=40)


def test_engines_take_turns_at_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "dram_read_gb_per_s", lambda threads: 30.0)
    run = Run(Path("model"), threads=1, rounds=3, peer_python="python")
    names: list[Any] = ["ours", "theirs"]
    turns = [(number, engine) for number, engine in run.turns(names)]
    assert turns == [(0, "ours"), (0, "theirs"), (1, "theirs"), (1, "ours"), (2, "ours"), (2, "theirs")]
    assert run.dram_gb_per_s == [30.0] * 3


def test_prompts_of_many_streams_are_measured_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        name = "shoal"
        begun = 0

        def call(self, what: str, **arguments: int) -> dict[str, float]:
            self.begun += what == "begin"
            return {"tokens": 100.0 * self.begun, "seconds": 1.0}

    monkeypatch.setattr(machine, "dram_read_gb_per_s", lambda threads: 30.0)
    monkeypatch.setattr(Run, "engines", lambda *_, **how: nullcontext([Engine()]))
    run = Run(Path("model"), threads=1, rounds=3, peer_python="python")
    prefill, decode = scenarios.speed(run, scenarios.Sizes(prompt=128, new=24, streams=16))
    assert (prefill.name, decode.name) == ("prefill of 16 × 128", "decode, 16 streams")
    assert prefill.values == decode.values == {"shoal": [100.0, 200.0, 300.0]}


def test_ratios_are_by_round_and_above_one_where_shoal_is_better() -> None:
    speed = Figure("decode", "tokens/s", values={"shoal": [20.0, 30.0], "peer": [10.0, 60.0]})
    assert speed.ratios() == [2.0, 0.5]
    delay = Figure("TTFT", "s", "less", {"shoal": [1.0], "peer": [3.0]})
    assert delay.ratios() == [3.0]
    assert Figure("alone", "s", "less", {"shoal": [1.0]}).ratios() == []
    assert Figure("share", "", "neither", {"shoal": [1.0], "peer": [2.0]}).ratios() == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([1302.4], "1,302"),
        ([0.0], "0.000"),
        ([12.345, 1.2, 123.4], "12.3 (1.20–123)"),
        ([0.0321, 0.02, 0.04], "0.0321 (0.0200–0.0400)"),
    ],
)
def test_spread(values: list[float], text: str) -> None:
    assert spread(values) == text


def result(*figures: Figure) -> dict[str, Any]:
    row = {
        "date": "2000-01-01",
        "versions": {"commit": "abc", "scheduling": "default"},
        "threads": 2,
        "rounds": 2,
        "model": {"name": "a-model", "bytes": 10, "bytes_per_token": 500_000_000},
        "engines": {"shoal": {"version": "1"}, "llama.cpp": {"version": "llama 2"}},
        "dram_gb_per_s": [25.0],
        "load": [0.1],
        "figures": [figure.to_json() for figure in figures],
    }
    known = {
        "cpu": "a CPU",
        "flags": ["avx2"],
        "virtual": False,
        "cores": 2,
        "memory_gb": 8.0,
        "system": "Linux",
    }
    return json.loads(json.dumps({"machine": known, "rows": {"speed": row}}))


def test_a_result_becomes_a_table() -> None:
    values = {"shoal": [20.0, 40.0], "llama.cpp": [10.0, 10.0]}
    lines = table.table(
        result(Figure("decode", "tokens/s", "more", values, True), Figure("x", "", "less"))
    ).split("\n")
    assert lines[0] == "2 × a CPU (avx2), 8.0 GB, Linux."
    cells = (
        "decode, tokens/s",
        "a-model",
        "30.0 (20.0–40.0)",
        "llama.cpp 10.00",
        "**3.00 (2.00–4.00)**",
        "15.0, 5.0; 25.00",
    )
    assert f"| {' | '.join(cells)} |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}
    assert lines[-1] == "2000-01-01; commit abc; 2 threads; 2 rounds; scheduling default; llama 2."


def test_the_table_replaces_what_stands_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- offload: made by table.py -->\nold\n<!-- end of offload -->\nafter\n")
    table.write(readme, "offload", "new")
    assert (
        readme.read_text()
        == "before\n<!-- offload: made by table.py -->\nnew\n<!-- end of offload -->\nafter\n"
    )
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        table.write(readme, "offload", "new")


def test_rows_are_chosen_by_how_they_begin() -> None:
    assert [row.name for row in chosen("streams-llama, turns")] == ["streams-llama", "turns"]
    assert [row.name for row in chosen("streams")] == ["streams"]
    assert all(row.name.startswith("speed") for row in chosen("speed"))
    assert chosen("") == list(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.model for row in ROWS if not row.type} <= {DEFAULT_MODEL, *SHAPES}
    with pytest.raises(ValueError, match="no row begins with 'lunch'"):
        chosen("speed,lunch")

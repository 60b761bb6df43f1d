"""`shoal pull`, `ls`, `show` and `rm`, and `bench`, `perplexity` and `doctor`: what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.cli_fakes import FakeClient, model_status, shoal

from shoal import client as client_room
from shoal.cli import background
from shoal.comm.errors import TimedOut
from shoal.daemon import measurement as measure
from shoal.daemon.errors import DaemonError
from shoal.kernels import homes
from shoal.partition.amounts import format_bytes


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tiny.hf_model("qwen2", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    return tiny.save_gguf(model, tmp_path / "tiny.gguf")


def size_of(path: Path) -> str:
    return format_bytes(path.stat().st_size)


@pytest.mark.parametrize("what", ["an empty directory", "no weights", "a pickle", "text", "a GGUF inside"])
def test_what_is_no_model_is_refused_in_the_same_words(home: object, tmp_path: Path, what: str) -> None:
    place = tmp_path / "model"
    if what == "text":
        place.write_text("hello")
    else:
        place.mkdir()
    if what in ("no weights", "a pickle"):
        (place / "config.json").write_text("{}")
    if what == "a pickle":
        (place / "pytorch_model.bin").write_bytes(b"\x80\x04")
    if what == "a GGUF inside":
        (place / "x.gguf").write_bytes(b"GGUF")
    results = [shoal(verb, str(place)) for verb in ("pull", "show", "pack")]
    assert len({(result.exit_code, result.stderr) for result in results}) == 1
    assert results[0].exit_code == 1
    assert str(place) in results[0].stderr


def test_a_model_is_pulled_listed_and_removed(model: Path) -> None:
    result = shoal("ls")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "the store is empty; try: shoal pull smollm2\n"
    result = shoal("pull", str(model))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"tiny ({size_of(model)}) is in the store; try: shoal chat tiny\n"
    assert "is in the store already" in shoal("pull", str(model)).stderr
    listed = shoal("ls").stdout
    assert "tiny" in listed
    assert size_of(model) in listed
    assert str(model) in listed, "a row of a table is folded where it is piped"
    (entry,) = json.loads(shoal("ls", "--json").stdout)
    assert list(entry) == ["name", "kind", "bytes", "path", "source", "added", "packs"]
    assert (entry["name"], entry["kind"], entry["bytes"]) == ("tiny", "gguf", model.stat().st_size)
    refused = shoal("rm", "tiny")
    assert refused.exit_code == 2
    assert "there is no terminal to ask on (--yes removes without asking)" in refused.stderr
    assert shoal("rm", "--yes", "tiny").exit_code == 0
    assert json.loads(shoal("ls", "--json").stdout) == []
    gone = shoal("rm", "--yes", "tiny")
    assert gone.exit_code == 1
    assert "no model called 'tiny'" in gone.stderr


@pytest.mark.parametrize("verb", ["pull", "rm", "rm --packs", "show", "pack", "run", "draft"])
@pytest.mark.parametrize(
    "written", ["./tiny.gguf", "tiny.gguf", "sub/tiny.gguf", "./hf", "stored", "smollm2"]
)
def test_a_suffix_that_cannot_be_there_is_told_with_what_is_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, verb: str, written: str
) -> None:
    monkeypatch.chdir(model.parent)
    for name in ("sub", "hf"):
        (model.parent / name).mkdir()
    (model.parent / "sub" / "tiny.gguf").write_bytes(model.read_bytes())
    shoal("pull", "--name", "stored", str(model))
    if verb in ("show", "pack", "run"):  # these take :q4
        suffix, said = ":Q4_K_M", f"only :q8 and :q4 can follow {written if 'gguf' in written else ''}"
    else:
        suffix, said = ":q4", f"{written}, which is named without :q4 here"
    if (verb, written) == ("draft", "smollm2"):
        said = "smollm2 is not in the store yet"
    before = {"draft": ["run", "--local", str(model), "hi", "--draft"]}.get(verb, verb.split())
    result = shoal(*before, f"{written}{suffix}", *(["hi"] if verb == "run" else []))
    assert result.exit_code == 1
    assert said.removeprefix("./") in result.stderr
    assert result.stderr.count("\n") == 1


def test_pull_as_json_and_under_another_name(model: Path) -> None:
    result = shoal("pull", "--json", "--link", "--name", "other", str(model))
    found = json.loads(result.stdout)
    assert found["name"] == "other"
    assert Path(found["path"]).samefile(model)


def test_damaged_models_are_told_and_can_be_removed(model: Path, home: Path) -> None:
    shoal("pull", str(model))
    (home / "models" / "tiny" / "manifest.json").unlink()
    assert "tiny is damaged" in shoal("ls").stderr
    assert shoal("rm", "tiny").exit_code == 0
    assert shoal("ls").stderr == "the store is empty; try: shoal pull smollm2\n"


def test_show_tells_the_facts(tmp_path: Path) -> None:
    path = tiny.save_gguf(tiny.hf_model("qwen3"), tmp_path / "tiny.gguf", type="Q8_0")
    found = json.loads(shoal("show", "--json", str(path)).stdout)
    assert (found["family"], found["layers"], found["kind"]) == ("qwen3", 3, "gguf")
    assert (found["hidden"], found["heads"], found["kv_heads"], found["context"]) == (64, 4, 2, 128)
    assert found["tensor_types"]["Q8_0"] > 0
    assert found["chat_template"] is False
    text = shoal("show", str(path)).stdout
    assert "chat template" in text
    assert "license" in text


def test_show_tells_how_it_would_run(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.partition.streamed_plan.READING_BYTES", 1 << 18)
    monkeypatch.setattr("shoal.partition.streamed_plan.SCRATCH_SHARE", 1)
    monkeypatch.setattr("shoal.daemon.memory.private_bytes", lambda: 200 << 20)
    model = tiny.hf_model("qwen2", num_hidden_layers=6, hidden_size=512, intermediate_size=4096)
    path = tiny.save_gguf(model, tmp_path / "tiny.gguf", type="F16")

    def plan(*options: str) -> dict[str, Any]:
        return json.loads(shoal("show", "--json", *options, str(path)).stdout)["plan"]

    refused = plan("--memory", "1MB", "--ctx", "64")
    assert not refused["fits"]
    assert "MB for the process; the budget is 1 MB" in refused["refused"]
    least = refused["least_bytes"]
    streamed = plan("--memory", str(least + (8 << 20)), "--ctx", "64")
    assert streamed["fits"]
    assert 0 < streamed["streamed_bytes"] <= streamed["weights_bytes"]
    assert streamed["step_s"] == pytest.approx(
        streamed["streamed_bytes"] / streamed["read_bytes_per_s"], 1e-3
    )
    assert sum(streamed["memory_bytes"].values()) == streamed["budget_bytes"]
    assert streamed["pack_bytes"] > streamed["weights_bytes"] * 0.9
    assert not streamed["packed"]
    whole = plan()
    assert (whole["streamed_bytes"], whole["pack_bytes"], whole["step_s"]) == (0, 0, 0.0)
    fewer = plan("--quant", "q4")
    assert (fewer["quant"], fewer["streamed_bytes"]) == ("q4", 0)
    assert fewer["weights_bytes"] < whole["weights_bytes"] / 3
    assert not (home / "packs").exists() or not list((home / "packs").iterdir())
    text = shoal("show", "--memory", str(least + (8 << 20)), "--ctx", "64", str(path)).stdout
    for word in (
        "weights",
        "window",
        "KV",
        "scratch",
        "process",
        "stay in memory",
        "for each token",
        "shoal pack",
    ):
        assert word in text
    text = shoal("show", "--memory", "1MB", "--ctx", "64", str(path)).stdout
    assert "MB would do, or a smaller --ctx" in text


def test_show_of_what_is_no_model(model: Path) -> None:
    model.write_bytes(b"GGUF" + bytes(10_000))
    result = shoal("show", str(model))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"shoal: {model}: ")
    assert result.stderr.count(str(model)) == 1
    assert result.stderr.count("\n") == 1


# --- measuring --------------------------------------------------------------------------------------------


def test_bench_passes_its_options_and_prints_its_fields(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def bench(path: Path, **options: Any) -> measure.BenchResult:
        asked.update(options, path=path)
        options["progress"]("measuring", 1, 2)
        speed = measure.Spread(median=20.0, min=10.0, max=30.0)
        return measure.BenchResult(
            speed, speed, peak_memory_bytes=5_000_000, resident_weight_bytes=4_000_000, threads=1
        )

    monkeypatch.setattr(measure, "bench", bench)
    options = ["--prompt-tokens", "8", "--new-tokens", "4", "--batch", "2", "--repeat", "1", "--threads", "1"]
    found = json.loads(shoal("bench", str(model), *options, "--json").stdout)
    assert found == {
        "prefill_tokens_per_s": {"median": 20.0, "min": 10.0, "max": 30.0},
        "decode_tokens_per_s": {"median": 20.0, "min": 10.0, "max": 30.0},
        "peak_memory_bytes": 5_000_000,
        "resident_weight_bytes": 4_000_000,
        "threads": 1,
        "ranks": 1,
    }
    assert asked["path"] == model
    assert (asked["prompt_tokens"], asked["new_tokens"], asked["batch"], asked["repeat"]) == (8, 4, 2, 1)
    assert asked["config"].threads == 1
    text = shoal("bench", str(model)).stdout
    assert "prefill" in text
    assert "512 + 64 tokens, batch 1, 3 runs" in text


def test_perplexity_prints_its_fields(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def perplexity(path: Path, file: Path, **options: Any) -> measure.PerplexityResult:
        asked.update(options)
        return measure.PerplexityResult(perplexity=12.5, tokens=256)

    monkeypatch.setattr(measure, "perplexity", perplexity)
    text = tmp_path / "text.txt"
    text.write_text("words")
    found = json.loads(shoal("perplexity", "--json", str(model), str(text)).stdout)
    assert found == {"perplexity": 12.5, "tokens": 256}
    assert asked["ctx"] == 512
    shoal("perplexity", "--ctx", "64", str(model), str(text))
    assert asked["ctx"] == 64
    assert shoal("perplexity", str(model), str(tmp_path / "gone.txt")).exit_code == 1


# --- doctor -----------------------------------------------------------------------------------------------


def findings(*options: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = shoal("doctor", "--json", *options)
    found = json.loads(result.stdout)
    assert found["works"] == (result.exit_code == 0)
    return result.exit_code, {finding["name"]: finding for finding in found["findings"]}


def test_doctor_finds_a_new_machine_well(home: Path) -> None:
    code, found = findings()
    assert code == 0
    assert {"python", "torch", "kernels", "compiler", "threads", "memory", "home", "disk"} <= set(found)
    assert found["models"]["mend"] == "shoal pull smollm2"
    assert found["daemon"]["found"] == "not running"
    assert not home.exists()
    assert "→ shoal pull smollm2" in shoal("doctor").stdout


def test_doctor_finds_what_is_broken(model: Path, home: Path) -> None:
    shoal("pull", str(model))
    stored = home / "models" / "tiny" / "tiny.gguf"
    stored.write_bytes(b"X" * stored.stat().st_size)
    assert findings()[0] == 0
    code, found = findings("--deep")
    assert code == 1
    assert found["hashes"]["state"] == "broken"
    assert "shoal rm --yes tiny" in found["hashes"]["mend"]
    home.chmod(0o755)
    assert findings()[1]["home"]["mend"] == f"chmod 700 {home}"


def test_a_home_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", "/proc/shoal")
    code, found = findings()
    assert (code, found["home"]["state"], found["home"]["mend"]) == (
        1,
        "broken",
        "export SHOAL_HOME=/a/directory/of/yours",
    )
    assert found["home"]["found"].startswith("/proc/shoal cannot be made: ")
    assert "disk" not in found


def test_a_home_that_is_a_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(model))
    code, found = findings()
    assert (code, found["home"]["found"]) == (1, f"{model} is no directory")
    assert "check" not in found
    for verb in (("ls",), ("show", "smollm2"), ("ps",), ("plan", "smollm2")):
        result = shoal(*verb)
        assert result.exit_code == 2
        assert result.stderr == f"shoal: SHOAL_HOME={model}: is no directory (set it to one of your own)\n"


def test_a_home_that_cannot_be_made_is_no_empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", "/proc/shoal")
    result = shoal("ls")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(
        "shoal: SHOAL_HOME=/proc/shoal: cannot be made: /proc cannot be written: "
    )
    assert "empty" not in result.stderr


def test_a_home_below_a_file_is_said_so_by_every_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_HOME", str(file / "home"))
    for verb in ("ls", "ps", "stop"):
        result = shoal(verb)
        assert result.exit_code == 2
        assert f"SHOAL_HOME={file}/home: cannot be made: {file} is no directory" in result.stderr
    code, found = findings()
    assert (code, found["home"]["found"]) == (1, f"{file}/home cannot be made: {file} is no directory")


def test_doctor_shows_the_rest_where_the_kernels_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_KERNELS", "foo")
    monkeypatch.setattr(homes, "_cpu", None)
    code, found = findings()
    assert (code, found["kernels"]["state"], found["kernels"]["mend"]) == (1, "broken", "unset SHOAL_KERNELS")
    assert found["kernels"]["found"].startswith("SHOAL_KERNELS='foo': ")
    assert {"compiler", "memory", "home", "models", "daemon"} <= set(found)
    assert not {"check", "profile"} & set(found)


def test_doctor_asks_the_daemon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(model_status("big"))
    monkeypatch.setattr(client_room, "Client", client)
    monkeypatch.setattr(background, "running_pid", lambda home: 4242)
    assert findings()[1]["daemon"]["found"] == "pid 4242, big loaded"
    client.fails = TimedOut("silent")
    code, found = findings()
    assert code == 1
    assert found["daemon"]["mend"] == "shoal stop --now"


def test_doctor_survives_a_failing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(home: object) -> int:
        raise DaemonError("internal", "cannot look")

    monkeypatch.setattr(background, "running_pid", fail)
    assert findings()[1]["check"]["found"] == "cannot look"


def test_texts_of_files_reach_no_terminal_as_they_are(model: Path) -> None:
    evil = model.rename(model.with_name("[red]\x1b[2Jevil.gguf"))
    shoal("pull", "--name", "evil", str(evil))
    assert "[red][2Jevil.gguf" in shoal("ls").stdout
    evil.write_bytes(b"GGUF" + bytes(100))
    assert "\x1b" not in shoal("show", str(evil)).stderr


def test_lines_have_no_blanks_at_their_ends_in_a_pipe(model: Path, home: Path) -> None:
    shoal("pull", str(model))
    for verb in (("ls",), ("show", "tiny"), ("doctor",)):
        lines = shoal(*verb).stdout.split("\n")
        assert [line for line in lines if line != line.rstrip()] == []

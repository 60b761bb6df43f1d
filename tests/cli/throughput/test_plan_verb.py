"""`shoal plan` and `shoal profile`: what they print, what scripts get, and how they end."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from fakes import tiny

from shoal.cli.throughput import own_machines
from shoal.cli.verbs import cli
from shoal.comm.cluster_messages import LinksReply, NodesReply, NodeStatus
from shoal.comm.errors import NoDaemon
from shoal.daemon.progress import Progress
from shoal.daemon.throughput import profiling
from shoal.models.checkpoint.gguf_file import open_gguf
from shoal.partition.throughput.peak import RESIDENT_BYTES
from shoal.partition.throughput.profile import Device, Profile

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LAPTOP = {
    "devices": [
        {
            "name": "laptop",
            "memory_bytes": 4e9,
            "memory_bytes_per_s": 25e9,
            "flops": 2e11,
            "disk_bytes_per_s": 2e9,
            "threads": 8,
        }
    ]
}
FIELDS = {"name", "fits", "ttft_s", "token_s", "tokens_per_s", "band", "peak_bytes", "binding", "missing"} | {
    "needs_bytes"
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return path


@pytest.fixture
def laptop(tmp_path: Path) -> str:
    path = tmp_path / "laptop.json"
    path.write_text(json.dumps(LAPTOP))
    return str(path)


def run(*arguments: object) -> tuple[int, Result]:
    result = CliRunner().invoke(cli, [str(it) for it in arguments])
    code = result.exit_code
    return code, result


def planned(*arguments: object) -> dict[str, Any]:
    _, result = run("plan", "--json", *arguments)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_picture(config: Path, laptop: str, tmp_path: Path) -> None:
    """Speed by memory: a line for each number of bits, and where this machine is."""
    to = tmp_path / "plot.svg"
    config.write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 6}))
    arguments = ("plan", config, "--profile", laptop, "--plot", to, "--target", "1tok/s")
    code, result = run(*arguments, "--guesses", "3@0.5", "--json")
    assert code == 0, result.output
    root = ElementTree.parse(to).getroot()
    kinds = [it.tag.rpartition("}")[2] for it in root.iter()]
    assert kinds.count("polygon") == 1
    assert kinds.count("circle") == 4  # each dot has a rim; one is in the legend
    said = " ".join(it.text or "" for it in root.iter())
    for word in ("as stored", "8 bits", "4 bits", "laptop, 4 GB", "wanted, 1", "memory, GB", "tokens/s"):
        assert word in said
    found = json.loads(result.stdout)
    for curve in found["curves"]:
        speeds = [point["tokens_per_s"] for point in curve["points"]]
        assert speeds[-1] == pytest.approx(max(speeds))
        assert speeds[-1] > 2 * speeds[0]
    code, result = run("plan", config, "--profile", laptop, "--plot", tmp_path / "none" / "plot.png")
    assert code == 2
    assert "none is no directory" in result.stderr


def test_a_device_is_left_out_and_that_is_said(config: Path, laptop: str) -> None:
    code, result = run("plan", config, "--profile", laptop, "--device", "sim:1GB")
    assert (code, "--device sim:1GB is left out" in result.stderr) == (0, True)


def test_a_70b_on_a_laptop_from_its_config_alone(config: Path, laptop: str) -> None:
    planned(config, "--profile", laptop)  # imports
    began_s = time.process_time()
    found = planned(config, "--profile", laptop)
    assert time.process_time() - began_s < 2
    assert set(found) == {"chosen", "reason", "best", "plans", "start"}
    assert found["best"][0] == found["chosen"]
    assert all(set(row) == FIELDS for row in found["plans"])
    by_name = {row["name"]: row for row in found["plans"]}
    whole = by_name["memory"]
    assert not whole["fits"]
    assert "memory" in whole["missing"]
    assert 141e9 < whole["peak_bytes"]["laptop"] < 147e9
    assert whole["token_s"] == pytest.approx(139e9 / 25e9, rel=0.02)
    stream = by_name[found["chosen"]]
    assert stream["fits"]
    assert stream["missing"] is None
    assert stream["binding"] == "disk"
    assert 137e9 / 2e9 < stream["token_s"] < 80
    assert stream["band"][0] < stream["tokens_per_s"] < stream["band"][1]
    assert stream["peak_bytes"]["laptop"] <= 4e9
    assert "disk-bound" in found["reason"]
    assert "times" in found["reason"]
    # 2 × 70e9 operations for each token of the prompt, at 200 GFLOP/s.
    assert 0.9 * 512 * 140e9 / 200e9 < by_name["stream, q4"]["ttft_s"] < 1.3 * 512 * 140e9 / 200e9


def test_the_table(config: Path, laptop: str) -> None:
    code, result = run("plan", config.parent, "--profile", laptop, "--target", "0.045tok/s")
    assert code == 0
    assert "→ stream" in result.stdout
    assert "after making its pack once in" in result.stdout
    assert "0.045 tokens/s would take weights in 4 bits" in result.stdout


def test_the_table_has_what_matters_and_says_how_much_more_there_is(config: Path, laptop: str) -> None:
    plans = {row["name"]: row["fits"] for row in planned(config, "--profile", laptop)["plans"]}
    _, few = run("plan", config, "--profile", laptop)
    lines = few.stdout.partition("\n\n")[0].splitlines()
    shown = [line[2:].partition("  ")[0] for line in lines[2:-1]]
    assert all(plans[name] for name in shown)
    lacking = list(plans.values()).count(False)
    assert lines[-1] == f"  and {len(plans) - len(shown)} more ({lacking} do not fit): --all"
    _, whole = run("plan", config, "--profile", laptop, "--all")
    said = {line[2:].partition("  ")[0]: line[0] for line in whole.stdout.partition("\n\n")[0].splitlines()}
    assert all(said[name] in (" →" if fits else "✗") for name, fits in plans.items())
    assert "--all" not in whole.stdout


def test_what_does_not_fit_says_the_memory_with_which_it_would(config: Path, laptop: str) -> None:
    asked = config, "--profile", laptop, "--memory"
    rows = {row["name"]: row for row in planned(*asked, "300MB")["plans"]}
    assert rows["memory"]["needs_bytes"] > rows["memory"]["peak_bytes"]["laptop"]
    for name in ("memory", "stream, q4"):
        row = next(it for it in planned(*asked, rows[name]["needs_bytes"])["plans"] if it["name"] == name)
        assert (row["fits"], row["needs_bytes"]) == (True, None)
    _, shown = run("plan", *asked, "300MB")
    assert "a plan needs room for any request, a peak is of this job alone" in shown.stdout
    assert "more that do not fit: --all" in shown.stdout


def test_a_model_that_nothing_runs(config: Path, laptop: str) -> None:
    code, result = run("plan", config, "--profile", laptop, "--memory", "300MB", "--json")
    found = json.loads(result.stdout)
    assert code == 3
    assert found["chosen"] is None
    assert "the smallest machine that could run it has" in found["reason"]


def test_one_choice_is_fixed_and_others_stay_open(config: Path, laptop: str) -> None:
    found = planned(config, "--profile", laptop, "--quant", "q4", "--threads", 4, "--ctx", 4096)
    assert all("q4" in row["name"] for row in found["plans"])
    assert found["chosen"]


def planned_names(*asked: object) -> list[str]:
    return [row["name"] for row in planned(*asked)["plans"]]


def test_options_that_plans_take_change_what_is_predicted(config: Path, tmp_path: Path) -> None:
    """Guesses have rows of their own, and sums of fewer bits travel faster."""
    config.write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 8}))
    path = tmp_path / "two.json"
    device = {"memory_bytes": 64e9, "memory_bytes_per_s": 25e9, "flops": 2e11}
    link = {"between": ["a", "*"], "latency_s": 2e-4, "bytes_per_s": 1e7}
    path.write_text(json.dumps({"devices": [{"name": it} | device for it in "ab"], "links": [link]}))
    arguments = (config, "--profile", path, "--ranks", 2)
    exact, rounded, fewer = (
        planned(*arguments, *more)["plans"][0]
        for more in ((), ("--cluster-wire", "int8"), ("--speculate", "off"))
    )
    assert rounded["ttft_s"] < 0.7 * exact["ttft_s"]
    assert fewer["peak_bytes"]["a"] < exact["peak_bytes"]["a"]


def test_a_header_is_enough(model: Path, tmp_path: Path, laptop: str) -> None:
    data = model.read_bytes()
    with closing(open_gguf(model)) as files:
        offsets = [it.offset for it in files.tensors.values()]
    first, longest = min(offsets), max(offsets)
    whole = planned(model, "--profile", laptop, "--prompt-tokens", 16, "--new-tokens", 8)
    for end in (first, longest):
        path = tmp_path / "header.gguf"
        path.write_bytes(data[:end])
        found = planned(path, "--profile", laptop, "--prompt-tokens", 16, "--new-tokens", 8)
        assert re.fullmatch(
            r"header.gguf has \S+ .?B of its \S+ .?B: .*, but it cannot run", found.pop("trouble")
        )
        assert found == whole
    path.write_bytes(data[: first // 2])
    code, result = run("plan", path, "--profile", laptop)
    assert code == 1
    assert result.stderr.count("\n") == 1


def test_a_directory_with_an_index_and_no_weights(config: Path, laptop: str) -> None:
    (config.parent / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert planned(config.parent, "--profile", laptop) == planned(config, "--profile", laptop)


def test_a_header_of_safetensors_is_enough(tmp_path: Path, laptop: str) -> None:
    directory = tiny.save_hf(tiny.hf_model("qwen2"), tmp_path / "m")
    whole = planned(directory, "--profile", laptop, "--prompt-tokens", 16, "--new-tokens", 8)
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    code, result = run(
        "plan", directory, "--profile", laptop, "--prompt-tokens", 16, "--new-tokens", 8, "--json"
    )
    found = json.loads(result.stdout)
    assert (code, result.stderr) == (0, found.pop("trouble") + "\n")
    assert "model.safetensors has" in result.stderr
    assert found == whole


def test_a_real_checkpoint(model: Path, laptop: str) -> None:
    found = planned(model, "--profile", laptop, "--prompt-tokens", 16, "--new-tokens", 8)
    assert found["chosen"] == "memory"
    assert found["plans"][0]["peak_bytes"]["laptop"] > RESIDENT_BYTES


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--ctx", 100), "512 + 128 tokens exceed the context of 100", 3),
        (("--prompt-tokens", 1 << 20), "the model's context of", 3),
        (("--target", "10MB"), "'10MB': must be a number of tokens a second, above 0 and at most", 2),
        (("--target", "fast"), "; write 10tok/s (see", 2),
        (("--guesses", "65"), "'65': must be a number of tokens from 1 to 64", 2),
        (("--guesses", "4@2"), "'4@2': must be a number of tokens", 2),
        (("--guesses", "4@"), "'4@': must be a number of tokens", 2),
        (("--ranks", "2"), "--ranks 2: must be 1, the only machine of the profile", 2),
        (("--memory", "0"), "--memory 0 B: must be from 1 B to 1.13 PB", 2),
        (("--target", "0"), "", 2),
        (("--batch", 0), "", 2),
        (("--batch", 5000), "", 2),
        (("--new-tokens", 10**30), "the model's context of", 3),
        (("--memory", "lots"), "lots", 2),
        (("--plot", "plot.pdf"), "plots are written as .png or .svg", 2),
    ],
)
def test_bad_input(config: Path, laptop: str, arguments: tuple[object, ...], said: str, code: int) -> None:
    ended, result = run("plan", config, "--profile", laptop, *arguments)
    assert ended == code
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "unexpected" not in result.stderr


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model_type": "llama"}', '{"model_type": "none"}', '{"hidden_size": NaN}']
)
def test_a_config_that_is_none(tmp_path: Path, laptop: str, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, result = run("plan", path, "--profile", laptop)
    assert code in (1, 2)
    assert "unexpected" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_profile_that_is_none(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"devices": [{"name": "a", "flops": -1}]}')
    code, result = run("plan", config, "--profile", path)
    assert code == 2
    assert "devices[0].memory_bytes is missing" in result.stderr


def test_a_measured_profile_is_kept_shown_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Path, home: object
) -> None:
    calls: list[int] = []

    def measured(threads: int, place: Path, progress: object) -> Profile:
        calls.append(threads)
        return Profile((Device("here", 1e9, 2e10, 1e11, 1e9, threads, measured=True),))

    monkeypatch.setattr(profiling, "measure", measured)
    monkeypatch.setattr(profiling, "others_compute", lambda threads: False)
    out = tmp_path / "out.json"
    code, result = run("profile", "--threads", 1, "--out", out)
    assert code == 0, result.stderr
    assert "here, measured" in result.stdout
    _, again = run("profile", "--threads", 1, "--json")
    assert calls == [1]
    assert json.loads(again.stdout)["devices"][0]["name"] == "here"
    run("profile", "--threads", 1, "--anew")
    assert calls == [1, 1]
    _, shown = run("profile", "--profile", out)
    assert "here, measured" in shown.stdout
    assert planned(config, "--profile", out, "--memory", "4GB")["plans"]


def test_tables_of_a_profile_are_shown_to_who_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    law = {"kind": "Q4_K", "nbytes": 8 << 20, "rows": [1, 64], "byte_s": [1e-10, 2e-10]}
    path.write_text(json.dumps({"devices": [LAPTOP["devices"][0] | {"products": [law]}]}))
    _, few = run("profile", "--profile", path)
    assert few.stdout.splitlines()[-1] == "and 1 row of what kernels take: --tables"
    assert "Q4_K" not in few.stdout
    _, whole = run("profile", "--profile", path, "--tables")
    assert "Q4_K" in whole.stdout
    assert "--tables" not in whole.stdout


class _Head:
    """A daemon with a worker, as its client sees it."""

    def __init__(self, *_: object) -> None:
        self.measured = False

    def __enter__(self) -> _Head:
        return self

    def __exit__(self, *_: object) -> None: ...

    def nodes(self) -> NodesReply:
        head = NodeStatus(name="desk", fingerprint="aa" * 32, role="head", attached=True)
        worker = NodeStatus(
            name="pi",
            fingerprint="bb" * 32,
            role="worker",
            attached=True,
            memory_bytes=4 * 10**9,
            rtt_s=1e-4 if self.measured else 4e-4,
            bytes_per_s=1e9,
            memory_bytes_per_s=1e10,
            flops=1e11,
        )
        return NodesReply(role="head", nodes=[head, worker])

    def measure_links(self) -> LinksReply:
        self.measured = True
        return LinksReply(links=[], incast_bytes_per_s=2e9)


class _Gone(_Head):
    def nodes(self) -> NodesReply:
        raise NoDaemon("no daemon is running")


@pytest.mark.parametrize("measures", [True, False])
def test_measuring_is_said_where_no_bar_is_seen(
    measures: bool, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes so long that a script's user would think that nothing happens."""

    def profile(*_: object, progress: Progress, **__: object) -> Profile:
        for step in range(3 * measures):
            progress("measuring", step, 3)
        return Profile((Device("desk", 64e9, 20e9, 2e11, 2e9, 4, measured=True),))

    monkeypatch.setattr(profiling, "machine_profile", profile)
    code, result = run("plan", config)
    assert code == 0
    said = ["measuring this machine: less than a minute; the result is kept"]
    assert result.stderr.splitlines() == said * measures


def test_machines_that_are_attached_are_measured_and_planned_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Profile((Device("desk", 64e9, 20e9, 2e11, 2e9, 4, measured=True),))
    monkeypatch.setattr(profiling, "machine_profile", lambda *_, **__: own)
    monkeypatch.setattr(own_machines.background, "running_pid", lambda _: 1)
    monkeypatch.setattr(own_machines, "Client", _Head)
    config.write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 8}))
    found = planned(config)
    assert "group of 2" in [row["name"] for row in found["plans"]]
    assert all(not row["name"].startswith("group") for row in planned(config, "--ranks", 1)["plans"])
    out = tmp_path / "all.json"
    code, result = run("profile", "--out", out)
    assert code == 0, result.output
    assert "desk – pi" in result.stdout
    kept = json.loads(out.read_text())
    assert [it["latency_s"] for it in kept["links"]] == [5e-5]  # as measured just now
    assert kept["devices"][0]["port_bytes_per_s"] == 2e9
    assert planned(config, "--profile", out)["plans"]
    monkeypatch.setattr(own_machines, "Client", _Gone)
    code, result = run("plan", config)
    assert code == 0
    assert "left out" in result.stderr

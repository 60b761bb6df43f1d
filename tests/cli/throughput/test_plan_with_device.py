"""`shoal plan` with an accelerator, and for many requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from shoal.cli.verbs import cli
from shoal.daemon.throughput import profiling
from shoal.partition.throughput.profile import Device, Profile

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
GPU = {
    "name": "gpu",
    "memory_bytes": 12e9,
    "memory_bytes_per_s": 2e11,
    "flops": 8e12,
    "host_bytes_per_s": 1.2e10,
}
PC = {"name": "pc", "memory_bytes": 8e9, "memory_bytes_per_s": 25e9, "flops": 2e11}
SERVER = {"name": "server", "memory_bytes": 163.4e9, "memory_bytes_per_s": 200e9, "flops": 2e12}
A40 = {
    "name": "a40",
    "memory_bytes": 48e9,
    "memory_bytes_per_s": 6e11,
    "flops": 15e13,
    "host_bytes_per_s": 3.2e10,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)])


def profiled(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)])


def planned(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments).stdout)
    return found


def written(path: Path, what: dict[str, Any]) -> Path:
    path.write_text(json.dumps(what))
    return path


@pytest.fixture
def pc(tmp_path: Path) -> Path:
    return written(tmp_path / "pc.json", {"devices": [PC | {"accelerators": [GPU]}]})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return written(tmp_path / "config.json", LLAMA)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return written(tmp_path / "config.json", MIXTRAL)


def test_placements_are_shown_beside_the_others(llama: Path, pc: Path) -> None:
    result = run("--json", "--profile", pc, llama)
    assert "left out" not in result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["plans"]}
    assert {"memory", "on gpu: all layers", "through gpu"} <= rows.keys()
    alone, there = rows["memory"], rows["on gpu: all layers"]
    assert (alone["fits"], there["fits"]) == (False, True)
    assert there["tokens_per_s"] > 2 * alone["tokens_per_s"]
    names = [row["name"] for row in planned(llama, "--profile", pc, "--device", "cpu")["plans"]]
    assert not any("gpu" in name for name in names)


def test_what_a_device_holds_is_shown_beside_what_its_host_does(llama: Path, pc: Path) -> None:
    for row in planned(llama, "--profile", pc)["plans"]:
        its = row["peak_bytes"]
        assert ("gpu" in its) == ("gpu" in row["name"])
        assert its["pc"] <= 8e9 or not row["fits"]
        if "gpu" in its:
            assert 1e9 < its["gpu"] <= 12e9
    shown = run(llama, "--profile", pc, "--quant", "keep").stdout
    assert " of gpu" in shown
    assert "machines" not in shown


def test_the_picture_has_the_plan_that_was_chosen_on_the_curve_of_such_plans(
    llama: Path, pc: Path, tmp_path: Path
) -> None:
    to = tmp_path / "plot.svg"
    result = run(llama, "--profile", pc, "--quant", "keep", "--plot", to, "--json")
    assert result.exit_code == 0, result.output
    root = ElementTree.parse(to).getroot()
    across, down = (float(root.attrib[it]) for it in ("width", "height"))
    dots = [it.attrib for it in root.iter() if it.tag.endswith("circle")]
    assert all(0 < float(dot["cx"]) < across and 0 < float(dot["cy"]) < down for dot in dots)
    assert "on gpu: all layers" in [it.text for it in root.iter()]
    found = json.loads(result.stdout)
    (speed,) = (row["tokens_per_s"] for row in found["plans"] if row["name"] == found["chosen"])
    (curve,) = found["curves"]
    assert max(point["tokens_per_s"] for point in curve["points"]) == pytest.approx(speed)


def test_a_device_that_is_called_like_its_machine_is_refused(llama: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "same.json", {"devices": [PC | {"accelerators": [GPU | {"name": "pc"}]}]})
    result = run(llama, "--profile", path)
    assert result.exit_code
    assert "accelerators[0].name='pc': another one has this name" in result.stderr


def test_a_written_processor_counts_where_experts_may_come(mixtral: Path, tmp_path: Path) -> None:
    """A slow one is not taken for a fast one because nobody measured it; and a prompt comes in long steps."""
    slow = SERVER | {"memory_bytes_per_s": 40e9, "flops": 2e11, "accelerators": [A40]}
    first_s = []
    for measured in (False, True):
        path = written(tmp_path / "p.json", {"devices": [slow | {"measured": measured}]})
        asked = "--prompt-tokens", 8000, "--new-tokens", 64, "--quant", "keep"
        found = planned(mixtral, "--profile", path, *asked)
        assert "come from" in found["chosen"]
        first_s.append(next(row["ttft_s"] for row in found["plans"] if row["name"] == found["chosen"]))
    assert first_s[0] == first_s[1]
    weights_s = 87e9 / A40["host_bytes_per_s"]  # type: ignore[operator]
    assert first_s[0] < 3 * weights_s


def test_many_requests_come_near_what_no_schedule_exceeds(mixtral: Path, tmp_path: Path) -> None:
    """MoE-Lens's requests beside a large host: computing is what bounds them."""
    path = written(tmp_path / "server.json", {"devices": [SERVER | {"accelerators": [A40]}]})
    asked = mixtral, "--profile", path, "--prompt-tokens", 98, "--new-tokens", 32, "--quant", "keep"
    found = planned(*asked, "--requests", 25000)
    (bound,) = found["bounds"]
    assert bound["device"] == "a40"
    assert bound["tokens_per_s"] == pytest.approx(15e13 / 25.6e9 * 32 / 130, rel=0.02)
    rows = {row["name"]: row for row in found["plans"]}
    chosen = rows[found["chosen"]]
    assert found["chosen"].startswith("through a40")
    assert 0.6 * bound["tokens_per_s"] < chosen["tokens_per_s"] < bound["tokens_per_s"]
    assert chosen["seconds"] == pytest.approx(25000 / chosen["requests_per_s"])
    assert chosen["seconds"] == min(row["seconds"] for row in found["plans"] if row["fits"])
    assert chosen["at_once"] > 1024
    assert all(set(row["peak_bytes"]) <= {"server", "a40"} for row in found["plans"])
    few = planned(*asked, "--requests", 3)
    assert all(row["at_once"] <= 3 for row in few["plans"])
    assert all(row["seconds"] is None for row in found["plans"] if not row["fits"])
    shown = run(*asked, "--requests", 25000).stdout
    assert "no schedule gives more than" in shown
    assert "with so many requests" in shown
    assert "→ through a40" in shown


def test_options_that_do_not_go_with_many_requests_are_refused(llama: Path, pc: Path, tmp_path: Path) -> None:
    for more in (
        ("--batch", 2),
        ("--target", "3"),
        ("--guesses", "2"),
        ("--plot", tmp_path / "a.png"),
        ("--ranks", 2),
    ):
        result = run(llama, "--profile", pc, "--requests", 5, *more)
        assert result.exit_code == 2
        assert f"{more[0]} does not go with --requests" in result.stderr


def test_a_device_is_measured_with_its_machine_and_planned_for_elsewhere(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: object
) -> None:
    def measured(threads: int, place: Path, progress: object) -> Profile:
        return Profile((Device("here", 64e9, 2e10, 1e11, 1e9, threads, measured=True),))

    monkeypatch.setattr(profiling, "measure", measured)
    monkeypatch.setattr(profiling, "others_compute", lambda threads: False)
    out = tmp_path / "out.json"
    result = profiled("--threads", 1, "--device", "sim:8GB", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "accelerator sim:8GB" in result.stdout
    (there,) = json.loads(out.read_text())["devices"][0]["accelerators"]
    assert there["measured"]
    assert {law["kind"] for law in there["products"]} >= {"BF16", "Q8_0", "Q4_K"}
    assert any("sim:8GB" in row["name"] for row in planned(llama, "--profile", out)["plans"])
    alone = profiled("--threads", 1, "--device", "cpu", "--json")
    assert json.loads(alone.stdout)["devices"][0]["accelerators"] == []
    wrong = profiled("--threads", 1, "--device", "sim:x")
    assert wrong.exit_code == 2
    assert "is no device" in wrong.stderr


@pytest.mark.parametrize(("host", "card"), [(97e9, 48e9), (100e9, 80e9), (60e9, 24e9)])
@pytest.mark.parametrize("disk", [0, 2e9])
def test_no_plan_exceeds_what_no_schedule_does(
    mixtral: Path, tmp_path: Path, host: float, card: float, disk: float
) -> None:
    """Also where a card keeps some of the weights, or K and V find more room as weights come from disk."""
    machine = SERVER | {"memory_bytes": host, "accelerators": [A40 | {"memory_bytes": card}]}
    path = written(tmp_path / "p.json", {"devices": [machine | {"disk_bytes_per_s": disk}]})
    asked = "--prompt-tokens", 98, "--new-tokens", 32, "--quant", "keep", "--requests", 25000
    found = planned(mixtral, "--profile", path, *asked)
    passing = [row for row in found["plans"] if row["name"].startswith("through") and row["fits"]]
    for row in passing:
        assert row["tokens_per_s"] <= found["bounds"][0]["tokens_per_s"]
    assert passing or not disk
    rows = [row["fits"] for row in found["plans"]]
    assert rows == sorted(rows, reverse=True)

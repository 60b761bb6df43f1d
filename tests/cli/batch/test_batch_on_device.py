"""`shoal batch --device`: where weights pass through a device, answers are those of the CPU, and the size of steps is
the one that is predicted to be the fastest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.cli_fakes import shoal
from fakes.throughput.throughput_cases import QUICK
from msgspec.structs import replace as replaced

from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading import batch_sizes, device_rooms
from shoal.daemon.loading.batch_sizes import BATCH_SIZES, IF_STREAMED, WITH_DEVICE, batch_size
from shoal.daemon.loading.outlook import TooLarge, outlook
from shoal.devices import opening, sim_device
from shoal.engine.passing.alternating import Alternating
from shoal.models.step import Step
from shoal.partition.throughput.placing import device_choice, staging_worth
from shoal.partition.throughput.profile import unmeasured

DEVICE = "sim:20MB"


@pytest.fixture(autouse=True)
def _devices_of_its_own() -> Iterator[None]:
    yield
    opening._opened.clear()


def answered(directory: Path, device: str) -> dict[str, Any]:
    out = directory / f"{device.partition(':')[0]}.jsonl"
    done = shoal(
        "batch", "--local", "--memory", "3GB", "--device", device, str(directory / "in.jsonl"), str(out)
    )
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}


def test_answers_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(device_choice, "mixed_rate", lambda model, plan, *_: 1.0 + plan.passes)
    model = tiny.save_gguf(tiny.hf_model("qwen2_moe"), tmp_path / "m.gguf", type="F16")
    bodies = [
        {
            "model": str(model),
            "prompt": f"the end and {number} " * (1 + number % 5),
            "max_tokens": 6,
            "temperature": 0,
        }
        for number in range(24)
    ]
    asked = [
        {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    groups, through = [], Alternating.through_layers

    def seen(self: Alternating, step: Step, *more: Any) -> Any:
        groups.append(len(step.parts))
        return through(self, step, *more)

    monkeypatch.setattr(Alternating, "through_layers", seen)
    expected = answered(tmp_path, "cpu")
    assert not groups
    assert answered(tmp_path, DEVICE) == expected
    assert len(expected) == 24
    assert 2 in groups  # where a step has one row alone, there is one


def test_the_size_of_steps_is_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save_gguf(tiny.hf_model("qwen3_moe"), tmp_path / "m.gguf")
    library, packs = Library(Home(tmp_path)), Packs(Home(tmp_path))

    def with_rates(rates: dict[int, float]) -> Any:
        def looked(path: Path, config: NodeConfig, *more: Any) -> Any:
            if config.chunk_tokens not in rates:
                return TooLarge(refused="", budget_bytes=1, least_bytes=2)
            return replaced(outlook(path, config, *more), batch_tokens_per_s=rates[config.chunk_tokens])

        return looked

    config = replace(NodeConfig(), device="sim:1GB")
    for rates, size in (
        ({8192: 5.0, 4096: 9.0, 1024: 3.0}, WITH_DEVICE[2]),
        ({1024: 3.0, 512: 4.0}, BATCH_SIZES[1]),
        ({4096: 0.0, 512: 0.0}, BATCH_SIZES[1]),
    ):
        monkeypatch.setattr(batch_sizes, "outlook", with_rates(rates))
        assert batch_size([str(model)], config, library, packs) == size


def test_sizes_with_which_the_processor_computes_count_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto` some sizes may leave the device alone. Where all do, it is as without one."""
    model = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    library, packs = Library(Home(tmp_path)), Packs(Home(tmp_path))
    monkeypatch.setattr(device_rooms, "present", lambda: ["sim:1GB"])
    monkeypatch.setattr(batch_sizes, "may_have_device", lambda config: True)
    monkeypatch.setattr(sim_device, "LAUNCH_S", 1e-9)
    rates: dict[bool, list[float]] = {}

    def looked(slow: int | None) -> Any:
        def look(path: Path, config: NodeConfig, *more: Any) -> Any:
            machine = unmeasured(2) if config.chunk_tokens == slow else QUICK
            monkeypatch.setattr(staging_worth, "FAST", machine)
            found = outlook(path, config, *more)
            rates.setdefault(bool(found.device), []).append(found.batch_tokens_per_s)  # type: ignore[union-attr]
            return found

        return look

    for slow in (None, 4096):
        monkeypatch.setattr(batch_sizes, "outlook", looked(slow))
        size = batch_size([str(model)], NodeConfig(), library, packs)
        assert size == BATCH_SIZES[0] if slow is None else size not in (WITH_DEVICE[2], IF_STREAMED)
    assert len(rates[True]) == 1
    assert 0 < rates[True][0] < min(rates[False])

"""Layers that stay with the processor and come to a device for prompts, where its link is slow, in real time: a step
against the longer of copying and computing, and against what was predicted.

    python bench/cards/coming.py MODEL.gguf… [--links 0.5,1,2] [--rows 64,256] [--steps 5]

As in `passing.py`, whose link and figures these are: the device is played by this machine's processor, so only cells
in which copies take longer than computing say something. About half of the layers stay on the device; others come for a
prompt of so many rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from cards.passing import NAME, NOTHING, ROOMY, Case, SlowLink, packed, said

from shoal.daemon.config import default_threads
from shoal.daemon.throughput.brief_profile import _measured
from shoal.daemon.throughput.model_sizes import weighed
from shoal.devices.device_home import DeviceHome
from shoal.devices.sim_kernels import SimKernels
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor, attention_homes
from shoal.kernels import set_threads
from shoal.kernels.homes import cpu
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.step import Step
from shoal.models.transformer import Transformer
from shoal.offload.block_store import ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.offload.pack.pack import Pack
from shoal.offload.window.pinned import PackReader
from shoal.partition.memory_layout import PAGE_TOKENS
from shoal.partition.placement import ModelBytes, plan_on_device
from shoal.partition.plan import Plan, Wanted
from shoal.partition.throughput.cost import step_of
from shoal.partition.throughput.laws import Rows
from shoal.partition.throughput.profile import Device


class Coming(Case):
    """A dense model of which half is on the device; the rest comes for prompts of so many rows."""

    def __init__(self, checkpoint: Checkpoint, pack: Pack, rows: int, threads: int) -> None:
        self.device = SlowLink()
        self.device.pin()
        home = DeviceHome(self.device, SimKernels(cpu()))
        self.model = weighed(checkpoint, "keep")
        pages = -(-(rows + 1) // PAGE_TOKENS)
        wanted = Wanted(checkpoint.spec, rows + 1, pages * PAGE_TOKENS, "bf16", rows, 1, 0, threads)
        sizes = ModelBytes(self.model.extents, 0, self.model.vectors_bytes, self.model.vectors_bytes)
        half = home.room(self.model.weights_bytes * 2 // 3)
        made = plan_on_device([wanted], sizes, half, memory_bytes=ROOMY, staged_tokens=rows)
        assert isinstance(made, Plan)
        assert made.staged_tokens
        self.plan = made
        homes = {"cpu": cpu(), NAME: home}
        away = [it.block for it in made.blocks if it.tier == "gpu"]
        self.store = ResidentStore.load(made, PackReader(pack, away), home_of=homes.__getitem__)
        kv = KvPool(checkpoint.spec, made.kv, attention_homes(made, homes.__getitem__))
        self.executor = Executor(
            Transformer(checkpoint.spec), made, self.store, kv, Alone(), homes.__getitem__
        )
        ids = [(97 * it) % checkpoint.spec.vocab for it in range(rows)]
        self._step = Step.build([(ids, 0, list(range(pages)), 1)], made.rows_together(rows))
        self.home, self._rows = home, rows
        self.come_bytes = sum(it.nbytes for it in made.coming)

    def predicted_s(self, machine: Device, link: float) -> float:
        """As of those that pass in every step."""
        super().predicted_s(machine, link)
        host = replace(machine, accelerators=(self.there,))
        return step_of(self.model, self.plan, host, [Rows(1, self._rows, 0)], 1, None).seconds


def cells(
    checkpoint: Checkpoint, pack: Pack, rows: int, options: Any, place: Path
) -> Iterator[dict[str, Any]]:
    case = Coming(checkpoint, pack, rows, options.threads)
    kinds = Counter({it.kind: it.nbytes for its in case.model.products.values() for it in its})
    most = [kind for kind, _ in kinds.most_common(2)]
    machine = _measured(options.threads, place, most, None, lambda: True)  # whoever else computes
    links = [float(it) * 1e9 for it in options.links.split(",")]
    predicted = {link: case.predicted_s(machine, link) for link in links}
    for link, seconds in predicted.items():
        print(f"{rows} rows, {link / 1e9:g} GB/s: predicted {seconds * 1e3:.0f} ms", flush=True)
    steps = {link: case.took_s(link, options.steps) for link in links}
    computed = case.took_s(NOTHING, options.steps)
    for link, step in steps.items():
        each = {"copy": case.come_bytes / link, "compute": median(computed), "disk": 0.0}
        yield {
            "model": checkpoint.path.name, "rows": rows, "link": link, "come_bytes": case.come_bytes, **each,
            "predicted": predicted[link], "computes": computed, "reads": [0.0], "steps": step,
            "ratio": median(step) / max(each.values()), "bound": max(each, key=lambda it: each[it]),
            "error": predicted[link] / median(step) - 1,
        }  # fmt: skip
    case.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--links", default="0.5,1,2", help="GB/s")
    parser.add_argument("--rows", default="64,256")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    set_threads(options.threads)
    for path in options.models:
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as directory,
            packed(path, Path(directory)) as (checkpoint, pack),
        ):
            for rows in map(int, options.rows.split(",")):
                for found in cells(checkpoint, pack, rows, options, path.parent):
                    print(json.dumps(found) if options.json else said(found), flush=True)


if __name__ == "__main__":
    main()

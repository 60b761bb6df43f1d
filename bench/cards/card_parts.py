"""What is measured on a graphics card, part by part; each part is a function that returns figures.

Knows what is asked of an engine and what is timed. `measure_card` runs each part in a process of its own, and bounds
its time; `card_report` says what the figures mean.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cards import card_models
from cards.card_models import loaded, weights_bytes
from inputs import hollow
from inputs.shapes import Shape

from shoal.daemon.config import NodeConfig, default_threads
from shoal.daemon.loading.device_rooms import device_room
from shoal.daemon.loading.planning import wanted_of
from shoal.daemon.throughput.brief_profile import measure_briefly
from shoal.daemon.throughput.model_sizes import weighed
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices.opening import device_home
from shoal.offload.budget import Budget
from shoal.partition.memory_layout import PAGE_TOKENS, kv_page_bytes
from shoal.partition.placement import device_scratch_bytes
from shoal.partition.plan import Plan, least_kv_pages
from shoal.partition.throughput.cost import cost, step_of
from shoal.partition.throughput.laws import Rows
from shoal.partition.throughput.prediction import Job
from shoal.partition.throughput.profile import Device
from shoal.partition.throughput.weights_of import Weighed

MEASURED_STEPS = 5

ROOT = Path(__file__).parent.parent.parent


class Sizes(NamedTuple):
    """Of all parts. `budgets`: of a device for the mixture, by what they are called; `whole`: the device without a
    bound."""

    mixture: Shape
    dense: Shape
    budgets: dict[str, str]
    budget_bytes: dict[str, int]
    whole: str
    card: int | None
    prompt: int
    decoded: int
    streams: int  # of the peer, offline
    batch: int  # of ours
    offline_prompt: int
    offline_new: int
    chunk: int
    crossover_layers: int
    crossover_rows: tuple[int, ...]


REAL = Sizes(
    card_models.MIXTURE, card_models.DENSE, {"16": "cuda:0,16GB", "24": "cuda:0,24GB"},
    {"16": 16 * 10**9, "24": 24 * 10**9}, "cuda:0", 0, prompt=512, decoded=32, streams=128, batch=512,
    offline_prompt=98,
    offline_new=32, chunk=4096, crossover_layers=4, crossover_rows=(16, 32, 64, 128, 256, 512, 1024, 2048),
)  # fmt: skip


def dry() -> Sizes:
    """The same with models that a laptop runs, on a device that the CPU plays."""
    mixture, dense = card_models.SMALL_MIXTURE, card_models.SMALL_DENSE
    whole = weights_bytes(mixture)
    bounds = {"16": int(0.4 * whole) + 12_000_000, "24": int(0.6 * whole) + 12_000_000}
    names = {name: f"sim:{nbytes}" for name, nbytes in bounds.items()}
    return Sizes(
        mixture, dense, names, bounds, "sim:1GB", None, prompt=32, decoded=4, streams=4, batch=8, offline_prompt=20,
        offline_new=4, chunk=64, crossover_layers=2, crossover_rows=(4, 16),
    )  # fmt: skip


def copies(sizes: Sizes, place: Path) -> dict[str, Any]:
    """Bytes a second within the card, and over its link from memory of each kind."""
    import torch

    nbytes = 1 << 30 if sizes.card is not None else 1 << 22
    device = "cpu" if sizes.card is None else f"cuda:{sizes.card}"
    one, other = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    here = torch.zeros(nbytes, dtype=torch.uint8)
    found = {"within": 2 * nbytes / _best_s(lambda: one.copy_(other), device)}
    found["in, pageable"] = nbytes / _best_s(lambda: one.copy_(here), device)
    if sizes.card is not None:
        locked = here.pin_memory()
        found["in, page-locked"] = nbytes / _best_s(lambda: one.copy_(locked, non_blocking=True), device)
        found["out, page-locked"] = nbytes / _best_s(lambda: locked.copy_(one, non_blocking=True), device)
        found["card"] = torch.cuda.get_device_name(sizes.card)  # type: ignore[assignment]
    return {"bytes_per_s": found, "torch": torch.__version__}


def _best_s(copy: Callable[[], object], device: str) -> float:
    import torch

    took = []
    for _ in range(4):
        began_s = time.perf_counter()
        copy()
        if device != "cpu":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began_s)
    return min(took)


TESTS = ("tests/devices", "tests/engine/test_device_placements.py", "tests/engine/test_staged_experts.py")
TESTED = "torch or card or reference or staged_weights or small_operations"


def tests(sizes: Sizes, place: Path) -> dict[str, Any]:
    """Those of what devices compute, on the card, with torch's operations, which round least."""
    return _tested(sizes, f"({TESTED}) and not triton" if sizes.card is not None else "small_operations")


def tests_triton(sizes: Sizes, place: Path) -> dict[str, Any]:
    """Each type of weights by Triton's kernels: most of the time they are compiled."""
    return _tested(
        sizes, "triton and every_type" if sizes.card is not None else "triton and every_type and Q4_0"
    )


def _tested(sizes: Sizes, chosen: str) -> dict[str, Any]:
    more = {"SHOAL_TEST_DEVICE": sizes.whole} if sizes.card is not None else {}
    more |= {"SHOAL_DEVICE_KERNELS": "torch"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=False, timeout=600
    )
    lines = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "said": lines[-1] if lines else "", "output": lines[-40:]}


def kernels(sizes: Sizes, place: Path) -> dict[str, Any]:
    """Triton's kernels and torch's operations, each alone."""
    from cards.kernel_parts import compared

    return compared(sizes.whole, dry=sizes.card is None, seconds=0.8 * LIMITS_S["kernels"])


def dense_torch(sizes: Sizes, place: Path) -> dict[str, Any]:
    """As `dense`, with torch's operations."""
    os.environ["SHOAL_DEVICE_KERNELS"] = "torch"
    return dense(sizes, place)


def dense(sizes: Sizes, place: Path) -> dict[str, Any]:
    """Decode of a dense model in 4 bits that is wholly there."""
    there = _laws(sizes.dense, sizes.whole, place)
    engine, facts = loaded(
        sizes.dense, place, context=1024, streams=1, threads=default_threads(), device=sizes.whole
    )
    home: Any = device_home(sizes.whole)
    return {
        "plan": facts["plan"],
        "kernels": home.kernels,
        "not better": home.not_better,
        "weights_bytes": weights_bytes(sizes.dense),
        "interactive": _interactive(engine, sizes),
        "predicted": _predicted(engine, there, Job(sizes.prompt, sizes.decoded)),
    }


def interactive(sizes: Sizes, place: Path, budget: str) -> dict[str, Any]:
    """One stream of the mixture, with so much of the card's memory."""
    how = {"context": 1024, "streams": 4, "chunk": sizes.prompt}
    return _mixture(sizes, place, budget, how, Job(sizes.prompt, sizes.decoded), _interactive)


def offline(sizes: Sizes, place: Path, budget: str) -> dict[str, Any]:
    """Many streams at once, as `shoal batch` has them. Steps of answers are alike, so a few are measured, and the whole
    is worked out of them."""
    pages = -(-(sizes.offline_prompt + sizes.offline_new) // PAGE_TOKENS)
    how = {"context": 1024, "streams": sizes.batch, "chunk": sizes.chunk, "slowdown": float("inf")}
    how["kv_tokens"] = max(1024, sizes.batch * pages * PAGE_TOKENS)
    job = Job(sizes.offline_prompt, sizes.offline_new, sizes.batch)
    return _mixture(sizes, place, budget, how, job, _offline)


def _mixture(
    sizes: Sizes,
    place: Path,
    budget: str,
    how: dict[str, Any],
    job: Job,
    measured: Callable[[Any, Sizes], dict[str, float]],
) -> dict[str, Any]:
    device, began_s = sizes.budgets[budget], time.perf_counter()
    there = _laws(sizes.mixture, device, place)
    tried_s, began_s = time.perf_counter() - began_s, time.perf_counter()
    engine, facts = loaded(sizes.mixture, place, threads=default_threads(), device=device, **how)
    found = {"plan": facts["plan"], "tried_s": tried_s, "load_s": time.perf_counter() - began_s}
    found["measured"] = measured(engine, sizes)
    opened: Any = device_home(device).device
    found["peak_bytes"], found["limit_bytes"] = opened.budget.peak_bytes, opened.budget.limit_bytes
    found["unpinned"] = opened.unpinned
    found["predicted"] = _predicted(engine, there, job)
    if job.batch > 1:
        found["bounds"] = bounds(weighed(engine._model.checkpoint, "keep"), engine._model.plan, there, job)
    return found


def bounds(model: Weighed, plan: Plan, machine: Device | None, job: Job) -> dict[str, float]:
    """Of a step in which each stream gets a token: seconds that it would take if nothing took any but products on the
    card, the processor's attention, or reading K and V at memory's speed; and the bytes that come over the link. None
    of them where blocks stay where they are: then these go on one after the other."""
    if machine is None or not plan.passes:
        return {}
    before = job.prompt_tokens + job.new_tokens / 2
    step = step_of(model, plan, machine.on(plan.threads), [Rows(job.batch, 1, before)], job.batch, None)
    kv_bytes = job.batch * (before + 1) * kv_page_bytes(model.spec, plan.kv.dtype) / PAGE_TOKENS
    return {
        "come_bytes": float(sum(it.nbytes for it in plan.blocks if it.passes)),
        "link_s": step.parts["link"],
        "card_s": step.parts["compute"],
        "attention_s": step.parts["memory"],
        "kv_s": kv_bytes / machine.memory_bytes_per_s,
    }


def _offline(engine: Any, sizes: Sizes) -> dict[str, float]:
    first_s = engine.begin(sizes.batch, sizes.offline_prompt, seed=2, new=sizes.offline_new)["seconds"]
    steps = min(MEASURED_STEPS, sizes.offline_new - 2)
    token_s = median(engine.advance(1)["seconds"] for _ in range(steps))
    engine.end()
    seconds = first_s + (sizes.offline_new - 1) * token_s
    return {
        "first_s": first_s,
        "token_s": token_s,
        "tokens_per_s": sizes.batch * sizes.offline_new / seconds,
    }


def peer(sizes: Sizes, place: Path, budget: str) -> dict[str, Any]:
    """The same with Accelerate. Its steps are alike, so a few are measured, and an answer is worked out of them."""
    try:
        from cards.offloaded import Offloaded

        engine = Offloaded(sizes.mixture, sizes.budget_bytes[budget], sizes.card)
    except ImportError as error:
        return {"failed": f"no peer: {error}"}
    found: dict[str, Any] = {"version": engine.version, "layers there": getattr(engine, "layers", 0)}
    engine.prompt(1, 16)  # the first time, kernels are made ready
    first_s = engine.prompt(1, sizes.prompt)
    token_s = median(engine.token() for _ in range(3))
    found["interactive"] = {"first_s": first_s, "tokens_per_s": 1 / token_s}
    first_s = engine.prompt(sizes.streams, sizes.offline_prompt)
    token_s = median(engine.token() for _ in range(3))
    seconds = first_s + (sizes.offline_new - 1) * token_s
    found["offline"] = {"seconds": seconds, "tokens_per_s": sizes.streams * sizes.offline_new / seconds}
    return found


def crossover(sizes: Sizes, place: Path) -> dict[str, Any]:
    """From how many tokens on experts that come are quicker than those that stay: a few layers of the mixture, whose
    experts all lie with the processor, with prompts of so many tokens, both ways."""
    shape = replace(sizes.mixture, name=f"{sizes.mixture.name}-few", layers=sizes.crossover_layers)
    most = max(sizes.crossover_rows)
    how: dict[str, Any] = {"context": most + 64, "streams": 1, "threads": default_threads(), "chunk": most}
    config = NodeConfig(
        threads=how["threads"],
        context_tokens=how["context"],
        max_sequences=1,
        max_guesses=0,
        chunk_tokens=most,
    )
    path = card_models.written(shape, place)
    with hollow.filled(path) as checkpoint:
        model, (wanted, *_) = weighed(checkpoint, "keep"), wanted_of(checkpoint.spec, config)
    home = device_home(sizes.whole)
    experts = [nbytes for block, nbytes in model.block_bytes.items() if block.kind == "expert"]
    room = model.weights_bytes - sum(experts) + device_scratch_bytes(wanted, home.room(0))
    room += kv_page_bytes(wanted.spec, "f16") * least_kv_pages(wanted) + sum(experts) // shape.layers * 3 // 4
    device = f"cuda:{sizes.card},{room}" if sizes.card is not None else f"sim:{room}"
    engine, facts = loaded(shape, place, device=device, **how)
    return {
        "plan": facts["plan"],
        **_both_ways(engine, engine._model.executor._staging, sizes.crossover_rows),
    }


def layers(sizes: Sizes, place: Path) -> dict[str, Any]:
    """The same of a dense model of which some three fifths are there: its other layers stay, or they come."""
    most = max(sizes.crossover_rows)
    room = weights_bytes(sizes.dense) * 3 // 5 + (3 << 28 if sizes.card is not None else 12_000_000)
    device = f"cuda:{sizes.card},{room}" if sizes.card is not None else f"sim:{room}"
    how: dict[str, Any] = {"context": most + 64, "streams": 1, "threads": default_threads(), "chunk": most}
    engine, facts = loaded(sizes.dense, place, device=device, **how)
    if not engine._model.plan.staged_tokens:
        return {"plan": facts["plan"], "predicted_tokens": 0, "seen_tokens": 0, "seconds": {}}
    return {"plan": facts["plan"], **_both_ways(engine, engine._model.executor._coming, sizes.crossover_rows)}


def _both_ways(engine: Any, coming: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Prompts of so many tokens, with what `coming` governs where it lies, and there."""
    predicted, rows = coming.least_tokens, dict[int, dict[str, float]]()
    for count in counts:
        rows[count] = {}
        for way, tokens in (("stay", 1 << 30), ("come", 1)):
            coming.least_tokens = tokens
            took = []
            for seed in range(3):
                took.append(engine.begin(1, count, seed=10 + seed)["seconds"])
                engine.end()
            rows[count][way] = min(took)
    seen = next((count for count, its in rows.items() if its["come"] < its["stay"]), 0)
    return {"predicted_tokens": predicted, "seen_tokens": seen, "seconds": rows}


PARTS: dict[str, Callable[[Sizes, Path], dict[str, Any]]] = {
    "tests": tests,
    "tests-triton": tests_triton,
    "copies": copies,
    "kernels": kernels,
    "dense": dense,
    "dense-torch": dense_torch,
    "crossover": crossover,
    "layers": layers,
    "interactive-16": lambda sizes, place: interactive(sizes, place, "16"),
    "peer-16": lambda sizes, place: peer(sizes, place, "16"),
    "offline-16": lambda sizes, place: offline(sizes, place, "16"),
    "interactive-24": lambda sizes, place: interactive(sizes, place, "24"),
    "offline-24": lambda sizes, place: offline(sizes, place, "24"),
    "peer-24": lambda sizes, place: peer(sizes, place, "24"),
}
LIMITS_S = {
    "tests": 120, "tests-triton": 180, "copies": 30, "kernels": 90, "dense": 80, "dense-torch": 60, "crossover": 80,
    "layers": 60,
    "interactive-16": 110, "peer-16": 110, "offline-16": 140, "interactive-24": 100, "offline-24": 120, "peer-24": 100,
}  # fmt: skip


def _interactive(engine: Any, sizes: Sizes) -> dict[str, float]:
    engine.begin(1, 16, seed=-1)
    engine.advance(2)
    engine.end()
    first = engine.begin(1, sizes.prompt, seed=1)
    its = engine.advance(sizes.decoded)
    engine.end()
    return {"first_s": first["seconds"], "tokens_per_s": its["tokens"] / its["seconds"]}


def _laws(shape: Shape, device: str, place: Path) -> Device | None:
    """This machine with the device: the processor measured briefly, the device tried with the model's shapes, before
    anything is loaded."""
    threads = default_threads()
    with hollow.filled(card_models.written(shape, place)) as checkpoint:
        model = weighed(checkpoint, "keep")
    sizes: Counter[str] = Counter()
    for its in model.products.values():
        sizes.update({it.kind: it.nbytes for it in its})
    kinds = [kind for kind, _ in sizes.most_common(2)]
    measured = measure_briefly(threads, place, kinds, None, lambda: True)
    room = device_room(device, Budget(1 << 62), model, OwnMachine(threads), laws=True).room
    if room is None or room.laws is None or measured is None:
        return None
    return replace(measured, accelerators=(room.laws,))


def _predicted(engine: Any, machine: Device | None, job: Job) -> dict[str, float]:
    """What the throughput model says of the plan."""
    if machine is None:
        return {}
    model, plan = weighed(engine._model.checkpoint, "keep"), engine._model.plan
    found = cost(model, plan, machine, job)
    return {
        "first_s": found.ttft_s,
        "tokens_per_s": found.tokens_per_s,
        "whole_tokens_per_s": job.batch * job.new_tokens / found.total_s(job),
    }

"""What a device can do, tried when a model that may use it is loaded, and kept in a file until something changes that
it depends on: the card, its driver, this program, the shapes of a model. What was tried a day ago is tried again.

Knows files and when figures hold. `devices` tries copies and products, `fixed_costs` what steps cost besides.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from shoal.daemon.installed import package_version
from shoal.daemon.memory import return_freed
from shoal.daemon.private_files import keep
from shoal.engine.errors import DeviceGone, DeviceTooFull
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.kernels.types import WEIGHT_TYPES
from shoal.models.regular_files import read_regular
from shoal.offload.budget import Budget
from shoal.offload.errors import BudgetExceeded
from shoal.partition.errors import ProfileError
from shoal.partition.placement import ExpertTimes
from shoal.partition.spec import BlockId
from shoal.partition.throughput.profile import Accelerator, Profile, unmeasured
from shoal.partition.throughput.profile_checks import check_figure, check_profile
from shoal.partition.throughput.weights_of import Product

from .own_machine import AGED_S

if TYPE_CHECKING:
    from shoal.devices.device_home import DeviceHome
    from shoal.devices.expert_timing import Shape

log = logging.getLogger(__name__)

_FORM = 2  # of what is tried
_FILE_BYTES = 1 << 20
_MOST_KEPT = 32  # models on devices; those that were tried longest ago go first

_USUAL_TYPES = "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"
_USUAL_SIZES = (1024, 2048), (4096, 4096)  # rows and columns: of an expert, of a dense layer
_TYPES = {kind.name: kind for kind in WEIGHT_TYPES}


class Tried(Protocol):
    """What a device is tried with: the matrices of blocks."""

    @property
    def products(self) -> Mapping[BlockId, Sequence[Product]]: ...


class UsualBlocks(NamedTuple):
    """Matrices as many models have them, in the usual types; for whoever asks before there is a model."""

    products: Mapping[BlockId, Sequence[Product]]

    @classmethod
    def of_all(cls) -> UsualBlocks:
        made = [
            Product(kind.name, rows, cols, kind.row_bytes(cols) * rows)
            for kind in map(_TYPES.__getitem__, _USUAL_TYPES)
            for rows, cols in _USUAL_SIZES
        ]
        return cls({BlockId("attn", place): [it] for place, it in enumerate(made)})


class DeviceFigures(Struct, frozen=True):
    """`expert`: what one of a mixture's takes it; `laws`: how fast it is, if that was asked for. None: there are none,
    or no room to try."""

    expert: ExpertTimes | None = None
    laws: Accelerator | None = None


class _Kept(Struct, frozen=True):
    key: str
    tried_s: float  # Unix time
    figures: DeviceFigures


class _File(Struct, frozen=True):
    kept: list[_Kept]


def device_figures(
    home: DeviceHome, model: Tried, free_bytes: int, file: Path | None, budget: Budget, *, laws: bool
) -> DeviceFigures:
    """Of a device for a model, as they are kept in `file`, or tried now, within so much of its memory. Of this
    machine's, `budget` has what that takes meanwhile. Raises HomeLost."""
    expert, all = _shapes(model)
    key = _key(home, expert, all)
    kept = _read(file)
    known = next((it for it in kept if it.key == key and abs(time.time() - it.tried_s) < AGED_S), None)
    if known is not None and not _lacks(known.figures, bool(expert), laws=laws):
        return _as_named(known.figures, home)
    tried = _laws(home, all, free_bytes, budget) if laws else None
    found = DeviceFigures(_expert(home, expert, free_bytes), tried)
    if _lacks(found, bool(expert), laws=laws):
        return_freed()  # what was begun may hang on an error
    if file is not None and found != DeviceFigures():
        others = sorted((it for it in kept if it.key != key), key=lambda it: -it.tried_s)
        keep(file, _File([_Kept(key, time.time(), found), *others[: _MOST_KEPT - 1]]))
    return found


def _lacks(figures: DeviceFigures, expert: bool, *, laws: bool) -> bool:
    """Whether there was no room to try something, or nobody had asked for it."""
    return (expert and figures.expert is None) or (laws and figures.laws is None)


def _as_named(figures: DeviceFigures, home: DeviceHome) -> DeviceFigures:
    """A card has several names, and by some of them less memory."""
    device, laws = home.device, figures.laws
    if laws is None:
        return figures
    limit_bytes = float(device.budget.limit_bytes)
    return DeviceFigures(figures.expert, replace(laws, name=device.name, memory_bytes=limit_bytes))


def _shapes(model: Tried) -> tuple[list[Shape], list[Shape]]:
    """(the matrices of one expert, or of a dense model's feed-forward; those of all blocks, each shape once, the
    commonest first)"""
    from shoal.devices.expert_timing import Shape

    def shaped(its: Product) -> Shape:
        return Shape(_TYPES[its.kind], its.rows, its.cols)

    comes = (its for kind in ("expert", "ffn") for block, its in model.products.items() if block.kind == kind)
    expert = next(comes, ())
    counts: dict[Shape, int] = {}
    for its in model.products.values():
        for it in its:
            counts[shaped(it)] = counts.get(shaped(it), 0) + 1
    return [shaped(it) for it in expert], sorted(counts, key=lambda shape: -counts[shape])


def _expert(home: DeviceHome, expert: list[Shape], free_bytes: int) -> ExpertTimes | None:
    from shoal.devices.expert_timing import expert_times, tried_bytes

    if not expert or tried_bytes(expert) > free_bytes:
        return None
    try:
        return expert_times(home, expert)
    except HomeFull:
        return None


def _laws(home: DeviceHome, shapes: list[Shape], free_bytes: int, budget: Budget) -> Accelerator | None:
    from shoal.devices.device_timing import HOST_TRIED_BYTES, device_speed, tried_for_speed_bytes

    from .fixed_costs import device_overheads

    if tried_for_speed_bytes(shapes) > free_bytes:
        return None
    purpose = f"trying {home.device.name}"
    try:
        budget.hold(purpose, HOST_TRIED_BYTES)
        speed, calls = device_speed(home, shapes), device_overheads(home)
    except (BudgetExceeded, HomeFull, DeviceTooFull):
        return None
    except DeviceGone as error:  # in a step
        raise HomeLost(str(error)) from error
    finally:
        budget.release(purpose)
    device = home.device
    return Accelerator(
        device.name,
        float(device.budget.limit_bytes),
        speed.memory_bytes_per_s,
        speed.flops,
        speed.link_bytes_per_s,
        speed.products,
        calls.step_s,
        calls.layer_s,
        calls.mixture_s,
        speed.copy_s,
        float(home.room(0).kernel_bytes),
        speed.contention,
        measured=True,
        locked_bytes_per_s=speed.locked_bytes_per_s,
    )


def _key(home: DeviceHome, expert: list[Shape], all: list[Shape]) -> str:
    device = home.device
    shapes = [[(it.type.name, it.rows, it.cols) for it in its] for its in (expert, all)]
    digest = blake2b(repr(shapes).encode(), digest_size=16).hexdigest()
    pinned = "page-locked" if device.pinned_bytes else "pageable"
    return f"{_FORM} | {package_version()} | {device.facts} | {home.kernels} | {pinned} | {digest}"


def _read(file: Path | None) -> list[_Kept]:
    """What is kept, as far as it can be true."""
    if file is None:
        return []
    try:
        found = msgspec.json.decode(read_regular(file, _FILE_BYTES), type=_File)
        for it in found.kept:
            _check(it.figures)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, ProfileError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        log.warning("%s is of no use, so devices are tried again: %s", file, said)
        return []
    return found.kept


def _check(figures: DeviceFigures) -> None:
    """Raises ProfileError."""
    if figures.expert is not None:
        for name, value in figures.expert._asdict().items():
            low, high = (math.ulp(0.0), 1e6) if name.endswith("_s") else (1, 1 << 40)
            low = 0 if name == "locked_s" else low
            check_figure(f"expert.{name}", value, low, high)
    if figures.laws is not None:
        check_profile(Profile((replace(unmeasured(1, 1e9), accelerators=(figures.laws,)),)))

"""Whether what a profile says of machines can be true: limits of each figure, of tables, of names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import ProfileError
from .profile import ANY, CORRECTED, AttentionLaw, CacheLaw, Profile, ReadLaw, RingLaw, RowsLaw, SweptLaw

MAX_DEVICES = 64
MAX_ACCELERATORS = 64  # of a device
MAX_POINTS = 256  # of a table
MAX_LAWS = 256

Law = RowsLaw | AttentionLaw | ReadLaw | RingLaw | CacheLaw | SweptLaw

_LIMITS: Mapping[str, tuple[float, float]] = {
    "memory_bytes": (1e6, 2.0**60),
    "memory_bytes_per_s": (1e6, 1e16),
    "flops": (1e6, 1e20),
    "disk_bytes_per_s": (0, 1e14),
    "host_bytes_per_s": (1e3, 1e14),
    "locked_bytes_per_s": (0, 1e14),
    "threads": (1, 1 << 16),
    "touch_bytes_per_s": (0, 1e16),
    "write_bytes_per_s": (0, 1e14),
    "band_bytes_per_s": (0, 1e16),
    "port_bytes_per_s": (0, 1e14),
    "latency_s": (0, 3600),
    "bytes_per_s": (1, 1e14),
    "step_s": (0, 10),
    "layer_s": (0, 1),
    "mixture_s": (0, 1),
    "expert_s": (0, 1),
    "logit_s": (0, 1e-3),
    "stream_s": (0, 1),
    "stream_layer_s": (0, 1),
    "hidden_s": (0, 1e-6),
    "copy_s": (0, 1),
    "scratch_bytes": (0, 2.0**50),
    "compute_keeps": (0.01, 1),
    "disk_keeps": (0.01, 1),
    **dict.fromkeys(("host_keeps", "device_keeps", "link_keeps"), (0.01, 1)),
    **dict.fromkeys(("memory_apart", "compute_apart", "disk_apart"), (0, 1)),
    **dict.fromkeys(("memory", "compute", "disk", "link", "overhead"), CORRECTED),
}
_LEAST_PER_S = 1e3  # of speeds that may also be 0, which means that there is none
_POINTS: Mapping[str, tuple[float, float]] = {
    "rows": (1, 1 << 24),
    "byte_s": (1e-16, 1.0),
    "context": (1, 1 << 26),
    "decode_s": (1e-18, 1.0),
    "prompt_s": (1e-18, 1.0),
    "nbytes": (1, 1 << 40),
    "passing_s": (1e-9, 1e3),
    "layer_s": (0, 1),
    "from_memory": (0, 1),
    "bytes_per_s": (1, 1e14),
}


def check_profile(profile: Profile) -> Profile:
    """The profile itself. Raises ProfileError with field, value and limit of the first figure that cannot be true."""
    if not 1 <= len(profile.devices) <= MAX_DEVICES:
        raise ProfileError(f"devices: there are {len(profile.devices)}, must be from 1 to {MAX_DEVICES}")
    names: set[str] = set()
    for place, device in enumerate(profile.devices):
        where = f"devices[{place}]"
        _check_name(f"{where}.name", device.name, names)
        names.add(device.name)
        _check_figures(where, vars(device))
        _check_figures(f"{where}.overheads", vars(device.overheads))
        if device.overheads.swept is not None:
            _check_law(f"{where}.overheads.swept", device.overheads.swept)
        _check_figures(f"{where}.contention", vars(device.contention))
        _check_figures(f"{where}.repeats", vars(device.repeats))
        _check_figures(f"{where}.corrections", vars(device.corrections))
        if len(device.accelerators) > MAX_ACCELERATORS:
            raise ProfileError(
                f"{where}.accelerators: there are {len(device.accelerators)}, must be at most {MAX_ACCELERATORS}"
            )
        within = {it.name for it in profile.devices}
        for number, accelerator in enumerate(device.accelerators):
            _check_name(f"{where}.accelerators[{number}].name", accelerator.name, within)
            within.add(accelerator.name)
            path = f"{where}.accelerators[{number}]"
            _check_figures(path, vars(accelerator))
            _check_figures(f"{path}.contention", vars(accelerator.contention))
            _check_laws(f"{path}.products", accelerator.products)
        _check_laws(f"{where}.products", device.products)
        _check_laws(f"{where}.attention", device.attention)
        if device.reads is not None:
            _check_law(f"{where}.reads", device.reads)
            if device.reads.rings is not None:
                _check_law(f"{where}.reads.rings", device.reads.rings)
        if device.caches is not None:
            _check_laws(f"{where}.caches.products", device.caches.products)
            _check_law(f"{where}.caches", device.caches)
    for number, link in enumerate(profile.links):
        where = f"links[{number}]"
        for end in link.between:
            if end != ANY and end not in names:
                known = ", ".join(sorted(names))
                raise ProfileError(
                    f"{where}.between has {end[:80]!r}: no device has this name (there are {known})"
                )
        if link.between[0] == link.between[1] != ANY:
            raise ProfileError(f"{where}.between={list(link.between)}: must be two devices")
        for before, other in enumerate(profile.links[:number]):
            if other.between in (link.between, link.between[::-1]):
                raise ProfileError(
                    f"{where}.between={list(link.between)}: as links[{before}]; must be named once"
                )
        _check_figures(where, vars(link))
    return profile


def _check_laws(where: str, laws: Sequence[Law]) -> None:
    if len(laws) > MAX_LAWS:
        raise ProfileError(f"{where} has {len(laws)} laws: must be at most {MAX_LAWS}")
    for number, law in enumerate(laws):
        _check_law(f"{where}[{number}]", law)


def _check_name(field: str, name: str, taken: Iterable[str]) -> None:
    if not name or name == ANY or len(name) > 200 or not name.isprintable():
        raise ProfileError(f"{field}={name[:80]!r}: must be 1 to 200 printable characters other than '*'")
    if name in taken:
        raise ProfileError(f"{field}={name[:80]!r}: another one has this name")


def _check_figures(where: str, figures: Mapping[str, object]) -> None:
    for field, value in figures.items():
        if field in _LIMITS and not isinstance(value, tuple):
            low, high = _LIMITS[field]
            check_figure(f"{where}.{field}", value, low, high)
            if field.endswith("per_s") and low == 0 < value < _LEAST_PER_S:  # type: ignore[operator]
                raise ProfileError(f"{where}.{field}={value:g}: must be 0, or at least {_LEAST_PER_S:g}")


def check_figure(field: str, value: object, low: float, high: float) -> None:
    """Raises ProfileError unless the value is a number within the limits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        said = f"{value:g}" if isinstance(value, float) else f"{value!s:.40}" + "…" * (len(str(value)) > 40)
        raise ProfileError(f"{field}={said}: must be a number from {low:g} to {high:g}")


def _check_law(where: str, law: Law) -> None:
    tables = {
        field: value for field, value in vars(law).items() if field in _POINTS and isinstance(value, tuple)
    }
    for field, value in vars(law).items():
        if field in ("kind", "kv_type") and not (value and value.isprintable() and len(value) <= 40):
            raise ProfileError(f"{where}.{field}={value[:80]!r}: must be the name of a stored type")
        if field in ("queries", "head_dim"):
            check_figure(f"{where}.{field}", value, 1, 1 << 16)
        if field == "input_bits" and value not in (8, 16):
            raise ProfileError(f"{where}.input_bits={value}: must be 8 or 16")
        for number, point in enumerate(tables.get(field, ())):
            check_figure(f"{where}.{field}[{number}]", point, *_POINTS[field])
        if field == "nbytes" and not isinstance(value, tuple):
            check_figure(f"{where}.nbytes", value, *_POINTS["nbytes"])
    (first, points), *others = tables.items()
    if not 1 <= len(points) <= MAX_POINTS:
        raise ProfileError(f"{where}.{first} has {len(points)} points: must have from 1 to {MAX_POINTS}")
    if list(points) != sorted(set(points)):
        raise ProfileError(f"{where}.{first} must rise from point to point")
    for field, value in others:
        if len(value) != len(points):
            raise ProfileError(
                f"{where}.{field} has {len(value)} points: must have {len(points)}, as {first}"
            )

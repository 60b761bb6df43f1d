"""What Triton's kernels become on a graphics card, found without one: they are compiled for it.

    python bench/cards/compiled.py [--cards 80,90] [--types Q4_K,Q6_K] [--brief] [--markdown]

For each kernel, type and number of rows of inputs: registers of a thread, bytes that are spilled, shared memory, loads
of 16 bytes and of less, instructions for each weight where one row is multiplied, and how many of the card's threads
can be there at once. Needs triton, with the assembler and the disassembler that it brings; nothing runs on a card.
The disassembler takes a third of the time: with `--brief` it has to read one matrix by one row only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before it is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoal.devices.in_triton import triton_attention, triton_linears
from shoal.devices.in_triton.triton_kernels import COVERED, THREAD_GROUPS, TILE_INPUTS, step_of, tile_of
from shoal.devices.in_triton.triton_looks import JOINED, REGISTERS, WARPS, tokens_of
from shoal.kernels.types import WEIGHT_TYPES
from shoal.partition.memory_layout import KV_FORMATS, LOOKED_PAGES, KvLayout

COLS, FFN = 4096, 14336
ALL_REGISTERS, THREADS = 1 << 16, 2048  # of a processor of the card
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10}
BITS = {kind.name: kind.bits_per_weight for kind in WEIGHT_TYPES}
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9_.]*)", re.M)
JUMP = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+ )?BRA[.A-Z]* (?:[^;]*?)(0x[0-9a-f]+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Compiled(NamedTuple):
    """`wide`, `narrow`: loads of 16 bytes, and of less, None if not looked for; `per_weight`: instructions of a thread,
    nan where it says little.
    `occupancy`: share of the threads that a processor of the card can have."""

    kernel: str
    type: str
    rows: int
    card: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide: int | None
    narrow: int | None
    per_weight: float
    occupancy: float


class Case(NamedTuple):
    """A kernel as it is launched; `weights`: that one thread multiplies, 0: not counted; `turns` of its loop."""

    kernel: str
    type: str
    rows: int
    fn: Any
    constants: dict[str, Any]
    warps: int
    weights: int
    turns: int = 1
    most_registers: int | None = None


def cases(types: Sequence[str]) -> Iterator[Case]:
    for kind in types:
        pair = kind == "Q6_K"  # whose groups are taken in pairs
        step = step_of(COLS // (128 if pair else 64))
        yield Case("one_row", kind, 1, triton_linears.one_row, {
            "COLS": COLS, "KIND0": kind, "KIND1": "", "KIND2": "", "BIASED0": False, "BIASED1": False,
            "BIASED2": False, "STEP": step, "SPLIT": 1,
        }, step // THREAD_GROUPS, 512 if pair else 256, 4 if pair else 1)  # fmt: skip
        yield Case("gate_and_up", kind, 1, triton_linears.gate_and_up, {
            "FFN": FFN, "COLS": COLS, "KIND0": kind, "KIND1": kind, "BIASED0": False, "BIASED1": False, "STEP": step,
            "ACTIVATION": "silu",
        }, step // THREAD_GROUPS, 0)  # fmt: skip
        for rows in (16, TILE_INPUTS):
            height, warps, registers = tile_of(rows)
            yield Case("many_rows", kind, rows, triton_linears.many_rows, {
                "COLS": COLS, "KIND": kind, "BIASED": False, "STEP": 16, "INPUTS": rows, "ROWS": height, "SPLIT": 1,
            }, warps, 0, most_registers=registers)  # fmt: skip
    more = {"COLS": COLS, "KIND0": "Q4_K", "KIND1": "Q4_K", "KIND2": "Q6_K"}
    more |= {f"BIASED{place}": True for place in range(3)} | {"STEP": 32, "SPLIT": 1}
    yield Case("one_row", "Q4_K, Q4_K, Q6_K", 1, triton_linears.one_row, more, 4, 0)
    for rows, normed in ((1, True), (128, True), (128, False)):
        how = {"COLS": COLS, "STEP": 64, "NORMED": normed, "MANY": rows > 1}
        yield Case("arranged, normed" if normed else "arranged", "", rows, triton_linears.arranged, how, 8, 0)


KV = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i8": "*i8"}
# Of q, of K and V; their numbers.
HEADS = (32, 8, 128), (32, 4, 128), (16, 16, 128), (9, 3, 64), (8, 1, 256), (32, 32, 80), (12, 2, 96)


def looks(kinds: Iterable[str] = KV) -> Iterator[Case]:
    """Attention of answers: as models have it, and each thing that may be otherwise."""
    plain = {"NORMED": False, "INTERLEAVED": False, "WINDOW": 0, "WHOLE": False}
    for kind in kinds:
        yield from _look(kind, HEADS[0], plain)
    for heads in HEADS[1:]:
        yield from _look("f16", heads, plain)
    for name, value in (
        ("NORMED", True),
        ("INTERLEAVED", True),
        ("WINDOW", 4096),
        ("WHOLE", True),
        ("DIMS", 0),
        ("DIMS", 64),
    ):
        yield from _look("f16", HEADS[0], plain, {name: value})
    joining = {"HEADS": 32, "DIM": 128, "ROOM": 128, "EACH": LOOKED_PAGES, "SOME": JOINED}
    yield Case("joined", "", 1, triton_attention.joined, joining, WARPS, 0)


def _look(
    kind: str, its: tuple[int, int, int], plain: dict[str, Any], other: dict[str, Any] | None = None
) -> Iterator[Case]:
    """Those of the kernels that know what is `other` than `plain`."""
    other = other or {}
    heads, kv_heads, dim = its
    layout = KvLayout.of(KV_FORMATS[kind], dim)
    room, group = (triton.next_power_of_2(number) for number in (layout.wide, heads // kv_heads))
    how = {
        "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDE": layout.wide, "ROOM": room,
        "SCALED": layout.kind.scaled, "HEAD_STEP": layout.head_bytes // layout.kind.itemsize,
        "SCALES_HEAD_STEP": layout.head_bytes // 4, "DIMS": dim, "GROUP_ROOM": group,
        "SOME": tokens_of(group, room), "EACH": LOOKED_PAGES,
    } | plain | other  # fmt: skip
    launches = (triton_attention.stored, 1, None), (triton_attention.looked, WARPS, REGISTERS)
    for kernel, warps, registers in launches:
        if not other.keys() <= set(kernel.arg_names):
            continue
        constants = {name: value for name, value in how.items() if name in kernel.arg_names}
        what = " ".join(
            [f"{kind} {heads}/{kv_heads}/{dim}", *(f"{name} {value}" for name, value in other.items())]
        )
        yield Case(kernel.__name__, what, 1, kernel, constants, warps, 0, most_registers=registers)


POINTERS = {"w": "*u8", "gate": "*u8", "up": "*u8", "one": "i32", "eps": "fp32", "T": "i32", "rows": "i32"}


def compiled(case: Case, card: int, brief: bool = False) -> Compiled:
    """For compute capability `card` / 10. `brief`: disassembled only if instructions count."""
    names, many = case.fn.arg_names, case.rows > 1
    signature = {name: _type(name, case.kernel, case.type, many) for name in names} | dict.fromkeys(
        case.constants, "constexpr"
    )
    wide = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_step")
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.fn, signature=signature, constexprs=constants, attrs=wide)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", card, 32),
        options={"num_warps": case.warps, "num_stages": 1, "maxnreg": case.most_registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = USAGE.search(_said("-res-usage", file.name))
        listing = "" if brief and not case.weights else _said("-sass", file.name)
    opcodes = Counter(OPCODE.findall(listing))
    assert usage is not None
    registers, stack, _, local = map(int, usage.groups())
    moved = sum(count for name, count in opcodes.items() if name.startswith(("STL", "LDL")))
    shared, threads = made.metadata.shared, 32 * case.warps
    loads = {name: count for name, count in opcodes.items() if name.startswith("LDG")}
    broad = sum(count for name, count in loads.items() if "128" in name)
    each = [ALL_REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads]
    each += [SHARED_BYTES[card] // (shared + 1024)] if shared else []
    instructions = sum(opcodes.values()) - opcodes["NOP"] + (case.turns - 1) * _looped(listing)
    return Compiled(
        case.kernel, case.type, case.rows, card, case.warps, registers, max(stack, local, 4 * moved), shared,
        broad if listing else None, sum(loads.values()) - broad if listing else None,
        instructions / case.weights if case.weights else float("nan"), min(each) * threads / THREADS,
    )  # fmt: skip


def _looped(listing: str) -> int:
    """Instructions of the longest loop, of 16 bytes each."""
    jumps = [(int(to, 16), int(at, 16)) for at, to in JUMP.findall(listing)]
    return max((at - to for to, at in jumps if to < at), default=0) // 16


def _type(name: str, kernel: str, type: str, many: bool) -> str:
    if kernel in ("stored", "looked", "joined"):
        kinds = {
            "table": "*i32",
            "pages": "*i32",
            "eps": "fp32",
            "scale": "fp32",
            "numbers": KV[type.split()[0]] if type else "",
        }
        return kinds.get(name, "i32" if name in ("page_step", "scales_step", "parts") else "*fp32")
    stem = name.rstrip("012")
    if kernel.startswith("arranged"):
        return {"eps": "fp32", "out": "*fp16" if many else "*fp32"}.get(name, "*fp32")
    return "*fp16" if name == "x" and many else POINTERS.get(stem, "*fp32")


def _said(option: str, file: str) -> str:
    command = [str(tools() / "cuobjdump"), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def tools() -> Path:
    """Where triton has its assembler and disassembler."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def lines(all: Sequence[Compiled], markdown: bool) -> Iterator[str]:
    heads = (
        "kernel", "type", "rows", "sm", "warps", "registers", "spilled", "shared B", "16-byte loads", "others",
        "instructions/weight", "occupancy",
    )  # fmt: skip
    table = [heads]
    for it in all:
        each = f"{it.per_weight:.1f}" if it.per_weight == it.per_weight else ""
        cells = ("" if cell is None else str(cell) for cell in it[:10])
        table.append((*cells, each, f"{it.occupancy:.0%}"))
    if markdown:
        yield from ("| " + " | ".join(row) + " |" for row in (table[0], ("---",) * len(heads), *table[1:]))
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cards", default="80,90", help="compute capabilities times ten")
    parser.add_argument(
        "--types", default=",".join(kind.name for kind in WEIGHT_TYPES if kind.name in COVERED)
    )
    parser.add_argument(
        "--brief",
        action="store_true",
        help="loads and instructions of one matrix by one row only, in less time",
    )
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    all = [
        compiled(case, card, options.brief)
        for card in map(int, options.cards.split(","))
        for case in (*cases(options.types.split(",")), *looks())
    ]
    print("\n".join(lines(all, options.markdown)))
    spilled = [it for it in all if it.spilled_bytes]
    for it in spilled:
        print(
            f"{it.kernel} {it.type} by {it.rows} on sm_{it.card} spills {it.spilled_bytes} bytes",
            file=sys.stderr,
        )
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())

"""GGUF files: every field is read, and every lie is refused with one line of text and little memory."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.gguf_file import open_gguf
from shoal.models.errors import CheckpointError, CorruptCheckpoint, MissingCheckpoint, UnsupportedCheckpoint
from shoal.models.texts import Texts

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the tensor table; shape has the innermost dimension first, as in the file."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def image(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    version: int = 3,
    align: int = 32,
    **lies: int,
) -> bytes:
    """A file made of the given parts. lies: key_count=, tensor_count= to be stored instead of the true counts."""
    keys, tensors = keys or [], tensors or []
    counts = struct.pack(
        "<IQQ", version, lies.get("tensor_count", len(tensors)), lies.get("key_count", len(keys))
    )
    header = b"GGUF" + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % align) + data


def opened(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return open_gguf(path)


def test_every_value_type(tmp_path: Path) -> None:
    values: list[tuple[int, bytes, Any]] = [
        (U8, b"\xff", 255),
        (I8, b"\xff", -1),
        (U16, b"\xff\xff", 65535),
        (I16, b"\xff\xff", -1),
        (U32, b"\xff\xff\xff\xff", 2**32 - 1),
        (I32, b"\xff\xff\xff\xff", -1),
        (F32, struct.pack("<f", 1.5), 1.5),
        (BOOL, b"\x01", True),
        (STRING, text("a ü"), "a ü"),
        (U64, b"\xff" * 8, 2**64 - 1),
        (I64, b"\xff" * 8, -1),
        (F64, struct.pack("<d", 0.1), 0.1),
        (ARRAY, struct.pack("<IQ3H", U16, 3, 1, 2, 3), [1, 2, 3]),
        (ARRAY, struct.pack("<IQ2B", BOOL, 2, 0, 1), [False, True]),
        (ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text(""), ["x", ""]),
        (ARRAY, struct.pack("<IQ", F32, 0), []),
    ]
    keys = [key(f"k{i}", kind, data) for i, (kind, data, _) in enumerate(values)]
    files = opened(tmp_path, image(keys))
    read = [list(value) if isinstance(value, Texts) else value for value in files.metadata.values()]
    assert read == [value for _, _, value in values]
    assert [type(value) for value in read] == [type(value) for _, _, value in values]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("align", [8, 32, 4096])
def test_tensors_and_reads(tmp_path: Path, version: int, align: int) -> None:
    first, second = bytes(range(24)), bytes(range(100, 136))
    gap = bytes(-24 % align)
    table = [tensor("b", (3, 2)), tensor("a", (32, 1, 2), kind=2, offset=len(first + gap))]
    keys = [key("general.alignment", U32, struct.pack("<I", align))]
    files = opened(tmp_path, image(keys, table, first + gap + second, version, align))
    b, a = files.tensors["b"], files.tensors["a"]
    assert (b.shape, b.type.name, b.rows, b.nbytes) == ((2, 3), "F32", 2, 24)
    assert (a.shape, a.type.name, a.rows, a.nbytes, a.weights) == ((2, 1, 32), "Q4_0", 2, 36, 64)
    assert bytes(files.read(b)) == first
    assert bytes(files.read(b, 1)) == first[12:]
    assert bytes(files.read(a, 1, 1)) == second[18:]
    assert bytes(files.read(a, 2, 0)) == b""
    files.close()
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor a was asked for after"):
        files.read(a)


CORRUPT: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "magic"),
    "magic": (lambda: b"GGML" + bytes(20), "does not start with GGUF"),
    "no counts": (lambda: b"GGUF\x03\x00\x00\x00\x01", "cut short"),
    "key count": (lambda: image(key_count=2**40), "claims 1099511627776 metadata keys"),
    "tensor count": (lambda: image(tensor_count=2**63), "claims 9223372036854775808 tensors"),
    "counts beyond the file": (lambda: image(tensor_count=60_000), "claims 60000 tensors"),
    "key length": (lambda: image([struct.pack("<Q", 2**62)]), "a metadata key is 4611686018427387904 bytes"),
    "key beyond the file": (lambda: image([struct.pack("<Q", 60_000)]), "needs bytes up to"),
    "key twice": (lambda: image([key("k", U8, b"a")] * 2), "'k' appears twice"),
    "key not UTF-8": (lambda: image([text(b"\xff") + struct.pack("<IB", U8, 1)]), "not valid UTF-8"),
    "text not UTF-8": (lambda: image([key("k", STRING, text(b"\xc3"))]), "k is not valid UTF-8"),
    "text length": (
        lambda: image([key("k", STRING, struct.pack("<Q", 2**30))]),
        "k is 1073741824 bytes long",
    ),
    "bool": (lambda: image([key("k", BOOL, b"\x02")]), "neither 0 nor 1"),
    "array count": (lambda: image([key("k", ARRAY, struct.pack("<IQ", U8, 2**60))]), "items of k"),
    "array beyond": (
        lambda: image([key("k", ARRAY, struct.pack("<IQ", F64, 40))], data=bytes(99)),
        "k needs bytes up to",
    ),
    "texts beyond": (
        lambda: image([key("k", ARRAY, struct.pack("<IQ", STRING, 9) + text("abc"))]),
        "within k|of k is",
    ),
    "item length": (
        lambda: image([key("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**63))]),
        "an item of k is 9223372036854775808 bytes",
    ),
    "item not UTF-8": (
        lambda: image([key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))]),
        "k: item 0 is not valid UTF-8",
    ),
    "alignment": (
        lambda: image([key("general.alignment", U32, struct.pack("<I", 48))]),
        "general.alignment=48: must be a power of two",
    ),
    "alignment type": (lambda: image([key("general.alignment", STRING, text("32"))]), "alignment='32'"),
    "alignment 0": (lambda: image([key("general.alignment", U32, bytes(4))]), "alignment=0"),
    "name length": (
        lambda: image(tensors=[text("n" * 300)]),
        "a tensor name is 300 bytes long: must be up to 256",
    ),
    "dimensions": (lambda: image(tensors=[tensor("t", (1,) * 5)]), "has 5 dimensions"),
    "no dimensions": (lambda: image(tensors=[tensor("t", ())]), "has 0 dimensions"),
    "size 0": (lambda: image(tensors=[tensor("t", (0, 4))]), "every size must be from 1"),
    "overflow": (lambda: image(tensors=[tensor("t", (2**32, 2**32))]), "up to 2\\*\\*48"),
    "blocks": (
        lambda: image(tensors=[tensor("t", (33, 2), kind=8)]),
        "tensor t: a row of 33 .* multiple of 32",
    ),
    "offset": (lambda: image(tensors=[tensor("t", (4,), offset=16)], data=bytes(64)), "not a multiple of 32"),
    "offset beyond": (lambda: image(tensors=[tensor("t", (4,), offset=2**63)]), "the file was cut short"),
    "truncated data": (
        lambda: image(tensors=[tensor("t", (4, 4))], data=bytes(63)),
        r"tensor t ends at byte 160, the file at 159",
    ),
    "overlap": (
        lambda: image(tensors=[tensor("t", (16,)), tensor("u", (4,), offset=32)], data=bytes(64)),
        "tensor u overlaps",
    ),
    "name twice": (
        lambda: image(tensors=[tensor("t", (4,)), tensor("t", (4,), offset=32)], data=bytes(64)),
        "tensor t appears twice",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files(tmp_path: Path, case: str) -> None:
    make, message = CORRUPT[case]
    content = make()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint, match=message) as caught:
            opened(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (image(version=1), "GGUF version 1; Shoal reads versions 2 and 3"),
        (image(version=4), "GGUF version 4"),
        (image([key("k", 13, b"")]), "k has the unknown value type 13"),
        (image([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "k is an array of arrays"),
        (
            image(tensors=[tensor("blk.0.ffn_up.weight", (256,), kind=16)]),
            "blk.0.ffn_up.weight: .*IQ2_XXS.*Q4_K",
        ),
        (image(tensors=[tensor("t", (256,), kind=999)]), "tensor t: .*999"),
    ],
)
def test_unsupported_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        opened(tmp_path, content)


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpoint, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UnsupportedCheckpoint, match="neither a GGUF file nor a directory"):
        open_checkpoint(tmp_path / "text.gguf")
    with pytest.raises(MissingCheckpoint, match=r"no config\.json; give the GGUF file itself: .*text\.gguf"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"safetensors: it begins with 'hell'$"):
        open_checkpoint(tmp_path / "text.gguf")
    (tmp_path / "text.gguf").unlink()
    with pytest.raises(MissingCheckpoint, match=r"is not a model directory: it has no config\.json$"):
        open_checkpoint(tmp_path)


def test_shrinking_file_is_noticed_by_the_read(tmp_path: Path) -> None:
    files = opened(tmp_path, image(tensors=[tensor("t", (4, 4))], data=bytes(64)))
    with (tmp_path / "m.gguf").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(
        CorruptCheckpoint, match=r"ends at byte 100 within tensor t, which needs bytes up to 160"
    ):
        files.read(files.tensors["t"])
    files.close()


def test_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    items = b"".join(text(f"token {i}") for i in range(260_000))
    keys = [key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 260_000) + items)]
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        files = opened(tmp_path, image(keys))
        best = min(best, time.perf_counter() - start)
        files.close()
    assert files.metadata["tokenizer.ggml.tokens"][-1] == "token 259999"
    assert best < 2.0  # 0.1 s where nothing else runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid llama file whose tensors are so small that much of it is header."""
    model = tiny.hf_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("whole") / "m.gguf", type="Q8_0")


def opens_or_refuses(path: Path) -> None:
    with contextlib.suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        for block in checkpoint.spec.blocks()[:4]:
            checkpoint.read_block(block)


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_flipped_bytes(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is wrong in the header, the result is a checkpoint or a CheckpointError."""
    damaged = bytearray(whole.read_bytes())
    header = damaged.index(b"output_norm.weight") + 200
    places = data.draw(st.lists(st.integers(0, header), min_size=1, max_size=4))
    for place in places:
        damaged[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])))
    (tmp_path / "m.gguf").write_bytes(damaged)
    opens_or_refuses(tmp_path / "m.gguf")


@FUZZ
@given(data=st.data())
def test_replaced_facts(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """The values of the keys that describe the architecture, replaced by anything of their size."""
    keys = [
        b"block_count",
        b"embedding_length",
        b"head_count",
        b"context_length",
        b"freq_base",
        b"key_length",
    ]
    keys += [b"head_count_kv", b"dimension_count", b"feed_forward_length", b"layer_norm_rms_epsilon"]
    damaged = bytearray(whole.read_bytes())
    for name in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        place = damaged.index(name) + len(name) + 4
        damaged[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    (tmp_path / "m.gguf").write_bytes(damaged)
    opens_or_refuses(tmp_path / "m.gguf")


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncations(whole: Path, tmp_path: Path, share: float) -> None:
    content = whole.read_bytes().rstrip(b"\0")
    (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "m.gguf")


def test_split_files(tmp_path: Path) -> None:
    first = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "m.gguf", split_tensors=9)
    whole = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "whole.gguf")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    with open_checkpoint(first) as split, open_checkpoint(whole) as one:
        assert split.spec == one.spec
        for block in one.spec.blocks():
            a, b = split.read_block(block), one.read_block(block)
            assert all(np.array_equal(a.matrix[role].data, b.matrix[role].data) for role in b.matrix)
            assert all(np.array_equal(a.vector[role], b.vector[role]) for role in b.vector)
    with pytest.raises(UnsupportedCheckpoint, match="not the first of its"):
        open_checkpoint(parts[1])
    moved = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CorruptCheckpoint, match="its name must end in -00001-of-"):
        open_checkpoint(moved)
    moved.rename(first)
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(CorruptCheckpoint, match="says it is part 1"):
        open_checkpoint(first)
    parts[-1].write_bytes(last)
    parts[1].unlink()
    with pytest.raises(MissingCheckpoint, match="part of the split model is missing"):
        open_checkpoint(first)


def test_unknown_architecture(tmp_path: Path) -> None:
    content = image([key("general.architecture", STRING, text("rwkv6"))])
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"architecture 'rwkv6' .*llama, qwen2, qwen3, gemma3"):
        open_checkpoint(tmp_path / "m.gguf")

"""GGUF files of known shapes with random weights: as large and as slow as the real ones, without a download.

    python bench/synthetic.py SHAPE OUT.gguf [--vocabulary MODEL.gguf]

Weights are random blocks of the right types (`shapes`), scaled so that values stay finite and two engines can be
compared by their logits; the text they write means nothing. The vocabulary is another model's (by default the default
model's), cut or padded. Does not know what the files are used for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from inputs.shapes import SHAPES, Shape, TensorShape

from shoal.comm.home import Home
from shoal.daemon.library.library import Library

GGUF_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
POOL_BYTES = 8 << 20  # of random blocks for each type; tensors are cut from them at random places
SPARE_BYTES = 1 << 30  # that stay free on the disk
_BLOCK_FLOATS = {  # byte offsets of the float16 scales in a block, each with its ratio to the first one
    "Q4_0": ((0, 1.0),),
    "Q4_1": ((0, 1.0), (2, -7.5)),  # a low that makes the mean zero
    "Q5_0": ((0, 1.0),),
    "Q5_1": ((0, 1.0), (2, -15.5)),
    "Q8_0": ((0, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
}

Progress = Callable[[int, int], None]
Field = tuple[Any, GGUFValueType, GGUFValueType | None]


class SyntheticError(Exception):
    """The file cannot be written."""


def cached(shape: Shape, directory: Path, vocabulary: Path, progress: Progress) -> Path:
    """The file of a shape in `directory`, written if it is not there. Raises SyntheticError."""
    return kept(
        directory / f"{shape.name}-{digest(shape)}.gguf",
        lambda path: write(shape, path, vocabulary, progress),
    )


def digest(shape: Shape) -> str:
    """A digest of everything in a shape, for names of files."""
    return hashlib.sha256(repr(shape).encode()).hexdigest()[:8]


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`. If it is not there, it is made under another name first, so that it is whole once it has this one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        _remove(unfinished)
        try:
            make(unfinished)
            unfinished.rename(path)
        finally:
            _remove(unfinished)
    return path


def need_room(shape: Shape, directory: Path, nbytes: int) -> None:
    """Raises SyntheticError if the disk is too small."""
    free = shutil.disk_usage(directory).free
    if nbytes + SPARE_BYTES > free:
        raise SyntheticError(
            f"{directory}: {shape.name} takes {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free and "
            f"{SPARE_BYTES / 1e9:.1f} are to stay so; choose another directory"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(
    shape: Shape,
    path: Path,
    vocabulary: Path | None,
    progress: Progress = lambda done, total: None,
    *,
    hollow: bool = False,
) -> None:
    """Write the file; a hollow one has a hole for each tensor. Without a vocabulary of another model's its tokens are
    bytes. Raises SyntheticError if the disk is too small."""
    tensors = list(shape.tensors())
    total = sum(nbytes(tensor) for tensor in tensors)
    need_room(shape, path.parent, 0 if hollow else total)
    writer = GGUFWriter(path, shape.arch)
    _write_facts(writer, shape)
    for name, field in _vocabulary(vocabulary, shape.vocab).items():
        writer.add_key_value(name, *field)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(
            tensor.name, tensor.sizes, np.dtype(np.float32), nbytes(tensor), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    if hollow:
        writer.close()
        with path.open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            begin = -(-stream.tell() // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
            stream.truncate(begin + sum(-(-nbytes(t) // GGUF_ALIGNMENT) * GGUF_ALIGNMENT for t in tensors))
        return
    for seed, tensor in enumerate(tensors):
        writer.write_tensor_data(data(tensor, np.random.default_rng(seed)))
        done += nbytes(tensor)
        progress(done, total)
    writer.close()


def _write_facts(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(shape.name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.head:
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
    if shape.experts:
        writer.add_expert_feed_forward_length(shape.ffn)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.active)


def _vocabulary(source: Path | None, size: int) -> dict[str, Field]:
    """The metadata of another model's tokenizer, or of one that knows bytes alone, cut or filled up to `size` tokens.

    Special tokens that are cut off are none any more.
    """
    fields: dict[str, Field] = {} if source is not None else _bytes_alone()
    for name, field in GGUFReader(source).fields.items() if source is not None else ():
        if name.startswith("tokenizer."):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            contents = field.contents()
            if not name.endswith("_token_id") or contents < size:
                fields[name] = (contents, field.types[0], sub_type)
    tokens = fields["tokenizer.ggml.tokens"][0]
    fillers = range(len(tokens), size)
    kept = tokens[:size] + [f"[FILLER{i}]" for i in fillers]
    known = set(kept)
    types = fields["tokenizer.ggml.token_type"][0][:size] + [gguf.TokenType.UNUSED] * len(fillers)
    merges = [m for m in fields["tokenizer.ggml.merges"][0] if m.replace(" ", "", 1) in known]
    for name, values in (("tokens", kept), ("token_type", types), ("merges", merges)):
        key = f"tokenizer.ggml.{name}"
        fields[key] = (values, *fields[key][1:])
    return fields


def _bytes_alone() -> dict[str, Field]:
    """A tokenizer of 256 bytes, as GPT-2 spells them, and of two that are one token."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    tokens = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    kind, texts = GGUFValueType.ARRAY, GGUFValueType.STRING
    made: dict[str, Field] = {
        "model": ("gpt2", texts, None),
        "pre": ("gpt-2", texts, None),
        "tokens": ([*tokens, "th"], kind, texts),
        "token_type": ([gguf.TokenType.NORMAL] * 257, kind, GGUFValueType.INT32),
        "merges": (["t h"], kind, texts),
        "eos_token_id": (0, GGUFValueType.UINT32, None),
    }
    return {f"tokenizer.ggml.{name}": field for name, field in made.items()}


def nbytes(tensor: TensorShape) -> int:
    """Of a tensor in the file."""
    weights, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
    return int(np.prod(tensor.sizes)) // weights * size


def data(tensor: TensorShape, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """The bytes of a tensor: norms are ones, biases small, matrices have deviation loudness/sqrt(columns)."""
    if len(tensor.sizes) == 1:
        norm = tensor.name.endswith("norm.weight")
        values = np.ones(tensor.sizes) if norm else 0.1 * random.standard_normal(tensor.sizes)
        return values.astype(np.float32).view(np.uint8)
    pool = _pool(tensor.type, tensor.sizes[-1], tensor.loudness)
    result = np.empty(nbytes(tensor), np.uint8)
    done = 0
    while done < result.size:
        piece = pool[random.integers(len(pool)) :].reshape(-1)[: result.size - done]
        result[done : done + piece.size] = piece
        done += piece.size
    return result


@cache
def _pool(type: str, cols: int, loudness: float = 1.0) -> np.ndarray[Any, Any]:
    """Random blocks (count, bytes of a block) whose weights have mean 0 and deviation loudness/sqrt(cols)."""
    kind = GGMLQuantizationType[type]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(cols)
    count = POOL_BYTES // size
    if weights == 1:
        values = random.standard_normal((1, count), dtype=np.float32) * np.float32(loudness / cols**0.5)
        return gguf.quantize(values, kind).view(np.uint8).reshape(count, size)
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)

    def scale(by: float) -> None:
        for offset, share in _BLOCK_FLOATS[type]:
            blocks[:, offset : offset + 2] = np.array([by * share], np.float16).view(np.uint8)

    scale(1.0)
    deviation = float(gguf.dequantize(blocks[:1024], kind).std())
    scale(loudness / deviation / cols**0.5)
    return blocks


def bar(title: str) -> Progress:
    """Progress as one line on stderr, if that is a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r{title}: {100 * done // total}%",
                end="\n" if done == total else "",
                file=sys.stderr,
                flush=True,
            )

    return show


def default_vocabulary() -> Path:
    """The default model's file in the store."""
    return Library(Home.from_env()).resolve("smollm2")


def listed() -> Iterator[str]:
    for shape in SHAPES.values():
        yield f"{shape.name} ({sum(map(nbytes, shape.tensors())) / 1e9:.2f} GB, {shape.mix})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="random weights in a known shape", epilog="; ".join(listed())
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--vocabulary", type=Path, help="a GGUF; default: the default model, from the store")
    options = parser.parse_args()
    vocabulary = options.vocabulary or default_vocabulary()
    write(SHAPES[options.shape], options.target, vocabulary, bar(options.shape))


if __name__ == "__main__":
    main()

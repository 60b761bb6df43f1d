"""A larger model with the same answers: every FFN of a dense llama GGUF gets columns that do nothing.

    python bench/widen.py MODEL.gguf OUT.gguf [--times 16]

The new rows of gate and up are random, the new columns of down zero, so that answers (and with them how well they can
be guessed) are the model's own, while every token needs that many times the bytes. Matrices are stored in Q8_0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import synthetic
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from inputs.shapes import TensorShape
from synthetic import kept

TIMES = 16
TYPE = GGMLQuantizationType.Q8_0


def cached(source: Path, directory: Path) -> Path:
    """The widened file in `directory`, written if it is not there."""
    return kept(directory / f"{source.stem}-x{TIMES}.gguf", lambda path: widen(source, path))


def widen(source: Path, target: Path, *, times: int = TIMES, seed: int = 0) -> None:
    """Write the file, one tensor in memory at a time; `source` must be of architecture llama."""
    reader = GGUFReader(source)
    random = np.random.default_rng(seed)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name == "llama.feed_forward_length":
            writer.add_feed_forward_length(times * int(field.contents()))
        elif not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        rows, cols = _sizes(tensor, times)
        if rows:
            nbytes = rows * _row_bytes(cols)
            writer.add_tensor_info(tensor.name, (rows, cols), np.dtype(np.float32), nbytes, raw_dtype=TYPE)
        else:
            size = (cols,)
            writer.add_tensor_info(tensor.name, size, np.dtype(np.float32), 4 * cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        rows, cols = _sizes(tensor, times)
        if rows:
            writer.write_tensor_data(_padded(gguf.quantize(values, TYPE), tensor.name, rows, cols, random))
        else:
            writer.write_tensor_data(values)
    writer.close()


def _sizes(tensor: Any, times: int) -> tuple[int, int]:
    """(rows, columns) of what is written; a vector has no rows."""
    cols, rows = (*map(int, tensor.shape), 0)[:2]
    if "ffn_down." in tensor.name:
        return rows, times * cols
    if "ffn_gate." in tensor.name or "ffn_up." in tensor.name:
        return times * rows, cols
    return rows, cols


def _row_bytes(cols: int) -> int:
    weights, size = gguf.GGML_QUANT_SIZES[TYPE]
    return cols // weights * size


def _padded(
    stored: np.ndarray[Any, Any], name: str, rows: int, cols: int, random: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Stored rows with random rows below them and zeros, as blocks of zero bytes, on their right."""
    height, width = stored.shape
    below = synthetic.data(TensorShape(name, (rows - height, cols), TYPE.name), random)
    right = ((0, 0), (0, _row_bytes(cols) - width))
    return np.concatenate([np.pad(stored, right).reshape(-1), below])


def main() -> None:
    parser = argparse.ArgumentParser(description="dense llama GGUF → the same function with wider FFNs")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--times", type=int, default=TIMES)
    options = parser.parse_args()
    widen(options.source, options.target, times=options.times)


if __name__ == "__main__":
    main()

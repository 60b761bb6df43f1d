"""A model that exists only as a pack: its random weights go straight into it, so the disk need not hold them twice.

The file has a model's facts, vocabulary and size, but takes no room, as no weight was ever written to it; its pack has
them. So it can be streamed, and neither read into memory nor by other engines. Needs no more memory than packing does.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import synthetic
from inputs.shapes import Shape, TensorShape
from synthetic import Progress

from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.gguf_file import open_gguf
from shoal.models.checkpoint.tensor_files import StoredTensor, TensorFiles
from shoal.models.families import recipe_from_gguf

SUFFIX = "-hollow.gguf"


class RandomFiles(TensorFiles):
    """The tensors of a file whose bytes are made while they are read; the same rows always get the same bytes."""

    def read(
        self, tensor: StoredTensor, first_row: int = 0, rows: int | None = None, into: Bytes | None = None
    ) -> Bytes:
        rows = tensor.rows - first_row if rows is None else rows
        sizes = (rows, tensor.shape[-1]) if len(tensor.shape) > 1 else tensor.shape
        seed = zlib.crc32(f"{tensor.name} {first_row}".encode())
        shape = TensorShape(tensor.name, sizes, tensor.type.name)
        made = synthetic.data(shape, np.random.default_rng(seed))
        if into is None:
            return made
        into[:] = made
        return into


def cached(shape: Shape, directory: Path, vocabulary: Path | None, progress: Progress) -> Path:
    """The hollow file of a shape in `directory`, written if it is not there."""
    return synthetic.kept(
        directory / f"{shape.name}-{synthetic.digest(shape)}{SUFFIX}",
        lambda path: synthetic.write(shape, path, vocabulary, progress, hollow=True),
    )


def filled(path: Path) -> Checkpoint:
    """The checkpoint of a hollow file, for packing."""
    files = open_gguf(path)
    random = RandomFiles(files.paths, files.tensors, files.metadata)
    files.close()
    return Checkpoint(path, "gguf", random, recipe_from_gguf(random))

"""What a checkpoint is and where this machine computes, as plain values for people and scripts.

Reads headers only: no weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal import kernels
from shoal.daemon.error_codes import raise_translated, refusing
from shoal.kernels.errors import KernelError
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint

from .advice import advice_of


def kernel_home() -> str:
    """Which kernels serve here: avx512vnni, avx512, avxvnni, avx2, neon_dot, neon, scalar or reference. Raises
    DaemonError where none of that name do."""
    try:
        return kernels.home()
    except KernelError as error:
        raise_translated(error)


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint by name, in reading order; sizes are in bytes. Raises DaemonError."""
    with refusing(str(path)), open_checkpoint(path) as checkpoint:
        return _facts(path, checkpoint)


def longest_context(path: Path) -> int:
    """The most tokens of context that a checkpoint can be loaded with. Raises DaemonError."""
    with refusing(str(path)), open_checkpoint(path) as checkpoint:
        return checkpoint.spec.longest


def _facts(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    spec = checkpoint.spec
    given: dict[str, Any] = {
        "name": checkpoint.name,
        "path": str(path),
        "kind": checkpoint.kind,
        "family": spec.family,
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "tensor_types": dict(checkpoint.types),
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "ffn": spec.ffn,
        "vocab": spec.vocab,
        "context": spec.context,
    }
    if spec.moe is not None:
        given["experts"] = spec.moe.experts
        given["active_experts"] = spec.moe.active
    licence = checkpoint.metadata.get("general.license")
    given["license"] = licence if isinstance(licence, str) else None
    given["chat_template"] = checkpoint.tokenizer().chat_template is not None
    given["warnings"] = [*checkpoint.warnings, *advice_of(checkpoint).warnings]
    return given

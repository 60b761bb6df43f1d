"""A function-preserving mixture of experts from a dense llama GGUF: every FFN becomes identical experts.

    python bench/inputs/upcycle.py MODEL.gguf OUT.gguf [--experts 8] [--active 2] [--seed 0]

Routers are random, so tokens really are spread over the experts; as their factors sum to one and the experts are
equal, the answer is the dense model's up to rounding. Weights are copied in their stored type.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")


def upcycle(source: Path, target: Path, *, experts: int = 8, active: int = 2, seed: int = 0) -> None:
    """Write the mixture; `source` must be of architecture llama."""
    reader = GGUFReader(source)
    hidden = int(reader.fields["llama.embedding_length"].contents())
    random = np.random.default_rng(seed)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(active)
    for tensor in reader.tensors:
        data = np.asarray(tensor.data)
        if match := FFN.fullmatch(tensor.name):
            layer, role = match.groups()
            if role == "gate":
                router = random.standard_normal((experts, hidden), dtype=np.float32)
                writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
            stacked = np.stack([data] * experts)
            writer.add_tensor(f"blk.{layer}.ffn_{role}_exps.weight", stacked, raw_dtype=tensor.tensor_type)
        else:
            quantised = tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="dense llama GGUF → equivalent mixture of experts")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    upcycle(options.source, options.target, experts=options.experts, active=options.active, seed=options.seed)


if __name__ == "__main__":
    main()

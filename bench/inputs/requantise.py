"""A GGUF in another type of weights, by llama.cpp's own quantiser. Run by a python that has llama-cpp-python.

python requantise.py MODEL.gguf OUT.gguf Q6_K
"""

from __future__ import annotations

import argparse

import llama_cpp


def main() -> int:
    parser = argparse.ArgumentParser(description="a GGUF in another type of weights")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("type", help="as llama.cpp names it: Q4_0, Q4_K_M …")
    options = parser.parse_args()
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options.type}")
    wanted.allow_requantize = True
    return int(llama_cpp.llama_model_quantize(options.model.encode(), options.out.encode(), wanted))


if __name__ == "__main__":
    raise SystemExit(main())

"""Shoal and its peers, in turn on the same machine, model and threads: one table.

    python bench/compare.py --peer-python PATH [--rows speed,long] [--rounds 5] [--threads 2] [--json OUT.json]

PATH is a python that has llama-cpp-python. Rows are named by how they begin (`rows`); the default model comes from the
store, other models are written once, with random weights, into --models. OUT.json keeps the results with the machine's
description: rows measured again replace the old ones. `table.py` makes Markdown of it.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import time
from pathlib import Path
from typing import Any

import machine
import synthetic
from engines import EngineFailed
from rows import DEFAULT_MODEL, ROWS, Row, chosen
from run import Run
from shapes import SHAPES
from synthetic import SyntheticError
from table import table

from shoal.comm.errors import CommError
from shoal.daemon.config import default_threads
from shoal.daemon.errors import DaemonError
from shoal.daemon.home import Home
from shoal.models.gguf_file import open_gguf


def main() -> int:
    options = _options()
    try:
        rows = chosen(options.rows)
        default_model = options.model or synthetic.default_vocabulary()
    except (ValueError, DaemonError) as error:
        print(error, file=sys.stderr)
        return 2
    result = _kept(options.json)
    failed = False
    for row in rows:
        print(f"{row.name} …", file=sys.stderr, flush=True)
        try:
            result["rows"][row.name] = measure(row, default_model, options)
            result["rows"] = in_order(result["rows"])
        except (EngineFailed, SyntheticError, CommError, RuntimeError) as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            failed = True
            continue
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    measured = {row.name for row in rows} & result["rows"].keys()
    print(
        table({**result, "rows": {name: result["rows"][name] for name in result["rows"] if name in measured}})
    )
    return int(failed)


def measure(row: Row, default_model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row's results."""
    if row.model == DEFAULT_MODEL:
        path = default_model
    else:
        path = synthetic.cached(SHAPES[row.model], options.models, default_model, synthetic.bar(row.model))
    text = options.text.read_text(encoding="utf-8") if options.text else prose()
    run = Run(path, options.threads, options.rounds, options.peer_python, text)
    run.look()
    figures = row.scenario(run, row.sizes)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": machine.versions(),
        "threads": options.threads,
        "rounds": options.rounds,
        "model": {"name": row.model, "bytes": path.stat().st_size, "bytes_per_token": bytes_per_token(path)},
        "engines": run.facts,
        "dram_gb_per_s": run.dram_gb_per_s,
        "load": run.load,
        "figures": [figure.to_json() for figure in figures],
    }


def in_order(rows: dict[str, Any]) -> dict[str, Any]:
    """Results in the order of ROWS, without those of rows that are no more."""
    return {row.name: rows[row.name] for row in ROWS if row.name in rows}


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that one token of a GGUF needs: all matrices but embeddings, of the experts the active ones."""
    files = open_gguf(path)
    arch = files.metadata["general.architecture"]
    experts = files.metadata.get(f"{arch}.expert_count", 1)
    active = files.metadata.get(f"{arch}.expert_used_count", 1)
    tied = "output.weight" not in files.tensors
    return sum(
        tensor.nbytes * active // experts if "_exps." in tensor.name else tensor.nbytes
        for tensor in files.tensors.values()
        if len(tensor.shape) > 1 and (tied or tensor.name != "token_embd.weight")
    )


def prose() -> str:
    """English that every Python carries: the topics of its help."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def _kept(path: Path | None) -> dict[str, Any]:
    """Earlier results of this machine, or none yet."""
    here = {"machine": machine.describe(), "rows": {}}
    if path is None or not path.exists():
        return here
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept["machine"] != here["machine"]:
        raise SystemExit(f"{path} has the results of another machine: choose another file")
    return kept


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed, memory and quality: Shoal against its peers")
    parser.add_argument("--peer-python", default=str(Path(__file__).with_name(".venv") / "bin" / "python"))
    parser.add_argument("--rows", default="", help="how their names begin, comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="keep results here")
    parser.add_argument("--model", type=Path, help="a GGUF in place of the default model")
    parser.add_argument(
        "--models", type=Path, default=Home.from_env().root / "bench", help="where models are written"
    )
    parser.add_argument(
        "--text", type=Path, help="prose for prompts and perplexity; default: Python's help topics"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Shoal and its peers, in turn on the same machine, model and threads: one table.

    python bench/compare.py --peer-python PATH [--rows speed,long] [--rounds 5] [--threads 2] [--json OUT.json]

PATH is a python that has llama-cpp-python. Rows (`rows`) are named, or how their names begin; the default model comes
from the store, other models are written once, with random weights, into --models. OUT.json keeps the results with the
machine's description: rows measured again replace the old ones. `table.py` makes Markdown of it.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import synthetic
import synthetic_hf
import widen
from engines.engine_process import EngineFailed
from harness import machine
from harness.cgroup import CgroupError
from harness.rows import DEFAULT_MODEL, ROWS, WIDE_MODEL, Row, chosen
from harness.run import Run
from inputs import hollow
from inputs.shapes import SHAPES
from synthetic import SyntheticError
from table import table

from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.daemon.config import default_threads
from shoal.daemon.errors import DaemonError
from shoal.models.checkpoint.gguf_file import open_gguf
from shoal.models.checkpoint.hf_dir import open_hf
from shoal.models.errors import CheckpointError

_FAILURES = (
    EngineFailed,
    SyntheticError,
    CgroupError,
    CheckpointError,
    CommError,
    DaemonError,
    RuntimeError,
    OSError,
    subprocess.SubprocessError,
)
_EMBEDDINGS = ("token_embd.weight", "model.embed_tokens.weight")


def main(
    every: Sequence[Row] = ROWS, what: str = "speed, memory and quality: Shoal against its peers"
) -> int:
    options = _options(what)
    try:
        rows = chosen(options.rows, every)
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
            result["rows"] = in_order(result["rows"], every)
        except _FAILURES as error:
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
    """The results of one row."""
    path = model_path(row, default_model, options)
    text = options.text.read_text(encoding="utf-8") if options.text else prose()
    only = frozenset(options.engines.split(",")) if options.engines else frozenset()
    run = Run(path, options.threads, options.rounds, options.peer_python, text, only=only)
    run.look()
    figures = row.scenario(run, row.sizes)
    for figure in figures:
        figure.must = _longest(row.must, figure.name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": machine.versions(),
        "threads": options.threads,
        "rounds": options.rounds,
        "model": {"name": row.model, "bytes": stored_bytes(path), "bytes_per_token": bytes_per_token(path)},
        "engines": run.facts,
        "dram_gb_per_s": run.dram_gb_per_s,
        "disk_gb_per_s": run.disk_gb_per_s,
        "load": run.load,
        "figures": [figure.to_json() for figure in figures],
    }


def model_path(row: Row, default_model: Path, options: argparse.Namespace) -> Path:
    """The row's model, written if it is not there. Raises SyntheticError and CalledProcessError."""
    directory: Path = options.models
    if row.type:
        script = [options.peer_python, Path(__file__).with_name("inputs") / "requantise.py", default_model]
        return synthetic.kept(
            directory / f"{default_model.stem}.{row.type}.gguf",
            lambda path: subprocess.run(
                [*script, path, row.type], check=True, capture_output=True, timeout=600
            ),
        )
    if row.model == DEFAULT_MODEL:
        return default_model
    if row.model == WIDE_MODEL:
        return widen.cached(default_model, directory)
    write = {"gguf": synthetic.cached, "directory": synthetic_hf.cached, "hollow": hollow.cached}[row.form]
    return write(SHAPES[row.model], directory, default_model, synthetic.bar(row.model))


def in_order(rows: dict[str, Any], every: Sequence[Row]) -> dict[str, Any]:
    """Results in the order of `every` row, without those of rows that no longer exist."""
    return {row.name: rows[row.name] for row in every if row.name in rows}


def stored_bytes(path: Path) -> int:
    """Bytes of a model's file, or of the files in its directory."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that one token needs: all matrices except embeddings, and of the experts the active ones."""
    files = open_hf(path) if path.is_dir() else open_gguf(path)
    arch = files.metadata.get("general.architecture", "")
    experts = files.metadata.get(f"{arch}.expert_count", 1)
    active = files.metadata.get(f"{arch}.expert_used_count", 1)
    tied = not {"output.weight", "lm_head.weight"} & files.tensors.keys()
    return sum(
        tensor.nbytes * active // experts if "_exps." in tensor.name else tensor.nbytes
        for tensor in files.tensors.values()
        if len(tensor.shape) > 1 and (tied or tensor.name not in _EMBEDDINGS)
    )


def prose() -> str:
    """English text that every Python has: the topics of its help."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def _longest(must: Mapping[str, float], name: str) -> float:
    """The value for the longest key with which the name begins; 0 if there is none."""
    return (
        must[max(found, key=len)] if (found := [start for start in must if name.startswith(start)]) else 0.0
    )


def _kept(path: Path | None) -> dict[str, Any]:
    """Earlier results of this machine, if there are any."""
    here = {"machine": machine.describe(), "rows": {}}
    if path is None or not path.exists():
        return here
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept["machine"] != here["machine"]:
        raise SystemExit(f"{path} has the results of another machine: choose another file")
    return kept


def _options(what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--peer-python", default=str(Path(__file__).with_name(".venv") / "bin" / "python"))
    parser.add_argument(
        "--rows", default="", help="their names, or how these begin, comma-separated; default: all"
    )
    parser.add_argument("--engines", default="", help="measure these alone, where a row starts each anew")
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

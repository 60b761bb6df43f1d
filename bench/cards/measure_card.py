"""All measurements on a graphics card, in a quarter of an hour: see `bench/gpu.sh`, which sets up and calls this.

    python bench/cards/measure_card.py --out DIR [--dry-run] [--parts tests,copies,…] [--seconds 780]

Each part runs in a process of its own that ends when its time is up, so none of them costs the others theirs. What is
known so far is in DIR after each part: results.json, and what it means in summary.txt. Ends with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from cards import card_parts
from cards.card_report import report

SECONDS = 780.0
LEAST_S = 5.0  # with less, no part is begun


def main() -> int:
    options = _options()
    if options.part:
        return _part(options)
    out, ends_s = options.out, time.monotonic() + options.seconds
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = _known(out)
    for name in options.parts:
        limit_s = min(card_parts.LIMITS_S[name], ends_s - time.monotonic())
        if limit_s < LEAST_S:
            results[name] = {"failed": "there was no time left"}
        else:
            results[name] = _run(name, options, limit_s)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "summary.txt").write_text("\n".join(report(results)) + "\n", encoding="utf-8")
        failed = results[name].get("failed", "")
        print(f"{name}: {failed or 'done'} ({results[name].get('took_s', 0):.0f} s)", flush=True)
    print("\n".join(report(results)))
    wrong = any("failed" in its or its.get("passed") is False for its in results.values())
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on a device that the CPU plays")
    parser.add_argument("--parts", default=",".join(card_parts.PARTS), help="some of these, in this order")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of them together")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = [name.strip() for name in options.parts.split(",") if name.strip()]
    if unknown := [name for name in options.parts if name not in card_parts.PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(card_parts.PARTS)}")
    return options


def _known(out: Path) -> dict[str, Any]:
    """What an earlier call has left: parts may be run in several."""
    try:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _run(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    began_s = time.monotonic()
    command = [sys.executable, __file__, "--part", name, "--out", str(options.out)]
    command += ["--dry-run"] if options.dry_run else []
    with (options.out / "log.txt").open("a", encoding="utf-8") as log, tempfile.TemporaryFile("w+") as said:
        print(f"=== {name}", file=log, flush=True)
        process = subprocess.Popen(command, stdout=said, stderr=log, text=True, start_new_session=True)
        try:
            process.wait(limit_s)
            said.seek(0)
            found = json.loads(said.read() or '{"failed": "it ended without a word (log.txt)"}')
        except subprocess.TimeoutExpired:
            found = {"failed": f"not done in {limit_s:.0f} s"}
        except ValueError as error:
            found = {"failed": f"no figures: {error} (log.txt)"}
        finally:
            if process.poll() is None:
                signal_group(process.pid)
                process.wait()
    return {**found, "took_s": round(time.monotonic() - began_s, 1)}


def signal_group(pid: int) -> None:
    """End a part with all that it has started: a group of its own."""
    import os

    os.killpg(pid, signal.SIGKILL)


def _part(options: argparse.Namespace) -> int:
    sizes = card_parts.dry() if options.dry_run else card_parts.REAL
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory(prefix="shoal-card-") as place:
        try:
            found = card_parts.PARTS[options.part](sizes, Path(place))
        except Exception as error:
            traceback.print_exc()
            found = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print(json.dumps(found), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

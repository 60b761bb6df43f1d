"""Where every MB of Shoal goes while it answers within a budget: kinds of memory, compared with the plan.

    sudo python bench/account.py MODEL --memory 603MB [--prompt 64] [--new 4] [--streams 1]

The process runs in a memory cgroup with a cold page cache, as in `offload.py`. Its own memory is told by what is mapped
there (smaps), the group's by what the kernel charges it for.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from harness.capped import SLACK, capped
from harness.run import Run

from shoal.daemon.sizes import parse_bytes

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (?P<mode>\S+) \S+ \S+ \d+ *(?P<path>.*)$")
_CHARGED = ("cache", "rss", "anon", "file", "kernel")  # in memory.stat, of versions 1 and 2
_LARGE_KB = 2048


def main() -> None:
    options = _options()
    run = Run(options.model, options.threads, 1, "")
    context = options.prompt + options.new + 8
    with capped(
        run, "shoal", int(options.memory * SLACK), context=context, streams=options.streams
    ) as engine:
        print(engine.facts["plan"])
        _print("loaded", by_kind(engine.process.pid))
        engine.call("begin", streams=options.streams, tokens=options.prompt, seed=0)
        seconds = engine.call("advance", tokens=options.new)["seconds"] / options.new
        _print("after the answer", by_kind(engine.process.pid))
        stat = (line.split() for line in (engine.group.path / "memory.stat").read_text().splitlines())
        _print("the group is charged for", Counter({key: int(n) for key, n in stat if key in _CHARGED}))
        peak = f"peak {engine.peak_bytes() / 1e6:.1f} MB of {options.memory / 1e6:.1f}"
        streamed = f"{engine.facts['streamed_bytes'] / 1e6:.1f} MB streamed for each"
        print(f"{peak}, {seconds:.3f} s per token, {streamed}")


def by_kind(pid: int) -> Counter[str]:
    """Resident bytes of a process, by their purpose."""
    found: Counter[str] = Counter()
    mode, path, kb, resident = "", "", 0, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            mode, path = mapping["mode"], mapping["path"]
        else:
            key, value, *_ = line.split()
            if key == "Size:":
                kb = int(value)
            elif key == "Rss:":
                resident = int(value) * 1024
            elif key == "Anonymous:":
                anonymous = int(value) * 1024
                found[_kind(path, kb)] += anonymous
                found["files: " + ("code" if "x" in mode else "other")] += resident - anonymous
    return +found


def _kind(path: str, kb: int) -> str:
    if path == "[heap]":
        return "heap"
    if path.startswith("/"):
        return "written pages of libraries"
    if path:
        return path
    return "weights, KV, window; Python's objects" if kb >= _LARGE_KB else "small mappings"


def _print(what: str, found: Counter[str]) -> None:
    print(f"\n{what}: {sum(found.values()) / 1e6:.1f} MB")
    for kind, nbytes in found.most_common():
        if nbytes >= 500_000:
            print(f"  {nbytes / 1e6:7.1f}  {kind}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=parse_bytes, required=True)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

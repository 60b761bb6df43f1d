"""A cluster of hosts that are network namespaces on this machine: what it survives, what it gains, what it costs.

    sudo python bench/many_hosts.py [--rows losses,head,crowd,interfaces,disks,peaks,grid,peers] [--rounds 20]
                                    [--minutes 3] [--prompt 128] [--model MODEL.gguf] [--large MODEL.gguf]

Hosts have a processor share, a memory limit, a disk and a cable of their own, but share one machine's memory and
caches. `--model` is a small real one (by default the default model), `--large` is streamed and divided (default: a
random llama of 1.1B parameters, written to --models). Which peers are compared is said by the environment
(`hosts/peers.py`). Wants root on Linux.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import synthetic
import synthetic_hf
from harness.figures import spread
from hosts import lab
from hosts.crowd import Crowd
from hosts.disks import group_of
from hosts.grid import Grid, cells
from hosts.group import NEW, Group
from hosts.interfaces import two_ways
from hosts.lab import Lab
from hosts.losses import WAYS, head_killed, three_hosts
from hosts.peaks import peaks as measured_peaks
from hosts.peers import Peer, Shoal, all_peers
from inputs.shapes import SHAPES

from shoal.comm.home import Home

CAP_BYTES = 320 << 20  # below half of the large model
READ_BYTES_PER_S = 200e6
CONTEXT = 1024


def losses(options: argparse.Namespace) -> None:
    """Workers are lost in the middle of answers."""
    with three_hosts(options.model) as hosts:
        for way in WAYS:
            trials = [hosts.trial(way) for _ in range(options.rounds)]
            same, errors = sum(trial.same for trial in trials), sum(bool(trial.error) for trial in trials)
            pauses, backs = spread([it.pause_s for it in trials]), spread([it.back_s for it in trials])
            print(
                f"{way:22} {same} of {len(trials)} same, {errors} errors; pause {pauses} s, back {backs} s later"
            )


def head(options: argparse.Namespace) -> None:
    """The head is killed in the middle of an answer, and started again."""
    with Lab() as made:
        group = _three(made, options.model)
        wanted = group.ask(list(range(30)), NEW).ids
        for _ in range(options.rounds):
            cut, told_s, back_s, later = head_killed(group, list(range(30)))
            same = "the same text" if later.ids == wanted else "ANOTHER TEXT"
            print(f"{cut.error} after {told_s:.2f} s; workers back after {back_s:.1f} s; {same}")


def crowd(options: argparse.Namespace) -> None:
    """Many clients, and losses."""
    with Lab() as made:
        many = Crowd(_three(made, options.model))
        many.run(60 * options.minutes)
        print(
            f"{dict(many.ended)}, {len(many.losses)} losses, {len(many.troubles)} troubles {many.troubles[:5]}"
        )
        print(
            f"longest wait for a token {many.longest_gap_s:.1f} s, latest after a deadline {many.latest_s:.1f} s"
        )
        print("\n".join(f"  {wait}" for wait in many.waits()))
        for host in made.hosts:
            points = [(it["s"], it[host.name] / 1e6) for it in many.memory if host.name in it]
            shown = points[:: max(1, len(points) // 10)]
            print(f"  {host.name}: " + ", ".join(f"{at_s:.0f} s {mb:.0f} MB" for at_s, mb in shown))


def interfaces(options: argparse.Namespace) -> None:
    """The slow cable is listed first."""
    with Lab() as made:
        group, fast = two_ways(made)
        node = group.client.nodes().nodes[1]
        verdict = "the fast one" if node.address.startswith(fast) else "NOT THE FAST ONE"
        print(f"{node.address}: {verdict}, best of {node.routes} ({1000 * node.rtt_s:.2f} ms)")


def disks(options: argparse.Namespace) -> None:
    """Each host has too little memory, and a slow disk."""
    with Lab() as made:
        sizes = {"memory_bytes": CAP_BYTES, "read_bytes_per_s": int(READ_BYTES_PER_S), "processors": 2}
        groups = [group_of(made, f"of{ranks}-", ranks, options.large, **sizes) for ranks in (1, 2, 4)]
        for _ in range(options.rounds):
            for one in groups:
                one.measure(16, 6)
        for one in groups:
            ratio = spread([ours / alone for ours, alone in zip(one.token_s, groups[0].token_s, strict=True)])
            print(f"{one.ranks} ranks: {spread(one.token_s)} s a token, {ratio} of alone; {one.why}")


def peaks(options: argparse.Namespace) -> None:
    """How much memory each of two ranks takes, against its plan: all in memory, and streamed."""
    for memory in ("", "400MB"):
        with Lab() as made:
            hosts = [made.host(name, memory=memory) for name in ("head", "worker")]
            for peak in measured_peaks(Group(hosts[0], hosts[1:]), options.large, CONTEXT):
                print(
                    f"{peak.host}: {peak.taken_bytes / 1e6:.0f} MB of {peak.planned_bytes / 1e6:.0f} MB planned"
                )


def grid(options: argparse.Namespace) -> None:
    """Nodes of all kinds come, one after the other."""
    with Lab() as made:
        both = Grid(made, options.large)
        for cell in cells():
            costs = both.measure(cell, options.prompt, 24, options.rounds)
            token, first = costs.ratios()
            print(
                f"{cell}: {costs.ranks} ranks, token ×{token:.2f}, first token ×{first:.2f}; {costs.why}",
                flush=True,
            )


def peers(options: argparse.Namespace) -> None:
    """Two machines, one thread each."""
    for name, stored in product(("llama-21m", "llama-34m", "llama-97m"), ("F32", "BF16")):
        shape, vocabulary = replace(SHAPES[name], mix=stored), synthetic.default_vocabulary()
        directory = synthetic_hf.cached(shape, options.models, vocabulary, synthetic.bar(name))
        gguf = synthetic.cached(shape, options.models, vocabulary, synthetic.bar(name))
        with Lab() as made:
            everybody = all_peers(made, directory, gguf, shape.layers)
            for _ in range(min(options.rounds, 5)):
                for one in everybody:
                    one.found.append(one.answer(options.prompt, 32))
            print(f"{name} in {stored}, a prompt of {options.prompt}")
            for one in everybody:
                print(f"  {one.name:28} {_speeds(one)}{_against(one, everybody)}")


def _speeds(peer: Peer) -> str:
    first, later = (
        spread([it.prompt_s for it in peer.found]),
        spread([1000 * it.token_s for it in peer.found]),
    )
    return f"first token {first} s, then {later} ms"


def _against(peer: Peer, everybody: list[Peer]) -> str:
    """What Shoal takes of a peer's time for a token."""
    if isinstance(peer, Shoal):
        return ""
    ours = [it for it in everybody if isinstance(it, Shoal)]
    pairs = {it.name: zip(it.found, peer.found, strict=True) for it in ours}
    ratios = (f"{name} {median(a.token_s / b.token_s for a, b in both):.2f}" for name, both in pairs.items())
    return "; of that time: " + ", ".join(ratios)


def _three(made: Lab, model: Path) -> Group:
    first, *others = (made.host(name) for name in ("head", "one", "two"))
    group = Group(first, others, ("--ranks", "3", "--ctx", "512"))
    group.load(model, ranks=3)
    return group


ROWS: dict[str, Callable[[argparse.Namespace], None]] = {
    row.__name__: row for row in (losses, head, crowd, interfaces, disks, peaks, grid, peers)
}


def main() -> int:
    parser = argparse.ArgumentParser(description="a cluster of hosts on one machine")
    parser.add_argument("--rows", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, of grid and peers")
    parser.add_argument("--models", type=Path, default=Home.from_env().root / "bench")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--large", type=Path)
    options = parser.parse_args()
    if why := lab.missing():
        print(why, file=sys.stderr)
        return 0
    random.seed(0)
    vocabulary = synthetic.default_vocabulary()
    options.model = options.model or vocabulary
    options.large = options.large or synthetic.cached(
        SHAPES["llama-1.1b"], options.models, vocabulary, synthetic.bar("llama-1.1b")
    )
    for name in options.rows.split(",") if options.rows else ROWS:
        print(f"--- {name}: {ROWS[name].__doc__}", flush=True)
        ROWS[name](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The profile of this machine, and of those that are attached to its daemon, for verbs that predict or show it.

Measures, and asks the daemon if one runs. What it cannot say is left out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shoal.cli import background
from shoal.cli.terminal.output import note, spinner, steps_bar
from shoal.cli.wording import worded
from shoal.client import Client
from shoal.comm.cluster_messages import LinksReply, NodesReply
from shoal.comm.errors import CommError
from shoal.comm.home import Home

if TYPE_CHECKING:
    from shoal.daemon.progress import Progress
    from shoal.daemon.throughput.cluster_profile import Clustered


def own_machines(home: Home, threads: int, *, anew: bool = False, measure_links: bool = False) -> Clustered:
    """`anew`: this machine is measured in any case; `measure_links`: the links of its cluster are, too. Raises
    DaemonError."""
    from shoal.daemon.throughput.cluster_profile import clustered
    from shoal.daemon.throughput.own_machine import profile_file
    from shoal.daemon.throughput.profiling import machine_profile

    kept = profile_file(home, threads)
    with steps_bar() as progress:
        measured = machine_profile(threads, home.streamed, kept, anew=anew, progress=_told(progress))
    assert measured is not None
    found = clustered(measured, *_asked(home, measure_links=measure_links))
    for said in found.left_out:
        note(said)
    return found


def _told(progress: Progress) -> Progress:
    """The same, with a line first where no bar is seen: whoever reads a pipe is not left without a word."""
    told = sys.stderr.isatty()

    def update(what: str, done: int, total: int) -> None:
        nonlocal told
        if not told:
            told = True
            note("measuring this machine: less than a minute; the result is kept")
        progress(what, done, total)

    return update


def _asked(home: Home, *, measure_links: bool) -> tuple[NodesReply, LinksReply | None]:
    """What the daemon of this home says of its cluster: who is in it, and of the links, if they are to be measured."""
    nobody = NodesReply(role="alone", nodes=[])
    if background.running_pid(home) is None:
        return nobody, None
    try:
        with Client(home.address) as client:
            nodes = client.nodes()
            attached = nodes.role == "head" and any(node.attached for node in nodes.nodes[1:])
            if not (measure_links and attached):
                return nodes, None
            with spinner("measuring the links"):
                links = client.measure_links()
            return client.nodes(), links  # what was found counts from now on
    except CommError as error:
        note(f"the machines of the cluster are left out: {worded(str(error))}")
        return nobody, None

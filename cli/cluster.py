"""`shoal cluster`: several machines that compute together. Init and join, leave and forget, nodes.

Knows what is typed and what is shown. Pairing is `comm.group`'s, everything that runs is the daemon's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from msgspec.structs import asdict

from shoal.client import Client
from shoal.comm.cluster_messages import NodeStatus
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.partition.amounts import counted, format_bytes, format_duration

from . import background
from .exit_codes import Exit
from .interrupt import deferred_interrupt
from .options import Real, Whole, examples, json_option, size, size_or_auto
from .terminal.link_table import show_links
from .terminal.node_table import show_nodes
from .terminal.output import console, note, print_json, spinner
from .terminal.paint import printable
from .wording import WORDS, worded

STDIN_CODE_BYTES = 200


class _Verbs(click.Group):
    """Says all of what a verb does, in as many lines as that takes."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            verbs = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
            formatter.write_dl([(name, verb.get_short_help_str(1000)) for name, verb in verbs if verb])


@click.group(
    cls=_Verbs,
    epilog=examples(
        "shoal cluster init                     # on the machine that has the models: prints the next line",
        "shoal cluster join 7K3M-Q9TX-2BD4F     # on each other machine",
        "shoal cluster nodes",
        "shoal cluster test                     # which of them the others wait for",
    ),
)
def cluster() -> None:
    """Compute on several machines together.

    One is the head: it has the models, the texts and the daemon that one talks to. The others lend it memory and
    processors. All traffic between them is encrypted, and only machines that were paired with a join code can attach.
    """


@cluster.command(epilog=examples("shoal cluster init", "shoal cluster init --listen 192.168.1.5:7447"))
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Listen here for other machines, always (:PORT is all interfaces); repeatable. Default: auto:7447, which is "
    "every cable and Wi-Fi while a machine may join or is missing, and only what is in use when all are there.",
)
@json_option
def init(listen: tuple[str, ...], as_json: bool) -> None:
    """Make this machine a head, and print a join code for one more machine.

    A code is good for one machine and for ten minutes; ask again for the next. The daemon is started if none runs.
    """
    from shoal.daemon.cluster.routes.own_addresses import parse_address

    for address in listen:
        parse_address(address)  # raises what is wrong with it before a daemon is started
    home = Home.from_env()
    _require_daemon(home)
    with Client(home.address) as client:
        invitation = client.invite(listen)
    if as_json:
        print_json({"code": invitation.code, "address": invitation.addresses[0], **asdict(invitation)})
        return
    screen = console()
    screen.print(f"join code   {invitation.code}   for one machine, {format_duration(invitation.seconds)}")
    screen.print("on that machine type:")
    address = f"--address {invitation.addresses[0]}"
    if not invitation.announced:
        screen.print(f"    shoal cluster join {invitation.code} {address}")
    else:
        screen.print(f"    shoal cluster join {invitation.code}")
        screen.print(f"if that does not find this machine: {address}")
    if others := [text for text in invitation.addresses[1:] if not text.startswith(("127.", "[::1]"))]:
        screen.print(f"this machine is also at {', '.join(others)}")
    if invitation.caveat:
        note(worded(invitation.caveat))


@cluster.command(
    epilog=examples(
        "shoal cluster join 7K3M-Q9TX-2BD4F --address 192.168.1.5:7447",
        "shoal cluster join 7K3M-Q9TX-2BD4F --address 192.168.1.5:7447 --memory 6GB --detach",
    )
)
@click.argument("code")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="HOST:PORT",
    help="Where the head is, as shoal cluster init shows it (default: found on the local network); repeatable, the "
    "first that answers is used.",
)
@click.option(
    "--head",
    metavar="FINGERPRINT",
    help="If this machine is paired with this head already, that is fine; if that head has forgotten it, they are "
    "paired anew.",
)
@click.option(
    "--memory", type=size_or_auto, metavar="SIZE", help="Lend at most this much memory (default: auto)."
)
@click.option("--threads", type=Whole(min=1), metavar="N", help="Lend so many CPU threads (default: all).")
@click.option(
    "--shard-disk",
    type=size,
    metavar="SIZE",
    help="Keep at most so many bytes of models on this disk (default: a quarter of what is free); 0 keeps none.",
)
@click.option("--detach", "--background", is_flag=True, help="Run in the background.")
@json_option
def join(
    code: str,
    addresses: tuple[str, ...],
    head: str | None,
    memory: int | None,
    threads: int | None,
    shard_disk: int | None,
    detach: bool,
    as_json: bool,
) -> None:
    """Lend this machine to the head that gave CODE.

    The head is looked for on the local network by mDNS; --address HOST:PORT is for networks where that does not work.
    With - for CODE it is read from standard input, so that nobody sees it in the list of processes. This machine needs
    no model files. The pairing is remembered: from now on every shoal serve on this machine attaches to the head, and
    waits for it while it is away. shoal cluster leave ends that.
    """
    limits = {"memory_bytes": memory, "threads": threads, "shard_disk_bytes": shard_disk}
    given = {name: value for name, value in limits.items() if value is not None}
    # Raises what is wrong with them before anything is done.
    config = NodeConfig(memory_bytes=memory, threads=threads, shard_disk_bytes=shard_disk)
    home = Home.from_env()
    with spinner("pairing" if addresses else "looking for the head on the local network"):
        from shoal.daemon.cluster.pairing_up import pair_with_head

        paired = pair_with_head(home, code if code != "-" else _code_from_stdin(), addresses, head)
    if as_json:
        print_json({"head": paired.head, "fingerprint": paired.fingerprint, "before": paired.before})
    note(f"paired with {paired.head}" + " already" * paired.before)
    if background.running_pid(home) is not None:
        with Client(home.address) as client:
            client.rejoin()
        kept = f"; it keeps the {', '.join(map(WORDS.__getitem__, given))} that it was started with"
        note("the daemon that runs here attaches to it now" + kept * bool(given))
        return
    if detach:
        arguments = [part for name, value in given.items() for part in (WORDS[name], str(value))]
        with spinner("starting the daemon"):
            pid = background.start(home, arguments)
        note(f"the daemon is running (pid {pid}); its log is {background.log_path(home)}")
        return
    with deferred_interrupt():
        from shoal.daemon.service import serve
    serve(config, home=home)


@cluster.command(
    epilog=examples("shoal cluster launch hosts.toml", "shoal cluster launch hosts.toml --dry-run")
)
@click.argument("hosts", metavar="HOSTS.TOML", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only print the commands.")
@click.option(
    "--timeout",
    type=Real(1, 600),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one machine may take to be reached and to join.",
)
@click.pass_context
def launch(ctx: click.Context, hosts: Path, dry_run: bool, timeout: float) -> None:
    """Start workers on the machines in HOSTS.TOML over ssh, several at once.

    Each needs Shoal and an ssh that lets you in without asking; your configuration of ssh holds. The file has a
    [[host]] for each machine: its address, and if need be name, user, shoal (the command there), memory, threads and
    home. A machine that has joined before is fine. The daemon is started if none runs here.
    """
    from .launch.hosts_file import read_hosts
    from .launch.launching import Launch, planned

    found, home = read_hosts(hosts), Home.from_env()
    if dry_run:
        for command in planned(found, home, background.running_pid(home) is not None):
            click.echo(shlex.join(command))
        return
    _require_daemon(home)
    left, failed = [host.name for host in found], 0
    with spinner(_waiting(left)) as update:
        work = Launch(home, timeout)
        for outcome, said in work.run(found):
            left.remove(outcome.host.name)
            failed += bool(outcome.trouble)
            click.echo(printable(f"{outcome.host.name}: {said}"))
            update(_waiting(left))
    if failed:
        note(
            f"{counted(failed, 'machine')} of {len(found)} failed; to try again, type the same command again"
        )
        if work.caveat:
            note(worded(work.caveat))
        ctx.exit(Exit.FAILED)


def _waiting(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"waiting for {', '.join(names[:4])}{more}"


@cluster.command(epilog=examples("shoal cluster leave"))
def leave() -> None:
    """Lend this machine to its head no more, or let go of all workers if it is a head.

    A head that is there forgets a worker that leaves. Otherwise it waits for it until shoal cluster forget there.
    """
    from shoal.daemon.cluster.pairing_up import unpair

    home = Home.from_env()
    runs = background.running_pid(home) is not None
    heads: list[str] = []
    workers: list[str] = []
    if runs:
        with Client(home.address) as client:
            for node in client.nodes().nodes[1:]:
                if _let_go(client, node):
                    (heads if node.role == "head" else workers).append(node.name)
    parted = unpair(home)
    for peer in parted.nodes:
        (heads if peer.role == "head" else workers).append(peer.name)
    if runs:
        with Client(home.address) as client:
            client.rejoin()
    note(_parted(heads, workers, parted.led))


def _let_go(client: Client, node: NodeStatus) -> bool:
    """Whether it is forgotten by this, and has not left by itself just now."""
    try:
        client.forget(node.fingerprint)
    except CommError:
        if any(it.fingerprint == node.fingerprint for it in client.nodes().nodes):
            raise
        return False
    return True


def _parted(heads: Sequence[str], workers: Sequence[str], led: bool) -> str:
    """What `leave` has done, for people."""
    if heads:
        return f"this machine has left {', '.join(heads)}"
    if workers:
        return f"this machine is no head any more: it has let go of {', '.join(workers)}"
    return "this machine is no head any more" if led else "this machine was in no cluster"


@cluster.command(epilog=examples("shoal cluster forget pi3"))
@click.argument("node")
def forget(node: str) -> None:
    """Let the machine NODE attach no more; it would need a new join code."""
    home = Home.from_env()
    with _client(home) as client:
        client.forget(node)
    note(f"{node} is forgotten")


@cluster.command(epilog=examples("shoal cluster nodes", "shoal cluster nodes --json"))
@json_option
def nodes(as_json: bool) -> None:
    """Show the machines of the cluster, what they lend and what they do."""
    home = Home.from_env()
    with _client(home) as client:
        found = client.nodes()
    if as_json:
        print_json({**asdict(found), "nodes": [asdict(node) for node in found.nodes]})
        return
    if found.role == "alone":
        note("this machine is in no cluster; shoal cluster init makes it the head of one")
        return
    show_nodes(found)


@cluster.command(epilog=examples("shoal cluster shards", "shoal cluster shards --clear"))
@click.option("--clear", is_flag=True, help="Remove those that are not in use.")
@json_option
def shards(clear: bool, as_json: bool) -> None:
    """Show the parts of other machines' models that this worker keeps on its disk.

    The least recently used are removed by themselves where room is short (--shard-disk of shoal serve). What was
    removed is sent again when it is needed.
    """
    from shoal.daemon.cluster.weights.shard_cache import ShardCache

    from .terminal.shard_table import shard_row, show_shards

    cache = ShardCache(Home.from_env().shards)
    rows = {shard.directory: shard_row(shard, cache.used(shard)) for shard in reversed(cache.list())}
    if clear:
        gone, kept = cache.clear()
        for shard in gone:
            rows[shard.directory]["removed"] = True
        freed = format_bytes(sum(shard.nbytes for shard in gone))
        note(f"removed {counted(len(gone), 'shard')}, {freed}" + f"; {len(kept)} in use" * bool(kept))
    if as_json:
        print_json([*rows.values()])
    elif not rows:
        note("this machine keeps no parts of other machines' models")
    elif not clear:
        show_shards([*rows.values()])


@cluster.command("test", epilog=examples("shoal cluster test", "shoal cluster test --json"))
@json_option
def test_links(as_json: bool) -> int:
    """Measure the links to all workers, and name the one that the others wait for.

    Delay there and back, bytes per second each way, and from all workers at once. It takes a second or two for each
    worker. Requests go on meanwhile. While a model computes, the head also knows how long it waits for each worker.
    Ends with 1 if no worker is attached.
    """
    home = Home.from_env()
    with _client(home) as client, spinner("measuring the links"):
        found = client.measure_links()
    if as_json:
        print_json({**asdict(found), "links": [asdict(link) for link in found.links]})
    else:
        show_links(found)
    return Exit.DONE if found.links else Exit.FAILED


def _code_from_stdin() -> str:
    line = sys.stdin.buffer.readline(STDIN_CODE_BYTES).decode(errors="replace").strip()
    if not line:
        raise DaemonError("bad_request", "no join code came on standard input")
    return line


@contextmanager
def _client(home: Home) -> Iterator[Client]:
    if background.running_pid(home) is None:
        raise background.nobody()
    with Client(home.address) as client:
        yield client


def _require_daemon(home: Home) -> None:
    if background.running_pid(home) is not None:
        return
    with spinner("starting the daemon"):
        pid = background.start(home, [])
    note(f"started the daemon (pid {pid}); its log is {background.log_path(home)}")

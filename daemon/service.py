"""The daemon process: a node behind a server, in the foreground, until it is told to stop.

Knows how configuration, store, node and server are put together, and logging. Everything else is theirs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.comm import curve_keys
from shoal.comm.errors import KeyFileError
from shoal.comm.group.belonging import belongs
from shoal.comm.home import Home
from shoal.comm.messages import Load
from shoal.daemon.cluster.neighbours import Neighbours
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.server.descriptors import raise_limit
from shoal.daemon.server.server import Server
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.models.children import end_children

from .config import NodeConfig
from .errors import DaemonError
from .node import Node
from .private_files import private_dir

if TYPE_CHECKING:
    from shoal.daemon.cluster.forming import Forming
    from shoal.daemon.cluster.membership import Membership

ENDING_S = 25.0  # KV is written to disk for at most 10 s of that
THREADS_S = 2.0  # that threads have to end when everything is closed

log = logging.getLogger(__name__)


def serve(
    config: NodeConfig,
    *,
    home: Home,
    model: str | None = None,
    draft: str | None = None,
    addresses: Sequence[str] = (),
    models_only: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; the first lets running requests end, the second stops at once.

    `addresses` default to the home's private socket. `model` is loaded meanwhile, with `draft` to guess for it.
    With `models_only` nobody can name a path, only models of the store.
    Raises DaemonError when an address is taken or refused, or the model cannot be loaded.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    raise_limit()
    private_dir(home.root)
    private_dir(home.run)
    try:
        server_keys = curve_keys.load_server(home.keys)
    except KeyFileError as error:
        raise DaemonError("bad_request", str(error)) from error
    library = Library(home)
    neighbours = Neighbours(lambda: _place(home, config, node, machine))
    machine = OwnMachine.of(home, config.thread_count)
    node = Node(
        config,
        library.resolve_stored if models_only else library.resolve,
        packs=Packs(home, lambda estimate: log.info(estimate.describe())),
        kv_root=home.kv,
        grouping=neighbours,
        machine=machine,
    )
    node.neighbours = neighbours
    if belongs(home.cluster):
        neighbours.start()
    server = Server(node, addresses or [home.address], server_keys=server_keys, closing=_begin_to_end)
    failures: list[DaemonError] = []

    def load(name: str) -> None:
        try:
            node.load(Load(model=name, draft=draft))
        except DaemonError as error:
            failures.append(error)
            server.stop()
            server.stop()

    with server.signals():
        try:
            server.bind()
        except BaseException:
            node.close()
            neighbours.close()
            raise
        if model:
            threading.Thread(target=load, args=(model,), name="shoal-load", daemon=True).start()
        try:
            server.serve()
        finally:
            neighbours.close()
    if failures:
        raise failures[0]
    _leave_threads()


def _place(home: Home, config: NodeConfig, node: Node, machine: OwnMachine) -> tuple[Forming, Membership]:
    from shoal.daemon.cluster.place import place_in_cluster  # see `neighbours`

    def computing() -> list[str]:
        return [model.name for model in node.status().models if model.running]

    return place_in_cluster(home, config, node.budget, computing, node.kv_files, lambda: machine.device)


def _begin_to_end() -> None:
    """From now on the process ends within `ENDING_S`, whatever its threads do, even one that keeps Python's lock. Those
    that wait for child processes need not, as nobody waits for them."""
    faulthandler.dump_traceback_later(ENDING_S, exit=True)
    end_children()


def _leave_threads() -> None:
    """All is closed and on disk. Python would wait for every thread at its end: end without those that are stuck."""
    ends_s = time.monotonic() + THREADS_S
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    for thread in set(others) - {threading.main_thread(), threading.current_thread()}:
        thread.join(max(0.0, ends_s - time.monotonic()))
        if thread.is_alive():
            log.warning("%s is stuck; the process ends without it", thread.name)
            logging.shutdown()
            os._exit(0)

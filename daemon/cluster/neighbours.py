"""The other machines of a node: whatever knows of them is imported and started when there is a cluster, not before.

Most nodes are alone. For them it would be a fifth of a second at start, and TLS in memory, for nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from shoal.comm.errors import CommError
from shoal.daemon.backend import ClusterReply, ClusterRequest
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.loading.grouping import FormedGroup, Judgement, Seated, Unseated
from shoal.models.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .forming import Forming
    from .membership import Membership

log = logging.getLogger(__name__)


class Neighbours:
    """`Grouping` and `AnswersCluster` of a node. `found` makes what is behind them, once; any thread may ask."""

    def __init__(self, found: Callable[[], tuple[Forming, Membership]]) -> None:
        self._found = found
        self._lock = threading.Lock()
        self._closed = False
        self._grouping: Forming | None = None
        self._membership: Membership | None = None

    def start(self) -> None:
        """Be in a cluster. What cannot be done is logged: the daemon serves alone then."""
        try:
            self._cluster()
        except (DaemonError, CommError, OSError) as error:
            log.error("the cluster is not joined: %s", error)

    def answer(self, request: ClusterRequest) -> ClusterReply:
        """Raises DaemonError."""
        return self._cluster()[1].answer(request)

    def close(self) -> None:
        """Leave everybody. Idempotent."""
        with self._lock:
            self._closed = True
            membership = self._membership
        if membership is not None:
            membership.close()

    @property
    def machines(self) -> int:
        return self._grouping.machines if self._grouping is not None else 1

    @property
    def arrivals(self) -> int:
        return self._grouping.arrivals if self._grouping is not None else 0

    def seat(
        self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int
    ) -> Seated | Unseated:
        if self._grouping is None and config.ranks in (None, 1):
            return Unseated("")
        return self._cluster()[0].seat(name, checkpoint, config, free_bytes)

    def would_seat(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        free_bytes: int,
        dropping: Collection[str],
    ) -> bool:
        if self._grouping is None and config.ranks in (None, 1):
            return False
        return self._cluster()[0].would_seat(name, checkpoint, config, free_bytes, dropping)

    def prepare(self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int) -> None:
        if self._grouping is not None:
            self._grouping.prepare(name, checkpoint, config, free_bytes)

    def note(
        self, checkpoint: Checkpoint, config: NodeConfig, group: FormedGroup | None, token_s: float
    ) -> None:
        if self._grouping is not None:
            self._grouping.note(checkpoint, config, group, token_s)

    def better(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        group: FormedGroup | None,
        free_bytes: int,
    ) -> Judgement:
        if self._grouping is None:
            return Judgement(False, "")
        return self._grouping.better(name, checkpoint, config, group, free_bytes)

    def _cluster(self) -> tuple[Forming, Membership]:
        with self._lock:
            if self._closed:
                raise DaemonError("busy", "the daemon is stopping")
            if self._grouping is None or self._membership is None:
                self._grouping, self._membership = self._found()
            return self._grouping, self._membership

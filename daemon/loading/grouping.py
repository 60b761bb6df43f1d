"""What loading needs of a group of machines: a seam, so that `daemon.cluster` stays out of the loading of models.

Has no code of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress
from shoal.daemon.throughput.expectation import Together
from shoal.engine.collective import Collective
from shoal.engine.leader import Others
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.partition.plan import Plan
from shoal.partition.slicing import Range


class GroupFailed(DaemonError):
    """A group was not completed, by the fault of a machine that is passed over for a while from now on."""


class FormedGroup(Protocol):
    """A group of which this node is rank 0. Its members load since it was made."""

    @property
    def collective(self) -> Collective:
        """Once it is complete."""
        ...

    @property
    def others(self) -> Others:
        """Once it is complete."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of the other machines, by rank."""
        ...

    @property
    def fingerprints(self) -> Sequence[str]:
        """Of the other machines, by rank: what they are known by, whatever they are called."""
        ...

    @property
    def sums(self) -> str:
        """How partials are added, in words, once it is complete."""
        ...

    @property
    def plans(self) -> Sequence[Plan]:
        """Of the other machines, by rank."""
        ...

    @property
    def prompts_only(self) -> bool:
        """Whether it only takes part in long steps, while this node, which has the whole model, computes all others."""
        ...

    @property
    def kv_heads(self) -> Sequence[Range]:
        """Those of all ranks, this node's first."""
        ...

    @property
    def whole(self) -> bool:
        """Whether nobody has been lost."""
        ...

    @property
    def kv_key(self) -> bytes:
        """32 bytes that differ if anything differs that the KV of this node's rank depends on; b"" if none is to be
        kept on disk."""
        ...

    @property
    def kv_slots(self) -> int:
        """For how many pages of KV all the other machines have room on their disks now."""
        ...

    @property
    def kv_trouble(self) -> str:
        """Why they have none, in words."""
        ...

    def form(self, progress: Progress) -> None:
        """Wait until it is complete. Raises GroupFailed."""

    def blame(self, rank: int) -> None:
        """That rank was lost in the middle of a step: if that happens again, it is passed over for a while."""

    def close(self) -> None:
        """End it. Idempotent."""


class OwnShare(NamedTuple):
    """This node's part in a group besides the whole model. The plan has the blocks that are divided, and no KV: that
    lies in the model's. Their vocabulary, and room to compute, are the model's, too."""

    part: AnyCheckpoint
    plan: Plan


class Seated(NamedTuple):
    """This node's part in a group: its shard of the checkpoint and its plan. If the group is for prompts only, that is
    the whole model, and its `share` comes besides. `together`: what is predicted of it, None if nothing is."""

    part: AnyCheckpoint
    plan: Plan
    group: FormedGroup
    why: str
    share: OwnShare | None = None
    together: Together | None = None


class Unseated(NamedTuple):
    """This node runs it alone. `why`: in words, if others are there."""

    why: str


class Judgement(NamedTuple):
    """Whether others than now should compute a model; `why` they do or should, in words, if others are there."""

    others: bool
    why: str


class Grouping(Protocol):
    """Decides whether others take part in running a model, and asks them to."""

    def seat(
        self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int
    ) -> Seated | Unseated:
        """This node's part in a group for an open checkpoint, if others make it faster. Unless
        `config.kv_disk_bytes` is 0, KV of the group is to be kept on disk. Raises DaemonError when a number of ranks
        was asked for that cannot be had."""
        ...

    def would_seat(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        free_bytes: int,
        dropping: Collection[str],
    ) -> bool:
        """Whether others would take part if it were loaded after the models `dropping` were dropped. Asks nobody to.
        Raises as `seat`."""
        ...

    def note(
        self, checkpoint: Checkpoint, config: NodeConfig, group: FormedGroup | None, token_s: float
    ) -> None:
        """So long a token took; with None, on this machine alone. What `seat` and `better` choose depends on it."""

    def prepare(self, name: str, checkpoint: Checkpoint, config: NodeConfig, free_bytes: int) -> None:
        """Have those that `seat` would choose fetch what they lack, while the model goes on. Raises DaemonError."""
        ...

    @property
    def machines(self) -> int:
        """How many can be used now, this one included."""
        ...

    @property
    def arrivals(self) -> int:
        """Changes whenever a machine has come, or can be used again, or what was noted is new."""
        ...

    def better(
        self,
        name: str,
        checkpoint: Checkpoint,
        config: NodeConfig,
        group: FormedGroup | None,
        free_bytes: int,
    ) -> Judgement:
        """Whether a model would be computed by others than now if it were loaded anew."""
        ...

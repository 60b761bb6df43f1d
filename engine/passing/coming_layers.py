"""Layers of a dense model that lie with the CPU and come to a device for steps of many tokens.

Their products are computed there, while what comes next is on its way, and hidden states stay there; the CPU attends,
as K and V are in its memory. Which steps are long enough says the plan. Copies go on from the last layer to the first
of the next such step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from shoal.kernels import ComputeHome
from shoal.models.weights import Weights
from shoal.offload.block_store import BlockStore
from shoal.partition.plan import Plan
from shoal.partition.spec import BlockId

from .passing_weights import PassingWeights


class ComingLayers:
    """Of a plan; none come where it has none that should. They do for `least_tokens` or more. Raises HomeFull and
    HomeLost."""

    def __init__(self, plan: Plan, store: BlockStore, home_of: Callable[[str], ComputeHome]) -> None:
        coming = () if plan.passes else plan.coming
        self._home = home_of(plan.device if coming else "cpu")
        self.least_tokens = plan.staged_tokens
        self._blocks = frozenset(it.block for it in coming)
        self._weights = PassingWeights(plan, store, self._home) if coming else None
        self._begun = False

    @property
    def trouble(self) -> str:
        """See `PassingWeights`."""
        return self._weights.trouble if self._weights is not None else ""

    def let_go(self) -> None:
        """Nothing comes any more: give the memory there back. Idempotent."""
        self._blocks = frozenset()
        if self._weights is not None:
            self._weights.let_go()
            self._weights = None  # which knows the store

    def home_for(self, block: BlockId, tokens: int) -> ComputeHome | None:
        """Of the device, if the block comes there for so many tokens."""
        return self._home if block in self._blocks and tokens >= self.least_tokens else None

    def begin(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        self._begun = bool(self._blocks) and tokens >= self.least_tokens
        if self._begun and self._weights is not None:
            self._weights.begin(1)

    def end(self) -> None:
        """It has ended, and not been given up."""
        if self._begun and self._weights is not None:
            self._weights.end()

    def lend(self, block: BlockId, home: ComputeHome) -> AbstractContextManager[Weights] | None:
        """A block that is to be computed in `home`, if it comes there: others may come in its place afterwards."""
        return self._lent(block) if block in self._blocks and home is self._home else None

    @contextmanager
    def _lent(self, block: BlockId) -> Generator[Weights, None, None]:
        assert self._weights is not None
        yield self._weights.lend(block)
        self._weights.lent(block)

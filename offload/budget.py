"""The ledger of large allocations: weights, KV, scratch.

The ledger knows bytes by name and one limit. It allocates nothing itself: whoever allocates enters the bytes here
first, so the peak cannot pass the limit.
"""

from __future__ import annotations

import threading

from shoal.partition.amounts import format_bytes

from .errors import BudgetExceeded


class Budget:
    """How many bytes each purpose holds; together never more than `limit_bytes`. Memory of devices has ledgers of its
    own (`on`). Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._devices: dict[str, Budget] = {}
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def on(self, device: str, limit_bytes: int = 0) -> Budget:
        """The ledger of a device's memory, which has this limit when it is first asked for. Purposes are released and
        renamed in all ledgers together."""
        with self._lock:
            return self._devices.setdefault(device, Budget(limit_bytes))

    @property
    def devices(self) -> dict[str, Budget]:
        """The ledgers of all devices that were asked for."""
        with self._lock:
            return dict(self._devices)

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return sum(self._held.values())

    def held_by(self, purpose: str) -> int:
        with self._lock:
            return self._held.get(purpose, 0)

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - self.held_bytes

    def hold(self, purpose: str, nbytes: int, what: str = "") -> None:
        """Enter `nbytes` under a new `purpose`. Raises BudgetExceeded, which says `what` needs them (or the purpose),
        and changes nothing when they do not fit."""
        with self._lock:
            assert purpose not in self._held, purpose
            held = sum(self._held.values())
            if held + nbytes > self.limit_bytes:
                raise BudgetExceeded(
                    f"{what or purpose} needs {format_bytes(nbytes)}, but {format_bytes(held)} of the budget of "
                    f"{format_bytes(self.limit_bytes)} are taken"
                )
            self._held[purpose] = nbytes

    def take(self, purpose: str, nbytes: int) -> None:
        """Enter bytes that are taken already, even if they exceed the limit."""
        with self._lock:
            self._held[purpose] = nbytes

    def rename(self, purpose: str, new: str) -> None:
        """From now on `purpose`, if there is one, is called `new`."""
        with self._lock:
            if purpose in self._held:
                self._held[new] = self._held.pop(purpose)
        for ledger in self.devices.values():
            ledger.rename(purpose, new)

    def release(self, purpose: str) -> None:
        """Forget `purpose`. An unknown one is ignored, so that clean-up may run twice."""
        with self._lock:
            self._held.pop(purpose, None)
        for ledger in self.devices.values():
            ledger.release(purpose)

"""Which models are in memory, by name and by file, and which of them goes when room is needed.

Thread-safe: while somebody holds `lock`, no model comes or goes. Knows neither how models are loaded nor requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Reference
from shoal.offload.budget import Budget

from .loaded_model import LoadedModel

log = logging.getLogger(__name__)


def unloaded(name: str) -> DaemonError:
    """Why a request to a model ends, or does not begin, that somebody has unloaded."""
    return DaemonError("unloaded", f"{name} was unloaded meanwhile", "send the request again to load it anew")


class LoadedModels:
    """The models in memory. When one is dropped, it gives its bytes back to `budget`."""

    def __init__(self, budget: Budget) -> None:
        self.lock = threading.RLock()
        self._budget = budget
        self._by_name: dict[str, LoadedModel] = {}
        self._tokens_before = 0  # of models that were dropped

    def __iter__(self) -> Iterator[LoadedModel]:
        """The models that are loaded now, even if others come or go during the iteration."""
        with self.lock:
            return iter(list(self._by_name.values()))

    def __contains__(self, model: LoadedModel) -> bool:
        return self._by_name.get(model.name) is model

    @property
    def tokens_total(self) -> int:
        """Tokens sampled since the beginning."""
        with self.lock:
            return self._tokens_before + sum(model.engine.scheduler.totals.generated_tokens for model in self)

    def add(self, model: LoadedModel) -> None:
        with self.lock:
            self._by_name[model.name] = model

    def pick(self, name: str) -> LoadedModel | None:
        """The model of that name or path; "" means the one used last."""
        if not name:
            return max(self, key=lambda model: model.used_s, default=None)
        return self._by_name.get(name) or next((m for m in self if str(m.reference) == name), None)

    def of(self, reference: Reference) -> LoadedModel | None:
        """The model of that path in these bits."""
        return next((model for model in self if model.reference == reference), None)

    def free_name(self, wanted: Reference, path: Path) -> str:
        """The name for a model: as it was asked for; for a path its last part, or all of it if that name is taken."""
        name = str(wanted._replace(model=path.name) if wanted.model == str(path) else wanted)
        return str(wanted._replace(model=str(path))) if name in self._by_name else name

    def idle(self) -> list[LoadedModel]:
        return [model for model in self if not model.engine.busy]

    def make_room(self) -> bool:
        """Drop the idle model that was used longest ago; False when there is none."""
        with self.lock:  # throughout, so that the chosen model gets no request meanwhile
            chosen = min(self.idle(), key=lambda model: model.used_s, default=None)
            if chosen is not None:
                del self._by_name[chosen.name]
        if chosen is not None:
            self.drop(chosen)
        return chosen is not None

    def drop(self, model: LoadedModel) -> None:
        """Unload a model. Its running requests end with the error `unloaded`."""
        with self.lock:
            self._by_name.pop(model.name, None)
            self._tokens_before += model.engine.scheduler.totals.generated_tokens
        model.interrupt(unloaded(model.name))
        model.release(self._budget)
        log.info("unloaded %s", model.name)

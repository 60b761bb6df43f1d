"""Which models are in memory, by name and by file, and which of them goes when room is needed.

Thread-safe: while somebody holds `lock`, no model comes or goes. Knows neither how models are loaded nor requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.comm.messages import Load
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Reference
from shoal.offload.budget import Budget

from .loaded_model import LoadedModel

log = logging.getLogger(__name__)


def unloaded(name: str) -> DaemonError:
    """Why a request to a model ends, or does not begin, that somebody has unloaded."""
    return DaemonError("unloaded", f"{name} was unloaded meanwhile", "send the request again to load it anew")


def kept(model: LoadedModel, wanted: Load) -> DaemonError:
    """Why a model that others use is not loaded anew for who asks for it otherwise."""
    draft = f"draft model {model.draft_path.name}" if model.draft_path else "no draft model"
    has = draft if wanted.context is None else f"a context of {model.plan.context_tokens} tokens and {draft}"
    asked = f" `draft={wanted.draft}`" if wanted.draft else ""
    return DaemonError(
        "bad_request",
        f"{model.name} is loaded with {has}, for all who use it",
        f"`load({wanted.model})`{asked} loads it anew, for all of them",
    )


class LoadedModels:
    """The models in memory. When one is dropped, it gives its bytes back to `budget`."""

    def __init__(self, budget: Budget) -> None:
        self.lock = threading.RLock()
        self._budget = budget
        self._by_name: dict[str, LoadedModel] = {}
        self._retired: list[
            LoadedModel
        ] = []  # other files are in the place of theirs; they end what they have begun
        self._tokens_before = 0  # of models that were dropped

    def __iter__(self) -> Iterator[LoadedModel]:
        """The models that are loaded now, even if others come or go during the iteration."""
        with self.lock:
            return iter([*self._by_name.values(), *self._retired])

    def __contains__(self, model: LoadedModel) -> bool:
        return self._by_name.get(model.name) is model or model in self._retired

    @property
    def kinds(self) -> list[str]:
        """The stored types of their weights, of each model those with most bytes first."""
        return list(dict.fromkeys(kind for model in self for kind in model.main.expectation.kinds))

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
        with self.lock:
            current = list(self._by_name.values())
        if not name:
            return max(current, key=lambda model: model.used_s, default=None)
        return self._by_name.get(name) or next((m for m in current if str(m.reference) == name), None)

    def of(self, wanted: Reference, path: Path) -> LoadedModel | None:
        """The model that is at `path`, or was named as `wanted` when it was loaded, in these bits."""
        with self.lock:
            current = list(self._by_name.values())
        here = Reference(str(path), wanted.quant)
        named = (model for model in current if (model.named, model.quant) == wanted)
        return next((model for model in current if model.reference == here), None) or next(named, None)

    def free_name(self, wanted: Reference, path: Path) -> str:
        """The name for a model: as it was asked for; for a path its last part, or all of it if that name is taken."""
        name = str(wanted._replace(model=path.name) if wanted.model == str(path) else wanted)
        return str(wanted._replace(model=str(path))) if name in self._by_name else name

    def due(self) -> bool:
        """Whether any has a step to do now."""
        return any(model.engine.busy and model.engine.lost is None for model in self)

    def idle(self) -> list[LoadedModel]:
        return [model for model in self if not model.engine.busy]

    def make_room(self) -> bool:
        """Drop the idle model that was used longest ago; False when there is none."""
        with self.lock:  # throughout, so that the chosen model gets no request meanwhile
            chosen = min(self.idle(), key=lambda model: model.used_s, default=None)
            if chosen is not None:
                self._forget(chosen)
        if chosen is not None:
            self.drop(chosen)
        return chosen is not None

    def retire(self, model: LoadedModel) -> None:
        """Another model takes the place of this one, which goes as soon as it has ended its requests."""
        with self.lock:  # throughout, so that it gets no request meanwhile
            self._forget(model)
            model.retired = True
            busy = model.engine.busy
            if busy:
                taken = {it.name for it in self}
                names = (f"{model.name} (replaced{n})" for n in ("", *(f" {i}" for i in range(2, 1 << 10))))
                model.rename(next(name for name in names if name not in taken), self._budget)
                self._retired.append(model)
        if not busy:
            self.drop(model)

    def sweep(self) -> None:
        """Drop the retired models that have ended their requests, in threads of their own: keeping KV takes seconds."""
        with self.lock:
            ended = [model for model in self._retired if not model.engine.busy]
            for model in ended:
                self._retired.remove(model)
        for model in ended:
            threading.Thread(target=self.drop, args=(model,), name="shoal-drop", daemon=True).start()

    def drop(self, model: LoadedModel) -> None:
        """Unload a model. Its running requests end with the error `unloaded`."""
        with self.lock:
            self._forget(model)
            self._tokens_before += model.engine.scheduler.totals.generated_tokens
        model.interrupt(unloaded(model.name))
        model.release(self._budget)
        log.info("unloaded %s", model.name)

    def _forget(self, model: LoadedModel) -> None:
        if self._by_name.get(model.name) is model:
            del self._by_name[model.name]
        if model in self._retired:
            self._retired.remove(model)

"""Gets a model into memory and others out of it, and says how far it has come.

Knows that idle models make room, and when it is better not to begin. `loaded_models` knows which models there are,
`assembly` how one is put together, `node` who asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shoal.comm.messages import Stage
from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import refusing
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import return_freed
from shoal.daemon.progress import Progress
from shoal.daemon.throughput.model_sizes import weighed
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.turns import FairLock

from .assembly import Assembly
from .budgeting import disk_buffer_bytes, plan_within_budget, require_plan
from .device_rooms import device_asked_for, device_room
from .loaded_model import LoadedModel
from .loaded_models import LoadedModels
from .planning import least_bytes
from .runnable import check_vocabulary

MOTIONLESS_S = 300.0  # without coming further, a load counts as stuck


class Loader:
    """Loads one model at a time. `check` raises when nobody waits for it any more. `stage` and `name` belong to the
    model that is being loaded."""

    def __init__(self, models: LoadedModels, assembly: Assembly, check: Callable[[], None]) -> None:
        self.stage: Stage | None = None
        self.name = ""
        self._models = models
        self._assembly = assembly
        self._check = check
        self._coming: list[str] = []
        self._turns = FairLock()
        self._moved_s = 0.0  # when what is being loaded last came further

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it nobody else loads or unloads. Raises DaemonError `busy` if the other does not come further: a file
        system may hang."""

        def look() -> None:
            self._check()
            if self._assembly.clock() - self._moved_s > MOTIONLESS_S:
                name = self.name or "another model"
                message = f"{name} is being loaded and has not come further for {MOTIONLESS_S:.0f} s"
                raise DaemonError("busy", message, "its disk may be dead", retry_after_s=MOTIONLESS_S)

        with self._turns.held(look, 1.0):
            self._moved_s = self._assembly.clock()
            yield

    @contextmanager
    def announced(self, model: str) -> Iterator[None]:
        """Within it, somebody has that model loaded, or waits until others are."""
        self._coming.append(model)
        try:
            yield
        finally:
            self._coming.remove(model)

    @property
    def coming(self) -> str:
        """The model that is being loaded, as it was asked for; "" if there is none."""
        return next(iter(self._coming), "")

    def check_reload(self, model: LoadedModel, config: NodeConfig, draft: Path | None) -> None:
        """Before `model` is dropped: raises DaemonError if it could not be loaded again like this."""
        if model.engine.busy:
            hint = "try again when it is idle"
            raise DaemonError(
                "busy", f"{model.name} is answering, so it stays as it is", hint, retry_after_s=1.0
            )
        _check_ranks(draft, config)
        self._check_room(model.name, model.checkpoint, draft, config)
        if draft is not None:
            with refusing(f"draft model {draft.name}"), open_checkpoint(draft) as small:
                check_vocabulary(model.name, model.tokenizer, draft.name, small.tokenizer())

    def load(
        self,
        name: str,
        named: str,
        path: Path,
        draft: Path | None,
        config: NodeConfig,
        progress: Progress,
    ) -> LoadedModel:
        """Load a model, asked for as `named`, into memory if dropping idle ones makes enough room; otherwise stream it.
        Raises DaemonError."""

        def heard(doing: str, done: int, total: int) -> None:
            self._check()  # packing may take an hour
            self._moved_s = self._assembly.clock()
            first_s, before = begun.setdefault(doing, (self._assembly.clock(), done))
            speed = (done - before) / max(self._assembly.clock() - first_s, 0.1)
            self.name = name
            self.stage = Stage(doing=doing, done=done, total=total, bytes_per_s=speed)
            progress(doing, done, total)

        _check_ranks(draft, config)
        while True:
            return_freed()
            self.name = name
            begun: dict[str, tuple[float, int]] = {}  # what is done → when it began, and at how many bytes
            try:
                streaming = not self._models.idle()
                return self._assembly.load(
                    name, path, config, named=named, draft=draft, streaming=streaming, progress=heard
                )
            except DaemonError as error:
                if error.code != "resources" or not self._models.idle():
                    raise
                with open_checkpoint(path) as checkpoint:
                    self._check_room(name, checkpoint, draft, config)
                if not self._models.make_room():
                    raise
            finally:
                self.stage, self.name = None, ""

    def _check_room(self, name: str, checkpoint: Checkpoint, draft: Path | None, config: NodeConfig) -> None:
        """Raises DaemonError when the model would not fit even if every idle model were dropped: neither here nor, if
        there are other machines, in parts."""
        idle = self._models.idle()
        idle_bytes = sum(model.peak_bytes for model in idle)
        assembly = self._assembly
        if assembly.kv_files is None:
            config = replace(config, kv_disk_bytes=0)
        with refusing(name):
            extra_bytes = disk_buffer_bytes(checkpoint, config)
            extra_bytes += least_bytes(draft, config) if draft is not None else 0
            if draft is None and assembly.grouping is not None and not config.names_device:
                tokenizer_bytes = checkpoint.tokenizer_memory().kept
                free_bytes = assembly.budget.free_bytes + idle_bytes - tokenizer_bytes
                dropping = [model.name for model in idle]
                if assembly.grouping.would_seat(name, checkpoint, config, free_bytes, dropping):
                    return
            model = weighed(checkpoint, config.quant)
            there = sum(it.plan.device_bytes for it in idle)
            device = device_asked_for(config, assembly.grouping)
            found = plan_within_budget(
                checkpoint,
                model,
                config,
                assembly.budget,
                idle_bytes=idle_bytes,
                extra_bytes=extra_bytes,
                room=device_room(device, assembly.budget, model, assembly.machine, there).room,
            )
        require_plan(found, name)


def _check_ranks(draft: Path | None, config: NodeConfig) -> None:
    """Raises DaemonError if several ranks were asked for where there can be but one."""
    if (config.ranks or 1) > 1 and config.names_device:
        said = f"`ranks={config.ranks}` was asked for, and `device={config.device}`: a device belongs to no group"
        raise DaemonError("unsupported", said, "leave one of them out")
    if draft is not None and (config.ranks or 1) > 1:
        said = (
            f"`ranks={config.ranks}` was asked for, and a draft model: with one, a model runs on one machine"
        )
        raise DaemonError("unsupported", said, "leave one of them out")

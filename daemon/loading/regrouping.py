"""Loads a model anew when the machines that compute it have changed, while its requests wait.

A machine may be lost in the middle of a step, or while nothing runs; another may come. What was emitted never changes:
texts are computed again from their tokens.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import translated
from shoal.daemon.errors import DaemonError
from shoal.engine.errors import RankLost

from .assembly import Assembly
from .grouping import Grouping
from .loaded_model import LoadedModel
from .loaded_models import LoadedModels
from .loader import Loader
from .runnable import narrow_inputs

log = logging.getLogger(__name__)

REGROUP_PAUSE_S = 0.5
BUSY_SHARE = 0.05  # of the time that a model has been busy may go into loading it anew
MOST_ATTEMPTS = 5  # more machines may be lost meanwhile


class Regrouping:
    """For the models of one node. Any thread may call it."""

    def __init__(self, models: LoadedModels, loader: Loader, assembly: Assembly, config: NodeConfig) -> None:
        self._models = models
        self._loader = loader
        self._assembly = assembly
        self._config = config
        self._begun: set[LoadedModel] = set()
        self._lock = threading.Lock()  # guards _begun

    def begin(self, model: LoadedModel, why: str = "") -> None:
        """Load a model with who is there, in a thread of its own: others are computed meanwhile. If no machine was lost
        in a step, say `why`: it then computes until it is its turn to be loaded, and stays as it is if that fails."""
        with self._lock:
            if model in self._begun:
                return
            self._begun.add(model)
        thread = threading.Thread(target=self._run, args=(model, why), name="shoal-regroup", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more now; who looks tries again
            log.warning("%s is not loaded again yet: %s", model.name, error)
            with self._lock:
                self._begun.discard(model)

    def look(self) -> None:
        """Begin with models that lost a machine, or that would be faster with machines which have come, or without some
        which turned out to be slower than predicted. Idle ones at once; others when they have been busy for so long
        that it hardly matters."""
        grouping = self._assembly.grouping
        for model in self._models:
            if model in self._begun:
                continue
            if model.engine.lost is not None:
                self.begin(model)
                continue
            if grouping is None or model.retired:
                continue
            try:
                if model.plan.device or not _may_wait(model):
                    continue
                if why := self._reason(grouping, model):
                    self.begin(model, why)
            except Exception as error:  # the model goes on as it is, and so does who looks
                failed = translated(error)
                log.warning(
                    "%s stays with the machines that compute it: %s", model.name, failed, exc_info=error
                )

    def _reason(self, grouping: Grouping, model: LoadedModel) -> str:
        """Why a model that may wait for it is to be loaded again now; "" if it is not."""
        if (token_s := model.engine.scheduler.speeds.token_times.take()) is not None:
            grouping.note(model.checkpoint, self._wanted(model), model.main.group, token_s)
        group, arrivals = model.main.group, grouping.arrivals
        narrow = narrow_inputs(model.plan, group, self._assembly.machine)
        if model.plan.narrow_inputs is not narrow and _readable(model):
            return "its machine has joined or left a cluster"
        if model.draft is not None:  # which runs on one machine with it
            return ""
        came, model.arrivals = model.arrivals != arrivals, arrivals
        if group is not None and not group.whole:
            return "a machine is gone"
        if model.prepared:
            model.prepared = False
            return "other machines are to compute it" if self._better(grouping, model) else ""
        if came and self._better(grouping, model):
            self._prepare(grouping, model)
        return ""

    def _prepare(self, grouping: Grouping, model: LoadedModel) -> None:
        """Machines that have come fetch their weights, in a thread of its own; until they have them, nobody waits."""
        config, free_bytes = self._wanted(model), self._free_bytes(model)

        def prepare() -> None:
            try:
                grouping.prepare(model.name, model.checkpoint, config, free_bytes)
                model.prepared = True
            except Exception as error:
                failed = translated(error)
                log.warning(
                    "%s: %s", model.name, failed, exc_info=failed if failed.code == "internal" else None
                )

        threading.Thread(target=prepare, name="shoal-prepare", daemon=True).start()

    def _better(self, grouping: Grouping, model: LoadedModel) -> bool:
        """Whether others should compute it. If not, the model says why not."""
        config = self._wanted(model)
        free_bytes = self._free_bytes(model)
        judgement = grouping.better(model.name, model.checkpoint, config, model.main.group, free_bytes)
        if not judgement.others:
            model.main.why = judgement.why
        return judgement.others

    def _free_bytes(self, model: LoadedModel) -> int:
        """What this machine could give to its part of the model, which is here already; the tokenizer stays."""
        return self._assembly.budget.free_bytes + model.peak_bytes - model.tokenizer.nbytes

    def _run(self, model: LoadedModel, why: str) -> None:
        try:
            self._regroup(model, why)
        finally:
            with self._lock:
                self._begun.discard(model)

    def _regroup(self, model: LoadedModel, why: str) -> None:
        suspended = blamed = False
        for attempt in range(1, MOST_ATTEMPTS + 1):
            try:
                blamed = blamed or _blame(model)
                with self._loader.alone():
                    suspended = model in self._models and _suspended(model, why)
                    if suspended:
                        blamed = blamed or _blame(model)
                        self._assembly.regroup(model, self._wanted(model))
                        log.info("%s goes on: %s", model.name, model.plan.describe())
                return
            except Exception as error:
                failed = translated(error)
                if not suspended and model.engine.lost is None:
                    log.warning("%s stays with the machines that compute it: %s", model.name, failed)
                    return
                # A machine may have been lost that was still counted on.
                again = failed.code in ("busy", "resources") and attempt < MOST_ATTEMPTS
                log.warning("%s: %s", model.name, failed, exc_info=not isinstance(error, DaemonError))
            if not again:
                model.engine.fail_all(failed)
                self._models.drop(model)
                return
            time.sleep(REGROUP_PAUSE_S)

    def _wanted(self, model: LoadedModel) -> NodeConfig:
        """As it was asked for, with a context in which all of its requests can end."""
        scheduler = model.engine.scheduler
        asked, grouping = model.asked_ranks, self._assembly.grouping
        limits = [sequence.limit for sequence in (*scheduler.running, *scheduler.waiting)]
        return replace(
            self._config,
            context_tokens=model.asked_context,
            least_context_tokens=max([1, *limits]),
            quant=model.quant,
            ranks=None if asked is None or grouping is None else min(asked, grouping.machines),
        )


def _suspended(model: LoadedModel, why: str) -> bool:
    """Whether it makes no steps. One that lost no machine goes on if nothing is to be done any more, as another thread
    has done it, or if it could not be read again from its files."""
    if model.engine.lost is not None:
        return True
    if not (why and _readable(model)):
        return False
    if not model.engine.suspend(RankLost(0, why)):
        return False
    log.info("%s is loaded again: %s", model.name, why)
    return True


def _readable(model: LoadedModel) -> bool:
    """Whether its files are still those that it was read from."""
    return not model.retired and model.checkpoint.path.exists() and not model.checkpoint.replaced()


def _blame(model: LoadedModel) -> bool:
    """Whether a machine was lost in a step; the group is told which."""
    lost, group = model.engine.lost, model.main.group
    if lost is None or not lost.rank or group is None:
        return False
    group.blame(lost.rank)
    return True


def _may_wait(model: LoadedModel) -> bool:
    """Whether it is idle, or has been busy for so long that its requests may wait for it to be loaded anew."""
    now_s = model.clock()
    if not model.engine.busy:
        model.settled_s = now_s
        return True
    return model.anew_s <= BUSY_SHARE * (now_s - model.settled_s)

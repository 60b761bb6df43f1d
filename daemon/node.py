"""A node: the models loaded on this machine and the one thread that computes.

Serves the requests of `comm.messages` in process; the ZeroMQ server and the CLI are two callers of the same
methods. Knows models and requests; not sockets, frames or terminals.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal.comm.messages import (
    Accepted,
    Chat,
    Done,
    Error,
    Generate,
    Load,
    Loaded,
    Ok,
    Stage,
    StatusReply,
    Token,
    Tokenize,
    Tokens,
    Unload,
)
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.assembly import Assembly
from shoal.daemon.loading.grouping import Grouping
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.daemon.loading.loaded_models import LoadedModels, kept, unloaded
from shoal.daemon.loading.loader import Loader
from shoal.daemon.loading.regrouping import Regrouping
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.engine.errors import RankLost
from shoal.kernels import set_threads
from shoal.offload.errors import OffloadError
from shoal.offload.kv.disk_pages import FLUSH_LIMIT_S

from .answer_thread import Answering
from .backend import STAGE_S, AnswersCluster, ClusterReply, ClusterRequest, Emit, Event
from .config import NodeConfig
from .error_codes import raise_translated
from .errors import DaemonError
from .installed import package_version
from .long_requests import LongRequests, tokenized
from .memory import budget_of, one_heap, peak_memory_bytes, resident_bytes, return_freed
from .model_name import Reference
from .progress import Progress, no_progress
from .regular_looks import RegularLooks
from .request import answer_of, prompt_of, sequence_of
from .underway import Underway

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0  # how long the compute thread sleeps before it looks again by itself


class Node:
    """Runs requests on loaded models; thread-safe. `resolve` turns a model's name into a path. `packs` are needed for
    models that do not fit into memory. KV that leaves memory is kept below `kv_root`; None = it is dropped. `machine`
    knows how fast this one is."""

    def __init__(
        self,
        config: NodeConfig,
        resolve: Callable[[str], Path] = Path,
        clock: Callable[[], float] = time.monotonic,
        packs: Packs | None = None,
        kv_root: Path | None = None,
        grouping: Grouping | None = None,
        machine: OwnMachine | None = None,
    ) -> None:
        one_heap()  # before there are threads
        self.config = config
        self.budget = budget_of(config.memory_bytes)
        self._long = LongRequests(self.budget)
        self._resolve = resolve
        root = kv_root if config.kv_disk_bytes != 0 else None
        self.kv_files = KvFiles(root, config.kv_disk_bytes) if root is not None else None
        self._clock = clock
        self._started_s = clock()
        self.neighbours: AnswersCluster | None = None  # its owner sets it
        self._answering = Answering()
        self._models = LoadedModels(self.budget)
        self._machine = machine or OwnMachine(config.thread_count)
        hear = self._answering.hear
        assembly = Assembly(self.budget, packs, self.kv_files, clock, hear, grouping, self._machine)
        self._loader = Loader(self._models, assembly, self._check_needed)
        self._regrouping = Regrouping(self._models, self._loader, assembly, config)
        self._wake = threading.Condition(self._models.lock)  # guards _draining and _closed too
        self._draining = False
        self._closed = threading.Event()
        self._requests_total = 0
        set_threads(config.thread_count)
        self._thread = threading.Thread(target=self._compute, name="shoal-compute", daemon=True)
        self._thread.start()
        RegularLooks(self._looks, self._closed)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests ---------------------------------------------------------------------------------------

    def submit(self, request: Generate | Chat, emit: Emit, client: str = "") -> Underway:
        """Start a request; returns at once with what cancels it and tells its stage. Clients share fairly.

        `emit` is called from other threads with accepted, token… and exactly one of done and error; it must not
        block. Raises DaemonError instead of emitting when the request cannot start. The model is loaded if needed.
        """
        arrived_s = self._clock()
        try:
            while True:
                model = self._model(request.model, request.context_tokens)
                underway = self._begun(model, request, emit, client, arrived_s)
                if underway is not None:
                    return underway
        finally:
            self._long.ended(request)

    def _begun(
        self, model: LoadedModel, request: Generate | Chat, emit: Emit, client: str, arrived_s: float
    ) -> Underway | None:
        """Start a request. None if other files took the place of the model's before it began, so that it is to begin
        with these. Raises DaemonError."""
        try:
            prompt = prompt_of(model, request)
            sequence = sequence_of(model, request, prompt, client=client, arrived_s=arrived_s)
            answer = answer_of(model, request, prompt, emit)
        except Exception as error:
            if model.retired and model not in self._models:
                return None
            raise_translated(error)
        with self._wake:
            self._check_open()
            if model not in self._models:
                if model.retired:
                    return None
                raise unloaded(model.name)
            self._answering.open(sequence, answer)
            try:
                model.begin(sequence)
            except Exception as error:
                self._answering.forget(sequence)
                raise_translated(error)
            self._requests_total += 1
            self._wake.notify_all()
        return Underway(model, sequence)

    def stream(self, request: Generate | Chat) -> Generator[Accepted | Stage | Token | Done, None, None]:
        """The events of a request in this process. While there are none, its stage, if `progress` was asked for.

        Closing the generator cancels the request. Raises DaemonError.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        underway = self.submit(request, events.put)
        event: Event | Stage | None = None
        try:
            while not isinstance(event, Done):
                try:
                    event = events.get(timeout=STAGE_S)
                except queue.Empty:
                    self.check_threads()
                    event = underway.stage() if request.progress else None
                if isinstance(event, Error):
                    raise DaemonError.of(event)
                if event is not None:
                    yield event
        finally:
            underway.cancel()

    def check_threads(self) -> None:
        """Raises DaemonError if nothing will come any more."""
        if not (self._thread.is_alive() and self._answering.alive):
            raise DaemonError("internal", "a thread of the node has died", "see the log")

    def tokenize(self, request: Tokenize) -> Tokens:
        """Text, messages or ids → ids and text. Raises DaemonError."""
        model = self._model(request.model)
        try:
            return tokenized(model, request, self._long)
        except Exception as error:
            raise_translated(error)
        finally:
            self._long.ended(request)

    def load(self, request: Load, progress: Progress = no_progress) -> Loaded:
        """Load a model, unless it is loaded. Idle models make room when memory is short. Raises DaemonError.

        A loaded model that is to have another `context` or draft model is loaded again. While it answers, that is
        refused as `busy`; if it would not fit like that, it stays as it is. With `keep` it always does.
        """
        began_s = self._clock()
        with self._loader.announced(request.model), self._loader.alone():
            self._check_open()
            wanted = Reference.parse(request.model)
            path = self._resolve(wanted.model)
            known = self._models.of(wanted, path)
            draft = self._resolve(request.draft) if request.draft is not None else None
            config = self.config.for_load(request, wanted.quant)
            if known is None:
                name = self._models.free_name(wanted, path)
            elif (what := known.stale(self._resolve)) is not None:
                log.info("%s: there is another file now, so %s is loaded again", what, known.name)
                name, draft = known.name, draft or known.draft_path
                context, ranks = request.context or known.asked_context, request.ranks or known.asked_ranks
                config = replace(config, context_tokens=context, ranks=ranks)
                self._models.retire(known)
                known = None
            else:
                draft = draft or known.draft_path
                same = request.context in (None, known.plan.context_tokens) and draft == known.draft_path
                same = same and (request.ranks is None or known.computed_by(request.ranks))
                if same and not known.damaged:
                    known.asked_ranks = request.ranks or known.asked_ranks  # from now on it is insisted on
                    return Loaded(model=known.status(), seconds=0.0)
                if request.keep and not same:
                    raise kept(known, request)
                self._loader.check_reload(known, config, draft)
                name = known.name
                self._models.drop(known)
                known = None  # or it would stay in memory beside its successor
            model = self._loader.load(name, wanted.model, path, draft, config, progress)
            self._models.add(model)
            if model.tokenizer.chat_template is not None:
                threading.Thread(target=model.warm_up, name="shoal-template", daemon=True).start()
            if self._closed.is_set():  # `close` may have gone through the models before this one came
                self._models.drop(model)
                self._check_open()
        return model.loaded_in(self._clock() - began_s)

    def unload(self, request: Unload) -> Ok:
        """Drop a model; its running requests end with `error` unloaded. Raises DaemonError `not_found`."""
        with self._loader.alone():
            known = self._models.pick(request.model)
            if known is None:
                raise DaemonError(
                    "not_found", f"no model {request.model or 'at all'} is loaded", "see shoal ps"
                )
            self._models.drop(known)
            known = None
            return_freed()
        return Ok()

    def has(self, model: str) -> bool:
        """Whether it is loaded and sound, so that requests to it begin at once."""
        known = self._models.pick(model)
        return known is not None and not known.damaged and known.stale(self._resolve) is None

    def stage(self, model: str) -> Stage | None:
        """What a request to `model` waits for before it is submitted: that one is loaded, or a disk. Never blocks for
        long."""
        if (stage := self._loader.stage) is not None:
            return stage
        loaded = self._models.pick(model)
        return None if loaded is None else loaded.stage()

    def cluster(self, request: ClusterRequest) -> ClusterReply:
        """What concerns other machines. Raises DaemonError."""
        if self.neighbours is None:
            raise DaemonError("unsupported", "this node was started without a cluster")
        return self.neighbours.answer(request)

    def status(self) -> StatusReply:
        return StatusReply(
            version=package_version(),
            pid=os.getpid(),
            uptime_s=self._clock() - self._started_s,
            threads=self.config.thread_count,
            memory_bytes=resident_bytes(),
            models=[model.status() for model in self._models],
            requests_total=self._requests_total,
            tokens_total=self._models.tokens_total,
            loading=self._loader.name,
            stage=self._loader.stage,
            draining=self._draining,
            peak_memory_bytes=peak_memory_bytes(),
            corrections=self._machine.device.corrections.learnt,
        )

    # --- life -------------------------------------------------------------------------------------------

    def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the running ones, at most `timeout_s`."""
        with self._wake:
            self._draining = True
            ends_s = time.monotonic() + timeout_s
            self._wake.wait_for(lambda: not self._busy(), timeout_s)
        self._answering.wait(max(0.0, ends_s - time.monotonic()))

    def close(self) -> None:
        """Stop computing. Requests that still run end with `error` shutting_down. Idempotent."""
        with self._wake:
            if self._closed.is_set():
                return
            self._draining = True
            self._closed.set()
            self._wake.notify_all()
        for model in self._models:
            model.interrupt(DaemonError("shutting_down", "the daemon is stopping"))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)
        self._answering.close(timeout_s=60)
        ends_s = time.monotonic() + FLUSH_LIMIT_S  # for the KV of all of them
        for model in self._models:
            model.release(self.budget, max(0.0, ends_s - time.monotonic()))
        self._machine.save()

    def _compute(self) -> None:
        """The compute thread: one step of each busy model in turn."""
        while True:
            with self._wake:
                self._wake.notify_all()  # for drain
                self._wake.wait_for(lambda: self._closed.is_set() or self._models.due(), IDLE_WAIT_S)
                if self._closed.is_set():
                    return
            self._step_each()

    def _step_each(self) -> None:
        """One step of each busy model. No part of the loop: a variable there would keep the last model in memory."""
        for model in self._models:
            try:
                if model.engine.busy:
                    model.engine.step()
                elif self._idle():
                    model.engine.settle()
            except RankLost as error:
                log.warning("%s: %s; it goes on with who is left", model.name, error)
                self._regrouping.begin(model)
            except Exception as error:  # the step's own requests have ended with it; the others go on
                if model in self._models and not self._closed.is_set():  # else the step was interrupted
                    ours = not isinstance(error, OffloadError)  # one line is enough
                    log.error("a step of %s failed: %s", model.name, error, exc_info=ours)

    def _looks(self) -> Iterator[Callable[[], object]]:
        """What is looked after also while a step runs."""
        yield from (self._models.sweep, self._regrouping.look, self._long.look)
        # Takes seconds, with no model at hand.
        yield partial(self._machine.look, self._idle, lambda: self._models.kinds)
        for model in self._models:
            yield from (model.engine.expire, model.look_back, model.keep_uses)

    def _idle(self) -> bool:
        return not (self._busy() or self._loader.coming or self._draining)

    def _busy(self) -> bool:
        return any(model.engine.busy for model in self._models)

    def _check_open(self) -> None:
        if self._draining:
            raise DaemonError("shutting_down", "the daemon is stopping", "start it again with shoal serve")

    def _check_needed(self) -> None:
        """Raises DaemonError when nobody waits any more for what is being loaded."""
        if self._closed.is_set():
            self._check_open()

    # --- models -----------------------------------------------------------------------------------------

    def _model(self, name: str, least_context: int | None = None) -> LoadedModel:
        """The model of that name, loaded if it is not yet. "" is the one used last, or that is being loaded."""
        with self._wake:
            self._check_open()
            model = self._models.pick(name)
        if model is None and not name and not (name := self._loader.coming):
            raise DaemonError("not_found", "no model is loaded", "name one, or load one first")
        if (
            model is None
            or (model.damaged and not model.engine.busy)
            or model.stale(self._resolve) is not None
        ):
            load = Load(model=name, least_context=least_context)
            if model is not None:
                again = str(Reference(model.named, model.quant))
                load = Load(model=again, least_context=least_context)
                if model.damaged:
                    load = Load(model=again, context=model.plan.context_tokens)
                name = model.name
                model = None  # or it would stay in memory beside its successor
            self.load(load)
            with self._wake:
                model = self._models.pick(name)
        if model is None:
            raise unloaded(name)
        return model

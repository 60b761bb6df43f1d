"""Puts a model together from checkpoint, tokenizer, plan, rank and engine, within a budget.

Knows how the parts fit. `loaded_models` and `loader` know which models there are and which of them go to make room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import refusing
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import KvFiles, NotKept, fingerprint
from shoal.daemon.library.packs import Packs
from shoal.daemon.memory import return_freed
from shoal.daemon.progress import Progress, no_progress
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.devices.device_names import AUTO, CPU
from shoal.engine.assisted import Assisted
from shoal.engine.engine import Engine
from shoal.engine.guess.drafter import Drafter
from shoal.engine.leader import Leader
from shoal.engine.learn.rival import Rival
from shoal.engine.learn.speeds import Speeds
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.kernels import set_threads
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.offload.budget import Budget
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.partition.plan import Plan

from .advice import advice_of
from .device_rooms import let_idle_be
from .grouping import GroupFailed, Grouping
from .loaded_model import LoadedModel, release, release_main
from .planning import least_bytes
from .runnable import Runnable, read_draft

log = logging.getLogger(__name__)

REGROUP_KEEP_S = 2.0  # for keeping KV on disk before a model is loaded anew, while its requests wait


@dataclass(frozen=True)
class Assembly:
    """What models are put together from. They take memory from `budget`; what does not fit comes from one of `packs`;
    `kv_files` keep KV that leaves memory. An engine that has events is given to `notify`. `machine` knows how long
    things take here."""

    budget: Budget
    packs: Packs | None = None
    kv_files: KvFiles | None = None
    clock: Callable[[], float] = time.monotonic
    notify: Callable[[Engine], None] = lambda engine: None
    grouping: Grouping | None = None
    machine: OwnMachine = field(default_factory=lambda: OwnMachine(NodeConfig().thread_count))

    def load(
        self,
        name: str,
        path: Path,
        config: NodeConfig,
        *,
        named: str | None = None,
        draft: Path | None = None,
        streaming: bool = True,
        progress: Progress = no_progress,
    ) -> LoadedModel:
        """Read a checkpoint into memory, and that of a draft model if there is one. If `streaming`, what does not fit
        is streamed.
        `named`: how the model was asked for, if not by its path. Raises DaemonError; the budget then holds nothing."""
        began_s = self.clock()
        with ExitStack() as undo:  # ends what has begun when a later part fails
            undo.callback(release, name, self.budget)
            with refusing(name):
                main = self._read(
                    name,
                    path,
                    config,
                    progress,
                    streaming=streaming,
                    reserve_bytes=least_bytes(draft, config) if draft else 0,
                    grouping=self.grouping if draft is None else None,
                )
            undo.callback(main.close)
            small = None
            if draft is not None:
                with refusing(f"draft model {draft.name}"):
                    small = read_draft(name, main, draft, config, self.budget, self.machine)
            disk = self._disk(name, main, config)
            if disk is not None:
                undo.callback(disk.close, [], None)
            engine = self._engine(main, small, disk, config)
            advice = advice_of(main.checkpoint)
            asked, now = config.context_tokens, self.clock()
            called = named or str(path)
            made = LoadedModel(
                name, called, main, engine, small, config.quant, asked, config.ranks, self.clock, now, advice
            )
            made.settled_s, made.load_s = now, now - began_s
            undo.pop_all()
        for warning in made.warnings:
            log.warning("%s", warning)
        return made

    def regroup(self, model: LoadedModel, config: NodeConfig) -> None:
        """Load a model's weights anew, computed by whoever is there now. Its requests go on with them. The engine has
        to be suspended. Raises DaemonError; the model is then of no use any more."""
        name, path, began_s = model.name, model.checkpoint.path, self.clock()
        model.engine.close(REGROUP_KEEP_S)
        model.main.close()
        model.main.keep_uses()
        model.main.let_go()
        release_main(name, self.budget)
        return_freed()
        with refusing(name):
            main = self._read_anew(name, path, config, self.grouping if model.draft is None else None)
        model.main = main
        disk = self._disk(name, main, config)
        model.engine.start_anew(
            self._rank(main, disk), self._cache(main, disk), self._speeds(main, self._reads(disk), config)
        )
        model.settled_s = self.clock()
        model.load_s = model.settled_s - began_s

    def _read_anew(self, name: str, path: Path, config: NodeConfig, grouping: Grouping | None) -> Runnable:
        """Without a device that was named if nothing fits there any more: requests wait for it."""
        try:
            return self._read(name, path, config, no_progress, grouping=grouping)
        except (DaemonError, HomeFull) as error:
            lacks = isinstance(error, HomeFull) or error.code == "resources"
            if not (lacks and config.names_device):
                raise
            said = f"{error.message if isinstance(error, DaemonError) else error}; it is loaded without"
            log.warning("%s: %s", name, said)
            release_main(name, self.budget)
        return self._without_device(self._read(name, path, replace(config, device=CPU), no_progress), said)

    def _without_device(self, main: Runnable, said: str) -> Runnable:
        """The CPU computes it, as its device has no room for it: what is said of that."""
        main.device_trouble = said
        let_idle_be(self.budget)
        return main

    def _read(
        self,
        name: str,
        path: Path,
        config: NodeConfig,
        progress: Progress,
        *,
        streaming: bool = True,
        reserve_bytes: int = 0,
        grouping: Grouping | None = None,
    ) -> Runnable:
        """As `Runnable.read`. Unless a number of ranks was asked for, it goes on without machines that do not take
        their part."""
        if self.kv_files is None:
            config = replace(config, kv_disk_bytes=0)
        full = ""
        while True:
            try:
                main = Runnable.read(
                    name,
                    f"model {name}",
                    path,
                    config,
                    self.budget,
                    progress,
                    self.machine,
                    packs=self.packs,
                    streaming=streaming,
                    reserve_bytes=reserve_bytes,
                    grouping=grouping,
                )
                return self._without_device(main, full) if full else main
            except (HomeLost, HomeFull) as error:
                if isinstance(error, HomeFull):  # somebody else has taken memory that was free
                    if config.device != AUTO:
                        raise
                    config, full = replace(config, device=CPU), f"{error}; it is loaded without"
                log.warning("%s: %s; it is loaded without", name, error)
                release_main(name, self.budget)
            except GroupFailed as error:
                if config.ranks is not None:
                    raise
                log.warning("%s: %s; it is loaded without", name, error)
                release_main(name, self.budget)

    def _disk(self, name: str, main: Runnable, config: NodeConfig) -> KvDisk | None:
        """Where this node keeps the KV of a model, or of its part of one. If that is nowhere, the model says why."""
        if self.kv_files is None:
            return None
        page_bytes, group = main.executor.kv.page_bytes, main.group
        if group is None:
            key = fingerprint(main.checkpoint, config.quant, main.plan)
            found = self.kv_files.open(name, key, page_bytes)
        elif group.prompts_only:  # all of it is here
            found = self.kv_files.open(name, group.kv_key, page_bytes)
        elif slots := group.kv_slots:
            found = self.kv_files.open(name, group.kv_key, page_bytes, most_slots=slots, grouped=True)
        else:
            found = NotKept(group.kv_trouble)
        if isinstance(found, KvDisk):
            return found
        main.kv_trouble = found.why
        return None

    @staticmethod
    def _cache(main: Runnable, disk: KvDisk | None) -> PrefixCache:
        kv = main.executor.kv
        return PrefixCache(kv.table, kv.page_tokens, disk.index if disk else None)

    @staticmethod
    def _reads(disk: KvDisk | None) -> int:
        return disk.most_reads if disk else 1

    def _speeds(self, main: Runnable, reads: int, config: NodeConfig) -> Speeds:
        expected = main.expectation.step_curve()
        return Speeds(main.plan.chunk_tokens, expected, reads, config.slowdown, _rival(main.plan))

    def _engine(
        self, main: Runnable, small: Runnable | None, disk: KvDisk | None, config: NodeConfig
    ) -> Engine:
        scheduler = Scheduler(
            self._cache(main, disk),
            sequences=main.plan.sequences,
            queue=config.max_queue,
            chunk_tokens=main.plan.chunk_tokens,
            guesses=main.plan.guesses,
            expected=main.expectation.step_curve(),
            slowdown=config.slowdown,
            reads=self._reads(disk),
            rival=_rival(main.plan),
            ropes=main.checkpoint.spec.ropes,
        )
        drafter = None
        if small is not None:
            vocab = min(main.tokenizer.vocab_size, small.tokenizer.vocab_size, small.checkpoint.spec.vocab)
            drafter = Drafter(
                Rank(small.executor, self.clock),
                vocab=vocab,
                chunk_tokens=small.plan.chunk_tokens,
                clock=self.clock,
            )
        return Engine(self._rank(main, disk), scheduler, self.clock, drafter, self.notify, set_threads)

    def _rank(self, main: Runnable, disk: KvDisk | None = None) -> Rank:
        if (group := main.group) is None:
            return Rank(main.executor, self.clock, disk)
        if main.share is None:
            return Leader(main.executor, self.clock, group.others, disk, lambda: group.kv_slots)
        return Assisted(
            main.executor,
            self.clock,
            main.share,
            group.others,
            group.kv_heads,
            min(plan.kv.pages for plan in group.plans),
            disk,
            main.expectation.step_curve() or (lambda rows: inf),
            group.blame,
        )


def _rival(plan: Plan) -> Rival | None:
    return Rival(plan.threads, plan.rival_threads) if plan.rival_threads else None

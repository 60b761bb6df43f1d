"""Puts a model together from checkpoint, tokenizer, plan, rank and engine, within a budget.

Knows how the parts fit. `loaded_models` and `loader` know which models there are and which of them go to make room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from shoal.daemon.config import NodeConfig
from shoal.daemon.error_codes import refusing
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.packs import Packs
from shoal.daemon.progress import Progress, no_progress
from shoal.engine.engine import Engine
from shoal.engine.guess.drafter import Drafter
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.offload.budget import Budget
from shoal.offload.kv.disk_pages import KvDisk
from shoal.offload.kv.prefix_cache import PrefixCache

from .advice import advice_of
from .loaded_model import LoadedModel, release
from .planning import least_bytes, row_share
from .runnable import Runnable, read_draft

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """What models are put together from. They take memory from `budget`; what does not fit comes from one of `packs`;
    `kv_files` keep KV that leaves memory. An engine that has events is given to `notify`."""

    budget: Budget
    packs: Packs | None = None
    kv_files: KvFiles | None = None
    clock: Callable[[], float] = time.monotonic
    notify: Callable[[Engine], None] = lambda engine: None

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
        with ExitStack() as undo:  # ends what has begun when a later part fails
            undo.callback(release, name, self.budget)
            with refusing(name):
                main = Runnable.read(
                    name,
                    f"model {name}",
                    path,
                    config,
                    self.budget,
                    progress,
                    packs=self.packs,
                    streaming=streaming,
                    reserve_bytes=least_bytes(draft, config) if draft else 0,
                    kv_on_disk=self.kv_files is not None,
                )
            undo.callback(main.executor.store.close)
            small = None
            if draft is not None:
                with refusing(f"draft model {draft.name}"):
                    small = read_draft(name, main, draft, config, self.budget)
            kv, disk = main.executor.kv, None
            if self.kv_files is not None:
                disk = self.kv_files.open(name, main.checkpoint, config.quant, main.plan, kv)
            if disk is not None:
                undo.callback(disk.close, [], kv.page)
            engine = self._engine(main, small, disk, config)
            advice = advice_of(main.checkpoint)
            asked, now = config.context_tokens, self.clock()
            called = named or str(path)
            made = LoadedModel(
                name, called, main, engine, small, config.quant, asked, self.clock, now, advice
            )
            undo.pop_all()
        for warning in made.warnings:
            log.warning("%s", warning)
        return made

    def _engine(
        self, main: Runnable, small: Runnable | None, disk: KvDisk | None, config: NodeConfig
    ) -> Engine:
        kv = main.executor.kv
        scheduler = Scheduler(
            PrefixCache(kv.table, kv.page_tokens, disk.index if disk else None),
            sequences=main.plan.sequences,
            queue=config.max_queue,
            chunk_tokens=main.plan.chunk_tokens,
            guesses=main.plan.guesses,
            row_share=row_share(main.plan, main.read_bytes_per_s),
            reads=disk.most_reads if disk else 1,
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
        rank = Rank(main.executor, self.clock, disk)
        return Engine(rank, scheduler, self.clock, drafter, self.notify)

"""A loaded model: a checkpoint that answers, and its state.

Knows its parts and how they end; `assembly` puts them together. It runs nothing: its owner calls `engine.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shoal.comm.messages import ModelStatus, Stage
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Reference
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.models.chat.template import ChatTemplate
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.offload.budget import Budget
from shoal.offload.pack.manifest import Quant
from shoal.partition.plan import Plan

from .runnable import Runnable


@dataclass(eq=False)
class LoadedModel:
    """Everything that one model needs to answer. `used_s` is when it was last asked; `draft` is the model that guesses
    for it."""

    name: str
    main: Runnable
    engine: Engine
    draft: Runnable | None
    quant: Quant
    clock: Callable[[], float]
    used_s: float

    @property
    def checkpoint(self) -> Checkpoint:
        return self.main.checkpoint

    @property
    def plan(self) -> Plan:
        return self.main.plan

    @property
    def tokenizer(self) -> Tokenizer:
        return self.main.tokenizer

    @property
    def executor(self) -> Executor:
        return self.main.executor

    @property
    def peak_bytes(self) -> int:
        return self.main.peak_bytes + (self.draft.peak_bytes if self.draft else 0)

    @property
    def reference(self) -> Reference:
        """Which model it is on this machine, however it was named in the request."""
        return Reference(str(self.checkpoint.path), self.quant)

    @property
    def draft_path(self) -> Path | None:
        return self.draft.checkpoint.path if self.draft else None

    @property
    def damaged(self) -> bool:
        """Whether its pack was found altered, so that it has to be loaded again. Requests fail at the step that needs
        the altered bytes."""
        return self.executor.store.damaged

    def interrupt(self, error: DaemonError) -> None:
        """End all its requests with `error`, even in a step that waits for a disk. It answers nothing after that."""
        self.engine.fail_all(error)
        self.executor.store.close()

    def release(self, budget: Budget) -> None:
        """End a step under way, keep its KV on disk and give the budget back. The memory is freed with the last
        reference to the model. Idempotent."""
        self.executor.store.close()
        self.engine.close()
        release(self.name, budget)

    def stage(self) -> Stage | None:
        """What its requests wait for just now; None if they do not wait for a disk. Any thread may call it."""
        stage = self.executor.store.stage()
        if stage is None or not self.engine.busy:
            return None
        return Stage(doing="reading", done=stage.done, total=stage.blocks, bytes_per_s=stage.bytes_per_s)

    def status(self) -> ModelStatus:
        scheduler = self.engine.scheduler
        stage = self.executor.store.stage()
        read_bytes_per_s = max(self.main.read_bytes_per_s, stage.best_bytes_per_s if stage else 0.0)
        drafts = f", drafts by {self.draft_path.name}" if self.draft_path else ""
        totals, cache, disk = scheduler.totals, scheduler.cache, self.engine.rank.disk
        return ModelStatus(
            name=self.name,
            path=str(self.checkpoint.path),
            family=self.checkpoint.spec.family,
            quant=self.quant,
            parameters_bytes=self.plan.weights_bytes,
            context_tokens=self.plan.context_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_tokens=cache.used_pages * cache.page_tokens,
            kv_total_tokens=self.plan.kv.tokens,
            plan=self.plan.describe(read_bytes_per_s) + drafts,
            chat_template=self.tokenizer.chat_template is not None,
            kv_cached_tokens=cache.cached_pages * cache.page_tokens,
            prompt_tokens_total=totals.prompt_tokens,
            cached_tokens_total=totals.cached_tokens,
            preemptions_total=totals.preemptions,
            drafted_tokens_total=totals.drafted_tokens,
            accepted_tokens_total=totals.accepted_tokens,
            pinned_bytes=self.plan.pinned_bytes + self.plan.expert_bytes,
            streamed_bytes=self.plan.streamed_bytes,
            window_bytes=self.plan.window_bytes,
            stage=self.stage(),
            step_s=self.plan.step_s(read_bytes_per_s),
            kv_disk_bytes=disk.nbytes if disk else 0,
            kv_disk_pages_read_total=disk.pages_read if disk else 0,
            kv_disk_pages_written_total=disk.pages_written if disk else 0,
            context_limit_tokens=self.checkpoint.spec.context,
        )

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's template, or ChatML if it has none."""

        def spelled(token: int | None) -> str:
            return "" if token is None else self.tokenizer.id_to_token(token)

        return ChatTemplate(
            self.tokenizer.chat_template or "", spelled(self.tokenizer.bos_id), spelled(self.tokenizer.eos_id)
        )


def release(name: str, budget: Budget) -> None:
    """Give back the bytes that a model and its draft model hold."""
    budget.release(f"model {name}")
    budget.release(f"draft for {name}")

"""A loaded model: checkpoint, tokenizer, template, plan and engine, made from one path.

Knows how the parts are put together. Does not run anything: whoever owns it calls `engine.step`.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal import kernels
from shoal.comm.messages import Chat, ChatMessage, Generate, ModelStatus, Sampling, Stage
from shoal.daemon.answer import Answer
from shoal.daemon.backend import Emit
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.kv_files import KvFiles
from shoal.daemon.library.registry import recommended_sampling
from shoal.daemon.model_name import Reference
from shoal.daemon.progress import Progress, no_progress
from shoal.daemon.translate import translated
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.engine.guess.drafter import Drafter
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence, Times
from shoal.models.chat.template import ChatTemplate
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.models.errors import CheckpointError
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.offload.budget import Budget
from shoal.offload.errors import BudgetExceeded
from shoal.offload.kv.disk import KvDisk
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.offload.pack.manifest import Quant
from shoal.partition.plan import Plan, Wanted, kv_page_bytes, scratch_bytes

from .planning import least_bytes, row_share
from .runnable import Runnable, read_draft
from .stores import PackSource

DEFAULT_SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@dataclass(eq=False)
class LoadedModel:
    """Everything one model needs to answer. `used_s` is when it was last asked; `draft` the model that guesses;
    `read_bytes_per_s` how fast the disk was while it was loaded, 0 if nothing is streamed."""

    name: str
    checkpoint: Checkpoint
    plan: Plan
    tokenizer: Tokenizer
    executor: Executor
    kv: KvPool
    engine: Engine
    peak_bytes: int
    draft: Runnable | None
    clock: Callable[[], float]
    used_s: float = 0.0
    read_bytes_per_s: float = 0.0
    quant: Quant = "keep"

    @classmethod
    def load(
        cls,
        name: str,
        path: Path,
        config: NodeConfig,
        budget: Budget,
        *,
        draft: Path | None = None,
        packs: PackSource | None = None,
        streaming: bool = True,
        kv_files: KvFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Progress = no_progress,
    ) -> LoadedModel:
        """Read a checkpoint into memory, and that of a draft model if there is one. What does not fit is streamed from
        one of `packs`, if `streaming`. `kv_files`: where KV is kept that leaves memory. Raises DaemonError; what was
        held in the budget is then released."""
        with ExitStack() as undo:  # what has been begun ends again when a later part fails
            undo.callback(_release, name, budget)
            try:
                main = Runnable.read(
                    name,
                    f"model {name}",
                    path,
                    config,
                    budget,
                    progress,
                    packs=packs,
                    streaming=streaming,
                    reserve_bytes=least_bytes(draft, config) if draft else 0,
                    kv_on_disk=kv_files is not None,
                )
            except Exception as error:
                raise refusal(error, name) from error
            undo.callback(main.executor.store.close)
            small = None
            if draft is not None:
                try:
                    small = read_draft(name, main, draft, config, budget)
                except Exception as error:
                    raise refusal(error, f"draft model {draft.name}") from error
            disk = None
            if kv_files is not None:
                disk = kv_files.open(name, main.checkpoint, config.quant, main.plan, main.kv)
            if disk is not None:
                undo.callback(disk.close, [], main.kv.page)
            made = cls._made(name, main, small, disk, config, clock)
            undo.pop_all()
        return made

    @classmethod
    def _made(
        cls,
        name: str,
        main: Runnable,
        small: Runnable | None,
        disk: KvDisk | None,
        config: NodeConfig,
        clock: Callable[[], float],
    ) -> LoadedModel:
        """Of its parts, which are all in memory."""
        scheduler = Scheduler(
            PrefixCache(main.kv.table, main.kv.page_tokens, disk.index if disk else None),
            sequences=main.plan.sequences,
            queue=config.max_queue,
            chunk_tokens=main.plan.chunk_tokens,
            guesses=main.plan.guesses,
            row_share=row_share(main.plan, main.read_bytes_per_s),
            reads=disk.most_reads if disk else 1,
        )
        drafter = None
        if small is not None:
            vocab = min(main.tokenizer.vocab_size, small.tokenizer.vocab_size, small.checkpoint.spec.vocab)
            drafter = Drafter(
                small.executor, small.kv, vocab=vocab, chunk_tokens=small.plan.chunk_tokens, clock=clock
            )
        return cls(
            name,
            main.checkpoint,
            main.plan,
            main.tokenizer,
            main.executor,
            main.kv,
            Engine(main.executor, main.kv, scheduler, clock, drafter, disk),
            main.peak_bytes + (small.peak_bytes if small else 0),
            small,
            clock,
            clock(),
            main.read_bytes_per_s,
            config.quant,
        )

    @property
    def reference(self) -> Reference:
        """What it is on this machine, however it was named when it was asked for."""
        return Reference(str(self.checkpoint.path), self.quant)

    @property
    def draft_path(self) -> Path | None:
        return self.draft.checkpoint.path if self.draft else None

    @property
    def damaged(self) -> bool:
        """Whether its pack was found altered, so that it has to be loaded again. Requests fail at the step that needs
        the bytes that are wrong."""
        return self.executor.store.damaged

    def interrupt(self, error: DaemonError) -> None:
        """End all that it answers with `error`, and a step that waits for a disk with it. It answers nothing more."""
        self.engine.fail_all(error)
        self.executor.store.close()

    def release(self, budget: Budget) -> None:
        """End a step under way, keep its KV on disk and give the budget back; the memory follows when the last
        reference goes. Idempotent."""
        self.executor.store.close()
        self.engine.close()
        _release(self.name, budget)

    def stage(self) -> Stage | None:
        """What a request to it waits for just now; None when that is no disk. For any thread."""
        stage = self.executor.store.stage()
        if stage is None or not self.engine.busy:
            return None
        return Stage(doing="reading", done=stage.done, total=stage.blocks, bytes_per_s=stage.bytes_per_s)

    def chat_tokens(
        self,
        messages: list[ChatMessage],
        tools: list[dict[str, Any]] | None = None,
        template_args: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """A conversation as prompt ids, by the model's chat template (ChatML when it has none).

        Raises DaemonError or the models room's TemplateError.
        """
        if taken := template_args.keys() & {"messages", "tools"}:
            raise DaemonError(
                "bad_request", f"template_args has {sorted(taken)}: these are fields of their own"
            )
        rendered = self._template.render(
            [_as_dict(message) for message in messages], tools=tools or None, **template_args
        )
        return self.tokenizer.encode(rendered, add_special=False)

    def start(
        self, request: Generate | Chat, prompt: list[int], emit: Emit, *, client: str, arrived_s: float
    ) -> Sequence:
        """A sequence for a request whose prompt has been tokenised. Raises DaemonError."""
        vocab, context = self.checkpoint.spec.vocab, self.plan.context_tokens
        if not prompt:
            raise DaemonError("bad_request", "the prompt is empty: it must have at least one token")
        if max(prompt) >= vocab:
            raise DaemonError(
                "bad_request", f"prompt token {max(prompt)}: must be below the vocabulary's {vocab}"
            )
        if len(prompt) >= context:
            raise DaemonError(
                "context_overflow",
                f"the prompt has {len(prompt)} tokens, the context holds {context} and needs room for an answer",
                self._way_out(len(prompt)),
            )
        if request.max_tokens is not None:
            limit = min(context, len(prompt) + request.max_tokens)
        else:
            limit = min(context, max(self.plan.kv.tokens, len(prompt) + 1))
        stop_ids = frozenset() if request.ignore_eos else self.tokenizer.stop_ids
        sampler = Sampler(self.sampling(request.sampling), prompt)
        answer = Answer(
            emit,
            self.name,
            self.tokenizer,
            prompt,
            stop_ids=stop_ids | frozenset(request.stop_token_ids),
            stop=list(request.stop),
            logprobs=request.sampling.logprobs is not None,
            context_tokens=context,
        )
        self.used_s = self.clock()
        return Sequence(
            list(prompt),
            limit,
            sampler,
            answer,
            client=client,
            priority=request.priority,
            deadline_s=math.inf if request.deadline_s is None else arrived_s + request.deadline_s,
            times=Times(arrived_s=arrived_s),
        )

    def _way_out(self, prompt_tokens: int) -> str:
        """What helps a prompt that is too long for this plan."""
        spec, plan = self.checkpoint.spec, self.plan
        page = plan.kv.page_tokens
        context = min(spec.context, (prompt_tokens // page + 1) * page)
        if context <= prompt_tokens:
            return f"shorten it: the model was made for {spec.context}"
        wanted = Wanted(
            spec,
            context_tokens=context,
            kv_tokens=context,
            kv_type=plan.kv.dtype,
            chunk_tokens=plan.chunk_tokens,
            sequences=plan.sequences,
            guesses=plan.guesses,
            threads=plan.threads,
            native=kernels.home() != "reference",
        )
        scratch = scratch_bytes(wanted, plan.part_tokens)
        kv_bytes = -(-context // page) * kv_page_bytes(spec, plan.kv.dtype)
        needed = plan.peak_bytes - plan.kv.nbytes - plan.scratch_bytes + scratch + kv_bytes
        beside = f"takes {needed / 1e6:,.0f} MB beside the process itself"
        return f"shorten it, or load the model with --ctx {context}, which {beside}"

    def sampling(self, asked: Sampling) -> SamplingParams:
        """The request's values, else what the model's authors recommend, else Shoal's defaults."""
        defaults = {**DEFAULT_SAMPLING, **recommended_sampling(self.name), **self.checkpoint.defaults}
        chosen = {
            name: default if (value := getattr(asked, name)) is None else value
            for name, default in defaults.items()
            if name in DEFAULT_SAMPLING
        }
        return SamplingParams(
            **chosen,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=asked.logit_bias,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            logprobs=asked.logprobs,
        )

    def status(self) -> ModelStatus:
        scheduler = self.engine.scheduler
        stage = self.executor.store.stage()
        read_bytes_per_s = max(self.read_bytes_per_s, stage.best_bytes_per_s if stage is not None else 0.0)
        cache, disk = scheduler.cache, self.engine.disk
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
            plan=self.plan.describe(read_bytes_per_s)
            + (f", drafts by {self.draft_path.name}" if self.draft_path else ""),
            chat_template=self.tokenizer.chat_template is not None,
            kv_cached_tokens=cache.cached_pages * cache.page_tokens,
            prompt_tokens_total=scheduler.prompt_tokens,
            cached_tokens_total=scheduler.cached_tokens,
            preemptions_total=scheduler.preemptions,
            drafted_tokens_total=scheduler.drafted_tokens,
            accepted_tokens_total=scheduler.accepted_tokens,
            pinned_bytes=self.plan.pinned_bytes + self.plan.expert_bytes,
            streamed_bytes=self.plan.streamed_bytes,
            window_bytes=self.plan.window_bytes,
            stage=self.stage(),
            step_s=self.plan.step_s(read_bytes_per_s),
            kv_disk_bytes=disk.nbytes if disk else 0,
            kv_disk_pages_read_total=disk.pages_read if disk else 0,
            kv_disk_pages_written_total=disk.pages_written if disk else 0,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        def spelled(token: int | None) -> str:
            return "" if token is None else self.tokenizer.id_to_token(token)

        return ChatTemplate(
            self.tokenizer.chat_template or "", spelled(self.tokenizer.bos_id), spelled(self.tokenizer.eos_id)
        )


def _release(name: str, budget: Budget) -> None:
    budget.release(f"model {name}")
    budget.release(f"draft for {name}")


def refusal(error: Exception, name: str) -> DaemonError:
    """Why a model cannot be loaded. Checkpoint errors name their file themselves."""
    if isinstance(error, BudgetExceeded):
        return DaemonError("resources", f"{name} {error}", "give it more --memory or a smaller --ctx")
    return translated(error, "" if isinstance(error, CheckpointError) else name)


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """Only the keys that were sent, as templates test for their presence."""
    pairs = ((name, getattr(message, name)) for name in message.__struct_fields__)
    return {name: value for name, value in pairs if value is not None}

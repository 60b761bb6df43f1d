"""A loaded model: checkpoint, tokenizer, template, plan and engine, made from one path.

Knows how the parts are put together. Does not run anything: whoever owns it calls `engine.step`.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.comm.messages import Chat, ChatMessage, Generate, ModelStatus, Sampling
from shoal.models.chat_template import ChatTemplate
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.errors import CheckpointError
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.tokenizer import Tokenizer
from shoal.models.transformer import Transformer
from shoal.offload.budget import Budget
from shoal.offload.errors import BudgetExceeded
from shoal.offload.kv import KvPool
from shoal.offload.kv_disk import buffer_bytes
from shoal.offload.prefix import PrefixCache
from shoal.offload.store import ResidentStore
from shoal.partition.errors import PlanError
from shoal.partition.plan import PAGE_TOKENS, Plan, kv_token_bytes, plan_in_ram

from .answer import Answer, Emit
from .config import NodeConfig
from .drafter import Drafter
from .engine import Engine
from .errors import DaemonError
from .executor import Alone, Executor
from .kv_files import open_kv_disk
from .memory import return_freed
from .registry import recommended_sampling
from .scheduler import Scheduler
from .sequence import Sequence, Times
from .translate import translated

DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 512  # what the default context may shrink to when memory is short
DEFAULT_SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """For callers that do not show any."""


def make_plan(checkpoint: Checkpoint, config: NodeConfig, memory_bytes: int) -> Plan:
    """The plan for a checkpoint within `memory_bytes`; where no context was asked for, the largest that fits.

    Raises DaemonError `context_overflow`, or PlanError when not even LEAST_CONTEXT_TOKENS fit.
    """
    spec = checkpoint.spec
    context = config.context_tokens or min(spec.context, DEFAULT_CONTEXT_TOKENS)
    if context > spec.context:
        raise DaemonError(
            "context_overflow",
            f"a context of {context} tokens was asked for, the model was made for {spec.context}",
            f"use --ctx {spec.context} or less",
        )
    block_bytes = {block: checkpoint.block_bytes(block) for block in spec.blocks()}
    while True:
        try:
            return plan_in_ram(
                spec,
                block_bytes,
                context_tokens=context,
                kv_tokens=config.kv_tokens,
                kv_type=config.kv_type,
                chunk_tokens=config.chunk_tokens,
                sequences=config.max_sequences,
                guesses=config.max_guesses,
                threads=config.thread_count,
                memory_bytes=memory_bytes,
            )
        except PlanError:
            if config.context_tokens is not None or context <= LEAST_CONTEXT_TOKENS:
                raise
            context = max(LEAST_CONTEXT_TOKENS, context // 2)


@dataclass(eq=False)
class Runnable:
    """A checkpoint ready to compute."""

    checkpoint: Checkpoint
    plan: Plan
    tokenizer: Tokenizer
    executor: Executor
    kv: KvPool
    peak_bytes: int  # with what the KV on disk takes

    @classmethod
    def read(
        cls,
        purpose: str,
        path: Path,
        config: NodeConfig,
        budget: Budget,
        progress: Progress,
        *,
        kv_on_disk: bool = False,
    ) -> Runnable:
        """Into memory that is held in the budget for `purpose`; when it fails, no longer. `kv_on_disk`: hold as much
        as that takes, too."""
        with open_checkpoint(path) as checkpoint:
            page_bytes = PAGE_TOKENS * kv_token_bytes(checkpoint.spec, config.kv_type)
            extra_bytes = buffer_bytes(page_bytes) if kv_on_disk else 0
            plan = make_plan(checkpoint, config, budget.free_bytes - extra_bytes)
            tokenizer = checkpoint.tokenizer()
            checkpoint.forget_tokens()
            return_freed()  # before the weights come, so that the peak is theirs alone
            peak_bytes = plan.peak_bytes + extra_bytes
            budget.hold(purpose, peak_bytes)
            try:
                store = ResidentStore.load(plan, checkpoint, progress)
                transformer = Transformer(checkpoint.spec, plan.context_tokens)
                kv = KvPool(checkpoint.spec, plan.kv)
            except Exception:
                budget.release(purpose)
                raise
        return cls(checkpoint, plan, tokenizer, Executor(transformer, store, kv, Alone()), kv, peak_bytes)


@dataclass(eq=False)
class LoadedModel:
    """Everything one model needs to answer. `used_s` is when it was last asked; `draft` the model that guesses."""

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

    @classmethod
    def load(
        cls,
        name: str,
        path: Path,
        config: NodeConfig,
        budget: Budget,
        *,
        draft: Path | None = None,
        kv_root: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Progress = no_progress,
    ) -> LoadedModel:
        """Read a checkpoint into memory, and that of a draft model if there is one. `kv_root`: where KV is kept that
        leaves memory. Raises DaemonError; what was held in the budget is then released."""
        kv_on_disk = kv_root is not None and config.kv_disk_bytes != 0
        try:
            main = Runnable.read(f"model {name}", path, config, budget, progress, kv_on_disk=kv_on_disk)
        except Exception as error:
            raise refusal(error, name) from error
        small = None
        if draft is not None:
            try:
                small = _draft_model(name, main, draft, config, budget)
            except Exception as error:
                _release(name, budget)
                raise refusal(error, f"draft model {draft.name}") from error
        disk = None
        if kv_root is not None and kv_on_disk:
            disk = open_kv_disk(kv_root, config.kv_disk_bytes, name, main.checkpoint, main.plan, main.kv)
        scheduler = Scheduler(
            PrefixCache(main.kv.table, main.kv.page_tokens, disk.index if disk else None),
            sequences=main.plan.sequences,
            queue=config.max_queue,
            chunk_tokens=main.plan.chunk_tokens,
            guesses=main.plan.guesses,
            reads=disk.most_reads if disk else 1,
        )
        drafter = None
        if small is not None:
            vocab = min(main.tokenizer.vocab_size, small.tokenizer.vocab_size)
            drafter = Drafter(
                small.executor, small.kv, vocab=vocab, chunk_tokens=small.plan.chunk_tokens, clock=clock
            )
        engine = Engine(main.executor, main.kv, scheduler, clock, drafter, disk)
        return cls(
            name,
            main.checkpoint,
            main.plan,
            main.tokenizer,
            main.executor,
            main.kv,
            engine,
            main.peak_bytes + (small.peak_bytes if small else 0),
            small,
            clock,
            clock(),
        )

    @property
    def draft_path(self) -> Path | None:
        return self.draft.checkpoint.path if self.draft else None

    def release(self, budget: Budget) -> None:
        """Keep its KV on disk and give the budget back; the memory follows when the last reference goes. Idempotent."""
        self.engine.close()
        _release(self.name, budget)

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
                "shorten the prompt or load the model with a larger context",
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
        cache, disk = scheduler.cache, self.engine.disk
        return ModelStatus(
            name=self.name,
            path=str(self.checkpoint.path),
            family=self.checkpoint.spec.family,
            parameters_bytes=self.plan.weights_bytes,
            context_tokens=self.plan.context_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_tokens=cache.used_pages * cache.page_tokens,
            kv_total_tokens=self.plan.kv.tokens,
            plan=self.plan.describe() + (f", drafts by {self.draft_path.name}" if self.draft_path else ""),
            chat_template=self.tokenizer.chat_template is not None,
            kv_cached_tokens=cache.cached_pages * cache.page_tokens,
            prompt_tokens_total=scheduler.prompt_tokens,
            cached_tokens_total=scheduler.cached_tokens,
            preemptions_total=scheduler.preemptions,
            drafted_tokens_total=scheduler.drafted_tokens,
            accepted_tokens_total=scheduler.accepted_tokens,
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


def _draft_model(name: str, main: Runnable, path: Path, config: NodeConfig, budget: Budget) -> Runnable:
    """A second model that can guess for `main`, held in the budget beside it."""
    config = replace(config, context_tokens=main.plan.context_tokens)
    small = Runnable.read(f"draft for {name}", path, config, budget, no_progress)
    check_vocabulary(name, main.tokenizer, path.name, small.tokenizer)
    return small


def check_vocabulary(name: str, tokenizer: Tokenizer, draft: str, theirs: Tokenizer) -> None:
    """Raises DaemonError unless the tokens of `draft` mean what those of `name` do, as far as both have them."""
    for token in range(min(tokenizer.vocab_size, theirs.vocab_size)):
        ours, other = tokenizer.id_to_token(token), theirs.id_to_token(token)
        if ours != other:
            raise DaemonError(
                "unsupported",
                f"draft model {draft} has another vocabulary than {name}: token {token} is {other!r}, not {ours!r}",
                "take a smaller model of the same family",
            )


def _release(name: str, budget: Budget) -> None:
    budget.release(f"model {name}")
    budget.release(f"draft for {name}")


def refusal(error: Exception, name: str) -> DaemonError:
    """Why a model cannot be loaded. Checkpoint errors name their file themselves."""
    if isinstance(error, PlanError | BudgetExceeded):
        return DaemonError("resources", f"{name} {error}", "give it more --memory or a smaller --ctx")
    return translated(error, "" if isinstance(error, CheckpointError) else name)


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """Only the keys that were sent, as templates test for their presence."""
    pairs = ((name, getattr(message, name)) for name in message.__struct_fields__)
    return {name: value for name, value in pairs if value is not None}

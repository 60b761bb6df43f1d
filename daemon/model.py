"""A loaded model: checkpoint, tokenizer, template, plan and engine, made from one path.

Knows how the parts are put together. Does not run anything: whoever owns it calls `engine.step`.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from shoal.offload.prefix import PrefixCache
from shoal.offload.store import ResidentStore
from shoal.partition.errors import PlanError
from shoal.partition.plan import Plan, plan_in_ram

from .answer import Answer, Emit
from .config import NodeConfig
from .engine import Engine
from .errors import DaemonError
from .executor import Alone, Executor
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
class LoadedModel:
    """Everything one model needs to answer. `used_s` is when it was last asked."""

    name: str
    checkpoint: Checkpoint
    plan: Plan
    tokenizer: Tokenizer
    executor: Executor
    kv: KvPool
    engine: Engine
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
        clock: Callable[[], float] = time.monotonic,
        progress: Progress = no_progress,
    ) -> LoadedModel:
        """Read a checkpoint into memory. Raises DaemonError; what was held in the budget is then released."""
        purpose = f"model {name}"
        held = False
        try:
            with open_checkpoint(path) as checkpoint:
                plan = make_plan(checkpoint, config, budget.free_bytes)
                tokenizer = checkpoint.tokenizer()
                checkpoint.forget_tokens()
                return_freed()  # before the weights come, so that the peak is theirs alone
                budget.hold(purpose, plan.peak_bytes)
                held = True
                store = ResidentStore.load(plan, checkpoint, progress)
            transformer = Transformer(checkpoint.spec, plan.context_tokens)
            kv = KvPool(checkpoint.spec, plan.kv)
        except Exception as error:
            if held:
                budget.release(purpose)
            raise refusal(error, name) from error
        executor = Executor(transformer, store, kv, Alone())
        scheduler = Scheduler(
            PrefixCache(kv.table, kv.page_tokens),
            sequences=plan.sequences,
            queue=config.max_queue,
            chunk_tokens=plan.chunk_tokens,
            guesses=plan.guesses,
        )
        engine = Engine(executor, kv, scheduler, clock)
        return cls(name, checkpoint, plan, tokenizer, executor, kv, engine, clock, clock())

    def release(self, budget: Budget) -> None:
        """Give the budget back; the memory follows when the last reference goes."""
        budget.release(f"model {self.name}")

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
        cache = scheduler.cache
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
            plan=self.plan.describe(),
            chat_template=self.tokenizer.chat_template is not None,
            kv_cached_tokens=cache.cached_pages * cache.page_tokens,
            prompt_tokens_total=scheduler.prompt_tokens,
            cached_tokens_total=scheduler.cached_tokens,
            preemptions_total=scheduler.preemptions,
            drafted_tokens_total=scheduler.drafted_tokens,
            accepted_tokens_total=scheduler.accepted_tokens,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        def spelled(token: int | None) -> str:
            return "" if token is None else self.tokenizer.id_to_token(token)

        return ChatTemplate(
            self.tokenizer.chat_template or "", spelled(self.tokenizer.bos_id), spelled(self.tokenizer.eos_id)
        )


def refusal(error: Exception, name: str) -> DaemonError:
    """Why a model cannot be loaded. Checkpoint errors name their file themselves."""
    if isinstance(error, PlanError | BudgetExceeded):
        return DaemonError("resources", f"{name} {error}", "give it more --memory or a smaller --ctx")
    return translated(error, "" if isinstance(error, CheckpointError) else name)


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """Only the keys that were sent, as templates test for their presence."""
    pairs = ((name, getattr(message, name)) for name in message.__struct_fields__)
    return {name: value for name, value in pairs if value is not None}

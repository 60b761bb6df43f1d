"""From a request to a sequence: its prompt as token ids, how tokens are chosen, and when it ends.

Knows a model's tokenizer, template and limits. Does not run anything.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec.structs import asdict

from shoal import kernels
from shoal.comm.messages import Chat, ChatMessage, Generate, Sampling
from shoal.comm.sampling_limits import check_sampling
from shoal.daemon.library.registry import recommended_sampling
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.sequence import Sequence, Times
from shoal.models.sampling import Sampler, SamplingParams
from shoal.partition.amounts import format_bytes
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.plan import Wanted, scratch_bytes

from .answer import Answer
from .backend import Emit
from .errors import DaemonError

DEFAULT_SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def prompt_of(model: LoadedModel, request: Generate | Chat) -> list[int]:
    """The prompt's token ids. Raises DaemonError, or the models room's TemplateError or TokenizerError."""
    if isinstance(request, Chat):
        return chat_tokens(model, request.messages, request.tools, request.template_args)
    if request.prompt is not None:
        return model.tokenizer.encode(request.prompt)
    return list(request.prompt_tokens or [])


def chat_tokens(
    model: LoadedModel,
    messages: list[ChatMessage],
    tools: list[dict[str, Any]] | None = None,
    template_args: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """A conversation as prompt ids, by the model's chat template (ChatML when it has none).

    Raises DaemonError or the models room's TemplateError.
    """
    if taken := template_args.keys() & {"messages", "tools"}:
        raise DaemonError("bad_request", f"template_args has {sorted(taken)}: these are fields of their own")
    rendered = model.chat_template.render(
        [_as_dict(message) for message in messages], tools=tools or None, **template_args
    )
    return model.tokenizer.encode(rendered, add_special=False)


def sequence_of(
    model: LoadedModel, request: Generate | Chat, prompt: list[int], *, client: str, arrived_s: float
) -> Sequence:
    """A sequence for a request whose prompt has been tokenised. Raises DaemonError."""
    vocab, context = model.checkpoint.spec.vocab, model.plan.context_tokens
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
            _way_out(model, len(prompt)),
        )
    if request.max_tokens is not None:
        limit = min(context, len(prompt) + request.max_tokens)
    else:
        limit = min(context, max(model.plan.kv.tokens, len(prompt) + 1))
    ends = frozenset() if request.ignore_eos else model.tokenizer.stop_ids
    return Sequence(
        list(prompt),
        limit,
        Sampler(sampling_of(model, request.sampling), prompt),
        stop_ids=ends | frozenset(request.stop_token_ids),
        client=client,
        priority=request.priority,
        deadline_s=math.inf if request.deadline_s is None else arrived_s + request.deadline_s,
        times=Times(arrived_s=arrived_s),
    )


def answer_of(model: LoadedModel, request: Generate | Chat, prompt: list[int], emit: Emit) -> Answer:
    """The Answer that turns the request's sequence into messages. Raises SamplingError for impossible stop strings."""
    return Answer(
        emit,
        model.name,
        model.tokenizer,
        prompt,
        stop=list(request.stop),
        logprobs=request.sampling.logprobs is not None,
        context_tokens=model.plan.context_tokens,
    )


def sampling_of(model: LoadedModel, asked: Sampling) -> SamplingParams:
    """The request's values, else what the model's authors recommend, else Shoal's defaults."""
    values = DEFAULT_SAMPLING | recommended_sampling(model.name) | model.checkpoint.defaults
    values |= {name: value for name, value in asdict(asked).items() if value is not None}
    chosen = {name: values[name] for name in DEFAULT_SAMPLING}
    try:
        for name, value in chosen.items():
            check_sampling(name, value)
    except ValueError as error:  # a model's files may advise anything
        raise DaemonError("bad_request", f"what {model.name} advises for sampling: {error}") from error
    return SamplingParams(
        **chosen,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        logprobs=asked.logprobs,
    )


def _way_out(model: LoadedModel, prompt_tokens: int) -> str:
    """A hint for a prompt that is too long for the model's plan."""
    spec, plan = model.checkpoint.spec, model.plan
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
    beside = f"takes {format_bytes(needed)} beside the process itself"
    return f"shorten it, or load the model with `context_tokens={context}`, which {beside}"


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """Only the keys that were sent, as templates test for their presence."""
    return {name: value for name, value in asdict(message).items() if value is not None}

"""From a request to a sequence: its prompt as token ids, how tokens are chosen, and when it ends.

Knows a model's tokenizer, template and limits. Does not run anything.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Sequenced
from types import MappingProxyType
from typing import Any

from msgspec.structs import asdict

from shoal import kernels
from shoal.comm.messages import Chat, Generate, Sampling
from shoal.daemon.loading.loaded_model import LoadedModel
from shoal.engine.sequence import Sequence, Times
from shoal.models.chat.continuing import before_mark, marked
from shoal.models.chat.template import ChatTemplate
from shoal.models.errors import TemplateError, TemplateRefusal, TemplateTooCostly, TooManyTokens
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.tokenizer.repetition import Repetition
from shoal.partition.amounts import format_bytes
from shoal.partition.memory_layout import kv_page_bytes
from shoal.partition.plan import scratch_bytes, wanted_by

from .answer import Answer
from .backend import Emit
from .config import beyond_what_is_loaded
from .errors import DaemonError

DEFAULT_SAMPLING = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_NO_CONTENT = "has no attribute 'content'"  # as Jinja says it
_REASONING = ("reasoning_content", "thinking", "reasoning")

PROBE = [{"role": "user", "content": "Hello"}]  # a template that fails for this one is to blame itself


def prompt_of(model: LoadedModel, request: Generate | Chat) -> list[int]:
    """The prompt's token ids. Raises DaemonError, or what the models room says of templates, tokenizers and texts."""
    context = context_of(model, request)
    most = context - 1
    try:
        if isinstance(request, Chat):
            text = chat_text(model, request.messages, request.tools, request.template_args)
            return model.tokenizer.encode(text, add_special=False, most=most)
        if request.prompt is not None:
            return model.tokenizer.encode(request.prompt, most=most)
    except TooManyTokens as error:
        # Its frames have the text.
        raise _overflow(model, context, error.least, "at least ") from error.with_traceback(None)
    return list(request.prompt_tokens or [])


def chat_text(
    model: LoadedModel,
    messages: Sequenced[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    template_args: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A conversation as a prompt, by the model's chat template (ChatML when it has none).

    Raises DaemonError or the models room's TemplateError and Overloaded.
    """
    if taken := template_args.keys() & {"messages", "tools"}:
        raise DaemonError("bad_request", f"template_args has {sorted(taken)}: these are fields of their own")
    try:
        template = model.tool_template if tools else model.chat_template
    except TemplateError as error:
        raise _unsound(model, error) from error
    variables = {"documents": None, **model.tokenizer.template_tokens, **template_args}
    if field := variables.pop("continue_final_message", False):
        messages = marked(messages, field if isinstance(field, str) else "content")
        variables["add_generation_prompt"] = False
    told = [_as_told(message) for message in messages]
    try:
        rendered = template.render(told, tools=tools or None, **variables)
        unread = bool(tools) and template.ignores_tools(rendered, told, **variables)
    except TemplateRefusal:
        raise
    except TemplateError as error:
        # What a rendering may take grows with its conversation, so a template that takes more is to blame itself.
        if isinstance(error, TemplateTooCostly) or not _renders(template):
            raise _unsound(model, error) from error
        raise _unfit(told, error) from error
    if unread:
        raise DaemonError(
            "unsupported",
            f"the chat template of {model.name} does not read `tools`, so the model would not see them",
            "leave them out, describe them in a message, or take a model that was trained to use tools",
        )
    return before_mark(rendered) if field else rendered


def _unsound(model: LoadedModel, error: TemplateError) -> DaemonError:
    hint = "send a prompt instead, or mend the template"
    return DaemonError("corrupt", f"{model.checkpoint.path}: {error}", hint)


def _unfit(messages: Sequenced[Mapping[str, Any]], error: TemplateError) -> Exception:
    """Why a sound template fails for these messages: mostly it reads the content of one that has none. Where it takes
    a message with tool calls without, it is another one."""
    without = [index for index, message in enumerate(messages) if "content" not in message]
    if not without or _NO_CONTENT not in str(error):
        return error
    index = min(without, key=lambda index: bool(messages[index].get("tool_calls")))
    hint = "give it one; an empty text will do"
    return DaemonError("bad_request", f"messages[{index}] has no `content`: {error}", hint)


def _renders(template: ChatTemplate) -> bool:
    """Whether a template is sound as far as the simplest conversation shows."""
    try:
        template.render(PROBE)
    except TemplateRefusal:
        pass
    except TemplateError:
        return False
    return True


def sequence_of(
    model: LoadedModel, request: Generate | Chat, prompt: list[int], *, client: str, arrived_s: float
) -> Sequence:
    """A sequence for a request whose prompt has been tokenised. Raises DaemonError."""
    vocab, context = model.checkpoint.spec.vocab, context_of(model, request)
    if not prompt:
        raise DaemonError("bad_request", "the prompt is empty: it must have at least one token")
    if max(prompt) >= vocab:
        if isinstance(request, Chat) or request.prompt is not None:
            path, size = model.checkpoint.path, model.tokenizer.vocab_size
            raise DaemonError(
                "corrupt",
                f"{path}: its tokenizer makes token {max(prompt)} of this text, its embedding has {vocab} rows",
                f"the tokenizer has {size} tokens: take the one that belongs to the model",
            )
        raise DaemonError(
            "bad_request", f"prompt token {max(prompt)}: must be below the vocabulary's {vocab}"
        )
    if len(prompt) >= context:
        raise _overflow(model, context, len(prompt))
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


def context_of(model: LoadedModel, request: Generate | Chat) -> int:
    """The longest sequence of a request. Raises DaemonError when it asks for more than the model is loaded with."""
    asked, context = request.context_tokens, model.plan.context_tokens
    if asked is not None and asked > context:
        hint = f"ask for at most `context_tokens={context}`, or have it loaded anew with more"
        raise beyond_what_is_loaded(asked, model.name, context, hint)
    return asked or context


def answer_of(model: LoadedModel, request: Generate | Chat, prompt: list[int], emit: Emit) -> Answer:
    """The Answer that turns the request's sequence into messages. Raises SamplingError for impossible stop strings."""
    context = context_of(model, request)
    return Answer(
        emit,
        model.name,
        model.tokenizer,
        prompt,
        stop=list(request.stop),
        logprobs=request.sampling.logprobs is not None,
        context_tokens=context,
        path=model.checkpoint.path,
        repetition=Repetition(context) if request.stop_repeating else None,
    )


def sampling_of(model: LoadedModel, asked: Sampling) -> SamplingParams:
    """The request's values, else what the model's makers advise, else Shoal's defaults."""
    given, advised = asdict(asked), model.advice.values
    for name, default in DEFAULT_SAMPLING.items():
        if given[name] is None:
            given[name] = advised.get(name, default)
    given["logit_bias"] = advised.get("logit_bias", {}) | asked.logit_bias
    if asked.seed is None:
        given["seed"] = secrets.randbits(63)
    return SamplingParams(**given)


def _overflow(model: LoadedModel, context: int, tokens: int, about: str = "") -> DaemonError:
    # How long it is exactly, nobody has counted.
    roomy = bool(about) and tokens < model.checkpoint.spec.longest
    return DaemonError(
        "context_overflow",
        f"the prompt has {about}{tokens} tokens, the context holds {context} and needs room for an answer",
        "shorten it" if roomy else _way_out(model, tokens, context),
    )


def _way_out(model: LoadedModel, prompt_tokens: int, asked: int) -> str:
    """A hint for a prompt that is too long for the context that was asked for, or for the model's plan."""
    spec, plan = model.checkpoint.spec, model.plan
    if asked <= prompt_tokens < plan.context_tokens:
        return f"shorten it, or ask for more: up to `context_tokens={plan.context_tokens}`"
    page = plan.kv.page_tokens
    context = min(spec.longest, (prompt_tokens // page + 1) * page)
    if context <= prompt_tokens:
        return f"shorten it: the model was made for {spec.longest}"
    wanted = wanted_by(plan, spec)._replace(
        context_tokens=context, kv_tokens=context, native=kernels.home() != "reference"
    )
    scratch = scratch_bytes(wanted, plan.part_tokens)
    kv_bytes = -(-context // page) * kv_page_bytes(spec, plan.kv.dtype)
    needed = plan.peak_bytes - plan.kv.nbytes - plan.scratch_bytes + scratch + kv_bytes
    beside = f"takes {format_bytes(needed)} beside the process itself"
    return f"shorten it, or load the model with `context_tokens={context}`, which {beside}"


def _as_told(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as transformers gives it to templates: without keys that are null, which many templates would spell
    as "None", and with its reasoning under the names that templates read it by."""
    told = {key: value for key, value in message.items() if value is not None}
    reasoning = next((told[name] for name in _REASONING if name in told), None)
    if reasoning is None:
        return told
    return {"thinking": reasoning, **told, "reasoning_content": reasoning}

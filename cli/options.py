"""Options that several verbs share, as decorators that hand the verb one object for each group.

Knows names, types and helps. Ranges are checked where they are defined: `NodeConfig` and `comm.messages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from shoal.comm.messages import Generation, Sampling
from shoal.comm.sampling_limits import SAMPLING_LIMITS
from shoal.daemon.config import CLUSTER_WIRES, KvType, NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import Quant, Reference, ShardName
from shoal.daemon.sizes import parse_bytes

Callback = Callable[..., Any]
Decorator = Callable[[Callback], Callback]
Value = TypeVar("Value")


def _parsed(parse: Callable[[str], Value], text: str) -> Value:
    try:
        return parse(text)
    except DaemonError as error:
        raise click.BadParameter(f"{error.message}; {error.hint}.") from error


def size(text: str) -> int:
    """An amount of memory, 3GB or 512MiB, as an option's type."""
    return _parsed(parse_bytes, text)


def size_or_auto(text: str) -> int | None:
    """As `size`; None for "auto", the default."""
    return None if text.lower() == "auto" else size(text)


def stop_text(text: str) -> str:
    """A text that ends the answer, as an option's type."""
    if not text:
        raise click.BadParameter("an empty text would end every answer at once.")
    return text


class InputFile(click.Path):
    """A file that is to be read, as an option's type. One that is not there is no wrong usage."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not Path(value).exists():
            raise DaemonError("not_found", f"no such file: {value}")
        return super().convert(value, param, ctx)


def model_name(text: str) -> str:
    """A model, as an option's type."""
    if not text:
        raise click.BadParameter("an empty text names no model.")
    return text


def shard_name(text: str) -> ShardName:
    """One rank's part of a model, 2/3, as an option's type."""
    return _parsed(ShardName.parse, text)


class _Ranged:
    """A number whose range is said in words, also to what is no number. `example`: what to write, where that is more
    than a number."""

    name: str
    min: Any
    max: Any
    min_open: bool
    example = ""

    def _describe_range(self) -> str:
        """Of click's, for its help."""
        assert self.min is not None
        low = f"{self.min:,.15g}"
        if self.max is None:
            return f"at least {low}"
        high = f"{self.max:,.15g}"
        return f"above {low} and at most {high}" if self.min_open else f"from {low} to {high}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = super().convert(value, param, ctx)  # type: ignore[misc]
        except click.BadParameter:
            found = math.nan
        if math.isnan(found):
            write = f"; write {self.example}" if self.example else ""
            said = f"{value!r:.40}: must be a {self.name}, {self._describe_range()}{write}"
            raise click.BadParameter(said, ctx, param)
        return found


class Whole(_Ranged, click.IntRange):
    name = "whole number"


class Real(_Ranged, click.FloatRange):
    name = "number"


def _sampling(name: str) -> Whole | Real:
    """The type of an option that is the sampling field `name`."""
    limit = SAMPLING_LIMITS[name]
    if limit.whole:  # its highest value would only puzzle readers of --help; the request is checked for it
        return Whole(min=int(limit.low))
    return Real(limit.low, limit.high, min_open=limit.above)


@dataclass(frozen=True)
class PlanOptions:
    """Options that shape the plan. A verb that is given one beyond --ctx and --ranks runs in its own process."""

    memory: int | None = None
    threads: int | None = None
    ctx: int | None = None
    device: str | None = None
    speculate: str | None = None
    kv_type: str | None = None
    cluster_wire: str | None = None
    ranks: int | None = None

    @property
    def beyond_context(self) -> bool:
        """Whether any is given beside --ctx and --ranks, which a daemon takes."""
        others = (field.name for field in fields(self) if field.name not in ("ctx", "ranks"))
        return any(getattr(self, name) is not None for name in others)

    def config(self, **more: Any) -> NodeConfig:
        """Raises DaemonError `bad_request`."""
        if self.device is not None:
            more["device"] = self.device
        if self.speculate == "off":
            more["max_guesses"] = 0
        if self.kv_type is not None:
            more["kv_type"] = self.kv_type
        if self.cluster_wire is not None:
            more["cluster_wire"] = self.cluster_wire
        return NodeConfig(
            threads=self.threads, memory_bytes=self.memory, context_tokens=self.ctx, ranks=self.ranks, **more
        )

    def arguments(self) -> list[str]:
        """The same options for a command line."""
        pairs = (("--" + field.name.replace("_", "-"), getattr(self, field.name)) for field in fields(self))
        return [part for name, value in pairs if value is not None for part in (name, str(value))]


@dataclass(frozen=True)
class AnswerOptions:
    """Options that shape an answer. None = the model's own default."""

    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    priority: int = 0
    deadline: float | None = None
    keep_repeating: bool = False

    def request_fields(self, model: str) -> dict[str, Any]:
        """The fields that `generate` and `chat` share. Raises DaemonError `bad_request`."""
        asked = {name: getattr(self, name) for name in ("seed", "temperature", "top_k", "top_p", "min_p")}
        asked["repetition_penalty"] = self.repeat_penalty
        request = {
            "model": model,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "priority": self.priority,
            "deadline_s": self.deadline,
            "stop_repeating": not self.keep_repeating,
        }
        try:
            sampling = Sampling(**{name: value for name, value in asked.items() if value is not None})
            checked = msgspec.convert(request, Generation)
        except ValueError as error:  # msgspec's are, too
            raise DaemonError("bad_request", f"an option is out of range: {error}") from error
        return {"sampling": sampling} | {name: getattr(checked, name) for name in request}


def _collect(kind: type, argument: str, options: list[Decorator]) -> Decorator:
    """A decorator that adds `options`. The verb gets their values as one `kind`, in its parameter `argument`."""
    names = [field.name for field in fields(kind)]

    def decorate(function: Callback) -> Callback:
        @wraps(function)
        def collected(**values: Any) -> Any:
            values[argument] = kind(**{name: values.pop(name) for name in names})
            return function(**values)

        wrapped: Callback = collected
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def plan_options(function: Callback) -> Callback:
    """Adds --memory, --threads, --ctx, --device, --speculate, --kv-type, --cluster-wire and --ranks; the verb gets
    `plan: PlanOptions`."""
    options: list[Decorator] = [
        click.option("--memory", type=size_or_auto, metavar="SIZE",
                     help="Use at most this much memory, e.g. 3GB; what does not fit is streamed from disk. auto, the "
                          "default, leaves the machine usable."),
        click.option("--threads", type=Whole(min=1), metavar="N", help="CPU threads (default: all)."),
        click.option("--ctx", type=Whole(1, 1 << 26), metavar="N",
                     help="Context length in tokens, at most what the model's files say."),
        click.option("--device", metavar="NAME",
                     help="What computes as much of the model as fits there, experts last: cpu, cuda:0, cuda:0,16GB "
                          "(no more of its memory), or sim:1GB, a device that the CPU plays. auto, the default, is "
                          "the first card, where that is predicted to be faster."),
        click.option("--speculate", type=click.Choice(["auto", "off"]),
                     help="Guess tokens ahead where that is faster (the default); the answer stays the same."),
        click.option("--kv-type", type=click.Choice(get_args(KvType)),
                     help="Type of the KV cache: f16 is the default, i8 takes about half as much memory."),
        click.option("--cluster-wire", type=click.Choice(CLUSTER_WIRES),
                     help="What sums may be rounded to between machines where that is faster: f32, the default, is "
                          "exact; bf16 and int8 change answers a little."),
        click.option("--ranks", type=Whole(1, 256), metavar="N",
                     help="So many machines of the cluster compute it together, for all who use it, until shoal unload "
                          "(default: as many as make it faster)."),
    ]  # fmt: skip
    return _collect(PlanOptions, "plan", options)(function)


def answer_options(function: Callback) -> Callback:
    """Adds the sampling options and those that end or hasten an answer; the verb gets `answer: AnswerOptions`."""
    options: list[Decorator] = [
        click.option("--max-tokens", type=Whole(1, 1 << 26), metavar="N",
                     help="End the answer after this many tokens."),
        click.option("--stop", multiple=True, type=stop_text, metavar="TEXT",
                     help="End the answer at this text; repeatable."),
        click.option("--keep-repeating", is_flag=True,
                     help="Let an answer go on that only repeats itself, instead of ending it."),
        click.option("--deadline", type=Real(0, 1e6, min_open=True), metavar="SECONDS",
                     help="End the answer after this time, complete or not."),
        click.option("--priority", type=Whole(-100, 100), default=0, metavar="N",
                     help="Requests with a higher priority go first (default 0)."),
        click.option("--seed", type=_sampling("seed"), metavar="N", help="The same seed gives the same answer."),
        click.option("--temperature", type=_sampling("temperature"), metavar="X",
                     help="How freely tokens are chosen; 0 always takes the likeliest."),
        click.option("--top-k", type=_sampling("top_k"), metavar="K",
                     help="Choose among the K likeliest tokens; 0 = all."),
        click.option("--top-p", type=_sampling("top_p"), metavar="P",
                     help="Choose among the likeliest tokens that together reach probability P."),
        click.option("--min-p", type=_sampling("min_p"), metavar="P",
                     help="Drop tokens less likely than P times the likeliest."),
        click.option("--repeat-penalty", type=_sampling("repetition_penalty"), metavar="X",
                     help="Above 1 discourages repetition."),
    ]  # fmt: skip
    return _collect(AnswerOptions, "answer", options)(function)


def quant_option(function: Callback) -> Callback:
    """Adds --quant, which becomes part of the model's name: the verb gets `model` as it is known everywhere."""

    @wraps(function)
    def named(*, model: str | None, quant: Quant | None, **values: Any) -> Any:
        if quant is not None:
            if model is None:
                raise click.UsageError("--quant needs a MODEL")
            if Reference.parse(model).quant not in ("keep", quant):
                raise click.UsageError(f"--quant {quant} contradicts the name {model}")
            model = str(Reference.parse(model)._replace(quant=quant))
        return function(model=model, **values)

    return click.option(
        "--quant",
        type=click.Choice(get_args(Quant)),
        help="Reduce weights to at most 8 or 4 bits; keep, the default, leaves them as they are. "
        "MODEL:q8 and MODEL:q4 mean the same.",
    )(named)


def draft_option(function: Callback) -> Callback:
    """Adds --draft; the verb gets `draft: str | None`."""
    return click.option(
        "--draft",
        type=model_name,
        metavar="MODEL",
        help="A smaller model with the same vocabulary that guesses tokens ahead; the answer stays the same.",
    )(function)


def json_option(function: Callback) -> Callback:
    """Adds --json; the verb gets `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def examples(*lines: str) -> str:
    """An epilog that shows command lines as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)

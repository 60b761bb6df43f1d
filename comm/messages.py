"""The messages of protocol `shoal/1`, as msgspec structs. docs/api.md describes them for other languages.

Knows fields, types and ranges (those of sampling are in `sampling_limits`). Does not know sockets, frames, models or
texts. Unknown fields are ignored, so that either side may be newer; a missing field takes its default.
The constructors check Sampling, and rules about several fields together, and raise ValueError.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import force_setattr

from .chat_message import ChatMessage as ChatMessage
from .chat_message import ChatMessages, checked
from .cluster_messages import Forget, Invitation, Invite, LinksReply, MeasureLinks, Nodes, NodesReply, Rejoin
from .message import Message as Message
from .message import Name, NonNegative
from .plain_values import check_plain
from .sampling_limits import MAX_BIASES, TOKEN_IDS, check_sampling
from .sampling_limits import SAMPLING_LIMITS as LIMITS

PROTOCOL_VERSION = 1

TokenId = Annotated[int, TOKEN_IDS.meta]
TokenIds = Annotated[list[TokenId], Meta(max_length=1 << 22)]

ErrorCode = Literal[
    "bad_request",  # malformed or out of range; the message names field, value and limit
    "unknown_type",  # no such message type in this version
    "version",  # no common protocol version
    "not_found",  # no such model (or file)
    "corrupt",  # the checkpoint's bytes contradict themselves
    "unsupported",  # an architecture, tensor type or feature this version does not know
    "context_overflow",  # prompt (and max_tokens) exceed the context
    "resources",  # would not fit into memory
    "busy",  # queue full: try again after retry_after_s
    "cancelled",
    "unloaded",  # the model was unloaded while the request ran
    "shutting_down",
    "internal",  # a bug or a failing device; the daemon's log has more
]

FinishReason = Literal["stop", "length", "cancelled", "deadline", "repetition"]


def check_one_of(message: Message, *names: str) -> None:
    """ValueError unless exactly one of the fields `names` is given."""
    given = [name for name in names if getattr(message, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"{names[0]}: exactly one of {', '.join(names)} must be given, not {found}")


# --- requests -----------------------------------------------------------------------------------------


class Hello(Message):
    """The first message of a client. It is optional, but no other reply tells limits and features."""

    min_version: NonNegative = PROTOCOL_VERSION
    max_version: NonNegative = PROTOCOL_VERSION
    client: Name = ""


class Sampling(Message):
    """How the next token is chosen. An absent field takes the model's default: what its makers advise, else Shoal's.

    ValueError, naming field, value and limit, when a value is beyond `sampling_limits`.
    """

    temperature: Annotated[float, LIMITS["temperature"].meta] | None = None
    top_k: Annotated[int, LIMITS["top_k"].meta] | None = None  # 0 = off
    top_p: Annotated[float, LIMITS["top_p"].meta] | None = None
    min_p: Annotated[float, LIMITS["min_p"].meta] | None = None
    repetition_penalty: Annotated[float, LIMITS["repetition_penalty"].meta] | None = None
    presence_penalty: Annotated[float, LIMITS["presence_penalty"].meta] | None = None
    frequency_penalty: Annotated[float, LIMITS["frequency_penalty"].meta] | None = None
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, LIMITS["logit_bias"].meta]], Meta(max_length=MAX_BIASES)
    ] = {}
    seed: Annotated[int, LIMITS["seed"].meta] | None = None
    # None = off; n = also those of the n most likely tokens
    logprobs: Annotated[int, LIMITS["logprobs"].meta] | None = None

    def __post_init__(self) -> None:
        for name, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            if (value := getattr(self, name)) is not default:
                check_sampling(name, value)


class Generation(Message):
    """Fields shared by `generate` and `chat`."""

    model: Name = ""  # "" = the one that is loaded
    sampling: Sampling = Sampling()
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 26)] | None = None  # None = up to the context's end
    context_tokens: Annotated[int, Meta(ge=1, le=1 << 26)] | None = None  # None = the model's
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(max_length=64)] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] = []
    ignore_eos: bool = False
    stop_repeating: bool = False  # end an answer that only repeats itself
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0  # higher goes first
    deadline_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None  # after arrival; None = no deadline
    progress: bool = False  # send `stage` while nothing else comes


class Generate(Generation):
    """Continue a prompt given as text or as token ids (exactly one of the two)."""

    prompt: str | None = None
    prompt_tokens: TokenIds | None = None

    def __post_init__(self) -> None:
        check_one_of(self, "prompt", "prompt_tokens")


class Chat(Generation, kw_only=True):
    """Answer a conversation; the model's chat template turns it into a prompt."""

    messages: ChatMessages
    tools: Annotated[list[dict[str, Any]], Meta(max_length=256)] = []
    template_args: dict[str, Any] = {}  # extra template variables, e.g. enable_thinking

    def __post_init__(self) -> None:
        force_setattr(self, "messages", checked(self.messages))
        check_plain(self.tools, "tools")
        check_plain(self.template_args, "template_args")


class Tokenize(Message):
    """Text → ids, or (when `tokens` is given) ids → text, or messages → ids by the chat template."""

    model: Name = ""
    text: str | None = None
    tokens: TokenIds | None = None
    messages: ChatMessages | None = None
    add_special: bool = True
    parse_special: bool = True

    def __post_init__(self) -> None:
        check_one_of(self, "text", "tokens", "messages")
        if self.messages is not None:
            force_setattr(self, "messages", checked(self.messages))


class Cancel(Message):
    """Cancel the request of this client whose id is `target` (hex of its request id). Idempotent."""

    target: Annotated[str, Meta(max_length=128)]


class Load(Message):
    """Load a model: a path on the daemon's machine or a name in its store."""

    model: Annotated[str, Meta(min_length=1, max_length=4096)]
    context: Annotated[int, Meta(ge=1, le=1 << 26)] | None = None  # a loaded model is loaded anew with it
    least_context: Annotated[int, Meta(ge=1, le=1 << 26)] | None = None  # a loaded model stays as it is
    draft: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None  # a model that guesses ahead
    ranks: Annotated[int, Meta(ge=1, le=256)] | None = None  # how many machines compute it together
    progress: bool = False  # send `stage` meanwhile
    keep: bool = False  # a model that would have to be loaded anew stays as it is, and this is refused

    def __post_init__(self) -> None:
        if self.context is not None and self.least_context is not None:
            raise ValueError("least_context: give this or context, not both")


class Unload(Message):
    model: Name = ""


class Status(Message):
    """Ask what runs here."""


class Ping(Message):
    pass


# --- replies ------------------------------------------------------------------------------------------


class Welcome(Message):
    version: int
    server: str
    features: list[str]
    limits: dict[str, int]  # message_bytes, requests, requests_per_client, clients


class Accepted(Message):
    """The request is valid and queued. `prompt_tokens` counts the prompt after templating."""

    model: str
    prompt_tokens: int


class Waiting(Message):
    """Still queued or computing. Sent after each `keepalive` of silence, for every request but control messages."""

    seconds: float  # since the request arrived


class Stage(Message):
    """What a request waits for. Sent each second of silence instead of `waiting`, if `progress` was asked for.

    `done` and `total` count bytes; tokens of a `prompt`; blocks of the step while weights are read for it (`reading`).
    While it is `queued` they are its place and how many wait.
    """

    doing: str  # packing, loading, queued, prompt, reading
    done: int
    total: int
    bytes_per_s: float = 0.0
    tokens_per_s: float = 0.0
    seconds: float = 0.0  # since the request arrived


class TokenLogprob(Message):
    id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]] = []
    token_bytes: bytes | None = None  # where they are no UTF-8, so that `text` has U+FFFD
    top_bytes: list[bytes | None] = []  # of each in `top`; [] if none has any


class Token(Message):
    """One or more tokens of the answer. `text` is empty while half a character is held back."""

    text: str
    ids: list[int]
    logprobs: list[TokenLogprob] = []


class Usage(Message):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    drafted_tokens: int = 0  # guessed ahead of the answer
    accepted_tokens: int = 0  # guesses that were right


class Timings(Message):
    """Seconds. `ttft_s` is counted from the request's arrival, decode from the second token on."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stall_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    preemptions: int = 0  # how often the request had to make room for others


class Done(Message):
    """Terminal: the answer is complete."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    context_tokens: int = 0  # the request's, or else the model's, so that a client can show how much is left


StreamEvent = Accepted | Stage | Token | Done
"""What a stream of an answer yields; its `error` is raised."""


class Error(Message):
    """Terminal: the request failed."""

    code: str
    message: str
    hint: str = ""
    retry_after_s: float = 0.0


class Tokens(Message):
    ids: list[int]
    text: str


class Ok(Message):
    """Terminal: the answer to requests that return nothing (cancel, unload)."""


class ModelStatus(Message):
    name: str
    path: str
    family: str
    parameters_bytes: int
    context_tokens: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_total_tokens: int
    plan: str
    kv_cached_tokens: int = 0  # in no request's use, kept for prompts that begin alike
    prompt_tokens_total: int = 0  # of all prompts so far
    cached_tokens_total: int = 0  # prompt tokens found in the prefix cache
    preemptions_total: int = 0
    drafted_tokens_total: int = 0  # guessed ahead of answers
    accepted_tokens_total: int = 0  # guesses that were right
    chat_template: bool = True
    quant: str = "keep"  # the weights' format: keep = as in the model's files, or q8 or q4
    pinned_bytes: int = 0  # weights that stay in memory
    streamed_bytes: int = 0  # weights read from disk for a step of one token
    window_bytes: int = 0  # memory that streamed weights pass through
    stage: Stage | None = None  # progress of a step that waits for the disk now
    step_s: float = 0.0  # predicted disk time for a step of one token; 0 = nothing streams
    kv_disk_bytes: int = 0  # size of the KV pages kept on disk
    kv_disk_pages_read_total: int = 0  # pages read back instead of computed
    kv_disk_pages_written_total: int = 0
    warnings: list[str] = []  # what is odd about its files, one line each
    context_limit_tokens: int = 0  # what it was made for
    ranks: int = 1  # machines that compute it together
    rank_bytes: list[int] = []  # what each of them holds: weights, KV and scratch
    machines: list[str] = []  # names of the others, by rank
    machines_why: str = ""  # why these, if there are others
    sums: str = ""  # how they add their partials
    kv_disk_why: str = ""  # why no KV is kept on disk, though it was to be
    predicted_tokens_per_s: float = 0.0  # of one answer of usual length; 0 = not known
    predicted_band: list[float] = []  # the two between which it should lie
    measured_tokens_per_s: float = 0.0  # what steps of one token take now; 0 = there were none yet
    device: str = ""  # that computes blocks besides the CPU
    device_bytes: int = 0  # what it holds there: weights, KV and scratch
    device_why: str = ""  # it computes, or none does, where that was a choice
    tried: str = ""  # what came of trying the plan's runner-up, if it was


class Loaded(Message):
    model: ModelStatus
    seconds: float


class StatusReply(Message):
    version: str
    pid: int
    uptime_s: float
    threads: int
    memory_bytes: int  # resident now
    models: list[ModelStatus]
    requests_total: int
    tokens_total: int
    loading: str = ""  # the model that is being loaded, if any
    stage: Stage | None = None  # how far loading is
    draining: bool = False
    peak_memory_bytes: int = 0  # the largest resident set since the start
    # How many times longer than its profile says parts of steps take here: ½ to 2.
    corrections: dict[str, float] = {}


class Pong(Message):
    time_s: float


REQUESTS: dict[str, type[Message]] = {
    "hello": Hello,
    "generate": Generate,
    "chat": Chat,
    "tokenize": Tokenize,
    "cancel": Cancel,
    "load": Load,
    "unload": Unload,
    "status": Status,
    "ping": Ping,
    "invite": Invite,
    "nodes": Nodes,
    "measure_links": MeasureLinks,
    "forget": Forget,
    "rejoin": Rejoin,
}

REPLIES: dict[str, type[Message]] = {
    "welcome": Welcome,
    "accepted": Accepted,
    "waiting": Waiting,
    "stage": Stage,
    "token": Token,
    "done": Done,
    "error": Error,
    "tokens": Tokens,
    "ok": Ok,
    "loaded": Loaded,
    "status": StatusReply,
    "pong": Pong,
    "invitation": Invitation,
    "nodes_reply": NodesReply,
    "links_reply": LinksReply,
}

FEATURES = (*REQUESTS, "progress", "context_tokens", "stop_repeating")
"""What a daemon tells clients that it can do: request types, and fields that older daemons ignore."""

TYPE_NAMES = {kind: name for table in (REQUESTS, REPLIES) for name, kind in table.items()}

STREAMING = frozenset({"accepted", "waiting", "stage", "token"})
"""All other replies are terminal, and a request gets exactly one terminal reply."""

"""Errors of the models room: what can be wrong with a user's files, texts and settings.

    ModelError
    ├── CheckpointError            the files that hold the weights
    │   ├── MissingCheckpoint          all or some of them are absent
    │   ├── CorruptCheckpoint          tensors that are missing, sizes, offsets or types that contradict each other
    │   └── UnsupportedCheckpoint      well formed, but of a kind that Shoal does not compute
    ├── TokenizerError             the vocabulary or the rules that cut text into tokens
    ├── TemplateError              a chat template that cannot be read, or fails
    │   ├── TemplateRefusal            a conversation that it refuses
    │   └── TemplateTooCostly          it takes more time or memory than a template gets
    ├── TextTooLarge               a text that cannot be tokenised in the time and memory that one text gets
    │   └── TooManyTokens              it has far more tokens than are wanted
    ├── Overloaded                 more work of one kind than is done at a time; worth trying again
    └── SamplingError              a setting that does not fit the model
        └── LogitsError                logits that no token can be chosen from, because the weights are unusable

Every message is one line: what, which value, which limit, what to do. Errors of libraries (`tokenizers`,
`jinja2`, JSON, the file system) are translated into these once, where they enter the room.
"""


class ModelError(Exception):
    """Anything that this room can refuse."""


class CheckpointError(ModelError):
    """The files that hold a model's weights and facts are unusable."""


class MissingCheckpoint(CheckpointError):
    """There is no checkpoint at the path, or a file that it refers to is absent."""


class CorruptCheckpoint(CheckpointError):
    """The checkpoint contradicts itself: truncated, overlapping, lacking tensors, of wrong sizes or types."""


class UnsupportedCheckpoint(CheckpointError):
    """The checkpoint is well formed but needs something that Shoal does not have."""


class TokenizerError(ModelError):
    """The tokenizer files are missing, contradict themselves or ask for something unsupported."""


class TemplateError(ModelError):
    """The chat template is malformed, runs past its limits, or refuses the conversation."""


class TemplateRefusal(TemplateError):
    """The chat template is sound and refuses this conversation, in its own words."""


class TemplateTooCostly(TemplateError):
    """The chat template takes more time or memory than one gets, and was stopped."""


class TextTooLarge(ModelError):
    """A text cannot be tokenised in the time and memory that one text gets."""


class TooManyTokens(TextTooLarge):
    """A text has far more tokens than are wanted. least: it has so many at least."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the text has at least {least} tokens")
        self.least = least


class Overloaded(ModelError):
    """More work of one kind is wanted than is done at a time; it is worth trying again."""


class SamplingError(ModelError, ValueError):
    """Logits that the request has masked, a token id outside the vocabulary, a stop string that cannot be used."""


class LogitsError(SamplingError):
    """The model's own logits are no numbers, so that no token can be chosen from them, whatever was asked for."""


def one_line(error: object, limit_chars: int = 200) -> str:
    """What another library's error says, as a part of one of our messages."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit_chars]

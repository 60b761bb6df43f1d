"""The chat's commands: /model, /system, /ctx, /save, /load, /retry, /stats, /help, /clear, /exit.

Knows what each changes. Does not know keys, nor how an answer is made: /retry only returns the question.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from shoal.cli.answers import reference
from shoal.cli.run import statistics
from shoal.cli.terminal.output import note
from shoal.cli.wording import nearest
from shoal.comm.home import Home
from shoal.comm.messages import Done, ErrorCode
from shoal.daemon.errors import NO_ROOM, DaemonError
from shoal.daemon.library.library import Library, check_name
from shoal.daemon.private_files import private_dir
from shoal.partition.amounts import counted

from .conversation import Conversation
from .link import ChatLink

_ENDING = ".json"  # of the files of conversations: their names are without it


@dataclass
class ChatState:
    """The state that the commands and the loop share."""

    home: Home
    link: ChatLink
    conversation: Conversation
    last: Done | None = None
    used_tokens: int = 0
    answers_total: int = 0
    tokens_total: int = 0
    leaving: bool = False
    known: set[str] = field(default_factory=set)  # saved conversations that this one was saved as, or is
    library: Library = field(init=False)

    def __post_init__(self) -> None:
        self.library = Library(self.home)


class Command(NamedTuple):
    usage: str
    help: str
    act: Callable[[ChatState, str], str | None]
    choices: Callable[[ChatState], list[str]] = lambda state: []  # of its argument


def is_command(line: str) -> bool:
    """Whether a typed line is a command: its first word is one, or is meant to be one. A path such as /etc/hosts is
    not, nor are words after a name that resembles no command."""
    name, *more = line.split(maxsplit=1)
    if not line.startswith("/") or "/" in name[1:]:
        return False
    return name in COMMANDS or not more or bool(meant(name))


def meant(name: str) -> str:
    """The command that somebody means who wrote `name`; "" when it is none."""
    return nearest(name, COMMANDS, _OTHER_NAMES)


def obey(state: ChatState, line: str) -> str | None:
    """Carry out a command. Returns a question that the model is to be asked now, if there is one.

    Raises DaemonError or CommError.
    """
    name, *more = line.split(maxsplit=1)
    command = COMMANDS.get(name)
    if command is None:
        hint = f"did you mean {near}? " if (near := meant(name)) else ""
        raise DaemonError(
            "bad_request",
            f"there is no command {name}",
            f"{hint}/help lists them; a space before it makes it text",
        )
    if more and command.usage == name:
        raise DaemonError("bad_request", f"{name} takes no more words", "a space before it makes it text")
    return command.act(state, more[0].strip() if more else "")


def completions(state: ChatState, text: str) -> Iterator[str]:
    """Commands that begin with `text`, or arguments of the command it names."""
    name, space, _ = text.partition(" ")
    if not space:
        yield from (command for command in COMMANDS if command.startswith(text))
    elif name in COMMANDS:
        found = (f"{name} {choice}" for choice in COMMANDS[name].choices(state))
        yield from (line for line in found if line.startswith(text))


def _recount(state: ChatState) -> None:
    """How much of the context the turns take, before the next question."""
    turns = state.conversation.turns
    state.used_tokens = state.link.count(state.conversation.so_far()) if turns else 0


def _model(state: ChatState, argument: str) -> None:
    if not argument:
        used, names = state.link.model.name, _models(state)
        for name in names if used in names else [*names, used]:
            note(f"{'*' if name == used else ' '} {name}")
        note("/model NAME switches to another")
        return
    model = state.link.load(reference(argument, state.library), None)
    _recount(state)
    note(f"{model.name} answers from now on, with a context of {model.context_tokens} tokens")


def _system(state: ChatState, argument: str) -> None:
    if argument:
        state.conversation.system = "" if argument == "off" else argument
        _recount(state)
    more = "" if argument else "; /system TEXT sets it, off clears"
    note(f"system: {state.conversation.system or '(none)'}{more}")


def _ctx(state: ChatState, argument: str) -> None:
    link = state.link
    if not argument:
        held = f"; {link.model.name} holds {link.model.context_tokens}" if link.context else ""
        note(
            f"this conversation has a context of {link.context_tokens} tokens, {state.used_tokens} in use; "
            f"/ctx N changes it{held}"
        )
        return
    if not (argument.isascii() and argument.isdecimal() and len(argument) <= 12 and int(argument)):
        most = link.model.context_tokens
        raise DaemonError(
            "bad_request", f"/ctx {argument[:40]}: must be a number of tokens, from 1 to {most}"
        )
    link.limit(int(argument))
    note(f"this conversation has a context of {link.context_tokens} tokens from now on")


def save(state: ChatState, name: str) -> bool:
    """Save the conversation; returns whether another one of that name was there, which is `NAME.older` then.

    One that this chat has saved or loaded is the same one, and is written over. Raises DaemonError.
    """
    path = _session(state, name)
    private_dir(state.home.root)
    private_dir(state.home.sessions)
    part = path.with_name(f".{path.name}.part")
    another = path.is_file() and name not in state.known
    try:
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(state.conversation.to_json(state.link.model.name))
            if another:
                path.replace(_session(state, f"{name}.older"))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        code: ErrorCode = "resources" if error.errno in NO_ROOM else "internal"
        reason = f"not saved: {path}: {error.strerror}"
        raise DaemonError(code, reason, "the conversation goes on; mend that, then /save again") from error
    state.known.add(name)
    return another


def _save(state: ChatState, argument: str) -> None:
    name = check_name(argument or "last").removesuffix(_ENDING)
    older = f"; the one before is {name}.older now" if save(state, name) else ""
    note(f"saved as {name}; /load {name} brings it back{older}")


def _load(state: ChatState, argument: str) -> None:
    if not argument:
        names = ", ".join(_sessions(state))
        note(f"saved: {names}" if names else "nothing is saved yet; /save NAME saves this conversation")
        return
    if not _session(state, check_name(argument)).exists():
        argument = argument.removesuffix(_ENDING)
    path = _session(state, argument)
    try:
        if path.exists() and not path.is_file():
            raise DaemonError("corrupt", f"{path} is not a file", "/load lists what is saved")
        model = state.conversation.load_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DaemonError("not_found", f"no saved conversation {argument}", "/load lists them") from error
    except OSError as error:
        raise DaemonError("internal", f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DaemonError("corrupt", f"{path} is not a saved conversation: {error}") from error
    state.last, state.known = None, {argument}
    _recount(state)
    other = f"; it was held with {model}" if model != state.link.model.name else ""
    note(f"loaded {argument}, {counted(len(state.conversation.turns), 'turn')}{other}")


def _retry(state: ChatState, argument: str) -> str | None:
    asked = state.conversation.take_back()
    if not asked:
        raise DaemonError("bad_request", "nothing has been asked yet")
    return asked


def _stats(state: ChatState, argument: str) -> None:
    model, turns = state.link.model, counted(len(state.conversation.turns), "turn")
    if state.last:
        note(f"last answer: {statistics(state.last)}")
    note(f"{model.name}: {model.plan}")
    answers = counted(state.answers_total, "answer")
    note(f"this conversation: {turns}; this chat: {answers} of {counted(state.tokens_total, 'token')}")


def _help(state: ChatState, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        note(f"{command.usage.ljust(width)}  {command.help}")
    note('For several lines: Alt-Enter, a backslash at the end, or """ … """. Ctrl-C stops an answer.')


def _clear(state: ChatState, argument: str) -> None:
    state.conversation.clear()
    state.known.clear()
    state.last = None
    _recount(state)
    note("a new conversation; the old one is forgotten")


def _exit(state: ChatState, argument: str) -> None:
    state.leaving = True


def _models(state: ChatState) -> list[str]:
    return [entry.name for entry in state.library.list()]


def _sessions(state: ChatState) -> list[str]:
    return sorted(path.stem for path in state.home.sessions.glob(f"[!.]*{_ENDING}"))


def _session(state: ChatState, name: str) -> Path:
    return state.home.sessions / f"{name}{_ENDING}"


COMMANDS = {
    "/model": Command("/model [NAME]", "list the models, or switch to another", _model, _models),
    "/system": Command("/system [TEXT]", "show or set the system message; off clears it", _system),
    "/ctx": Command("/ctx [N]", "show this conversation's context, or set it to N tokens", _ctx),
    "/save": Command("/save [NAME]", "save the conversation", _save, _sessions),
    "/load": Command("/load [NAME]", "list saved conversations, or continue one", _load, _sessions),
    "/retry": Command("/retry", "ask the last question again", _retry),
    "/stats": Command("/stats", "show speed, plan and totals", _stats),
    "/clear": Command("/clear", "start a new conversation", _clear),
    "/help": Command("/help", "show this", _help),
    "/exit": Command("/exit", "leave", _exit),
}
_OTHER_NAMES = {
    "/bye": "/exit",
    "/quit": "/exit",
    "/q": "/exit",
    "/new": "/clear",
    "/reset": "/clear",
    "/?": "/help",
}
"""What other programs call these commands."""

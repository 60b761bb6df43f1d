"""The command line's words for what lower rooms name as the API does (`daemon.errors` has the convention).

    `context_tokens=4096` or less       --ctx 4096 or less
    `remove(tiny)`, then …              shoal rm --yes tiny, then …

Knows which option or verb is meant, also by a name that somebody got wrong. Does not know errors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

WORDS = {
    # Fields of NodeConfig and of load
    "context_tokens": "--ctx",
    "device": "--device",
    "draft": "--draft",
    "kv_disk_bytes": "--kv-disk",
    "kv_type": "--kv-type",
    "max_queue": "--queue",
    "max_sequences": "--sequences",
    "models_only": "--models-only",
    "memory_bytes": "--memory",
    "quant": "--quant",
    "shard_disk_bytes": "--shard-disk",
    "threads": "--threads",
    "ranks": "--ranks",
    "cluster_wire": "--cluster-wire",
    # Of cluster init and join
    "listen": "--listen",
    "address": "--address",
    "nodes": "shoal cluster nodes",
    # Of plan
    "prompt_tokens": "--prompt-tokens",
    "new_tokens": "--new-tokens",
    # Arguments of perplexity and of pull
    "ctx": "--ctx",
    "link": "--link",
    "name": "--name",
    # What may be done with the store
    "pull": "shoal pull",
    "remove": "shoal rm --yes",
    # What may be done with a daemon
    "load": "shoal load",
}
NONE_WORDS = {"memory_bytes": "auto"}
ALIKE = 0.7  # of difflib's ratio

_NAMED = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]+)|\((?P<argument>[^`]+)\))?`")


def worded(text: str) -> str:
    """`text` with every setting that it names as the option that sets it. Names without an option stay as they are."""
    return _NAMED.sub(_said, text)


def _said(named: re.Match[str]) -> str:
    name, value = named["name"], named["value"] or named["argument"] or ""
    if name not in WORDS:
        return named[0]
    if value == "None":
        value = NONE_WORDS.get(name, value)
    return f"{WORDS[name]} {value}" if value else WORDS[name]


def nearest(written: str, names: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """The one of `names` that `written` is a slip of; "" when it resembles none. others: further names → which it is.

    Names differ by a character in length at most: of short ones, nearly every word has all letters.
    """
    word = written.lower().lstrip("/")
    known = {name.lstrip("/"): name for name in names} | {
        k.lstrip("/"): name for k, name in (others or {}).items()
    }
    near = [name for name in known if abs(len(name) - len(word)) <= 1]
    found = difflib.get_close_matches(word, near, n=1, cutoff=ALIKE)
    return known[found[0]] if found else ""

"""The command line's words for what lower rooms name as the API does (`daemon.errors` has the convention).

    `context_tokens=4096` or less       --ctx 4096 or less
    `remove(tiny)`, then …              shoal rm --yes tiny, then …

Knows which option or verb is meant. Does not know errors.
"""

from __future__ import annotations

import re

WORDS = {
    # Fields of NodeConfig and of load
    "context_tokens": "--ctx",
    "draft": "--draft",
    "kv_disk_bytes": "--kv-disk",
    "kv_type": "--kv-type",
    "max_queue": "--queue",
    "max_sequences": "--sequences",
    "models_only": "--models-only",
    "memory_bytes": "--memory",
    "quant": "--quant",
    "threads": "--threads",
    # Arguments of perplexity and of pull
    "ctx": "--ctx",
    "link": "--link",
    "name": "--name",
    # What may be done with the store
    "pull": "shoal pull",
    "remove": "shoal rm --yes",
}
NONE_WORDS = {"memory_bytes": "auto"}

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

"""`shoal pull`, `ls` and `rm`: the models in the local store.

Knows how they are listed and asked for. The store itself is `daemon.library`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shoal.comm.errors import HomeError
from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library import registry
from shoal.daemon.library.library import Library, StoredModel, fetchable, is_path
from shoal.daemon.library.pack_shelf import PackEntry, PackShelf
from shoal.daemon.model_name import Reference, misplaced_suffix
from shoal.partition.amounts import format_bytes

from .answers import reference
from .options import examples, json_option
from .terminal.output import confirmed, console, note, print_json, table, transfer_bar
from .terminal.paint import printable


@click.command(
    epilog=examples(
        f"shoal pull {registry.DEFAULT_MODEL}",
        "shoal pull Qwen/Qwen3-0.6B",
        "shoal pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M --name qwen",
        "shoal pull https://example.org/model.gguf#sha256=…",
        "shoal pull --link ~/models/mistral-7b.gguf",
    )
)
@click.argument("source")
@click.option("--name", metavar="NAME", help="Name in the store (default: made from SOURCE).")
@click.option("--link", is_flag=True, help="Hard-link a local file instead of copying it.")
@json_option
def pull(source: str, name: str | None, link: bool, as_json: bool) -> None:
    """Fetch a model into the local store.

    SOURCE is a name Shoal knows (smollm2), a Hugging Face repository (org/name, or org/name:QUANT for one of several
    GGUF files), the URL of a .gguf file, or a local file or directory. A download that was interrupted goes on
    where it stopped; hashes are checked wherever the source states them.
    """
    from shoal.daemon.library.pull import pull as fetch
    from shoal.daemon.loading.checkpoint_facts import checkpoint_facts

    with transfer_bar() as progress:
        entry, fetched = fetch(source, Library(Home.from_env()), name=name, link=link, progress=progress)
    if fetched:
        for warning in checkpoint_facts(entry.path)["warnings"]:
            note(warning)
    if as_json:
        print_json(_described(entry))
        return
    state = "is in the store" if fetched else "is in the store already"
    note(f"{entry.name} ({format_bytes(entry.size_bytes)}) {state}; try: shoal chat {entry.name}")


@click.command(epilog=examples("shoal ls", "shoal ls --json"))
@json_option
def ls(as_json: bool) -> None:
    """List the models in the store, and all packs."""
    home = Home.from_env()
    library, packs = Library(home), PackShelf(home).list()
    entries = library.list()
    if not home.root.exists() and (trouble := home.why_not_written()):
        raise HomeError(f"SHOAL_HOME={home.root}: {trouble}")
    if as_json:
        names = {entry.name for entry in entries}
        models = [_described(entry, packs) for entry in entries]
        print_json([*models, *(described_pack(pack) for pack in packs if pack.model not in names)])
        return
    if not entries:
        note(f"the store is empty; try: shoal pull {registry.DEFAULT_MODEL}")
    else:
        rows = table("name", "kind", "size", "added", "source", right=("size",))
        for entry in entries:
            kind, added, source = entry.manifest.kind, entry.manifest.added, entry.manifest.source
            rows.add_row(entry.name, kind, format_bytes(entry.size_bytes), added[:10], printable(source))
        console().print(rows)
    if packs:
        if entries:
            console().print()
        rows = table("pack of", "quant", "shard", "size", "state", right=("size",))
        for pack in packs:
            name = printable(pack.model) or pack.directory.name
            rows.add_row(name, pack.quant, pack.shard, format_bytes(pack.size_bytes), pack.state)
        console().print(rows)
    for name in library.damaged():
        note(f"{name} is damaged: shoal rm --yes {name}, then shoal pull it again")


@click.command(epilog=examples("shoal rm smollm2", "shoal rm --yes smollm2", "shoal rm --packs ./model.gguf"))
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--packs", "only_packs", is_flag=True, help="Remove only its packs; NAME may be a path.")
def rm(name: str, yes: bool, only_packs: bool) -> None:
    """Remove the model NAME and its packs from the store. A daemon that has it loaded keeps using it."""
    home = Home.from_env()
    library, shelf = Library(home), PackShelf(home)
    if only_packs:  # they can be made again, so nobody is asked
        model = str(Path(name).expanduser().absolute()) if is_path(name) else registry.canonical(name)
        if not shelf.of(model):
            hint = misplaced_suffix(name, library.known_names()) or "see shoal ls"
            raise DaemonError("not_found", f"there are no packs of {model}", hint)
        note(f"removed the packs of {model} ({format_bytes(shelf.remove(model))})")
        return
    name = registry.canonical(name)
    if name not in library.damaged():
        entry = library.entry(name)
        if not yes:
            size_bytes = entry.size_bytes + sum(pack.size_bytes for pack in shelf.of(name))
            _ask(f"Remove {entry.name} ({format_bytes(size_bytes)})?")
    shelf.remove(name)  # first: while one is being made, both stay
    library.remove(name)
    note(f"removed {name}")


def reference_or_fetch(model: str, library: Library) -> str:
    """As `reference`; at a terminal the user is asked whether a known model that is not there yet is to be fetched."""
    try:
        return reference(model, library)
    except DaemonError as error:
        wanted = Reference.parse(model)
        if error.code != "not_found" or not fetchable(wanted.model) or not asks():
            raise
        known = registry.find(wanted.model)
        size = f" ({format_bytes(known.member_bytes)})" if known else ""
        note(f"{wanted.model} is not in the store yet")
        if not confirmed(f"Fetch {wanted.model}{size} now?", default=True):
            raise
    from shoal.daemon.library.pull import pull as fetch

    with transfer_bar() as progress:
        entry, _ = fetch(wanted.model, library, progress=progress)
    return str(wanted._replace(model=entry.name))


def asks() -> bool:
    """Whether there is somebody at a terminal who can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _described(entry: StoredModel, packs: Sequence[PackEntry] = ()) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "name": entry.name,
        "kind": manifest.kind,
        "bytes": entry.size_bytes,
        "path": str(entry.path),
        "source": manifest.source,
        "added": manifest.added,
        "packs": [described_pack(pack) for pack in packs if pack.model == entry.name],
    }


def described_pack(pack: PackEntry) -> dict[str, Any]:
    """A pack as JSON shows it."""
    return {
        "name": pack.model,
        "kind": "pack",
        "quant": pack.quant,
        "shard": pack.shard,
        "bytes": pack.size_bytes,
        "state": pack.state,
        "path": str(pack.directory),
    }


def _ask(question: str) -> None:
    """Returns on yes. Raises click.Abort on no, DaemonError when nobody can be asked."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise DaemonError("bad_request", "there is no terminal to ask on", "--yes removes without asking")
    if not confirmed(question, default=False):
        raise click.Abort

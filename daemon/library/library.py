"""The local model store: one directory per model, with a manifest.

    models/NAME/manifest.json + files      always complete
    models/.partial/NAME/                  being fetched; renamed to models/NAME when complete
    models/.locks/NAME                     held (flock) while NAME is fetched or removed

Knows names, manifests and how a model appears and disappears in one step. Does not know where models come
from (`pull`), nor what is inside their files.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.model_name import misplaced_suffix
from shoal.daemon.private_files import alone, private_dir
from shoal.daemon.progress import Progress, no_progress
from shoal.models.checkpoint.identity import FileStamp
from shoal.models.regular_files import read_regular
from shoal.offload.syncing import sync, sync_directory

from . import registry
from .transfer import disk_errors, hash_file

log = logging.getLogger(__name__)

MODEL_MANIFEST = "manifest.json"
MODEL_MANIFEST_BYTES = 16 << 20
NAME_RULE = "letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit"
_REMOTE = re.compile(r"https?://.*|[\w-][\w.-]*/[\w-][\w.-]*(?<!\.gguf)(:[\w.-]+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Kind = Literal["gguf", "hf"]


class ModelFile(Struct, frozen=True):
    """One file of a model; `name` is relative to its directory, with forward slashes."""

    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class ModelManifest(Struct, frozen=True):
    """What the store knows of a model. `added` is a UTC time in ISO 8601."""

    name: str
    kind: Kind
    files: Annotated[list[ModelFile], Meta(min_length=1, max_length=10_000)]
    source: str
    added: str


class StoredModel(Struct, frozen=True):
    """A model in the store."""

    directory: Path
    manifest: ModelManifest

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def path(self) -> Path:
        """The path for `open_checkpoint`: the (first) GGUF file, or the Hugging Face directory."""
        if self.manifest.kind == "hf":
            return self.directory
        return self.directory / min(file.name for file in self.manifest.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files)


def check_name(name: str) -> str:
    """`name`, if the store can keep a model under it. Raises DaemonError `bad_request`."""
    if not _NAME.fullmatch(name) or name.lower().endswith(".gguf"):
        raise DaemonError(
            "bad_request", f"{name[:140]!r} cannot be a name", f"use {NAME_RULE}, without .gguf"
        )
    return name


def is_path(model: str) -> bool:
    """Whether `model` is written as a path rather than as a name."""
    return os.sep in model or model.lower().endswith(".gguf") or model.startswith("~") or model in (".", "..")


def fetchable(model: str) -> bool:
    """Whether `pull` knows where to look for `model`: the built-in table has it, or it is written as an address."""
    return registry.find(model) is not None or _REMOTE.fullmatch(model) is not None


class Staging:
    """A model that is being fetched: put its files below `path`; then `commit` makes them a model of the store."""

    def __init__(self, name: str, source: str, path: Path, final: Path) -> None:
        self.name = name
        self.source = source
        self.path = path
        self._final = final

    def commit(self, kind: Kind, sha256: Mapping[str, str]) -> StoredModel:
        """The files in `sha256` (name below `path` → hash) become the model. Others are removed. Raises DaemonError."""
        with disk_errors(self.path, 0, self.name):
            files = [
                ModelFile(name, (self.path / name).stat().st_size, digest)
                for name, digest in sorted(sha256.items())
            ]
            added = datetime.now(UTC).isoformat(timespec="seconds")
            manifest = ModelManifest(self.name, kind, files, self.source, added)
            for path in self.path.rglob("*"):
                if path.is_file() and path.relative_to(self.path).as_posix() not in sha256:
                    path.unlink()
            with (self.path / MODEL_MANIFEST).open("wb") as out:
                out.write(msgspec.json.format(msgspec.json.encode(manifest)))
                sync(out)
            sync_directory(self.path)
            damaged = self.path.with_name(f"{self.name}~damaged")
            if self._final.exists():
                self._final.rename(damaged)
            self.path.rename(self._final)
            sync_directory(self._final.parent)
            shutil.rmtree(damaged, ignore_errors=True)
        return StoredModel(self._final, manifest)


class Library:
    """The models under one home. Several processes may use it at once."""

    def __init__(self, home: Home) -> None:
        self.root = home.models
        self._read_again: dict[Path, FileStamp] = {}  # files that were touched, and still are what was pulled

    # --- reading ----------------------------------------------------------------------------------------

    def resolve(self, model: str) -> Path:
        """The checkpoint's path for a path or a name. Raises DaemonError `not_found`."""
        if not is_path(model) and (found := self._find(registry.canonical(model))) is not None:
            self._require_unaltered(found)
            return found.path
        path = existing_path(model) if model else None
        if path is not None:
            return path
        if is_path(model):
            fetch = f"to fetch it: shoal pull {model[:300]}" if fetchable(model) else "see shoal ls"
            hint = misplaced_suffix(model) or fetch
            raise DaemonError("not_found", f"no such file or directory: {model[:300]}", hint)
        raise self._unknown(model)

    def resolve_stored(self, model: str) -> Path:
        """`resolve` for who may name only models of the store: nothing is told of other files, not even which exist.
        Raises DaemonError `not_found` or `corrupt`."""
        found = self._find(registry.canonical(model)) or next(
            (entry for entry in self.list() if str(entry.path) == model), None
        )
        if found is None:
            message = (
                f"{model[:140]!r} is no model of this daemon's store, and it loads no others (`models_only`)"
            )
            raise DaemonError("not_found", message, "`shoal ls` on its machine lists them")
        return found.path

    def entry(self, name: str) -> StoredModel:
        """The model of that name or alias. Raises DaemonError `not_found` or `corrupt`."""
        found = self._find(registry.canonical(name))
        if found is None:
            raise self._unknown(name)
        return found

    def list(self) -> tuple[StoredModel, ...]:
        """All models, by name; damaged ones are left out (see `damaged`)."""
        return tuple(entry for name in self._names() if (entry := self._read(name)) is not None)

    def damaged(self) -> tuple[str, ...]:
        """The names of models whose manifest cannot be used, or whose files are missing or of the wrong size."""
        return tuple(name for name in self._names() if self._read(name) is None)

    def known_names(self) -> tuple[str, ...]:
        """Names of the store and of the built-in table, in order."""
        return tuple(sorted({*self._names(), *(model.name for model in registry.MODELS)}))

    def verify(self, entry: StoredModel, progress: Progress = no_progress) -> tuple[str, ...]:
        """Read every byte again. Returns the names of the files that differ from the manifest. Raises OSError."""
        return tuple(
            file.name
            for file in entry.manifest.files
            if hash_file(entry.directory / file.name, progress, file.name) != file.sha256
        )

    # --- writing ----------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, source: str) -> Iterator[Staging]:
        """A directory to fetch `name` into, on the store's own disk. Only this process uses it.

        What an earlier attempt from the same `source` left there is kept, so that it can be continued. After an
        error the `.part` files stay, unless the disk is full. Raises DaemonError `busy`.
        """
        check_name(name)
        with self._lock(name):
            path = private_dir(self._internal(".partial") / name)
            with disk_errors(self.root, 0, name):
                self._claim(path, source)
            staging = Staging(name, source, path, self.root / name)
            try:
                yield staging
            except DaemonError as error:
                if error.code == "resources":
                    shutil.rmtree(path, ignore_errors=True)
                raise
            finally:
                if not any(path.rglob("*.part")):
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a model, complete or damaged, from the store. Raises DaemonError `not_found` or `busy`."""
        name = registry.canonical(name)
        if name not in self._names():
            raise self._unknown(name)
        with self._lock(name):
            trash = self._internal(".partial") / f"{name}~removed"
            with disk_errors(self.root, 0, name):
                shutil.rmtree(trash, ignore_errors=True)
                (self.root / name).rename(trash)
                shutil.rmtree(trash)

    # --- details ----------------------------------------------------------------------------------------

    def _internal(self, name: str) -> Path:
        private_dir(self.root.parent)  # mkdir would create the directories above with the umask's mode
        private_dir(self.root)
        return private_dir(self.root / name)

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return alone(self._internal(".locks") / name, f"fetching or removing {name}")

    def _claim(self, path: Path, source: str) -> None:
        """Remove the files that an attempt from another source left in `path`."""
        marker = path / ".source"
        if marker.is_file() and marker.read_text(errors="replace") == source:
            return
        shutil.rmtree(path)
        private_dir(path)
        marker.write_text(source)

    def _names(self) -> tuple[str, ...]:
        try:
            found = [
                path.name for path in self.root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)
            ]
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise DaemonError("internal", f"cannot read {self.root}: {error.strerror}") from error
        return tuple(sorted(found))

    def _find(self, name: str) -> StoredModel | None:
        if name not in self._names():
            return None
        entry = self._read(name)
        if entry is None:
            raise DaemonError(
                "corrupt", f"the store's copy of {name} is damaged", f"`remove({name})`, then `pull` it again"
            )
        return entry

    def _read(self, name: str) -> StoredModel | None:
        directory = self.root / name
        try:
            text = read_regular(directory / MODEL_MANIFEST, MODEL_MANIFEST_BYTES)
            manifest = msgspec.json.decode(text, type=ModelManifest)
            whole = all(
                _stays_inside(file.name) and (directory / file.name).stat().st_size == file.size
                for file in manifest.files
            )
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return StoredModel(directory, manifest) if whole else None

    def _require_unaltered(self, entry: StoredModel) -> None:
        """Raises DaemonError `corrupt` if a file is not the one that was pulled. Files that nobody has touched since
        are not read."""
        manifest = entry.directory / MODEL_MANIFEST
        try:
            pulled_ns = manifest.stat().st_mtime_ns
            for file in entry.manifest.files:
                path = entry.directory / file.name
                stamp = FileStamp.of(path.stat())
                touched = max(stamp.written_ns, stamp.changed_ns) > pulled_ns
                if not touched or self._read_again.get(path) == stamp:
                    continue
                log.info("%s was touched since it was pulled, so it is read again", path)
                if hash_file(path, no_progress, file.name) != file.sha256:
                    raise DaemonError(
                        "corrupt",
                        f"{path} is not the file that was pulled as {entry.name}",
                        f"`remove({entry.name})`, then `pull` it again",
                    )
                self._read_again[path] = stamp
        except OSError as error:
            raise DaemonError("corrupt", f"{entry.name}: {error.filename}: {error.strerror}") from error

    def _unknown(self, name: str) -> DaemonError:
        known = self.known_names()
        if registry.find(name):
            return DaemonError(
                "not_found", f"{name} is not in the store yet", f"get it with: shoal pull {name}"
            )
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if said := misplaced_suffix(name, known):
            hint += f"{said}; "
        elif is_path(name):
            hint = "it is a path, and models of the store have names; "
        return DaemonError(
            "not_found", f"no model called {name[:140]!r}", f"{hint}see shoal ls; shoal pull fetches models"
        )


def existing_path(model: str) -> Path | None:
    """The absolute path of the file or directory that a user wrote as a path; None when there is none.

    Raises DaemonError `not_found` for a path that cannot be read, and for pipes and devices, which may never end.
    """
    try:
        path = Path(model).expanduser()
        if path.is_file() or path.is_dir():
            return path.absolute()
        if not path.exists():
            return None
    except (OSError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DaemonError("not_found", f"{model[:300]}: {reason}") from error
    raise DaemonError("not_found", f"{model[:300]} is neither a file nor a directory")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name

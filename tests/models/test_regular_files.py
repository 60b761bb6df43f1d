"""Only regular files are opened, and only so much of them; nothing waits for what a pipe may say."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny

from shoal.comm.curve_keys import KeyRing
from shoal.comm.errors import KeyFileError
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.errors import ModelError
from shoal.models.regular_files import FileTooLong, NotRegular, open_regular, read_object, read_regular
from shoal.offload.errors import PackError
from shoal.offload.pack.manifest import MANIFEST, read_manifest

WAITS_S = 20.0


def ended(act: Callable[[], object]) -> Any:
    """What `act` raised; fails if it does not end."""
    seen: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            seen.append(error)
        else:
            seen.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAITS_S)
    assert seen, "it waits for ever"
    return seen[0]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as made:  # names are short
        made.bind(f"{short}/s")
        shutil.move(f"{short}/s", path)


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": fifo,
    "a socket": listening,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    STRANGE[kind](tmp_path / "it")
    for act in (open_regular, lambda path: read_regular(path, 100)):
        error = ended(lambda act=act: act(tmp_path / "it"))
        assert isinstance(error, NotRegular)
        assert kind in str(error.strerror)


def test_only_so_much_is_read(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(FileTooLong, match="1099511627776 bytes"):
        read_regular(path, 1 << 20)
    path.write_bytes(b"abc")
    assert read_regular(path, 3) == b"abc"
    assert read_regular(Path("/proc/self/status"), 100) == b""  # says that it has none
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, holds a list"):
        read_object(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny.save_hf(tiny.hf_model("llama"), tmp_path_factory.mktemp("m") / "sharded", sharded=True)
    for name in ("generation_config.json", "special_tokens_map.json"):
        (root / name).write_text("{}")
    (root / "chat_template.jinja").write_text("{{ messages }}")
    return root


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "model.safetensors",
        "model-00001-of-*.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ],
)
def test_every_file_of_a_directory(saved: Path, name: str, kind: str, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "m")
    path = next(iter(directory.glob(name)), directory / name)
    path.unlink(missing_ok=True)
    STRANGE[kind](path)

    def load() -> None:
        with open_checkpoint(directory) as checkpoint:
            checkpoint.tokenizer()

    error = ended(load)
    assert isinstance(error, ModelError)
    assert str(path) in str(error)
    assert kind in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_gguf_files_and_their_parts(kind: str, tmp_path: Path) -> None:
    STRANGE[kind](tmp_path / "m.gguf")
    error = ended(lambda: open_checkpoint(tmp_path / "m.gguf"))
    assert kind in str(error)
    first = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "s.gguf", split_tensors=20)
    second = next(tmp_path.glob("s-00002-*"))
    second.unlink()
    STRANGE[kind](second)
    error = ended(lambda: open_checkpoint(first))
    assert isinstance(error, ModelError)
    assert str(second) in str(error)
    assert kind in str(error)


def test_manifests_of_packs_and_keys(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    error = ended(lambda: read_manifest(tmp_path))
    assert isinstance(error, PackError)
    assert "a pipe" in str(error)
    os.mkfifo(tmp_path / "authorised", 0o600)
    assert isinstance(ended(KeyRing(tmp_path).authorised), KeyFileError)


def test_giant_files_are_refused_by_their_size(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"):
        directory = shutil.copytree(saved, tmp_path / name)
        with (directory / name).open("r+b") as file:
            file.truncate(1 << 40)
        error = ended(lambda d=directory: open_checkpoint(d).tokenizer())
        assert isinstance(error, ModelError)
        assert str(directory / name) in str(error)


def test_links_are_followed_and_loops_are_not(saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "m")
    config = (directory / "config.json").rename(tmp_path / "elsewhere")
    (directory / "config.json").symlink_to(config)
    open_checkpoint(directory).close()
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(directory / "config.json")
    assert isinstance(ended(lambda: open_checkpoint(directory)), ModelError)
    config.write_text(json.dumps({}))

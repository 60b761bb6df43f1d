"""What cannot be opened is not stored: `pull` refuses what `run` refuses in the same words, and keeps nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import tiny
from fakes.cli_fakes import shoal
from fakes.loopback import Web, serving

from shoal.comm.home import Home

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 3]


def named_lora(data: bytes) -> bytes:
    return data.replace(b"blk.0.attn_q.weight", b"blk.0.attn.q.lora_a")


def of_type(kind: bytes) -> Callable[[bytes], bytes]:
    """The architecture that mmproj files and their like have, in place of the model's."""
    return lambda data: data.replace(b"qwen2", kind)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "LoRA adapter": named_lora,
    "mmproj": of_type(b"clip\0"),
    "other family": of_type(b"qwen9"),
    "version 1": lambda data: data[:4] + b"\1" + data[5:],
    "version 9": lambda data: data[:4] + b"\x09" + data[5:],
    "Git LFS pointer": lambda data: LFS,
    "header that is cut off": lambda data: data[:300],
    "data that is cut off": cut,
    "magic alone": lambda data: data[:4],
    "empty": lambda data: b"",
    "web page": lambda data: b"<!doctype html><title>404</title>",
    "pickle": lambda data: b"PK\3\4archive/data.pkl",
    "no tokens": lambda data: data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.t0kens"),
    "unknown pre-tokenizer": lambda data: data.replace(b"gpt-2", b"gpt-0"),
    "tensor is missing": lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_UP.weight"),
    "zeros": lambda data: data[:4] + bytes(5000),
}

_BROKEN: dict[str, bytes | None] = {
    "empty": b"",
    "no JSON": b'{"a": 1',
    "a list": b"[]",
    "Git LFS pointer": LFS,
    "not UTF-8": b'{"a": "\xff"}',
}
DIRECTORIES: dict[str, dict[str, bytes | None]] = {
    f"{name}, {how}": {name: data}
    for name in ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json")
    for how, data in _BROKEN.items()
} | {
    "no config.json": {"config.json": None},
    "no weights": {"model.safetensors": None},
    "no tokenizer": {"tokenizer.json": None},
    "other family": {"config.json": json.dumps({"model_type": "other"}).encode()},
    "no sizes": {"config.json": json.dumps({"model_type": "qwen2"}).encode()},
    "pickled weights": {"model.safetensors": None, "pytorch_model.bin": b"PK\3\4"},
    "weights are an adapter": {"model.safetensors": None, "adapter_model.safetensors": b"x"},
    "tokenizer without tokens": {"tokenizer.json": b"{}"},
    "a shard is missing": {
        "model.safetensors": None,
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    },
}


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def hf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tiny.save_hf(tiny.hf_model("qwen2"), tmp_path_factory.mktemp("hf"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def web(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "")
        yield served


def refusal(model: Path) -> tuple[int, str]:
    """What `run` says."""
    result = shoal("run", "--local", str(model), "hi")
    assert result.exit_code != 0
    assert str(model) in result.stderr
    return result.exit_code, result.stderr


def stored(home: Home) -> list[str]:
    """All files of models that are in the store, half fetched or whole."""
    kinds = (".gguf", ".part", ".json", ".safetensors", ".jinja")
    return sorted(
        str(path.relative_to(home.models)) for path in home.models.rglob("*") if path.suffix in kinds
    )


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused_as_run_refuses_it(case: str, web: Web, home: Home, gguf_bytes: bytes) -> None:
    path = home.root.parent / "m.gguf"
    data = FILES[case](gguf_bytes)
    path.write_bytes(data)
    expected = refusal(path)
    for options in ([], ["--link"]):
        result = shoal("pull", *options, str(path))
        assert (result.exit_code, result.stderr) == expected
    web.files["/far/m.gguf"] = data
    result = shoal("pull", address := web.url("/far/m.gguf"))
    assert (result.exit_code, result.stderr) == (expected[0], expected[1].replace(str(path), address))
    assert stored(home) == []
    assert shoal("ls").stderr.startswith("the store is empty")


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_is_refused_as_run_refuses_it(
    case: str, web: Web, home: Home, hf_files: dict[str, bytes]
) -> None:
    path = home.root.parent / "m"
    path.mkdir()
    files = {name: data for name, data in (hf_files | DIRECTORIES[case]).items() if data is not None}
    for name, data in files.items():
        (path / name).write_bytes(data)
    expected = refusal(path)
    result = shoal("pull", str(path))
    assert (result.exit_code, result.stderr) == expected
    if "config.json" in files and any(name.endswith("model.safetensors") for name in files):
        web.hub_repo("org/m", files, commit="c0ffee" * 6 + "c0ff")
        result = shoal("pull", "org/m")
        said = expected[1].replace(str(path), "hf:org/m@c0ffeec0ffee")
        assert (result.exit_code, result.stderr) == (expected[0], said)
    assert stored(home) == []


def test_what_is_in_the_store_stays(home: Home, web: Web, gguf_bytes: bytes) -> None:
    path = home.root.parent / "m.gguf"
    path.write_bytes(gguf_bytes)
    assert shoal("pull", str(path)).exit_code == 0
    path.write_bytes(LFS)
    result = shoal("pull", str(path))
    assert result.exit_code == 2
    assert "has changed since it was pulled as m" in result.stderr
    web.files["/m.gguf"] = LFS
    assert shoal("pull", "--name", "m", web.url("/m.gguf")).exit_code == 2
    assert shoal("pull", "--name", "other", web.url("/m.gguf")).exit_code == 1
    assert stored(home) == ["m/m.gguf", "m/manifest.json"]
    assert (home.models / "m" / "m.gguf").read_bytes() == gguf_bytes


def test_a_part_of_a_model_from_the_web_is_no_model(home: Home, web: Web, tmp_path: Path) -> None:
    """The other parts are not fetched, so what would be stored could not be opened."""
    first = tiny.save_gguf(tiny.hf_model("qwen2"), tmp_path / "m.gguf", split_tensors=20)
    web.files[f"/{first.name}"] = first.read_bytes()
    result = shoal("pull", web.url(f"/{first.name}"))
    assert result.exit_code == 1
    assert "is the first of 2 parts" in result.stderr
    assert stored(home) == []


ODD: dict[str, tuple[str, bytes, str]] = {
    "advice out of range": ("generation_config.json", b'{"temperature": -1}', "temperature=-1 is not used"),
    "advice that Shoal lacks": ("generation_config.json", b'{"num_beams": 4}', "num_beams=4 is not used"),
    "advice that is no JSON": ("generation_config.json", b"{", "is not valid JSON"),
    "an end outside": ("generation_config.json", b'{"eos_token_id": 99999}', "eos_token_id=99999"),
    "a byte order mark": ("special_tokens_map.json", b"\xef\xbb\xbf{}", "byte order mark"),
    "a token that is none": ("special_tokens_map.json", b'{"unk_token": 5}', "unk_token=5 is not used"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_said_by_every_verb(case: str, home: Home, hf_files: dict[str, bytes]) -> None:
    path = home.root.parent / "m"
    path.mkdir()
    file, data, said = ODD[case]
    for name, content in (hf_files | {file: data}).items():
        (path / name).write_bytes(content)
    pulled = shoal("pull", str(path))
    assert pulled.exit_code == 0
    assert file in pulled.stderr
    assert said in pulled.stderr
    for model in ("m", str(path)):
        shown = json.loads(shoal("show", "--json", model).stdout)["warnings"]
        assert any(file in warning and said in warning for warning in shown)
        ran = shoal("run", "--local", "--max-tokens", "1", model, "hi")
        assert ran.exit_code == 0

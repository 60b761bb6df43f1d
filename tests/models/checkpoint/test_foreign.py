"""What people give in place of a model is told by its name, with what to do."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import tiny

from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.gguf_file import open_gguf
from shoal.models.errors import CheckpointError, MissingCheckpoint, TokenizerError, UnsupportedCheckpoint
from shoal.models.tokenizer.tokenizer import Tokenizer

from .test_gguf_facts import edit
from .test_gguf_file import ARRAY, STRING, U32, image, key, tensor, text

ARCH = key("general.architecture", STRING, text("llama"))


def kind(value: str) -> bytes:
    return key("general.type", STRING, text(value))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
WORDS = key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 1) + text("a"))
FILES: dict[str, tuple[bytes, str]] = {
    "adapter": (
        image([ARCH, kind("adapter"), key("adapter.type", STRING, text("lora"))]),
        "is a LoRA adapter, not a model; merge it",
    ),
    "adapter without a type": (
        image([ARCH], [tensor("blk.0.attn_q.weight.lora_a", (4, 4))], bytes(64)),
        "is a LoRA adapter",
    ),
    "mmproj": (image([key("general.architecture", STRING, text("clip")), kind("mmproj")]), "mmproj"),
    "old mmproj": (image([key("general.architecture", STRING, text("clip"))]), "mmproj"),
    "control vector": (
        image(
            [key("general.architecture", STRING, text("controlvector"))],
            [tensor("direction.1", (4,))],
            bytes(32),
        ),
        "is a control vector",
    ),
    "imatrix": (image([kind("imatrix")]), "is an importance matrix"),
    "vocabulary": (image([ARCH, WORDS]), "holds a vocabulary alone and no weights"),
    "part 2": (
        image(
            [ARCH, key("split.no", U32, struct.pack("<I", 1)), key("split.count", U32, struct.pack("<I", 3))]
        ),
        "is not the first of its 3 parts; open the one named 00001-of-00003",
    ),
    "LFS": (LFS, "is a Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "pickle": (b"PK\x03\x04archive/data.pkl", "pickle, which can run code"),
    "old pickle": (b"\x80\x02}q\x00", "pickle"),
    "old ggml": (b"tjgg" + bytes(100), "older than GGUF"),
    "old LoRA": (b"algg" + bytes(100), "LoRA adapter"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "compressed by gzip"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "block_count" not in str(caught.value)


def test_an_adapter_of_a_whole_model(tmp_path: Path) -> None:
    """It has all that a model has, and says that it is none."""
    path = tiny.save_gguf(tiny.hf_model("llama"), tmp_path / "m.gguf")
    path = edit(path, lambda writer: writer.add_string("general.type", "adapter"), ("general.type",))
    with pytest.raises(UnsupportedCheckpoint, match="is a LoRA adapter"):
        open_checkpoint(path)


def write(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("{}")

    return make


DIRECTORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter": (write("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter"),
    "adapter with a configuration": (write("config.json", "adapter_model.safetensors"), "LoRA adapter"),
    "pickles": (write("pytorch_model.bin"), "only pytorch_model.bin, a pickle"),
    "pickles with a configuration": (
        write("config.json", "pytorch_model.bin"),
        "pytorch_model.bin, a pickle",
    ),
    "makers' own": (write("params.json", "consolidated.safetensors"), "params.json"),
    "pipeline": (write("model_index.json", "unet/config.json"), "a pipeline of diffusers"),
    "cache": (write("snapshots/0123/config.json"), "give the snapshot: "),
    "two GGUF files": (write("a-mmproj.gguf", "b.gguf"), "give the GGUF file itself: "),
    "nothing": (write(), "it has no config.json"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories(case: str, tmp_path: Path) -> None:
    make, message = DIRECTORIES[case]
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    if case == "two GGUF files":
        assert str(caught.value).endswith("/b.gguf")


def test_a_single_file_of_a_directory(tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(UnsupportedCheckpoint, match=f"give the directory: {path}$"):
            open_checkpoint(path / name)
    (path / "model.safetensors").write_bytes(LFS)
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.safetensors: is a Git LFS pointer"):
        open_checkpoint(path)


HEADERS: dict[str, bytes] = {
    "numbers": image(
        [ARCH] + [key(f"k{i}", ARRAY, struct.pack("<IQ", 2, 4 << 20) + bytes(8 << 20)) for i in range(6)]
    ),
    "texts": image([ARCH, key("k", ARRAY, struct.pack("<IQ", STRING, 2 << 20) + bytes(8 << 21))]),
    "emoji": image([ARCH] + [key(f"k{i}", STRING, text("😀" + "a" * (8 << 20))) for i in range(4)]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_large_header_takes_little_more_than_its_size(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[case])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="block_count is missing"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(HEADERS[case])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "entry", ['"t{i}":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', '"t{i}":[[],[]]']
)
def test_a_large_header_of_safetensors(entry: str, tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    for count, message in (
        (200_000, "at most 131072 are read|is not a sound"),
        (2_500_000, "at most 33554432"),
    ):
        header = ("{" + ",".join(entry.replace("{i}", str(i)) for i in range(count)) + "}").encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_vocabularies_are_bounded_and_large_ones_load(tmp_path: Path) -> None:
    model = tiny.hf_model(
        "llama", vocab_size=300_000, hidden_size=8, num_attention_heads=1, num_key_value_heads=1
    )
    path = tiny.save_gguf(model, tmp_path / "m.gguf")
    words = [*tiny.TOKENS, *(f"word{i}" for i in range(300_000 - len(tiny.TOKENS)))]
    drop = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    path = edit(path, lambda writer: writer.add_token_list(words), drop)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer().vocab_size == 300_000
    many = text("a") * (2 << 20)
    (tmp_path / "n.gguf").write_bytes(
        image([key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2 << 20) + many)])
    )
    metadata = {**open_gguf(tmp_path / "n.gguf").metadata, "tokenizer.ggml.model": "gpt2"}
    with pytest.raises(TokenizerError, match="a vocabulary has 1 to 1048576 tokens, this one has 2097152"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_link_that_leads_nowhere_is_the_directory_s_fault(name: str, tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    for target in (name, f"tokenizer.json/{name}", "n" * 300):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
        with pytest.raises(MissingCheckpoint, match=f"m/{name}: cannot be read"):
            open_checkpoint(path)


def test_how_an_unknown_file_begins_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"hello")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert str(caught.value).count("begins") == 1

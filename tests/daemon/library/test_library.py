"""The model store: names, manifests, appearing and disappearing in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.home import Home
from shoal.comm.messages import ErrorCode
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import MODEL_MANIFEST, Library, check_name
from shoal.daemon.sizes import parse_bytes
from shoal.partition.amounts import format_bytes, format_duration

DATA = b"GGUF" + bytes(range(200))
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(Home(tmp_path / "home"))


def put(library: Library, name: str, data: bytes = DATA) -> None:
    with library.stage(name, f"test:{name}") as staging:
        (staging.path / "model.gguf").write_bytes(data)
        staging.commit("gguf", {"model.gguf": hashlib.sha256(data).hexdigest()})


def test_a_committed_model_is_listed_resolved_and_removed(library: Library) -> None:
    put(library, "tiny")
    (entry,) = library.list()
    assert (entry.name, entry.size_bytes, entry.manifest.source) == ("tiny", len(DATA), "test:tiny")
    assert library.resolve("tiny") == entry.path == library.root / "tiny" / "model.gguf"
    assert library.entry("tiny") == entry
    assert entry.path.read_bytes() == DATA
    library.remove("tiny")
    assert library.list() == ()
    assert not (library.root / "tiny").exists()
    assert list((library.root / ".partial").iterdir()) == []
    assert library.root.parent.stat().st_mode & 0o777 == 0o700


def test_nothing_shows_before_commit_nor_after_a_failure(library: Library) -> None:
    def fail() -> None:
        with library.stage("tiny", "test") as staging:
            (staging.path / "model.gguf").write_bytes(DATA)
            assert library.list() == ()
            raise DaemonError("internal", "the network is gone")

    with pytest.raises(DaemonError, match="network"):
        fail()
    assert library.list() == ()
    assert list((library.root / ".partial").iterdir()) == []


def attempt(library: Library, source: str, code: ErrorCode) -> list[str]:
    """Begin to fetch, and fail. Returns the parts that an earlier attempt left."""
    found: list[str] = []
    with contextlib.suppress(DaemonError), library.stage("tiny", source) as staging:
        found = sorted(path.name for path in staging.path.glob("*.part"))
        (staging.path / "model.gguf.part").write_bytes(b"GG")
        raise DaemonError(code, "cut")
    return found


def test_parts_stay_for_the_next_attempt_from_the_same_source_only(library: Library) -> None:
    assert attempt(library, "a", "internal") == []
    assert attempt(library, "a", "internal") == ["model.gguf.part"]
    assert attempt(library, "b", "internal") == []


def test_a_full_disk_leaves_nothing(library: Library) -> None:
    attempt(library, "a", "resources")
    assert list((library.root / ".partial").iterdir()) == []


def test_commit_on_a_full_disk_says_so(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DaemonError, match=r"the disk is full: tiny does not fit, .* free") as caught:
        put(library, "tiny")
    assert caught.value.code == "resources"
    assert library.list() == ()


def test_two_processes_cannot_fetch_one_name(library: Library) -> None:
    with library.stage("tiny", "a"):
        with pytest.raises(DaemonError, match="another process") as caught, library.stage("tiny", "a"):
            pass
        with library.stage("other", "a"):
            pass
    assert caught.value.code == "busy"


@pytest.mark.parametrize(
    "harm", ["no manifest", "bad manifest", "deep manifest", "cut file", "missing file", "climbing name"]
)
def test_damaged_models_are_told_apart(library: Library, harm: str) -> None:
    put(library, "tiny")
    directory = library.root / "tiny"
    manifest = (directory / MODEL_MANIFEST).read_text()
    if harm == "no manifest":
        (directory / MODEL_MANIFEST).unlink()
    elif harm == "bad manifest":
        (directory / MODEL_MANIFEST).write_text(manifest.replace('"gguf"', '"zip"'))
    elif harm == "deep manifest":
        (directory / MODEL_MANIFEST).write_text('{"x":' + "[" * 100_000)
    elif harm == "cut file":
        os.truncate(directory / "model.gguf", 3)
    elif harm == "missing file":
        (directory / "model.gguf").unlink()
    else:
        (library.root / "out").write_bytes(DATA)
        (directory / MODEL_MANIFEST).write_text(manifest.replace("model.gguf", "../out"))
    assert library.list() == ()
    assert library.damaged() == ("tiny",)
    with pytest.raises(DaemonError, match=r"`remove\(tiny\)`, then `pull` it again"):
        library.resolve("tiny")
    put(library, "tiny")  # pulling again replaces it
    assert library.damaged() == ()
    assert library.resolve("tiny").read_bytes() == DATA


def test_verify_finds_changed_bytes(library: Library) -> None:
    put(library, "tiny")
    entry = library.entry("tiny")
    assert library.verify(entry) == ()
    entry.path.write_bytes(DATA[::-1])
    assert library.verify(entry) == ("model.gguf",)


def test_paths_and_names_are_told_apart(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(DATA)
    (tmp_path / "tiny").mkdir()
    assert library.resolve("tiny.gguf") == tmp_path / "tiny.gguf"
    assert library.resolve("./tiny") == tmp_path / "tiny"
    assert library.resolve("tiny") == tmp_path / "tiny"  # the store has no model of this name
    put(library, "tiny")
    assert library.resolve("tiny") == library.root / "tiny" / "model.gguf"
    assert library.resolve("./tiny") == tmp_path / "tiny"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smollm2", "shoal pull smollm2"),
        ("SmolLM2-135M", "shoal pull SmolLM2-135M"),
        ("smolm2", "did you mean smollm2"),
        ("zzz", "see shoal ls"),
        ("no/such/thing", "no such file or directory: no/such/thing"),
        ("gone.gguf", "no such file or directory: gone.gguf"),
        ("models/gone.gguf", "see shoal ls"),
        ("Qwen/Qwen3-0.6B", "to fetch it: shoal pull Qwen/Qwen3-0.6B"),
        ("https://example.org/m.gguf", "to fetch it: shoal pull https://example.org/m.gguf"),
        ("smollm2:q5", "did you mean smollm2[?] only :q8 and :q4 can follow a name; see shoal ls"),
        ("", "no model called ''"),
        ("x" * 4096, "File name too long"),
        ("~nobody-of-that-name/x.gguf", "home directory"),
        ("/dev/zero", "/dev/zero is neither a file nor a directory"),
    ],
)
def test_what_is_not_there_is_told_with_what_to_do(library: Library, model: str, said: str) -> None:
    with pytest.raises(DaemonError, match=said) as caught:
        library.resolve(model)
    assert caught.value.code == "not_found"


def test_a_pipe_is_no_model(library: Library, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tiny.gguf")
    with pytest.raises(DaemonError, match="neither a file nor a directory"):
        library.resolve(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../up", "-x", "a b", "x.gguf", "x" * 129, "é", "a\n"]
)
def test_names_that_the_store_refuses(name: str) -> None:
    with pytest.raises(DaemonError, match="cannot be a name"):
        check_name(name)


@given(st.text(max_size=40))
def test_accepted_names_are_single_visible_path_parts(name: str) -> None:
    try:
        check_name(name)
    except DaemonError:
        return
    assert Path(name).name == name
    assert not name.startswith((".", "-", "~"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("3GB", 3 * 10**9), ("512 MiB", 512 << 20), ("1.5k", 1500), ("1000000", 10**6), (" 2 tb ", 2 * 10**12)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "3XB", "-1GB", "1e9", "3 G B", "0x10", "9" * 400, "9" * 308 + "GB"]
)
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(DaemonError, match="is not an amount of memory"):
        parse_bytes(text)


def test_amounts_are_written_as_people_do() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 98_362_432, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "98.4 MB",
        "3 GB",
    ]
    assert [format_duration(s) for s in (0.4, 61, 3600, 90061)] == ["0 s", "1 min 1 s", "1 h", "1 d 1 h"]


def test_who_may_name_only_models_of_the_store_learns_nothing_of_other_files(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "there").mkdir()
    with library.stage("mine", "a source") as staging:
        (staging.path / "m.gguf").write_bytes(b"GGUF")
        stored = staging.commit("gguf", {"m.gguf": hashlib.sha256(b"GGUF").hexdigest()})
    assert library.resolve_stored("mine") == library.resolve_stored(str(stored.path)) == stored.path
    for name in ("there", "there.gguf", str(tmp_path / "there.gguf"), "missing", str(tmp_path / "missing"), "/dev/null",
                 "../x", "~", "~root/.bashrc", ".", "", "a\0b", str(stored.path.parent), "x" * 5000):  # fmt: skip
        with pytest.raises(DaemonError) as caught:
            library.resolve_stored(name)
        told = caught.value.message.replace(repr(name[:140]), "NAME")
        assert (caught.value.code, told) == (
            "not_found",
            "NAME is no model of this daemon's store, and it loads no others (`models_only`)",
        )

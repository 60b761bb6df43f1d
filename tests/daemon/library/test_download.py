"""One file over HTTP: downloads are continued and verified, and no part is taken for the whole. All from loopback."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.loopback import Web, serving

from shoal.daemon.errors import DaemonError
from shoal.daemon.library.download import RemoteFile, download

DATA = b"GGUF" + random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serving() as served:
        served.files["/model.gguf"] = DATA
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield served


def no_wait(seconds: float) -> None:
    return


def ranges(web: Web) -> list[str]:
    return [headers.get("Range", "") for _, headers in web.requests]


def test_a_file_is_fetched_with_progress(web: Web, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    target = tmp_path / "m.gguf"
    assert download(RemoteFile(web.url("/model.gguf"), "m"), target, lambda *p: seen.append(p)) == SHA
    assert target.read_bytes() == DATA
    assert seen[-1] == ("m", len(DATA), len(DATA))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_a_cut_body_goes_on_where_it_stopped(web: Web, tmp_path: Path) -> None:
    web.cuts = [100_000, 50_000]
    assert download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=no_wait) == SHA
    assert ranges(web) == ["", "bytes=100000-", "bytes=150000-"]


def test_an_interrupted_download_goes_on_in_the_next_call(web: Web, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    remote = RemoteFile(web.url("/model.gguf"), "m")
    with pytest.raises(KeyboardInterrupt):
        download(remote, tmp_path / "m", interrupt)
    have = (tmp_path / "m.part").stat().st_size
    assert have > 0
    web.files["/model.gguf"] = DATA  # unchanged
    assert download(remote, tmp_path / "m") == SHA


def test_a_changed_file_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    web.cuts = [1000, 0, 0, 0, 0, 0]
    remote = RemoteFile(web.url("/model.gguf"), "m")
    with pytest.raises(DaemonError, match="kept: try again later"):
        download(remote, tmp_path / "m", wait=no_wait)
    assert (tmp_path / "m.part").stat().st_size == 1000
    web.cuts, web.files["/model.gguf"] = [], DATA[::-1]
    assert download(remote, tmp_path / "m") == hashlib.sha256(DATA[::-1]).hexdigest()


def test_without_a_validator_or_hash_nothing_is_continued(web: Web, tmp_path: Path) -> None:
    web.tagged = False
    web.cuts = [1000]
    assert download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=no_wait) == SHA
    assert ranges(web) == ["", ""]
    web.cuts, web.requests = [1000], []
    remote = RemoteFile(web.url("/model.gguf"), "m", sha256=SHA)
    assert download(remote, tmp_path / "n", wait=no_wait) == SHA
    assert ranges(web) == ["", "bytes=1000-"]


def test_a_server_without_ranges_begins_again(web: Web, tmp_path: Path) -> None:
    web.ranges = False
    web.cuts = [1000]
    assert download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=no_wait) == SHA


def test_a_part_longer_than_the_file_begins_again(web: Web, tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(DATA + b"more")
    (tmp_path / "m.part.tag").write_text('"x"')
    assert download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=no_wait) == SHA


def test_a_wrong_hash_throws_the_bytes_away(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=f"sha256 {SHA}, expected {'0' * 64}") as caught:
        download(RemoteFile(web.url("/model.gguf"), "m", sha256="0" * 64), tmp_path / "m")
    assert caught.value.code == "corrupt"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_length_is_refused_before_it_is_fetched(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=f"the server has {len(DATA)} bytes, expected 5"):
        download(RemoteFile(web.url("/model.gguf"), "m", size=5), tmp_path / "m")


def test_busy_servers_are_asked_again_and_given_up_on(web: Web, tmp_path: Path) -> None:
    waits: list[float] = []
    web.failures = [503, 429]
    assert download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=waits.append) == SHA
    assert waits == [2.0, 4.0]
    web.failures = [503] * 9
    with pytest.raises(DaemonError, match="the server answered 503"):
        download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "n", wait=no_wait)


@pytest.mark.parametrize(
    ("status", "said"), [(404, "has no such file"), (403, "HF_TOKEN"), (400, "answered 400")]
)
def test_refusals_are_told_at_once(web: Web, tmp_path: Path, status: int, said: str) -> None:
    web.failures = [status]
    with pytest.raises(DaemonError, match=said):
        download(RemoteFile(web.url("/model.gguf"), "m"), tmp_path / "m", wait=no_wait)
    assert len(web.requests) == 1


def test_nobody_listening_is_told(tmp_path: Path) -> None:
    with serving() as gone:
        url = gone.url("/model.gguf")
    with pytest.raises(DaemonError, match="no connection"):
        download(RemoteFile(url, "m"), tmp_path / "m", wait=no_wait)


def test_secrets_are_not_sent_to_where_a_redirect_leads(web: Web, tmp_path: Path) -> None:
    with serving() as other:
        other.files["/blob"] = DATA
        web.redirects = {"/here": "/model.gguf", "/there": other.url("/blob")}
        for path in ("/here", "/there"):
            remote = RemoteFile(web.url(path), "m", headers={"Authorization": "Bearer secret"})
            assert download(remote, tmp_path / path[1:]) == SHA
        told = [headers.get("Authorization") for _, headers in (*web.requests, *other.requests)]
    assert told == ["Bearer secret"] * 3 + [None]


def test_redirects_to_other_schemes_are_not_followed(web: Web, tmp_path: Path) -> None:
    web.redirects = {"/here": "ftp://127.0.0.1/model.gguf"}
    with pytest.raises(DaemonError, match="not followed"):
        download(RemoteFile(web.url("/here"), "m"), tmp_path / "m", wait=no_wait)
    with pytest.raises(DaemonError, match="only http and https"):
        download(RemoteFile("file:///etc/hostname", "m"), tmp_path / "m")

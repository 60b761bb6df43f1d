"""One file over HTTP: an interrupted download is continued; the whole is checked by length and hash.

    NAME.part        the bytes so far
    NAME.part.tag    the server's validator (ETag or Last-Modified) of the file they belong to

Knows ranges, retries and when an old part may be continued. Does not know models, the store or the hub.
`huggingface_hub` could fetch the hub's files, but it checks only sizes, so a file would be read again for its hash, and
it only warns when the disk is full. Files from other web servers need this module in any case.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from shoal.daemon.errors import DaemonError
from shoal.daemon.progress import Progress, no_progress
from shoal.models.errors import one_line
from shoal.offload.syncing import sync

from .transfer import check_space, copy_hashed, disk_errors

TIMEOUT_S = 30.0
TRIES_WITHOUT_PROGRESS = 4
_BROKEN = (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (?P<begin>\d+)-\d+/(?P<total>\d+)")


@dataclass(frozen=True)
class RemoteFile:
    """Where a file is, and what is known of it beforehand. `headers` are secrets and go to that host only."""

    url: str
    name: str
    size: int = 0  # 0 = not known
    sha256: str = ""  # "" = not known
    headers: Mapping[str, str] | None = None


class _Interrupted(Exception):
    """The connection ended early, or the server asks to try again later. The message is one line."""


class _SameHostSecrets(urllib.request.HTTPRedirectHandler):
    """Follows redirects over http(s) only, and sends secret headers to the first host only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise DaemonError(
                "corrupt", f"{old.netloc} redirects to {new.scheme}://{new.netloc}: not followed"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and new.netloc == old.netloc:
            for name, value in req.unredirected_hdrs.items():
                request.add_unredirected_header(name, value)
        return request


_OPENER = urllib.request.build_opener(_SameHostSecrets)


def download(
    remote: RemoteFile,
    target: Path,
    progress: Progress = no_progress,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Fetch into `target.part`, continuing one that is there, and rename it to `target`. Returns its sha256 in hex.

    Raises DaemonError: `not_found`, `resources` (disk full), `corrupt` (wrong hash or length; the part is
    removed) or `internal` (no connection; the part is kept).
    """
    if urlsplit(remote.url).scheme not in ("http", "https"):
        raise DaemonError("bad_request", f"{remote.url}: only http and https are fetched")
    part = target.with_name(target.name + ".part")
    tries = 0
    while True:
        before = _size(part)
        try:
            digest = _Attempt(remote, part, progress).run()
            break
        except _Interrupted as reason:
            tries = 0 if _size(part) > before else tries + 1
            if tries >= TRIES_WITHOUT_PROGRESS:
                host = urlsplit(remote.url).netloc
                raise DaemonError(
                    "internal",
                    f"{remote.name}: {host}: {reason}",
                    "what came so far is kept: try again later",
                ) from reason
            wait(min(2.0**tries, 10.0))
    if remote.sha256 and digest != remote.sha256:
        _drop(part)
        raise DaemonError(
            "corrupt",
            f"{remote.name} has sha256 {digest}, expected {remote.sha256}",
            "the download was thrown away; try again or check the source",
        )
    with disk_errors(target.parent, 0, remote.name):
        part.rename(target)
        _tag(part).unlink(missing_ok=True)
    return digest


class _Attempt:
    """One request, for what the part does not hold yet. `done` and `digest` are of what it holds before."""

    def __init__(self, remote: RemoteFile, part: Path, progress: Progress) -> None:
        self.remote, self.part, self.progress = remote, part, progress
        self.done = 0
        self.digest = hashlib.sha256()

    def run(self) -> str:
        """Fetch the rest. Returns the sha256 of the whole. Raises _Interrupted or DaemonError."""
        remote, part = self.remote, self.part
        tag = _tag(part).read_text() if _tag(part).is_file() else ""
        if not tag and not remote.sha256:
            part.unlink(missing_ok=True)  # nothing tells whether the server's file is still the same
        with disk_errors(part.parent, remote.size, remote.name):
            self._reread()
        if remote.size and self.done == remote.size:
            return self.digest.hexdigest()
        with self._open(tag) as response:
            total = self._expected(response)
            with disk_errors(part.parent, total, remote.name):
                check_space(part.parent, total - self.done, remote.name)
                if not self.done:
                    _tag(part).write_text(_validator(response))
                with part.open("ab") as out:
                    try:
                        sha256 = copy_hashed(response, out, lambda new: self._moved(new, total), self.digest)
                    except _BROKEN as error:
                        raise _Interrupted(f"the connection broke ({_reason(error)})") from error
                    finally:
                        sync(out)
        size = _size(part)
        if total and size < total:
            raise _Interrupted(f"the connection ended after {size} of {total} bytes")
        if total and size > total:
            _drop(part)
            raise DaemonError("corrupt", f"{remote.name}: got {size} bytes, expected {total}")
        return sha256

    def _reread(self) -> None:
        if self.remote.size and _size(self.part) > self.remote.size:
            _drop(self.part)
        if self.part.is_file():
            self.done = _size(self.part)
            with self.part.open("rb", buffering=0) as file:
                self.digest = hashlib.file_digest(file, "sha256")

    def _open(self, tag: str) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.remote.url, headers={"User-Agent": "shoal", "Accept-Encoding": "identity"}
        )
        for name, value in (self.remote.headers or {}).items():
            request.add_unredirected_header(name, value)
        if self.done:
            request.add_header("Range", f"bytes={self.done}-")
            if tag:
                request.add_header("If-Range", tag)
        try:
            response: http.client.HTTPResponse = _OPENER.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _Interrupted(f"no connection ({_reason(error)})") from error
        return response

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        what, host = self.remote.name, urlsplit(self.remote.url).netloc
        if error.code == 416:
            _drop(self.part)
            return _Interrupted("the server's file is not the one that was begun; starting anew")
        if error.code in _RETRIED:
            return _Interrupted(f"the server answered {error.code} {error.reason}")
        if error.code in (401, 403):
            return DaemonError(
                "not_found", f"{what}: {host} refuses access ({error.code})", "is HF_TOKEN set?"
            )
        if error.code in (404, 410):
            return DaemonError("not_found", f"{what}: {host} has no such file")
        return DaemonError("internal", f"{what}: {host} answered {error.code} {error.reason}")

    def _expected(self, response: http.client.HTTPResponse) -> int:
        """Bytes of the whole file, 0 if the server does not say. Drops the part if the server sends the whole file."""
        if response.status == 206:
            range_ = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if range_ is None or int(range_["begin"]) != self.done:
                _drop(self.part)
                raise _Interrupted("the server sent another range than asked; starting anew")
            total = int(range_["total"])
        else:
            if self.done:
                _drop(self.part)
                self.done, self.digest = 0, hashlib.sha256()
            total = int(response.headers.get("Content-Length") or 0)
        if self.remote.size and total and total != self.remote.size:
            raise DaemonError(
                "corrupt", f"{self.remote.name}: the server has {total} bytes, expected {self.remote.size}"
            )
        return total or self.remote.size

    def _moved(self, new: int, total: int) -> None:
        self.progress(self.remote.name, self.done + new, total)


def _validator(response: http.client.HTTPResponse) -> str:
    """What `If-Range` takes: a strong ETag, or else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "reason", None) or error)

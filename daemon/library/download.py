"""One file over HTTP: goes on where it stopped, checked by length and hash.

    NAME.part        the bytes so far
    NAME.part.tag    the server's validator (ETag or Last-Modified) of the file they belong to

Knows ranges, retries and the rules by which an old part may be continued. Does not know models, the store
or the hub. `huggingface_hub` could fetch the hub's files, but reads them again for their hash (it checks only sizes)
and warns where the disk is full; what comes from other web servers needs this in any case.
"""

from __future__ import annotations

import hashlib
import http.client
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

from .transfer import check_space, copy_hashed, disk_errors, sync

TIMEOUT_S = 30.0
TRIES_WITHOUT_PROGRESS = 4
_BROKEN = (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class RemoteFile:
    """Where a file is and what is known of it beforehand. `headers` go to that host only (secrets)."""

    url: str
    name: str
    size: int = 0  # 0 = not known
    sha256: str = ""  # "" = not known
    headers: Mapping[str, str] | None = None


class _Interrupted(Exception):
    """The connection ended early or the server asks to come back later; `reason` is one line."""


class _SameHostSecrets(urllib.request.HTTPRedirectHandler):
    """Follows redirects over http(s) only, and sends secret headers nowhere but to the first host."""

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
    """Fetch into `target` (through `target`.part, continued if there is one); returns its sha256 in hex.

    Raises DaemonError: `not_found`, `resources` (disk full), `corrupt` (wrong hash or length; the part is
    dropped) or `internal` (no connection; the part is kept).
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
    """One request, from what the part holds to the end."""

    def __init__(self, remote: RemoteFile, part: Path, progress: Progress) -> None:
        self.remote, self.part, self.progress = remote, part, progress
        self.done = 0
        self.digest = hashlib.sha256()

    def run(self) -> str:
        """The sha256 of the whole part. Raises _Interrupted or DaemonError."""
        remote, part = self.remote, self.part
        tag = _tag(part).read_text() if _tag(part).is_file() else ""
        if not tag and not remote.sha256:
            part.unlink(missing_ok=True)  # nothing could tell whether the rest still fits
        with disk_errors(part.parent, remote.size, remote.name):
            self._reread()
        if remote.size and self.done == remote.size:
            return self.digest.hexdigest()
        with self._open(tag) as response:
            total = self._expected(response)
            with disk_errors(part.parent, total, remote.name):
                check_space(part.parent, total - self.done, remote.name)
                begun = self.done
                if not self.done:
                    _tag(part).write_text(_validator(response))
                with part.open("ab") as out:
                    try:
                        copy_hashed(response, out, self.digest, lambda done: self._moved(begun + done, total))
                    except _BROKEN as error:
                        raise _Interrupted(f"the connection broke ({_reason(error)})") from error
                    finally:
                        sync(out)
        if total and self.done < total:
            raise _Interrupted(f"the connection ended after {self.done} of {total} bytes")
        if total and self.done > total:
            _drop(part)
            raise DaemonError("corrupt", f"{remote.name}: got {self.done} bytes, expected {total}")
        return self.digest.hexdigest()

    def _reread(self) -> None:
        if not self.part.is_file():
            return
        if self.remote.size and self.part.stat().st_size > self.remote.size:
            _drop(self.part)
            return
        with self.part.open("rb", buffering=0) as file:
            copy_hashed(file, None, self.digest, self._have)

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
        """Bytes of the whole file, 0 if the server does not say; starts anew where the server does."""
        length = int(response.headers.get("Content-Length") or 0)
        if response.status == 206:
            begin, _, total_text = (
                response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            )
            if begin.partition("-")[0] != str(self.done) or not total_text.isdigit():
                _drop(self.part)
                raise _Interrupted("the server sent another range than asked; starting anew")
            total = int(total_text)
        else:
            if self.done:
                _drop(self.part)
                self.done, self.digest = 0, hashlib.sha256()
            total = length
        if self.remote.size and total and total != self.remote.size:
            raise DaemonError(
                "corrupt", f"{self.remote.name}: the server has {total} bytes, expected {self.remote.size}"
            )
        return total or self.remote.size

    def _have(self, done: int) -> None:
        self.done = done

    def _moved(self, done: int, total: int) -> None:
        self._have(done)
        self.progress(self.remote.name, done, total)


def _validator(response: http.client.HTTPResponse) -> str:
    """What `If-Range` takes: a strong ETag, else the date."""
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

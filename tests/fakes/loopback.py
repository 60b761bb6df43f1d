"""A web server on loopback in place of those that models come from: with ranges, hub listings and misbehaviour."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Web:
    """What is served, and how. `requests` are those that came: (path, headers)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.json: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.cuts: list[int] = []  # one per request: after how many bytes to end the body
        self.failures: list[int] = []  # one per request: the status to answer with
        self.ranges = True
        self.tagged = True
        self.address = ""

    def url(self, path: str) -> str:
        return f"{self.address}{path}"

    def hub_repo(self, repo: str, files: dict[str, bytes], commit: str = "c0ffee" * 6 + "c0ff") -> None:
        """Serve `files` as the Hugging Face hub does, the large ones as LFS."""
        siblings = []
        for name, data in files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith((".gguf", ".safetensors")):
                sha256 = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 100}
            siblings.append(sibling)
            self.files[f"/{repo}/resolve/{commit}/{name}"] = data
        self.json[f"/api/models/{repo}"] = {"id": repo, "sha": commit, "siblings": siblings}


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            return

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            web.requests.append((path, dict(self.headers)))
            if web.failures:
                self._empty(web.failures.pop(0))
            elif path in web.redirects:
                self.send_response(302)
                self.send_header("Location", web.redirects[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path in web.json:
                self._body(json.dumps(web.json[path]).encode(), "application/json")
            elif path in web.files:
                self._file(web.files[path])
            else:
                self._empty(404)

        def _empty(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _body(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _file(self, data: bytes) -> None:
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            begin = 0
            wanted = self.headers.get("Range", "")
            valid = self.headers.get("If-Range") in (None, tag)
            if wanted and web.ranges and valid:
                begin = int(wanted.removeprefix("bytes=").rstrip("-"))
                if begin >= len(data):
                    self._empty(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            if web.tagged:
                self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            self.wfile.write(data[begin : begin + web.cuts.pop(0)] if web.cuts else data[begin:])

    return Handler


@contextmanager
def serving() -> Iterator[Web]:
    """A running server on a free port."""
    web = Web()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(web))
    server.daemon_threads = True
    web.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)

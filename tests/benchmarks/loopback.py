"""A server on this machine that serves a folder as hosts of large files do, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

PIECE = 1 << 14


class Loopback:
    """Serves ``folder`` with ranges and ETags while the ``with`` block lasts.

    ``drops``: each answer stops after so many bytes of its body, one entry an answer, then no more. ``codes``: names
    that are answered with an HTTP status in place of a file. ``ranges``: False ignores the Range header. ``etags``:
    False sends nothing that tells versions apart. ``lengths``: False does not say how long a file is. ``html``: names
    that are answered with a web page. ``pause``: seconds before each piece of a body. ``sent`` counts the bytes of
    bodies by name, ``asked`` lists names and headers of all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drops: list[int] = []
        self.codes: dict[str, int] = {}
        self.html: set[str] = set()
        self.ranges = self.etags = self.lengths = True
        self.pause = 0.0
        self.sent: Counter[str] = Counter()
        self.asked: list[tuple[str, dict[str, str]]] = []

    def __enter__(self) -> Loopback:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, name: str) -> str:
        """The address of a file of the folder."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"


def _handler(loopback: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/")
            loopback.asked.append((name, dict(self.headers.items())))
            path = loopback.folder / name
            code = loopback.codes.get(name, 200 if path.is_file() else 404)
            if code != 200:
                self._answer(code, {"Content-Type": "text/html"}, name, b"<html>no</html>")
                return
            body = path.read_bytes()
            headers = {"Content-Type": "text/html" if name in loopback.html else "application/octet-stream"}
            etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            if loopback.etags:
                headers["ETag"] = etag
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked and loopback.ranges and self.headers.get("If-Range", etag) == etag:
                start = int(asked[1])
                if start >= len(body):
                    self._answer(416, headers | {"Content-Range": f"bytes */{len(body)}"}, name, b"")
                    return
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self._answer(206, headers, name, body[start:])
                return
            self._answer(200, headers, name, body)

        def _answer(self, code: int, headers: dict[str, str], name: str, body: bytes) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            if loopback.lengths:
                self.send_header("Content-Length", str(len(body)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            limit = loopback.drops.pop(0) if code in (200, 206) and loopback.drops else len(body)
            try:
                for start in range(0, min(limit, len(body)), PIECE):
                    time.sleep(loopback.pause)
                    piece = body[start : min(start + PIECE, limit)]
                    self.wfile.write(piece)
                    loopback.sent[name] += len(piece)
            except OSError:  # the client is gone
                limit = 0
            self.close_connection = limit < len(body) or not loopback.lengths

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler

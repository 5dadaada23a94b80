"""A real web server for the tests of remote shards, told to fail as servers do."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebServer:
    """Serves `files` (path without the first slash -> bytes) on 127.0.0.1, from `with` on.

    faults: path -> what goes wrong with the next GETs of it, one after another, then nothing:
    "500", "404", ... (a status), "drop" (no answer), "cut N" (the connection ends after N bytes), "stall N" (nothing
    more after N bytes), "drip N" (after N bytes one byte at a time), "short N" (claims N bytes and sends these),
    "long N" (claims N bytes too many), "gzip" (claims to compress), "shift" (answers a range with another one).
    ranges, etags, dates, heads: what it supports. asked: (method, path, Range header) of all requests.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.faults: dict[str, list[str]] = {}
        self.ranges = self.etags = self.heads = True
        self.dates = False
        self.weak = False
        self.pace_s = 0.0  # between pieces of 64 KiB
        self.asked: list[tuple[str, str, str | None]] = []
        self.authorization: list[str | None] = []
        self.redirects: dict[str, str] = {}
        self.closing = threading.Event()

    def __enter__(self) -> WebServer:
        handler = type("Bound", (_Handler,), {"web": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, path: str | None = None) -> int:
        """How often a file (or any) was asked for."""
        counted = Counter(asked for method, asked, _ in self.asked if method == "GET")
        return sum(counted.values()) if path is None else counted[path]

    def etag(self, path: str) -> str:
        """A hash of the file as it is now."""
        return f'{"W/" if self.weak else ""}"{hashlib.md5(self.files[path]).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer(send=True)

    def _answer(self, send: bool) -> None:
        web, path = self.web, self.path.lstrip("/").split("?")[0]
        web.asked.append((self.command, path, self.headers.get("Range")))
        web.authorization.append(self.headers.get("Authorization"))
        self.close_connection = True
        if path in web.redirects:
            self.send_response(302)
            self.send_header("Location", web.redirects[path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        waiting = web.faults.get(path, [])
        fault, _, number = (waiting.pop(0) if send and waiting else "").partition(" ")
        if fault == "drop":
            return None
        if fault.isdigit() or path not in web.files or (not send and not web.heads):
            self.send_response(int(fault) if fault else 404 if path not in web.files else 405)
            if number:
                self.send_header("Retry-After", number)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self._send_file(path, fault, int(number or 0), send)

    def _send_file(self, path: str, fault: str, number: int, send: bool) -> None:
        web, data = self.web, self.web.files[path]
        etag = web.etag(path)
        date = "Mon, 01 Jan 2024 00:00:00 GMT"
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, etag if web.etags else None, date if web.dates else None)
        begin = int(match[1]) if match and web.ranges and same else 0
        if begin:
            begin += 1 if fault == "shift" else 0
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[begin:]
        if fault == "short":
            body = body[:number]
        self.send_header("Content-Length", str(len(body) + (number if fault == "long" else 0)))
        if web.etags:
            self.send_header("ETag", etag)
        if web.dates:
            self.send_header("Last-Modified", date)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if not send:
            return
        stop = number if fault in ("cut", "stall", "drip") else len(body)
        for at in range(0, stop, 65536):
            self.wfile.write(body[at : min(at + 65536, stop)])
            if web.pace_s:
                web.closing.wait(web.pace_s)
        self.wfile.flush()
        if fault == "stall":
            web.closing.wait(30)
        for at in range(stop, len(body) if fault == "drip" else 0):
            self.wfile.write(body[at : at + 1])
            if web.closing.wait(0.02):
                return

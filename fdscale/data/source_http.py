"""Shards on a web server, by Python's own client: redirects, proxies of the environment, resumed downloads."""

from __future__ import annotations

import base64
import email.utils
import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, closing
from typing import Any

from fdscale.data.sources import CHUNK, Download, Settings, Trouble

RETRIED = (408, 425, 429)  # and all of 500 to 599: what passes; other refusals stay


def fetch(download: Download) -> Any:
    """One attempt at a whole shard, going on where the last one ended if the server still has the same bytes."""
    at = download.done if download.validator else 0
    headers = {"Range": f"bytes={at}-", "If-Range": download.validator} if at else {}
    with ExitStack() as stack:
        response = stack.enter_context(_open(download.location, download.settings, headers))
        stack.enter_context(download.stop.ending(stack.enter_context(_Line(response)).cut))
        size = _number(response.headers.get("Content-Length"))
        begins = 0
        if response.status == 206:
            begins, size = _content_range(response.headers.get("Content-Range", ""))
            if begins != at:
                download.validator = ""
                raise Trouble(f"sends from byte {begins} on, asked for byte {at}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Trouble("the server compresses the shard on its way; have it send the file as it is", 1)
        download.begin(size, _state(response.headers), begins, _validator(response.headers))
        while data := response.read1(CHUNK):
            download.add(data)
        return download.end()


def look(location: str, settings: Settings) -> tuple[int | None, str]:
    """(size, what the server calls the state), by HEAD; (None, "") from a server that does not answer to HEAD."""
    try:
        with _open(location, settings, {}, "HEAD") as response:
            return _number(response.headers.get("Content-Length")), _state(response.headers)
    except Trouble as trouble:
        if isinstance(trouble.__cause__, urllib.error.HTTPError) and trouble.__cause__.code in (400, 403, 405, 501):
            return None, ""  # a signature may be good for GET alone
        raise


class _Line:
    """The connection of a response, to be cut by another thread; a descriptor of its own, so it cannot be another's."""

    def __init__(self, response: Any) -> None:
        try:
            self._socket: socket.socket | None = socket.socket(fileno=os.dup(response.fileno()))
        except (AttributeError, OSError, ValueError):  # the answer is empty, and the connection closed already
            self._socket = None

    def cut(self) -> None:
        """Make whoever reads from it see the end."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()


def _open(location: str, settings: Settings, headers: dict[str, str], method: str = "GET") -> Any:
    parts = urllib.parse.urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    url = urllib.parse.urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "fdscale", **headers})
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        basic = base64.b64encode(pair.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")  # for this host alone
    try:
        return _opener().open(request, timeout=settings.timeout_s)
    except urllib.error.HTTPError as error:
        with closing(error):
            raise _refused(error) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from None
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Trouble(f"its certificate is not valid ({error.reason.verify_message})", 1) from None
        raise
    except (http.client.InvalidURL, ValueError) as error:
        raise Trouble(f"is not a URL ({error})", 1) from None


def _opener() -> urllib.request.OpenerDirector:
    """Web protocols only: no redirect may lead to a local file or another protocol."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _refused(error: urllib.error.HTTPError) -> Trouble:
    said = f"{error.code} {error.reason}".strip()
    if error.code in RETRIED or error.code >= 500:
        return Trouble(f"the server answers {said}", wait_s=_seconds(error.headers.get("Retry-After")))
    if error.code in (404, 410):
        return Trouble(f"is not there (the server answers {said})", 1)
    if error.code == 416:  # there is less than was asked for: begin again
        return Trouble(f"the server answers {said}")
    return Trouble(f"the server refuses it ({said})", 1)


def _seconds(text: str | None) -> float:
    """Of Retry-After: a number, or a date."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text or "").timestamp() - time.time())
    except ValueError:
        return 0.0


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text) else None


def _content_range(text: str) -> tuple[int, int | None]:
    """(first byte, size of the whole) of "bytes 5-9/10"."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", text.strip())
    if match is None:
        raise Trouble(f"the server sends a part without saying which ({text!r})")
    return int(match[1]), _number(match[2])


def _state(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _validator(headers: Any) -> str:
    """What If-Range takes: a strong etag, or else a date."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else headers.get("Last-Modified") or ""

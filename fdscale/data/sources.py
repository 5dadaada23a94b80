"""Shards that lie elsewhere: what a location means, and bringing a whole shard from there into a local file.

    http://HOST/PATH.tar  https://...     Python's own client; proxies as in the environment
    s3://BUCKET/KEY.tar   gs://...  ...   any protocol of fsspec, with the package that it needs
    pipe:COMMAND                          a shell command that writes the tar to its output and ends with status 0

There is one thing to do with a location, `fetch`: the whole shard into a file, over as many attempts as the settings
allow, going on where the last attempt ended if the source can do so and still holds the same bytes. Everything else
works on local files. Passwords and signatures in a location are never shown.

A version says which state of a shard was seen: a hash of the place and what the source calls the state (etag, or time
of change), or, if the source calls it nothing, a hash of the bytes. So it is compared only where it means something.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, NamedTuple

from fdscale import UserError

CHUNK = 2**20  # bytes read at a time
MOST_WAIT_S = 30.0  # between two attempts
MOST_ASKED_WAIT_S = 120.0  # if the server itself says how long (Retry-After)
PROGRESS = 2**20  # bytes more than in all attempts before: then attempts are counted anew
SLOWEST = 64 * 2**10  # bytes in timeout_s: a source that sends less has stopped, though not quite
SURE = 2  # attempts before a shard counts as gone or changed: a proxy may err once

_REMOTE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")
_USER = re.compile(r"(?<=://)[^/@\s'\"]*@")
_QUERY = re.compile(r"(https?://[^?#\s'\"]*)[?#][^\s'\"]*")
_TAR = re.compile(r"[^\s'\"=]+\.tar\b")

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """How patiently a source is asked.

    tries: attempts in a row that bring nothing. timeout_s: seconds until a source that does not answer, or stops in
    the middle, counts as failed. wait_s: before the second attempt, doubled for each further one, up to half a minute.
    """

    tries: int = 8
    timeout_s: float = 30.0
    wait_s: float = 0.5


class State(NamedTuple):
    """What is known of a shard: its size in bytes (None: unknown) and its version ("": unknown)."""

    size: int | None = None
    version: str = ""


class Stopped(Exception):
    """A download was told to end."""


class Stop:
    """Tells downloads in other threads to end, wherever they wait."""

    def __init__(self) -> None:
        self._event = Event()
        self._waiting: dict[object, Callable[[], Any]] = {}

    def set(self) -> None:
        """End them."""
        self._event.set()
        for end in list(self._waiting.values()):
            with suppress(OSError):
                end()

    def is_set(self) -> bool:
        """Whether they were told."""
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep; raises Stopped as soon as told."""
        if self._event.wait(seconds):
            raise Stopped

    @contextmanager
    def ending(self, end: Callable[[], Any]) -> Iterator[None]:
        """While inside, `end()` is called when told to stop: it must make a blocked read return."""
        token = object()
        self._waiting[token] = end
        try:
            self.wait(0)
            yield
        finally:
            del self._waiting[token]


_of_process: list[Stop] = []  # in a worker, what its parent tells it


def stop_of_process() -> Stop:
    """What ends the downloads of this process if nothing else is said."""
    return _of_process[0] if _of_process else Stop()


def end_when_told(file: int) -> None:
    """From now on the downloads of this process end when a byte can be read from `file` (a pipe of its parent)."""
    _of_process[:] = [Stop()]
    Thread(target=lambda stop: os.read(file, 1) and stop.set(), args=tuple(_of_process), daemon=True).start()


class Trouble(Exception):
    """One attempt failed. tries: attempts after which such a failure is final; wait_s: what the server asks for."""

    def __init__(self, what: str, tries: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.tries, self.wait_s = tries, wait_s


# ----------------------------------------------------------------------------------------------------------------------
# Locations


def is_remote(location: str) -> bool:
    """Whether this is a URL or a pipe, not a path."""
    return _REMOTE.match(location) is not None


def kind_of(location: str) -> str:
    """The protocol: "http" (also for https), "pipe", or one of fsspec's."""
    protocol = location.split(":", 1)[0].lower()
    return "http" if protocol == "https" else protocol


def shown(location: str) -> str:
    """A location for messages: without passwords, signatures and other query strings."""
    return _QUERY.sub(r"\1", _USER.sub("", location))


def where(location: str) -> str:
    """The path that names a shard: a location without what may change while the shard stays what it is.

    Of a URL the part before its query; of a command the last word in it that ends in .tar. Raises UserError if there
    is none, or if it leads out of its folder.
    """
    if not is_remote(location):
        return location
    place = shown(location)
    if kind_of(location) == "pipe":
        words = _TAR.findall(place)
        if not words:
            raise UserError(f"{place}: which shard is this? Expected a command in which a word ends in .tar")
        place = words[-1]
        place = place if is_remote(place) or posixpath.isabs(place) else "/" + place.removeprefix("./")
    if any(step in ("", ".", "..") for step in place.split("://", 1)[-1].removeprefix("/").split("/")) or "\0" in place:
        raise UserError(f"{shown(location)}: has empty steps, or . or .. in its path; give the path without them")
    return place


def patterns_of_remote(part: str) -> list[str]:
    """The glob or location that a part of a pattern (braces already expanded) stands for; a folder means its *.tar.

    Raises UserError if it needs a listing and the protocol has none.
    """
    kind = kind_of(part)
    if kind == "pipe":
        return [part]
    if kind == "http":
        if "*" in part or part.endswith("/"):
            raise UserError(
                f"{shown(part)}: web servers have no listing; name the shards with braces, a-{{000..127}}.tar"
            )
        return [part]
    if not any(sign in part for sign in "*?[") and not part.endswith(".tar"):
        return [part.rstrip("/") + "/*.tar"]
    return [part]


def listing(pattern: str, settings: Settings) -> list[str]:
    """The locations that a remote glob means now, through fsspec. Raises UserError if the source cannot be asked."""
    from fdscale.data import source_fsspec

    return persist(pattern, lambda: source_fsspec.listing(pattern, settings), settings, Stop())


def place_hash(location: str) -> str:
    """A hash (8 hex digits) of a place."""
    return hashlib.sha256(shown(location).encode()).hexdigest()[:8]


def comparable(version: str, location: str) -> str:
    """The version if it says something of this location, else ""."""
    return version if version.startswith(("sha256:", place_hash(location) + " ")) else ""


# ----------------------------------------------------------------------------------------------------------------------
# Fetching


class Download:
    """A shard on its way into a local file; kept over the attempts, so that one may go on where the last one ended.

    file: descriptor of an empty file, which is written with pwrite. expected: from the index. room: called with the
    bytes that the file is about to have.
    """

    def __init__(
        self,
        location: str,
        file: int,
        expected: State,
        settings: Settings,
        stop: Stop,
        room: Callable[[int], None] | None = None,
    ) -> None:
        self.location, self.settings, self.stop = location, settings, stop
        self.done = 0  # bytes in the file
        self.validator = ""  # what the source needs to go on from there; "": it cannot
        self._file, self._expected, self._room = file, expected, room
        self._wanted = comparable(expected.version, location)
        self._size: int | None = None
        self._version, self._hash = "", hashlib.sha256()
        self._since, self._before = 0.0, 0  # when, and with how many bytes, the pace was last looked at

    def begin(self, size: int | None, called: str, at: int = 0, validator: str = "") -> None:
        """The source answers: `size` bytes in the state that it calls `called`, and it sends those from `at` on."""
        version = f"{place_hash(self.location)} {called}" if called else ""
        if size is not None and self._expected.size not in (None, size):
            raise changed(f"it has {size} bytes, the index says {self._expected.size}")
        if version and self._wanted and not self._wanted.startswith("sha256:") and version != self._wanted:
            raise changed(f"the source calls its state {called}, the index {self._wanted.split(' ', 1)[1]}")
        if at != self.done or version != self._version:
            assert at == 0 or at == self.done
            at = self._restart(at, version)
        self._size, self._version, self.validator = size, version, validator
        self._since, self._before = time.monotonic(), self.done

    def _restart(self, at: int, version: str) -> int:
        if at and version != self._version:
            self.validator, self.done = "", 0
            raise Trouble("changed while it was read")
        os.ftruncate(self._file, 0)
        self.done, self._hash = 0, hashlib.sha256()
        return 0

    def add(self, data: bytes) -> None:
        """The next bytes."""
        self.stop.wait(0)
        most = self._expected.size if self._expected.size is not None else self._size
        if most is not None and self.done + len(data) > most:
            raise changed(f"it has more than the {most} bytes that were announced")
        if self._room:
            self._room(self.done + len(data))
        self._check_pace()
        if not self._version or self._wanted.startswith("sha256:"):
            self._hash.update(data)
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file, view, self.done)
                self.done, view = self.done + written, view[written:]
        except OSError as error:
            raise UserError(
                f"{shown(self.location)}: cannot be kept on the local disk ({error.strerror}); free some space, or "
                "choose another data.shard_cache or a smaller data.shard_cache_gib"
            ) from None

    def _check_pace(self) -> None:
        passed = time.monotonic() - self._since
        if passed > self.settings.timeout_s:
            if self.done - self._before < SLOWEST:
                raise Trouble(f"sends next to nothing ({self.done - self._before} bytes in {passed:.0f} s)")
            self._since, self._before = time.monotonic(), self.done

    def end(self) -> State:
        """The source sent all it has. Raises Trouble if that is not all of the shard."""
        if self._size is not None and self.done < self._size:
            raise Trouble(f"the connection ended after {self.done} of {self._size} bytes")
        if self._expected.size not in (None, self.done):
            self.validator = ""
            raise changed(f"it has {self.done} bytes, the index says {self._expected.size}")
        content = f"sha256:{self._hash.hexdigest()}"
        if self._wanted.startswith("sha256:") and content != self._wanted:
            self.validator = ""
            raise changed("its bytes are others, though as many")
        return State(self.done, self._version or content)


def fetch(
    location: str,
    file: int,
    expected: State,
    settings: Settings,
    stop: Stop,
    room: Callable[[int], None] | None = None,
) -> State:
    """Bring a whole shard into an empty file (a descriptor), which lasts several attempts; its size and version.

    expected: what the index says; anything else is an error. room: see Download. Raises UserError naming the location
    if it cannot be had after the attempts that the settings allow, or has changed; Stopped if told to stop.
    """
    download = Download(location, file, expected, settings, stop, room)
    attempt = _module(location).fetch
    known = expected.size is not None
    return persist(location, lambda: attempt(download), settings, stop, known, lambda: download.done)


def look(location: str, settings: Settings, stop: Stop) -> State:
    """The state of a shard without fetching it, as far as the source tells. Raises UserError as `fetch` does."""
    attempt = _module(location).look

    def once() -> State:
        size, called = attempt(location, settings)
        return State(size, f"{place_hash(location)} {called}" if called else "")

    return persist(location, once, settings, stop)


def _module(location: str) -> Any:
    kind = kind_of(location)
    if kind == "http":
        from fdscale.data import source_http as module
    elif kind == "pipe":
        from fdscale.data import source_pipe as module  # type: ignore[no-redef]
    else:
        from fdscale.data import source_fsspec as module  # type: ignore[no-redef]
    return module


def changed(how: str) -> Trouble:
    """The failure of a source that answers with another shard than the one that was indexed."""
    return Trouble(f"changed since it was indexed: {how}. Restore it, or index it anew and start a new run", SURE)


def persist(
    location: str,
    attempt: Callable[[], Any],
    settings: Settings,
    stop: Stop,
    known: bool = False,
    done: Callable[[], int] = int,
) -> Any:
    """What `attempt()` returns, from the first attempt that succeeds.

    known: the shard is in the index, so it may be missing for a moment only. done: bytes kept so far; failures are
    counted anew when there are more than ever. Raises UserError when the attempts are used up.
    """
    begun, tries, firm, most = time.monotonic(), 0, 0, 0
    while True:
        try:
            return attempt()
        except Trouble as error:
            trouble = error
        except (OSError, http.client.HTTPException) as error:
            trouble = Trouble(_described(error))
        if stop.is_set():
            raise Stopped
        if done() >= most + PROGRESS:
            most, tries, firm = done(), 0, 0
        tries, firm = tries + 1, firm + (trouble.tries is not None)
        sure = trouble.tries is not None and firm >= max(trouble.tries, SURE if known else 1)
        if sure or tries >= settings.tries:
            often = f" (tried {tries} times in {time.monotonic() - begun:.0f} s)" if tries > 1 else ""
            hint = "" if trouble.tries is not None else "; when it answers again, start the same command again"
            raise UserError(f"{shown(location)}: {trouble}{often}{hint}")
        wait = min(settings.wait_s * 2 ** (tries - 1), MOST_WAIT_S) * random.SystemRandom().uniform(0.5, 1)
        if tries == 2:
            log.warning("%s: %s; trying again, up to %d times", shown(location), trouble, settings.tries)
        stop.wait(max(wait, min(trouble.wait_s, MOST_ASKED_WAIT_S)))


def _described(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "does not answer"
    text = " ".join(str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error).split())
    return f"cannot be reached ({shown(text) or type(error).__name__})"

"""Shards that a shell command writes to its output, such as `pipe:aws s3 cp s3://bucket/a-000.tar -`."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import Any, BinaryIO

from fdscale.data.sources import CHUNK, Download, Settings, Trouble

NOT_FOUND = (126, 127)  # exit statuses of a shell that could not run the command
WAIT_S = 10.0  # for a command to end after its last byte


def fetch(download: Download) -> Any:
    """One attempt: everything the command writes, if it then ends with status 0 (in bash: all commands of a `|`)."""
    download.begin(None, "")
    bash = shutil.which("bash")
    shell = [bash, "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-c"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*shell, download.location.removeprefix("pipe:")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,  # so that all it starts can be ended with it
        )
        try:
            with download.stop.ending(lambda: _kill(process)):
                _copy(process, download)
            status = process.wait(WAIT_S)
        except BaseException as error:
            _kill(process)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Trouble("the command closed its output, but does not end") from None
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            final = 1 if status in NOT_FOUND else None
            raise Trouble(f"the command {how} after {download.done} bytes{_last_line(errors)}", final)
    return download.end()


def look(location: str, settings: Settings) -> tuple[None, str]:
    """Nothing is known before the command has run."""
    return None, ""


def _copy(process: subprocess.Popen, download: Download) -> None:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(download.settings.timeout_s):
                raise Trouble(f"the command wrote nothing for {download.settings.timeout_s:g} s")
            data = os.read(process.stdout.fileno(), CHUNK)
            if not data:
                return
            download.add(data)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(errors: BinaryIO) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 500))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()[:200]}" if lines else ""

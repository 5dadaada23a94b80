"""Files that are there whole or not at all, whatever interrupts, and that outlast a power cut."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdscale import UserError


def write_atomically(path: str | os.PathLike, content: str | bytes | Iterable[bytes], durable: bool = True) -> None:
    """Replace a file so that a reader or a crash sees the old one or the new one, never a part.

    durable: also through a power cut. Raises OSError. A process that was killed leaves .NAME.*.tmp beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:48]}.{secrets.token_hex(8)}.tmp")  # long names have room for no more
    try:
        write(temporary, content, durable)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write(path: str | os.PathLike, content: str | bytes | Iterable[bytes], durable: bool = True) -> None:
    """Write a file, and wait until it is on the disk where it is to outlast a power cut. Raises OSError."""
    content = content.encode() if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync(path: str | os.PathLike) -> None:
    """Wait until a file is on the disk, or the names in a directory are: a rename lives there. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def must_be_writable(path: Path) -> None:
    """Make the folders above a file that is written when hours of work have been done. Raises UserError where it could
    not be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): name another file") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} could not be written: expected a file in a folder that can be written to")


def as_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON that every program reads: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value

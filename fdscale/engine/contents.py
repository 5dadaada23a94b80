"""What the JSON files of a checkpoint say, read with suspicion: a checkpoint may be torn, or come from anybody.

Nothing is unpickled, nothing outside the directory is opened, sizes are bounded before anything is read, and every
field has the type that its readers rely on. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fdscale import UserError, __version__

FORMAT = 1
MOST_JSON_BYTES = 1 << 26  # the parameters of the largest networks fill a thousandth of it
MOST_NESTED = 64  # levels of lists and objects
MOST_COUNT = 2**53
MOST_NAME = 1000  # characters
MOST_DIMENSIONS = 16
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
HASH = re.compile(r"[0-9a-f]{64}")


class Damaged(Exception):
    """A file of a checkpoint is not what it must be; the message names the file, not the directory."""


# ----------------------------------------------------------------------------------------------------------------------
# What fields may hold


def is_count(value: Any) -> bool:
    """A whole number from 0 on that floats hold too."""
    return type(value) is int and 0 <= value < MOST_COUNT


def is_name(value: Any) -> bool:
    """A text that can stand in a message."""
    return type(value) is str and 0 < len(value) <= MOST_NAME and value.isprintable()


def is_shape(value: Any) -> bool:
    """A few counts, whose product is one."""
    few = type(value) is list and len(value) <= MOST_DIMENSIONS and all(map(is_count, value))
    return few and math.prod(value) < MOST_COUNT


def _is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < MOST_COUNT)


def _is_object(value: Any) -> bool:
    return type(value) is dict and all(map(is_name, value))


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(of, value))


def _is_file(value: Any) -> bool:
    if type(value) is not dict or not {"name", "bytes", "sha256"} <= value.keys():
        return False
    name, size, digest = value["name"], value["bytes"], value["sha256"]
    known = type(name) is str and (name == "state.json" or RANK_FILE.fullmatch(name))
    return bool(known) and is_count(size) and type(digest) is str and HASH.fullmatch(digest) is not None


def _are_parameters(value: Any) -> bool:
    return _is_object(value) and all(map(is_shape, value.values()))


def _is_group(value: Any) -> bool:
    return (
        type(value) is dict
        and _is_list(is_name)(value.get("names"))
        and all(_is_number(value.get(key)) for key in ("lr", "lr_scale", "weight_decay"))
    )


def _is_guard(value: Any) -> bool:
    """See `guard.Guard.state`."""
    return (
        _is_object(value)
        and _is_list(_is_number)(value.get("losses", []))
        and all(is_count(value.get(key, 0)) for key in ("skips", "spikes", "skipped"))
    )


MANIFEST: dict[str, Callable[[Any], bool]] = {"files": _is_list(_is_file)}
STATE: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "samples": is_count,
    "optimizer_step": is_count,
    "identity": _is_object,
    "keys": _is_list(is_name),
    "parameters": _are_parameters,
    "frozen": _is_list(is_name),
    "buffers": _is_list(is_name),
    "groups": _is_list(_is_group),
    "config": _is_object,
    "guard": _is_guard,
}
# Of checkpoints from before there were such.
ABSENT: Mapping[str, Any] = {"keys": ["fp32", "exp_avg", "exp_avg_sq"], "frozen": [], "guard": {}}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """manifest.json; its files are known to be named like files of a checkpoint, each once.

    Raises Damaged, and UserError for a newer format.
    """
    manifest = _read(checkpoint, "manifest.json", MANIFEST)
    names = [entry["name"] for entry in manifest["files"]]
    if len(set(names)) != len(names) or "state.json" not in names:
        raise Damaged("manifest.json must name state.json, and every file once")
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json. Raises Damaged, and UserError for a newer format."""
    return _read(checkpoint, "state.json", STATE)


def _read(checkpoint: Path, name: str, fields: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    content = _parse(regular_file(checkpoint, name), name)
    format_ = content.get("format")
    if not isinstance(format_, int) or not is_count(format_):
        raise Damaged(f"{name} has no format")
    if format_ > FORMAT:
        raise UserError(
            f"{checkpoint}: {name} has format {format_}, and this fdscale {__version__} reads up to {FORMAT}; "
            "update fdscale"
        )
    content = {**{key: value for key, value in ABSENT.items() if key in fields}, **content}
    for key, sound in fields.items():
        if key not in content:
            raise Damaged(f"{name} has no {key}")
        if not sound(content[key]):
            raise Damaged(f"{key} in {name} makes no sense")
    return content


def regular_file(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint, that lies there itself. Raises Damaged."""
    path = checkpoint / name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} is not readable ({error})") from None
    if not stat.S_ISREG(mode):
        raise Damaged(f"{name} is not a regular file; a checkpoint holds no links")
    return path


def _parse(path: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file, without NaN and infinities."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"more than {MOST_JSON_BYTES} bytes")
        with path.open("rb") as file:
            content = parse(file.read(MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not readable ({' '.join(str(error).split())[:200]})") from None
    if type(content) is not dict:
        raise Damaged(f"{name} must hold a JSON object")
    return content


def parse(text: bytes) -> Any:
    """JSON with finite numbers alone and little nesting. Raises ValueError or RecursionError."""
    content = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    level = [content]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise ValueError(f"more than {MOST_NESTED} levels of nesting")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def verify_files(checkpoint: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """The files of a checkpoint have the sizes that the manifest says. hashes: and the hashes.

    share: (i, n) looks at the i-th of every n files only. Raises Damaged, and UserError for a newer format.
    """
    for entry in read_manifest(checkpoint)["files"][share[0] :: share[1]]:
        name, path = entry["name"], regular_file(checkpoint, entry["name"])
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
            if hashes and sha256(path) != entry["sha256"]:
                raise Damaged(f"the content of {name} does not match its hash in the manifest")
        except OSError as error:
            raise Damaged(f"{name} is not readable ({error})") from None


def sha256(path: Path) -> str:
    """Hash of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

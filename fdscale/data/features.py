"""Teacher features written once: records of one size in plain files, found by sample number.

    DIR/cache.json              what the cache is: span, shape and type of a record, what it was made from
    DIR/features-00000000.bin   a header, then the records of the first numbers; further files hold the next ones
    DIR/features-00000000.json  size and SHA-256 of a file that is whole, until all are
    DIR/manifest.json           the same of all files; where it is, the cache is whole

A record is CRC-32 of all that follows (4 bytes), CRC-32 of the view's pixels (4), sample number (8), scales (4 L, where
there are any), values. So a reader finds damage at any place, and sees when its own view of a sample is not the one
that the teacher saw. Files appear under their name when they are whole and synced. Nothing is unpickled, names of
files come from their numbers, and the shape of a record is bounded before anything is allocated.

Letters: m samples in a micro-batch, L tokens, T teacher width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdscale import UserError
from fdscale.data.recent import Recent

FORMAT = 1
HEADER = 512  # bytes before the records of a file
HEAD = np.dtype([("crc", "<u4"), ("view", "<u4"), ("number", "<u8")])  # before each record's scales and values
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "float8": 448.0}  # value that a token's largest entry becomes
MOST_RECORD = 2**30  # bytes: no teacher's tokens of one image come near it
MOST_JSON = 2**28  # bytes: the manifest of a million files has a tenth of it
OPEN_FILES = 64  # per process


# ----------------------------------------------------------------------------------------------------------------------
# Values


def encode(tokens: Tensor, stored: str) -> tuple[Tensor, Tensor | None]:
    """(m, L, T) float32 tokens -> values (m, L, T) of the type `stored`, and for 8 bits each token's scale (m, L).

    stored: float32 (the very same values), bfloat16 (rounded), int8 or float8 (e4m3; the token's largest entry becomes
    127 or 448).
    """
    if stored not in LARGEST:
        return tokens.to(TYPES[stored]), None
    scale = tokens.abs().amax(-1) / LARGEST[stored]
    scale = torch.where(scale > 0, scale, 1.0)
    values = (tokens / scale[..., None]).clamp(-LARGEST[stored], LARGEST[stored])
    return (values.round() if stored == "int8" else values).to(TYPES[stored]), scale


def decode(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 tokens (m, L, T) that `encode` stood for."""
    return values.float() if scale is None else values.float() * scale[..., None]


# ----------------------------------------------------------------------------------------------------------------------
# What a cache is


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cache: which numbers it holds, how, and what it was made from.

    span: it holds the numbers 0 .. span - 1. tokens, width: L and T of a record. stored: a key of TYPES. micro_batch:
    samples that went through the teacher together, which may show in the last bit of the values. per_file: records in a
    file. identity: whatever the features depend on, as plain data.
    """

    span: int
    tokens: int
    width: int
    stored: str
    micro_batch: int
    per_file: int
    identity: dict[str, Any]

    @property
    def scale_bytes(self) -> int:
        """Bytes of a record's scales."""
        return 4 * self.tokens if self.stored in LARGEST else 0

    @property
    def value_bytes(self) -> int:
        """Bytes of a record's values."""
        return self.tokens * self.width * TYPES[self.stored].itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return HEAD.itemsize + self.scale_bytes + self.value_bytes

    @property
    def files(self) -> int:
        """How many files there are."""
        return -(-self.span // self.per_file)

    def numbers(self, file: int) -> range:
        """The sample numbers of a file."""
        return range(file * self.per_file, min((file + 1) * self.per_file, self.span))

    def file_bytes(self, file: int) -> int:
        """Size of a file."""
        return HEADER + len(self.numbers(file)) * self.record_bytes

    def header(self, file: int) -> bytes:
        """The first HEADER bytes of a file: they tell whose it is, should it be moved."""
        shape = {key: value for key, value in dataclasses.asdict(self).items() if key != "identity"}
        numbers = self.numbers(file)
        about = {"format": FORMAT, "first": numbers.start, "count": len(numbers), **shape, "cache": self.digest()}
        return json.dumps(about).encode().ljust(HEADER - 1) + b"\n"

    def digest(self) -> str:
        """A hash of all this."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def name_of(file: int) -> str:
    """The name of a file, without its ending."""
    return f"features-{file:08d}"


def differences(cached: Plan, wanted: Plan) -> list[str]:
    """What the two were not made from alike, a phrase for each key."""
    there, here = ({**plan.identity, **_shape(plan)} for plan in (cached, wanted))
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return [f"{key} is {json.dumps(there.get(key))} there and {json.dumps(here.get(key))} here" for key in keys]


def _shape(plan: Plan) -> dict[str, Any]:
    dtype = "same" if plan.stored == "float32" else plan.stored
    return {"tokens and width of a sample": [plan.tokens, plan.width], "cache.dtype": dtype}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class Features:
    """A whole cache. Called on a micro-batch in a data worker, it adds that batch's features.

    span: numbers beyond it wrap; at most that of the cache. Raises UserError if the cache is not whole, its manifest is
    damaged, or it was made from something else than `wanted`. A file's size and header are checked when a process first
    opens it, a record's CRC-32 at each read.
    """

    def __init__(self, folder: str, wanted: Plan) -> None:
        self.folder, self.span = folder, wanted.span
        self.plan = read_plan(folder)
        if different := differences(self.plan, wanted):
            raise UserError(
                f"cache.features: {folder} was written for another run: {'; '.join(different)}. Take the values of the "
                "cache, or write one for this recipe: fdscale cache RECIPE --out DIR"
            )
        if wanted.span > self.plan.span:
            raise UserError(
                f"cache.features: {folder} holds the features of {self.plan.span} samples, and cache.epochs asks for "
                f"{wanted.span}; lower cache.epochs, or write a longer cache into another directory"
            )
        if not is_whole(folder):
            done = len(written(folder, self.plan))
            raise UserError(
                f"cache.features: {folder} is not whole, {done} of {self.plan.files} files are written; the same "
                "`fdscale cache` command goes on with it"
            )
        read_manifest(folder, self.plan)
        self._open = Recent(OPEN_FILES, drop=os.close)

    def check_sizes(self) -> None:
        """Raise UserError naming the first file that is missing or has a wrong size."""
        for file in range(self.plan.files):
            try:
                self._check_size(file, os.path.getsize(self._path(file)))
            except OSError as error:
                raise self._damaged(file, f"it cannot be found ({error.strerror})") from None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """features (m, value_bytes) uint8, and scales (m, L) float32 where there are any, of a micro-batch.

        batch: numbers (m,), views as images (m, 3, S, S) uint8, and origin. Raises UserError for a damaged record, or
        a view that is not the one the teacher saw.
        """
        plan = self.plan
        count = len(batch["numbers"])
        heads = np.empty((count, HEAD.itemsize), np.uint8)
        scales = torch.empty(count, plan.tokens if plan.scale_bytes else 0)
        values = torch.empty(count, plan.value_bytes, dtype=torch.uint8)
        for i, number in enumerate(batch["numbers"].tolist()):
            row = [part.data for part in (heads[i], scales[i].numpy(), values[i].numpy())]
            view = self._read(number % self.span, row)
            if zlib.crc32(batch["images"][i].contiguous().numpy().data) != view:
                shard, key = batch["origin"][i]
                raise UserError(
                    f"cache.features: {self.folder}: sample number {number} ({shard}: '{key}') does not look as it did "
                    "when the cache was written: the image or the version of a decoding library (Pillow, torch) "
                    "changed; take those of that time, or write the cache anew into another directory"
                )
        return {"features": values, **({"scales": scales} if plan.scale_bytes else {})}

    def tokens(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """The teacher's tokens (m, L, T), float32, on a device, of a micro-batch that was called with."""
        values = batch["features"].to(device, non_blocking=True).view(TYPES[self.plan.stored])
        scales = batch["scales"].to(device, non_blocking=True) if self.plan.scale_bytes else None
        return decode(values.view(-1, self.plan.tokens, self.plan.width), scales)

    def _read(self, number: int, row: list[memoryview]) -> int:
        """Fill head, scales and values of a record; returns the CRC-32 of the view."""
        file, place = divmod(number, self.plan.per_file)
        descriptor = self._open.get(file, self._open_file)
        try:
            got = os.preadv(descriptor, row, HEADER + place * self.plan.record_bytes)
        except OSError as error:
            raise self._damaged(file, f"record {place} cannot be read ({error.strerror})") from None
        head, scales, values = row
        crc = zlib.crc32(values, zlib.crc32(scales, zlib.crc32(head[4:])))
        stored_crc, view, stored_number = np.frombuffer(head, HEAD)[0].tolist()
        if got != self.plan.record_bytes or crc != stored_crc or stored_number != number:
            raise self._damaged(file, f"the record of sample number {number} is damaged (its CRC-32 does not match)")
        return view

    def _open_file(self, file: int) -> int:
        try:
            descriptor = os.open(self._path(file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(file, f"it cannot be opened ({error.strerror})") from None
        try:
            self._check_size(file, os.fstat(descriptor).st_size)
            if os.pread(descriptor, HEADER, 0) != self.plan.header(file):
                raise self._damaged(file, "its header is not that of this cache")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_size(self, file: int, size: int) -> None:
        if size != self.plan.file_bytes(file):
            raise self._damaged(file, f"it has {size} bytes, expected {self.plan.file_bytes(file)}")

    def _path(self, file: int) -> str:
        return os.path.join(self.folder, f"{name_of(file)}.bin")

    def _damaged(self, file: int, what: str) -> UserError:
        return UserError(
            f"{self._path(file)}: {what}. Damaged files are found and written anew by: fdscale cache RECIPE "
            f"--out {self.folder} --repair"
        )


def is_whole(folder: str) -> bool:
    """Whether all files of the cache are written."""
    return os.path.exists(os.path.join(folder, "manifest.json"))


def written(folder: str, plan: Plan) -> set[int]:
    """The files that are written, by number."""
    if is_whole(folder):
        return set(range(plan.files))
    marks = (re.fullmatch(r"features-(\d{8,})\.json", name) for name in os.listdir(folder))
    return {int(mark[1]) for mark in marks if mark and int(mark[1]) < plan.files}


def read_plan(folder: str) -> Plan:
    """The plan in cache.json. Raises UserError if there is none, or it makes no sense."""
    path = os.path.join(folder, "cache.json")
    if not os.path.exists(path):
        raise UserError(f"{folder} holds no feature cache (no cache.json); write one: fdscale cache RECIPE --out DIR")
    about = read_json(path)
    _check_format(about, path)
    try:
        plan = Plan(**about)
        counts = (plan.span, plan.tokens, plan.width, plan.micro_batch, plan.per_file)
        sound = all(type(count) is int and 0 < count < 2**48 for count in counts)
        if sound and plan.stored in TYPES and type(plan.identity) is dict and plan.record_bytes <= MOST_RECORD:
            return plan
    except TypeError:
        pass
    raise UserError(f"{path} is damaged: its values make no sense; write the cache anew into another directory")


def read_manifest(folder: str, plan: Plan) -> list[dict[str, Any]]:
    """Size and hash of every file of a whole cache. Raises UserError if they are not those of this cache."""
    path = os.path.join(folder, "manifest.json")
    manifest = read_json(path)
    _check_format(manifest, path)
    files = manifest.get("files")
    if manifest.get("cache") != plan.digest() or type(files) is not list or len(files) != plan.files:
        raise UserError(f"{path} does not belong to the cache.json beside it; write the cache anew")
    return files


def _check_format(content: dict[str, Any], path: str) -> None:
    found = content.pop("format", None)
    if type(found) is not int or found != FORMAT:
        raise UserError(f"{path} has format {found}, this fdscale reads {FORMAT}; use the fdscale that wrote it")


def read_json(path: str) -> dict[str, Any]:
    """An object from a JSON file of bounded size. Raises UserError for anything else."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MOST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable ({error}); write the cache anew into another directory") from None
    if type(content) is not dict:
        raise UserError(f"{path} is damaged: expected a JSON object; write the cache anew into another directory")
    return content

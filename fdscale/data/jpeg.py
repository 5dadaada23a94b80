"""The compiled part of JPEG decoding (jpeg.c): a rectangle of an image, without decoding what lies outside of it.

jpeg.c is compiled with the machine's C compiler when a JPEG is first looked at, once per user, into
$XDG_CACHE_HOME/fdscale or ~/.cache/fdscale. It calls the libjpeg-turbo that Pillow was loaded with, so its pixels are
Pillow's; before it is used it has to show that on a small image. Where there is no compiler, or Pillow decodes with
another library, it is left out and Pillow decodes the same pixels, only slower: `missing()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from fdscale import UserError

# What jpeg.c needs of the library, in the order of its struct library.
FUNCTIONS = (
    "jpeg_std_error",
    "jpeg_CreateDecompress",
    "jpeg_mem_src",
    "jpeg_read_header",
    "jpeg_start_decompress",
    "jpeg_crop_scanline",
    "jpeg_skip_scanlines",
    "jpeg_read_scanlines",
    "jpeg_destroy_decompress",
)
SOURCE = Path(__file__).with_name("jpeg.c")
FLAGS = ("-O3", "-shared", "-fPIC")
COMPILE_S = 120  # seconds; it takes a fraction of one


class Head(NamedTuple):
    """What the first bytes of a JPEG say."""

    width: int
    height: int
    before_pixels: int  # bytes
    many_scans: bool


def head(data: bytes) -> Head | None:
    """The size of a JPEG, if it is a plain one (grey or three colours, 8 bits) that `part` may decode; else None."""
    code = _loaded()[0]
    if code is None:
        return None
    out = (ctypes.c_int * 4)()
    if code.fdscale_jpeg_head(code.library, data, len(data), out):
        return None
    return Head(out[0], out[1], out[2], bool(out[3]))


def part(data: bytes, denominator: int, left: int, top: int, width: int, height: int) -> np.ndarray | None:
    """Pixels (height, width, 3) uint8 RGB of a rectangle of the image at 1/denominator (1, 2, 4, 8) of its size.

    None if anything at all about the file is out of order: then Pillow must say what it is worth.
    """
    code = _loaded()[0]
    if code is None:
        return None
    out = np.empty((height, width, 3), np.uint8)
    where = (denominator, left, top, width, height)
    return None if code.fdscale_jpeg_part(code.library, data, len(data), *where, out.ctypes.data) else out


def missing() -> str | None:
    """Why the compiled part is not in use, or None if it is. Compiles it on the first call."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        code = _declared(ctypes.CDLL(str(_compiled())))
        if not _agrees(code):
            return None, "the compiled part and Pillow decode a JPEG differently"
        return code, None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled part cannot be loaded ({error})"


def _declared(code: ctypes.CDLL) -> ctypes.CDLL:
    from PIL import _imaging

    version = features.version("libjpeg_turbo") or "none"
    if version.split(".")[0] not in ("2", "3"):
        raise UserError(f"Pillow decodes with libjpeg-turbo {version}; 2 and 3 are known")
    pillow = ctypes.CDLL(_imaging.__file__)  # loaded already: a look-up through it finds the library Pillow calls
    try:
        places = [ctypes.cast(getattr(pillow, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except AttributeError as error:
        raise UserError(f"Pillow does not decode with a shared libjpeg-turbo ({error})") from None
    code.library = (ctypes.c_void_p * len(FUNCTIONS))(*places)  # type: ignore[attr-defined]
    table, text, number = ctypes.c_void_p * len(FUNCTIONS), ctypes.c_char_p, ctypes.c_uint
    code.fdscale_jpeg_head.argtypes = [table, text, ctypes.c_size_t, ctypes.c_int * 4]
    code.fdscale_jpeg_part.argtypes = [table, text, ctypes.c_size_t, *[number] * 5, ctypes.c_void_p]
    return code


def _compiled() -> Path:
    """The shared library made from jpeg.c, compiled unless an earlier process did."""
    source = SOURCE.read_bytes()
    named = "\0".join((*FLAGS, platform.system(), platform.machine(), platform.libc_ver()[0]))
    library = _folder() / f"jpeg-{hashlib.sha256(source + named.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UserError("there is no C compiler; install gcc, or name one in CC")
    handle, temporary = tempfile.mkstemp(prefix=f"{library.stem}.", suffix=".part", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", temporary, str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        if done.returncode:
            raise UserError(f"{compiler} cannot compile jpeg.c ({' '.join(done.stderr.split())[:200]})")
        os.rename(temporary, library)  # whoever comes second replaces it by the same
    except subprocess.TimeoutExpired:
        raise UserError(f"{compiler} took more than {COMPILE_S} s to compile jpeg.c") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _folder() -> Path:
    """The user's cache, which nobody else may write to: what lies there is executed."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache) / "fdscale"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); name another place in XDG_CACHE_HOME") from None
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise UserError(f"{folder} belongs to another user or others may write to it; name another in XDG_CACHE_HOME")
    return folder


def _agrees(code: ctypes.CDLL) -> bool:
    """Whether it decodes part of a small image, chroma halved both ways, to the pixels Pillow finds there."""
    y, x = np.mgrid[0:61, 0:83]
    image = Image.fromarray(np.stack([3 * x, 4 * y, (x * y) % 256], 2).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    data, out = buffer.getvalue(), np.empty((30, 41, 3), np.uint8)
    if code.fdscale_jpeg_part(code.library, data, len(data), 1, 21, 17, 41, 30, out.ctypes.data):
        return False
    return np.array_equal(out, np.asarray(Image.open(io.BytesIO(data)))[17:47, 21:62])

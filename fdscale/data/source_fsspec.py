"""Shards in object stores and other places that fsspec reaches: s3:// (s3fs), gs:// (gcsfs), and so on.

Keys, regions and endpoints come from where these packages look for them: their own environment variables and files,
and fsspec's configuration, for instance FSSPEC_S3_ENDPOINT_URL.
"""

from __future__ import annotations

from typing import Any

from fdscale import UserError
from fdscale.data.sources import Download, Settings, Trouble, kind_of, shown

PIECE = 8 * 2**20  # bytes asked for at a time
LISTING = 20  # a listing may take so many times as long as a piece: it is many requests
STATES = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound")


def fetch(download: Download) -> Any:
    """One attempt at a whole shard, piece after piece, going on where the last one ended if it is still the same."""
    files, path = _filesystem(download.location, download.settings)
    size, called = _about(files, path, download.settings)
    if size is None:
        raise Trouble("the source does not tell its size", 1)
    at = download.done if called and called == download.validator else 0
    download.begin(size, called, at, called)
    while download.done < size:
        end = min(size, download.done + PIECE)
        data = _call(files, "cat_file", download.settings, path, start=download.done, end=end)
        if not data:
            break
        download.add(data)
    if _about(files, path, download.settings) != (size, called):
        download.validator = ""
        raise Trouble("changed while it was read")
    return download.end()


def look(location: str, settings: Settings) -> tuple[int | None, str]:
    """(size, what the store calls the state)."""
    return _about(*_filesystem(location, settings), settings)


def listing(pattern: str, settings: Settings) -> list[str]:
    """The locations that a glob means."""
    files, path = _filesystem(pattern, settings)
    files.invalidate_cache()
    patient = settings._replace(timeout_s=settings.timeout_s * LISTING)
    return [files.unstrip_protocol(found) for found in _call(files, "glob", patient, path)]


def _filesystem(location: str, settings: Settings) -> tuple[Any, str]:
    """(file system, path in it); file systems are kept by fsspec, for each process its own."""
    protocol = kind_of(location)
    try:
        import fsspec

        options: dict[str, Any] = {}
        if protocol in ("s3", "s3a"):
            timeouts = {"connect_timeout": settings.timeout_s, "read_timeout": settings.timeout_s}
            options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 1}}}
        files = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise UserError(
            f"{shown(location)}: {protocol}:// needs a package that is missing ({error}); "
            "pip install 'fdscale[remote]' for s3, or that package for others"
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(location)}: cannot be opened ({error}); expected a protocol of fsspec") from None
    return files, files._strip_protocol(location)


def _about(files: Any, path: str, settings: Settings) -> tuple[int | None, str]:
    files.invalidate_cache()
    info = _call(files, "info", settings, path)
    size = info.get("size")
    called = next((str(info[key]) for key in STATES if info.get(key) is not None), "")
    return (int(size) if size is not None else None), called


def _call(files: Any, name: str, settings: Settings, *args: Any, **keywords: Any) -> Any:
    """A method of the file system, with a bound on its time where it is asynchronous, as those of object stores are."""
    try:
        if files.async_impl:
            from fsspec.asyn import sync

            return sync(files.loop, getattr(files, f"_{name}"), *args, timeout=settings.timeout_s, **keywords)
        return getattr(files, name)(*args, **keywords)
    except FileNotFoundError:
        raise Trouble("is not there", 1) from None
    except PermissionError as error:
        raise Trouble(f"the store refuses it ({error})", 1) from None
    except OSError:
        raise
    except Exception as error:  # every store has errors of its own
        if type(error).__name__ == "FSTimeoutError":
            raise TimeoutError from None
        final = 1 if type(error).__name__ in NO_ACCESS else None
        raise Trouble(f"the store fails ({' '.join(str(error).split()) or type(error).__name__})", final) from None

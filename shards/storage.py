"""Where an artifact is stored: a directory on disk, or a URL that ``fsspec`` supports.

    place = location("s3://bucket/codes")                    # a Url; a path stays a Path
    read_bytes(place / "manifest.json")
    for piece in pieces(place / "00003.tar", size): ...

Paths are handled by :mod:`shards.files`. A put to an object store is atomic too: a reader sees the old object or the
complete new one. Credentials are those that ``s3fs`` and ``gcsfs`` find.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from shards import files
from shards.errors import ArtifactError, one_line

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds to wait before each retry
SILENCE = 30.0  # seconds without a byte, after which a web server's connection counts as broken
PIECE = 8 * 2**20  # bytes per request
SMALLEST_PIECE = 2**12  # bytes per request over a connection that breaks
CONNECTIONS = 8  # parallel requests for many small files
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of this package, by scheme
READ_ONLY = ("http", "https")
NO_BUCKET = re.compile("bucket does not exist|NoSuchBucket", re.IGNORECASE)
ANOTHER_REGION = re.compile(r"region|specified endpoint|PermanentRedirect|location constraint", re.IGNORECASE)


class Url(str):
    """The address of a directory or file; ``/`` appends a name."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self}/{name}")

    @property
    def scheme(self) -> str:
        """The part before ``://``."""
        return self.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.rpartition("/")[2]

    def with_name(self, name: str) -> Url:
        """Return the address of another name in the same directory."""
        return Url(f"{self.rpartition('/')[0]}/{name}")


Location = Path | Url


def is_url(text: str) -> bool:
    """Return whether ``text`` is a URL for fsspec (``https://…``, ``s3://…``) rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", text) is not None


def location(place: str | os.PathLike[str]) -> Location:
    """Return the location that a path or URL names; ``file://`` is a path."""
    text = os.fspath(place)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return Url(text.rstrip("/")) if is_url(text) else Path(text)


def read_bytes(place: Location) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: it is missing.
        OSError: a file on disk cannot be read.
        ArtifactError: a URL cannot be read.
    """
    if isinstance(place, Path):
        with files.open_regular(place) as file:
            return file.read()
    data: bytes = _call(place, "read", lambda filesystem, path: filesystem.cat_file(path))
    return data


def write_text(place: Location, text: str, *, errors: str = "strict") -> None:
    """Write a UTF-8 file atomically."""
    if isinstance(place, Path):
        files.write_text(place, text, errors=errors)
    else:
        data = text.encode("utf-8", errors)
        _call(place, "written", lambda filesystem, path: filesystem.pipe_file(path, data))


def write_json(place: Location, values: Any) -> None:
    """Write a JSON file atomically; see :func:`shards.files.write_json`."""
    write_text(place, files.json_text(values))


def put(file: Path, url: Url) -> None:
    """Copy a file on disk to a URL."""
    _call(url, "written", lambda filesystem, path: filesystem.put_file(os.fspath(file), path))


def remove(urls: Sequence[Url]) -> None:
    """Remove files, in any order; missing ones are no error."""

    def remove_one(url: Url) -> None:
        with suppress(FileNotFoundError):
            _call(url, "removed", lambda filesystem, path: filesystem.rm_file(path))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(remove_one, urls))


def size(place: Location) -> int:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: it is missing.
    """
    if isinstance(place, Path):
        return place.stat().st_size
    bytes_: int | None = _info(place)["size"]
    if bytes_ is None:
        raise ArtifactError(f"{place}: its server does not report its size")
    return bytes_


def is_file(place: Location) -> bool:
    """Return whether there is a file."""
    if isinstance(place, Path):
        return place.is_file()
    try:
        return bool(_info(place)["type"] == "file")
    except FileNotFoundError:
        return False


def _info(url: Url) -> dict[str, Any]:
    info: dict[str, Any] = _call(url, "read", lambda filesystem, path: filesystem.info(path))
    return info


def entries(url: Url) -> dict[str, int]:
    """Return the names in a directory at a URL, with the bytes of each; none if it is missing.

    Raises:
        ArtifactError: its bucket is missing, or it cannot be listed.
    """
    try:
        own, items = _call(url, "listed", lambda filesystem, path: (path, filesystem.ls(path, detail=True)))
    except FileNotFoundError:
        return {}
    sizes = {item["name"].strip("/"): item.get("size") or 0 for item in items}
    sizes.pop(own.strip("/"), None)  # a store may list the directory itself
    return {name.rpartition("/")[2]: bytes_ for name, bytes_ in sizes.items()}


def pieces(url: Url, size: int) -> Iterator[bytes]:
    """Yield the bytes of a file at a URL, in pieces.

    A broken connection is resumed where it broke. fsspec resumes S3 but not HTTP, so pieces are requested here,
    smaller ones after each failure.

    Raises:
        FileNotFoundError: it is missing.
        ArtifactError: it has fewer bytes, or cannot be read.
    """
    at, most = 0, PIECE

    def read(filesystem: Any, path: str) -> bytes:
        nonlocal most
        end, asked = min(at + most, size), most
        most = max((end - at) // 4, SMALLEST_PIECE)
        data: bytes = filesystem.cat_file(path, start=at, end=end)
        most = asked
        return data  # the entire file from a server without range requests

    while at < size:
        data = _call(url, "read", read)
        if not data:
            raise _shorter(url)
        yield data
        at += len(data)


def _call(url: Url, verb: str, action: Callable[[Any, str], T]) -> T:
    """Return ``action(filesystem, path)``, repeated while the connection fails.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        ArtifactError: anything else.
    """
    filesystem, path = open_filesystem(url)
    for wait in (*WAITS, None):
        try:
            return action(filesystem, path)
        except Exception as error:  # each kind of storage has its own errors
            fault = _fault(url, verb, error)
            if fault is None and wait is None:
                tries = len(WAITS) + 1
                reason = one_line((isinstance(error, FileNotFoundError) and error.__cause__) or error)
                fault = ArtifactError(f"{url} cannot be {verb} after {tries} tries: {reason}")
            if fault is not None:
                raise fault from error
        time.sleep(wait or 0.0)
    raise AssertionError


def open_filesystem(url: Url) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; opens no connection.

    Raises:
        ArtifactError: it has an unsupported kind of URL, or one whose package is not installed.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write, too
    if url.scheme in READ_ONLY:
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(url.scheme)
        advice = f"pip install 'dpar[{extra}]'" if extra else one_line(error)
        raise ArtifactError(f"{url}: {url.scheme}:// needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise ArtifactError(f"{url}: this kind of URL is not supported ({one_line(error)})") from error
    return filesystem, path


def _fault(url: Url, verb: str, error: Exception) -> Exception | None:
    """Return the error for the user; None if another try may succeed."""
    text, cause = one_line(error), error.__cause__
    words = text.replace(url.partition("://")[2], "")  # the user's own names are no evidence
    status = getattr(error, "status", getattr(cause, "status", None))  # of HTTP
    kind = type(error).__name__
    if isinstance(error, ArtifactError):
        return error
    moved = ANOTHER_REGION.search(words) and not isinstance(error, FileNotFoundError)  # whose text gives names
    if moved or getattr(error, "errno", None) == getattr(errno, "EREMCHG", -1):
        return ArtifactError(
            f"{url} cannot be {verb}: its bucket is in another region, or at another endpoint ({text}). Set "
            "AWS_DEFAULT_REGION to the region of the bucket"
        )
    if status == 416 or "InvalidRange" in str(cause) or "range is not satisfiable" in text:
        return _shorter(url)
    if isinstance(error, FileNotFoundError):
        if cause is not None and status is None and type(cause).__module__.startswith("aiohttp"):
            return None  # fsspec raises this if a server does not respond
        if NO_BUCKET.search(words) or (verb == "written" and error.filename is None):  # gcsfs does not say which
            return ArtifactError(f"{url} cannot be {verb}: there is no such bucket. Create it, or name another one")
        return FileNotFoundError(errno.ENOENT, "no such file", str(url))
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in kind:
        return ArtifactError(
            f"{url} cannot be {verb}: permission denied ({text}). Check the credentials and their permissions"
        )
    if isinstance(error, NotImplementedError):
        return ArtifactError(f"{url} cannot be {verb}: {url.scheme}:// does not support that")
    return None


def _shorter(url: Url) -> ArtifactError:
    return ArtifactError(f"{url} has fewer bytes than its manifest says: it was replaced or truncated")

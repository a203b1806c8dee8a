"""A file read over the network through fsspec, that goes on where a connection broke off.

    file = RemoteFile(look_up("https://example.org/train-000.tar"))
    file.seek(10_000)
    file.read(512)

Whatever fsspec reads: ``https://``, ``s3://`` with s3fs, ``gs://`` with gcsfs. Credentials come from where those look.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.runtime.errors import StageError

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each new try of a read that broke off."""

CHUNK = 8 * 2**20
"""Bytes asked for at a time."""

# What tells one version of a file from another, by the names that HTTP servers and object stores use.
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "last_modified")


@dataclass(frozen=True)
class Remote:
    """A file at a URL as it was when it was looked up: its size in bytes, and what tells its versions apart."""

    url: str
    size: int
    version: str


def look_up(url: str, waits: Sequence[float] = WAITS) -> Remote:
    """The size and version of the file at a URL; reads none of it.

    Raises:
        StageError: not there, not allowed, no such kind of URL, or no answer after ``len(waits) + 1`` tries.
    """
    for tried, wait in enumerate([0.0, *waits], start=1):
        time.sleep(wait)
        try:
            return _look_up(url)
        except StageError:
            raise
        except Exception as error:  # every kind of storage has errors of its own
            if tried > len(waits):
                raise StageError(f"{url}: cannot be reached after {tried} tries ({_one_line(error)})") from error
    raise AssertionError


class RemoteFile:
    """The bytes of a file at a URL, in any order; holds `CHUNK` of them at a time.

    Args:
        remote: the file, looked up before.
        waits: seconds to wait before each new try of a read that broke off.
    """

    def __init__(self, remote: Remote, waits: Sequence[float] = WAITS) -> None:
        self.size = remote.size
        self._remote, self._waits = remote, tuple(waits)
        self._position = 0
        self._chunk, self._chunk_start = b"", 0
        self._file: Any = None

    def seek(self, offset: int, /) -> None:
        """Goes to a byte."""
        self._position = offset

    def tell(self) -> int:
        """The number of the next byte."""
        return self._position

    def read(self, n: int, /) -> bytes:
        """The next ``n`` bytes, fewer at the end.

        Raises:
            StageError: it broke off too often, or the file is another one now.
        """
        pieces = []
        n = min(n, self.size - self._position)
        while n > 0:
            at = self._position - self._chunk_start
            if not 0 <= at < len(self._chunk):
                self._chunk, self._chunk_start, at = self._fetch(self._position), self._position, 0
            piece = self._chunk[at : at + n]
            pieces.append(piece)
            self._position += len(piece)
            n -= len(piece)
        return b"".join(pieces)

    def check_unchanged(self) -> None:
        """Raises StageError where the file at the URL is not the one that was looked up."""
        now = look_up(self._remote.url, self._waits)
        if now != self._remote:
            raise StageError(
                f"{now.url}: has changed since it was listed (it had {self._remote.size} bytes and has {now.size}); "
                "run again with --overwrite to start anew"
            )

    def _fetch(self, start: int) -> bytes:
        url, end = self._remote.url, min(start + CHUNK, self.size)
        waits = [0.0, *self._waits]
        for wait in waits:
            time.sleep(wait)
            try:
                if self._file is None:
                    self.check_unchanged()
                    self._file = _open(url)
                self._file.seek(start)
                chunk: bytes = self._file.read(end - start)
                if chunk:
                    return chunk
                error: Exception = OSError("no bytes came")
            except StageError:
                raise
            except ValueError as refused:
                raise StageError(
                    f"{url}: cannot be read from the middle ({_one_line(refused)}); download it first and give its path"
                ) from refused
            except Exception as broken:  # each kind of storage breaks off in its own way
                error = broken
            self._file = None
        raise StageError(
            f"{url}: broke off at byte {start} after {len(waits)} tries ({_one_line(error)}); finished shards are "
            "kept, run the same command again"
        ) from error


def _look_up(url: str) -> Remote:
    try:
        filesystem, path = _filesystem(url)
        info = filesystem.info(path)
    except FileNotFoundError as error:
        # fsspec says this of a server that cannot be reached, too.
        if error.__cause__ is not None and getattr(error.__cause__, "status", None) not in (403, 404, 410):
            raise ConnectionError(_one_line(error.__cause__)) from error
        raise StageError(f"{url}: no such file") from error
    except PermissionError as error:
        raise StageError(f"{url}: no permission to read it ({_one_line(error)})") from error
    if info.get("size") is None:
        raise StageError(f"{url}: its server does not say how many bytes it has; download it first and give its path")
    version = {name: str(info[name]) for name in _VERSION_FIELDS if info.get(name)}
    return Remote(url, int(info["size"]), repr(version))


def _open(url: str) -> Any:
    filesystem, path = _filesystem(url)
    return filesystem.open(path, "rb", cache_type="none")


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        # Listings are not cached: whether a file has changed is asked anew each time.
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise StageError(f"{url}: {_one_line(error)}") from error
    except ValueError as error:
        raise StageError(f"{url}: no such kind of URL ({_one_line(error)})") from error
    return filesystem, path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

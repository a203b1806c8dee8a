"""A file read over the network through fsspec; reading resumes after a lost connection.

    file = RemoteFile(look_up("https://example.org/train-000.tar"))
    file.seek(10_000)
    file.read(512)

It reads every kind of URL of fsspec: ``https://``, ``s3://`` with s3fs, ``gs://`` with gcsfs, with their credentials.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.runtime.errors import StageError
from shards import storage
from shards.errors import ArtifactError, one_line
from shards.storage import PIECE, WAITS

# Fields by which HTTP servers and object stores identify the version of a file.
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "last_modified")


@dataclass(frozen=True)
class Remote:
    """A file at a URL when it was looked up: its size in bytes and its version."""

    url: str
    size: int
    version: str


def look_up(url: str, waits: Sequence[float] = WAITS) -> Remote:
    """Return the size and version of the file at a URL; reads none of it.

    Raises:
        StageError: it does not exist, is not permitted, has an unsupported kind of URL, or does not respond in
            ``len(waits) + 1`` attempts.
    """
    for attempt, wait in enumerate([0.0, *waits], start=1):
        time.sleep(wait)
        try:
            return _look_up(url)
        except StageError:
            raise
        except Exception as error:  # each kind of storage has its own errors
            if attempt > len(waits):
                raise StageError(f"{url}: cannot be reached after {attempt} tries ({one_line(error)})") from error
    raise AssertionError


class RemoteFile:
    """The bytes of a file at a URL, in any order; keeps `PIECE` of them in memory.

    Args:
        remote: the file.
        waits: seconds to wait before each retry of a failed read.
    """

    def __init__(self, remote: Remote, waits: Sequence[float] = WAITS) -> None:
        self.size = remote.size
        self._remote, self._waits = remote, tuple(waits)
        self._position = 0
        self._chunk, self._chunk_start = b"", 0
        self._file: Any = None

    def seek(self, offset: int, /) -> None:
        """Set the position."""
        self._position = offset

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, n: int, /) -> bytes:
        """Return the next ``n`` bytes, fewer at the end.

        Raises:
            StageError: all attempts failed, or the file has changed.
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
        """Raise StageError if the file at the URL has changed since it was looked up."""
        now = look_up(self._remote.url, self._waits)
        if now != self._remote:
            raise StageError(
                f"{now.url}: has changed since it was listed (it had {self._remote.size} bytes and has {now.size}); "
                "run again with --overwrite to start over"
            )

    def _fetch(self, start: int) -> bytes:
        url, end = self._remote.url, min(start + PIECE, self.size)
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
                error: Exception = OSError("no bytes received")
            except StageError:
                raise
            except ValueError as refused:
                raise StageError(
                    f"{url}: cannot be read from the middle ({one_line(refused)}); download it first and give its path"
                ) from refused
            except Exception as broken:  # each kind of storage fails in its own way
                error = broken
            self._file = None
        raise StageError(
            f"{url}: broke off at byte {start} after {len(waits)} tries ({one_line(error)}); finished shards are "
            "kept, run the same command again"
        ) from error


def _look_up(url: str) -> Remote:
    try:
        filesystem, path = _filesystem(url)
        info = filesystem.info(path)
    except FileNotFoundError as error:
        # fsspec also raises this if the server cannot be reached.
        if error.__cause__ is not None and getattr(error.__cause__, "status", None) not in (403, 404, 410):
            raise ConnectionError(one_line(error.__cause__)) from error
        raise StageError(f"{url}: no such file") from error
    except PermissionError as error:
        raise StageError(f"{url}: no permission to read it ({one_line(error)})") from error
    if info.get("size") is None:
        raise StageError(f"{url}: its server does not report its size; download it first and give its path")
    version = {name: str(info[name]) for name in _VERSION_FIELDS if info.get(name)}
    return Remote(url, int(info["size"]), repr(version))


def _open(url: str) -> Any:
    filesystem, path = _filesystem(url)
    return filesystem.open(path, "rb", cache_type="none")


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return storage.open_filesystem(storage.Url(url))
    except ArtifactError as error:
        raise StageError(str(error)) from error

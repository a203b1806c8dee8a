"""The members of a tar: names, offsets and sizes from its headers, without unpacking.

    with open("train.tar", "rb", buffering=0) as file:
        for member in members(Extent(file.fileno(), 0, size), "train.tar"):
            ...                                              # a Member, or LeftOut with the reason

Headers are not trusted: none can make this process allocate, loop or read outside the tar. A tar without a proper end
is an error, since members may be missing.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Protocol, cast

from pipeline.runtime.errors import StageError
from pipeline.sources.decode import MAX_BYTES, TOO_MANY_BYTES
from pipeline.sources.source import source_lost, valid_text
from shards.files import open_regular
from shards.manifest import LeftOut

MAX_HEADER = 2**20  # maximum bytes of the headers of one member, including long names
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Bytes(Protocol):
    """A seekable file of known size. A read returns all requested bytes, up to the end."""

    size: int

    def read(self, n: int, /) -> bytes:
        """Return the next ``n`` bytes."""

    def seek(self, offset: int, /) -> object:
        """Set the position."""

    def tell(self) -> int:
        """Return the position."""


class Extent:
    """A range of an open local file, used as a file, such as a tar in a tar."""

    def __init__(self, descriptor: int, start: int, size: int, changed: int = 0) -> None:
        self._descriptor, self._start, self.size = descriptor, start, size
        self.version = (size, changed)  # bytes, and nanoseconds
        self._position = 0

    def part(self, start: int, size: int) -> Extent:
        """Return a range within this range."""
        return Extent(self._descriptor, self._start + start, size)

    def read(self, n: int, /) -> bytes:
        """Return the next ``n`` bytes."""
        n = max(0, min(n, self.size - self._position))
        pieces = []
        while n:
            piece = os.pread(self._descriptor, n, self._start + self._position)
            if not piece:
                break
            pieces.append(piece)
            self._position += len(piece)
            n -= len(piece)
        return b"".join(pieces)

    def seek(self, offset: int, /) -> None:
        """Set the position."""
        self._position = offset

    def tell(self) -> int:
        """Return the position."""
        return self._position


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name with slashes, without a leading ``./``, its first byte, its size."""

    name: str
    offset: int
    size: int


def members(file: Bytes, tar: str) -> Iterator[Member | LeftOut]:
    """Yield the regular files of a tar in order, and LeftOut for other entries; skip folders and hidden files.

    The caller may read a member's bytes from ``file`` between two steps.

    Args:
        file: the tar, uncompressed.
        tar: its name, for messages.

    Raises:
        StageError: not a tar, compressed, damaged, or truncated.
    """
    headers = _Headers(file, tar)
    where = 0
    try:
        archive = tarfile.TarFile(fileobj=cast(IO[bytes], headers), encoding="utf-8", errors="surrogateescape")
        while (header := archive.next()) is not None:
            # With a negative size, older versions of tarfile loop forever.
            if archive.offset <= where:
                raise StageError(f"{tar}: damaged at byte {where}: a member of negative size")
            where = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
            if where > file.size:
                raise StageError(
                    f"{tar}: ends at byte {file.size}, but {valid_text(header.name)!r} claims to end at byte "
                    f"{header.offset_data + header.size}; the tar is truncated or damaged: download or copy it again"
                )
            if (member := _member(header)) is not None:
                yield member
            headers.next_member()
        where = archive.offset
        file.seek(where)
        end = file.read(_BLOCK)
    except (StageError, GeneratorExit):
        raise
    except OSError as error:
        raise source_lost(tar, error) from error
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise StageError(f"{tar}: {_what_is_wrong(file, where, error)}") from error
    if len(end) < _BLOCK:
        raise StageError(
            f"{tar}: ends at byte {file.size} without an end marker; it is truncated: download or copy it again"
        )
    if end.strip(b"\0"):
        raise StageError(f"{tar}: damaged at byte {where}: expected a header; download or copy it again")


def read_member(path: str, version: tuple[int, int], offset: int, size: int) -> bytes:
    """Return the bytes of a member of a local tar, whose size and modification time must still be ``version``.

    Raises:
        StageError: the tar is gone or has changed.
    """
    try:
        # Opened each time, which is cheap compared with decoding: nothing to share between threads, pickle or close.
        with open_regular(path) as file:
            data = Extent(file.fileno(), offset, size).read(size)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise source_lost(path, error) from error
    if (status.st_size, status.st_mtime_ns) != version or len(data) != size:
        resized = f"has {status.st_size} bytes, but had {version[0]} when its images were listed"
        now = resized if status.st_size != version[0] else "has changed since its images were listed"
        raise StageError(
            f"{path}: {now}. Finished shards are kept: "
            "put the original tar back and run the same command again, or start over with --overwrite"
        )
    return data


def _member(header: tarfile.TarInfo) -> Member | LeftOut | None:
    name = header.name
    while name.startswith("./"):
        name = name[2:]
    parts = name.split("/")
    if header.isdir() or any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts):
        return None
    reason = None
    if name.startswith("/"):
        reason = "absolute name in a tar"
    elif ".." in parts:
        reason = "name with '..' in a tar"
    elif header.issym() or header.islnk():
        reason = "link in a tar: not followed"
    elif header.issparse():
        reason = "sparse file in a tar"
    elif not header.isreg():
        reason = "not a regular file"
    elif header.size > MAX_BYTES:
        reason = TOO_MANY_BYTES
    return Member(name, header.offset_data, header.size) if reason is None else LeftOut(valid_text(name), reason)


def _what_is_wrong(file: Bytes, where: int, error: Exception) -> str:
    at_end = file.tell() >= file.size
    file.seek(0)
    head = file.read(_BLOCK)
    for signature, name in _COMPRESSED.items():
        if head.startswith(signature):
            return f"compressed with {name}, without random access and with little gain for images: decompress it first"
    if where == 0:
        return "not a tar" if len(head) == _BLOCK else f"not a tar: {len(head)} bytes"
    if at_end:
        return f"ends at byte {file.size} in the middle of a member; it is truncated: download or copy it again"
    return f"damaged at byte {where} ({type(error).__name__}: {error}); download or copy it again"


class _Headers:
    """The file that tarfile reads headers from: refuses a long name that claims gigabytes."""

    def __init__(self, file: Bytes, tar: str) -> None:
        self._file, self._tar = file, tar
        self._left = MAX_HEADER

    def next_member(self) -> None:
        self._left = MAX_HEADER

    def read(self, n: int) -> bytes:
        if n > self._left:
            raise StageError(
                f"{self._tar}: damaged at byte {self._file.tell()}: a header of more than {MAX_HEADER} bytes"
            )
        self._left -= n
        return self._file.read(n)

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

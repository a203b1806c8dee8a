"""The memory-mapped shards of an artifact: the offset of each row's arrays in an Arrow file and in a tar.

    shard = ArrowShard(path, info, columns_of(manifest))     # ValueError: it differs from the manifest
    shard.keys(rows), shard.labels[rows], shard.offsets["codes"]

Types, bounds and sizes are checked before any data is read. Tars are parsed here because the webdataset library reads
them sequentially through ``tarfile``, without random access and at a tenth of the speed.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.files import require_regular
from shards.manifest import Manifest, ShardInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Column:
    """The values of an array column, per row."""

    dtype: np.dtype[Any]
    width: int

    @property
    def bytes(self) -> int:
        """Bytes per row."""
        return self.width * self.dtype.itemsize


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """Return the array columns of an artifact's shards."""
    width = manifest.views * manifest.n_tokens
    columns = {"codes": Column(dtype=np.dtype("<u2"), width=width)}
    if manifest.kind == "patches":
        columns["entropy"] = Column(dtype=np.dtype("<f2"), width=width)
        columns["starts"] = Column(dtype=np.dtype("u1"), width=-(-width // 8))
    return columns


class Shard(ABC):
    """A memory-mapped shard and the offsets of its rows; the subclasses parse the two file formats."""

    labels: NDArray[np.int32]  # (rows,)
    offsets: dict[str, NDArray[np.int64]]  # per array column (rows,): first byte of each row

    def __init__(self, path: Path, info: ShardInfo, columns: dict[str, Column]) -> None:
        """Map ``path`` and parse its structure.

        Raises:
            ValueError: it differs from the manifest.
        """
        require_regular(path)
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self.map, np.uint8)
        self.columns = columns
        self.n_rows = info.rows
        self._parse()

    @abstractmethod
    def _parse(self) -> None:
        """Set ``labels`` and ``offsets``, and check the file's structure."""

    @abstractmethod
    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of some rows."""

    def column(self, name: str) -> NDArray[Any]:
        """Return a copy of an array column, (rows, width)."""
        column = self.columns[name]
        values = np.empty((self.n_rows, column.bytes), np.uint8)
        for row, offset in enumerate(self.offsets[name].tolist()):
            values[row] = self.bytes[offset : offset + column.bytes]
        return values.view(column.dtype)

    def advise(self, name: str) -> None:
        """Advise the system how the map is used (``WILLNEED``, ``DONTNEED``), if it supports that."""
        advice = getattr(mmap, f"MADV_{name}", None)
        if advice is not None:
            self.map.madvise(advice)


class ArrowShard(Shard):
    """An Arrow IPC file of one record batch."""

    def _parse(self) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self.map)))
        if reader.num_record_batches != 1:
            raise ValueError(f"it holds {reader.num_record_batches} record batches, not 1")
        types = {"key": pa.string(), "label": pa.int32()}
        types |= {name: pa.list_(pa.from_numpy_dtype(c.dtype), c.width) for name, c in self.columns.items()}
        for name, expected in types.items():
            if (actual := reader.schema.field(name).type) != expected:
                raise ValueError(f"its {name} are {actual}, not {expected}")
        batch = reader.get_batch(0)
        batch.validate(full=True)  # before any data is read: offsets and sizes may point anywhere
        if batch.num_rows != self.n_rows:
            raise ValueError(f"it holds {batch.num_rows} rows; the manifest says {self.n_rows}")
        base = self.bytes.ctypes.data
        self.offsets = {}
        for name, column in self.columns.items():
            values = batch.column(name).flatten().to_numpy(zero_copy_only=True)
            if values.size != self.n_rows * column.width:
                raise ValueError(f"it holds {values.size} values of {name}")
            first = values.ctypes.data - base if values.size else 0
            if not 0 <= first <= len(self.bytes) - values.nbytes:
                raise ValueError(f"its {name} are compressed")
            self.offsets[name] = first + np.arange(self.n_rows) * column.bytes
        for name in ("key", "label"):
            if batch.column(name).null_count:
                raise ValueError(f"a row has no {name}")
        self._keys = batch.column("key")
        self.labels = batch.column("label").to_numpy(zero_copy_only=False).copy()

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        keys: list[str] = self._keys.take(rows).to_pylist()
        return keys

    def column(self, name: str) -> NDArray[Any]:
        """See :class:`Shard`."""
        column = self.columns[name]
        first = int(self.offsets[name][0]) if self.n_rows else 0
        values = self.bytes[first : first + self.n_rows * column.bytes]
        return values.reshape(self.n_rows, column.bytes).copy().view(column.dtype)


class TarShard(Shard):
    """A WebDataset tar; its members are uncompressed, so their arrays are read in place."""

    def _parse(self) -> None:
        self.advise("WILLNEED")  # its headers are spread over the file
        members = _members(self.map)
        for field in {"json", *(f"{name}.npy" for name in self.columns), *members}:
            count = len(members.get(field, ()))
            if count != self.n_rows:
                raise ValueError(f"it holds {count} of {field}; the manifest says {self.n_rows} rows")
        self.offsets = {name: self._arrays(name, members[f"{name}.npy"]) for name in self.columns if self.n_rows}
        for name in self.columns:
            self.offsets.setdefault(name, np.zeros(0, np.int64))
        self._json = np.array(members.get("json", []), np.int64).reshape(-1, 2)
        self.labels = np.array([self._key_and_label(row)[1] for row in range(self.n_rows)], np.int32)

    def _arrays(self, name: str, members: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Return the offsets of the values in a column's ``.npy`` members, which must all have the same header."""
        column, at = self.columns[name], np.array(members, np.int64)
        start, size = members[0]
        stream = io.BytesIO(self.map[start : start + size])
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"its {name} are in another version of npy")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        head = stream.tell()
        if dtype != column.dtype or math.prod(shape) != column.width or fortran or size != head + column.bytes:
            raise ValueError(f"its {name} are {shape} {dtype}, not {column.width} {column.dtype}")
        heads = self.bytes[at[:, :1] + np.arange(head)] if (at[:, 1] == size).all() else None
        if heads is None or (heads != heads[0]).any():
            raise ValueError(f"its {name} are not all of one shape")
        return at[:, 0] + head

    def _key_and_label(self, row: int) -> tuple[str, int]:
        start, size = self._json[row]
        values = json.loads(self.map[start : start + size])
        key, label = values["key"], values["label"]
        if not isinstance(key, str) or type(label) is not int:
            raise ValueError(f"row {row} has the key {key!r} and the label {label!r}")
        if not key.isascii():
            key.encode()  # JSON can spell lone surrogates, which UTF-8 cannot
        return key, label

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        return [self._key_and_label(int(row))[0] for row in rows]


def _members(tar: mmap.mmap) -> dict[str, list[tuple[int, int]]]:
    """Return first byte and size of a tar's members by extension; much faster than ``tarfile`` on plain members."""
    members: dict[str, list[tuple[int, int]]] = {}
    at, end = 0, len(tar)
    while at + 512 <= end:
        header = tar[at : at + 512]
        if header[0] == 0:  # the end mark
            return members
        if header[156:157] != b"0" or header[257:262] != b"ustar":
            raise ValueError(f"byte {at} is not the header of a plain file")
        if not header[124:135].isdigit():  # int() also accepts signs
            raise ValueError(f"the size at byte {at + 124} is not a number in octal")
        size = int(header[124:135], 8)
        at += 512
        if at + size > end:
            break
        field = header[:100].rstrip(b"\0").decode("ascii").split(".", 1)[1]
        members.setdefault(field, []).append((at, size))
        at += -(-size // 512) * 512
    raise ValueError("it ends before its end mark")

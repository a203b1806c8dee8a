"""Reading an artifact: random access over its shards, by memory map, whichever container they are in.

artifact = open_artifact("patches/", kind="patches", verify=True)
artifact.manifest.rows, artifact.manifest.class_names
batch = artifact.gather(rows, views)                     # Batch of (B, N) arrays
rows = artifact.shard_rows(3)                            # a whole shard

A shard is looked through by memory map once; after that the drawn rows alone are read, at their places in the file.
Reading them through the map would be no faster, and the system keeps up to 2 MB of the file resident for each row.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import ArtifactError
from shards.files import require_regular
from shards.manifest import Kind, Manifest, ShardInfo, file_sha256
from shards.rows import Rows, unpack_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_OPEN = 4096  # shards; each holds two file descriptors
HASHING = min(8, os.cpu_count() or 1)  # threads


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One view each of some images."""

    labels: NDArray[np.int64]  # (B,)
    codes: NDArray[np.int64]  # (B, N)
    entropy: NDArray[np.float16] | None  # (B, N), patches only, and only where asked for
    starts: NDArray[np.bool_] | None  # (B, N), patches only

    def part(self, first: int, last: int) -> Batch:
        """Images ``first`` to ``last``, the latter not among them; shares memory."""
        return Batch(
            labels=self.labels[first:last],
            codes=self.codes[first:last],
            entropy=None if self.entropy is None else self.entropy[first:last],
            starts=None if self.starts is None else self.starts[first:last],
        )


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Some batches of one artifact as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Batch(
        labels=np.concatenate([part.labels for part in parts]),
        codes=np.concatenate([part.codes for part in parts]),
        entropy=None if first.entropy is None else np.concatenate([part.entropy for part in parts]),
        starts=None if first.starts is None else np.concatenate([part.starts for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One view each of some images, as it is stored."""

    labels: NDArray[np.int32]  # (R,)
    codes: NDArray[np.uint16]  # (R, N)
    entropy: NDArray[np.float16] | None  # (R, N)
    packed: NDArray[np.uint8] | None  # (R, …) the bytes that hold a view's bits
    first_bit: NDArray[np.int64]  # (R,) where in the first of these bytes they begin

    def batch(self, at: NDArray[np.int64] | slice) -> Batch:
        """Some of them as training takes them."""
        codes = self.codes[at].astype(np.int64)
        starts = None
        if self.packed is not None:
            bits, n = np.unpackbits(self.packed[at], axis=1, bitorder="big"), codes.shape[1]
            if n % 8:
                bits = np.take_along_axis(bits, self.first_bit[at][:, None] + np.arange(n), axis=1)
            starts = bits.view(np.bool_)
        return Batch(
            labels=self.labels[at].astype(np.int64),
            codes=codes,
            entropy=None if self.entropy is None else self.entropy[at],
            starts=starts,
        )


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one array column holds of a row."""

    dtype: np.dtype[Any]
    width: int

    @property
    def bytes(self) -> int:
        """A row's."""
        return self.width * self.dtype.itemsize


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """The array columns of an artifact's shards."""
    width = manifest.views * manifest.n_tokens
    columns = {"codes": Column(dtype=np.dtype("<u2"), width=width)}
    if manifest.kind == "patches":
        columns["entropy"] = Column(dtype=np.dtype("<f2"), width=width)
        columns["starts"] = Column(dtype=np.dtype("u1"), width=-(-width // 8))
    return columns


class Shard:
    """A memory-mapped shard: where each row's arrays lie in its file. Its two kinds differ in finding that out."""

    labels_held: NDArray[np.int32]  # (rows,)
    offsets: dict[str, NDArray[np.int64]]  # (rows,) first byte of a row, for each array column

    def __init__(self, path: Path, info: ShardInfo, columns: dict[str, Column]) -> None:
        """Maps ``path`` and looks through it.

        Raises:
            ValueError: it does not hold what the manifest says.
        """
        require_regular(path)
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self.map, np.uint8)
        self.columns = columns
        self.n_rows = info.rows
        self._find()

    def _find(self) -> None:
        raise NotImplementedError

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """The images' keys."""
        raise NotImplementedError

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n,) int32."""
        return self.labels_held[rows]

    def column(self, name: str) -> NDArray[Any]:
        """(rows, width) of an array column, whole; a copy."""
        column = self.columns[name]
        found = np.empty((self.n_rows, column.bytes), np.uint8)
        for row, offset in enumerate(self.offsets[name].tolist()):
            found[row] = self.bytes[offset : offset + column.bytes]
        return found.view(column.dtype)

    def advise(self, name: str) -> None:
        """Tells the system how the map will be used, where it can be told: ``WILLNEED``, ``DONTNEED``."""
        advice = getattr(mmap, f"MADV_{name}", None)
        if advice is not None:
            self.map.madvise(advice)


class ArrowShard(Shard):
    """An Arrow IPC file of one record batch."""

    def _find(self) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self.map)))
        if reader.num_record_batches != 1:
            raise ValueError(f"it holds {reader.num_record_batches} record batches, not 1")
        types = {"key": pa.string(), "label": pa.int32()}
        types |= {name: pa.list_(pa.from_numpy_dtype(c.dtype), c.width) for name, c in self.columns.items()}
        for name, needed in types.items():
            if (held := reader.schema.field(name).type) != needed:
                raise ValueError(f"its {name} are {held}, not {needed}")
        batch = reader.get_batch(0)
        batch.validate(full=True)  # before anything is read: offsets and sizes may lead anywhere
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
        self.labels_held = batch.column("label").to_numpy(zero_copy_only=False).copy()

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        found: list[str] = self._keys.take(rows).to_pylist()
        return found

    def column(self, name: str) -> NDArray[Any]:
        """See :class:`Shard`."""
        column = self.columns[name]
        first = int(self.offsets[name][0]) if self.n_rows else 0
        held = self.bytes[first : first + self.n_rows * column.bytes]
        return held.reshape(self.n_rows, column.bytes).copy().view(column.dtype)


class TarShard(Shard):
    """A WebDataset tar; its members are uncompressed, so their arrays are read in place."""

    def _find(self) -> None:
        self.advise("WILLNEED")  # its headers are all over it
        members = _members(self.map)
        for field in {"json", *(f"{name}.npy" for name in self.columns), *members}:
            held = len(members.get(field, ()))
            if held != self.n_rows:
                raise ValueError(f"it holds {held} of {field}; the manifest says {self.n_rows} rows")
        self.offsets = {name: self._arrays(name, members[f"{name}.npy"]) for name in self.columns if self.n_rows}
        for name in self.columns:
            self.offsets.setdefault(name, np.zeros(0, np.int64))
        self._json = np.array(members.get("json", []), np.int64).reshape(-1, 2)
        self.labels_held = np.array([self._key_and_label(row)[1] for row in range(self.n_rows)], np.int32)

    def _arrays(self, name: str, members: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Where the values of a column's ``.npy`` members begin; all must have the same header."""
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
            key.encode()  # JSON can spell lone surrogates, which no file can hold
        return key, label

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        return [self._key_and_label(int(row))[0] for row in rows]


def _members(tar: mmap.mmap) -> dict[str, list[tuple[int, int]]]:
    """First byte and size of a tar's members by extension; many times as fast as ``tarfile`` on plain members."""
    found: dict[str, list[tuple[int, int]]] = {}
    at, end = 0, len(tar)
    while at + 512 <= end:
        header = tar[at : at + 512]
        if header[0] == 0:  # the end mark
            return found
        if header[156:157] != b"0" or header[257:262] != b"ustar":
            raise ValueError(f"byte {at} is no header of a plain file")
        if not header[124:135].isdigit():  # int() would take signs, too
            raise ValueError(f"the size at byte {at + 124} is not a number in octal")
        size = int(header[124:135], 8)
        at += 512
        if at + size > end:
            break
        field = header[:100].rstrip(b"\0").decode("ascii").split(".", 1)[1]
        found.setdefault(field, []).append((at, size))
        at += -(-size // 512) * 512
    raise ValueError("it ends before its end mark")


class Artifact:
    """A finished artifact, open for reading. Shards are mapped when first used. Any thread may read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.columns = columns_of(manifest)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._most_open = min(MOST_OPEN, _file_limit() // 4)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards,) rows up to and including each shard."""
        return np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)

    def shard(self, index: int) -> Shard:
        """Shard ``index``, open.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = self._map(index)
        shard.advise("DONTNEED")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(shard.file, 0, 0, os.POSIX_FADV_RANDOM)
        self._open[index] = shard
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return shard

    def _map(self, index: int) -> Shard:
        info = self.manifest.shards[index]
        path = self.folder / info.name
        opener = ArrowShard if self.manifest.container == "arrow" else TarShard
        try:
            return opener(path, info, self.columns)
        except FileNotFoundError:
            raise ArtifactError(f"shard {path} is missing; run the command that made {self.folder} again") from None
        except Exception as error:  # on damaged bytes Arrow, NumPy and JSON raise nearly anything
            raise ArtifactError(f"shard {path} is damaged: {_one_line(error)}") from error

    def gather(self, rows: NDArray[np.int64], views: NDArray[np.int64], *, entropy: bool = True) -> Batch:
        """View ``views[i]`` of row ``rows[i]``, for (B,) each; no other view is read.

        Args:
            rows: which images.
            views: which view of each.
            entropy: read entropies too, where there are any.
        """
        home = np.searchsorted(self.ends, rows, side="right")
        local = rows - np.concatenate([[0], self.ends])[home]
        with self._lock:
            shards = map(self.shard, home.tolist())
            drawn = self._draw(zip(shards, local.tolist(), strict=False), views, entropy)
        return drawn.batch(slice(None))

    def stream(self, shards: NDArray[np.int64], views: NDArray[np.int64]) -> Drawn:
        """The rows of some shards in their order, view ``views[i]`` of the i-th; no entropies.

        Each shard is read once, from its beginning to its end, and closed. Any thread may call it.
        """

        def rows() -> Iterator[tuple[Shard, int]]:
            for index in shards.tolist():
                shard = self._map(index)
                for row in range(shard.n_rows):
                    yield shard, row

        return self._draw(rows(), views, entropy=False)

    def _draw(self, rows: Iterable[tuple[Shard, int]], views: NDArray[np.int64], entropy: bool) -> Drawn:
        n, patches = self.manifest.n_tokens, self.manifest.kind == "patches"
        entropy = entropy and patches
        wide = -(-n // 8) + (n % 8 > 0)  # bytes that hold n bits wherever they begin
        first_bit = views * n
        labels = np.empty(len(views), np.int32)
        codes, levels, packed = [], [], []
        at = zip(rows, (first_bit * 2).tolist(), (first_bit // 8).tolist(), strict=True)
        for i, ((shard, row), skipped, byte) in enumerate(at):
            file, offsets = shard.file, shard.offsets
            labels[i] = shard.labels_held[row]
            codes.append(os.pread(file, 2 * n, offsets["codes"].item(row) + skipped))
            if entropy:
                levels.append(os.pread(file, 2 * n, offsets["entropy"].item(row) + skipped))
            if patches:
                packed.append(os.pread(file, wide, offsets["starts"].item(row) + byte))

        def column(parts: list[bytes], dtype: str, width: int) -> NDArray[Any]:
            return np.frombuffer(b"".join(parts), dtype).reshape(len(views), width)

        try:
            drawn = Drawn(
                labels=labels,
                codes=column(codes, "<u2", n),
                entropy=column(levels, "<f2", n).copy() if entropy else None,
                packed=column(packed, "u1", wide) if patches else None,
                first_bit=first_bit % 8,
            )
        except ValueError as error:  # a read came back short
            raise ArtifactError(f"a shard of {self.folder} has been cut off since it was opened") from error
        self._check_values(drawn.codes, drawn.labels, f"a shard of {self.folder}")
        return drawn

    def _check_values(self, codes: NDArray[np.uint16], labels: NDArray[np.int32], where: str) -> None:
        """Raises ArtifactError where a code or a label would be looked up past the end of a table."""
        manifest = self.manifest
        for what, values, table, end in (
            ("code", codes, "codebook ends", manifest.codebook_size - 1),
            ("label", labels, "classes end", len(manifest.class_names) - 1),
        ):
            for value in (int(values.min(initial=0)), int(values.max(initial=0))):
                if value < 0 or (value > end and values.size):
                    raise ArtifactError(
                        f"{where} holds {what} {value}; the {table} at {end}. "
                        "Run the command that made it again, from an empty directory"
                    )

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of some rows."""
        found = []
        with self._lock:
            for row in rows:
                index = int(np.searchsorted(self.ends, row, side="right"))
                local = np.array([row - (self.ends[index - 1] if index else 0)])
                found += self.shard(index).keys(local)
        return found

    def shard_rows(self, index: int) -> Rows:
        """Shard ``index``, whole: arrays of its own, so nothing of the file stays mapped. Any thread may call it."""
        manifest, shard = self.manifest, self._map(index)
        shape = (shard.n_rows, manifest.views, manifest.n_tokens)
        shard.advise("WILLNEED")
        every = np.arange(shard.n_rows)
        rows = Rows(keys=shard.keys(every), labels=shard.labels(every), codes=shard.column("codes").reshape(shape))
        self._check_values(rows.codes, rows.labels, f"shard {self.folder / manifest.shards[index].name}")
        if manifest.kind == "codes":
            return rows
        return dataclasses.replace(
            rows,
            entropy=shard.column("entropy").reshape(shape),
            starts=unpack_starts(shard.column("starts"), *shape[1:]),
        )

    def damaged(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, str]]:
        """Names of shards that are missing or not what was written, with the reason; reads every byte.

        Args:
            share: this process's number and how many share the work, each by a stripe of the shards.
        """
        indices = range(share[0], len(self.manifest.shards), share[1])
        with ThreadPoolExecutor(HASHING) as pool:
            for index, reason in zip(indices, pool.map(self._damage, indices), strict=True):
                if reason is not None:
                    yield self.manifest.shards[index].name, reason

    def _damage(self, index: int) -> str | None:
        info = self.manifest.shards[index]
        path = self.folder / info.name
        reason = _amiss(path, info, self.columns)
        if reason is not None:
            return reason
        try:
            if file_sha256(path) != info.sha256:
                return "its bytes are not those that were written (SHA-256 differs)"
            self._map(index)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        except ArtifactError as error:
            return _one_line(error.__cause__ or error)
        return None


def open_artifact(
    path: str | os.PathLike[str], kind: Kind | None = None, *, verify: bool = False, share: tuple[int, int] = (0, 1)
) -> Artifact:
    """Opens a finished artifact and checks that its shards are there and of the right size.

    Args:
        path: its directory.
        kind: what is needed; None takes any.
        verify: read every byte, too, and compare each shard's SHA-256 and columns with the manifest.
        share: with ``verify``, this process's number and how many share the work.

    Raises:
        ArtifactError: it is no artifact, not finished, of another kind, or damaged: all such shards are named.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    if kind is not None and manifest.kind != kind:
        makes = {"codes": "dpar tokenize", "patches": "dpar patchify"}[kind]
        raise ArtifactError(f"{folder} holds {manifest.kind}; {kind} are needed here, which `{makes}` makes")
    artifact = Artifact(folder, manifest)
    if verify:
        bad = list(artifact.damaged(share))
    else:
        every = ((shard.name, _amiss(folder / shard.name, shard, artifact.columns)) for shard in manifest.shards)
        bad = [(name, reason) for name, reason in every if reason is not None]
    if bad:
        shown = ", ".join(f"{name} ({reason})" for name, reason in bad[:20]) + (" …" if len(bad) > 20 else "")
        raise ArtifactError(
            f"{len(bad)} of {len(manifest.shards)} shards of {folder} are damaged: {shown}; "
            "run the command that made it again: it rebuilds only those"
        )
    return artifact


def _amiss(path: Path, info: ShardInfo, columns: dict[str, Column]) -> str | None:
    """What a look at the directory says against a shard."""
    try:
        size = require_regular(path).st_size
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be opened: {_one_line(error)}"
    if info.bytes is not None and size != info.bytes:
        return f"its size is {size} bytes, not {info.bytes}"
    if size < info.rows * sum(column.bytes for column in columns.values()):
        return f"its size is {size} bytes, too few for {info.rows} rows"
    return None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _file_limit() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows, which lets a process have some thousands
        return 2 * MOST_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * MOST_OPEN if soft == resource.RLIM_INFINITY else soft

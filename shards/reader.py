"""Read an artifact: random access to the rows of its shards, in either file format.

artifact = open_artifact("patches/", kind="patches", verify=True)
artifact.manifest.rows, artifact.manifest.class_names
batch = artifact.gather(rows, views)                     # Batch of (B, N) arrays
rows = artifact.shard_rows(3)                            # a complete shard

Shards at a URL are downloaded completely, verified, and read from local disk (:mod:`shards.cache`).
A shard is parsed through a memory map; after that only the requested rows are read, at their offsets in the file.
Reading rows through the map is not faster, and keeps up to 2 MB of the file resident per row.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.cache import ShardCache
from shards.errors import ArtifactError, one_line
from shards.files import file_sha256, require_regular
from shards.manifest import Kind, Manifest, ShardInfo
from shards.order import WINDOW
from shards.rows import Rows, unpack_starts
from shards.shard_files import ArrowShard, Column, Shard, TarShard, columns_of
from shards.storage import READ_ONLY, Location, Url, entries, location

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_OPEN = 4096  # shards; each has two file descriptors
MAX_OPEN_REMOTE = 2 * WINDOW  # an open shard occupies the disk after it has left the cache
CONNECTIONS = 4  # parallel downloads of a stream
THREADS = min(8, os.cpu_count() or 1)  # that hash shards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images, one view of each."""

    labels: NDArray[np.int64]  # (B,)
    codes: NDArray[np.int64]  # (B, N)
    entropy: NDArray[np.float16] | None  # (B, N), nats; patches only, and only on request
    starts: NDArray[np.bool_] | None  # (B, N), patches only

    def part(self, first: int, last: int) -> Batch:
        """Return images ``first`` to ``last - 1``; shares memory."""
        return Batch(
            labels=self.labels[first:last],
            codes=self.codes[first:last],
            entropy=None if self.entropy is None else self.entropy[first:last],
            starts=None if self.starts is None else self.starts[first:last],
        )


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Return batches of one artifact as one batch."""
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
    """Some images, one view of each, in the stored dtypes."""

    labels: NDArray[np.int32]  # (R,)
    codes: NDArray[np.uint16]  # (R, N)
    entropy: NDArray[np.float16] | None  # (R, N)
    packed: NDArray[np.uint8] | None  # (R, …) bytes that contain a view's bits
    first_bit: NDArray[np.int64]  # (R,) position of the view's first bit in them

    def batch(self, at: NDArray[np.int64] | slice) -> Batch:
        """Return some of the images as a training batch."""
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


class Artifact:
    """A finished artifact, open for reading. Shards are opened on first use. Thread-safe."""

    def __init__(self, folder: Location, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._cache = (cache or ShardCache.temporary()) if isinstance(folder, Url) else None
        self.columns = columns_of(manifest)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._max_open = min(MAX_OPEN if self._cache is None else MAX_OPEN_REMOTE, _file_limit() // 4)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Artifact, (self.folder, self.manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards,) int64: number of rows up to and including each shard."""
        return np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)

    def shard(self, index: int) -> Shard:
        """Return shard ``index``, open.

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
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)
        return shard

    def _map(self, index: int) -> Shard:
        info = self.manifest.shards[index]
        path = self.folder / info.name
        opener = ArrowShard if self.manifest.container == "arrow" else TarShard
        try:
            if isinstance(path, Path):
                return opener(path, info, self.columns)
            assert self._cache is not None
            with self._cache.shard(path, info) as local:
                return opener(local, info, self.columns)
        except FileNotFoundError:
            raise ArtifactError(f"shard {path} is missing; rerun the command that made {self.folder}") from None
        except ArtifactError:  # from the cache
            raise
        except Exception as error:  # Arrow, NumPy and JSON raise all kinds of errors on damaged bytes
            raise ArtifactError(f"shard {path} is damaged: {_reason(error)}") from error

    def _map_all(self, indices: Iterable[int]) -> Iterator[Shard]:
        """Yield some shards in order; those at a URL are downloaded in parallel."""
        if self._cache is None:
            yield from map(self._map, indices)
            return
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(self._map, indices)

    def gather(self, rows: NDArray[np.int64], views: NDArray[np.int64], *, entropy: bool = True) -> Batch:
        """Return view ``views[i]`` of row ``rows[i]``; reads no other view.

        Args:
            rows: (B,) int64, the images.
            views: (B,) int64, the view of each.
            entropy: also read entropies, if the artifact has them.
        """
        home = np.searchsorted(self.ends, rows, side="right")
        local = rows - np.concatenate([[0], self.ends])[home]
        with self._lock:
            shards = map(self.shard, home.tolist())
            drawn = self._draw(zip(shards, local.tolist(), strict=False), views, entropy)
        return drawn.batch(slice(None))

    def stream(self, shards: NDArray[np.int64], views: NDArray[np.int64]) -> Drawn:
        """Return all rows of some shards in order, view ``views[i]`` of the i-th; no entropies.

        Each shard is read sequentially and closed.
        """

        def rows() -> Iterator[tuple[Shard, int]]:
            for shard in self._map_all(shards.tolist()):
                for row in range(shard.n_rows):
                    yield shard, row

        return self._draw(rows(), views, entropy=False)

    def _draw(self, rows: Iterable[tuple[Shard, int]], views: NDArray[np.int64], entropy: bool) -> Drawn:
        n, patches = self.manifest.n_tokens, self.manifest.kind == "patches"
        entropy = entropy and patches
        wide = -(-n // 8) + (n % 8 > 0)  # bytes that contain n bits at any position
        first_bit = views * n
        labels = np.empty(len(views), np.int32)
        codes, levels, packed = [], [], []
        at = zip(rows, (first_bit * 2).tolist(), (first_bit // 8).tolist(), strict=True)
        for i, ((shard, row), skipped, byte) in enumerate(at):
            file, offsets = shard.file, shard.offsets
            labels[i] = shard.labels[row]
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
        except ValueError as error:  # a read returned too few bytes
            raise ArtifactError(f"a shard of {self.folder} was truncated after it was opened") from error
        self._check_values(drawn.codes, drawn.labels, f"a shard of {self.folder}")
        return drawn

    def _check_values(self, codes: NDArray[np.uint16], labels: NDArray[np.int32], where: str) -> None:
        """Raise ArtifactError if a code or a label is out of range."""
        manifest = self.manifest
        for what, values, table, end in (
            ("code", codes, "codebook ends", manifest.codebook_size - 1),
            ("label", labels, "classes end", len(manifest.class_names) - 1),
        ):
            for value in (int(values.min(initial=0)), int(values.max(initial=0))):
                if value < 0 or (value > end and values.size):
                    raise ArtifactError(
                        f"{where} has {what} {value}; the {table} at {end}. "
                        "Rerun the command that made it, with an empty directory"
                    )

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of some rows."""
        keys = []
        with self._lock:
            for row in rows:
                index = int(np.searchsorted(self.ends, row, side="right"))
                local = np.array([row - (self.ends[index - 1] if index else 0)])
                keys += self.shard(index).keys(local)
        return keys

    def shard_rows(self, index: int) -> Rows:
        """Return all rows of shard ``index`` as copies, so that the file does not stay mapped."""
        manifest, shard = self.manifest, self._map(index)
        shape = (shard.n_rows, manifest.views, manifest.n_tokens)
        shard.advise("WILLNEED")
        every = np.arange(shard.n_rows)
        rows = Rows(keys=shard.keys(every), labels=shard.labels, codes=shard.column("codes").reshape(shape))
        self._check_values(rows.codes, rows.labels, f"shard {self.folder / manifest.shards[index].name}")
        if manifest.kind == "codes":
            return rows
        return dataclasses.replace(
            rows,
            entropy=shard.column("entropy").reshape(shape),
            starts=unpack_starts(shard.column("starts"), *shape[1:]),
        )

    def damaged(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, str]]:
        """Yield the names of missing or damaged shards, with the reason; reads every byte.

        Args:
            share: this process's rank and the number of processes, which check every n-th shard each.
        """
        indices = range(share[0], len(self.manifest.shards), share[1])
        with ThreadPoolExecutor(THREADS) as pool:
            for index, reason in zip(indices, pool.map(self._damage, indices), strict=True):
                if reason is not None:
                    yield self.manifest.shards[index].name, reason

    def _damage(self, index: int) -> str | None:
        info = self.manifest.shards[index]
        path = self.folder / info.name
        try:
            if isinstance(path, Path):
                if (reason := _check_size(path, info, self.columns)) is not None:
                    return reason
                if file_sha256(path) != info.sha256:
                    return "its SHA-256 differs from the manifest's"
            self._map(index)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        except ArtifactError as error:
            return _reason(error.__cause__ or error)
        return None


def open_artifact(
    path: str | os.PathLike[str],
    kind: Kind | None = None,
    *,
    verify: bool = False,
    share: tuple[int, int] = (0, 1),
    cache: ShardCache | None = None,
    download: bool = False,
) -> Artifact:
    """Open a finished artifact and check that its shards exist and have the right size.

    Args:
        path: its directory, or the URL of one. Web servers cannot be listed, so shards there are checked when read.
        kind: the required kind; None accepts both.
        verify: also read every byte, and compare each shard's SHA-256 and columns with the manifest. A URL's shards
            are always compared, when they are downloaded.
        share: with ``verify``, this process's rank and the number of processes that share the work.
        cache: where the shards of a URL are kept; None: in a temporary directory.
        download: with ``verify``, download the shards of a URL now.

    Raises:
        ArtifactError: it is not an artifact, not finished, of another kind, or damaged; all damaged shards are named.
    """
    folder = location(path)
    manifest = Manifest.read(folder)
    if kind is not None and manifest.kind != kind:
        command = {"codes": "dpar tokenize", "patches": "dpar patchify"}[kind]
        raise ArtifactError(f"{folder} holds {manifest.kind}; {kind} are needed here, as `{command}` writes them")
    artifact = Artifact(folder, manifest, cache)
    if verify and (download or isinstance(folder, Path)):
        bad = list(artifact.damaged(share))
    elif isinstance(folder, Path):
        checked = ((shard.name, _check_size(folder / shard.name, shard, artifact.columns)) for shard in manifest.shards)
        bad = [(name, reason) for name, reason in checked if reason is not None]
    else:
        bad = [] if folder.scheme in READ_ONLY else list(_check_listing(manifest, entries(folder)))
    if bad:
        listed = ", ".join(f"{name} ({reason})" for name, reason in bad[:20]) + (" …" if len(bad) > 20 else "")
        raise ArtifactError(
            f"{len(bad)} of {len(manifest.shards)} shards of {folder} are damaged: {listed}; "
            "rerun the command that made it, which rebuilds only those"
        )
    return artifact


def _check_listing(manifest: Manifest, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the names of shards that are missing from a listing or differ in size, with the reason."""
    for info in manifest.shards:
        if info.name not in sizes:
            yield info.name, "missing"
        elif info.bytes is not None and sizes[info.name] != info.bytes:
            yield info.name, f"its size is {sizes[info.name]} bytes, not {info.bytes}"


def _check_size(path: Path, info: ShardInfo, columns: dict[str, Column]) -> str | None:
    """Return what is wrong with a shard's size; None if nothing is."""
    try:
        size = require_regular(path).st_size
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be opened: {_reason(error)}"
    if info.bytes is not None and size != info.bytes:
        return f"its size is {size} bytes, not {info.bytes}"
    if size < info.rows * sum(column.bytes for column in columns.values()):
        return f"its size is {size} bytes, too few for {info.rows} rows"
    return None


def _reason(error: BaseException) -> str:
    """Return an error's message without the path, which the caller names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def _file_limit() -> int:
    """Return how many files this process may open."""
    try:
        import resource
    except ImportError:  # Windows allows thousands
        return 2 * MAX_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * MAX_OPEN if soft == resource.RLIM_INFINITY else soft

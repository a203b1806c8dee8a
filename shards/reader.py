"""Reading an artifact: random access over its shards, by memory map, whichever container they are in.

artifact = open_artifact("patches/", kind="patches")
artifact.manifest.rows, artifact.manifest.class_names
batch = artifact.gather(rows, views)                     # Batch of (B, N) arrays
"""

from __future__ import annotations

import dataclasses
import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shards.errors import ArtifactError
from shards.manifest import Kind, Manifest, ShardInfo, file_sha256
from shards.rows import Rows, unpack_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One view each of some images."""

    labels: NDArray[np.int64]  # (B,)
    codes: NDArray[np.int64]  # (B, N)
    entropy: NDArray[np.float16] | None  # (B, N), patches only
    starts: NDArray[np.bool_] | None  # (B, N), patches only


class Shard(Protocol):
    """The columns of one shard; ``rows`` selects, in the order given."""

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """The images' keys."""

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n,) int32."""

    def column(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """(n, width) of a stored array column."""


class Artifact:
    """A finished artifact, open for reading. Shards are mapped when first used."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards,) rows up to and including each shard."""
        return np.cumsum([shard.rows for shard in self.manifest.shards], dtype=np.int64)

    def shard(self, index: int) -> Shard:
        """The columns of shard ``index``."""
        if index not in self._open:
            info = self.manifest.shards[index]
            path = self.folder / info.name
            opener = ArrowShard if self.manifest.container == "arrow" else TarShard
            try:
                self._open[index] = opener(path, info)
            except FileNotFoundError:
                raise ArtifactError(f"shard {path} is missing; run the command that made {self.folder} again") from None
            except (OSError, ValueError, tarfile.TarError, KeyError) as error:
                raise ArtifactError(f"shard {path} is damaged: {error}") from error
        return self._open[index]

    def gather(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Batch:
        """View ``views[i]`` of row ``rows[i]``, for (B,) each."""
        manifest = self.manifest
        n, count = manifest.n_tokens, len(rows)
        patches = manifest.kind == "patches"
        labels = np.empty(count, np.int64)
        codes = np.empty((count, n), np.int64)
        entropy = np.empty((count, n), np.float16) if patches else None
        starts = np.empty((count, n), np.bool_) if patches else None
        home = np.searchsorted(self.ends, rows, side="right")
        for index in np.unique(home):
            here = np.flatnonzero(home == index)
            shard, local = self.shard(int(index)), rows[here] - (self.ends[index - 1] if index else 0)
            at = (np.arange(len(here)), views[here])
            labels[here] = shard.labels(local)
            codes[here] = shard.column("codes", local).reshape(-1, manifest.views, n)[at]
            if entropy is not None and starts is not None:
                entropy[here] = shard.column("entropy", local).reshape(-1, manifest.views, n)[at]
                starts[here] = unpack_starts(shard.column("starts", local), manifest.views, n)[at]
        return Batch(labels=labels, codes=codes, entropy=entropy, starts=starts)

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of some rows."""
        found = []
        for row in rows:
            index = int(np.searchsorted(self.ends, row, side="right"))
            local = np.array([row - (self.ends[index - 1] if index else 0)])
            found += self.shard(index).keys(local)
        return found

    def shard_rows(self, index: int) -> Rows:
        """Shard ``index``, whole."""
        manifest, info, shard = self.manifest, self.manifest.shards[index], self.shard(index)
        shape = (info.rows, manifest.views, manifest.n_tokens)
        every = np.arange(info.rows)
        patches = manifest.kind == "patches"
        if info.rows == 0:  # none of its images could be used
            nothing = Rows(keys=[], labels=np.zeros(0, np.int32), codes=np.zeros(shape, np.uint16))
            if not patches:
                return nothing
            return dataclasses.replace(nothing, entropy=np.zeros(shape, np.float16), starts=np.zeros(shape, np.bool_))
        return Rows(
            keys=shard.keys(every),
            labels=shard.labels(every),
            codes=shard.column("codes", every).reshape(shape),
            entropy=shard.column("entropy", every).reshape(shape) if patches else None,
            starts=unpack_starts(shard.column("starts", every), *shape[1:]) if patches else None,
        )

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Names of shards that are missing or whose bytes have changed, with the reason; reads every byte."""
        for info in self.manifest.shards:
            path = self.folder / info.name
            if not path.is_file():
                yield info.name, "missing"
            elif file_sha256(path) != info.sha256:
                yield info.name, "its bytes are not those that were written (SHA-256 differs)"


def open_artifact(path: str | os.PathLike[str], kind: Kind | None = None) -> Artifact:
    """Opens a finished artifact and checks that its shards are there.

    Args:
        path: its directory.
        kind: what is needed; None takes any.

    Raises:
        ArtifactError: it is no artifact, not finished, of another kind, damaged, or a shard is missing.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    if kind is not None and manifest.kind != kind:
        makes = {"codes": "dpar tokenize", "patches": "dpar patchify"}[kind]
        raise ArtifactError(f"{folder} holds {manifest.kind}; {kind} are needed here, which `{makes}` makes")
    missing = [shard.name for shard in manifest.shards if not (folder / shard.name).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise ArtifactError(
            f"{folder} lacks {len(missing)} of {len(manifest.shards)} shards ({shown}); "
            "run the command that made it again"
        )
    return Artifact(folder, manifest)


class ArrowShard:
    """A memory-mapped Arrow IPC file of one record batch; columns are views of the file."""

    def __init__(self, path: Path, info: ShardInfo) -> None:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        if reader.num_record_batches != 1:
            raise ValueError(f"it holds {reader.num_record_batches} record batches, not 1")
        batch = reader.get_batch(0)
        if batch.num_rows != info.rows:
            raise ValueError(f"it holds {batch.num_rows} rows; the manifest says {info.rows}")
        self._keys = batch.column("key")
        self._labels = batch.column("label").to_numpy(zero_copy_only=False)
        self._columns = {
            name: batch.column(name)
            .flatten()
            .to_numpy(zero_copy_only=True)
            .reshape(info.rows, batch.schema.field(name).type.list_size)
            for name in batch.schema.names
            if name not in ("key", "label")
        }

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        return [self._keys[int(row)].as_py() for row in rows]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """See :class:`Shard`."""
        return self._labels[rows]

    def column(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """See :class:`Shard`."""
        return self._columns[name][rows]


class TarShard:
    """A memory-mapped WebDataset tar; its members are uncompressed, so their arrays are read in place."""

    def __init__(self, path: Path, info: ShardInfo) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._members: dict[str, list[tuple[int, int]]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _, field = member.name.split(".", 1)
                self._members.setdefault(field, []).append((member.offset_data, member.size))
        for field in {"json", "codes.npy"} | self._members.keys():
            held = len(self._members.get(field, ()))
            if held != info.rows:
                raise ValueError(f"it holds {held} of {field}; the manifest says {info.rows} rows")

    def _bytes(self, field: str, row: int) -> bytes:
        start, size = self._members[field][row]
        return self._map[start : start + size]

    def _json(self, row: int) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._bytes("json", row))
        return values

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """See :class:`Shard`."""
        return [str(self._json(int(row))["key"]) for row in rows]

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """See :class:`Shard`."""
        return np.array([self._json(int(row))["label"] for row in rows], np.int32)

    def column(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """See :class:`Shard`."""
        return np.stack([self._array(f"{name}.npy", int(row)).reshape(-1) for row in rows])

    def _array(self, field: str, row: int) -> NDArray[Any]:
        return np.lib.format.read_array(io.BytesIO(self._bytes(field, row)), allow_pickle=False)

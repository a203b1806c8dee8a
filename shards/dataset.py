"""An artifact as `torch.utils.data` datasets, to train without ``dpar train``.

    dataset = ArtifactDataset("patches")                     # map-style: any sampler, any number of workers
    loader = DataLoader(dataset, batch_size=256, shuffle=True, num_workers=4, collate_fn=collate, drop_last=True)
    for batch in loader:
        batch["codes"], batch["labels"], batch["starts"]     # (B, N) int64, (B,) int64, (B, N) bool

    stream = StreamingDataset("patches", seed=0)             # iterable: shuffles by itself
    loader = DataLoader(stream, batch_size=256, num_workers=4, collate_fn=collate)
    stream.set_epoch(1)                                      # before each epoch after the first

This is the only module of the package that needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from shards.order import StreamingOrder
from shards.reader import Artifact, open_artifact
from shards.storage import location

READ = 256  # images that a stream reads at once


class Sample(TypedDict, total=False):
    """One view of an image; the fields of a batch have a leading dimension B."""

    codes: Tensor  # (N,) int64
    labels: Tensor  # () int64
    starts: Tensor  # (N,) bool, whether a patch starts at the token; patches only


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack samples into a batch: codes (B, N), labels (B,), and starts (B, N) if they have them."""
    batch: dict[str, Tensor] = {
        name: torch.stack([sample[name] for sample in samples])  # type: ignore[literal-required]
        for name in samples[0]
    }
    return Sample(**batch)  # type: ignore[typeddict-item]


class _Reader:
    """An artifact that can be pickled: each process opens the shards itself."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = location(folder)
        artifact = open_artifact(self.folder)
        self.manifest = artifact.manifest
        self._open: tuple[int, Artifact] | None = (os.getpid(), artifact)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    @property
    def artifact(self) -> Artifact:
        """The artifact, with files that this process has opened."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), Artifact(self.folder, self.manifest))
        return self._open[1]

    def samples(self, rows: np.ndarray, views: np.ndarray) -> list[Sample]:
        """Return view ``views[i]`` of row ``rows[i]``, (B,) int64 each."""
        batch = self.artifact.gather(rows, views, entropy=False)
        codes, labels = torch.from_numpy(batch.codes), torch.from_numpy(batch.labels)
        if batch.starts is None:
            return [Sample(codes=c, labels=label) for c, label in zip(codes, labels, strict=True)]
        starts = torch.from_numpy(batch.starts)
        return [Sample(codes=c, labels=k, starts=s) for c, k, s in zip(codes, labels, starts, strict=True)]


class ArtifactDataset(Dataset[Sample]):
    """Map-style dataset of codes or patches, for any sampler, and for workers that are forked or spawned."""

    def __init__(self, folder: str | os.PathLike[str], view: int | None = None) -> None:
        """Open an artifact.

        Args:
            folder: its directory.
            view: of each image; None draws one at each access from torch's generator, which DataLoader seeds.

        Raises:
            ArtifactError: it is not an artifact, or is damaged.
            ValueError: it has no such view.
        """
        self._reader = _Reader(folder)
        self.manifest = self._reader.manifest
        if view is not None and not 0 <= view < self.manifest.views:
            raise ValueError(f"view is {view}; {folder} has views 0 to {self.manifest.views - 1}")
        self.view = view

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return several images, read together; DataLoader prefers this method if it exists."""
        rows = np.asarray(indices, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"there are {len(self)} images; {int(rows.min())} to {int(rows.max())} were requested")
        if self.view is None:
            views = torch.randint(self.manifest.views, (len(rows),)).numpy()
        else:
            views = np.full_like(rows, self.view)
        return self._reader.samples(rows, views)


class StreamingDataset(IterableDataset[Sample]):
    """Codes or patches read shard by shard, shuffled within a few of them, divided among processes and workers.

    The order of an epoch depends on the seed, not on the number of processes or workers. Every process gets the same
    number of images, because DDP waits for all of them: up to ``world_size - 1`` images per epoch are dropped.
    """

    def __init__(self, folder: str | os.PathLike[str], *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Open an artifact.

        Args:
            folder: its directory.
            seed: of the order and of the views.
            rank: this process.
            world_size: number of processes that divide each epoch.

        Raises:
            ArtifactError: it is not an artifact, or is damaged.
        """
        self._reader = _Reader(folder)
        self.manifest = self._reader.manifest
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch, from the next iteration on."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        sizes = [shard.rows for shard in self.manifest.shards]
        order = StreamingOrder(shard_rows=sizes, views=self.manifest.views, batch=1, seed=self.seed)
        epoch, passed, end = int(self._epoch), 0, order.rows - order.rows % self.world_size
        for window in range(order.n_windows):
            rows = order.mixed_rows(epoch, window)[: end - passed]
            turn, rank = np.divmod(np.arange(passed, passed + len(rows)), self.world_size)
            own = rows[(rank == self.rank) & (turn % workers == number)]
            passed += len(rows)
            for begin in range(0, len(own), READ):
                part = own[begin : begin + READ]
                yield from self._reader.samples(part, order.views_of(epoch, part))

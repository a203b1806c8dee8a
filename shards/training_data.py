"""The training data of one process: its share of every global batch, prefetched.

    with TrainingData(artifact, batch=256, seed=0, rank=rank, world_size=8) as data:
        batch = data.batch(step)                             # 32 images; the next batch is prefetched

Arrow shards are read in a global random order (:class:`shards.order.TrainingOrder`). WebDataset shards are streamed:
each is read sequentially once per epoch, and its images are mixed with those of a few other shards
(:class:`shards.order.StreamingOrder`). Shards at a URL are always streamed, because they are downloaded completely.
Either way a batch is a function of (seed, step), and the shares of all processes add up to the same global batch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from shards.order import StreamingOrder, TrainingOrder
from shards.reader import Artifact, Batch, Drawn, concatenated
from shards.storage import Url


class TrainingData:
    """An artifact's images in training order."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        streaming: bool | None = None,
    ) -> None:
        """Args:
            artifact: codes or patches, with at least one row.
            batch: images per global batch.
            seed: of the order.
            rank: this process.
            world_size: number of processes that share each batch.
            streaming: read shards sequentially; None: WebDataset shards, and those at a URL.

        Raises:
            ValueError: the batch is not divisible by the number of processes, or there are no rows.
        """
        if batch % world_size:
            raise ValueError(f"a batch of {batch} does not divide by {world_size} processes")
        manifest = artifact.manifest
        size = batch // world_size
        self.share = slice(rank * size, (rank + 1) * size)
        self.artifact = artifact
        self.order: TrainingOrder
        self._windows: _Windows | None = None
        if streaming is None:
            streaming = manifest.container == "webdataset" or isinstance(artifact.folder, Url)
        if streaming:
            sizes = [shard.rows for shard in manifest.shards]
            self.order = order = StreamingOrder(shard_rows=sizes, views=manifest.views, batch=batch, seed=seed)
            self._windows = _Windows(artifact, order)
        else:
            self.order = TrainingOrder(rows=len(artifact), views=manifest.views, batch=batch, seed=seed)
        self._prefetched: tuple[int, Future[Batch]] | None = None
        self._thread = ThreadPoolExecutor(1, "training data")

    def batch(self, step: int) -> Batch:
        """Return this process's share of global batch ``step``, and prefetch the next one.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        if self._prefetched is not None and self._prefetched[0] == step:
            batch = self._prefetched[1]
        else:
            batch = self._thread.submit(self._read, step)
        self._prefetched = (step + 1, self._thread.submit(self._read, step + 1))
        return batch.result()

    def _read(self, step: int) -> Batch:
        if self._windows is not None:
            return self._windows.batch(step, self.share)
        rows, views = self.order.batch(step)
        return self.artifact.gather(rows[self.share], views[self.share], entropy=False)

    def close(self) -> None:
        """Stop prefetching."""
        self._thread.shutdown(cancel_futures=True)
        if self._windows is not None:
            self._windows.close()

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Windows:
    """The windows of a streaming order around the last batch; only the drawn views are kept in memory."""

    def __init__(self, artifact: Artifact, order: StreamingOrder) -> None:
        self.artifact, self.order = artifact, order
        self._windows: dict[tuple[int, int], Future[Drawn]] = {}
        self._thread = ThreadPoolExecutor(1, "shards")

    def batch(self, step: int, share: slice) -> Batch:
        """Return images ``share`` of global batch ``step``, and prefetch the next window."""
        parts, passed = [], 0
        places = self.order.places(step)
        for epoch, window, at in places:
            selected = at[max(share.start - passed, 0) : max(share.stop - passed, 0)]
            passed += len(at)
            self._windows = {place: drawn for place, drawn in self._windows.items() if place >= (epoch, window)}
            if len(selected):
                parts.append(self._load(epoch, window).result().batch(selected))
        epoch, window, _ = places[-1]
        self._load(epoch, window)  # this process's share may end before it
        self._load(*((epoch, window + 1) if window + 1 < self.order.n_windows else (epoch + 1, 0)))
        return concatenated(parts)

    def _load(self, epoch: int, window: int) -> Future[Drawn]:
        if (epoch, window) not in self._windows:
            self._windows[epoch, window] = self._thread.submit(self._read, epoch, window)
        return self._windows[epoch, window]

    def _read(self, epoch: int, window: int) -> Drawn:
        views = self.order.views_of(epoch, self.order.window_rows(epoch, window))
        return self.artifact.stream(self.order.window_shards(epoch, window), views)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

"""The training data as one process takes it: its share of every global batch, read ahead.

    with TrainingData(artifact, batch=256, seed=0, rank=rank, world_size=8) as data:
        batch = data.batch(step)                             # 32 images; the next step's are being read meanwhile

Arrow shards are read in a global random order (:class:`shards.order.TrainingOrder`). WebDataset shards are streamed:
each is read once an epoch from end to end, and its images are mixed with those of a few other shards
(:class:`shards.order.StreamingOrder`). Either way a batch is a function of (seed, step), and the shares of any number
of processes are together the same global batch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from shards.order import StreamingOrder, TrainingOrder
from shards.reader import Artifact, Batch, Drawn, concatenated


class TrainingData:
    """An artifact's images in the order of one run."""

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
            batch: images of a global batch.
            seed: decides the order, with the step.
            rank: this process.
            world_size: how many share each batch.
            streaming: read shards from end to end; None: if they are WebDataset's.

        Raises:
            ValueError: the batch does not divide by the processes, or there are no rows.
        """
        if batch % world_size:
            raise ValueError(f"a batch of {batch} does not divide by {world_size} processes")
        manifest = artifact.manifest
        share = batch // world_size
        self.mine = slice(rank * share, (rank + 1) * share)
        self.artifact = artifact
        self.order: TrainingOrder
        self._windows: _Windows | None = None
        if manifest.container == "webdataset" if streaming is None else streaming:
            sizes = [shard.rows for shard in manifest.shards]
            self.order = order = StreamingOrder(shard_rows=sizes, views=manifest.views, batch=batch, seed=seed)
            self._windows = _Windows(artifact, order)
        else:
            self.order = TrainingOrder(rows=len(artifact), views=manifest.views, batch=batch, seed=seed)
        self._ahead: tuple[int, Future[Batch]] | None = None
        self._thread = ThreadPoolExecutor(1, "training data")

    def batch(self, step: int) -> Batch:
        """This process's share of global batch ``step``; begins to read the next step's.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        if self._ahead is not None and self._ahead[0] == step:
            ready = self._ahead[1]
        else:
            ready = self._thread.submit(self._read, step)
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return ready.result()

    def _read(self, step: int) -> Batch:
        if self._windows is not None:
            return self._windows.batch(step, self.mine)
        rows, views = self.order.batch(step)
        return self.artifact.gather(rows[self.mine], views[self.mine], entropy=False)

    def close(self) -> None:
        """Ends the reading ahead."""
        self._thread.shutdown(cancel_futures=True)
        if self._windows is not None:
            self._windows.close()

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Windows:
    """The windows of a streaming order around the last batch, of which only the drawn views are held."""

    def __init__(self, artifact: Artifact, order: StreamingOrder) -> None:
        self.artifact, self.order = artifact, order
        self._held: dict[tuple[int, int], Future[Drawn]] = {}
        self._thread = ThreadPoolExecutor(1, "shards")

    def batch(self, step: int, mine: slice) -> Batch:
        """Images ``mine`` of global batch ``step``; the window that follows is being read meanwhile."""
        parts, passed = [], 0
        places = self.order.places(step)
        for epoch, window, at in places:
            wanted = at[max(mine.start - passed, 0) : max(mine.stop - passed, 0)]
            passed += len(at)
            self._held = {place: held for place, held in self._held.items() if place >= (epoch, window)}
            if len(wanted):
                parts.append(self._begin(epoch, window).result().batch(wanted))
        epoch, window, _ = places[-1]
        self._begin(epoch, window)  # this process's share may end before it
        self._begin(*((epoch, window + 1) if window + 1 < self.order.n_windows else (epoch + 1, 0)))
        return concatenated(parts)

    def _begin(self, epoch: int, window: int) -> Future[Drawn]:
        if (epoch, window) not in self._held:
            self._held[epoch, window] = self._thread.submit(self._load, epoch, window)
        return self._held[epoch, window]

    def _load(self, epoch: int, window: int) -> Drawn:
        views = self.order.views_of(epoch, self.order.window_rows(epoch, window))
        return self.artifact.stream(self.order.window_shards(epoch, window), views)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

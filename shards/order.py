"""The images of each training step: a function of (seed, step) only, so that resuming needs no state.

    order = TrainingOrder(rows=len(artifact), views=manifest.views, batch=256, seed=0)
    rows, views = order.batch(step)                          # (256,) each; a rank takes its slice

Every epoch is a new permutation of all rows, with one random view per row. Batches span the ends of epochs, so every
batch is full and no image is skipped. Only the requested places of a permutation are computed, so memory does not
grow with the number of images.

:class:`StreamingOrder` is for shards that are read sequentially: it permutes the shards, and rows only within windows
of a few shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 10
WINDOW = 8  # shards whose rows are mixed when streaming


@lru_cache(maxsize=64)
def draw_keys(*purpose: int) -> NDArray[np.uint64]:
    """Return independent keys (ROUNDS + 1,) uint64 for up to four numbers that identify their use, seed first."""
    seed, *stream = (*purpose, 0, 0, 0, 0)[:4]
    counter = np.array([0, *stream], np.uint64)  # drawing increments the first word
    philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter)
    keys = philox.random_raw(ROUNDS + 1)
    keys.flags.writeable = False  # the cache shares them
    return keys


def mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Hash each value with the key (splitmix64)."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def permuted(positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the values of a keyed permutation of ``range(size)`` at some positions, without computing the others.

    A Feistel network on pairs of digits; values outside ``range(size)`` pass through it again.
    """
    high = int(np.ceil(np.sqrt(size)))
    low = -(-size // high)
    values = np.asarray(positions).astype(np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        left, right = np.divmod(values[pending], np.uint64(low))
        for turn in range(0, ROUNDS, 2):
            left = (left + mix(right, keys[turn])) % np.uint64(high)
            right = (right + mix(left, keys[turn + 1])) % np.uint64(low)
        values[pending] = left * np.uint64(low) + right
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


class TrainingOrder:
    """The order of images in a run over data with random access."""

    def __init__(self, *, rows: int, views: int, batch: int, seed: int) -> None:
        if min(rows, views, batch) < 1:
            raise ValueError(f"rows, views and batch must be at least 1, not {rows}, {views}, {batch}")
        self.rows, self.views, self.size, self.seed = rows, views, batch, seed

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and views of global batch ``step`` (0, 1, …), (batch,) int64 each."""
        epochs, positions = np.divmod(np.arange(step * self.size, (step + 1) * self.size), self.rows)
        rows = np.empty(self.size, np.int64)
        views = np.empty(self.size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = self._rows(epoch, positions[here])
            views[here] = self.views_of(epoch, rows[here])
        return rows, views

    def _rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at some positions of an epoch."""
        return permuted(positions, self.rows, draw_keys(self.seed, epoch))

    def views_of(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the view drawn of each row in an epoch."""
        hashes = mix(rows.astype(np.uint64), draw_keys(self.seed, epoch)[ROUNDS])
        return (hashes % np.uint64(self.views)).astype(np.int64)


class StreamingOrder(TrainingOrder):
    """The order of images in a run over shards that are read sequentially.

    An epoch is a permutation of the shards; rows are permuted within windows of ``WINDOW`` consecutive shards of it.
    """

    def __init__(self, *, shard_rows: Sequence[int], views: int, batch: int, seed: int) -> None:
        """``shard_rows``: rows per shard."""
        self.shard_rows = np.array(shard_rows, np.int64)
        super().__init__(rows=int(self.shard_rows.sum()), views=views, batch=batch, seed=seed)
        self.first_rows = np.cumsum(self.shard_rows) - self.shard_rows
        self.n_windows = -(-len(shard_rows) // WINDOW)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may span two

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order of the shards, and the number of rows up to and including each window."""
        count = len(self.shard_rows)
        shards = permuted(np.arange(count), count, draw_keys(self.seed, epoch, 1))
        ends = np.cumsum(self.shard_rows[shards])
        return shards, ends[np.minimum(np.arange(1, self.n_windows + 1) * WINDOW, count) - 1]

    def window_shards(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the shards of a window in reading order."""
        return self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]

    def window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the rows of a window in reading order."""
        shards = self.window_shards(epoch, window)
        return np.concatenate([self.first_rows[shard] + np.arange(self.shard_rows[shard]) for shard in shards])

    def mixed_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the rows of a window in the order in which they are drawn."""
        rows = self.window_rows(epoch, window)
        return rows[permuted(np.arange(len(rows)), len(rows), draw_keys(self.seed, epoch, 2, window))]

    def places(self, step: int) -> list[tuple[int, int, NDArray[np.int64]]]:
        """Return the places of global batch ``step`` in order: epoch, window, and indices into :meth:`window_rows`."""
        places = []
        at, left = divmod(step * self.size, self.rows), self.size
        while left:
            epoch, position = at
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, position, side="right"))
            begin = int(ends[window - 1]) if window else 0
            size = int(ends[window]) - begin
            here = np.arange(position - begin, min(position - begin + left, size))
            places.append((epoch, window, permuted(here, size, draw_keys(self.seed, epoch, 2, window))))
            left -= len(here)
            position += len(here)
            at = (epoch + 1, 0) if position == self.rows else (epoch, position)
        return places

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`TrainingOrder`."""
        parts = [(epoch, self.window_rows(epoch, window)[at]) for epoch, window, at in self.places(step)]
        return (
            np.concatenate([rows for _, rows in parts]),
            np.concatenate([self.views_of(epoch, rows) for epoch, rows in parts]),
        )

"""Which images a training step sees: a function of (seed, step) alone, so that resuming needs no state.

    order = TrainingOrder(rows=len(artifact), views=manifest.views, batch=256, seed=0)
    rows, views = order.batch(step)                          # (256,) each; a rank takes its slice

Every epoch is a fresh permutation of all rows; one view is drawn per row and epoch. Batches run on across the ends of
epochs, so every batch is full and no image is left out. Permutations are computed where they are asked for, so
nothing here grows with the number of images.

:class:`StreamingOrder` is for shards that are read from end to end: it permutes the shards, and rows only within
windows of a few shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 10
WINDOW = 8  # shards whose rows are mixed with each other when streaming


@lru_cache(maxsize=64)
def draw_keys(*what: int) -> NDArray[np.uint64]:
    """Independent 64-bit keys, (ROUNDS + 1,), for up to four numbers that name what they are for."""
    seed, stream = (*what, 0, 0, 0, 0)[0], (*what, 0, 0, 0, 0)[1:4]
    counter = np.array([0, *stream], np.uint64)  # the first word counts on as numbers are drawn
    philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter)
    keys = philox.random_raw(ROUNDS + 1)
    keys.flags.writeable = False  # they are kept and shared
    return keys


def mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of each value and the key: splitmix64."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def permuted(positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What a keyed permutation of ``range(size)`` has at some positions, computed for these alone.

    A Feistel network on pairs of digits; what falls outside of ``size`` goes through again until it does not.
    """
    high = int(np.ceil(np.sqrt(size)))
    low = -(-size // high)
    found = np.asarray(positions).astype(np.uint64)
    walking = np.arange(found.size)
    while walking.size:
        left, right = np.divmod(found[walking], np.uint64(low))
        for turn in range(0, ROUNDS, 2):
            left = (left + mix(right, keys[turn])) % np.uint64(high)
            right = (right + mix(left, keys[turn + 1])) % np.uint64(low)
        found[walking] = left * np.uint64(low) + right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


class TrainingOrder:
    """The order of one run over data with random access."""

    def __init__(self, *, rows: int, views: int, batch: int, seed: int) -> None:
        if min(rows, views, batch) < 1:
            raise ValueError(f"rows, views and batch must be at least 1, not {rows}, {views}, {batch}")
        self.rows, self.views, self.size, self.seed = rows, views, batch, seed

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and views of global batch ``step`` (0, 1, …), (batch,) int64 each."""
        epochs, positions = np.divmod(np.arange(step * self.size, (step + 1) * self.size), self.rows)
        rows = np.empty(self.size, np.int64)
        views = np.empty(self.size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = self._rows(epoch, positions[here])
            views[here] = self.views_of(epoch, rows[here])
        return rows, views

    def _rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at some positions of an epoch."""
        return permuted(positions, self.rows, draw_keys(self.seed, epoch))

    def views_of(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The view that is drawn of some rows in an epoch."""
        return (mix(rows.astype(np.uint64), draw_keys(self.seed, epoch)[ROUNDS]) % np.uint64(self.views)).astype(
            np.int64
        )


class StreamingOrder(TrainingOrder):
    """The order of one run over shards that are read from end to end.

    An epoch is a permutation of the shards; rows are permuted within windows of ``WINDOW`` shards that follow each
    other in it.
    """

    def __init__(self, *, shard_rows: Sequence[int], views: int, batch: int, seed: int) -> None:
        """``shard_rows``: how many rows each shard has."""
        self.shard_rows = np.array(shard_rows, np.int64)
        super().__init__(rows=int(self.shard_rows.sum()), views=views, batch=batch, seed=seed)
        self.begins = np.cumsum(self.shard_rows) - self.shard_rows
        self.n_windows = -(-len(shard_rows) // WINDOW)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may straddle two

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the shards, and the rows up to and including each window."""
        count = len(self.shard_rows)
        shards = permuted(np.arange(count), count, draw_keys(self.seed, epoch, 1))
        upto = np.cumsum(self.shard_rows[shards])
        return shards, upto[np.minimum(np.arange(1, self.n_windows + 1) * WINDOW, count) - 1]

    def window_shards(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The shards of a window, in the order in which they are read."""
        return self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]

    def window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The rows of a window, in the order in which they lie in its shards."""
        shards = self.window_shards(epoch, window)
        return np.concatenate([self.begins[shard] + np.arange(self.shard_rows[shard]) for shard in shards])

    def places(self, step: int) -> list[tuple[int, int, NDArray[np.int64]]]:
        """Where global batch ``step`` is, in its order: epoch, window, and places among :meth:`window_rows`."""
        found = []
        at, left = divmod(step * self.size, self.rows), self.size
        while left:
            epoch, position = at
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, position, side="right"))
            begin = int(ends[window - 1]) if window else 0
            size = int(ends[window]) - begin
            here = np.arange(position - begin, min(position - begin + left, size))
            found.append((epoch, window, permuted(here, size, draw_keys(self.seed, epoch, 2, window))))
            left -= len(here)
            position += len(here)
            at = (epoch + 1, 0) if position == self.rows else (epoch, position)
        return found

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`TrainingOrder`."""
        parts = [(epoch, self.window_rows(epoch, window)[at]) for epoch, window, at in self.places(step)]
        return (
            np.concatenate([rows for _, rows in parts]),
            np.concatenate([self.views_of(epoch, rows) for epoch, rows in parts]),
        )

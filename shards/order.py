"""Which images a training step sees: a function of (seed, step) alone, so that resuming needs no state.

    order = TrainingOrder(rows=len(artifact), views=manifest.views, batch=256, seed=0)
    rows, views = order.batch(step)                          # (256,) each; a rank takes its slice

Every epoch is a fresh permutation of all rows; one view is drawn per row and epoch. Batches run on across the ends of
epochs, so every batch is full and no image is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrainingOrder:
    """The order of one run."""

    def __init__(self, *, rows: int, views: int, batch: int, seed: int) -> None:
        if min(rows, views, batch) < 1:
            raise ValueError(f"rows, views and batch must be at least 1, not {rows}, {views}, {batch}")
        self.rows, self.views, self.size, self.seed = rows, views, batch, seed
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may straddle two

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64)))
        return rng.permutation(self.rows), rng.integers(self.views, size=self.rows)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and views of global batch ``step`` (0, 1, …), (batch,) int64 each."""
        positions = np.arange(step * self.size, (step + 1) * self.size)
        rows = np.empty(self.size, np.int64)
        views = np.empty(self.size, np.int64)
        for epoch in np.unique(positions // self.rows):
            here = positions // self.rows == epoch
            order, drawn = self._epoch(int(epoch))
            rows[here] = order[positions[here] % self.rows]
            views[here] = drawn[rows[here]]
        return rows, views

"""KID: the kernel distance between two sets of features (Bińkowski et al., 2018).

value, spread = kernel_distance(samples, reference)      # (n, d) and (m, d); unbiased, so it may be below 0
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCKS = 10  # of the jackknife
ROWS = 2048  # rows whose kernel is in memory at once


def kernel_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[float, float | None]:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x·y / d + 1)³, and its standard error.

    All pairs are used, where other implementations average over random subsets: the estimate has the same expectation
    and less variance. The standard error is a jackknife's, which leaves out a tenth of both sets in turn.

    Args:
        a: features (n, d), n at least 2.
        b: features (m, d), m at least 2.

    Returns:
        The estimate, and its standard error; None below 20 images on either side.
    """
    within_a, within_b, between = _block_sums(a, a), _block_sums(b, b), _block_sums(a, b)
    sizes = np.stack([np.bincount(np.arange(len(x)) % BLOCKS, minlength=BLOCKS) for x in (a, b)])
    selves = np.stack([_self_sums(x) for x in (a, b)])

    def estimate(kept: NDArray[np.bool_]) -> float:
        n, m = sizes[:, kept].sum(axis=1)
        self_a, self_b = selves[:, kept].sum(axis=1)
        pairs = np.ix_(kept, kept)
        one = (within_a[pairs].sum() - self_a) / (n * (n - 1))
        other = (within_b[pairs].sum() - self_b) / (m * (m - 1))
        return float(one + other - 2 * between[pairs].sum() / (n * m))

    value = estimate(np.ones(BLOCKS, bool))
    if min(len(a), len(b)) < 2 * BLOCKS:
        return value, None
    left = np.array([estimate(np.arange(BLOCKS) != block) for block in range(BLOCKS)])
    return value, float(np.sqrt((BLOCKS - 1) * np.mean((left - left.mean()) ** 2)))


def resampled_kernel_distances(
    a: NDArray[np.floating], b: NDArray[np.floating], counts: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return kernel distances of resamples of ``a`` from ``b``, (resamples,). Copies of an image are not paired.

    Args:
        a: features (n, d).
        b: features (m, d).
        counts: (resamples, n), how often each row of ``a`` is in a resample.
    """
    n, m = len(a), len(b)
    weights = counts.T.astype(np.float64)  # (n, resamples)
    within, between = -(weights.T**2 @ _kernel(np.square(a.astype(np.float64)).sum(axis=1), a.shape[1])), 0.0
    columns = [x.astype(np.float64).T for x in (a, b)]
    for begin in range(0, n, ROWS):
        rows, here = a[begin : begin + ROWS].astype(np.float64), weights[begin : begin + ROWS]
        within += np.einsum("ir,ir->r", here, _kernel(rows @ columns[0], a.shape[1]) @ weights)
        between = between + here.T @ _kernel(rows @ columns[1], a.shape[1]).sum(axis=1)
    of_b = (_block_sums(b, b).sum() - _self_sums(b).sum()) / (m * (m - 1))
    distances: NDArray[np.float64] = within / (n**2 - (weights**2).sum(axis=0)) + of_b - 2 * between / (n * m)
    return distances


def _kernel(products: NDArray[np.float64], d: int) -> NDArray[np.float64]:
    return (products / d + 1) ** 3


def _self_sums(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sum the kernel of each row with itself by block, the row's index modulo BLOCKS: (BLOCKS,)."""
    values = _kernel(np.square(x.astype(np.float64)).sum(axis=1), x.shape[1])
    return np.bincount(np.arange(len(x)) % BLOCKS, values, minlength=BLOCKS).astype(np.float64)


def _block_sums(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Sum the kernel over all pairs of rows by both rows' blocks: (BLOCKS, BLOCKS)."""
    sums = np.zeros((BLOCKS, BLOCKS))
    of_b = np.eye(BLOCKS)[np.arange(len(b)) % BLOCKS]  # (m, BLOCKS)
    columns = b.astype(np.float64).T
    for begin in range(0, len(a), ROWS):
        rows = a[begin : begin + ROWS].astype(np.float64)
        of_a = np.eye(BLOCKS)[np.arange(begin, begin + len(rows)) % BLOCKS]
        sums += of_a.T @ _kernel(rows @ columns, a.shape[1]) @ of_b
    return sums

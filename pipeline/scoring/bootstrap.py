"""Confidence intervals of scores: a seeded bootstrap over images.

    bootstrap = Bootstrap(seed=0)
    bootstrap.mean(nats)                                     # Interval of a mean over images, (n,)
    bootstrap.frechet(features, reference.statistics, 12.3)  # of a Fréchet distance whose estimate is 12.3

Each resample draws all n images with replacement. The reference is not resampled. An interval is the estimate plus and
minus the resamples' standard deviation times the normal quantile. Quantiles of the resamples are not used, because a
resample repeats images: its covariance has a lower rank, and its Fréchet distance is larger than that of as many
different images. For the same reason an interval does not cover the distance's bias, which depends on the number of
images. Compare distances of equal numbers of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.scoring.features import Statistics
from pipeline.scoring.kernel_distance import resampled_kernel_distances

LEVEL = 0.95
FEWEST = 10  # images that an interval needs
RESAMPLES = 1000  # of means
DISTANCE_RESAMPLES = 100  # of distances, each of which needs a decomposition
MANY, MANY_RESAMPLES = 10_000, 20  # with more images than MANY, distances get fewer resamples: minutes, not hours


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float = LEVEL
    resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are computed."""

    seed: int
    resamples: int | None = None  # None chooses by quantity and number of images; 0: no intervals

    def mean(self, values: NDArray[np.floating]) -> Interval | None:
        """Return the interval of the mean of values (n,), one per image; None for few images."""
        drawn = self._counts(len(values), RESAMPLES)
        return self._interval(float(values.mean()), [float(counts @ values) / len(values) for counts in drawn])

    def frechet(
        self, samples: NDArray[np.floating], reference: Statistics | NDArray[np.floating], estimate: float
    ) -> Interval | None:
        """Return the interval of a Fréchet distance; None for few images.

        Args:
            samples: features (n, d).
            reference: what they are compared with. Features (n, d) are paired with the samples, such as originals with
                reconstructions, and are resampled together.
            estimate: the distance.
        """
        paired = None if isinstance(reference, Statistics) else reference.astype(np.float64)
        fixed = (reference.mu, _factor(reference.sigma)) if isinstance(reference, Statistics) else None
        features, values = samples.astype(np.float64), []
        for counts in self._counts(len(features), DISTANCE_RESAMPLES):
            other = _gaussian(paired, counts) if fixed is None and paired is not None else fixed
            assert other is not None  # exactly one of the two is set
            values.append(_distance(_gaussian(features, counts), other))
        return self._interval(estimate, values, lowest=0.0)

    def kernel(
        self, samples: NDArray[np.floating], reference: NDArray[np.floating], estimate: float
    ) -> Interval | None:
        """Return the interval of a kernel distance between features (n, d) and (m, d); None for few images."""
        counts = list(self._counts(len(samples), DISTANCE_RESAMPLES))
        if not counts:
            return None
        return self._interval(estimate, resampled_kernel_distances(samples, reference, np.stack(counts)))

    def _counts(self, n: int, default: int) -> Iterator[NDArray[np.int64]]:
        """Yield how often each of n images is in a resample, (n,)."""
        if n < FEWEST:
            return
        chosen = MANY_RESAMPLES if default == DISTANCE_RESAMPLES and n > MANY else default
        generator = np.random.default_rng(self.seed)
        for _ in range(chosen if self.resamples is None else self.resamples):
            yield np.bincount(generator.integers(n, size=n), minlength=n)

    def _interval(
        self, estimate: float, values: Sequence[float] | NDArray[np.float64], lowest: float = -np.inf
    ) -> Interval | None:
        if len(values) < 2:
            return None
        reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(np.std(values, ddof=1))
        low, high = max(estimate - reach, lowest), estimate + reach
        return Interval(low=low, high=high, resamples=len(values), seed=self.seed)


Gaussian = tuple[NDArray[np.floating], NDArray[np.floating]]  # mu (d,), and rows (k, d) whose product is sigma


def _gaussian(features: NDArray[np.float64], counts: NDArray[np.int64]) -> Gaussian:
    """Return the Gaussian of a resample of features (n, d), with k at most d."""
    kept = counts > 0
    mu = counts[kept] @ features[kept] / len(features)
    rows = np.sqrt(counts[kept] / (len(features) - 1))[:, None] * (features[kept] - mu)
    return mu, rows if len(rows) <= rows.shape[1] else np.asarray(np.linalg.qr(rows, mode="r"))


def _factor(sigma: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return rows (d, d) whose product with themselves is the covariance (d, d)."""
    values, vectors = np.linalg.eigh(sigma.astype(np.float64))
    rows: NDArray[np.float64] = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    return rows


def _distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Fréchet distance; the trace of the root is the sum of the singular values of ``a[1] @ b[1].T``."""
    product = a[1] @ b[1].T  # (k, m)
    square = product @ product.T if len(product) <= product.shape[1] else product.T @ product
    roots = np.sqrt(np.linalg.eigvalsh(square).clip(min=0)).sum()
    move = a[0] - b[0]
    return float(move @ move + np.square(a[1]).sum() + np.square(b[1]).sum() - 2 * roots)

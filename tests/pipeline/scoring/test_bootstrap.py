import numpy as np
import pytest

from pipeline.scoring.bootstrap import Bootstrap, Interval
from pipeline.scoring.features import Statistics, frechet_distance
from pipeline.scoring.kernel_distance import kernel_distance, resampled_kernel_distances


def features(seed: int, n: int, d: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn: np.ndarray = rng.normal(size=(n, d)) * np.arange(1, d + 1) + 0.1 * rng.normal(size=d)
    return drawn


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def width(interval: Interval | None) -> float:
    assert interval is not None
    return interval.high - interval.low


def test_the_interval_of_a_mean_equals_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    interval = Bootstrap(seed=1).mean(values)
    assert interval is not None
    assert (interval.low + interval.high) / 2 == pytest.approx(values.mean())
    assert width(interval) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (interval.level, interval.resamples, interval.seed) == (0.95, 1000, 1)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_the_distance_of_a_resample_equals_that_of_its_images(n: int, d: int) -> None:
    """Compare with the definition on repeated images; with more and fewer images than features."""
    samples, reference = features(0, n, d), features(1, 50, d)
    rng = np.random.default_rng(3)
    expected = [distance(samples[rng.integers(n, size=n)], reference) for _ in range(2)]
    interval = Bootstrap(seed=3, resamples=2).frechet(samples, Statistics.of(reference), 1e6)
    assert width(interval) == pytest.approx(2 * 1.959964 * np.std(expected, ddof=1), rel=1e-4)


def test_the_bootstrap_spread_matches_that_of_new_samples() -> None:
    reference = Statistics.of(1.5 * features(100, 4000) + 1)
    draws = [features(seed, 300) for seed in range(60)]
    distances = [frechet_distance(Statistics.of(draw), reference) for draw in draws]
    interval = Bootstrap(seed=0).frechet(draws[0], reference, distances[0])
    assert width(interval) / (2 * 1.96) == pytest.approx(np.std(distances), rel=0.5)


def test_originals_are_resampled_with_their_reconstructions() -> None:
    originals = features(0, 200)
    decoded = originals + 0.01 * features(1, 200)
    estimate = distance(decoded, originals)
    together = Bootstrap(seed=0).frechet(decoded, originals, estimate)
    apart = Bootstrap(seed=0).frechet(decoded, Statistics.of(originals), estimate)
    assert width(together) < 0.1 * width(apart)


def test_a_kernel_distance_of_a_resample_pairs_no_image_with_its_copies() -> None:
    a, b = features(0, 30), features(1, 25)
    once = np.ones((1, 30), int)
    assert resampled_kernel_distances(a, b, once)[0] == pytest.approx(kernel_distance(a, b)[0], rel=1e-9)
    half = np.tile([2, 0], 15)[None]
    assert resampled_kernel_distances(a, b, half)[0] == pytest.approx(kernel_distance(a[::2], b)[0], rel=1e-9)


def test_intervals_are_a_function_of_the_seed() -> None:
    samples, reference = features(0, 40), features(1, 50)
    intervals = [Bootstrap(seed=seed).kernel(samples, reference, 1.0) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_without_resamples_or_with_few_images_there_is_no_interval() -> None:
    samples, reference = features(0, 40), features(1, 50)
    for bootstrap, n in ((Bootstrap(seed=0, resamples=0), 40), (Bootstrap(seed=0), 9)):
        assert bootstrap.mean(samples[:n, 0]) is None
        assert bootstrap.frechet(samples[:n], Statistics.of(reference), 1.0) is None
        assert bootstrap.kernel(samples[:n], reference, 1.0) is None

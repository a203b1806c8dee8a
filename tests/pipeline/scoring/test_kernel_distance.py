import numpy as np
import pytest

from pipeline.scoring.kernel_distance import kernel_distance


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate, pair by pair."""
    n, m, d = len(a), len(b), a.shape[1]

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / d + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_equals_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(23, 5)), rng.normal(0.5, 1, size=(31, 5))
    assert kernel_distance(a, b)[0] == pytest.approx(by_definition(a, b), rel=1e-9)


def test_the_standard_error_is_a_jackknife_over_tenths() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(25, 4)), rng.normal(size=(40, 4))
    left = [by_definition(a[np.arange(25) % 10 != i], b[np.arange(40) % 10 != i]) for i in range(10)]
    expected = np.sqrt(0.9 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert kernel_distance(a, b)[1] == pytest.approx(expected, rel=1e-6)


def test_the_distance_is_zero_within_its_error_only_for_equal_distributions() -> None:
    rng = np.random.default_rng(2)
    a, same, other = rng.normal(size=(400, 8)), rng.normal(size=(300, 8)), rng.normal(0.3, 1, size=(300, 8))
    value, error = kernel_distance(a, same)
    assert error is not None
    assert abs(value) < 4 * error
    value, error = kernel_distance(a, other)
    assert error is not None
    assert value > 4 * error


def test_fewer_than_twenty_images_have_no_standard_error() -> None:
    rng = np.random.default_rng(3)
    value, error = kernel_distance(rng.normal(size=(19, 3)), rng.normal(size=(30, 3)))
    assert np.isfinite(value)
    assert error is None

import numpy as np
import pytest

from benchmarks.fid_effects import as_file, on_their_span
from pipeline.scoring.features import Statistics, frechet_distance


def test_projection_onto_the_common_span_keeps_the_distance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 40)).astype(np.float32), rng.normal(1, 2, size=(12, 40)).astype(np.float32)
    x, y = on_their_span(a, b)
    assert x.shape == (9, 21)
    expected = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(expected, rel=1e-4)


def test_png_keeps_every_pixel_and_jpeg_does_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert np.array_equal(as_file(pixels, format="PNG"), pixels)
    assert not np.array_equal(as_file(pixels, format="JPEG", quality=95), pixels)

"""Statistics of patches: their lengths, sums over parts, and the lines that summarise them."""

import json

import numpy as np
import pytest

from dpar.patching import static_starts
from shards.patch_statistics import count_patches, merge_counts, patch_lengths, summary

N = 24  # tokens per image


pytestmark = pytest.mark.usefixtures("one_thread")


def test_statistics_of_parts_add_up_to_those_of_all() -> None:
    rng = np.random.default_rng(0)
    starts = rng.random((50, 3, N)) < 0.6
    starts[..., 0] = True
    labels = rng.integers(0, 7, 50).astype(np.int32)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 50)]
    names = ("a", "b", "c")
    whole, parts = (
        merge_counts(
            [json.loads(json.dumps(count_patches(starts[cut], labels[cut]))) for cut in some],
            n_tokens=N,
            views=3,
            class_names=names,
        )
        for some in ([slice(0, 50)], cuts)
    )
    assert parts == whole
    assert [entry["class"] for entry in whole["classes"]] == ["a", "b", "c", *(f"label {i}" for i in range(3, 7))]


def test_the_summary_names_the_spread_over_images_and_the_extreme_classes() -> None:
    starts = np.zeros((4, 1, 8), bool)
    for image, patches in enumerate((1, 2, 4, 8)):
        starts[image, 0, :: 8 // patches] = True
    counts = [count_patches(starts, np.arange(4, dtype=np.int32))]
    lines = summary(merge_counts(counts, n_tokens=8, views=1, class_names=("sky", "sea", "owl", "fur")))
    assert lines == [
        "mean patch length 2.133, 53.1% of tokens saved",
        "patches per image: mean 3.8, median 2, 1 to 8 (of 8 tokens)",
        "patch lengths: 1 53.3%, 2 26.7%, 4 13.3%, 8 6.7%",
        "most compressible classes, by mean length: sky 8.00, sea 4.00",
        "least compressible classes, by mean length: fur 1.00, owl 2.00",
    ]


def test_the_summary_of_static_patches_names_no_extreme_classes() -> None:
    starts = np.broadcast_to(static_starts(8, 2), (4, 1, 8))
    counts = [count_patches(starts, np.arange(4, dtype=np.int32))]
    lines = summary(merge_counts(counts, n_tokens=8, views=1, class_names=("sky", "sea", "owl", "fur")))
    assert len(lines) == 3


def test_patches_end_at_the_end_of_an_image() -> None:
    starts = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert patch_lengths(starts).tolist() == [3, 1, 2]
    assert patch_lengths(np.zeros((0, 3), bool)).tolist() == []

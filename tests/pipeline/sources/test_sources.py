"""What all sources share: how one is chosen, its classes and a number of images; parts; pickling."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import Item, Photos, open_indexed
from pipeline.sources.photos import CROPS
from tests.pipeline.sources.listed import keys, labels, save


def test_chosen_classes_are_renumbered_in_sorted_order(tmp_path: Path) -> None:
    for name in "abcd":
        save(tmp_path / name / "1.png")
    source = open_indexed(str(tmp_path), classes=["d", "b", "d"])
    assert source.class_names == ("b", "d")
    assert keys(source) == ["b/1.png", "d/1.png"]
    assert labels(source) == [0, 1]


def test_an_unknown_class_names_the_nearest(tmp_path: Path) -> None:
    for name in ["tabby cat", "tiger cat", "dog"]:
        save(tmp_path / name / "1.png")
    with pytest.raises(StageError, match="no class 'taby cat' in this data; did you mean 'tabby cat'"):
        open_indexed(str(tmp_path), classes=["taby cat"])


def test_a_limit_is_spread_evenly_over_the_classes_in_listing_order(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 1), ("c", 4)):
        for i in range(count):
            save(tmp_path / name / f"{i}.png", Image.new("L", (1, 1)))
    assert keys(open_indexed(str(tmp_path), limit=6)) == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
        "b/0.png",
        "c/0.png",
        "c/1.png",
    ]
    assert keys(open_indexed(str(tmp_path), limit=2)) == ["a/0.png", "b/0.png"]
    assert labels(open_indexed(str(tmp_path), limit=3, classes=["c", "b"])) == [0, 1, 1]
    assert len(open_indexed(str(tmp_path), limit=99)) == 10


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("builtin", [True, False])
def test_a_limit_below_one_is_an_error(tmp_path: Path, limit: int, builtin: bool) -> None:
    save(tmp_path / "cat" / "1.png")
    with pytest.raises(StageError, match=f"the limit on images is {limit}"):
        open_indexed("builtin:photos" if builtin else str(tmp_path), limit=limit)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("builtin:photo", "no such built-in data; choose from builtin:photos, builtin:emoji"),
        ("no/such/folder", r"no such folder or file; accepted:\n  a folder of class folders (.|\n)*builtin:photos"),
        ("", "no path given"),
        (__file__, "is a file, not a folder, and its ending is not .tar, .parquet or .arrow; accepted:"),
    ],
)
def test_an_unknown_source_is_refused_with_the_available_ones(data: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        open_indexed(data)


def test_parts_contain_every_image_once_in_order(tmp_path: Path) -> None:
    for i in range(7):
        save(tmp_path / "cat" / f"{i}.png", Image.new("L", (1, 1), i))
    source = open_indexed(str(tmp_path))
    assert source.n_parts(3) == 3
    items = [item for part in range(3) for item in source.part(part, 3)]
    assert [item.key for item in items] == keys(source)
    assert [item.load().getpixel((0, 0)) for item in items if isinstance(item, Item)] == [(i, i, i) for i in range(7)]


@pytest.fixture(scope="module")
def photos() -> dict[str, Photos]:
    return {split: Photos(split) for split in CROPS}


def test_sources_can_be_pickled(tmp_path: Path, photos: dict[str, Photos]) -> None:
    save(tmp_path / "cat" / "1.png")
    for source in (open_indexed(str(tmp_path)), photos["validation"]):
        copy = pickle.loads(pickle.dumps(source))
        assert keys(copy) == keys(source)
        np.testing.assert_array_equal(np.asarray(copy.load(0)), np.asarray(source.load(0)))

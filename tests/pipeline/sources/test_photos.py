"""The photographs of `builtin:photos`: crops that never change, with training and validation apart."""

import numpy as np
import pytest

from pipeline.runtime.errors import StageError
from pipeline.sources import Photos, open_indexed
from pipeline.sources.photos import CROPS
from tests.pipeline.sources.listed import keys, labels


@pytest.fixture(scope="module")
def photos() -> dict[str, Photos]:
    return {split: Photos(split) for split in CROPS}


def test_photos_are_fifteen_classes_with_the_stated_number_of_crops(photos: dict[str, Photos]) -> None:
    for split, source in photos.items():
        assert len(source.class_names) == 15
        assert list(source.class_names) == sorted(source.class_names)
        assert len(source) == 15 * CROPS[split]
        assert len(set(keys(source))) == len(source)
    assert photos["train"].key(3 * 128 + 7) == "cat/train-0007"
    assert keys(open_indexed("builtin:photos", limit=1)) == ["astronaut/train-0000"]


def test_train_and_validation_boxes_never_share_a_pixel(photos: dict[str, Photos]) -> None:
    for name in photos["train"].class_names:
        boxes = {
            split: np.array([source.box(i) for i in range(len(source)) if source.key(i).startswith(f"{name}/")])
            for split, source in photos.items()
        }
        train, validation = boxes["train"], boxes["validation"]
        apart = [train[:, side + 2].max() <= validation[:, side].min() for side in (0, 1)]
        assert any(apart), name


def test_every_photo_is_a_square_rgb_crop_inside_its_photograph(photos: dict[str, Photos]) -> None:
    for source in photos.values():
        for i in range(0, len(source), 5):
            left, top, right, bottom = source.box(i)
            image = source.load(i)
            assert image.mode == "RGB"
            assert image.size == (right - left, bottom - top)
            assert right - left == bottom - top
            assert 128 <= right - left <= 256
            assert left >= 0
            assert top >= 0
            # Pillow fills areas outside the photograph with black.
            assert np.asarray(image)[-1].any()
            assert np.asarray(image)[:, -1].any()


def test_a_photo_depends_on_its_key_only(photos: dict[str, Photos]) -> None:
    whole = {photos["train"].key(i): photos["train"].box(i) for i in range(len(photos["train"]))}
    part = Photos("train", classes=["moon", "cat"], limit=9)
    assert part.class_names == ("cat", "moon")
    assert labels(part) == [0] * 5 + [1] * 4
    assert all(part.box(i) == whole[part.key(i)] for i in range(len(part)))


def test_photo_boxes_are_the_same_in_every_version() -> None:
    # Hard-coded: a change would silently turn earlier artifacts into another data set.
    boxes = [Photos(split, classes=["cat"], limit=1).box(0) for split in CROPS]
    assert boxes == [(122, 75, 262, 215), (308, 50, 450, 192)]


def test_an_unknown_split_of_the_photos_lists_the_two() -> None:
    with pytest.raises(StageError, match="no split 'test'; it has: train, validation"):
        open_indexed("builtin:photos", split="test")

from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import UnusableImage
from pipeline.sources.crops import center_crop, n_views, views

PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13  # its rounding of block averages differs from older versions
CROPS = Path(__file__).parents[2] / "fixtures" / "crops.npz"
NAMES = ["coffee", "tall", "small"]


@pytest.fixture(scope="module")
def crops() -> dict[str, Any]:
    with np.load(CROPS) as file:
        return dict(file)


def assert_equal(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Require equal pixels with the fixtures' Pillow, and pixels within three levels with an older one."""
    if PILLOW_13:
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual.astype(int), expected.astype(int), rtol=0, atol=3)


def adm_center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The steps of ADM's ``center_crop_arr``, in the installed Pillow."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [64, 70])
def test_center_crop_equals_adms_steps_in_the_installed_pillow(crops: dict[str, Any], name: str, size: int) -> None:
    image = Image.fromarray(crops[f"{name}_image"])
    np.testing.assert_array_equal(center_crop(image, size), adm_center_crop(image, size))


@pytest.mark.parametrize("name", NAMES)
def test_center_crop_equals_adm_bit_for_bit(crops: dict[str, Any], name: str) -> None:
    image = Image.fromarray(crops[f"{name}_image"])
    assert_equal(center_crop(image, 64), crops[f"{name}_center_1.0"])
    assert_equal(views(image, 64, "center", [1.0]), crops[f"{name}_center_1.0"][None])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("crop_range", [1.05, 1.1])
def test_ten_crops_equal_llamagen_bit_for_bit(crops: dict[str, Any], name: str, crop_range: float) -> None:
    image = Image.fromarray(crops[f"{name}_image"])
    assert_equal(views(image, 64, "ten-crop", [crop_range]), crops[f"{name}_center_{crop_range}"])


@pytest.mark.parametrize("name", NAMES)
def test_views_of_several_ranges_follow_one_another_in_the_order_given(crops: dict[str, Any], name: str) -> None:
    image = Image.fromarray(crops[f"{name}_image"])
    expected = np.concatenate([crops[f"{name}_center_1.1"], crops[f"{name}_center_1.05"]])
    assert_equal(views(image, 64, "ten-crop", [1.1, 1.05]), expected)


def test_ten_crops_equal_torchvision_where_the_centre_is_rounded() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    for size, crop_range in [(20, 1.05), (20, 1.15), (21, 1.2), (20, 1.25), (30, 1.5)]:
        whole = Image.fromarray(center_crop(image, int(size * crop_range)))
        expected = np.stack([np.asarray(crop) for crop in functional.ten_crop(whole, size)])
        np.testing.assert_array_equal(views(image, size, "ten-crop", [crop_range]), expected)


def test_ranges_that_need_different_halvings_do_not_disturb_each_other() -> None:
    # 128 is at least twice 60 but not twice 66, whichever comes first.
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 128, 3), dtype=np.uint8))
    alone = [views(image, 60, "flip", [r]) for r in (1.0, 1.1)]
    np.testing.assert_array_equal(views(image, 60, "flip", [1.0, 1.1]), np.concatenate(alone))
    np.testing.assert_array_equal(views(image, 60, "flip", [1.1, 1.0]), np.concatenate(alone[::-1]))


def test_flip_is_the_centre_and_its_mirror_image(crops: dict[str, Any]) -> None:
    image = Image.fromarray(crops["coffee_image"])
    center = views(image, 64, "center", [1.1, 1.0])
    flip = views(image, 64, "flip", [1.1, 1.0])
    np.testing.assert_array_equal(flip[0::2], center)
    np.testing.assert_array_equal(flip[1::2], center[:, :, ::-1])


def test_center_of_a_wider_range_is_the_centre_of_its_ten_crops(crops: dict[str, Any]) -> None:
    image = Image.fromarray(crops["tall_image"])
    assert_equal(views(image, 64, "center", [1.1])[0], crops["tall_center_1.1"][4])


def test_a_single_pixel_is_scaled_up() -> None:
    one = Image.new("RGB", (1, 1), (10, 20, 30))
    out = views(one, 16, "ten-crop", [1.1, 1.05])
    assert out.shape == (20, 16, 16, 3)
    assert (out == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(20000, 300), (300, 20000), (640, 480), (7, 5)])
def test_any_shape_gives_square_uint8_views(size: Any) -> None:
    out = views(Image.new("RGB", size), 32, "flip", [1.0])
    assert out.shape == (2, 32, 32, 3)
    assert out.dtype == np.uint8


def test_an_image_with_an_extreme_aspect_ratio_is_refused() -> None:
    with pytest.raises(UnusableImage, match="too long and thin: 20000×1 would become"):
        views(Image.new("RGB", (20000, 1)), 256, "center", [1.0])


def test_modes_other_than_rgb_are_converted() -> None:
    assert (center_crop(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 4) == 255).all()
    assert (center_crop(Image.new("L", (9, 9), 7), 4) == 7).all()


@pytest.mark.parametrize(("kind", "each"), [("center", 1), ("flip", 2), ("ten-crop", 10)])
def test_n_views_counts_what_views_returns(kind: Any, each: int) -> None:
    assert n_views(kind, [1.1, 1.05]) == 2 * each
    assert len(views(Image.new("RGB", (40, 30)), 8, kind, [1.1, 1.05])) == 2 * each


@pytest.mark.parametrize(
    ("size", "kind", "crop_ranges", "message"),
    [
        (0, "center", [1.0], "image size is 0"),
        (8, "center", [], "no crop range"),
        (8, "center", [1.1, 0.9], "crop range 0.9"),
        (8, "center", [float("nan")], "crop range nan"),
        (8, "five-crop", [1.0], "no views of kind 'five-crop'; choose from center, flip, ten-crop"),
    ],
)
def test_invalid_settings_are_named(size: Any, kind: Any, crop_ranges: list[float], message: str) -> None:
    with pytest.raises(StageError, match=message):
        views(Image.new("RGB", (9, 9)), size, kind, crop_ranges)

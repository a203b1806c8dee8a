"""Decoding of image files, usable and unusable."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpar.images import MAX_PIXELS
from pipeline.runtime.errors import StageError
from pipeline.sources import UnusableImage
from pipeline.sources.decode import MAX_BYTES, decode_image, read_image
from tests.pipeline.sources.listed import save


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def loaded(path: Path) -> np.ndarray:
    image = read_image(path)
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert "transparency" not in image.info
    return np.asarray(image)


def decoded_or_reason(data: bytes) -> str:
    try:
        return decode_image(io.BytesIO(data)).mode
    except UnusableImage as error:
        return error.reason


def reason(path: Path) -> str:
    with pytest.raises(UnusableImage) as caught:
        read_image(path)
    return caught.value.reason


# Decoding of usable images


def test_plain_rgb_is_what_pillow_decodes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise())
    np.testing.assert_array_equal(loaded(path), np.asarray(Image.open(path)))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "gif", "tiff", "ppm"])
def test_every_listed_format_is_read(tmp_path: Path, ending: str) -> None:
    assert loaded(save(tmp_path / f"a.{ending}")).shape == (6, 8, 3)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    assert (loaded(save(tmp_path / "a.png", Image.new("L", (3, 2), 77))) == 77).all()


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert loaded(save(tmp_path / "a.png", image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert loaded(save(tmp_path / "a.png", image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    path = save(tmp_path / "a.png", image, transparency=0)
    assert loaded(path).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_rgba_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(0, 0, 0, 0), (10, 20, 30, 255), (0, 0, 0, 128)]):
        image.putpixel((x, 0), pixel)
    assert loaded(save(tmp_path / "a.png", image)).tolist() == [[[255] * 3, [10, 20, 30], [127] * 3]]


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (9, 0))
    image.putpixel((1, 0), (9, 255))
    assert loaded(save(tmp_path / "a.png", image)).tolist() == [[[255] * 3, [9] * 3]]


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 5), ("1", 0)])
def test_a_transparent_colour_of_an_opaque_mode_becomes_white(tmp_path: Path, mode: str, colour: Any) -> None:
    path = save(tmp_path / "a.png", Image.new(mode, (2, 2), colour), transparency=colour)
    assert (loaded(path) == 255).all()


def test_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = loaded(save(tmp_path / "a.jpg", image, quality=100))[8, 8]
    assert pixel[0] > 250
    assert pixel[1] < 5
    assert pixel[2] < 5


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 256, 1000, 32768, 65535]], dtype=np.uint16)
    out = loaded(save(tmp_path / f"a.{ending}", Image.fromarray(values)))
    assert out[0, :, 0].tolist() == [0, 1, 4, 128, 255]
    assert (out == out[..., :1]).all()


def test_big_endian_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 65535, 514))
    assert loaded(save(tmp_path / "a.tif", image))[0, :, 0].tolist() == [255, 2]


def test_a_transparent_sixteen_bit_grey_becomes_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[300, 514]], dtype=np.uint16))
    path = save(tmp_path / "a.png", image, transparency=300)
    assert loaded(path)[0, :, 0].tolist() == [255, 2]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, ending: str, orientation: int) -> None:
    # Stored positions of the top left and top right corners of the upright image, by orientation.
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    corners = {"tl": (0, 0), "tr": (0, 32), "bl": (16, 0), "br": (16, 32)}
    places = ["tl tr", "tr tl", "br bl", "bl br", "tl bl", "bl tl", "br tr", "tr br"][orientation - 1].split()
    for (top, left), colour in zip((corners[p] for p in places), [(255, 0, 0), (0, 0, 255)], strict=True):
        stored[top : top + 16, left : left + 16] = colour
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = loaded(save(tmp_path / f"a.{ending}", Image.fromarray(stored), exif=exif))
    assert out.shape == ((32, 48, 3) if orientation <= 4 else (48, 32, 3))
    assert out[4, 4].argmax() == 0
    assert out[4, 4].max() > 200
    assert out[4, -5].argmax() == 2
    assert out[4, -5].max() > 200


def test_damaged_exif_does_not_make_an_image_unusable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert loaded(path).shape == (6, 8, 3)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    path = save(tmp_path / f"a.{ending}", frames[0], save_all=True, append_images=frames[1:], duration=50)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    pixel = loaded(path)[4, 4]
    assert pixel[0] > 240
    assert pixel[1] < 15
    assert pixel[2] < 15


def test_a_single_pixel_is_an_image(tmp_path: Path) -> None:
    assert loaded(save(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_an_image_twenty_thousand_pixels_wide_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("RGB", (20000, 300), (9, 9, 9)))
    assert loaded(path).shape == (300, 20000, 3)


# Decoding of unusable images


@pytest.mark.parametrize("ending", ["gif", "webp", "tif"])
def test_half_a_file_is_truncated_or_damaged(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}", noise())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.match("truncated|damaged", reason(path))


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "ppm"])
def test_a_truncated_file_says_truncated(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}", noise())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert reason(path).startswith("truncated")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_truncated_header_differs_from_a_file_that_is_not_an_image(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[:9])
    assert reason(path).startswith("truncated")


def test_text_named_jpg_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("<html>404 Not Found</html>")
    assert reason(path).startswith("not an image")


def test_postscript_named_jpg_is_not_given_to_ghostscript(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert reason(path).startswith("not an image")


def test_zero_bytes_is_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert reason(tmp_path / "a.jpg") == "empty file"


@pytest.mark.parametrize("size", [(13400, 13400), (15000, 15000), (100000, 100000)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, size: Any) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "a.png").write_bytes(png_header(*size))
    assert reason(tmp_path / "a.png").startswith("too large: more than 178 million pixels")


def test_an_image_of_the_most_pixels_passes_the_header_check(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(MAX_PIXELS // 100, 100))
    assert not reason(tmp_path / "a.png").startswith("too large")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    assert "floating-point" in reason(save(tmp_path / "a.tif", Image.new("F", (2, 2), 0.5)))


def test_grey_values_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    assert "outside 0..65535" in reason(save(tmp_path / "a.tif", Image.new("I", (2, 2), 70000)))


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert reason(tmp_path / "a.jpg") == "too large: more than 512 MiB"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_read_permission_is_unusable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    path.chmod(0)
    assert reason(path) == "no permission to read"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_an_image_that_became_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(StageError, match="not a regular file"):
        read_image(tmp_path / "1.png")


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp", "ppm", "tif"])
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(ending: str) -> None:
    buffer = io.BytesIO()
    noise((24, 24)).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
    whole = buffer.getvalue()
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for _ in range(random.integers(0, 8)):
            # Damage in headers is the interesting case.
            damaged[random.integers(0, min(len(damaged), 200))] = random.integers(256)
        outcome = decoded_or_reason(bytes(damaged))
        assert outcome == "RGB" or (outcome and "\n" not in outcome)


def test_decoding_in_threads_warns_of_nothing_and_leaves_no_filter_behind(tmp_path: Path) -> None:
    # 90 million pixels: Pillow warns of a decompression bomb.
    (tmp_path / "a.png").write_bytes(png_header(10000, 9000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            for reading in [pool.submit(read_image, tmp_path / "a.png") for _ in range(8)]:
                assert isinstance(reading.exception(), UnusableImage)
                assert "Decompression" not in str(reading.exception())
        assert warnings.filters == before


def test_a_damaged_tiff_prints_nothing() -> None:
    # Pillow logs an error of this one, which goes to stderr where logging is not set up.
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 2048)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
    tiff += b"".join(struct.pack("<HHIHH", *entry, 0) for entry in entries) + struct.pack("<I", 0)
    code = (
        "import io, logging, sys; from pipeline.sources.decode import decode_image, UnusableImage\n"
        f"try: decode_image(io.BytesIO({tiff!r}))\n"
        "except UnusableImage as error: assert error.reason.startswith('truncated or damaged'), error.reason\n"
        "else: raise AssertionError\n"
        "assert not logging.getLogger('PIL').handlers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unusable_image_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(UnusableImage("empty file"))).reason == "empty file"

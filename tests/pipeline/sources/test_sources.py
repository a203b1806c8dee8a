import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from dpar.images import MAX_PIXELS
from pipeline.runtime.errors import StageError
from pipeline.sources import Folder, IndexedSource, Item, LeftOut, Photos, UnusableImage, open_indexed
from pipeline.sources.decode import MAX_BYTES, decode_image, read_image
from pipeline.sources.imagenet import synsets
from pipeline.sources.photos import CROPS


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 6), (200, 100, 50))).save(path, **options)
    return path


def keys(source: IndexedSource) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def labels(source: IndexedSource) -> list[int]:
    return [source.label(i) for i in range(len(source))]


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


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp", "ppm", "tif"])
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


@pytest.mark.parametrize("gone", ["cat/1.png", "cat"])
def test_a_missing_file_stops_and_says_how_to_continue(tmp_path: Path, gone: str) -> None:
    save(tmp_path / "data" / "cat" / "1.png")
    source = open_indexed(str(tmp_path / "data"))
    (tmp_path / "data" / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(StageError, match=r"cat/1\.png: No such file .*shards are kept: put it back .*run the same"):
        source.load(0)
    (tmp_path / "elsewhere").rename(tmp_path / "data" / gone)
    assert source.load(0).size == (8, 6)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert reason(tmp_path / "a.jpg") == "too large: more than 512 MiB"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_read_permission_is_unusable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    path.chmod(0)
    assert reason(path) == "no permission to read"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_class_folder_without_permission_is_left_out_and_not_called_empty(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir(mode=0)
    assert open_indexed(str(tmp_path)).left_out == (LeftOut("dog", "cannot be listed: Permission denied"),)


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


# Folders


def test_subfolders_are_classes_and_nested_folders_belong_to_them(tmp_path: Path) -> None:
    for path in ["dog/1.png", "cat/b/2.JPG", "cat/b/c/3.webp", "cat/1.jpeg", "cat b/1.png"]:
        save(tmp_path / path)
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("cat", "cat b", "dog")
    assert keys(source) == ["cat/1.jpeg", "cat/b/2.JPG", "cat/b/c/3.webp", "cat b/1.png", "dog/1.png"]
    assert labels(source) == [0, 0, 0, 1, 2]
    assert source.load(0).size == (8, 6)
    assert source.left_out == ()


def test_names_with_spaces_and_accents_are_kept_and_composed(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "été à la mer")
    save(tmp_path / decomposed / "fête 1.png")
    save(tmp_path / "zèbre" / "1.png")
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("zèbre", "été à la mer")
    assert source.key(1) == f"{decomposed}/fête 1.png"
    assert source.load(1).size == (8, 6)
    assert open_indexed(str(tmp_path), classes=[decomposed]).class_names == ("été à la mer",)


def test_names_that_are_equal_when_composed_both_work(tmp_path: Path) -> None:
    forms: list[Literal["NFC", "NFD"]] = ["NFC", "NFD"]
    for x, form in enumerate(forms):
        save(tmp_path / "cat" / f"{unicodedata.normalize(form, 'é')}.png", Image.new("L", (1, 1), x))
    source = open_indexed(str(tmp_path))
    assert len(set(keys(source))) == 2
    assert {source.load(i).getpixel((0, 0)) for i in range(2)} == {(0, 0, 0), (1, 1, 1)}


def test_a_name_that_is_not_utf8_is_spelled_out(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system keeps UTF-8 names only")
    shutil.copy(save(tmp_path / "x" / "1.png"), os.fsdecode(folder + b"/\xff.png"))
    source = open_indexed(str(tmp_path))
    assert keys(source) == ["caf\\xe9/\\xff.png", "x/1.png"]
    assert source.class_names == ("caf\\xe9", "x")
    assert source.load(0).size == (8, 6)
    json.dumps(source.describe()).encode()


def test_hidden_files_and_other_files_are_not_images(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    for path in ["cat/._1.png", ".cache/1.png", "cat/.thumbs/1.png", "__MACOSX/cat/1.png", "cat/__MACOSX/1.png"]:
        save(tmp_path / path)
    (tmp_path / "README.md").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    source = Folder(str(tmp_path))
    assert keys(source) == ["cat/1.png"]
    assert source.ignored == 2
    assert source.left_out == ()


def test_a_folder_of_images_alone_is_one_class(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "b.png")
    save(tmp_path / "cats" / "a.png")
    source = open_indexed(str(tmp_path / "cats") + "/")
    assert source.class_names == ("cats",)
    assert keys(source) == ["a.png", "b.png"]


def test_images_beside_class_folders_are_left_out_with_a_reason(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    save(tmp_path / "stray.png")
    source = open_indexed(str(tmp_path))
    assert keys(source) == ["cat/1.png"]
    assert source.left_out == (LeftOut("stray.png", "image outside the class folders: it has no class"),)


def test_an_empty_class_folder_gets_no_label_but_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "1.png")
    (tmp_path / "cat" / "deep").mkdir(parents=True)
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("dog",)
    assert labels(source) == [0]
    assert source.left_out == (LeftOut("cat", "empty class folder: no images in it"),)
    with pytest.raises(StageError, match="class 'cat' has no images"):
        open_indexed(str(tmp_path), classes=["cat"])


def test_a_source_without_images_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.txt").touch()
    with pytest.raises(StageError, match=r"no images in it; looked for CLASS/picture .*jpg.* 1 other files ignored"):
        open_indexed(str(tmp_path))


@pytest.mark.parametrize("name", ["train", "val", "validation", "test"])
def test_a_folder_of_splits_asks_for_one(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / "cat" / "1.png")
    with pytest.raises(StageError, match=f"--split {name}, or give the folder itself"):
        open_indexed(str(tmp_path))
    source = open_indexed(str(tmp_path), split=name)
    assert source.class_names == ("cat",)
    assert keys(source) == ["cat/1.png"]


@pytest.mark.parametrize("split", ["val", "..", "train/../train", ""])
def test_a_split_that_is_not_a_subfolder_is_an_error(tmp_path: Path, split: str) -> None:
    save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(StageError, match=f"no subfolder for the split '{split}'; (available: train|did you mean)"):
        open_indexed(str(tmp_path), split=split)


def test_linked_class_folders_and_a_linked_root_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "a" / "deep" / "1.png")
    save(tmp_path / "data" / "cat" / "1.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store" / "a", target_is_directory=True)
    (tmp_path / "root").symlink_to(tmp_path / "data", target_is_directory=True)
    for root in ("data", "root"):
        source = open_indexed(str(tmp_path / root))
        assert source.class_names == ("cat", "dog")
        assert keys(source) == ["cat/1.png", "dog/deep/1.png"]
        assert source.load(1).size == (8, 6)
        assert source.left_out == ()


def test_a_folder_is_read_once_and_deeper_links_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save(root / "cat" / "1.png")
    save(tmp_path / "store" / "1.png")
    for link, target in {
        "cat/loop": root,
        "around": tmp_path,
        "root": root,
        "same": root / "cat",
        "stored": tmp_path / "store",
        "stored again": tmp_path / "store",
        "store/loop": root,
    }.items():
        ((root if "store/" not in link else tmp_path) / link).symlink_to(target, target_is_directory=True)
    source = open_indexed(str(root))
    assert keys(source) == ["cat/1.png", "stored/1.png"]
    again = "link to a folder already listed: not followed"
    deeper = "link to a folder: not followed"
    assert {x.key: x.reason for x in source.left_out} == {
        **dict.fromkeys(["around", "root", "same", "stored again"], again),
        **dict.fromkeys(["cat/loop", "stored/loop"], deeper),
    }


def test_imagenets_ids_get_their_readable_names_and_any_unambiguous_part_names_a_class(tmp_path: Path) -> None:
    for name in ["n02099601", "n02012849", "n03126707"]:
        save(tmp_path / name / "1.png")
    names = ("n02012849 crane", "n02099601 golden retriever", "n03126707 crane")
    assert open_indexed(str(tmp_path)).class_names == names
    for asked in ["n02099601", "golden retriever", "n02099601 golden retriever"]:
        assert open_indexed(str(tmp_path), classes=[asked]).class_names == names[1:2]
    with pytest.raises(StageError, match="'crane' is the name of 2 classes; choose from: n02012849 crane, n03126707"):
        open_indexed(str(tmp_path), classes=["crane"])
    with pytest.raises(StageError, match="did you mean 'golden retriever'"):
        open_indexed(str(tmp_path), classes=["golden retreiver"])


def test_one_folder_that_is_not_an_imagenet_class_keeps_all_names(tmp_path: Path) -> None:
    for name in ["n02099601", "n99999999"]:
        save(tmp_path / name / "1.png")
    assert open_indexed(str(tmp_path)).class_names == ("n02099601", "n99999999")


def test_the_names_of_imagenets_classes_are_a_thousand_in_the_order_of_their_ids() -> None:
    assert len(synsets()) == 1000
    assert list(synsets()) == sorted(synsets())
    assert all(re.fullmatch(r"n\d{8}", synset) and words.strip() for synset, words in synsets().items())


def test_parts_contain_every_image_once_in_order(tmp_path: Path) -> None:
    for i in range(7):
        save(tmp_path / "cat" / f"{i}.png", Image.new("L", (1, 1), i))
    source = open_indexed(str(tmp_path))
    assert source.n_parts(3) == 3
    items = [item for part in range(3) for item in source.part(part, 3)]
    assert [item.key for item in items] == keys(source)
    assert [item.load().getpixel((0, 0)) for item in items if isinstance(item, Item)] == [(i, i, i) for i in range(7)]


def test_links_to_files_are_images_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    real = save(tmp_path / "real.png")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.png").symlink_to(real)
    (tmp_path / "data" / "cat" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "data" / "cat" / "3.png").symlink_to("3.png")
    source = open_indexed(str(tmp_path / "data"))
    assert keys(source) == ["cat/1.png"]
    assert source.load(0).size == (8, 6)
    assert [x.key for x in source.left_out] == ["cat/2.png", "cat/3.png"]
    assert source.left_out[0].reason == "broken link"
    assert source.left_out[1].reason.startswith("cannot be followed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_left_out_without_waiting(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    assert open_indexed(str(tmp_path)).left_out == (LeftOut("cat/2.png", "not a regular file"),)


def test_a_listing_depends_only_on_names_sizes_and_modification_times(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in ("b", "a", "ä", "a b") for i in (10, 9, 1)]
    for root, order in (("x", names), ("y", names[::-1])):
        for name in order:
            os.utime(save(tmp_path / root / name), ns=(10**18, 10**18))
    first, second = (open_indexed(str(tmp_path / root)) for root in "xy")
    assert keys(first) == keys(second)
    assert labels(first) == labels(second) == sorted(labels(first))
    assert first.describe()["listing_sha256"] == second.describe()["listing_sha256"]
    save(tmp_path / "y" / "a" / "11.png")
    assert open_indexed(str(tmp_path / "y")).describe()["listing_sha256"] != first.describe()["listing_sha256"]


def test_a_picture_replaced_under_its_name_is_another_listing(tmp_path: Path) -> None:
    path = tmp_path / "cat" / "1.png"
    found = set()
    for colour, changed in ((1, 0), (2, 1)):
        save(path, Image.new("RGB", (8, 6), (colour, 0, 0)))
        os.utime(path, ns=(changed, changed))
        found.add(open_indexed(str(tmp_path)).describe()["listing_sha256"])
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(1, 1))
    source = open_indexed(str(tmp_path))
    found.add(source.describe()["listing_sha256"])
    assert len(found) == 3
    path.unlink()
    assert source.describe()["listing_sha256"] in found  # of when it was first asked for


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_an_image_that_became_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(StageError, match="not a regular file"):
        read_image(tmp_path / "1.png")


def test_a_description_is_json_and_names_the_listing(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "1.png")
    description = open_indexed(str(tmp_path), split="train").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == "folder"
    assert description["location"] == str(tmp_path / "train")
    assert description["split"] == "train"
    assert description["images"] == 1
    assert re.fullmatch("[0-9a-f]{64}", str(description["listing_sha256"]))


# Choosing


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


# The photographs


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


def test_sources_can_be_pickled(tmp_path: Path, photos: dict[str, Photos]) -> None:
    save(tmp_path / "cat" / "1.png")
    for source in (open_indexed(str(tmp_path)), photos["validation"]):
        copy = pickle.loads(pickle.dumps(source))
        assert keys(copy) == keys(source)
        np.testing.assert_array_equal(np.asarray(copy.load(0)), np.asarray(source.load(0)))

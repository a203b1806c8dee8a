import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from pipeline.reports.charts import color_bar, colors, entropy_scale, heat, histogram
from pipeline.reports.page import Picture, Section, Table, render
from pipeline.reports.pictures import (
    captioned,
    data_uri,
    draw_patches,
    entropy_map,
    patches_sheet,
    png_bytes,
    reconstruction_sheet,
    sheet,
)

BAR = (0x7A, 0x2A, 0x86)
GREY = np.full((32, 32, 3), 128, np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def starts(*where: int, n: int = 16) -> np.ndarray:
    out = np.zeros(n, bool)
    out[list(where)] = True
    return out


def is_drawn(picture: Image.Image, y: float, x: float) -> bool:
    """Return whether there is a line on the grey image near a position."""
    near = pixels(picture)[max(int(y) - 3, 0) : int(y) + 4, max(int(x) - 3, 0) : int(x) + 4]
    return bool(near.max() > 200)


def test_colors_get_lighter_from_low_to_high() -> None:
    lightness = colors(np.linspace(0, 1, 100), 0.0, 1.0).astype(float) @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(lightness) > 0)


def test_infinite_values_have_the_top_colour_and_missing_ones_are_grey() -> None:
    top, infinite, missing = colors(np.array([9.0, np.inf, np.nan], np.float16), 0.0, 9.0)
    np.testing.assert_array_equal(top, infinite)
    np.testing.assert_array_equal(missing, [128, 128, 128])


def test_heat_map_has_one_uniform_cell_per_token_in_raster_order() -> None:
    values = np.arange(12.0).reshape(3, 4)
    picture = pixels(heat(values, 0.0, 11.0, size_px=30))
    assert picture.shape == (30, 40, 3)
    expected = colors(values, 0.0, 11.0).repeat(10, axis=0).repeat(10, axis=1)
    np.testing.assert_array_equal(picture, expected)


def test_heat_map_of_a_size_that_does_not_divide_by_the_grid_still_has_that_size() -> None:
    assert heat(np.zeros((7, 7)), 0.0, 1.0, size_px=100).size == (100, 100)


@pytest.mark.parametrize(("low", "high"), [(0.0, 9.7), (3.0, 3.5), (0.0, 0.001), (2.0, 2.0), (0.0, 1000.0)])
@pytest.mark.parametrize("height", [20, 64, 384])
def test_color_bar_has_the_wanted_height_whatever_its_scale(low: float, high: float, height: int) -> None:
    assert color_bar(low, high, height).height == height


def test_a_line_separates_two_tokens_of_a_row_exactly_where_a_patch_starts() -> None:
    picture = draw_patches(GREY, starts(0, 2, 4, 8, 12), (4, 4), scale=3)  # cells of 24 px
    assert is_drawn(picture, 12, 48)
    assert not is_drawn(picture, 12, 24)
    assert not is_drawn(picture, 36, 48)


def test_rows_are_separated_unless_one_patch_holds_the_tokens_above_and_below() -> None:
    picture = draw_patches(GREY, starts(0, 10), (4, 4), scale=3)
    assert not is_drawn(picture, 24, 60)  # tokens 3 and 7
    assert is_drawn(picture, 48, 60)  # tokens 7 and 11
    assert not is_drawn(picture, 48, 12)  # tokens 4 and 8


def test_the_frame_is_open_where_a_patch_continues_in_the_next_row() -> None:
    picture = draw_patches(GREY, starts(0, 3, 8, 12), (4, 4), scale=3)  # token 3's patch continues to token 4
    assert not is_drawn(picture, 12, 95)
    assert not is_drawn(picture, 36, 0)
    assert is_drawn(picture, 12, 0)
    assert is_drawn(picture, 60, 95)


@pytest.mark.parametrize("shade", [0, 255])
def test_outlines_are_visible_on_black_and_on_white(shade: int) -> None:
    image = np.full((32, 32, 3), shade, np.uint8)
    picture = pixels(draw_patches(image, np.ones(16, bool), (4, 4), scale=3))
    assert np.abs(picture[12] - shade).max() > 100


def test_boundaries_that_do_not_fill_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4×4 needs \(16,\)"):
        draw_patches(GREY, np.ones(15, bool), (4, 4))


def test_a_sheet_shows_every_picture_in_full_with_its_title() -> None:
    red, blue = (Image.new("RGB", (60, 40), color) for color in ("red", "blue"))
    whole = pixels(sheet([[red, blue], [blue]], ["a long title " * 6, "second"], ["left", "right × τ"]))
    assert int((whole == [255, 0, 0]).all(-1).sum()) == 60 * 40
    assert int((whole == [0, 0, 255]).all(-1).sum()) == 2 * 60 * 40


@pytest.mark.parametrize("title", ["word " * 60, "path/" * 60, "x" * 300, "猫/写真 é τ", "", "two\nlines"])
def test_titles_of_any_length_stay_inside_the_sheet(title: str) -> None:
    whole = pixels(sheet([[Image.new("RGB", (120, 80), "grey")]], [title], [title]))
    for border in (whole[:4], whole[-4:], whole[:, :4], whole[:, -4:]):
        assert border.min() == 255


def test_a_caption_of_any_length_is_drawn_to_its_last_letter() -> None:
    picture = Image.new("RGB", (256, 20), (9, 9, 9))
    name = "n02106662 German shepherd, " * 20
    one, other = (captioned(picture, name + letter) for letter in "xy")
    assert one.width == 256
    assert one.crop((0, 0, 256, 20)).tobytes() == picture.tobytes()
    assert one.tobytes() != other.tobytes()
    assert captioned(picture, "dog").height < one.height


def test_a_sheet_with_too_few_titles_is_refused() -> None:
    with pytest.raises(ValueError, match="1 row and 0 column titles do not fit 2 rows of 1"):
        sheet([[Image.new("RGB", (8, 8))]] * 2, ["one"])


def test_sheets_of_patches_and_reconstructions_omit_missing_columns() -> None:
    images = np.stack([GREY, GREY])
    entropy = np.full((2, 16), 3.0, np.float16)
    columns = {"all": np.ones((2, 16), bool)}
    without = patches_sheet(images, None, columns, (4, 4), ["a", "b"])
    full = patches_sheet(images, entropy, columns, (4, 4), ["a", "b"], originals=images)
    assert full.width > without.width
    assert full.height == without.height
    pair = reconstruction_sheet(images, ["a", "b"], originals=images)
    assert pair.width > reconstruction_sheet(images, ["a", "b"]).width


def test_entropy_scale_covers_all_tokens_except_token_0() -> None:
    assert entropy_scale(np.array([np.inf, 3.2, 4.9], np.float16)) == (3.0, 5.0)
    assert entropy_scale(np.array([np.inf, np.nan], np.float16)) == (0.0, 1.0)
    assert entropy_map(np.zeros(16, np.float16), (4, 4), (0.0, 1.0), 96).height == 96


def test_histogram_bars_are_as_high_as_their_shares() -> None:
    drawn = pixels(histogram([3, 1], ["1", "2"], axis="tokens"))
    columns = (np.abs(drawn - BAR).sum(-1) < 9).sum(0)  # of the bars' colour
    left, right = columns[: len(columns) // 2].max(), columns[len(columns) // 2 :].max()
    assert left / right == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("counts", [[], [0, 0], [1] * 100])
def test_histograms_of_no_values_and_of_many_are_drawn(counts: list[int]) -> None:
    drawn = histogram(counts, [str(i) for i in range(len(counts))], axis="a")
    assert drawn.size == histogram([3, 1], ["1", "2"], axis="a").size


def test_png_is_lossless_and_a_data_uri_nearly() -> None:
    ramp = np.linspace(0, 255, 64)
    image = Image.fromarray(np.stack([np.broadcast_to(ramp, (48, 64))] * 3, -1).astype(np.uint8))
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(png_bytes(image)))), pixels(image))
    uri = data_uri(image)
    back = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))
    assert np.abs(pixels(back) - pixels(image)).mean() < 3


def test_a_picture_larger_than_webp_allows_is_shrunk_into_its_page() -> None:
    uri = data_uri(Image.new("RGB", (8, 20_000)))
    assert Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))).height == 16383


def page(tmp_path: Path) -> str:
    hostile = "<script>alert('&')</script>"
    section = Section(
        hostile,
        hostile,
        pictures=[Picture(hostile, data_uri(Image.new("RGB", (4, 4))), f'"{hostile}')],
        tables=[Table(hostile, [hostile, "b"], [[hostile, "1"]], hostile)],
        chart=Picture(hostile, data_uri(Image.new("RGB", (4, 4))), hostile),
    )
    out = tmp_path / "new" / "index.html"
    render("report.html", out, title=hostile, subtitle=hostile, sections=[section] * 3, made_by={"dpar": hostile})
    return out.read_text(encoding="utf-8")


def test_a_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    text = page(tmp_path)
    outside = re.sub(r'src="data:image/webp;base64,[A-Za-z0-9+/=]*"', "", text)
    for sign in ("http", "src=", "<script", "@import", "url(", "<link"):
        assert sign not in outside


def test_a_page_escapes_every_text_it_is_given(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("&lt;script&gt;") > 10
    assert 'alt="&#34;&lt;script&gt;' in text
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"index.html"}


def test_a_page_with_a_missing_value_keeps_the_old_page(tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    out.write_text("before")
    with pytest.raises(UndefinedError):
        render("report.html", out, title="t")
    assert out.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]

"""Pictures for reports: entropy maps, patches drawn on images, and sheets of both.

    values = entropy.reshape(grid)                           # (H_g, W_g), nats
    row = [enlarge(image, 3), heat(values, 0.0, 9.7, size_px=384), draw_patches(image, starts, grid, scale=3)]
    sheet([row], row_titles=["cat/1.jpg"], column_titles=["image", "entropy", "patches"]).save("sheet.png")

Arrays in, Pillow images out. A patch is a run of tokens in raster order, so without row reset it may continue at the
left end of the next row.
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.reports.charts import color_bar, entropy_scale, heat

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAPER, INK = (255, 255, 255), (28, 30, 34)
TEXT_PX = 15
LINE_PX = 19  # from one line of text to the next
LIGHT, DARK = (255, 255, 255), (0, 0, 0)  # a patch's outline and its edge
OUTLINE_OPACITY, EDGE_OPACITY = 0.95, 0.6
ROW_TITLE_PX = 190  # largest width
TITLE_LINES = 4  # at most
WEBP_QUALITY = 85
WEBP_LARGEST = 16383  # pixels along a side

# Pillow's built-in font has ASCII and a few other characters.
_SPELT = {"τ": "threshold", "×": "x", "≥": ">=", "≤": "<=", "∞": "inf", "−": "-", "–": "-", "—": "-"}
_DRAWN = frozenset("«°±·»‘’“”…")


def enlarge(image: NDArray[np.uint8], scale: int) -> Image.Image:
    """Return an image (H, W, 3) uint8 enlarged ``scale`` times in both directions, smoothly."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def scale_for(side: int, wanted: int = 384) -> int:
    """Return the integer factor, at least 1, that brings ``side`` pixels closest to ``wanted``."""
    return max(1, round(wanted / side))


def draw_patches(
    image: NDArray[np.uint8], starts: NDArray[np.bool_], grid: tuple[int, int], scale: int = 3
) -> Image.Image:
    """Draw the outlines of an image's patches on it, as light lines with dark edges.

    There is a line between two neighbouring tokens of different patches. The frame is open where a patch continues
    from the right end of one row to the left end of the next.

    Args:
        image: (H, W, 3) uint8.
        starts: (N,) bool, in raster order.
        grid: rows and columns of tokens.
        scale: how much larger than ``image`` the picture is, so that lines stay thin.

    Raises:
        ValueError: ``starts`` does not fill the grid.
    """
    rows, columns = grid
    if starts.shape != (rows * columns,):
        raise ValueError(f"starts is {starts.shape}; a grid of {rows}×{columns} needs ({rows * columns},)")
    pixels = np.asarray(enlarge(image, scale), np.float32)
    width = max(1, round(min(pixels.shape[0] / rows, pixels.shape[1] / columns) / 24))
    patch = np.cumsum(starts, dtype=np.int64).reshape(grid)
    line = np.zeros(pixels.shape[:2], bool)
    edge = np.zeros(pixels.shape[:2], bool)
    for mask, wide in ((line, 0), (edge, 1)):
        _mark_vertical(mask, _vertical_borders(patch), width, wide)
        _mark_vertical(mask.T, _horizontal_borders(patch).T, width, wide)
    opacity = np.where(line, OUTLINE_OPACITY, np.where(edge, EDGE_OPACITY, 0.0))[..., None].astype(np.float32)
    color = np.where(line[..., None], np.array(LIGHT, np.float32), np.array(DARK, np.float32))
    return Image.fromarray(np.rint(pixels * (1 - opacity) + color * opacity).astype(np.uint8))


def _vertical_borders(patch: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return where (H_g, W_g) patch numbers have a line left of a column or at the end: (H_g, W_g + 1) bool."""
    rows, columns = patch.shape
    borders = np.ones((rows, columns + 1), bool)
    borders[:, 1:-1] = patch[:, 1:] != patch[:, :-1]
    wraps = patch[1:, 0] == patch[:-1, -1]
    borders[1:, 0], borders[:-1, -1] = ~wraps, ~wraps
    return borders


def _horizontal_borders(patch: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return where (H_g, W_g) patch numbers have a line above a row or at the end: (H_g + 1, W_g) bool."""
    borders = np.ones((patch.shape[0] + 1, patch.shape[1]), bool)
    borders[1:-1] = patch[1:] != patch[:-1]
    return borders


def _mark_vertical(mask: NDArray[np.bool_], borders: NDArray[np.bool_], width: int, wide: int) -> None:
    """Mark the (rows, columns + 1) ``borders`` in the (H, W) ``mask``, ``width`` px wide plus ``wide`` on each side.

    Lines extend past their corners by as much, so that edges meet.
    """
    height, across = mask.shape
    rows, columns = borders.shape[0], borders.shape[1] - 1
    for row, column in zip(*np.nonzero(borders), strict=True):
        x = min(max(round(column * across / columns) - width // 2, 0), across - width)
        top = round(row * height / rows) - width // 2 - wide
        bottom = round((row + 1) * height / rows) - width // 2 + width + wide
        mask[max(top, 0) : bottom, max(x - wide, 0) : x + width + wide] = True


def beside(pictures: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    """Place pictures side by side, aligned at the top."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    return canvas


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    gap: int = 12,
) -> Image.Image:
    """Arrange pictures in a grid on white, with titles left of the rows and above the columns.

    Args:
        rows: pictures of any sizes; a column is as wide as its widest, a row as high as its tallest. Rows may differ
            in length.
        row_titles: one per row, or none; long ones are broken into lines, or at ``\\n``.
        column_titles: one per column, or none.
        gap: pixels between pictures, and around the sheet.

    Raises:
        ValueError: no pictures, or another number of titles than of rows or columns.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a sheet needs at least one picture")
    if (row_titles and len(row_titles) != len(rows)) or (column_titles and len(column_titles) != columns):
        raise ValueError(
            f"{len(row_titles)} row and {len(column_titles)} column titles do not fit {len(rows)} rows of {columns}"
        )
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(columns)]
    heads = [_wrap(title, width) for title, width in zip(column_titles, widths, strict=False)]
    sides = [_wrap(title, ROW_TITLE_PX) for title in row_titles]
    heights = [
        max([picture.height for picture in row] + ([LINE_PX * len(sides[i])] if sides else []))
        for i, row in enumerate(rows)
    ]
    left = gap + max((_text_px(line) + gap for lines in sides for line in lines), default=0)
    top = gap + max((LINE_PX * len(lines) + gap // 2 for lines in heads), default=0)
    size = (left + sum(widths) + gap * columns, top + sum(heights) + gap * len(rows))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    x = left
    for lines, width in zip(heads, widths, strict=False):
        _write(draw, (x, top - gap // 2 - LINE_PX * len(lines)), lines)
        x += width + gap
    y = top
    for i, row in enumerate(rows):
        if sides:
            _write(draw, (gap, y), sides[i])
        x = left
        for picture, width in zip(row, widths, strict=False):
            canvas.paste(picture, (x, y))
            x += width + gap
        y += heights[i] + gap
    return canvas


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """Return a picture with ``text`` below it, wrapped."""
    lines = _wrap(text, picture.width, most=None)
    result = Image.new("RGB", (picture.width, picture.height + LINE_PX * len(lines)), PAPER)
    result.paste(picture)
    _write(ImageDraw.Draw(result), (0, picture.height), lines)
    return result


def entropy_map(
    entropy: NDArray[np.floating[Any]], grid: tuple[int, int], scale: tuple[float, float], size_px: int
) -> Image.Image:
    """Draw an image's entropies (N,) in nats as a heat map ``size_px`` px high, with its colour bar."""
    low, high = scale
    return beside([heat(entropy.reshape(grid), low, high, size_px), color_bar(low, high, size_px)])


def patches_sheet(
    images: NDArray[np.uint8],
    entropy: NDArray[np.floating[Any]] | None,
    starts: Mapping[str, NDArray[np.bool_]],
    grid: tuple[int, int],
    titles: Sequence[str],
    *,
    originals: NDArray[np.uint8] | None = None,
    scale: tuple[float, float] | None = None,
) -> Image.Image:
    """Return a sheet with one row per image: original, image decoded from its codes, entropies, patches.

    Args:
        images: (n, H, W, 3) uint8, decoded from the codes; patches are drawn on them.
        entropy: (n, N) nats, +inf for token 0; None omits the column.
        starts: (n, N) bool, by column title: one column of outlined patches each.
        grid: rows and columns of tokens.
        titles: of the rows, n of them.
        originals: (n, H, W, 3) uint8; None omits the column.
        scale: ends of the colour scale, nats; None uses `entropy_scale` of these entropies.
    """
    times = scale_for(images.shape[1])
    ends = scale or (entropy_scale(entropy) if entropy is not None else (0.0, 1.0))
    rows = []
    for i, image in enumerate(images):
        row = [] if originals is None else [enlarge(originals[i], times)]
        row.append(enlarge(image, times))
        if entropy is not None:
            row.append(entropy_map(entropy[i], grid, ends, image.shape[0] * times))
        row += [draw_patches(image, column[i], grid, times) for column in starts.values()]
        rows.append(row)
    heads = ["original"] * (originals is not None) + ["decoded"] + ["entropy"] * (entropy is not None)
    return sheet(rows, titles, [*heads, *starts])


def reconstruction_sheet(
    reconstructions: NDArray[np.uint8], titles: Sequence[str], originals: NDArray[np.uint8] | None = None
) -> Image.Image:
    """Return a sheet with one row per image: the original, if given, and its reconstruction.

    Args:
        reconstructions: (n, H, W, 3) uint8.
        titles: of the rows, n of them.
        originals: (n, H, W, 3) uint8.
    """
    times = scale_for(reconstructions.shape[1])
    columns = [("decoded", reconstructions)]
    if originals is not None:
        columns.insert(0, ("original", originals))
    rows = [[enlarge(images[i], times) for _, images in columns] for i in range(len(reconstructions))]
    return sheet(rows, titles, [title for title, _ in columns])


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def data_uri(image: Image.Image) -> str:
    """Return an image as a ``data:`` URI, for self-contained pages: WebP, a tenth of PNG's size for photos."""
    stream = io.BytesIO()
    if max(image.size) > WEBP_LARGEST:
        image = image.copy()
        image.thumbnail((WEBP_LARGEST, WEBP_LARGEST))
    image.convert("RGB").save(stream, "WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text_px(text: str) -> int:
    return math.ceil(_font(TEXT_PX).getlength(text))


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * LINE_PX), line, font=_font(TEXT_PX), fill=INK)


def _drawable(text: str) -> str:
    """Replace characters that the font lacks: signs are spelt out, accents dropped, the rest become ``?``."""
    plain = unicodedata.normalize("NFKD", "".join(_SPELT.get(c, c) for c in text.replace("…", "\0")))
    kept = (c for c in plain.replace("\0", "…") if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in _DRAWN else "?" for c in kept)


def _wrap(text: str, width: int, most: int | None = TITLE_LINES) -> list[str]:
    """Break a text into lines of at most ``width`` px, preferably at spaces and slashes; keep the first ``most``."""
    lines: list[str] = []
    for paragraph in _drawable(text).split("\n"):
        line = ""
        for piece in _pieces(paragraph):
            if line and _text_px((line + piece).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += piece
            while _text_px(line.rstrip()) > width and len(line) > 1:
                fits = max(k for k in range(1, len(line)) if k == 1 or _text_px(line[:k]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line.rstrip())
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    return lines


def _pieces(text: str) -> list[str]:
    """Split a text where a line may be broken; each part keeps the space or slash at its end."""
    return [piece for piece in text.replace(" ", " \0").replace("/", "/\0").split("\0") if piece]

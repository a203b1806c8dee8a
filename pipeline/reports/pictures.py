"""Pictures for reports: entropy maps, patches drawn on images, sheets of both, and a bar chart in SVG.

    values = entropy.reshape(grid)                           # (H_g, W_g), nats
    row = [enlarge(image, 3), heat(values, 0.0, 9.7, size_px=384), draw_patches(image, starts, grid, scale=3)]
    sheet([row], row_titles=["cat/1.jpg"], column_titles=["image", "entropy", "patches"]).save("sheet.png")

Arrays in, Pillow images out; drawn with Pillow and NumPy alone. A patch is a run of tokens in raster order, so
without row reset it may go on at the left end of the next row.
"""

from __future__ import annotations

import base64
import html
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAPER, INK, FAINT = (255, 255, 255), (28, 30, 34), (110, 114, 120)
TEXT_PX = 15
LINE_PX = 19  # from one line of text to the next
LIGHT, DARK = (255, 255, 255), (0, 0, 0)  # a patch's outline and its edge
OUTLINE_OPACITY, EDGE_OPACITY = 0.95, 0.6
ROW_TITLE_PX = 190  # widest
TITLE_LINES = 4  # most

# The font that Pillow ships has ASCII and a few signs.
_SPELT = {"τ": "threshold", "×": "x", "≥": ">=", "≤": "<=", "∞": "inf", "−": "-", "–": "-", "—": "-"}
_DRAWN = frozenset("«°±·»‘’“”…")

# Magma at nine equal steps: its lightness rises evenly, so it also reads in grey and to the colour-blind.
_ANCHORS = np.array(
    [
        (0, 0, 4),
        (28, 16, 68),
        (79, 18, 123),
        (129, 37, 129),
        (181, 54, 122),
        (229, 80, 100),
        (251, 135, 97),
        (254, 194, 135),
        (252, 253, 191),
    ],
    np.float64,
)


def colors(values: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.uint8]:
    """Colours of values: ``low`` and below is nearly black, ``high`` and above pale yellow.

    Args:
        values: (...) floats; +inf is the top colour, NaN mid-grey.
        low, high: the ends of the scale, in the unit of the values.

    Returns:
        (..., 3) uint8.
    """
    floats = np.asarray(values, np.float64)
    span = high - low if high > low else 1.0
    with np.errstate(invalid="ignore"):
        place = np.clip((floats - low) / span, 0.0, 1.0) * (len(_ANCHORS) - 1)
    steps = np.arange(len(_ANCHORS))
    out = np.stack([np.interp(place, steps, channel) for channel in _ANCHORS.T], axis=-1)
    out[np.isnan(floats)] = 128.0
    return np.rint(out).astype(np.uint8)


def heat(values: NDArray[np.floating[Any]], low: float, high: float, size_px: int) -> Image.Image:
    """A map of one value a token.

    Args:
        values: (H_g, W_g) floats; +inf (token 0) is drawn in the top colour.
        low, high: the ends of the colour scale, in the unit of the values.
        size_px: height of the picture; its width follows from the grid.
    """
    rows, columns = values.shape
    width = max(1, round(size_px * columns / rows))
    y = np.arange(size_px) * rows // size_px
    x = np.arange(width) * columns // width
    return Image.fromarray(colors(values, low, high)[y][:, x])


def color_bar(low: float, high: float, height: int, unit: str = "nats") -> Image.Image:
    """The scale of a heat map of the same ``low`` and ``high``, ``height`` px high, with ticks and the unit on top."""
    bar_px, tick_px = 14, 5
    ticks = _ticks(low, high, most=max(2, height // 60))
    decimals = _decimals(ticks)
    texts = [f"{tick:.{decimals}f}" for tick in ticks]
    width = max(bar_px + tick_px + 4 + max(_text_px(text) for text in texts), _text_px(unit)) + 2
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    top, bottom = LINE_PX + TEXT_PX // 2, height - 1 - TEXT_PX // 2
    if bottom <= top:
        top, bottom = 0, height - 1
    ramp = np.linspace(high, low, bottom - top + 1)
    picture.paste(Image.fromarray(np.repeat(colors(ramp, low, high)[:, None], bar_px, axis=1)), (0, top))
    draw.text((0, 0), _drawable(unit), font=_font(TEXT_PX), fill=FAINT)
    span = high - low if high > low else 1.0
    for tick, text in zip(ticks, texts, strict=True):
        y = round(bottom - (tick - low) / span * (bottom - top))
        draw.line([(bar_px, y), (bar_px + tick_px - 1, y)], fill=INK)
        draw.text((bar_px + tick_px + 4, y), text, font=_font(TEXT_PX), fill=INK, anchor="lm")
    return picture


def enlarge(image: NDArray[np.uint8], scale: int) -> Image.Image:
    """An image (H, W, 3) uint8, ``scale`` times as large in both directions, smooth."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def scale_for(side: int, wanted: int = 384) -> int:
    """The whole number of times that brings ``side`` pixels closest to ``wanted``, at least 1."""
    return max(1, round(wanted / side))


def draw_patches(
    image: NDArray[np.uint8], starts: NDArray[np.bool_], grid: tuple[int, int], scale: int = 3
) -> Image.Image:
    """The patches of an image outlined on it, in a light line with dark edges.

    There is a line between two neighbouring tokens wherever they are in different patches. The frame is open where a
    patch goes on from the right end of one row to the left end of the next.

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
    """Of (H_g, W_g) patch numbers: (H_g, W_g + 1) bool, whether there is a line left of each column, and at the end."""
    rows, columns = patch.shape
    borders = np.ones((rows, columns + 1), bool)
    borders[:, 1:-1] = patch[:, 1:] != patch[:, :-1]
    wraps = patch[1:, 0] == patch[:-1, -1]
    borders[1:, 0], borders[:-1, -1] = ~wraps, ~wraps
    return borders


def _horizontal_borders(patch: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Of (H_g, W_g) patch numbers: (H_g + 1, W_g) bool, whether there is a line above each row, and at the end."""
    borders = np.ones((patch.shape[0] + 1, patch.shape[1]), bool)
    borders[1:-1] = patch[1:] != patch[:-1]
    return borders


def _mark_vertical(mask: NDArray[np.bool_], borders: NDArray[np.bool_], width: int, wide: int) -> None:
    """Sets (H, W) ``mask`` where (rows, columns + 1) ``borders`` are, ``width`` px across and ``wide`` more each side.

    Lines reach over the corners by as much, so that edges meet.
    """
    height, across = mask.shape
    rows, columns = borders.shape[0], borders.shape[1] - 1
    for row, column in zip(*np.nonzero(borders), strict=True):
        x = min(max(round(column * across / columns) - width // 2, 0), across - width)
        top = round(row * height / rows) - width // 2 - wide
        bottom = round((row + 1) * height / rows) - width // 2 + width + wide
        mask[max(top, 0) : bottom, max(x - wide, 0) : x + width + wide] = True


def beside(pictures: Sequence[Image.Image], gap: int = 6) -> Image.Image:
    """Pictures side by side, their tops level."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    gap: int = 12,
) -> Image.Image:
    """A grid of pictures on white, with titles left of the rows and above the columns.

    Args:
        rows: pictures of any sizes; a column is as wide as its widest, a row as high as its highest. Rows may differ
            in length.
        row_titles: one a row, or none; broken into lines where they are long, or at ``\\n``.
        column_titles: one a column, or none.
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
    whole = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(whole)
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
            whole.paste(picture, (x, y))
            x += width + gap
        y += heights[i] + gap
    return whole


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """Return a picture with all of ``text`` below it, in as many lines as it takes."""
    lines = _wrap(text, picture.width, most=None)
    result = Image.new("RGB", (picture.width, picture.height + LINE_PX * len(lines)), PAPER)
    result.paste(picture)
    _write(ImageDraw.Draw(result), (0, picture.height), lines)
    return result


def entropy_scale(entropy: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """A colour scale for entropies of any shape: all but the lowest and highest 1 % of them, to the half nat.

    0 to 1 where nothing is finite.
    """
    finite = np.asarray(entropy, np.float64)[np.isfinite(entropy)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.quantile(finite, (0.01, 0.99))
    bottom = max(0.0, math.floor(low * 2) / 2)
    return bottom, max(math.ceil(high * 2) / 2, bottom + 0.5)


def entropy_map(
    entropy: NDArray[np.floating[Any]], grid: tuple[int, int], scale: tuple[float, float], size_px: int
) -> Image.Image:
    """An image's entropies (N,) in nats as a heat map ``size_px`` px high, with its colour bar."""
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
    """One row an image: the original, the image that its codes stand for, its entropies, its patches.

    Args:
        images: (n, H, W, 3) uint8, decoded from the codes; patches are drawn on them.
        entropy: (n, N) nats, +inf for token 0; None leaves the column out.
        starts: (n, N) bool, by column title: one column of outlined patches each.
        grid: rows and columns of tokens.
        titles: of the rows, n of them.
        originals: (n, H, W, 3) uint8; None leaves the column out.
        scale: ends of the colour scale, nats; None takes `entropy_scale` of these entropies.
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
    """One row an image: the original, where it is there, and what its codes decode to.

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


def histogram_svg(
    counts: Sequence[float],
    labels: Sequence[str],
    *,
    title: str,
    description: str,
    axis: str,
    name: str = "histogram",
) -> str:
    """A small bar chart to stand in a page: SVG with a title and a description, no scripts, the page's own colours.

    Args:
        counts: one bar each, 0 or more; drawn as shares of their sum.
        labels: under the bars; where they are many, some are left out.
        title: read out, and shown when pointed at.
        description: what the bars say, for those who cannot see them.
        axis: what the labels count.
        name: of this chart, unique in its page; letters, digits and ``-``.
    """
    total = sum(counts) or 1
    shares = [count / total for count in counts]
    top = max(shares, default=0) or 1
    width, plot, left, above = 640, 160, 8, 22
    step = (width - 2 * left) / max(len(shares), 1)
    bar = min(step * 0.8, 72)
    every = max(1, math.ceil(len(shares) / 16))
    parts = []
    for i, (share, label) in enumerate(zip(shares, labels, strict=True)):
        middle = left + step * (i + 0.5)
        high = plot * share / top
        parts.append(
            f'<rect class="bar" x="{middle - bar / 2:.1f}" y="{above + plot - high:.1f}" width="{bar:.1f}" '
            f'height="{high:.1f}" fill="currentColor" opacity="0.7">'
            f"<title>{html.escape(label)}: {share:.1%}</title></rect>"
        )
        if i % every == 0:
            parts.append(_svg_text(middle, above + plot + 16, label))
        if len(shares) <= 16:
            parts.append(_svg_text(middle, above + plot - high - 6, f"{share:.1%}"))
    base = above + plot
    parts.append(f'<path d="M{left} {base}.5H{width - left}" stroke="currentColor" opacity="0.5"/>')
    parts.append(_svg_text(width / 2, base + 36, axis))
    ids = f'"{name}-title {name}-description"'
    return (
        f'<svg class="histogram" role="img" aria-labelledby={ids} viewBox="0 0 {width} {base + 44}">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>{"".join(parts)}</svg>'
    )


def _svg_text(x: float, y: float, text: str) -> str:
    style = 'text-anchor="middle" font-size="13" font-family="system-ui, sans-serif" fill="currentColor"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(text)}</text>'


def png_bytes(image: Image.Image) -> bytes:
    """An image as a PNG file's bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def data_uri(image: Image.Image | bytes) -> str:
    """An image, or a PNG file's bytes, as a ``data:`` address, to stand in a page that needs no other file."""
    png = image if isinstance(image, bytes) else png_bytes(image)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _text_px(text: str) -> int:
    return math.ceil(_font(TEXT_PX).getlength(text))


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * LINE_PX), line, font=_font(TEXT_PX), fill=INK)


def _drawable(text: str) -> str:
    """The text in characters that the font has: signs spelt out, accents dropped, ``?`` for the rest."""
    plain = unicodedata.normalize("NFKD", "".join(_SPELT.get(c, c) for c in text.replace("…", "\0")))
    kept = (c for c in plain.replace("\0", "…") if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in _DRAWN else "?" for c in kept)


def _wrap(text: str, width: int, most: int | None = TITLE_LINES) -> list[str]:
    """Lines at most ``width`` px wide, broken at spaces and slashes where there are any; the first ``most`` of them."""
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
    """The parts of a text between which a line may be broken; each keeps the space or slash at its end."""
    return [piece for piece in text.replace(" ", " \0").replace("/", "/\0").split("\0") if piece]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` + 1 of them, evenly apart."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low, high]


def _decimals(ticks: Sequence[float]) -> int:
    """The fewest decimals, at most 3, that tell the ticks apart exactly."""
    return next((d for d in range(3) if all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 3)

"""Colour maps, colour scales and histograms, drawn with matplotlib.

    picture = heat(entropy.reshape(grid), 0.0, 9.7, size_px=384)         # (H_g, W_g), nats
    scale = color_bar(0.0, 9.7, height=384)

Arrays in, Pillow images out. matplotlib takes half a second to load, so it is imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLORS = "magma"  # perceptually uniform: also readable in grey and by the colour-blind
MISSING = (128 / 255,) * 3
DPI = 100
BAR_WIDTH, BAR_PX = 76, 14  # pixels of a colour scale, and of its coloured part
MARGIN_TOP, MARGIN_BOTTOM = 24, 8  # pixels for the unit and for half a label
LABELLED = 16  # most bars that are labelled with their share


def colors(values: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.uint8]:
    """Return the colours of values: ``low`` and below is nearly black, ``high`` and above pale yellow.

    Args:
        values: (...) floats; +inf is the top colour, NaN mid-grey.
        low, high: the ends of the scale, in the unit of the values.

    Returns:
        (..., 3) uint8.
    """
    from matplotlib import colormaps

    span = high - low if high > low else 1.0
    place = np.clip((np.asarray(values, np.float64) - low) / span, 0.0, 1.0)
    rgba: NDArray[np.uint8] = colormaps[COLORS].with_extremes(bad=MISSING)(place, bytes=True)
    return rgba[..., :3]


def heat(values: NDArray[np.floating[Any]], low: float, high: float, size_px: int) -> Image.Image:
    """Draw a map of one value per token.

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
    """Draw the colour bar of a heat map, ``height`` px high, with ticks and the unit on top."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(BAR_WIDTH / DPI, height / DPI), dpi=DPI)
    has_room = height > 2 * (MARGIN_TOP + MARGIN_BOTTOM)
    bottom, top = (MARGIN_BOTTOM, MARGIN_TOP) if has_room else (0, 0)
    axes = figure.add_axes((0, bottom / height, BAR_PX / BAR_WIDTH, (height - bottom - top) / height))
    scale = Normalize(low, high if high > low else low + 1.0)
    bar = figure.colorbar(ScalarMappable(scale, COLORS), cax=axes)
    bar.ax.locator_params(axis="y", nbins=max(2, height // 60))
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    if has_room:
        bar.ax.set_title(unit, loc="left", fontsize=9, color="dimgray")
    else:
        bar.set_ticks([])
    return _rendered(figure)


def entropy_scale(entropy: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Return a colour scale for entropies of any shape: their 1 % and 99 % quantiles, rounded outwards to half a nat.

    0 to 1 if nothing is finite.
    """
    finite = np.asarray(entropy, np.float64)[np.isfinite(entropy)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.quantile(finite, (0.01, 0.99))
    bottom = max(0.0, math.floor(low * 2) / 2)
    return bottom, max(math.ceil(high * 2) / 2, bottom + 0.5)


def histogram(counts: Sequence[float], labels: Sequence[str], axis: str) -> Image.Image:
    """Draw a bar chart of shares.

    Args:
        counts: one bar each, 0 or more; drawn as shares of their sum.
        labels: below the bars; some are omitted if there are many.
        axis: title of the horizontal axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    shares = np.asarray(counts, np.float64) / (sum(counts) or 1)
    figure = Figure(figsize=(6.4, 2.4), dpi=2 * DPI, layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(np.arange(len(shares)), shares, color="#7a2a86")
    every = max(1, math.ceil(len(labels) / LABELLED))
    axes.set_xticks(np.arange(0, len(labels), every), labels[::every])
    axes.set_xlabel(axis)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(shares) <= LABELLED:
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize="small")
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    """Return a figure as an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

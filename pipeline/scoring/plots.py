"""Plots of ``dpar eval``'s cells: quality against guidance, against mean patch length, against training FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.scoring.records import DISTANCE, Cell
from shards.files import atomic_path

# file, x axis, its label, fields that distinguish lines
PLOTS = (
    ("quality-vs-guidance.png", "cfg_scale", "guidance scale", ("checkpoint", "threshold", "max_length")),
    ("quality-vs-patch-length.png", "mean_length", "mean patch length, tokens", ("checkpoint", "cfg_scale")),
    ("quality-vs-training-flops.png", "training_flops", "training FLOPs", ("cfg_scale", "threshold", "max_length")),
)
LABELS = {"cfg_scale": "guidance", "threshold": "threshold", "max_length": "max length", "checkpoint": ""}


def how_sampled(cells: Sequence[Cell]) -> str:
    """Return a line about how the samples of these cells were drawn and scored."""
    settings = {
        "samples": "{} per row",
        "labels": "{} labels",
        "cfg_scale": "guidance {}",
        "cfg_schedule": "{} guidance",
        "decode_precision": "decoded in {}",
        "features": "features of {}",
    }
    values = {name: list(dict.fromkeys(_short(getattr(cell, name)) for cell in cells)) for name in settings}
    return ", ".join(form.format(" or ".join(values[name])) for name, form in settings.items())


def plot_cells(cells: Sequence[Cell], out: Path) -> None:
    """Write a plot for each quantity that takes several values."""
    scored = [cell for cell in cells if cell.scores is not None]
    wanted = [plot for plot in PLOTS if _varies(scored, plot)]
    if not wanted:
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    for name, x, label, apart in wanted:
        figure = Figure(figsize=(8, 4.4), dpi=150, layout="constrained")
        axes = figure.subplots()
        groups = _grouped(scored, x, apart)
        telling = [i for i, key in enumerate(apart) if len({group[i] for group in groups}) > 1]
        for i, (group, line) in enumerate(groups.items()):
            color = colormaps["viridis"](i / (len(groups) + 1))  # without its end, which is too pale on white
            points = sorted((float(getattr(cell, x)), cell.scores.distance) for cell in line if cell.scores)
            title = ", ".join(f"{LABELS[apart[k]]} {_short(group[k])}".strip() for k in telling)
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=title)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{DISTANCE[scored[0].features]} (lower is better)")
        axes.grid(alpha=0.3)
        axes.set_title(how_sampled(scored), fontsize="x-small")
        if telling:
            figure.legend(loc="outside right upper", fontsize="small")
        with atomic_path(out / name) as part:
            figure.savefig(part, format="png")


def _grouped(cells: Sequence[Cell], x: str, apart: tuple[str, ...]) -> dict[tuple[Any, ...], list[Cell]]:
    """Return the cells that have the quantity ``x``, by the fields that distinguish lines."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if getattr(cell, x) is not None:
            groups.setdefault(tuple(getattr(cell, key) for key in apart), []).append(cell)
    return groups


def _varies(cells: Sequence[Cell], plot: tuple[str, str, str, tuple[str, ...]]) -> bool:
    """Return whether a line of this plot would have points with different x values."""
    _, x, _, apart = plot
    if x == "mean_length" and len({(cell.threshold, cell.max_length) for cell in cells}) < 2:
        return False  # patch lengths vary a little with guidance, too
    return any(len({getattr(cell, x) for cell in line}) > 1 for line in _grouped(cells, x, apart).values())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

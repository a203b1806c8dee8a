"""The study's tables and plots of all finished cells; missing cells are listed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.cells import Cell, Study
from benchmarks.study.rows import LENGTHS, PARTS, Row
from pipeline.runs.run_folder import read_metrics
from pipeline.scoring.records import DISTANCE, KERNEL_DISTANCE, Floor, Results
from shards.records import read_json

MISSING = "missing"
HEADINGS = {
    "main": "Main",
    "choices": "Choices",
    "thresholds": "Other lengths at inference",
    "limits": "Threshold, length limit, depths, rotary variants",
    "probe": "Linear probe",
    "equal-flops": "Equal FLOPs",
    "speed": "Sampling speed",
}
Numbers = dict[str, float | None]


def write_tables(study: Study, out: Path) -> Path:
    """Write `tables.md` and two plots into ``out``, and return the path of the tables."""
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for part in PARTS:
        missing = [cell.name for cell in study.cells(part) if not study.done(cell)]
        if part == "speed" and not (study.work / "speed.json").is_file():
            missing.append("speed.json")
        lines = [f"## {HEADINGS[part]}", "", *_part(study, part), ""]
        if missing:
            lines += [f"Missing: {', '.join(missing)}.", ""]
        parts.append("\n".join(lines))
    path = out / "tables.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    for name, per_image in (("images", False), ("training-flops", True)):
        plot(study, out / f"quality-vs-{name}.png", flops=per_image)
    return path


def _part(study: Study, part: str) -> list[str]:
    rows, lines = study.rows(part), list[Sequence[str]]()
    columns: tuple[str, ...]
    if part == "speed":
        return _table(("row", "images/s"), [(row.title, _speed(study, row)) for row in rows])
    if part == "probe":
        read = [(row, _over_seeds(study, part, "probes", row, _probe)) for row in rows]
        return _table(
            ("row", "top-1 %", "top-5 %"),
            [(row.title, cells["top1"], cells["top5"]) for row, cells in read],
        )
    if part == "thresholds":
        columns = ("row", "mean length", "held-out nats/token", KERNEL, DISTANCE["efficientnet"])
        for row in rows:
            for length in LENGTHS:
                cells = _over_seeds(study, part, "scores", row, _scores, length)
                lines.append((row.title, f"{length:g}", cells["nats"], cells["kid"], cells["fd"]))
        return _table(columns, lines)
    columns = ("row", "held-out nats/token", KERNEL, DISTANCE["efficientnet"], "training PFLOPs", "images/s")
    for row in rows:
        cells = _over_seeds(study, part, "scores", row, _scores)
        lines.append((row.title, cells["nats"], cells["kid"], cells["fd"], cells["pflops"], _speed(study, row)))
    floor = _floor(study)
    if part == "main" and floor is not None:
        kernel = _number(floor.scores.kernel_distance)
        lines.append(("floor: training images", "", kernel, _number(floor.scores.distance), "", ""))
    return _table(columns, lines)


KERNEL = KERNEL_DISTANCE["efficientnet"]


def _over_seeds(
    study: Study,
    part: str,
    kind: str,
    row: Row,
    read: Callable[[Path], Numbers],
    length: float | None = None,
) -> dict[str, str]:
    """Return mean ± standard deviation over the finished seeds, with their number if some are missing."""
    cells = [cell for cell in study.cells(part) if (cell.kind, cell.row, cell.length) == (kind, row, length)]
    done = [read(study.work / cell.name) for cell in cells if study.done(cell)]
    names = ("top1", "top5") if kind == "probes" else ("nats", "kid", "fd", "pflops")
    return {name: _spread([numbers[name] for numbers in done], len(cells)) for name in names}


def _spread(values: Sequence[float | None], wanted: int) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return MISSING
    text = _number(statistics.mean(numbers))
    text += f" ± {_number(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
    return text if len(numbers) == wanted else f"{text} ({len(numbers)} of {wanted} seeds)"


def _scores(folder: Path) -> Numbers:
    results = Results.read(folder / "results.json")
    row, (cell, *_) = results.held_out[0], results.cells
    scores, flops = cell.scores, cell.training_flops
    return {
        "nats": None if row.bits_per_token is None else row.bits_per_token * math.log(2),
        "kid": None if scores is None else scores.kernel_distance,
        "fd": None if scores is None else scores.distance,
        "pflops": None if flops is None else flops / 1e15,
    }


def _probe(folder: Path) -> Numbers:
    test: dict[str, Any] = read_json(folder / "probe.json")["test"]
    return {name: 100 * test[name] for name in ("top1", "top5")}


def _speed(study: Study, row: Row) -> str:
    path = study.work / "speed.json"
    rates = read_json(path)["images_per_second"] if path.is_file() else {}
    return _number(rates[row.name]) if row.name in rates else MISSING


def _floor(study: Study) -> Floor | None:
    path = study.work / "scores" / "llamagen-seed-0" / "results.json"
    return Results.read(path).floor if path.is_file() else None


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *rows)]


def plot(study: Study, path: Path, *, flops: bool) -> None:
    """Plot held-out nats of the main rows during training, and their final KID and Fréchet distance, against cost."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    rows = study.rows("main")
    for i, row in enumerate(rows):
        color = colormaps["tab10"](i)
        for seed in range(study.seeds):
            label = row.title if seed == 0 else None
            steps, nats, per_step = _curve(study, row, seed, flops)
            panels[0].plot([step * per_step for step in steps], nats, color=color, label=label)
            cell = Cell(kind="scores", row=row, seed=seed)
            if not study.done(cell):
                continue
            numbers = _scores(study.work / cell.name)
            for panel, name in zip(panels[1:], ("kid", "fd"), strict=True):
                panel.scatter(study.size.steps * per_step, numbers[name], color=color)
    titles = ("held-out nats per token", KERNEL, DISTANCE["efficientnet"])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xlabel("training FLOPs" if flops else "images seen")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small")
    figure.savefig(path)


def _curve(study: Study, row: Row, seed: int, flops: bool) -> tuple[list[int], list[float], float]:
    """Return steps, held-out nats at these steps, and the length of a step on the x axis."""
    lines = read_metrics(study.work / "runs" / f"{row.name}-seed-{seed}")
    points = {
        line["step"]: line["validation_bits_per_token"] for line in lines if line.get("validation_bits_per_token")
    }
    costs = [line["training_gflops_per_image"] for line in lines if "training_gflops_per_image" in line]
    per_image = (costs[-1] * 1e9 if costs else math.nan) if flops else 1
    return list(points), [bits * math.log(2) for bits in points.values()], study.size.batch * per_image

"""Output files of ``dpar eval``: the results as JSON, CSV, Markdown tables and plots.

results = write_results(Path("scores"), row, reconstruction, identity)     # cells: OUT/cells/*/cell.json
print(markdown(results))
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.provenance import made_by
from pipeline.runtime.terminal import ESCAPES
from pipeline.runtime.work_sharing import claim_parts
from pipeline.scoring.bootstrap import Interval
from pipeline.scoring.plots import how_sampled, plot_cells
from pipeline.scoring.records import RECONSTRUCTION, Cell, Floor, HeldOutRow, Measure, Reconstruction, Results
from shards.files import atomic_path, write_json
from shards.records import read_json

INTERVAL = "_interval"  # suffix of an interval's key

# Columns of a cell's numbers, in order: key, heading, format. Columns that no cell has are omitted.
COLUMNS = (
    ("images", "images", "{}"),
    ("checkpoint", "checkpoint", "{}"),
    ("threshold", "threshold", "{:.4g}"),
    ("max_length", "max length", "{}"),
    ("cfg_scale", "guidance", "{:g}"),
    ("tokens_per_image", "tokens", "{}"),
    ("patches_per_image", "patches", "{:.1f}"),
    ("mean_length", "length", "{:.3f}"),
    ("bits_per_token", "bits/token", "{:.4f}"),
    ("held_out_patches_per_image", "held-out patches", "{:.1f}"),
    ("held_out_mean_length", "held-out length", "{:.3f}"),
    ("gmacs_per_image", "GMACs", "{:.4g}"),
    ("FID", "FID", "{:.3f}"),
    ("sFID", "sFID", "{:.3f}"),
    ("KID", "KID", "{:.5f}"),
    ("inception_score", "IS", "{:.2f}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("tokenizer Fréchet distance", "tokenizer Fréchet distance", "{:.3f}"),
    ("tokenizer KID", "tokenizer KID", "{:.5f}"),
    ("tokenizer_precision", "tokenizer precision", "{:.3f}"),
    ("tokenizer_recall", "tokenizer recall", "{:.3f}"),
    ("FD (EfficientNet-Lite0)", "FD (EfficientNet-Lite0)", "{:.3f}"),
    ("KID (EfficientNet-Lite0)", "KID (EfficientNet-Lite0)", "{:.5f}"),
    ("efficientnet_precision", "EfficientNet precision", "{:.3f}"),
    ("efficientnet_recall", "EfficientNet recall", "{:.3f}"),
    ("FD-DINOv2", "FD-DINOv2", "{:.3f}"),
    ("KID-DINOv2", "KID-DINOv2", "{:.5f}"),
    ("dinov2_precision", "DINOv2 precision", "{:.3f}"),
    ("dinov2_recall", "DINOv2 recall", "{:.3f}"),
    ("images_per_second", "images/s", "{:.2f}"),
    ("samples", "samples", "{}"),
    ("labels", "labels", "{}"),
    ("reference_images", "references", "{}"),
)
# Columns of the held-out table.
HELD_OUT = (
    ("checkpoint", "checkpoint", "{}"),
    ("threshold", "threshold", "{:.4g}"),
    ("max_length", "max length", "{}"),
    ("tokens_per_image", "tokens", "{}"),
    ("patches_per_image", "patches", "{:.1f}"),
    ("mean_length", "length", "{:.3f}"),
    ("gmacs_per_image", "GMACs", "{:.4g}"),
    ("bits_per_token", "bits/token", "{:.4f}"),
)
# Columns of the table of measures.
MEASURES = (
    ("score", "score", "{}"),
    ("network", "features of", "{}"),
    ("weights", "weights", "{:.12}"),
    ("resize", "images resized", "{}"),
    ("reference", "reference", "{}"),
    ("reference_images", "its images", "{}"),
    ("samples", "samples", "{}"),
    ("labels", "labels", "{}"),
    ("decode_precision", "decoded in", "{}"),
)


def write_results(
    out: Path,
    newest: HeldOutRow,
    reconstruction: Reconstruction | None,
    identity: dict[str, Any],
    floor: Floor | None = None,
    measures: Sequence[Measure] = (),
    protocol: tuple[str | None, Sequence[str]] = (None, ()),
) -> Results:
    """Write ``results.json``, ``.csv``, ``.md`` and plots of all rows and cells in ``out``; return the results.

    ``protocol`` is the requested one, with the deviations from it. Without cells the table has the held-out rows.

    Raises:
        ArtifactError: the file of a row or a cell cannot be read.
    """
    cells = [Cell.from_json(read_json(path), str(path)) for path in (out / "cells").glob("*/cell.json")]
    rows = [HeldOutRow.from_json(read_json(path), str(path)) for path in (out / "likelihood").glob("*.json")]
    results = Results(
        newest=newest,
        reconstruction=reconstruction,
        identity=identity,
        made_by=made_by(),
        held_out=sorted((row for row in rows if row.bits_per_token is not None), key=_order),
        cells=sorted(cells, key=_order),
        floor=floor,
        measures=measures,
        protocol=protocol[0],
        deviations=protocol[1],
    )
    rows_of_table = [cell.row() for cell in results.cells]
    values = results.to_json()
    for _ in claim_parts(out / "results.json", 1, lambda _: False):
        write_json(out / "results.json", values)
        texts = {"results.md": markdown(results), "results.csv": _csv(rows_of_table or values["held_out"])}
        for name, text in texts.items():
            with atomic_path(out / name) as part:
                part.write_text(text, encoding="utf-8")
        plot_cells(results.cells, out)
    return results


def _order(row: HeldOutRow | Cell) -> tuple[Any, ...]:
    numbers = (row.step, row.threshold, row.max_length, row.cfg_scale if isinstance(row, Cell) else None)
    return (*(-1.0 if number is None else float(number) for number in numbers), row.name)


def _csv(cells: list[dict[str, Any]]) -> str:
    cells = [_flat(cell) for cell in cells]
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in cell.items()} for cell in cells)
    return stream.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the ends of each interval in separate columns."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith(INTERVAL):
            flat |= {} if value is None else {f"{name}_{end}": value[end] for end in ("low", "high")}
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> Any:
    """Return a value that spreadsheets read as plain text or a number, on one line."""
    if not isinstance(value, str):
        return value
    line = value.translate(ESCAPES).replace("\n", "\\u000a")
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def markdown(results: Results) -> str:
    """Return the results as Markdown: tables of model and tokenizer, of several held-out rows, and of the cells."""
    rows: list[tuple[str, str]] = []
    newest, reconstruction = results.newest, results.reconstruction
    if newest.bits_per_token is not None:
        if len(results.held_out) < 2:
            rows += [
                (
                    "held-out bits per token",
                    _with_interval(newest.bits_per_token, newest.bits_per_token_interval, "{:.4f}"),
                ),
                ("patches per image", f"{newest.patches_per_image:.1f} of {newest.tokens_per_image} tokens"),
                ("GMACs per image", f"{newest.gmacs_per_image:.3f}"),
            ]
        rows.append(("held-out images", f"{newest.held_out_images}"))
        rows += [] if newest.parameters is None else [("parameters", f"{newest.parameters / 1e6:.1f} M")]
    if reconstruction is not None and reconstruction.psnr_db is not None:
        rows += [
            ("tokenizer's PSNR", f"{reconstruction.psnr_db:.2f} dB"),
            ("tokenizer's SSIM", f"{reconstruction.ssim:.4f}"),
        ]
        if reconstruction.distance is not None:
            text = _with_interval(reconstruction.distance, reconstruction.distance_interval, "{:.3f}")
            rows.append((RECONSTRUCTION[reconstruction.features], text))
    parts = []
    if rows:
        parts.append("| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows))
    if len(results.held_out) > 1:
        held_out = [row.to_json() for row in results.held_out]
        parts.append(_table("Held-out images, patchified with each row's rule.", HELD_OUT, held_out))
    rows_of_images = [cell.row() for cell in results.cells]
    title = f"Samples: {how_sampled(results.cells)}." if results.cells else "No samples."
    if results.floor is not None:
        rows_of_images = [{"images": "samples"} | row for row in rows_of_images]
        rows_of_images.append({"images": "floor"} | results.floor.to_json())
        title += f" Floor: {results.floor.samples} real images of {results.floor.source}."
    if rows_of_images:
        parts.append(_table(title, COLUMNS, rows_of_images))
    if results.measures:
        measures = [dataclasses.asdict(measure) for measure in results.measures]
        title = "How each score was measured. Scores are comparable only if all of this is equal."
        parts.append(_table(title, MEASURES, measures))
    parts += _about_intervals(results)
    if results.protocol is not None:
        parts.append(f"Protocol: the {results.protocol}'s, {'but:' if results.deviations else 'without deviation.'}\n")
        if results.deviations:
            parts.append("".join(f"- {_text(line, '{}')}\n" for line in results.deviations))
    return "\n".join(parts)


def _about_intervals(results: Results) -> list[str]:
    """Return a line on how the intervals in the tables were computed, if there are any."""
    rows: list[HeldOutRow | Cell] = [results.newest, *results.held_out, *results.cells]
    of_bits = [row.bits_per_token_interval for row in rows]
    of_distances = [cell.scores.distance_interval for cell in results.cells if cell.scores is not None]
    of_distances += [] if results.reconstruction is None else [results.reconstruction.distance_interval]
    pairs = (("bits per token", of_bits), ("distances", of_distances))
    chosen = {name: interval for name, intervals in pairs for interval in intervals if interval is not None}
    if not chosen:
        return []
    first = next(iter(chosen.values()))
    counts = " and ".join(f"{interval.resamples} resamples of {name}" for name, interval in chosen.items())
    how = f"{first.level:.0%} confidence intervals by a bootstrap over images, {counts}, seed {first.seed}"
    return [f"In brackets: {how}.\n"]


def _with_interval(value: float, interval: Interval | None, form: str) -> str:
    if interval is None:
        return form.format(value)
    return f"{form.format(value)} ({form.format(interval.low)} to {form.format(interval.high)})"


def _table(title: str, columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> str:
    columns = tuple(column for column in columns if any(row.get(column[0]) is not None for row in rows))
    lines = [[heading for _, heading, _ in columns], ["---:"] * len(columns)]
    lines += [[_cell(row, key, form) for key, _, form in columns] for row in rows]
    return f"{_text(title, '{}')}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    interval = row.get(key + INTERVAL)
    if row.get(key) is None or interval is None:
        return _text(row.get(key), form)
    return _with_interval(row[key], Interval(**interval), form)


def _text(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value).translate(ESCAPES).replace("|", r"\|")

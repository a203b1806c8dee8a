"""What ``dpar eval`` writes for people and programs: the cells as JSON, CSV, a Markdown table and plots.

results = write_results(Path("scores"), {"bits_per_token": 7.1, …}, progress)        # cells: OUT/cells/*/cell.json
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from pipeline.runtime.progress import Progress
from pipeline.runtime.terminal import ESCAPES
from pipeline.runtime.work_sharing import claim_parts
from pipeline.scoring.plots import how_sampled, plot_cells
from shards.files import atomic_path, write_json

# Columns of a cell's numbers, in order: key, heading, format. Those that no cell has are left out.
COLUMNS = (
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
    ("inception_score", "IS", "{:.2f}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("tokenizer Fréchet distance", "tokenizer Fréchet distance", "{:.3f}"),
    ("tokenizer_precision", "tokenizer precision", "{:.3f}"),
    ("tokenizer_recall", "tokenizer recall", "{:.3f}"),
    ("images_per_second", "images/s", "{:.2f}"),
    ("samples", "samples", "{}"),
    ("labels", "labels", "{}"),
    ("reference_images", "references", "{}"),
)
# Likewise of a row of the held-out table.
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


def write_results(out: Path, found: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Writes ``results.json``, ``.csv``, ``.md`` and plots of all cells in ``out``; gives what the first holds.

    Without cells the table is that of the held-out rows.
    """
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "cells").glob("*/cell.json")]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "likelihood").glob("*.json")]
    held_out = [{k: v for k, v in row.items() if k != "bits_by_class"} for row in rows if "bits_per_token" in row]
    results = found | {"held_out": sorted(held_out, key=_order), "cells": sorted(cells, key=_order)}
    for _ in claim_parts(out / "results.json", 1, lambda _: False):
        write_json(out / "results.json", results)
        for name, text in (
            ("results.md", markdown(results)),
            ("results.csv", _csv(results["cells"] or results["held_out"])),
        ):
            with atomic_path(out / name) as part:
                part.write_text(text, encoding="utf-8")
        plot_cells(results["cells"], out)
    return results


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    numbers = (cell["step"], cell["threshold"], cell["max_length"], cell.get("cfg_scale"))
    return (*(-1.0 if number is None else float(number) for number in numbers), cell["name"])


def _csv(cells: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in cell.items()} for cell in cells)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """A value that a spreadsheet takes for nothing but text or a number, on one line."""
    if not isinstance(value, str):
        return value
    line = value.translate(ESCAPES).replace("\n", "\\u000a")
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown: tables of the model and its tokenizer, of several held-out rows, and of the cells."""
    rows: list[tuple[str, str]] = []
    held_out = results["held_out"]
    if "bits_per_token" in results:
        if len(held_out) < 2:
            rows += [
                ("held-out bits per token", f"{results['bits_per_token']:.4f}"),
                ("patches per image", f"{results['patches_per_image']:.1f} of {results['tokens_per_image']} tokens"),
                ("GMACs per image", f"{results['gmacs_per_image']:.3f}"),
            ]
        rows += [
            ("held-out images", f"{results['held_out_images']}"),
            ("parameters", f"{results['parameters'] / 1e6:.1f} M"),
        ]
    if "reconstruction_psnr_db" in results:
        rows += [
            ("tokenizer's PSNR", f"{results['reconstruction_psnr_db']:.2f} dB"),
            ("tokenizer's SSIM", f"{results['reconstruction_ssim']:.4f}"),
        ]
        names = ("rFID", "tokenizer reconstruction distance")
        rows += [(name, f"{results[name]:.3f}") for name in names if name in results]
    parts = []
    if rows:
        parts.append("| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows))
    if len(held_out) > 1:
        parts.append(_table("Held-out images, cut by each row's rule.", HELD_OUT, held_out))
    if results["cells"]:
        parts.append(_table(f"Samples: {how_sampled(results['cells'])}.", COLUMNS, results["cells"]))
    return "\n".join(parts)


def _table(title: str, columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> str:
    columns = tuple(column for column in columns if any(row.get(column[0]) is not None for row in rows))
    lines = [[heading for _, heading, _ in columns], ["---:"] * len(columns)]
    lines += [[_text(row.get(key), form) for key, _, form in columns] for row in rows]
    return f"{_text(title, '{}')}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value).translate(ESCAPES).replace("|", r"\|")

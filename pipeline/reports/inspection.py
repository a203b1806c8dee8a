"""Reports of ``dpar inspect``: tables for the terminal, and the HTML page.

for table in tables(inspection): ...                     # inspection: from pipeline.inspect.inspect
write_page(Path("look"), inspection, drawn)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpar.patching import PatchRule
from pipeline.reports.charts import histogram
from pipeline.reports.inspection_record import (
    Compressible,
    CompressibleClass,
    CompressibleImage,
    Inspection,
    PatchLengths,
    StoredPatches,
)
from pipeline.reports.page import Picture, Section, Table, render
from pipeline.reports.pictures import data_uri
from pipeline.runtime.provenance import made_by
from shards.files import write_json

BARS = 32  # most bars of a histogram


def rule_name(rule: PatchRule) -> str:
    """Return a short name of a rule."""
    if rule.strategy == "static":
        return f"static, length {rule.static_length:g}"
    return "no rule" if rule.threshold is None else f"τ = {rule.threshold:.4g}"


def write_page(out: Path, inspection: Inspection, drawn: Sequence[Section]) -> None:
    """Write ``index.html`` and ``numbers.json`` in ``out``; ``drawn`` are the sections of pictures."""
    write_json(out / "numbers.json", inspection.to_json())
    contents = [_table_artifact(inspection), *_table_values(inspection)]
    sections = [Section("Contents", " ".join(inspection.notes), tables=contents)]
    patches, compressible = inspection.patches, inspection.compressible
    if patches:
        text = "Over all images and views. Tokens saved are 1 - M/N, for M patches in N tokens."
        lengths = _table_patches(inspection, patches)
        sections.append(Section("Patches", text, tables=lengths, chart=_length_chart(patches)))
    if compressible:
        text = "By patches per image: an image with few patches is compressible."
        sections.append(Section("Most and least compressible", text, tables=_table_compressible(compressible)))
    sections += drawn
    sections.append(Section("Settings", "Of the command that made it.", tables=[_table_settings(inspection)]))
    subtitle = f"{inspection.rows:,} images as {inspection.kind}"
    if patches:
        subtitle += f", {patches.mean_length:.3f} tokens per patch"
    render(
        "report.html",
        out / "index.html",
        title=inspection.artifact,
        subtitle=subtitle,
        sections=sections,
        made_by=made_by(),
    )


def _length_chart(patches: StoredPatches) -> Picture:
    counts = {int(length): count for length, count in patches.lengths.items()}
    longest = max(counts)
    step = -(-longest // BARS)
    bins = [(low, min(low + step - 1, longest)) for low in range(1, longest + 1, step)]
    bars = [sum(counts.get(length, 0) for length in range(low, high + 1)) for low, high in bins]
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in bins]
    shares = ", ".join(f"{label}: {bar / sum(bars):.1%}" for label, bar in zip(labels, bars, strict=True))
    chart = histogram(bars, labels, axis="tokens in a patch")
    return Picture("Share of patches of each length", data_uri(chart), f"Bars. {shares}.")


def tables(inspection: Inspection) -> list[Table]:
    """Return the numbers as tables of text."""
    out = [_table_artifact(inspection), *_table_values(inspection)]
    if inspection.patches:
        out += _table_patches(inspection, inspection.patches)
    if inspection.compressible:
        out += _table_compressible(inspection.compressible)
    return [*out, _table_settings(inspection)]


def _table_artifact(inspection: Inspection) -> Table:
    height, width = inspection.grid
    rows = [
        ("images", f"{inspection.rows:,}" + (f", {inspection.left_out:,} left out" if inspection.left_out else "")),
        ("views per image", str(inspection.views)),
        ("tokens per view", f"{height}×{width} = {inspection.tokens_per_image}"),
        ("codebook", f"{inspection.codebook_size:,} codes"),
        ("classes", f"{inspection.classes:,}"),
        ("shards", f"{inspection.shards:,} ({inspection.container}), {_size(inspection.bytes)}"),
        (
            "checked",
            "every shard's SHA-256" if inspection.verified else "shards exist; --verify checks their contents",
        ),
        ("source", _source(inspection.source)),
        ("tokenizer", _model(inspection.tokenizer)),
    ]
    if inspection.reconstruction:
        measured = inspection.reconstruction
        rows.append(("reconstruction", f"{measured['psnr']:.1f} dB PSNR, mean of {measured['images']} images"))
    if inspection.kind == "patches":
        rows.append(("entropy model", _model(inspection.entropy_model)))
    return Table(f"{inspection.kind.capitalize()} in {inspection.artifact}", ("property", "value"), rows)


def _table_values(inspection: Inspection) -> Iterator[Table]:
    codebook = inspection.codebook
    row = (f"{codebook.used:,}", f"{codebook.share:.1%}", f"{codebook.perplexity:,.1f}")
    note = "Perplexity is the number of equally frequent codes that would be as varied."
    yield Table("Codes used", ("codes", "of the codebook", "perplexity"), [row], note)
    if inspection.entropy:
        quantiles = inspection.entropy.quantiles
        header = ("mean", *(f"{float(q):.0%}" for q in quantiles))
        values = (f"{inspection.entropy.mean:.3f}", *(f"{value:.2f}" for value in quantiles.values()))
        yield Table("Entropy in nats, mean and quantiles", header, [values], "Token 0 of each image is excluded.")


def _table_patches(inspection: Inspection, stored: StoredPatches) -> list[Table]:
    name = f"{rule_name(PatchRule.from_dict(inspection.settings))} (stored)"
    lengths: dict[str, PatchLengths] = {name: stored}
    lengths |= {f"τ = {patches.threshold:.4g}": patches for patches in inspection.thresholds}
    rows = [
        (name, f"{patches.mean_length:.3f}", f"{patches.patches_per_image:.1f}", f"{patches.tokens_saved:.1%}")
        for name, patches in lengths.items()
    ]
    table = Table("Patches", ("boundaries", "mean length", "patches per image", "tokens saved"), rows)
    if not inspection.compressible:
        return [table]
    by_class = stored.class_mean_length
    classes = tuple(f"{length:.3f}" for length in (by_class.min, by_class.median, by_class.max))
    return [table, Table("Mean patch length of a class", ("shortest", "median", "longest"), [classes])]


def _table_compressible(compressible: Compressible) -> list[Table]:
    header = ("patches per image", "mean length")
    ends = (("Most", "most"), ("Least", "least"))
    out = []
    for word, end in ends:
        rows = [(c.class_name, str(c.images), *_lengths(c)) for c in getattr(compressible.classes, end)]
        out.append(Table(f"{word} compressible classes", ("class", "images", *header), rows))
    for word, end in ends:
        rows = [(i.key, i.class_name, *_lengths(i)) for i in getattr(compressible.images, end)]
        out.append(Table(f"{word} compressible images", ("key", "class", *header), rows))
    return [table for table in out if table.rows]


def _lengths(entry: CompressibleClass | CompressibleImage) -> tuple[str, str]:
    return f"{entry.patches_per_image:.1f}", f"{entry.mean_length:.3f}"


def _table_settings(inspection: Inspection) -> Table:
    rows = [
        (name if not group else f"{group}.{name}", value if isinstance(value, str) else json.dumps(value))
        for group, settings in (("", inspection.settings), ("codes", inspection.settings.get("codes_settings", {})))
        for name, value in settings.items()
        if name != "codes_settings"
    ]
    rows += [(f"made by {name}", str(value)) for name, value in inspection.made_by.items()]
    return Table("Settings", ("setting", "value"), rows)


def _source(source: dict[str, Any]) -> str:
    split = f", {source['split']}" if source.get("split") else ""
    return f"{source.get('location', source.get('kind', 'not recorded'))}{split}"


def _model(model: dict[str, Any] | None) -> str:
    if model is None:
        return "none"
    return f"{model.get('path', 'not recorded')}, weights {str(model.get('fingerprint', ''))[:12]}"


def _size(size: int) -> str:
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"

"""The numbers of ``dpar inspect`` for people: tables for the terminal, and the page.

for table in tables(found): ...                          # found: what pipeline.inspect.inspect returns
write_page(Path("look"), found, drawn)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpar.patching import PatchRule
from pipeline.reports.page import Section, Table, render
from pipeline.reports.pictures import histogram_svg
from pipeline.runtime.provenance import made_by
from shards.files import write_json

BARS = 32  # most in a histogram


def rule_name(rule: PatchRule) -> str:
    """A rule in a word."""
    if rule.strategy == "static":
        return f"static, length {rule.static_length:g}"
    return "no rule" if rule.threshold is None else f"τ = {rule.threshold:.4g}"


def write_page(out: Path, found: dict[str, Any], drawn: Sequence[Section]) -> None:
    """Write ``index.html`` and ``numbers.json`` in ``out``; ``drawn`` are the sections of pictures."""
    write_json(out / "numbers.json", found)
    sections = [
        Section("What it holds", " ".join(found["notes"]), tables=[_table_artifact(found), *_table_values(found)])
    ]
    if found["patches"]:
        text = "Over all images and views. Tokens saved are 1 - M/N, for M patches in N tokens."
        sections.append(Section("Patches", text, tables=_table_patches(found), svg=_length_chart(found["patches"])))
        if found["compressible"]:
            text = "By patches per image: few patches are a compressible image."
            sections.append(Section("Most and least compressible", text, tables=_table_compressible(found)))
    sections += drawn
    sections.append(Section("Settings", "What made it.", tables=[_table_settings(found)]))
    subtitle = f"{found['rows']:,} images as {found['kind']}"
    if found["patches"]:
        subtitle += f", {found['patches']['mean_length']:.3f} tokens per patch"
    render(
        "report.html",
        out / "index.html",
        title=found["artifact"],
        subtitle=subtitle,
        sections=sections,
        made_by=made_by(),
    )


def _length_chart(patches: dict[str, Any]) -> str:
    counts = {int(length): count for length, count in patches["lengths"].items()}
    longest = max(counts)
    step = -(-longest // BARS)
    bins = [(low, min(low + step - 1, longest)) for low in range(1, longest + 1, step)]
    bars = [sum(counts.get(length, 0) for length in range(low, high + 1)) for low, high in bins]
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in bins]
    shares = ", ".join(f"{label}: {bar / sum(bars):.1%}" for label, bar in zip(labels, bars, strict=True))
    return histogram_svg(
        bars,
        labels,
        title="Patch lengths",
        description=f"Share of patches of each length in tokens. {shares}.",
        axis="tokens in a patch (bars: share of patches)",
        name="patch-lengths",
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """What `inspect` found, as tables of text."""
    out = [_table_artifact(found), *_table_values(found)]
    if found["patches"]:
        out += _table_patches(found)
    if found["compressible"]:
        out += _table_compressible(found)
    return [*out, _table_settings(found)]


def _table_artifact(found: dict[str, Any]) -> Table:
    height, width = found["grid"]
    rows = [
        ("images", f"{found['rows']:,}" + (f", {found['left_out']:,} left out" if found["left_out"] else "")),
        ("views per image", str(found["views"])),
        ("tokens per view", f"{height}×{width} = {found['tokens_per_image']}"),
        ("codebook", f"{found['codebook_size']:,} codes"),
        ("classes", f"{found['classes']:,}"),
        ("shards", f"{found['shards']:,} ({found['container']}), {_size(found['bytes'])}"),
        ("checked", "every shard's SHA-256" if found["verified"] else "shards are there; --verify checks their bytes"),
        ("source", _source(found["source"])),
        ("tokenizer", _model(found["tokenizer"])),
    ]
    if found["reconstruction"]:
        measured = found["reconstruction"]
        rows.append(("reconstruction", f"{measured['psnr']:.1f} dB PSNR, mean of {measured['images']} images"))
    if found["kind"] == "patches":
        rows.append(("entropy model", _model(found["entropy_model"])))
    return Table(f"{found['kind'].capitalize()} in {found['artifact']}", ("property", "value"), rows)


def _table_values(found: dict[str, Any]) -> Iterator[Table]:
    codebook = found["codebook"]
    row = (f"{codebook['used']:,}", f"{codebook['share']:.1%}", f"{codebook['perplexity']:,.1f}")
    note = "Perplexity is the number of codes that would be as varied if all were equally frequent."
    yield Table("Codes used", ("codes", "of the codebook", "perplexity"), [row], note)
    if found["entropy"]:
        quantiles = found["entropy"]["quantiles"]
        header = ("mean", *(f"{float(q):.0%}" for q in quantiles))
        values = (f"{found['entropy']['mean']:.3f}", *(f"{value:.2f}" for value in quantiles.values()))
        yield Table("Entropy in nats, mean and quantiles", header, [values], "Token 0 of each image is left out.")


def _table_patches(found: dict[str, Any]) -> list[Table]:
    stored = (f"{rule_name(PatchRule.from_dict(found['settings']))} (stored)", found["patches"])
    others = [(f"τ = {entry['threshold']:.4g}", entry) for entry in found["thresholds"]]
    rows = [
        (
            name,
            f"{entry['mean_length']:.3f}",
            f"{entry['patches_per_image']:.1f}",
            f"{entry['tokens_saved']:.1%}",
        )
        for name, entry in (stored, *others)
    ]
    by_class = found["patches"]["class_mean_length"]
    classes = tuple(f"{by_class[name]:.3f}" for name in ("min", "median", "max"))
    lengths = Table("Patches", ("boundaries", "mean length", "patches per image", "tokens saved"), rows)
    if not found["compressible"]:
        return [lengths]
    return [lengths, Table("Mean patch length of a class", ("shortest", "median", "longest"), [classes])]


def _table_compressible(found: dict[str, Any]) -> list[Table]:
    out = []
    for what, first in (("classes", "class"), ("images", "key")):
        for end in ("most", "least"):
            entries = found["compressible"][what][end]
            second = "images" if what == "classes" else "class"
            rows = [
                (e[first], str(e[second]), f"{e['patches_per_image']:.1f}", f"{e['mean_length']:.3f}") for e in entries
            ]
            if rows:
                header = (first, second, "patches per image", "mean length")
                out.append(Table(f"{end.capitalize()} compressible {what}", header, rows))
    return out


def _table_settings(found: dict[str, Any]) -> Table:
    rows = [
        (name if not under else f"{under}.{name}", value if isinstance(value, str) else json.dumps(value))
        for under, settings in (("", found["settings"]), ("codes", found["settings"].get("codes_settings", {})))
        for name, value in settings.items()
        if name != "codes_settings"
    ]
    rows += [(f"made by {name}", str(value)) for name, value in found["made_by"].items()]
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

"""``dpar inspect ARTIFACT``: what is in a directory, in numbers, and in pictures where an output is named.

    found = inspect(Path("patches"), Path("look"), InspectSettings(threshold=(7.0, 8.5)))
    found["patches"]["mean_length"]
    for table in tables(found): ...                          # the same numbers, as text to print

The numbers are over every image and view: those of patches and classes as ``dpar patchify`` counted them, the others
read shard by shard. Pictures show the first view of some images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.errors import ModelError
from dpar.patching import PatchRule
from dpar.tokenizer import VQTokenizer, psnr
from pipeline.generation.generator import decode
from pipeline.reports.page import Picture, Section, Table, render
from pipeline.reports.pictures import (
    data_uri,
    draw_patches,
    enlarge,
    entropy_map,
    entropy_scale,
    histogram_svg,
    patches_sheet,
    png_bytes,
    reconstruction_sheet,
    scale_for,
)
from pipeline.runs.weights import load_tokenizer
from pipeline.runtime.device import choose_device
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.provenance import made_by
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.settings import InspectSettings
from pipeline.sources.originals import load_originals
from pipeline.sources.source import nearest
from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Manifest, write_json
from shards.patch_statistics import by_compressibility, check_statistics, class_name, lengths_differ
from shards.reader import Artifact, open_artifact
from shards.records import parse
from shards.rows import Rows

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EXTREMES = 5  # images and classes named at each end
BARS = 32  # most in a histogram
BLOCK = 2**20  # tokens counted at once, so that memory stays small

# All values that a stored entropy can have, by its 16 bits.
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)


def inspect(
    artifact: Path, out: Path | None, settings: InspectSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Reads an artifact whole and says what is in it.

    Args:
        artifact: a codes or patches directory.
        out: where ``index.html``, its pictures as PNG files and ``numbers.json`` go; None draws nothing.
        settings: what to draw, and with what.
        progress: where to report.

    Returns:
        JSON values: the manifest's own, ``codebook``, ``entropy``, ``patches``, ``thresholds``, the most and the least
        ``compressible`` classes and images, ``pictures`` and ``notes``. What an artifact does not hold is None.

    Raises:
        StageError: an unknown class or key, or a threshold where there are no entropies.
        ArtifactError, ModelError: artifact or tokenizer cannot be used; damaged shards are named, with ``verify`` all.
    """
    progress = progress or Progress()
    opened = open_artifact(artifact, verify=settings.verify)
    if out is not None:
        _check_output(out, artifact)
    if opened.manifest.kind == "patches" and "classes" not in opened.manifest.statistics:
        raise StageError(
            f"{artifact} lacks statistics of its classes: an earlier version made it. `dpar patchify {artifact} NEW` "
            "makes one that has them, without a model"
        )
    if opened.manifest.kind == "patches":
        check_statistics(opened.manifest, str(artifact / MANIFEST))
    for threshold in settings.threshold:
        warn_if_out_of_reach(threshold, opened.manifest.codebook_size, progress)
    rule = stored_rule(opened.manifest, str(artifact / MANIFEST))
    survey = Survey.of(opened, settings.threshold, rule, progress)
    found = _numbers(opened, survey, settings)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        gallery = Gallery(out)
        parts = _draw(opened, survey, settings, rule, gallery, found["notes"])
        found["pictures"] = gallery.files
        _write_page(out, found, parts)
    return found


def _check_output(out: Path, artifact: Path) -> None:
    if out.exists() and not out.is_dir():
        raise StageError(f"{out} is a file; name a directory for the page and its pictures")
    if (out / MANIFEST).exists() or artifact.resolve() in (out.resolve(), *out.resolve().parents):
        raise StageError(f"{out} is part of an artifact; name another directory for the page and its pictures")


@dataclass(frozen=True, kw_only=True)
class CodesRecord:
    """What a patches manifest's settings hold of the codes."""

    codes_settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """What a manifest holds of a model's weights."""

    path: str
    fingerprint: str


def stored_rule(manifest: Manifest, where: str) -> PatchRule:
    """The patch rule of a manifest, which is the file ``where``; that of codes, which have none, is never applied.

    Raises:
        ArtifactError: the settings hold values of other types, or that make no rule.
    """
    parse(CodesRecord, manifest.settings, where, at="settings", ignore_unknown=True)
    try:
        return parse(PatchRule, manifest.settings, where, at="settings", ignore_unknown=True)
    except ModelError as error:
        raise ArtifactError(f"{where}: field settings makes no patch rule: {error}") from error


def starts_at(rule: PatchRule, entropy: NDArray[np.float16], threshold: float, grid_width: int) -> NDArray[np.bool_]:
    """Boundaries (..., N) of stored entropies (..., N) at another ``threshold``; of a static rule, by that alone."""
    return dataclasses.replace(rule, strategy="entropy", static_length=None, threshold=threshold).starts(
        entropy, grid_width
    )


def rule_name(rule: PatchRule) -> str:
    """A rule in a word."""
    if rule.strategy == "static":
        return f"static, length {rule.static_length:g}"
    return "no rule" if rule.threshold is None else f"τ = {rule.threshold:.4g}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over an artifact counts. The last three are zero for codes."""

    labels: NDArray[np.int32]  # (rows,)
    codes: NDArray[np.int64]  # (V,) how often each code occurs
    patches: NDArray[np.int32]  # (rows,) over all views
    entropy: NDArray[np.int64]  # (65536,) how often each float16 occurs, by its bits, without token 0
    thresholds: NDArray[np.int64]  # (thresholds,) patches of the whole artifact at each

    @classmethod
    def of(cls, artifact: Artifact, thresholds: Sequence[float], rule: PatchRule, progress: Progress) -> Survey:
        """Reads every shard once, one at a time."""
        manifest = artifact.manifest
        survey = cls(
            labels=np.zeros(manifest.rows, np.int32),
            codes=np.zeros(manifest.codebook_size, np.int64),
            patches=np.zeros(manifest.rows, np.int32),
            entropy=np.zeros(2**16, np.int64),
            thresholds=np.zeros(len(thresholds), np.int64),
        )
        first = 0
        with progress.task("inspect", manifest.rows, "images") as task:
            for index in range(len(manifest.shards)):
                rows = artifact.shard_rows(index)
                survey._add(rows, first, thresholds, rule, manifest.grid[1])
                first += len(rows)
                task.advance(len(rows))
        if thresholds and not survey.finite_entropies:
            raise StageError(f"{artifact.folder} holds no entropies, so --threshold has nothing to go by")
        return survey

    def _add(self, rows: Rows, first: int, thresholds: Sequence[float], rule: PatchRule, grid_width: int) -> None:
        here = slice(first, first + len(rows))
        self.labels[here] = rows.labels
        self.patches[here] = 0 if rows.starts is None else np.count_nonzero(rows.starts, axis=(1, 2))
        step = max(1, BLOCK // int(np.prod(rows.codes.shape[1:])))
        for first in range(0, len(rows), step):
            block = slice(first, first + step)
            self.codes[:] += np.bincount(rows.codes[block].reshape(-1), minlength=len(self.codes))
            if rows.entropy is None:
                continue
            later = np.ascontiguousarray(rows.entropy[block][..., 1:])
            self.entropy[:] += np.bincount(later.view(np.uint16).reshape(-1), minlength=2**16)
            for i, threshold in enumerate(thresholds):
                self.thresholds[i] += np.count_nonzero(starts_at(rule, rows.entropy[block], threshold, grid_width))

    @property
    def finite_entropies(self) -> int:
        """How many tokens have a measured entropy."""
        return int(self.entropy[np.isfinite(_HALVES)].sum())

    @property
    def entropy_scale(self) -> tuple[float, float]:
        """One colour scale for all entropy maps of the artifact."""
        percentiles = entropy_quantiles(self.entropy, np.arange(1, 100) / 100) if self.finite_entropies else []
        return entropy_scale(np.array(percentiles))


def entropy_quantiles(counts: NDArray[np.int64], quantiles: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Exact quantiles, nats, of entropies counted by their float16 bits, (65536,); what is not finite is left out."""
    bits = np.flatnonzero(np.isfinite(_HALVES) & (counts > 0))
    bits = bits[np.argsort(_HALVES[bits], kind="stable")]
    ends = np.cumsum(counts[bits])
    ranks = np.maximum(np.ceil(np.asarray(quantiles) * ends[-1]), 1)
    return [float(x) for x in _HALVES[bits[np.searchsorted(ends, ranks)]]]


def _numbers(artifact: Artifact, survey: Survey, settings: InspectSettings) -> dict[str, Any]:
    manifest = artifact.manifest
    used = int(np.count_nonzero(survey.codes))
    share = survey.codes[survey.codes > 0] / max(int(survey.codes.sum()), 1)
    tokens = manifest.rows * manifest.views * manifest.n_tokens
    found: dict[str, Any] = {
        "artifact": str(artifact.folder),
        "kind": manifest.kind,
        "rows": manifest.rows,
        "views": manifest.views,
        "grid": list(manifest.grid),
        "tokens_per_image": manifest.n_tokens,
        "codebook_size": manifest.codebook_size,
        "classes": len(manifest.class_names),
        "container": manifest.container,
        "shards": len(manifest.shards),
        "bytes": sum((artifact.folder / shard.name).stat().st_size for shard in manifest.shards),
        "source": manifest.source,
        "tokenizer": manifest.tokenizer,
        "entropy_model": manifest.entropy_model,
        "left_out": manifest.left_out,
        "reconstruction": manifest.statistics.get("reconstruction"),
        "verified": settings.verify,
        "fingerprint": manifest.fingerprint(),
        "settings": manifest.settings,
        "made_by": manifest.made_by,
        "codebook": {
            "used": used,
            "share": used / manifest.codebook_size,
            "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        },
        "entropy": None,
        "patches": None,
        "thresholds": [],
        "compressible": None,
        "pictures": [],
        "notes": [],
    }
    if manifest.kind == "patches":
        found["patches"] = _patch_numbers(manifest)
        if lengths_differ(manifest.statistics):
            found["compressible"] = _compressible(artifact, survey)
        found["thresholds"] = [
            {"threshold": threshold, **_saving(tokens, int(patches), manifest)}
            for threshold, patches in zip(settings.threshold, survey.thresholds, strict=True)
        ]
        if survey.finite_entropies:
            finite = np.flatnonzero(np.isfinite(_HALVES) & (survey.entropy > 0))
            mean = float((_HALVES[finite] * survey.entropy[finite]).sum() / survey.finite_entropies)
            values = entropy_quantiles(survey.entropy, QUANTILES)
            found["entropy"] = {
                "mean": mean,
                "quantiles": {f"{q:g}": value for q, value in zip(QUANTILES, values, strict=True)},
            }
    return found


def _saving(tokens: int, patches: int, manifest: Manifest) -> dict[str, float]:
    sequences = max(manifest.rows * manifest.views, 1)
    return {
        "mean_length": tokens / max(patches, 1),
        "patches_per_image": patches / sequences,
        "tokens_saved": 1 - patches / max(tokens, 1),
    }


def _patch_numbers(manifest: Manifest) -> dict[str, Any]:
    statistics = manifest.statistics
    by_class = [entry["mean_length"] for entry in statistics["classes"]]
    return {
        **{name: statistics[name] for name in ("mean_length", "patches_per_image", "tokens_saved")},
        "class_mean_length": {
            "min": min(by_class),
            "median": float(np.median(by_class)),
            "max": max(by_class),
        },
        "lengths": statistics["lengths"],
    }


def _compressible(artifact: Artifact, survey: Survey) -> dict[str, Any]:
    """Classes and images with the fewest and with the most patches an image, the extreme ones first."""
    manifest = artifact.manifest
    classes = by_compressibility(manifest.statistics)
    order = np.argsort(survey.patches, kind="stable")
    few, many = order[:EXTREMES], order[::-1][: min(EXTREMES, max(len(order) - EXTREMES, 0))]

    def images(rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {
                "key": key,
                "class": class_name(manifest.class_names, int(survey.labels[row])),
                "patches_per_image": float(survey.patches[row] / manifest.views),
                "mean_length": float(manifest.views * manifest.n_tokens / survey.patches[row]),
            }
            for row, key in zip(rows, artifact.keys(rows), strict=True)
        ]

    return {
        "classes": {"most": classes[:EXTREMES], "least": classes[: EXTREMES - 1 : -1][:EXTREMES]},
        "images": {"most": images(few), "least": images(many)},
    }


def choose_rows(artifact: Artifact, labels: NDArray[np.int32], settings: InspectSettings) -> NDArray[np.int64]:
    """Rows to draw: those of the keys asked for, and others spread evenly over the classes.

    Args:
        artifact: whose rows.
        labels: (rows,) int32, its labels.
        settings: ``keys`` come first, in their order; with keys and no classes there are no others. ``images`` is how
            many others.

    Returns:
        (n,) int64.

    Raises:
        StageError: an unknown key or class.
    """
    named = _rows_of_keys(artifact, settings.keys)
    if settings.keys and not settings.classes:
        return named
    names = artifact.manifest.class_names
    for name in settings.classes:
        if name not in names:
            raise StageError(f"no class {name!r} in {artifact.folder}; {nearest(name, names)}")
    wanted = [names.index(name) for name in settings.classes] or range(len(names))
    return np.concatenate([named, spread(labels, settings.images, wanted)])


def spread(labels: NDArray[np.int32], n: int, wanted: Sequence[int]) -> NDArray[np.int64]:
    """At most ``n`` rows, evenly over the ``wanted`` classes and within each; rows of a class stay together."""
    classes = [label for label in wanted if np.any(labels == label)]
    if n < len(classes):
        classes = [classes[i] for i in ((2 * np.arange(n) + 1) * len(classes)) // (2 * max(n, 1))]
    chosen = [np.zeros(0, np.int64)]
    for i, label in enumerate(classes):
        share = n // len(classes) + (i < n % len(classes))
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[np.unique(np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(np.int64))])
    return np.concatenate(chosen)


def _rows_of_keys(artifact: Artifact, keys: Sequence[str]) -> NDArray[np.int64]:
    wanted = set(keys)
    found: dict[str, int] = {}
    known: list[str] = []
    first = 0
    for index, info in enumerate(artifact.manifest.shards):
        if len(found) == len(wanted):
            break
        held = artifact.shard(index).keys(np.arange(info.rows))
        found.update({key: first + i for i, key in enumerate(held) if key in wanted})
        known += held
        first += info.rows
    for key in keys:
        if key not in found:
            raise StageError(f"no image {key!r} in {artifact.folder}; {nearest(key, known)}")
    return np.array([found[key] for key in keys], np.int64)


def _tokenizer(manifest: Manifest, settings: InspectSettings, where: str) -> VQTokenizer:
    recorded = parse(WeightsRecord, manifest.tokenizer, where, at="tokenizer", ignore_unknown=True)
    name = settings.tokenizer or recorded.path
    try:
        tokenizer = load_tokenizer(name, recorded.fingerprint)
    except ModelError as error:
        hint = "" if settings.tokenizer else "; say with --tokenizer where it is now, or draw nothing with --images 0"
        raise StageError(f"the tokenizer cannot be loaded: {error}{hint}") from error
    if tokenizer.config.codebook_size != manifest.codebook_size:
        raise StageError(
            f"the tokenizer {name} has {tokenizer.config.codebook_size} codes; the artifact {manifest.codebook_size}"
        )
    return tokenizer.to(choose_device(settings.device))


class Gallery:
    """Pictures on their way into the page, each also a PNG file beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def save(self, name: str, image: Image.Image) -> bytes:
        """Writes ``name``.png and gives its bytes."""
        png = png_bytes(image)
        (self.folder / f"{name}.png").write_bytes(png)
        self.files.append(f"{name}.png")
        return png

    def picture(self, name: str, image: Image.Image, caption: str, alt: str) -> Picture:
        """Writes ``name``.png and gives the picture for the page."""
        return Picture(caption, data_uri(self.save(name, image)), alt)


def _draw(
    artifact: Artifact, survey: Survey, settings: InspectSettings, rule: PatchRule, gallery: Gallery, notes: list[str]
) -> list[Section]:
    """One section an image drawn, and one sheet of all of them as a file."""
    manifest = artifact.manifest
    rows = choose_rows(artifact, survey.labels, settings)
    if len(rows) == 0:
        return []
    view = np.zeros(len(rows), np.int64)
    batch = artifact.gather(rows, view)
    keys = artifact.keys(rows)
    names = [class_name(manifest.class_names, int(label)) for label in batch.labels]
    tokenizer = _tokenizer(manifest, settings, str(artifact.folder / MANIFEST))
    images = decode(tokenizer, batch.codes, manifest.grid, batch=settings.batch)
    originals = _originals(manifest, keys, view, images.shape, notes, settings.fetch_originals)
    quality = None if originals is None else psnr(torch.from_numpy(images), torch.from_numpy(originals)).tolist()
    measured = batch.entropy if survey.finite_entropies else None
    scale = survey.entropy_scale
    starts: dict[str, NDArray[np.bool_]] = {}
    if batch.starts is not None:
        starts[f"{rule_name(rule)} (stored)"] = batch.starts
    if measured is not None:
        starts |= {f"τ = {t:.4g}": starts_at(rule, measured, t, manifest.grid[1]) for t in settings.threshold}

    times, n = scale_for(images.shape[1]), manifest.n_tokens
    sections, titles = [], []
    for i, key in enumerate(keys):
        pictures = []
        if originals is not None:
            original = enlarge(originals[i], times)
            pictures.append(gallery.picture(f"{i:03d}-original", original, "original", f"Original image {key}"))
        decoded = "decoded from its codes" + ("" if quality is None else f", {quality[i]:.1f} dB PSNR")
        alt = f"{key}, decoded from its codes"
        pictures.append(gallery.picture(f"{i:03d}-decoded", enlarge(images[i], times), decoded, alt))
        if measured is not None:
            drawn = entropy_map(measured[i], manifest.grid, scale, images.shape[1] * times)
            mean = float(np.mean(measured[i, 1:].astype(np.float64)))
            caption = f"entropy of each token, mean {mean:.2f} nats"
            alt = f"Entropy map of {key}, from {scale[0]:g} to {scale[1]:g} nats"
            pictures.append(gallery.picture(f"{i:03d}-entropy", drawn, caption, alt))
        for j, (title, columns) in enumerate(starts.items()):
            patches = int(columns[i].sum())
            outlined = draw_patches(images[i], columns[i], manifest.grid, times)
            caption = f"{title}: {patches} patches, mean length {n / patches:.2f}"
            alt = f"{patches} patches outlined on {key}"
            pictures.append(gallery.picture(f"{i:03d}-patches-{j}", outlined, caption, alt))
        facts = [f"Class {names[i]}"] + ([f"view 0 of {manifest.views}"] if manifest.views > 1 else [])
        sections.append(Section(key, ", ".join(facts) + ".", pictures=pictures))
        shown = [names[i]] + ([] if quality is None else [f"{quality[i]:.1f} dB"])
        shown += [] if batch.starts is None else [f"{int(batch.starts[i].sum())} patches"]
        titles.append("\n".join([key, *shown]))
    if starts:
        sheet = patches_sheet(images, measured, starts, manifest.grid, titles, originals=originals, scale=scale)
        gallery.save("patches", sheet)
    else:
        gallery.save("reconstructions", reconstruction_sheet(images, titles, originals))
    return sections


def _originals(
    manifest: Manifest,
    keys: Sequence[str],
    view: NDArray[np.int64],
    shape: tuple[int, ...],
    notes: list[str],
    fetch: bool,
) -> NDArray[np.uint8] | None:
    """The originals as large as the decoded images; None, with a note, where they cannot be had."""
    try:
        originals = load_originals(manifest, keys, view, fetch=fetch)
    except StageError as error:
        notes.append(f"Originals are not shown: {error}")
        return None
    if originals.shape != shape:
        notes.append(f"Originals are not shown: they are {originals.shape[1:3]}, the decoded images {shape[1:3]}")
        return None
    return originals


def _write_page(out: Path, found: dict[str, Any], drawn: Sequence[Section]) -> None:
    write_json(out / "numbers.json", found)
    sections = [
        Section("What it holds", " ".join(found["notes"]), tables=[_table_artifact(found), *_table_values(found)])
    ]
    if found["patches"]:
        text = "Over all images and views. Tokens saved are 1 - M/N, for M patches in N tokens."
        sections.append(Section("Patches", text, tables=_table_patches(found), svg=_length_chart(found["patches"])))
        if found["compressible"]:
            text = "By patches an image: few patches are a compressible image."
            sections.append(Section("Most and least compressible", text, tables=_table_compressible(found)))
    sections += drawn
    sections.append(Section("Settings", "What made it.", tables=[_table_settings(found)]))
    subtitle = f"{found['rows']:,} images as {found['kind']}"
    if found["patches"]:
        subtitle += f", {found['patches']['mean_length']:.3f} tokens a patch"
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
        ("views an image", str(found["views"])),
        ("tokens a view", f"{height}×{width} = {found['tokens_per_image']}"),
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
    lengths = Table("Patches", ("boundaries", "mean length", "patches an image", "tokens saved"), rows)
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
                header = (first, second, "patches an image", "mean length")
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

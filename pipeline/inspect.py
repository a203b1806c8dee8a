"""``dpar inspect ARTIFACT``: the contents of an artifact in numbers and, with an output directory, in pictures.

    inspection = inspect(Path("patches"), Path("look"), InspectSettings(threshold=(7.0, 8.5)))
    inspection.patches.mean_length

The numbers cover every image and view: those of patches and classes come from ``dpar patchify``, the others are
computed shard by shard. Pictures show the first view of some images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.class_names import nearest
from dpar.errors import ModelError
from dpar.patching import PatchRule
from dpar.tokenizer import VQTokenizer, psnr
from pipeline.generation.generator import decode
from pipeline.reports.inspection import rule_name, write_page
from pipeline.reports.inspection_record import Inspection
from pipeline.reports.page import Picture, Section
from pipeline.reports.pictures import (
    data_uri,
    draw_patches,
    enlarge,
    entropy_map,
    patches_sheet,
    png_bytes,
    reconstruction_sheet,
    scale_for,
)
from pipeline.runs.weights import load_tokenizer
from pipeline.runtime.device import choose_device
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.scoring.survey import Survey, numbers, starts_at
from pipeline.settings.artifacts import InspectSettings
from pipeline.sources.originals import load_originals
from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Manifest
from shards.patch_statistics import check_statistics, class_name
from shards.reader import Artifact, open_artifact
from shards.records import parse
from shards.storage import Location


def inspect(
    artifact: Location, out: Path | None, settings: InspectSettings, progress: Progress | None = None
) -> Inspection:
    """Read all of an artifact and summarise it.

    Args:
        artifact: a codes or patches directory, or its URL.
        out: directory for ``index.html``, its pictures as PNG files and ``numbers.json``; None draws nothing.
        settings: what to draw, and how.
        progress: where to report.

    Returns:
        The artifact's numbers, the names of the pictures, and notes on what could not be drawn.

    Raises:
        StageError: an unknown class or key, or a threshold for an artifact without entropies.
        ArtifactError, ModelError: artifact or tokenizer cannot be used; with ``verify`` all damaged shards are named.
    """
    progress = progress or Progress()
    opened = open_artifact(artifact, verify=settings.verify, download=True)
    if out is not None:
        _check_output(out, artifact)
    if opened.manifest.kind == "patches" and "classes" not in opened.manifest.statistics:
        raise StageError(
            f"{artifact} lacks statistics of its classes: it was made by an earlier version. "
            f"`dpar patchify {artifact} NEW` makes one that has them, without a model"
        )
    if opened.manifest.kind == "patches":
        check_statistics(opened.manifest, str(artifact / MANIFEST))
    for threshold in settings.threshold:
        warn_if_out_of_reach(threshold, opened.manifest.codebook_size, progress)
    rule = stored_rule(opened.manifest, str(artifact / MANIFEST))
    survey = Survey.of(opened, settings.threshold, rule, progress)
    inspection = numbers(opened, survey, settings)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        gallery = Gallery(out)
        notes: list[str] = []
        sections = _draw(opened, survey, settings, rule, gallery, notes)
        inspection = dataclasses.replace(inspection, pictures=gallery.files, notes=notes)
        write_page(out, inspection, sections)
    return inspection


def _check_output(out: Path, artifact: Location) -> None:
    if out.exists() and not out.is_dir():
        raise StageError(f"{out} is a file; name a directory for the page and its pictures")
    inside = isinstance(artifact, Path) and artifact.resolve() in (out.resolve(), *out.resolve().parents)
    if (out / MANIFEST).exists() or inside:
        raise StageError(f"{out} is part of an artifact; name another directory for the page and its pictures")


@dataclass(frozen=True, kw_only=True)
class CodesRecord:
    """The part of a patches manifest's settings that describes the codes."""

    codes_settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """A model's weights in a manifest."""

    path: str
    fingerprint: str


def stored_rule(manifest: Manifest, where: str) -> PatchRule:
    """Return the patch rule of a manifest, the file ``where``; for codes, which have none, a rule of defaults.

    Raises:
        ArtifactError: the settings are of other types, or are not a valid rule.
    """
    parse(CodesRecord, manifest.settings, where, at="settings", ignore_unknown=True)
    try:
        return parse(PatchRule, manifest.settings, where, at="settings", ignore_unknown=True)
    except ModelError as error:
        raise ArtifactError(f"{where}: field settings is not a patch rule: {error}") from error


def choose_rows(artifact: Artifact, labels: NDArray[np.int32], settings: InspectSettings) -> NDArray[np.int64]:
    """Return the rows to draw: those of ``settings.keys``, then others spread evenly over the classes.

    Args:
        artifact: codes or patches.
        labels: (rows,) int32, its labels.
        settings: ``images`` is the number of other rows; with ``keys`` and without ``classes`` there are none.

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
    """Return at most ``n`` rows, spread evenly over ``wanted`` classes and within each; grouped by class."""
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
    rows: dict[str, int] = {}
    known: list[str] = []
    first = 0
    for index, info in enumerate(artifact.manifest.shards):
        if len(rows) == len(wanted):
            break
        in_shard = artifact.shard(index).keys(np.arange(info.rows))
        rows.update({key: first + i for i, key in enumerate(in_shard) if key in wanted})
        known += in_shard
        first += info.rows
    for key in keys:
        if key not in rows:
            raise StageError(f"no image {key!r} in {artifact.folder}; {nearest(key, known)}")
    return np.array([rows[key] for key in keys], np.int64)


def _tokenizer(manifest: Manifest, settings: InspectSettings, where: str) -> VQTokenizer:
    recorded = parse(WeightsRecord, manifest.tokenizer, where, at="tokenizer", ignore_unknown=True)
    name = settings.tokenizer or recorded.path
    try:
        tokenizer = load_tokenizer(name, recorded.fingerprint)
    except ModelError as error:
        hint = "" if settings.tokenizer else "; name it with --tokenizer, or draw nothing with --images 0"
        raise StageError(f"the tokenizer cannot be loaded: {error}{hint}") from error
    if tokenizer.config.codebook_size != manifest.codebook_size:
        raise StageError(
            f"the tokenizer {name} has {tokenizer.config.codebook_size} codes; the artifact {manifest.codebook_size}"
        )
    return tokenizer.to(choose_device(settings.device))


class Gallery:
    """The page's pictures, each also saved as a PNG file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def save(self, name: str, image: Image.Image) -> None:
        """Write ``name``.png."""
        (self.folder / f"{name}.png").write_bytes(png_bytes(image))
        self.files.append(f"{name}.png")

    def picture(self, name: str, image: Image.Image, caption: str, alt: str) -> Picture:
        """Write ``name``.png and return the picture for the page."""
        self.save(name, image)
        return Picture(caption, data_uri(image), alt)


def _draw(
    artifact: Artifact, survey: Survey, settings: InspectSettings, rule: PatchRule, gallery: Gallery, notes: list[str]
) -> list[Section]:
    """Return one section per drawn image; save one sheet of all of them."""
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
    """Return the originals, as large as the decoded images; None, with a note, if they are unavailable."""
    try:
        originals = load_originals(manifest, keys, view, fetch=fetch)
    except StageError as error:
        notes.append(f"Originals are not shown: {error}")
        return None
    if originals.shape != shape:
        notes.append(f"Originals are not shown: they are {originals.shape[1:3]}, the decoded images {shape[1:3]}")
        return None
    return originals

"""``dpar eval RUN OUT --reference R``: how well a run predicts, and how its samples look.

    results = evaluate(Path("run"), Path("scores"), EvalSettings(reference=Path("validation-patches")))

    OUT/results.json      everything below, and what made it
    OUT/results.md        the same as a table
    OUT/samples-cfg-S.png a sheet of every class at each guidance scale, and the same with patches drawn

RUN may also be a LlamaGen that was trained elsewhere: its own file, or a directory of weights without a run.

Bits per token are exact. The distance between samples and the reference's originals is FID with
``--features inception``; on the tokenizer's own features it goes by another name and compares only with its like.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.flops import count
from dpar.llamagen import LlamaGen
from dpar.tokenizer import psnr
from pipeline.errors import StageError
from pipeline.features import Extract, frechet_distance, inception_features, resize, tokenizer_features
from pipeline.generate import Drawn, Generator, decode
from pipeline.likelihood import bits_per_token, fits, same_classes
from pipeline.originals import load_originals
from pipeline.progress import Progress, stops_with
from pipeline.sample import sample_sheet
from pipeline.settings import EvalSettings
from pipeline.versions import made_by
from pipeline.weights import fingerprint_of
from shards.manifest import write_json
from shards.reader import Artifact, open_artifact

RESULTS = "results.json"
FEWEST_ORIGINALS = 1000  # compared with their reconstructions, where the reference has as many
CHUNK = 1000  # images held in memory at once
DISTANCE = {"inception": "FID", "tokenizer": "tokenizer Fréchet distance"}


def evaluate(run: Path, out: Path, settings: EvalSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Scores a run of ``dpar train``, or a LlamaGen's weights, against a held-out artifact.

    A cell that is in ``out`` already is not repeated.

    Returns:
        What ``results.json`` holds.

    Raises:
        StageError, ModelError, ArtifactError: run, reference, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    artifact = open_artifact(settings.reference)
    generator = Generator.load(run, settings, artifact)
    fits(generator.model, artifact.manifest, str(settings.reference))
    same_classes(generator.class_names, artifact.manifest.class_names, str(run), str(settings.reference))
    _check_tokenizer(generator, artifact)
    identity = _identity(run, settings, artifact)
    results = _earlier(out, identity)
    out.mkdir(parents=True, exist_ok=True)
    keeps = f"Stopped. What was scored is kept in {out}; run the same command again to go on."
    with stops_with(keeps):
        if "bits_per_token" not in results:
            results |= _likelihood(generator, artifact, settings)
            _write(out, results)
        if "originals" not in results:
            progress.say("comparing reconstructions with their originals")
            results |= _reconstruction(generator, artifact, settings, progress)
            _write(out, results)
        done = {cell["cfg_scale"] for cell in results["cells"]}
        wanted = [scale for scale in settings.cfg_scale if scale not in done] if settings.samples else []
        reference = _reference(generator, artifact, settings, results) if wanted else None
        for scale in wanted:
            results["cells"].append(_cell(generator, scale, settings, reference, out, progress))
            _write(out, results)
    return results


def _likelihood(generator: Generator, artifact: Artifact, settings: EvalSettings) -> dict[str, Any]:
    model, manifest = generator.model, artifact.manifest
    found = bits_per_token(model, artifact, batch=settings.batch, precision=settings.precision)
    cost = count(model.config, model.config.n_tokens / found.patches)
    return {
        "bits_per_token": found.bits_per_token,
        "bits_by_class": {
            name: bits
            for name, bits in zip(manifest.class_names, found.bits_by_class, strict=True)
            if not math.isnan(bits)
        },
        "held_out_images": found.images,
        "patches_per_image": found.patches,
        "tokens_per_image": model.config.n_tokens,
        "gmacs_per_image": cost.linear / 1e9,
        "parameters": cost.parameters,
    }


def _reconstruction(
    generator: Generator, artifact: Artifact, settings: EvalSettings, progress: Progress
) -> dict[str, Any]:
    """PSNR of the tokenizer on the reference's images, where their originals can still be read."""
    rows = _spread(len(artifact), max(settings.samples, FEWEST_ORIGINALS))
    each = []
    try:
        for part in _in_chunks(rows):
            originals = torch.from_numpy(_originals(artifact, part))
            codes = artifact.gather(part, np.zeros_like(part)).codes
            decoded = decode(generator.tokenizer, codes, generator.grid, batch=settings.batch)
            each.append(psnr(torch.from_numpy(decoded), originals))
    except StageError as error:
        progress.say(f"no originals: {error}")
        return {"originals": 0}
    return {"originals": len(rows), "reconstruction_psnr_db": float(torch.cat(each).mean())}


def _in_chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The same rows, at most CHUNK at a time, so that memory does not grow with their number."""
    return np.array_split(rows, -(-len(rows) // CHUNK))


def _spread(rows: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the artifact's rows, evenly over it."""
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most).astype(np.int64)


def _originals(artifact: Artifact, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    return load_originals(artifact.manifest, artifact.keys(rows), np.zeros_like(rows))


@dataclasses.dataclass(frozen=True)
class _Reference:
    """What samples are held against."""

    features: NDArray[np.float64]
    extract: Extract
    name: str
    images: int


def _reference(
    generator: Generator, artifact: Artifact, settings: EvalSettings, results: dict[str, Any]
) -> _Reference | None:
    if not results["originals"]:
        return None
    extract = (
        inception_features(settings.inception_weights, generator.device, settings.batch)
        if settings.features == "inception"
        else tokenizer_features(generator.tokenizer, settings.batch)
    )
    rows = _spread(len(artifact), results["originals"])
    features = [extract(_at_256(_originals(artifact, part), settings)) for part in _in_chunks(rows)]
    return _Reference(np.concatenate(features), extract, DISTANCE[settings.features], len(rows))


def _at_256(pixels: NDArray[np.uint8], settings: EvalSettings) -> NDArray[np.uint8]:
    """Images as they are scored: above 256 px they are brought down to it for FID, as the paper does."""
    return resize(pixels, 256) if settings.features == "inception" and pixels.shape[1] > 256 else pixels


def _cell(
    generator: Generator,
    scale: float,
    settings: EvalSettings,
    reference: _Reference | None,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """One guidance scale: samples of all classes alike, their distance from the reference, and two sheets."""
    classes = len(generator.class_names)
    patches, features, shown = 0, [], []
    for part in _in_chunks(np.arange(settings.samples)):
        drawn = generator.sample(part % classes, part, scale, progress, f"sample at guidance {scale:g}")
        patches += int(drawn.starts.sum())
        if reference is not None:
            features.append(reference.extract(_at_256(drawn.pixels, settings)))
        if part[0] < classes * settings.sheet_per_class:  # later ones would not be on a sheet
            shown.append((part, drawn))
    labels = np.concatenate([part for part, _ in shown]) % classes
    first = Drawn.joined([drawn for _, drawn in shown])
    for name, with_patches in (("samples", False), ("patches", True)):
        if with_patches and isinstance(generator.model, LlamaGen):
            continue
        picture = sample_sheet(generator, first, labels, patches=with_patches, columns=settings.sheet_per_class)
        picture.save(out / f"{name}-cfg-{scale:g}.png")
    cell: dict[str, Any] = {
        "cfg_scale": scale,
        "samples": settings.samples,
        "patches_per_image": patches / settings.samples,
    }
    if reference is not None:
        distance = frechet_distance(np.concatenate(features), reference.features)
        cell |= {"distance": reference.name, reference.name: distance, "reference_images": reference.images}
    return cell


def _identity(run: Path, settings: EvalSettings, artifact: Artifact) -> dict[str, Any]:
    """What decides the results, apart from which guidance scales are asked for."""
    free = ("cfg_scale", "batch", "device", "sheet_per_class", "tokenizer", "entropy_model", "reference")
    chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    identity = {"run": str(run), "weights": fingerprint_of(str(run)), "reference": artifact.manifest.fingerprint()}
    as_json: dict[str, Any] = json.loads(json.dumps(identity | chosen, default=str))
    return as_json


def _earlier(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results that an earlier run left in ``out``, or new ones."""
    path = out / RESULTS
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["identity"] == identity:
            return found
        raise StageError(f"{out} holds results of other weights or settings; name another directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StageError(f"{out} holds something else; name a new or empty directory for the results")
    return {"identity": identity, "cells": [], "made_by": made_by()}


def _check_tokenizer(generator: Generator, artifact: Artifact) -> None:
    ours = generator.tokenizer_fingerprint
    theirs = artifact.manifest.tokenizer["fingerprint"]
    if ours != theirs:
        raise StageError(
            f"{artifact.folder} was made by tokenizer {theirs[:12]}, the run's training data by {ours[:12]}; "
            "bits per token would mean nothing"
        )


def _write(out: Path, results: dict[str, Any]) -> None:
    write_json(out / RESULTS, results)
    (out / "results.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = [
        ("held-out bits per token", f"{results['bits_per_token']:.4f}"),
        ("held-out images", f"{results['held_out_images']}"),
        ("patches an image", f"{results['patches_per_image']:.1f} of {results['tokens_per_image']} tokens"),
        ("GMACs an image", f"{results['gmacs_per_image']:.3f}"),
        ("parameters", f"{results['parameters'] / 1e6:.1f} M"),
    ]
    if "reconstruction_psnr_db" in results:
        rows.append(("tokenizer's PSNR", f"{results['reconstruction_psnr_db']:.2f} dB"))
    for cell in results["cells"]:
        if "distance" in cell:
            name = f"{cell['distance']} at guidance {cell['cfg_scale']:g}"
            value = f"{cell[cell['distance']]:.3f} ({cell['samples']} samples, {cell['reference_images']} references)"
            rows.append((name, value))
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)

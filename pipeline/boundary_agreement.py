"""``dpar patchify CODES OUT --compare E1 E2``: how similarly two entropy models patchify the same images.

    result = compare(Path("codes"), Path("look"), PatchifySettings(compare=("large", "small"), target_length=1.81))
    result["agreement"]                                      # of the boundaries that entropy decides

A small entropy model makes sampling cheaper; this measures what it changes. Only ``compare.json`` is written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpar.flops import count
from pipeline.patchify import find_threshold, spread_views
from pipeline.runs.weights import check_same_tokenizer, fingerprint_of, load_entropy_model
from pipeline.runtime.device import choose_device, rank, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.scoring.likelihood import check_compatible, entropies, prepared
from pipeline.settings.artifacts import PatchifySettings
from shards.files import write_json
from shards.reader import Artifact, open_artifact
from shards.storage import Location

COMPARISON = "compare.json"


def compare(codes: Location, out: Path, settings: PatchifySettings, progress: Progress | None = None) -> dict[str, Any]:
    """Measure both models on the same views, spread evenly over the images, and write ``out/compare.json``.

    With ``--target-length`` each model gets the threshold for that length; with ``--threshold`` both get the same
    one, and their lengths differ.

    Args:
        codes: codes, or patches, whose boundaries are ignored.
        out: a directory.
        settings: ``compare`` names the two models.
        progress: where to report.

    Returns:
        ``models`` (for each: path, fingerprint, parameters, GMACs per image, mean entropy, threshold, mean length,
        patches per image), and, over the tokens that are not forced starts: ``agreement``, the share with the same
        decision; ``agreement_by_chance``, that of independent models with these rates; ``shared_starts``, starts of
        both among starts of either; ``entropy_correlation`` (Pearson's; None if a model's entropies are all equal).

    Raises:
        StageError, ModelError, ArtifactError: input, weights, output or settings cannot be used.
    """
    assert settings.compare is not None
    progress = progress or Progress()
    if out.exists() and not out.is_dir():
        raise StageError(f"{out} is a file; name a directory to write to")
    artifact = open_artifact(codes, verify=settings.verify, share=(rank(), world_size()))
    for name in settings.compare:
        check_same_tokenizer(name, artifact.manifest.tokenizer, str(artifact.folder))
    rows, views = spread_views(artifact.manifest, settings.sample)
    measured = [_measure(name, artifact, rows, views, settings, progress) for name in settings.compare]
    grid_width = artifact.manifest.grid[1]
    models, starts = [], []
    for described, entropy in measured:
        rule = settings.rule
        if settings.target_length is not None:
            chosen = find_threshold(entropy, settings.target_length, rule, grid_width)
            rule = dataclasses.replace(rule, threshold=chosen.value)
        model_starts = rule.starts(entropy, grid_width)
        starts.append(model_starts)
        models.append(
            described
            | {
                "mean_entropy": float(entropy[:, 1:].astype(np.float64).mean()),
                "threshold": rule.threshold,
                "mean_length": model_starts.size / int(model_starts.sum()),
                "patches_per_image": int(model_starts.sum()) / len(model_starts),
            }
        )
    result: dict[str, Any] = {
        "codes": str(codes),
        "sequences": len(rows),
        "models": models,
        **_agreement(starts, [entropy for _, entropy in measured], grid_width, settings.row_reset),
        "settings": {
            name: getattr(settings, name) for name in ("max_length", "row_reset", "target_length", "threshold")
        },
        "made_by": made_by(),
    }
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / COMPARISON, result)
    return result


def _measure(
    name: str,
    artifact: Artifact,
    rows: NDArray[np.int64],
    views: NDArray[np.int64],
    settings: PatchifySettings,
    progress: Progress,
) -> tuple[dict[str, Any], NDArray[np.float16]]:
    """Return a description of the model called ``name``, and its entropies (n, N) of these views."""
    model = load_entropy_model(name)
    check_compatible(model, artifact.manifest, str(artifact.folder), unconditional=True)
    cost = count(model.config)
    model = prepared(model.to(choose_device(settings.device)), settings.precision)
    entropy = np.empty((len(rows), artifact.manifest.n_tokens), np.float16)
    with stops_with("Stopped. Nothing was written."), progress.task(name, len(rows), "sequences") as task:
        for begin in range(0, len(rows), settings.batch):
            here = slice(begin, begin + settings.batch)
            codes = artifact.gather(rows[here], views[here]).codes
            entropy[here] = entropies(model, codes, batch=settings.batch, precision=settings.precision)
            task.advance(len(codes))
    described = {
        "model": name,
        "fingerprint": fingerprint_of(name, "entropy_model"),
        "parameters": cost.parameters,
        "gmacs_per_image": cost.linear / 1e9,
    }
    return described, entropy


def _agreement(
    starts: list[NDArray[np.bool_]], entropy: list[NDArray[np.float16]], grid_width: int, row_reset: bool
) -> dict[str, float | None]:
    decided = np.arange(starts[0].shape[1]) > 0
    if row_reset:
        decided &= np.arange(starts[0].shape[1]) % grid_width != 0
    first, second = (each[:, decided] for each in starts)
    rates = float(first.mean()), float(second.mean())
    either = int((first | second).sum())
    levels = [each[:, 1:].astype(np.float64).ravel() for each in entropy]
    return {
        "agreement": float((first == second).mean()),
        "agreement_by_chance": rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1]),
        "shared_starts": int((first & second).sum()) / either if either else 1.0,
        "entropy_correlation": _correlation(*levels),
    }


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Return Pearson's correlation; None if either input is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def lines(result: dict[str, Any]) -> list[str]:
    """Return the comparison as lines of text."""
    text = [
        f"{m['model']}: {m['parameters'] / 1e6:.1f} M parameters, {m['gmacs_per_image']:.3g} GMACs per image, "
        f"threshold {m['threshold']:.4g} nats, mean length {m['mean_length']:.3f}, "
        f"{m['patches_per_image']:.1f} patches per image"
        for m in result["models"]
    ]
    value = result["entropy_correlation"]
    correlation = "undefined (one is constant)" if value is None else f"{value:.3f}"
    text.append(
        f"of the boundaries that entropy decides they agree on {result['agreement']:.1%} "
        f"({result['agreement_by_chance']:.1%} by chance); {result['shared_starts']:.1%} of the starts of either "
        f"are shared; entropy correlation {correlation}, on {result['sequences']} sequences"
    )
    return text

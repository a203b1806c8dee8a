"""``dpar probe RUN OUT --train A --test B``: a linear classifier on a frozen model's features (the paper's Table 7).

    results = probe(Path("run"), Path("probe"), ProbeSettings(train=Path("patches"), test=Path("patches-validation")))

The features of an image are a layer's outputs, averaged over its patches (DPAR: a layer of the patch transformer) or
tokens (LlamaGen); by default the last layer's, before the final norm. The model gets the guidance class instead of the
image's class, so that no label leaks into the features; of several views the first is used. The classifier is one
matrix and a bias on standardised features, fitted with full batches by L-BFGS from zero: the problem is convex, so the
result does not depend on a seed. The paper does not say how it fits its classifier.

    OUT/probe.json            accuracies and their provenance
    OUT/train/, OUT/test/     features, in parts that processes share; a killed run resumes with them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.packing import segment_mean
from pipeline.runs.weights import fingerprint_of, load_model
from pipeline.runtime.device import autocast, choose_device, precision_name, rank, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.runtime.work_sharing import Parts, claim_folder, write_once
from pipeline.scoring.likelihood import check_compatible, check_same_classes, layout_for, prepared
from pipeline.settings.fields import Precision
from pipeline.settings.models import ProbeSettings
from shards.reader import Artifact, Batch, open_artifact

CHUNK = 1024  # images per part
ROWS = 16_384  # images whose logits are in memory at once


def probe(run: Path, out: Path, settings: ProbeSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Fit a linear classifier on features of ``settings.train`` and measure its accuracy on ``settings.test``.

    Returns:
        The contents of ``probe.json``: top-1 and top-5 accuracy of both, from 0 to 1, and their provenance.

    Raises:
        StageError, ModelError, ArtifactError: run, artifacts, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    model = load_model(str(run))
    if model.config.classes == 0:
        raise StageError(f"{run} is a model without classes; `dpar probe` needs a generator")
    share = (rank(), world_size())
    places = {"train": settings.train, "test": settings.test}
    artifacts = {name: open_artifact(place, verify=True, share=share) for name, place in places.items()}
    for artifact in artifacts.values():
        check_compatible(model, artifact.manifest, str(artifact.folder), unconditional=True)
    names = artifacts["train"].manifest.class_names
    test_names = artifacts["test"].manifest.class_names
    if len(names) != len(test_names):
        raise StageError(f"{settings.train} has {len(names)} classes, {settings.test} {len(test_names)}")
    check_same_classes(names, test_names, str(settings.train), str(settings.test))
    layers = len(model.layers)
    if settings.layer is not None and settings.layer > layers:
        raise StageError(f"--layer is {settings.layer}; this model has {layers} layers to choose from")
    layer = settings.layer or layers
    device = choose_device(settings.device)
    identity = {
        "weights": fingerprint_of(str(run)),
        **{name: artifact.manifest.fingerprint() for name, artifact in artifacts.items()},
        "layer": layer,
        "precision": precision_name(device, settings.precision),
        "weight_decay": settings.weight_decay,
        "iterations": settings.iterations,
    }
    claim_folder(out, "features.json", identity, "holds features of other weights, images or settings")
    model = prepared(model.to(device), settings.precision)
    with stops_with(f"Stopped. Features are kept in {out}; run the same command again to resume."):
        parts = {
            name: _measure(model, artifact, layer, out / name, settings, progress)
            for name, artifact in artifacts.items()
        }

        def fit() -> dict[str, Any]:
            progress.say(f"fitting a classifier of {len(names)} classes on {len(artifacts['train'])} images")
            x, y, test_x, test_y = (
                torch.from_numpy(parts[name].joined(column))
                for name in ("train", "test")
                for column in ("features", "labels")
            )
            mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
            x, test_x = (((part - mean) / std).to(device) for part in (x, test_x))
            head = fit_linear(x, y.to(device), len(names), settings.weight_decay, settings.iterations)
            return {
                "test": accuracies(head, test_x, test_y.to(device)),
                "train": accuracies(head, x, y.to(device)),
                "train_images": len(x),
                "test_images": len(test_x),
                "features": x.shape[1],
                "layer": layer,
                "layers": layers,
                "identity": identity,
                "made_by": made_by(),
            }

        return write_once(out / "probe.json", fit)


def _measure(
    model: DPAR | LlamaGen, artifact: Artifact, layer: int, folder: Path, settings: ProbeSettings, progress: Progress
) -> Parts:
    """Compute features (n, d) and labels (n,) of all images, in parts."""
    parts = Parts(folder, -(-len(artifact) // CHUNK))
    with progress.task(f"features, {folder.name}", len(artifact), "images") as task:
        for index in parts.missing():
            chunks, labels = [], []
            end = min((index + 1) * CHUNK, len(artifact))
            for first in range(index * CHUNK, end, settings.batch):
                rows = np.arange(first, min(first + settings.batch, end))
                batch = artifact.gather(rows, np.zeros_like(rows))
                chunks.append(features(model, batch, layer, settings.precision))
                labels.append(batch.labels)
                task.advance(len(rows))
            parts.save(index, features=np.concatenate(chunks), labels=np.concatenate(labels))
    return parts


@torch.no_grad()
def features(model: DPAR | LlamaGen, batch: Batch, layer: int, precision: Precision) -> NDArray[np.float32]:
    """Return outputs (B, d) of layer ``layer``, from 1, averaged over each image's patches, or tokens for LlamaGen.

    They do not depend on ``batch.labels``.
    """
    device = model.output.weight.device
    codes = torch.from_numpy(batch.codes).to(device)
    layout = layout_for(model, batch, device)
    outputs: list[Tensor] = []
    hook = model.layers[layer - 1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with autocast(device, precision):
            if isinstance(model, DPAR):
                assert layout is not None  # check_compatible() has refused artifacts without boundaries
                guidance_class = torch.full((len(codes),), model.config.classes, device=device)
                patches, _ = model.encode(codes, layout)
                model.transform(model.cls_embedding(guidance_class), patches, layout)
            else:
                model(codes)
    finally:
        hook.remove()
    (output,) = outputs
    if layout is None:
        return output.float().mean(dim=1).cpu().numpy()
    return segment_mean(output.float(), layout.image_of_patch, len(codes)).cpu().numpy()


def fit_linear(x: Tensor, labels: Tensor, classes: int, weight_decay: float, iterations: int) -> nn.Linear:
    """Fit a classifier on features (n, d) by L-BFGS, minimising cross-entropy plus ``weight_decay / 2 · |W|²``."""
    head = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def loss() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows, targets in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            part = F.cross_entropy(head(rows), targets, reduction="sum") / len(x)
            part.backward()
            total += part.item()
        penalty = 0.5 * weight_decay * head.weight.square().sum()
        penalty.backward()
        return total + penalty.item()

    optimizer.step(loss)
    return head


@torch.no_grad()
def accuracies(head: nn.Linear, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Return ``top1`` and ``top5`` accuracy, from 0 to 1."""
    most = min(5, head.out_features)
    hits = torch.cat(
        [
            head(rows).topk(most).indices == targets.unsqueeze(1)
            for rows, targets in zip(x.split(ROWS), labels.split(ROWS), strict=True)
        ]
    )
    return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(dim=1).double().mean())}


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = "".join(
        f"| {name} | {100 * results[name]['top1']:.2f} | {100 * results[name]['top5']:.2f} | "
        f"{results[f'{name}_images']} |\n"
        for name in ("test", "train")
    )
    head = "| layer {layer} of {layers}, {features} features | top-1 % | top-5 % | images |".format(**results)
    return f"{head}\n| --- | ---: | ---: | ---: |\n{rows}"

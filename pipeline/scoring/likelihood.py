"""A model's likelihood of codes: entropies of tokens, and bits per token.

entropy = entropies(entropy_model, codes, batch=32, precision="auto")    # (B, N) float16, nats
likelihood = bits_per_token(model, artifact, batch=32, precision="auto")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpar.cpu_kernels import prepare_forward
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.packing import PatchLayout
from dpar.patching import PatchRule
from pipeline.runtime.device import autocast, rank, world_size
from pipeline.runtime.distributed import all_reduce_sum
from pipeline.runtime.errors import StageError
from pipeline.settings.fields import Precision
from shards.manifest import Manifest
from shards.reader import Artifact, Batch

M = TypeVar("M", bound=torch.nn.Module)


def prepared(model: M, precision: Precision) -> M:
    """Return the model in its fastest form for forward passes in this precision: a copy on oneDNN, or itself."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        return prepare_forward(model)


@torch.no_grad()
def entropies(model: LlamaGen, codes: NDArray[np.integer], *, batch: int, precision: Precision) -> NDArray[np.float16]:
    """Return next-token entropies of sequences (n, N), as artifacts store them: (n, N) float16 nats, +inf at token 0.

    An image's entropies depend only on that image. A class-conditional model gets its guidance class. For speed, pass
    a :func:`prepared` model.
    """
    device = model.output.weight.device
    entropy = np.empty(codes.shape, np.float16)
    for begin in range(0, len(codes), batch):
        chunk = torch.from_numpy(codes[begin : begin + batch].astype(np.int64)).to(device)
        with autocast(device, precision):
            entropy[begin : begin + batch] = model.entropy(chunk).cpu().numpy()
    return entropy


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How well a model predicts an artifact's codes."""

    bits_per_token: float
    bits_by_class: tuple[float, ...]  # NaN for a class without images
    patches: float  # mean per image; tokens for LlamaGen
    images: int

    @classmethod
    def of(
        cls, nats: NDArray[np.float64], labels: NDArray[np.int64], patches: int, class_names: Sequence[str]
    ) -> Likelihood:
        """Summarise the output of :func:`nats_per_token` for all images."""
        bits = nats / math.log(2)
        by_class = [bits[labels == label] for label in range(len(class_names))]
        return cls(
            bits_per_token=float(bits.mean()),
            bits_by_class=tuple(float(b.mean()) if len(b) else math.nan for b in by_class),
            patches=patches / len(bits),
            images=len(bits),
        )


def forward(model: DPAR | LlamaGen, codes: Tensor, labels: Tensor, layout: PatchLayout | None) -> Tensor:
    """Return teacher-forced logits of either model, (B, N, V) with a start token; only DPAR has a layout."""
    logits: Tensor = model(codes, labels) if layout is None else model(codes, labels, layout)
    return logits


def layout_for(model: DPAR | LlamaGen, batch: Batch, device: torch.device) -> PatchLayout | None:
    """Return the batch's patch layout; None for LlamaGen."""
    if isinstance(model, LlamaGen):
        return None
    assert batch.starts is not None  # check_compatible refuses artifacts without boundaries
    return PatchLayout.from_starts(torch.from_numpy(batch.starts)).to(device)


def bits_per_token(
    model: DPAR | LlamaGen, artifact: Artifact, *, batch: int, precision: Precision, unconditional: bool = False
) -> Likelihood:
    """Return the exact mean negative log2-likelihood per predicted token, over view 0 of every image.

    Stored boundaries are used. They are a function of earlier tokens, so they cost no bits.
    """
    rows = np.arange(len(artifact))
    measured = nats_per_token(model, artifact, rows, batch, precision, unconditional)
    return Likelihood.of(*measured, artifact.manifest.class_names)


def shared_bits_per_token(
    model: DPAR | LlamaGen, artifact: Artifact, *, batch: int, precision: Precision, unconditional: bool = False
) -> float:
    """Return the same number, computed jointly by all processes of a run; each of them must call it."""
    images = len(artifact)
    rows = np.arange(rank(), -(-images // world_size()) * world_size(), world_size())
    counted = rows < images
    # Under FSDP all processes must run the same number of batches, so those with one image fewer repeat one.
    nats, _, _ = nats_per_token(model, artifact, np.where(counted, rows, 0), batch, precision, unconditional)
    return float(all_reduce_sum(torch.tensor(nats[counted].sum()))) / images / math.log(2)


@torch.no_grad()
def nats_per_token(
    model: DPAR | LlamaGen,
    artifact: Artifact,
    rows: NDArray[np.int64],
    batch: int,
    precision: Precision,
    unconditional: bool = False,
    rule: PatchRule | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Return mean nats per token (n,) and label (n,) of view 0 of ``rows`` (n,), and their total number of patches.

    With ``rule`` boundaries are recomputed from stored entropies; None uses the stored boundaries.

    Raises:
        StageError: the rule needs entropies, and an image has none.
    """
    device = model.output.weight.device
    was_training = model.training
    runner = prepared(model.eval(), precision)
    nats = np.zeros(len(rows))
    labels_seen = np.zeros(len(rows), np.int64)
    patches = 0
    for begin in range(0, len(rows), batch):
        here = rows[begin : begin + batch]
        drawn = artifact.gather(here, np.zeros_like(here))
        if rule is not None:
            if drawn.entropy is None or (rule.needs_entropy and np.isnan(drawn.entropy).any()):
                raise StageError(f"{artifact.folder} holds no entropies; its boundaries cannot be moved")
            drawn = dataclasses.replace(drawn, starts=rule.starts(drawn.entropy, artifact.manifest.grid[1]))
        codes = torch.from_numpy(drawn.codes).to(device)
        labels = torch.from_numpy(drawn.labels).to(device)
        if unconditional:
            labels = torch.full_like(labels, model.config.classes)
        layout = layout_for(model, drawn, device)
        with autocast(device, precision):
            logits = forward(runner, codes, labels, layout)
        targets = model.targets(codes) if isinstance(model, LlamaGen) else codes
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        nats[begin : begin + batch] = loss.view(len(here), -1).mean(dim=1).double().cpu().numpy()
        labels_seen[begin : begin + batch] = drawn.labels
        patches += codes.numel() if layout is None else layout.n_patches
    model.train(was_training)
    return nats, labels_seen, patches


def check_compatible(model: DPAR | LlamaGen, manifest: Manifest, name: str, unconditional: bool = False) -> None:
    """Raise StageError if an artifact does not fit a model, naming both sides."""
    config = model.config
    pairs = [
        ("grid", f"{config.grid_height}×{config.grid_width}", f"{manifest.grid[0]}×{manifest.grid[1]}"),
        ("codebook size", str(config.codebook_size), str(manifest.codebook_size)),
    ]
    if not unconditional:
        pairs.append(("number of classes", str(config.classes), str(len(manifest.class_names))))
    for what, models, artifacts in pairs:
        if models != artifacts:
            raise StageError(f"{name} does not fit the model: its {what} is {artifacts}, the model's {models}")
    if isinstance(model, DPAR) and manifest.kind != "patches":
        raise StageError(f"{name} holds codes without boundaries; DPAR needs patches, as `dpar patchify` writes them")


def check_same_classes(first: Sequence[str], second: Sequence[str], first_name: str, second_name: str) -> None:
    """Raise StageError if two artifacts number classes differently, naming the first difference."""
    for label, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            raise StageError(
                f"class {label} is {a!r} in {first_name} and {b!r} in {second_name}; both must have the same classes"
            )

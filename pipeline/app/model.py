"""The model of the page: a bundle or a run as a pipeline, with its name and its costs.

model = load_model("builtin:emoji", AppSettings())
model.pipe(["flag"]), model.title, model.patches_text(133.5, guided=True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dpar.image_pipeline import DPARPipeline
from dpar.locations import bundle_folder
from dpar.model import DPARConfig
from pipeline.app.compute import Compute
from pipeline.export import EMA
from pipeline.generation.generator import Generator
from pipeline.runtime.device import choose_device
from pipeline.settings.app import AppSettings
from pipeline.settings.sampling import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline and the texts about it on the page."""

    name: str  # as the user gave it
    pipe: DPARPipeline
    compute: Compute | None  # None for a LlamaGen, which has no patches

    @property
    def title(self) -> str:
        """Name, kind and sizes in one line."""
        rows, columns = self.pipe.grid
        side = self.pipe.tokenizer.config.downsampling
        kind = "DPAR" if isinstance(self.pipe.generator.config, DPARConfig) else "LlamaGen"
        millions = sum(p.numel() for p in self.pipe.generator.parameters()) / 1e6
        return (
            f"{self.name}: {kind}, {millions:.1f} M parameters, {len(self.pipe.class_names)} classes, "
            f"{columns * side} × {rows * side} px, {rows} × {columns} tokens, {self.pipe.device.type}"
        )

    @property
    def tokens(self) -> int:
        """Tokens per image, N."""
        return self.pipe.generator.config.n_tokens

    @property
    def by_entropy(self) -> bool:
        """Whether patches depend on entropies, so that there is a threshold to set."""
        return self.pipe.rule is not None and self.pipe.rule.strategy == "entropy"

    @property
    def highest_threshold(self) -> float:
        """ln V in nats, rounded up: no token's entropy exceeds it."""
        return math.ceil(100 * math.log(self.pipe.generator.config.codebook_size)) / 100

    @property
    def threshold(self) -> float:
        """The threshold of the training data in nats, at most ``highest_threshold``."""
        known = None if self.pipe.rule is None else self.pipe.rule.threshold
        return self.highest_threshold if known is None else min(known, self.highest_threshold)

    def patches_text(self, patches: float, guided: bool | None) -> tuple[str, str]:
        """Return texts: what a mean of ``patches`` per image saves, and compared with which model.

        Args:
            patches: mean per image.
            guided: whether images were sampled with guidance; None for one forward pass of a given image.
        """
        if self.compute is None:
            return f"{self.tokens} tokens per image.", "This model has no patches: every token is processed on its own."
        saved = self.compute.saved(patches, bool(guided))
        baseline = self.compute.baseline
        return (
            f"{self.tokens / patches:.2f} tokens per patch. Compute saved: {percent(saved.generator)} in the "
            f"generator, {percent(saved.total)} with the entropy model counted.",
            f"Compared with a LlamaGen of the same depth and width ({baseline.layers} layers, width {baseline.width}), "
            f"by multiply-accumulates of linear layers {'in one forward pass' if guided is None else 'of sampling'}.",
        )


def percent(share: float) -> str:
    """Return a share as a whole number of per cent, with a minus sign that is not a hyphen."""
    return f"{round(100 * share)}\u00a0%".replace("-", "−")  # no line break before the sign


def load_model(name: str, settings: AppSettings) -> Model:
    """Load a bundle, or a run of ``dpar train`` with the moving average of its weights if it has one.

    Raises:
        StageError, ModelError: it is neither, or cannot be loaded.
    """
    device = choose_device(settings.device)
    if bundle_folder(name) is not None:
        pipe = DPARPipeline.from_pretrained(name)
    else:
        run = Path(name)
        sampling = SamplingSettings(
            device="cpu", tokenizer=settings.tokenizer, entropy_model=settings.entropy_model
        )  # moved below, all at once
        average = run / EMA
        loaded = Generator.load(run, sampling, weights=str(average) if average.is_dir() else None)
        pipe = DPARPipeline(
            loaded.model, loaded.tokenizer, loaded.entropy_model, loaded.trained_rule, loaded.class_names
        )
    config = pipe.to(device).generator.config
    compute = None
    if isinstance(config, DPARConfig):
        compute = Compute(config, None if pipe.entropy_model is None else pipe.entropy_model.config)
    return Model(name=name, pipe=pipe, compute=compute)

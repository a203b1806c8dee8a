"""Sheets of samples during training: the same classes and random numbers each time, with patches drawn.

Each picture has the name of its class below it.

painter = Painter.load(model, inputs, images=8, seed=0, precision="auto", device=device, progress=progress)
painter.draw(model, run.sheets / "step-00002000.png")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpar.errors import ModelError
from dpar.guidance import SamplingOptions
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import PatchRule
from dpar.sampling import check_same_tokens, sample
from dpar.tokenizer import VQTokenizer
from pipeline.generation.generator import decode, trained_rule
from pipeline.reports.pictures import captioned, draw_patches, enlarge, png_bytes, scale_for, sheet
from pipeline.runs.weights import load_entropy_model, load_tokenizer
from pipeline.runtime.device import Precision, autocast
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from shards.files import atomic_path

COLUMNS = 8
PICTURE_PX = 256
GUIDANCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Painter:
    """Everything except the model that is needed to draw samples of a model in training."""

    tokenizer: VQTokenizer
    entropy_model: LlamaGen | None
    rule: PatchRule | None  # None for LlamaGen
    class_names: tuple[str, ...]
    images: int
    seed: int
    precision: Precision

    @classmethod
    def load(
        cls,
        model: DPAR | LlamaGen,
        inputs: dict[str, Any],
        *,
        images: int,
        seed: int,
        precision: Precision,
        device: torch.device,
        progress: Progress,
    ) -> Painter | None:
        """Load the tokenizer and, for DPAR, the entropy model recorded in a run's ``inputs``.

        Returns:
            None (with a logged reason) if unavailable: training continues without sheets.
        """
        try:
            origin = inputs["tokenizer"]
            tokenizer = load_tokenizer(origin["path"], origin["fingerprint"])
            entropy_model = None
            rule = trained_rule(inputs) if isinstance(model, DPAR) else None
            if rule is not None and rule.strategy == "entropy":
                origin = inputs["entropy_model"]
                entropy_model = load_entropy_model(origin["path"], origin["fingerprint"])
                check_same_tokens(model, entropy_model)
        except (StageError, ModelError, OSError, LookupError, TypeError) as error:
            progress.say(f"sample sheets are not drawn: {error}")
            return None
        return cls(
            tokenizer=tokenizer.to(device),
            entropy_model=None if entropy_model is None else entropy_model.to(device),
            rule=rule,
            class_names=tuple(inputs["class_names"]),
            images=images,
            seed=seed,
            precision=precision,
        )

    def draw(self, model: DPAR | LlamaGen, path: Path) -> None:
        """Write a PNG of samples of ``model`` atomically; the model is unchanged."""
        labels = np.linspace(0, len(self.class_names) - 1, self.images).round().astype(np.int64)
        device = model.output.weight.device
        was_training = model.training
        model.eval()
        with autocast(device, self.precision):
            codes, starts = sample(
                model,
                torch.from_numpy(labels),
                self.entropy_model,
                self.rule,
                SamplingOptions(cfg_scale=GUIDANCE, seed=self.seed),
            )
        model.train(was_training)
        grid = model.config.grid_height, model.config.grid_width
        pixels = decode(self.tokenizer, codes.cpu().numpy(), grid, precision=self.precision)
        scale = scale_for(pixels.shape[1], PICTURE_PX)
        pictures = [
            draw_patches(image, own, grid, scale) if isinstance(model, DPAR) else enlarge(image, scale)
            for image, own in zip(pixels, starts.cpu().numpy(), strict=True)
        ]
        pictures = [
            captioned(picture, self.class_names[label]) for picture, label in zip(pictures, labels, strict=True)
        ]
        rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as part:
            part.write_bytes(png_bytes(sheet(rows)))

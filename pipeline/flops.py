"""``dpar flops``: what each model costs, beside the paper's figures.

rows = cost_table(FlopsSettings(model=("dpar-b", "llamagen-b")))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dpar.flops import PAPER_GMACS, PAPER_PARAMETERS, PAPER_PATCH_LENGTH, count
from dpar.presets import PRESETS, preset
from pipeline.errors import StageError
from pipeline.settings import FlopsSettings


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One model at one resolution. MACs and FLOPs are of one image."""

    model: str
    image_size: int
    tokens: int
    patches: float
    parameters: int
    paper_parameters: float | None
    gmacs: float  # linear layers, as the paper counts
    paper_gmacs: float | None
    attention_gmacs: float
    training_gflops: float  # 3 × 2 × MACs of linear layers

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def cost_table(settings: FlopsSettings) -> list[CostRow]:
    """Counts every model asked for at every image size.

    Raises:
        ModelError: an unknown preset. StageError: a patch length that an image cannot have.
    """
    rows = []
    for size in settings.image_size:
        side = size // settings.downsampling
        for name in settings.model or [name for name in PRESETS if not name.endswith("tiny")]:
            config = preset(
                name,
                grid_height=side,
                grid_width=side,
                codebook_size=settings.codebook_size,
                classes=settings.classes,
            )
            # The paper's figures are for its own codebook, classes, patch lengths and 16-pixel tokens.
            length = settings.patch_length or PAPER_PATCH_LENGTH.get(size, PAPER_PATCH_LENGTH[256])
            papers = (settings.downsampling, settings.codebook_size, settings.classes) == (16, 16384, 1000)
            same_length = name.startswith("llamagen") or length == PAPER_PATCH_LENGTH.get(size)
            try:
                cost = count(config, 1.0 if name.startswith("llamagen") else length)
            except ValueError as error:
                raise StageError(f"--patch-length: {error}") from error
            rows.append(
                CostRow(
                    model=name,
                    image_size=size,
                    tokens=config.n_tokens,
                    patches=cost.patches,
                    parameters=cost.parameters,
                    paper_parameters=PAPER_PARAMETERS.get(name) if papers else None,
                    gmacs=cost.linear / 1e9,
                    paper_gmacs=PAPER_GMACS.get((name, size)) if papers and same_length else None,
                    attention_gmacs=cost.attention / 1e9,
                    training_gflops=cost.training_flops / 1e9,
                )
            )
    return rows

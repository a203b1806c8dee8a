"""``dpar flops``: the cost of each model, compared with the paper's figures.

rows = cost_table(FlopsSettings(model=("dpar-b", "llamagen-b")))
for part in tables(rows): print(part.title)                      # as text, for a terminal; markdown(rows) for documents
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dpar.flops import PAPER_GMACS, PAPER_PARAMETERS, PAPER_PATCH_LENGTH, count
from dpar.presets import PRESETS, preset
from pipeline.runtime.errors import StageError
from pipeline.settings.models import FlopsSettings


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One model at one resolution. MACs and FLOPs are per image."""

    model: str
    image_size: int
    tokens: int
    patches: float
    parameters: int
    paper_parameters: float | None
    gmacs: float  # linear layers, as the paper counts
    paper_gmacs: float | None
    attention_gmacs: float
    gmacs_with_attention: float
    training_gflops: float  # 3 × 2 × MACs of linear layers
    sampling_gmacs: float  # linear layers, with guidance; for DPAR with its entropy model

    @property
    def parameters_off(self) -> float | None:
        """Relative difference from the paper's number of parameters."""
        return None if self.paper_parameters is None else self.parameters / 1e6 / self.paper_parameters - 1

    @property
    def gmacs_off(self) -> float | None:
        """Relative difference from the paper's GMACs."""
        return None if self.paper_gmacs is None else self.gmacs / self.paper_gmacs - 1

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        off = {"parameters_off": self.parameters_off, "gmacs_off": self.gmacs_off}
        return dataclasses.asdict(self) | off


def cost_table(settings: FlopsSettings) -> list[CostRow]:
    """Count every requested model at every image size.

    Raises:
        ModelError: an unknown preset.
        StageError: an impossible patch length.
    """
    rows = []
    for size in settings.image_size:
        side = size // settings.downsampling
        codes = {"grid_height": side, "grid_width": side, "codebook_size": settings.codebook_size}
        entropy_model = count(preset(settings.entropy_model, classes=0, start_token=False, **codes))
        for name in settings.model or [name for name in PRESETS if not name.endswith("tiny")]:
            config = preset(name, classes=settings.classes, **codes)
            # The paper's figures are for its own codebook, classes, patch lengths and 16-pixel tokens.
            length = settings.patch_length or PAPER_PATCH_LENGTH.get(size, PAPER_PATCH_LENGTH[256])
            is_paper = (settings.downsampling, settings.codebook_size, settings.classes) == (16, 16384, 1000)
            llamagen = name.startswith("llamagen")
            same_length = llamagen or length == PAPER_PATCH_LENGTH.get(size)
            try:
                cost = count(config, 1.0 if llamagen else length)
            except ValueError as error:
                raise StageError(f"--patch-length: {error}") from error
            rows.append(
                CostRow(
                    model=name,
                    image_size=size,
                    tokens=config.n_tokens,
                    patches=cost.patches,
                    parameters=cost.parameters,
                    paper_parameters=PAPER_PARAMETERS.get(name) if is_paper else None,
                    gmacs=cost.linear / 1e9,
                    paper_gmacs=PAPER_GMACS.get((name, size)) if is_paper and same_length else None,
                    attention_gmacs=cost.attention / 1e9,
                    gmacs_with_attention=(cost.linear + cost.attention) / 1e9,
                    training_gflops=cost.training_flops / 1e9,
                    sampling_gmacs=cost.sampling(None if llamagen else entropy_model) / 1e9,
                )
            )
    return rows


HEADER = ("model", "px", "patches", "params", "paper", "diff", "GMACs", "paper", "diff", "+attn", "train", "sample")
NOTES = (
    "params: millions. GMACs: 1e9 multiply-accumulates of the linear layers in one forward pass per image, the "
    "paper's count; +attn: with attention products. train: TFLOPs per image, 3 × 2 × MACs. sample: GMACs to "
    "sample an image with guidance, for DPAR with --entropy-model (the paper's is llamagen-b). diff: relative "
    "difference from the paper's figure. The paper's 120 M for DPAR-B are inconsistent with its own GFLOPs and its "
    "other rows: the sizes that reproduce all twelve of its GFLOPs have 115.0 M."
)


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The rows of one image size as text, without the columns that the title covers."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]


def markdown(rows: list[CostRow]) -> str:
    """Return the rows as a Markdown table with all columns of :data:`HEADER`."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(_line, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(rows: list[CostRow]) -> list[CostTable]:
    """Return one table per image size, narrow enough for a terminal of 80 columns."""
    parts = []
    for size in dict.fromkeys(row.image_size for row in rows):
        same_size = [row for row in rows if row.image_size == size]
        patches = {row.patches for row in same_size if row.model.startswith("dpar")}
        details = "".join(f", {count:.1f} patches per image for DPAR" for count in patches)
        lines = [(row.model, *_line(row)[3:]) for row in same_size]
        title = f"{size} px: {same_size[0].tokens} tokens{details}"
        parts.append(CostTable(title=title, header=(HEADER[0], *HEADER[3:]), lines=lines))
    return parts


def _line(row: CostRow) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:+.2%}"

    return (
        row.model,
        str(row.image_size),
        number(row.patches, 1),
        number(row.parameters / 1e6, 1),
        number(row.paper_parameters, 0),
        share(row.parameters_off),
        number(row.gmacs, 2),
        number(row.paper_gmacs, 2),
        share(row.gmacs_off),
        number(row.gmacs_with_attention, 1),
        number(row.training_gflops / 1e3, 2),
        number(row.sampling_gmacs, 1),
    )

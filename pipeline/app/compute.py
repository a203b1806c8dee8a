"""The share of compute that patches save, compared with a LlamaGen of the same depth and width.

    compute = Compute(pipe.generator.config, pipe.entropy_model.config)
    compute.saved(patches=133.5, guided=True)                # Saved(generator=0.31, total=0.12)

Compute is multiply-accumulates of linear layers per image, the paper's count (:mod:`dpar.flops`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dpar.flops import Cost, count
from dpar.llamagen import LlamaGenConfig
from dpar.model import DPARConfig


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Shares of the baseline's compute; negative if the model costs more."""

    generator: float  # without the entropy model
    total: float  # with the entropy model, which the baseline does not need


class Compute:
    """The costs of a DPAR with its entropy model and of its baseline, counted on first use."""

    def __init__(self, generator: DPARConfig, entropy_model: LlamaGenConfig | None) -> None:
        self.generator, self.entropy_model = generator, entropy_model
        self.baseline = LlamaGenConfig(
            codebook_size=generator.codebook_size,
            grid_height=generator.grid_height,
            grid_width=generator.grid_width,
            classes=generator.classes,
            width=generator.width,
            heads=generator.heads,
            layers=generator.encoder_layers + generator.patch_layers + generator.decoder_layers,
        )

    def saved(self, patches: float, guided: bool) -> Saved:
        """Return what a mean of ``patches`` per image saves, with guidance or in one forward pass."""
        one, all_tokens, entropy_model, baseline = self._costs
        n = self.generator.n_tokens
        share = (patches - 1) / max(n - 1, 1)

        def saved(with_entropy_model: Cost | None) -> float:
            few, many = (cost.sampling(with_entropy_model, guided) for cost in (one, all_tokens))
            return 1 - (few + (many - few) * share) / baseline.sampling(None, guided)

        return Saved(generator=saved(None), total=saved(entropy_model))

    @cached_property
    def _costs(self) -> tuple[Cost, Cost, Cost | None, Cost]:
        """Costs of the generator with one patch and with a patch per token, of the entropy model, of the baseline."""
        n = float(self.generator.n_tokens)
        entropy_model = None if self.entropy_model is None else count(self.entropy_model)
        return count(self.generator, n), count(self.generator), entropy_model, count(self.baseline)

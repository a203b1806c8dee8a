"""Sampling in raster order with KV caches; patch boundaries are decided on the fly (paper section 4.1).

    codes, starts = sample(model, labels, entropy_model, PatchRule(threshold=7.8), SamplingOptions(cfg_scale=2.0))
    codes, _ = sample(llamagen, labels, options=SamplingOptions(cfg_scale=2.0))

For each batch of images, for each token i:

1. The entropy model gives the entropy of token i, and the patch rule decides which images start a patch.
2. For those, the encoder closes the patch that ended, and the patch transformer runs one step on it.
3. The decoder gives the logits of token i, from which one token per image is drawn.
4. The encoder and the entropy model read that token.

With guidance the conditional and the unconditional half share tokens and boundaries, so the entropy model and the patch
encoder run once for both. Feeding the sampled codes and starts through the model's forward gives the same logits.

Steppers are in :mod:`dpar.steppers` for the CPU and in :mod:`dpar.static_steppers` for other devices. An image depends
on (seed, index), not on the rest of its batch; on CPU in float32 it is bit-identical (:mod:`dpar.kv_cache` says how).
On a GPU, or between two machines, logits can differ in their last bits. That changes a token if its uniform number is
within about 1e-6 of a step of the cumulative distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpar.cpu_kernels import prepare_steps
from dpar.errors import ModelError
from dpar.guidance import SamplingOptions, draw, uniforms
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import OnlinePatcher, PatchRule
from dpar.static_steppers import StaticPatcher, StaticSteppers, StaticTokenStepper, longest_patch
from dpar.steppers import Stepper, TokenStepper, stepper_for

Observe = Callable[[slice, int, Tensor], None]  # images of the batch, position, a value per image


def sample(
    model: DPAR | LlamaGen,
    labels: Tensor,
    entropy_model: LlamaGen | None = None,
    rule: PatchRule | None = None,
    options: SamplingOptions | None = None,
    *,
    indices: Sequence[int] | None = None,
    batch: int | None = None,
    known: Tensor | None = None,
    keep: Tensor | None = None,
    advance: Callable[[int], None] = lambda images: None,
    observe: Observe | None = None,
    observe_log_prob: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one image for each label.

    Args:
        model: in evaluation mode, on the device to sample on.
        labels: (B,) int64.
        entropy_model: decides boundaries for DPAR; not needed if the rule needs no entropies.
        rule: which tokens start a patch; required for DPAR, unused for LlamaGen.
        options: guidance, drawing and seed; plain sampling if None.
        indices: each image's number in the run; 0, 1, … if None.
        batch: images sampled at once; None for all. No image depends on it.
        known: (B, N) int64, codes of which some are kept, for editing; requires ``keep``.
        keep: (B, N) bool, True where the token is taken from ``known``. The others are sampled, in raster order: each
            sees the tokens before it, kept or sampled, and none after it.
        advance: called with the number of images after each batch.
        observe: called with each batch's images, a position, and its logits (b, V) after guidance.
        observe_log_prob: called likewise with ln p (b,) float32 of the chosen tokens under the model itself, without
            guidance, temperature, top-k or top-p. Their sum over an image equals that of a teacher-forced forward pass.

    Returns:
        codes (B, N) int64 and starts (B, N) bool; for LlamaGen every token is its own patch.

    Raises:
        ModelError: settings or models are incompatible.
    """
    return Sampler(model, entropy_model).sample(
        labels,
        rule,
        options,
        indices=indices,
        batch=batch,
        known=known,
        keep=keep,
        advance=advance,
        observe=observe,
        observe_log_prob=observe_log_prob,
    )


class Sampler:
    """:func:`sample` for repeated calls: reuses prepared weights, and on GPUs caches and graphs.

    Weights are prepared for the autocast state of the first call; later calls must run under the same.
    """

    def __init__(
        self,
        model: DPAR | LlamaGen,
        entropy_model: LlamaGen | None = None,
        *,
        static: bool | None = None,
        graphs: bool = True,
    ) -> None:
        """Take a model and its entropy model, in evaluation mode, on the device to sample on.

        Args:
            model: to sample from.
            entropy_model: decides boundaries for DPAR.
            static: whether to use the fixed-shape steppers; None: on all devices but the CPU.
            graphs: whether those run as CUDA graphs on CUDA.
        """
        self.model, self.entropy_model, self.graphs = model, entropy_model, graphs
        self.device = model.output.weight.device
        self.static = self.device.type != "cpu" if static is None else static

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        rule: PatchRule | None = None,
        options: SamplingOptions | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch: int | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        advance: Callable[[int], None] = lambda images: None,
        observe: Observe | None = None,
        observe_log_prob: Observe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`sample`."""
        options = options or SamplingOptions()
        if isinstance(self.model, LlamaGen):
            rule = PatchRule.static(1.0)  # every token is its own patch
        rule = _check(self.model, labels, self.entropy_model, rule)
        count, n = len(labels), self.model.config.n_tokens
        indices = range(count) if indices is None else indices
        if len(indices) != count:
            raise ModelError(f"there are {len(indices)} indices for {count} labels; one per image is needed")
        if batch is not None and batch < 1:
            raise ModelError(f"batch is {batch}; it must be at least 1")
        known, keep = _on_device(known, keep, count, n, self.model.config.codebook_size, self.device)
        labels = labels.to(self.device)
        codes = torch.zeros(count, n, dtype=torch.long, device=self.device)
        starts = torch.zeros(count, n, dtype=torch.bool, device=self.device)

        for begin in range(0, count, batch or count):
            images = slice(begin, min(begin + (batch or count), count))
            patcher, stepper, entropy_stepper = self._begin(labels[images], rule, options.guided)
            noise = torch.from_numpy(uniforms(options.seed, indices[begin : images.stop], n)).to(self.device)
            for i in range(n):
                # 1. boundaries
                entropy = None if entropy_stepper is None else entropy_stepper.entropy(i)
                begun = torch.as_tensor(patcher.step(i, entropy))
                starts[images, i] = begun
                # 2. patches
                stepper.begin_patches(i, begun)
                # 3. a token
                logits = own = stepper.logits(i).float()
                if options.guided:
                    own, unconditional = logits[0::2], logits[1::2]
                    logits = unconditional + options.guidance_at(i, n) * (own - unconditional)
                drawn = draw(logits, noise[:, i], options)
                if known is not None and keep is not None:
                    drawn = torch.where(keep[images, i], known[images, i], drawn)
                codes[images, i] = drawn
                if observe is not None:
                    observe(images, i, logits)
                if observe_log_prob is not None:
                    observe_log_prob(images, i, own.log_softmax(dim=-1).gather(1, drawn.unsqueeze(1)).squeeze(1))
                # 4. read it
                if i + 1 < n:
                    stepper.accept(i, drawn)
                    if entropy_stepper is not None:
                        entropy_stepper.accept(i, drawn)
            advance(images.stop - begin)
        return codes, starts

    def _begin(
        self, labels: Tensor, rule: PatchRule, guided: bool
    ) -> tuple[OnlinePatcher | StaticPatcher, Stepper, TokenStepper | StaticTokenStepper | None]:
        """Return the patcher, the stepper and the entropy stepper of a batch of images with labels (B,)."""
        c, batch = self.model.config, len(labels)
        if self.static:
            kept = self._static_steppers
            longest = longest_patch(rule, c.n_tokens, c.grid_width)
            return (
                StaticPatcher(rule, batch, c.n_tokens, c.grid_width, self.device),
                kept.generator(labels, guided, longest),
                kept.entropy(labels) if rule.needs_entropy else None,
            )
        entropy_stepper = None
        if rule.needs_entropy:
            entropy_model = self._prepared_entropy_model
            entropy_stepper = TokenStepper(entropy_model, labels.new_full((batch,), entropy_model.config.classes))
        stepper = stepper_for(self._prepared_model, labels, guided)
        return rule.online(batch, c.n_tokens, c.grid_width), stepper, entropy_stepper

    @functools.cached_property
    def _static_steppers(self) -> StaticSteppers:
        return StaticSteppers(self.model, self.entropy_model, self.graphs)

    @functools.cached_property
    def _prepared_model(self) -> DPAR | LlamaGen:
        return prepare_steps(self.model)

    @functools.cached_property
    def _prepared_entropy_model(self) -> LlamaGen:
        assert self.entropy_model is not None  # see _check
        return prepare_steps(self.entropy_model)


def _check(model: DPAR | LlamaGen, labels: Tensor, entropy_model: LlamaGen | None, rule: PatchRule | None) -> PatchRule:
    """Return the rule; raise ModelError if models, labels and rule are incompatible."""
    config = model.config
    if labels.ndim != 1 or len(labels) == 0:
        raise ModelError(f"labels are {tuple(labels.shape)}; (B,) with at least one is needed")
    if int(labels.min()) < 0 or int(labels.max()) > config.classes:
        raise ModelError(
            f"labels range from {int(labels.min())} to {int(labels.max())}; this model has classes "
            f"0 to {config.classes - 1}, and {config.classes} for no class"
        )
    if isinstance(model, LlamaGen) and not model.config.start_token:
        raise ModelError("a LlamaGen without a start token is an entropy model; it cannot sample the first token")
    if rule is None:
        raise ModelError("a DPAR model needs a patch rule; use that of the training patches")
    if isinstance(model, DPAR) and rule.needs_entropy:
        if rule.threshold is None:
            raise ModelError("the patch rule has no threshold; use that of the training patches")
        if entropy_model is None:
            raise ModelError("an entropy model is needed: with a finite threshold, boundaries depend on entropies")
        check_same_tokens(model, entropy_model)
    return rule


def _on_device(
    known: Tensor | None, keep: Tensor | None, batch: int, n_tokens: int, codebook_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``known`` and ``keep`` on ``device``; raise ModelError if they are invalid."""
    if known is None and keep is None:
        return None, None
    if known is None or keep is None:
        raise ModelError("known and keep go together: the codes, and which of them are kept")
    for name, tensor in (("known", known), ("keep", keep)):
        if tensor.shape != (batch, n_tokens):
            raise ModelError(f"{name} is {tuple(tensor.shape)}; ({batch}, {n_tokens}) is needed: images, tokens")
    if keep.dtype != torch.bool:
        raise ModelError(f"keep is {keep.dtype}; bool is needed")
    kept_codes = known[keep]
    if len(kept_codes):
        lowest, highest = int(kept_codes.min()), int(kept_codes.max())
        if lowest < 0 or highest >= codebook_size:
            raise ModelError(f"known codes range from {lowest} to {highest}; this model has 0 to {codebook_size - 1}")
    return known.to(device), keep.to(device)


def check_same_tokens(model: DPAR | LlamaGen, entropy_model: LlamaGen) -> None:
    """Raise ModelError if the entropy model has another grid or codebook than the model."""
    expected, actual = model.config, entropy_model.config
    for name in ("codebook_size", "grid_height", "grid_width"):
        if getattr(expected, name) != getattr(actual, name):
            raise ModelError(
                f"the entropy model's {name} is {getattr(actual, name)}, the model's {getattr(expected, name)}; "
                "both must come from the same codes"
            )

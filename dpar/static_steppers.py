"""Fixed-shape steppers for GPUs, with the interface of :mod:`dpar.steppers`.

    steppers = StaticSteppers(model, entropy_model)          # once: weights in the precision of autocast
    stepper = steppers.generator(labels, guided=True, longest=4)     # for each batch; caches and graphs are reused

A decoding step is hundreds of small kernels, and launching them takes longer than running them. So each step reads and
writes preallocated tensors, positions are tensors on the device, and on CUDA a step is captured as a graph, which
launches as one (:class:`dpar.graphs.Graphs`). Consequences:

1. Attention reads a cache in one of four lengths, the shortest that covers the current token, and masks the rest
   (:class:`dpar.static_cache.StaticCache`); there is one graph of a step per length.
2. The patch transformer runs on 1, 2, 4, … or all images, the smallest size that covers those that begin a patch.
   Rows of padding belong to a scratch image after the others, whose cache is never read.
3. The host must know that number: one copy per token, the only time it waits for the device.

A batch may have fewer images than its stepper; the rest is padding that begins no patch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.attention import Attend
from dpar.cpu_kernels import with_parts
from dpar.graphs import Graphs
from dpar.layers import Block
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import PatchRule, patch_starts, static_starts, token_entropy
from dpar.rope import PatchPositions
from dpar.static_cache import StaticCache
from dpar.steppers import conditions

M = TypeVar("M", bound=nn.Module)


class HalfLinear(nn.Linear):
    """A linear layer with its weight cast to half precision once, where autocast would cast it in every call."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # does not allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., fan_in) of any float type to (..., fan_out) in half precision."""
        return F.linear(x.to(self.weight.dtype), self.weight)


def half_linears(model: M, dtype: torch.dtype) -> M:
    """Return a copy of ``model`` whose linear layers compute in ``dtype``; it shares all other parameters."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return with_parts(model, {name: HalfLinear(linear, dtype) for name, linear in linears.items()})


def longest_patch(rule: PatchRule, n_tokens: int, grid_width: int) -> int:
    """Return the most tokens that a patch of this rule can have in an image of ``n_tokens``."""
    if rule.static_length is not None:
        starts = np.flatnonzero(static_starts(n_tokens, rule.static_length))
        return int(np.diff(np.append(starts, n_tokens)).max())
    limits = [n_tokens, rule.max_length or n_tokens, grid_width if rule.row_reset else n_tokens]
    return min(limits)


class StaticPatcher:
    """:class:`dpar.patching.OnlinePatcher` on a device: the same decisions without a synchronisation."""

    def __init__(self, rule: PatchRule, batch: int, n_tokens: int, grid_width: int, device: torch.device) -> None:
        if rule.static_length is not None:
            self.always = static_starts(n_tokens, rule.static_length)
            self.max_length = n_tokens
        else:
            entropies = np.zeros(n_tokens, np.float32)
            self.always = patch_starts(entropies, math.inf, None, grid_width, rule.row_reset)
            self.max_length = rule.max_length or n_tokens
        self.threshold = np.float32(math.inf if rule.threshold is None else rule.threshold).item()
        self.run = torch.zeros(batch, dtype=torch.long, device=device)  # length of the open patch

    def step(self, position: int, entropy: Tensor | None) -> Tensor:
        """Return whether token ``position`` starts a patch: (B,) bool. See :meth:`dpar.patching.OnlinePatcher.step`."""
        if self.always[position]:
            starts = torch.ones_like(self.run, dtype=torch.bool)
        else:
            starts = self.run >= self.max_length
            if entropy is not None:
                starts = starts | (entropy.half().float() > self.threshold)
        self.run = torch.where(starts, 1, self.run + 1)
        return starts


class StaticTokenStepper:
    """LlamaGen, one token per step. See :class:`dpar.steppers.Stepper`."""

    def __init__(self, model: LlamaGen, batch: int, guided: bool, graphs: bool) -> None:
        c, embeddings, self.device = model.config, model.tok_embeddings.weight, model.output.weight.device
        self.model, self.batch, self.copies = model, batch, 2 if guided else 1
        self.images = batch  # those that are not padding
        self.lag = 0 if c.start_token else 1  # as in TokenStepper
        rows = batch * self.copies
        self.cache = _caches(model, c.layers, rows)
        self.input = embeddings.new_zeros(rows, c.width)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.out = model.output.weight.new_zeros(rows, c.codebook_size)
        self.entropies = torch.zeros(rows, device=self.device)
        self.graphs = Graphs(self.device, graphs)

    def reset(self, labels: Tensor) -> None:
        """Begin images with labels (B,), at most as many as the stepper's batch."""
        self.images = len(labels)
        if self.model.cls_embedding is not None:
            x = self.model.cls_embedding(conditions(labels, self.copies, self.model.config.classes))
            self.input[: len(x)].copy_(x)

    def begin_patches(self, position: int, starts: Tensor) -> None:
        """Do nothing: each token is its own patch."""

    def logits(self, position: int) -> Tensor:
        """See :class:`dpar.steppers.Stepper`; float32."""
        self._run("logits", self._logits, position - self.lag)
        return self.out[: self.images * self.copies].to(torch.float32, copy=True)  # the next step overwrites it

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`dpar.steppers.Stepper`."""
        x = _repeated(self.model.tok_embeddings(codes), self.copies)
        self.input[: len(x)].copy_(x)

    def entropy(self, position: int) -> Tensor | None:
        """See :class:`dpar.steppers.TokenStepper`."""
        if position < self.lag:
            return None
        self._run("entropy", self._entropy, position - self.lag)
        return self.entropies[: self.images]

    def _run(self, name: str, step: Callable[[int], None], position: int) -> None:
        self.position.fill_(position)
        keys = self.cache[0].length(position)
        self.graphs.run((name, keys), functools.partial(step, keys))

    def _logits(self, keys: int) -> None:
        places, x = self.cache[0].together_at(self.position, keys), self.input
        table = self.model.table[self.position].expand(len(x), -1, -1)
        for layer, cache in zip(self.model.layers, self.cache, strict=True):
            x = _step(layer, x, table, cache.attend(places))
        self.out.copy_(self.model.output(self.model.norm(x)))

    def _entropy(self, keys: int) -> None:
        self._logits(keys)
        self.entropies.copy_(token_entropy(self.out))


class StaticPatchStepper:
    """DPAR, one token per step. See :class:`dpar.steppers.Stepper`.

    Tensors of the patch transformer have one image more: the scratch image, for padding.
    """

    def __init__(self, model: DPAR, batch: int, guided: bool, longest: int, graphs: bool) -> None:
        c, embeddings, self.device = model.config, model.tok_embeddings.weight, model.output.weight.device
        self.model, self.batch, self.copies, self.longest = model, batch, 2 if guided else 1, longest
        self.images = batch  # those that are not padding
        rows = batch * self.copies
        self.sizes = sorted({min(2**k, batch) for k in range(batch.bit_length() + 1)})  # 1, 2, 4, …, batch
        self.encoder_cache = _caches(model, c.encoder_layers, batch)
        self.patch_cache = _caches(model, c.patch_layers, rows + self.copies)
        self.decoder_cache = _caches(model, c.decoder_layers, rows)
        self.tokens = [embeddings.new_zeros(batch + 1, c.n_tokens, c.width) for _ in range(c.encoder_layers)]
        self.received = embeddings.new_zeros(rows + self.copies, c.decoder_layers, c.width)
        self.condition = embeddings.new_zeros(rows + self.copies, c.width)
        self.stream = embeddings.new_zeros(rows, c.width)  # the decoder's next input
        self.positions = PatchPositions(c.n_tokens, c.grid_width, c.head_dim, c.rope, self.device)
        integers = torch.zeros(4, batch + 1, dtype=torch.long, device=self.device)
        self.codes = integers[0, :batch]
        self.first, self.patches = integers[1], integers[2]  # token of the open patch; patches begun so far
        self.position = integers[3, :1]
        self.starts = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.host_starts = torch.zeros(batch, dtype=torch.bool, pin_memory=self.device.type == "cuda")
        self.out = model.output.weight.new_zeros(rows, c.codebook_size)
        self.graphs = Graphs(self.device, graphs)

    def reset(self, labels: Tensor) -> None:
        """Begin images with labels (B,), at most as many as the stepper's batch."""
        self.images = len(labels)
        condition = self.model.cls_embedding(conditions(labels, self.copies, self.model.config.classes))
        self.condition[: len(condition)].copy_(condition)
        self.stream[: len(condition)].copy_(self.model.stream_start(condition))
        self.starts.zero_()
        self.first.zero_()
        self.patches.zero_()

    def begin_patches(self, position: int, starts: Tensor) -> None:
        """See :class:`dpar.steppers.Stepper`. Waits for the device once, to learn how many images begin a patch."""
        self.starts[: self.images].copy_(starts)
        count = self._count()
        if not count:
            return
        size = next(size for size in self.sizes if size >= count)
        self.position.fill_(position)
        keys, leading = self.patch_cache[0].length(position), position == 0  # no image has more patches than tokens
        self.graphs.run(("patches", leading, size, keys), lambda: self._patches(size, leading, keys))

    def logits(self, position: int) -> Tensor:
        """See :class:`dpar.steppers.Stepper`; float32."""
        self._run("logits", self._logits, position, self.decoder_cache[0])
        return self.out[: self.images * self.copies].to(torch.float32, copy=True)  # the next step overwrites it

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`dpar.steppers.Stepper`."""
        self.codes[: self.images].copy_(codes)
        self._run("encode", self._encode, position, self.encoder_cache[0])

    def _run(self, name: str, step: Callable[[int], None], position: int, cache: StaticCache) -> None:
        self.position.fill_(position)
        keys = cache.length(position)
        self.graphs.run((name, keys), functools.partial(step, keys))

    def _count(self) -> int:
        self.host_starts.copy_(self.starts, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return int(np.count_nonzero(self.host_starts.numpy()))

    def _logits(self, keys: int) -> None:
        places, x = self.decoder_cache[0].together_at(self.position, keys), self.stream
        table = self.model.stream_table[self.position].expand(len(x), -1, -1)
        for i, (layer, cache) in enumerate(zip(self.model.decoder_layers(), self.decoder_cache, strict=True)):
            x = _step(layer.block, x + self.received[: len(x), i], table, cache.attend(places))
        self.out.copy_(self.model.output(self.model.norm(x)))

    def _encode(self, keys: int) -> None:
        places = self.encoder_cache[0].together_at(self.position, keys)
        x = self.model.tok_embeddings(self.codes)
        table = self.model.token_table[self.position].expand(len(x), -1, -1)
        for layer, tokens, cache in zip(self.model.encoder_layers(), self.tokens, self.encoder_cache, strict=True):
            x = _step(layer.block, x, table, cache.attend(places))
            tokens[: self.batch].index_copy_(1, self.position, x.unsqueeze(1).to(tokens.dtype))
        self.stream.copy_(_repeated(x, self.copies))

    def _patches(self, size: int, leading: bool, keys: int) -> None:
        """Run the patch transformer for at most ``size`` images that begin a patch; ``leading``: their first one."""
        images = self._beginning(size)
        rows = (images.unsqueeze(1) * self.copies + torch.arange(self.copies, device=self.device)).flatten()
        if leading:  # the sequence begins with the class, whose rotation is the zero matrix
            x = self.condition[rows]
            table = self.model.stream_table.new_zeros(len(rows), *self.model.stream_table.shape[1:])
        else:
            first = self.first[images]
            x = _repeated(self._closed_patches(images, first), self.copies)
            last = (self.position - 1).expand(size)
            table = _repeated(self.positions.of(first, last), self.copies)
        places = self.patch_cache[0].at_own(rows, _repeated(self.patches[images], self.copies), keys)
        for layer, cache in zip(self.model.patch_layers(), self.patch_cache, strict=True):
            x = _step(layer, x, table, cache.attend(places))
        projected = torch.stack([layer.project(x) for layer in self.model.decoder_layers()], dim=1)
        self.received.index_copy_(0, rows, projected.to(self.received.dtype))
        begun = F.pad(self.starts, (0, 1))
        self.first.copy_(torch.where(begun, self.position, self.first))
        self.patches.add_(begun)

    def _beginning(self, size: int) -> Tensor:
        """Return the images that begin a patch, in order, then the scratch image: (size,) int64."""
        slot = torch.where(self.starts, self.starts.cumsum(0) - 1, size)  # the last slot is dropped
        images = torch.full((size + 1,), self.batch, device=self.device)
        return images.scatter_(0, slot, torch.arange(self.batch, device=self.device))[:size]

    def _closed_patches(self, images: Tensor, first: Tensor) -> Tensor:
        """Return the open patches, which begin at ``first`` (R,), of images (R,): (R, d)."""
        size, longest = len(images), self.longest
        token = first.unsqueeze(1) + torch.arange(longest, device=self.device)  # (R, longest)
        patch = torch.arange(size, device=self.device).unsqueeze(1)
        patch = torch.where(token < self.position, patch, size).flatten()  # an extra patch collects surplus tokens
        token = token.clamp(max=self.model.config.n_tokens - 1)
        patches = None
        for layer, tokens in zip(self.model.encoder_layers(), self.tokens, strict=True):
            own = tokens[images.unsqueeze(1), token].flatten(0, 1)
            patches = layer.cross_attention(patches, own, patch, size + 1)
        assert patches is not None  # there is at least one layer
        return patches[:size]


class StaticSteppers:
    """The static steppers of a model and its entropy model, reused from batch to batch.

    A stepper serves batches up to its size. Caches are large, so only one of each is kept: a generator of another kind
    replaces it.
    """

    def __init__(self, model: DPAR | LlamaGen, entropy_model: LlamaGen | None, graphs: bool = True) -> None:
        kind = model.output.weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            model = half_linears(model, dtype)
            entropy_model = None if entropy_model is None else half_linears(entropy_model, dtype)
        self.model, self.entropy_model, self.graphs = model, entropy_model, graphs
        self.kind: tuple[bool, int] | None = None  # of the stepper: guided, longest patch
        self.stepper: StaticPatchStepper | StaticTokenStepper | None = None
        self.entropy_stepper: StaticTokenStepper | None = None

    def generator(self, labels: Tensor, guided: bool, longest: int) -> StaticPatchStepper | StaticTokenStepper:
        """Return the generator's stepper, at the first token of images with labels (B,)."""
        if self.stepper is None or self.kind != (guided, longest) or self.stepper.batch < len(labels):
            self.stepper = None  # free its memory first
            if isinstance(self.model, DPAR):
                self.stepper = StaticPatchStepper(self.model, len(labels), guided, longest, self.graphs)
            else:
                self.stepper = StaticTokenStepper(self.model, len(labels), guided, self.graphs)
            self.kind = guided, longest
        self.stepper.reset(labels)
        return self.stepper

    def entropy(self, labels: Tensor) -> StaticTokenStepper:
        """Return the entropy model's stepper, at the first token of as many images as there are labels (B,)."""
        model = self.entropy_model
        assert model is not None  # checked by the caller
        if self.entropy_stepper is None or self.entropy_stepper.batch < len(labels):
            self.entropy_stepper = None
            self.entropy_stepper = StaticTokenStepper(model, len(labels), False, self.graphs)
        self.entropy_stepper.reset(torch.full_like(labels, model.config.classes))
        return self.entropy_stepper


def _step(block: nn.Module, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
    """Run a block on one new token per row, (R, width). ``forward`` skips the code compiled for training."""
    assert isinstance(block, Block)
    out: Tensor = block.forward(x.unsqueeze(1), table.unsqueeze(1), attend).squeeze(1)
    return out


def _caches(model: DPAR | LlamaGen, layers: int, rows: int) -> list[StaticCache]:
    c, weight = model.config, model.output.weight
    return [StaticCache(rows, c.n_tokens, c.heads, c.head_dim, weight.device, weight.dtype) for _ in range(layers)]


def _repeated(x: Tensor, copies: int) -> Tensor:
    """Repeat each row of x (R, ...) ``copies`` times: (R · copies, ...)."""
    return x.unsqueeze(1).expand(-1, copies, *x.shape[1:]).flatten(0, 1)

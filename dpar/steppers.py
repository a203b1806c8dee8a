"""Models that decode one token per step with KV caches, on a CPU: DPAR, LlamaGen and the entropy model.

    stepper = stepper_for(model, labels, guided=True)    # the model may be prepared by dpar.cpu_kernels
    for i in range(n_tokens):
        stepper.begin_patches(i, starts)     # DPAR: the patch transformer, for the images that start a patch
        logits = stepper.logits(i)           # (2B, V): conditional and unconditional rows in turn
        stepper.accept(i, codes)

All images of a batch are at the same token, so encoder, decoder and LlamaGen step in unison. Patches start at different
tokens in different images: the patch transformer steps only the images that need it, each at its own position in the
cache. With guidance an image has two adjacent rows, conditional first; the encoder, which has no class, has one.
GPUs use :mod:`dpar.static_steppers`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpar.cpu_kernels import pad_rows, padded
from dpar.kv_cache import KVCache, Places
from dpar.layers import Block
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import token_entropy
from dpar.rope import PatchPositions


class Stepper(Protocol):
    """A generator that decodes one token per step, for a batch of images that are at the same token."""

    def begin_patches(self, position: int, starts: Tensor) -> None:
        """Prepare for the images, (B,) bool, in which token ``position`` starts a patch."""

    def logits(self, position: int) -> Tensor:
        """Return the logits of token ``position``: (B, V), or (2B, V) with guidance."""

    def accept(self, position: int, codes: Tensor) -> None:
        """Read the tokens (B,) int64 that were chosen for ``position``."""


def stepper_for(model: DPAR | LlamaGen, labels: Tensor, guided: bool) -> Stepper:
    """Return the stepper of a generator, for images with labels (B,)."""
    return PatchStepper(model, labels, guided) if isinstance(model, DPAR) else TokenStepper(model, labels, guided)


class TokenStepper:
    """LlamaGen, one token per step."""

    def __init__(self, model: LlamaGen, labels: Tensor, guided: bool = False) -> None:
        self.model, self.copies = model, 2 if guided else 1
        self.rows = len(labels) * self.copies
        self.cache = _caches(model, model.config.layers, self.rows)
        # positions by which a token's input precedes it in the sequence; the start token shifts inputs by one
        self.lag = 0 if model.config.start_token else 1
        self.input: Tensor  # of the next step: the start token or the previous token
        if model.cls_embedding is not None:
            self.input = model.cls_embedding(conditions(labels, self.copies, model.config.classes))

    def begin_patches(self, position: int, starts: Tensor) -> None:
        """Do nothing: each token is its own patch."""

    def logits(self, position: int) -> Tensor:
        """See :class:`Stepper`."""
        places = Places.together_at(position - self.lag, self.rows)
        x = pad_rows(self.input)
        table = pad_rows(self.model.table[places.positions])
        for layer, cache in zip(_blocks(self.model.layers), self.cache, strict=True):
            x = layer.step(x, table, places, cache)
        logits: Tensor = self.model.output(self.model.norm(x))[: self.rows]
        return logits

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`Stepper`."""
        self.input = self.model.tok_embeddings(codes).repeat_interleave(self.copies, dim=0)

    def entropy(self, position: int) -> Tensor | None:
        """Return the entropies of token ``position``, (B,) float32 nats; None for a token that is not predicted."""
        return None if position < self.lag else token_entropy(self.logits(position))


class PatchStepper:
    """DPAR, one token per step; its patch transformer runs only for the images that start a patch."""

    def __init__(self, model: DPAR, labels: Tensor, guided: bool) -> None:
        c, weight, batch = model.config, model.output.weight, len(labels)
        self.model = model
        self.batch, self.copies = batch, 2 if guided else 1
        self.rows = batch * self.copies
        self.encoder_cache = _caches(model, c.encoder_layers, batch)
        self.patch_cache = _caches(model, c.patch_layers, self.rows)
        self.decoder_cache = _caches(model, c.decoder_layers, self.rows)
        self.tokens = [weight.new_zeros(batch, c.n_tokens, c.width) for _ in range(c.encoder_layers)]
        self.received = weight.new_zeros(self.rows, c.decoder_layers, c.width)  # what the open patch gives its tokens
        self.positions = PatchPositions(c.n_tokens, c.grid_width, c.head_dim, c.rope, weight.device)
        self.condition = model.cls_embedding(conditions(labels, self.copies, c.classes))
        self.stream = model.stream_start(self.condition)  # the decoder's next input
        self.first = np.zeros(batch, np.int64)  # token of the open patch
        self.patches = np.zeros(batch, np.int64)  # begun so far

    def logits(self, position: int) -> Tensor:
        """See :class:`Stepper`."""
        places = Places.together_at(position, self.rows)
        x = pad_rows(self.stream)
        table = pad_rows(self.model.stream_table[places.positions])
        for i, (layer, cache) in enumerate(zip(self.model.decoder_layers(), self.decoder_cache, strict=True)):
            x = layer.block.step(x + pad_rows(self.received[:, i]), table, places, cache)
        logits: Tensor = self.model.output(self.model.norm(x))[: self.rows]
        return logits

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`Stepper`."""
        places = Places.together_at(position, self.batch)
        x = pad_rows(self.model.tok_embeddings(codes))
        table = pad_rows(self.model.token_table[places.positions])
        for layer, tokens, cache in zip(self.model.encoder_layers(), self.tokens, self.encoder_cache, strict=True):
            x = layer.block.step(x, table, places, cache)
            tokens[:, position] = x[: self.batch].to(tokens.dtype)
        self.stream = x[: self.batch].repeat_interleave(self.copies, dim=0).to(self.stream.dtype)

    def begin_patches(self, position: int, starts: Tensor) -> None:
        """Close the open patch of the images that start one, and run the patch transformer on it."""
        images = np.flatnonzero(starts.numpy())
        if not images.size:
            return
        rows = np.add.outer(images * self.copies, np.arange(self.copies)).ravel()
        places = Places.of(rows, self.patches[images].repeat(self.copies), self.rows)
        if position == 0:  # all images: the sequence begins with the class, whose rotation is the zero matrix
            x = self.condition
            table = self.model.stream_table.new_zeros(self.rows, *self.model.stream_table.shape[1:])
        else:
            first = self.first[images]
            x = self._closed_patches(images, first, position).repeat_interleave(self.copies, dim=0)
            last = np.full(len(images), position - 1)
            table = self.positions.of(torch.from_numpy(first), torch.from_numpy(last))
            table = table.repeat_interleave(self.copies, dim=0)
        x, table = pad_rows(x.to(self.condition.dtype)), pad_rows(table)
        for layer, cache in zip(self.model.patch_layers(), self.patch_cache, strict=True):
            x = layer.step(x, table, places, cache)
        projected = torch.stack([layer.project(x) for layer in self.model.decoder_layers()], dim=1)
        self.received[places.rows] = projected[: len(rows)].to(self.received.dtype)
        self.first[images] = position
        self.patches[images] += 1

    def _closed_patches(self, images: NDArray[np.int64], first: NDArray[np.int64], end: int) -> Tensor:
        """Return the patches of tokens ``first`` (R,) to ``end - 1`` of images (R,): (R, d)."""
        lengths = end - first
        patch = np.arange(len(images)).repeat(lengths)
        offset = np.arange(len(patch)) - (lengths.cumsum() - lengths)[patch]
        at = torch.from_numpy(images[patch]), torch.from_numpy(first[patch] + offset)
        # padding as in pad_rows; tokens of padding belong to an extra patch
        missing = padded(len(patch)) - len(patch)
        count = padded(len(images) + (missing > 0))
        patch_of_token = torch.from_numpy(np.pad(patch, (0, missing), constant_values=count - 1))
        patches = None
        for layer, tokens in zip(self.model.encoder_layers(), self.tokens, strict=True):
            patches = layer.cross_attention(patches, pad_rows(tokens[at]), patch_of_token, count)
        assert patches is not None  # there is at least one layer
        return patches[: len(images)]


def _blocks(layers: torch.nn.ModuleList) -> list[Block]:
    return [layer for layer in layers if isinstance(layer, Block)]


def _caches(model: DPAR | LlamaGen, layers: int, rows: int) -> list[KVCache]:
    """Return empty caches in the dtype of keys and values: autocast's if it is on, else the weights'."""
    c, weight = model.config, model.output.weight
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return [KVCache(rows, c.n_tokens, c.heads, c.head_dim, dtype) for _ in range(layers)]


def conditions(labels: Tensor, copies: int, without: int) -> Tensor:
    """Return the label of each row for images with labels (B,); an unconditional row has label ``without``."""
    if copies == 1:
        return labels
    return torch.stack([labels, torch.full_like(labels, without)], dim=1).flatten()

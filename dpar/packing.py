"""Packed batches: the patches of all images concatenated without padding, and their boundaries.

    layout = PatchLayout.from_starts(starts)                 # starts: (B, N) bool
    packed = segment_sum(tokens, layout.patch_of_token, layout.n_patches)

A batch has B·N tokens and ΣM patches. Image b owns patches ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``.
Everything here touches each token once; no token-by-patch mask is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dpar.errors import ModelError


@dataclass(frozen=True)
class PatchLayout:
    """The patch boundaries of a batch, as int64 index tensors unless stated otherwise."""

    n_tokens: int  # tokens per image, N
    longest: int  # most patches in one image
    first: Tensor  # (ΣM,) first token of each patch, counted within its image
    last: Tensor  # (ΣM,) last token of each patch, counted within its image
    image_of_patch: Tensor  # (ΣM,)
    patch_of_token: Tensor  # (B·N,) index into the packed patches
    cu_seqlens: Tensor  # (B + 1,) int32, cumulative patches
    host_cu_seqlens: Tensor  # a copy on the CPU, so that reading lengths does not synchronise with the device

    @property
    def n_patches(self) -> int:
        """Patches in the batch, ΣM."""
        return self.first.shape[0]

    @classmethod
    def from_starts(cls, starts: Tensor) -> PatchLayout:
        """Return the layout of (B, N) bool ``starts``. Call it on the CPU, in the data loader: shapes depend on values.

        Raises:
            ModelError: ``starts`` is not 2-D bool, or an image does not start with a patch.
        """
        if starts.ndim != 2 or starts.dtype != torch.bool:
            raise ModelError(f"starts must be (B, N) bool, not {tuple(starts.shape)} {starts.dtype}")
        if not bool(starts[:, 0].all()):
            raise ModelError("token 0 of every image must start a patch")
        batch, n = starts.shape
        flat = starts.reshape(-1)
        first = flat.nonzero().squeeze(1)
        end = torch.cat([first[1:], first.new_tensor([batch * n])])
        patch_of_token = flat.cumsum(0) - 1
        counts = starts.sum(dim=1)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(
            n_tokens=n,
            longest=int(counts.max()),
            first=first % n,
            last=(end - 1) % n,
            image_of_patch=first // n,
            patch_of_token=patch_of_token,
            cu_seqlens=cu_seqlens,
            host_cu_seqlens=cu_seqlens.cpu(),
        )

    def to(self, device: torch.device | str) -> PatchLayout:
        """Return the layout with its tensors on ``device``, except ``host_cu_seqlens``; see :func:`to_device`."""
        return self._with(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> PatchLayout:
        """Return the layout in pinned memory, so that :meth:`to` copies to a CUDA device asynchronously."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> PatchLayout:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {
            name: change(value)
            for name, value in values.items()
            if isinstance(value, Tensor) and name != "host_cu_seqlens"
        }
        return PatchLayout(**{**values, **changed})


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; from CPU to CUDA through pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# gather and scatter_add over an expanded index are each other's backward, and both have a fast path for full rows
# on CPU; index_select's backward (index_add) is several times slower there.


def spread(rows: Tensor, index: Tensor) -> Tensor:
    """Copy row ``index[t]`` of (S, d) rows to row t of (T, d): patches to their tokens."""
    return rows.gather(0, index.unsqueeze(1).expand(-1, rows.shape[1]))


def segment_sum(rows: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Sum (T, d) rows by ``index`` (T,): tokens to patches, (n_segments, d) in the dtype of ``rows``."""
    return rows.new_zeros(n_segments, rows.shape[1]).scatter_add(0, index.unsqueeze(1).expand_as(rows), rows)


def segment_mean(rows: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Average (T, d) rows by ``index`` (T,): (n_segments, d). Every segment must have a row."""
    counts = torch.zeros(n_segments, device=rows.device).scatter_add(
        0, index, torch.ones(index.shape[0], device=rows.device)
    )
    return segment_sum(rows.float(), index, n_segments).div(counts.unsqueeze(1)).to(rows.dtype)


def segment_max(rows: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Take the elementwise maximum of (T, d) rows by ``index`` (T,): (n_segments, d). Every segment must have a row."""
    expanded = index.unsqueeze(1).expand_as(rows)
    return rows.new_zeros(n_segments, rows.shape[1]).scatter_reduce(0, expanded, rows, "amax", include_self=False)


def segment_softmax(scores: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Return the softmax of (T, h) float32 scores within each segment: (T, h), summing to 1 over a segment's rows."""
    expanded = index.unsqueeze(1).expand_as(scores)
    # The largest score cancels out of the softmax, so it needs no gradient.
    largest = scores.new_full((n_segments, scores.shape[1]), float("-inf")).scatter_reduce(
        0, expanded, scores.detach(), "amax"
    )
    weights = (scores - spread(largest, index)).exp()
    return weights / spread(segment_sum(weights, index, n_segments), index)

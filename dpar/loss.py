"""The output head and its cross-entropy in one; the logits of a batch are never held in full.

    loss = next_token_loss(hidden, model.output.weight, codes)     # equals F.cross_entropy(hidden @ weight.T, codes)

Over 16384 codes the float32 logits of a batch are larger than a layer's activations. Here logits, loss and
gradients are computed for one chunk of tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # tokens; 64 MiB of float32 logits over 16384 codes


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the mean cross-entropy of logits ``hidden @ weight.T``, nats per token.

    The product is in autocast's dtype where autocast is on, the softmax and the loss in float32 (float64 of float64).

    Args:
        hidden: (..., d).
        weight: (V, d), of the output head.
        targets: (...) int64.
        chunk: tokens whose logits are held at a time.

    Returns:
        A scalar, in float32 (float64 of float64). It can be differentiated once.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _HeadAndLoss.apply(
            hidden.flatten(0, -2), weight, targets.flatten(), chunk, dtype, torch.is_grad_enabled()
        )
    return loss


class _HeadAndLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, from the same logits, so the head's product is computed once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype, learns: bool
    ) -> Tensor:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        inputs, head = hidden.to(dtype), weight.to(dtype)
        to_hidden = torch.empty_like(inputs) if learns and ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=precise) if learns and ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=precise)
        for begin in range(0, len(targets), chunk):
            rows = slice(begin, begin + chunk)
            log_probs = F.log_softmax(inputs[rows] @ head.T, dim=-1, dtype=precise)  # (chunk, V)
            chosen = targets[rows].unsqueeze(1)
            total -= log_probs.gather(1, chosen).sum()
            if to_hidden is None and to_weight is None:
                continue
            # softmax minus one at the target; backward applies the mean's 1/T, which loses no precision there
            pull = log_probs.exp_().scatter_add_(1, chosen, log_probs.new_full(chosen.shape, -1.0)).to(dtype)
            if to_hidden is not None:
                to_hidden[rows] = pull @ head
            if to_weight is not None and dtype == precise:
                to_weight.addmm_(pull.T, inputs[rows])
            elif to_weight is not None:
                to_weight += pull.T @ inputs[rows]
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.tokens = len(targets)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        share = pull / ctx.tokens
        gradients = (
            None if saved is None else (saved * share).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None

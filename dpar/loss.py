"""Output head fused with cross-entropy: the full logits of a batch are never in memory.

    loss = next_token_loss(hidden, model.output.weight, codes)     # equals F.cross_entropy(hidden @ weight.T, codes)

With 16384 codes the float32 logits of a batch are larger than a layer's activations. Here logits, loss and
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

    The product uses autocast's dtype if autocast is on; softmax and loss are float32 (float64 for float64 inputs).

    Args:
        hidden: (..., d).
        weight: (V, d), of the output head.
        targets: (...) int64.
        chunk: tokens whose logits are in memory at a time.

    Returns:
        A scalar, float32 (float64 for float64 inputs). It can be differentiated once.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _HeadAndLoss.apply(
            hidden.flatten(0, -2), weight, targets.flatten(), chunk, dtype, torch.is_grad_enabled()
        )
    return loss


class _HeadAndLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, from the same logits, so that the logits are computed once."""

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
            # softmax minus one at the target; backward applies the mean's 1/T, where it costs no precision
            grad = log_probs.exp_().scatter_add_(1, chosen, log_probs.new_full(chosen.shape, -1.0)).to(dtype)
            if to_hidden is not None:
                to_hidden[rows] = grad @ head
            if to_weight is not None and dtype == precise:
                to_weight.addmm_(grad.T, inputs[rows])
            elif to_weight is not None:
                to_weight += grad.T @ inputs[rows]
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.tokens = len(targets)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_output / ctx.tokens
        gradients = (
            None if saved is None else (saved * scale).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None

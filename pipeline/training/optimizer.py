"""The optimizer of DPAR and LlamaGen.

optimizer = make_optimizer(model, settings)
step_unless(optimizer, skip)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.settings.training import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (embeddings among them) and none on norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def step_unless(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """Take a step unless ``skip``, a float32 scalar on the parameters' device, is 1.

    The kernels for CPU and CUDA decide that themselves. Those for Apple's GPUs ignore ``found_inf``, so there the host
    waits for the value.
    """
    if skip.device.type not in ("cpu", "cuda") and skip.item():
        return
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()

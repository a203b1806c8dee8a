"""The optimizer of DPAR and LlamaGen.

optimizer = make_optimizer(model, settings)
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.settings.training import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (embeddings among them) and none on norms.

    Fused, it takes no step where its attribute ``found_inf``, a tensor on the device, is 1.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)

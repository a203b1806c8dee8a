"""Choose the batch size of sampling by free memory. No image depends on it.

batch = sampling_batch(model, entropy_model, guided=True, device=device, bf16=True)
"""

from __future__ import annotations

import torch

from dpar.llamagen import LlamaGen
from dpar.model import DPAR

ON_CPU = 32
MOST = 256  # larger batches are compute-bound and not faster
SHARE = 0.8  # of free memory to use; the rest is for activations and fragmentation
LOGITS = 6  # copies of the logits, float32 or float64, at the peak of drawing


def sampling_batch(
    model: DPAR | LlamaGen, entropy_model: LlamaGen | None, *, guided: bool, device: torch.device, bf16: bool
) -> int:
    """Return the batch size on a device: 32 on the CPU, on a GPU the largest power of two that fits, at most 256."""
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved but unused is free too
    return batch_for(int(SHARE * free), bytes_per_image(model, entropy_model, guided=guided, bf16=bf16))


def bytes_per_image(model: DPAR | LlamaGen, entropy_model: LlamaGen | None, *, guided: bool, bf16: bool) -> int:
    """Return the memory in bytes that sampling needs per image: keys and values of every layer, and logits.

    Caches have room for a patch per token. With guidance each image has two rows, except in the patch encoder and the
    entropy model.
    """
    config, element = model.config, 2 if bf16 else 4
    rows = 2 if guided else 1
    layers = rows * len(model.layers)
    if isinstance(model, DPAR):
        layers += len(model.encoder) + rows * len(model.decoder)
    size = 2 * layers * config.n_tokens * config.width * element
    if entropy_model is not None:
        size += 2 * len(entropy_model.layers) * config.n_tokens * entropy_model.config.width * element
    return size + LOGITS * rows * config.codebook_size * 8


def batch_for(free: int, each: int) -> int:
    """Return the largest power of two, 1 to 256, of images of ``each`` bytes that fit into ``free`` bytes."""
    fits = max(1, free // each)
    return int(min(MOST, 2 ** (fits.bit_length() - 1)))

"""How many images to sample at once, from the memory at hand. No image depends on it.

batch = sampling_batch(model, entropy_model, guided=True, device=device, bf16=True)
"""

from __future__ import annotations

import torch

from dpar.llamagen import LlamaGen
from dpar.model import DPAR

ON_CPU = 32
MOST = 256  # past it a step is compute-bound and memory buys nothing
SHARE = 0.8  # of free memory that is planned with; the rest is for activations and fragmentation
LOGITS = 6  # float32 or float64 copies of the logits that drawing holds at its peak


def sampling_batch(
    model: DPAR | LlamaGen, entropy_model: LlamaGen | None, *, guided: bool, device: torch.device, bf16: bool
) -> int:
    """The images to sample at once on a device: 32 on the CPU, on a GPU the largest power of two that fits, to 256."""
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved but unused is free too
    return batch_for(int(SHARE * free), bytes_per_image(model, entropy_model, guided=guided, bf16=bf16))


def bytes_per_image(model: DPAR | LlamaGen, entropy_model: LlamaGen | None, *, guided: bool, bf16: bool) -> int:
    """What sampling one image keeps on the device: keys and values of every layer, and logits.

    Caches have room for a patch per token. With guidance all but the patch encoder and the entropy model hold two rows.
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
    """The largest power of two of images of ``each`` bytes that fit into ``free`` bytes, 1 to 256."""
    fits = max(1, free // each)
    return int(min(MOST, 2 ** (fits.bit_length() - 1)))

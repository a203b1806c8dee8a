"""DPAR: dynamic patchification for autoregressive image generation, as a library.

    from dpar import DPAR, LlamaGen, VQTokenizer, patch_starts, sample

Names load on first use: ``import dpar`` is instant, and the patch rule does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpar.errors import ModelError
    from dpar.guidance import SamplingOptions
    from dpar.image_pipeline import DPARPipeline
    from dpar.llamagen import LlamaGen, LlamaGenConfig
    from dpar.model import DPAR, DPARConfig
    from dpar.packing import PatchLayout
    from dpar.patching import PatchRule, patch_starts, static_starts, stored_entropy, token_entropy
    from dpar.presets import PRESETS, preset
    from dpar.pretrained import fingerprint
    from dpar.sampling import sample
    from dpar.tokenizer import VQConfig, VQTokenizer

_HOME = {
    "DPAR": "model",
    "DPARConfig": "model",
    "DPARPipeline": "image_pipeline",
    "LlamaGen": "llamagen",
    "LlamaGenConfig": "llamagen",
    "ModelError": "errors",
    "PRESETS": "presets",
    "PatchLayout": "packing",
    "PatchRule": "patching",
    "SamplingOptions": "guidance",
    "VQConfig": "tokenizer",
    "VQTokenizer": "tokenizer",
    "fingerprint": "pretrained",
    "patch_starts": "patching",
    "preset": "presets",
    "sample": "sampling",
    "static_starts": "patching",
    "stored_entropy": "patching",
    "token_entropy": "patching",
}
__all__ = [
    "DPAR",
    "PRESETS",
    "DPARConfig",
    "DPARPipeline",
    "LlamaGen",
    "LlamaGenConfig",
    "ModelError",
    "PatchLayout",
    "PatchRule",
    "SamplingOptions",
    "VQConfig",
    "VQTokenizer",
    "fingerprint",
    "patch_starts",
    "preset",
    "sample",
    "static_starts",
    "stored_entropy",
    "token_entropy",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"dpar.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

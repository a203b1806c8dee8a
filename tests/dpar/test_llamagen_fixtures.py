"""Files in LlamaGen's format against results of LlamaGen's modules: tests/fixtures/README.md."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpar import LlamaGen, LlamaGenConfig, VQTokenizer, token_entropy
from dpar.presets import tokenizer_preset
from dpar.tokenizer import from_uint8

CLEAR_GAP = 1e-4  # codes closer than this to the second best may change by rounding


class Reference(Protocol):
    checkpoint: Path
    arrays: dict[str, Any]


def assert_close(ours: Tensor, theirs: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance)


@torch.no_grad()
def check_tokenizer(name: str, reference: Reference) -> None:
    tokenizer = VQTokenizer.from_pretrained(reference.checkpoint)
    assert tokenizer.config == tokenizer_preset(name)  # read off the tensors
    arrays = reference.arrays
    images = from_uint8(torch.from_numpy(arrays["image"]))
    latent = tokenizer.latent(images)
    assert_close(latent, arrays["latent"])
    theirs, clear = arrays["codes"].astype(np.int64), arrays["gap"] > CLEAR_GAP
    codes = tokenizer.quantize.nearest(latent).numpy()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes[clear], theirs[clear])
    assert_close(tokenizer.decode(torch.from_numpy(theirs))[:, :, ::4, ::4], arrays["decoded"])


def test_vq8_latents_codes_and_pixels_equal_llamagens(vq8: Reference) -> None:
    check_tokenizer("vq-8", vq8)


@pytest.mark.slow
def test_vq16_latents_codes_and_pixels_equal_llamagens(vq16: Reference) -> None:
    check_tokenizer("vq-16", vq16)


@torch.no_grad()
def test_logits_of_a_small_gpt_equal_llamagens(gpt_tiny: tuple[LlamaGen, dict[str, Any]]) -> None:
    model, arrays = gpt_tiny
    logits = model(torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["labels"]))
    assert_close(logits, arrays["logits"])


@pytest.mark.slow
@torch.no_grad()
def test_logits_losses_and_entropies_of_gpt_b_equal_llamagens(gpt_b_256: Reference) -> None:
    model = LlamaGen.from_pretrained(gpt_b_256.checkpoint)
    assert model.config == LlamaGenConfig()  # read off the tensors, and the name
    arrays = gpt_b_256.arrays
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    logits = model(tokens, torch.from_numpy(arrays["labels"]))
    assert_close(logits[:, arrays["logits_at"], ::16], arrays["logits"])
    assert_close(F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none"), arrays["nll"])
    assert_close(token_entropy(logits), arrays["entropy"])


@torch.no_grad()
def test_no_label_equals_llamagens_guidance_class(gpt_tiny: tuple[LlamaGen, dict[str, Any]]) -> None:
    model, arrays = gpt_tiny
    assert arrays["labels"][-1] == model.config.classes
    assert_close(model(torch.from_numpy(arrays["tokens"][-1:])), arrays["logits"][-1:])

import numpy as np
import pytest
import torch

from dpar.locations import weights_path
from dpar.tokenizer import VQTokenizer, from_uint8, psnr, to_uint8
from pipeline.runs.weights import load_tokenizer
from pipeline.sources import open_indexed
from pipeline.sources.crops import views


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return load_tokenizer("builtin:photos")


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    source = open_indexed("builtin:photos", split="validation")
    return torch.from_numpy(np.concatenate([views(source.load(i), 128, "center", (1.0,)) for i in range(len(source))]))


@pytest.fixture(scope="module")
def codes(tokenizer: VQTokenizer, held_out: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([tokenizer.encode(from_uint8(chunk)) for chunk in held_out.split(40)])


def test_held_out_crops_reconstruct_at_21_db_or_better(
    tokenizer: VQTokenizer, held_out: torch.Tensor, codes: torch.Tensor
) -> None:
    with torch.no_grad():
        decoded = torch.cat([to_uint8(tokenizer.decode(chunk)) for chunk in codes.split(40)])
    assert psnr(decoded, held_out).mean() >= 21


def test_held_out_crops_use_60_percent_of_the_codebook(tokenizer: VQTokenizer, codes: torch.Tensor) -> None:
    assert len(codes.unique()) >= 0.6 * tokenizer.config.codebook_size


def test_the_shipped_weights_take_at_most_4_mb() -> None:
    from pathlib import Path

    assert sum(p.stat().st_size for p in Path(weights_path("builtin:photos")).iterdir()) <= 4e6

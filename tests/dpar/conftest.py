import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dpar import LlamaGen, LlamaGenConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other work holds the cores."""
    before = torch.get_num_threads()
    if "fixtures" not in request.path.name:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference(NamedTuple):
    """LlamaGen's own tensors and what its own code made of them."""

    tensors: dict[str, Tensor]
    arrays: dict[str, Any]


def reference(name: str) -> Reference:
    spec = importlib.util.spec_from_file_location("procedural_weights", FIXTURES / "procedural_weights.py")
    assert spec is not None
    assert spec.loader is not None
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    with np.load(FIXTURES / f"{name}.npz") as file:
        return Reference(weights.state_dict(FIXTURES / f"{name}.spec.json"), dict(file))


@pytest.fixture(scope="session")
def vq16() -> Reference:
    return reference("vq16")


@pytest.fixture(scope="session")
def vq8() -> Reference:
    return reference("vq8")


@pytest.fixture(scope="session")
def gpt_b_256() -> Reference:
    return reference("gpt_b_256")


@pytest.fixture(scope="session")
def gpt_tiny() -> tuple[LlamaGen, dict[str, Any]]:
    tensors, arrays = reference("gpt_tiny")
    sizes = json.loads((FIXTURES / "gpt_tiny.config.json").read_text())
    side = int(sizes["block_size"] ** 0.5)
    config = LlamaGenConfig(
        codebook_size=sizes["vocab_size"],
        grid_height=side,
        grid_width=side,
        classes=sizes["num_classes"],
        width=sizes["dim"],
        heads=sizes["n_head"],
        layers=sizes["n_layer"],
    )
    model = LlamaGen(config).eval()
    model.load_state_dict(tensors)
    return model, arrays

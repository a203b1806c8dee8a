import functools
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dpar import LlamaGen

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run on one thread: tiny tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    if "fixtures" not in request.path.name:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference(NamedTuple):
    """A checkpoint in LlamaGen's format and the results of LlamaGen's code for it."""

    checkpoint: Path
    arrays: dict[str, Any]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the checkpoints, deleted after the tests because they take hundreds of megabytes."""
    path = tmp_path_factory.mktemp("checkpoints")
    yield path
    shutil.rmtree(path)


def reference(name: str, folder: Path) -> Reference:
    checkpoint = folder / f"{name}.pt"
    arguments = sys.argv
    try:  # as a user would: python procedural_weights.py SPEC OUT.pt
        sys.argv = ["procedural_weights.py", str(FIXTURES / f"{name}.spec.json"), str(checkpoint)]
        runpy.run_path(str(FIXTURES / "procedural_weights.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    with np.load(FIXTURES / f"{name}.npz") as file:
        return Reference(checkpoint, dict(file))


@pytest.fixture(scope="session")
def vq16(folder: Path) -> Reference:
    return reference("vq16", folder)


@pytest.fixture(scope="session")
def vq8(folder: Path) -> Reference:
    return reference("vq8", folder)


@pytest.fixture(scope="session")
def gpt_b_256(folder: Path) -> Reference:
    return reference("gpt_b_256", folder)


@pytest.fixture(scope="session")
def authors(folder: Path) -> Callable[[str], Reference]:
    """Return a checkpoint in the format of DPAR's authors by the name of its fixture."""
    return functools.cache(lambda name: reference(name, folder))


@pytest.fixture(scope="session")
def gpt_tiny_file(folder: Path) -> Reference:
    return reference("gpt_tiny", folder)


@pytest.fixture(scope="session")
def gpt_tiny(gpt_tiny_file: Reference) -> tuple[LlamaGen, dict[str, Any]]:
    sizes = json.loads((FIXTURES / "gpt_tiny.config.json").read_text())
    side = int(sizes["block_size"] ** 0.5)
    model = LlamaGen.from_pretrained(gpt_tiny_file.checkpoint, heads=sizes["n_head"], grid=(side, side))
    found = model.config
    assert (found.codebook_size, found.classes, found.width, found.layers) == tuple(
        sizes[name] for name in ("vocab_size", "num_classes", "dim", "n_layer")
    )
    return model, gpt_tiny_file.arrays

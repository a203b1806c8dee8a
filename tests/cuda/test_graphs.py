"""The number of graphs that torch.compile compiles in training on a GPU, counted without one.

Tensors are fake: they report ``cuda:0`` and have shapes but no values. Dynamo traces and guards as on a GPU, and
AOTAutograd traces forward and backward; only inductor's kernels are not generated.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, PatchLayout
from dpar.attention import choose_backend
from dpar.layers import compiled
from tests.cuda.backward import grad

BATCHES = 20
B, N = 4, 32
SIZES: dict[str, Any] = {"codebook_size": 32, "grid_height": 4, "grid_width": 8, "classes": 3, "width": 32, "heads": 2}


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend to have an H100, with a compiler that generates no kernels."""
    compile_on_gpu = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function: compile_on_gpu(function, backend="aot_eager_decomp_partition")
    )
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled.cache_clear()
    torch._dynamo.reset()


def layouts() -> list[PatchLayout]:
    """Batches of different numbers of patches, on the CPU."""
    drawn = []
    for _ in range(BATCHES):
        starts = torch.rand(B, N) < torch.rand(B, 1)
        starts[:, 0] = True
        drawn.append(PatchLayout.from_starts(starts))
    assert len({layout.n_patches for layout in drawn}) > BATCHES / 2
    return drawn


def on_gpu(layout: PatchLayout) -> PatchLayout:
    """Fake tensors of the layout's shapes."""
    values = {field.name: getattr(layout, field.name) for field in fields(PatchLayout)}
    for name, value in values.items():
        if isinstance(value, Tensor) and name != "host_cu_seqlens":
            values[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return PatchLayout(**values)


def train(model: DPAR | LlamaGen, layouts: list[PatchLayout]) -> None:
    """One forward pass per layout; compiling it traces its backward pass."""
    model.train().compile_layers()
    codes = torch.empty(B, N, dtype=torch.long, device="cuda")
    labels = torch.empty(B, dtype=torch.long, device="cuda")
    for layout in layouts:
        inputs = (codes, labels, on_gpu(layout)) if isinstance(model, DPAR) else (codes, labels)
        with torch.autocast("cuda", torch.bfloat16):
            model(*inputs, loss=True)


@pytest.mark.slow
def test_dpar_trains_with_one_graph_per_kind_of_layer_for_any_number_of_patches() -> None:
    drawn = layouts()
    with FakeTensorMode():
        with torch.device("cuda"):
            model = DPAR(DPARConfig(**SIZES, encoder_layers=1, patch_layers=2, decoder_layers=2, dropout=0.1))
        train(model, drawn)
        assert choose_backend(model.output.weight.device, torch.bfloat16)[0] == "varlen"
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # encoder, patch transformer, decoder
    assert counters["aot_autograd"]["total"] == 3


def test_llamagen_trains_with_one_graph() -> None:
    drawn = layouts()
    with FakeTensorMode():
        with torch.device("cuda"):
            model = LlamaGen(LlamaGenConfig(**SIZES, layers=2, dropout=0.1))
        train(model, drawn[:3])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == counters["aot_autograd"]["total"] == 1

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpar import DPAR, DPARConfig, PatchLayout

STEPS = 30


@pytest.mark.slow
def test_compiled_training_equals_eager_and_compiles_three_times_for_any_number_of_patches() -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    config = DPARConfig(
        codebook_size=32, grid_height=4, grid_width=8, classes=3, width=32, heads=2, patch_layers=2, dropout=0.0
    )
    eager = DPAR(config).train()
    torch.nn.init.normal_(eager.output.weight)
    compiled = copy.deepcopy(eager)
    compiled.compile_layers()
    torch._dynamo.reset()
    counters.clear()
    for _ in range(STEPS):
        starts = torch.rand(4, 32) < torch.rand(4, 1)
        starts[:, 0] = True
        codes, layout = torch.randint(32, (4, 32)), PatchLayout.from_starts(starts)
        losses = [model(codes, None, layout, loss=True) for model in (compiled, eager)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        gradients = [
            torch.autograd.grad(loss, list(model.parameters()))
            for loss, model in zip(losses, (compiled, eager), strict=True)
        ]
        for mine, own in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-4, atol=5e-5)
    assert counters["stats"]["unique_graphs"] == 3  # encoder, patch transformer, decoder
    assert not counters["graph_break"]


def test_compiled_layers_are_used_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    def compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
        used.append(compute)
        return compute

    monkeypatch.setattr("dpar.layers.compiled", compiled)
    model = DPAR(DPARConfig(codebook_size=8, grid_height=2, grid_width=2, classes=1, width=32, heads=2))
    model.compile_layers()
    codes, starts = torch.randint(8, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    model.eval()(codes, None, starts)
    assert not used
    model.train()(codes, None, starts)
    assert len(set(used)) == 3  # encoder layer, block, decoder layer


def test_a_copy_of_a_compiled_model_uses_its_own_weights() -> None:
    model = DPAR(DPARConfig(codebook_size=8, grid_height=2, grid_width=2, classes=1, width=32, heads=2))
    torch.nn.init.normal_(model.output.weight)
    model.compile_layers()
    copied = copy.deepcopy(model).eval()
    codes, starts = torch.randint(8, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    before = copied(codes, None, starts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(codes, None, starts), before)
    assert copied.state_dict().keys() == model.state_dict().keys()

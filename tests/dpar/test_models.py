"""Models as they start, and that they learn: initial weights, gradients, dropout, autocast."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar import DPAR, LlamaGen
from tests.dpar.tiny_models import SEQUENCES, V, batch, dpar, llamagen, run


def loss_of(model: DPAR | LlamaGen) -> Tensor:
    codes, labels, starts = batch()
    return F.cross_entropy(run(model, codes, labels, starts).flatten(0, 1), codes.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("make", SEQUENCES)
def test_a_model_can_memorise_one_batch(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make(width=64, dropout=0.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = loss_of(model)
        if loss.item() < 0.05:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss_of(model).item() < 0.05


@pytest.mark.parametrize("make", SEQUENCES)
def test_an_untrained_model_predicts_all_tokens_equally(make: Callable[..., DPAR | LlamaGen]) -> None:
    assert loss_of(make()).item() == pytest.approx(torch.tensor(float(V)).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        dpar(),
        dpar(encoder_layers=2),
        dpar(decoder_start="class"),
        dpar(rope="dynamic-compact", dropout=0.0),
        dpar(rope="2d", classes=0),
        llamagen(),
        llamagen(classes=0),
        llamagen(classes=0, start_token=False),
    ],
)
def test_every_parameter_receives_a_gradient(model: DPAR | LlamaGen) -> None:
    torch.manual_seed(0)
    nn.init.normal_(model.output.weight)
    codes, labels, starts = batch()
    fit = labels.clamp(max=model.config.classes)
    targets = model.targets(codes) if isinstance(model, LlamaGen) else codes
    F.cross_entropy(run(model, codes, fit, starts).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", SEQUENCES)
def test_dropout_acts_in_training_only(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make(dropout=0.5)
    nn.init.normal_(model.output.weight)
    with torch.no_grad():
        assert not torch.equal(run(model, *batch()), run(model, *batch()))
        model.eval()
        assert torch.equal(run(model, *batch()), run(model, *batch()))


@pytest.mark.parametrize("make", SEQUENCES)
def test_weights_start_as_llamagens_do(make: Callable[..., DPAR | LlamaGen]) -> None:
    for name, parameter in make(width=64).named_parameters():
        if name == "output.weight":
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("make", SEQUENCES)
def test_autocast_logits_are_close_to_float32(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make().eval()
    nn.init.normal_(model.output.weight, std=0.1)
    with torch.no_grad():
        exact = run(model, *batch())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run(model, *batch()).float()
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)

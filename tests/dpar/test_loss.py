import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig
from dpar.loss import next_token_loss

SIZES: dict[str, Any] = {"codebook_size": 17, "grid_height": 3, "grid_width": 5, "classes": 3, "width": 32, "heads": 2}


def both(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, autocast: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return loss and gradients of our function and of cross-entropy over the full logits."""

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy((logits.float() if autocast else logits).flatten(0, -2), targets.flatten())

    found = []
    for function in (functools.partial(next_token_loss, chunk=chunk), plain):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(h, w, targets)
        to_hidden, to_weight = torch.autograd.grad(loss * 3, (h, w))
        found.append((loss.detach(), to_hidden, to_weight))
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.integers(0, 999))
def test_loss_and_gradients_equal_cross_entropys_for_any_chunk_size(
    batch: int, tokens: int, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(batch, tokens, 8), torch.randn(13, 8)
    ours, theirs = both(hidden, weight, torch.randint(13, (batch, tokens)), chunk)
    for mine, own in zip(ours, theirs, strict=True):
        assert mine.dtype == own.dtype
        assert relative(mine, own) < 1e-6


def test_loss_and_gradients_in_bfloat16_equal_cross_entropys_up_to_rounding() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16, 32), torch.randn(50, 32) / 4
    ours, theirs = both(hidden, weight, torch.randint(50, (4, 16)), 10, autocast=True)
    for mine, own in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, own) < 2**-8  # one rounding to bfloat16


def test_the_gradients_formula_is_right_in_float64() -> None:
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.randint(6, (5,))
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, targets, chunk=2), leaves)


def test_at_most_one_chunk_of_logits_is_in_memory() -> None:
    hidden, weight = torch.randn(4096, 8).requires_grad_(), torch.randn(2048, 8).requires_grad_()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        next_token_loss(hidden, weight, torch.randint(2048, (4096,)), chunk=64).backward()
    assert largest <= max(64 * 2048, hidden.numel())


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = torch.randn(7, 4).requires_grad_(), torch.randn(5, 4), torch.randint(5, (7,))
    with torch.no_grad():
        loss = next_token_loss(hidden, weight, targets, chunk=3)
    assert not loss.requires_grad
    assert torch.equal(loss, next_token_loss(hidden, weight, targets, chunk=3).detach())


def test_the_loss_of_a_zero_head_is_the_logarithm_of_the_codebook_size() -> None:
    loss = next_token_loss(torch.randn(3, 4), torch.zeros(50, 4), torch.randint(50, (3,)))
    assert float(loss) == pytest.approx(math.log(50))


def models(dropout: float = 0.0) -> list[DPAR | LlamaGen]:
    torch.manual_seed(0)
    made: list[DPAR | LlamaGen] = [
        DPAR(DPARConfig(**SIZES, dropout=dropout, encoder_layers=2, patch_layers=2, decoder_layers=2)),
        LlamaGen(LlamaGenConfig(**SIZES, dropout=dropout, layers=2)),
    ]
    for model in made:
        nn.init.normal_(model.output.weight)
    return made


def arguments(model: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    codes, labels = torch.randint(17, (3, 15), generator=generator), torch.tensor([0, 1, 3])
    starts = torch.rand(3, 15, generator=generator) < 0.5
    starts[:, 0] = True
    return (codes, labels, starts) if isinstance(model, DPAR) else (codes, labels)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("which", [0, 1])
def test_a_models_loss_is_the_cross_entropy_of_its_logits(which: int) -> None:
    model = models()[which]
    inputs = arguments(model)
    loss = model(*inputs, loss=True)
    plain = F.cross_entropy(model(*inputs).float().flatten(0, 1), inputs[0].flatten())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for mine, own in zip(gradients(model, loss), gradients(model, plain), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_checkpointed_layers_give_the_same_gradients_with_dropout(which: int) -> None:
    model = models(dropout=0.3)[which]
    found = []
    for recompute in (False, True):
        model.checkpoint_layers = recompute
        torch.manual_seed(5)
        found.append(gradients(model, model(*arguments(model), loss=True)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_checkpointed_layers_save_less_for_backward(which: int) -> None:
    model = models()[which]
    held = []
    for recompute in (False, True):
        model.checkpoint_layers = recompute
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(*arguments(model), loss=True)
        held.append(total)
    assert held[1] < held[0] / 2

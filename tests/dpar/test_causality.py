from typing import TypeVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, PatchLayout, patch_starts
from dpar.model import DecoderStart
from dpar.rope import PatchRope

SOME = settings(deadline=None, max_examples=25)
GRIDS = [(3, 5), (4, 4), (1, 7), (5, 2)]
BOUNDARIES = ["every token", "length 4", "row", "image", "random"]
V, CLASSES = 17, 3
M = TypeVar("M", DPAR, LlamaGen)


def boundaries(kind: str, batch: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    h = rng.uniform(0, 1, (batch, height * width)).astype(np.float32)
    rules: dict[str, tuple[float, int | None, bool]] = {
        "every token": (0.5, 1, True),
        "length 4": (0.7, 4, True),
        "row": (2.0, None, True),
        "image": (2.0, None, False),
        "random": (0.6, None, False),
    }
    threshold, max_length, row_reset = rules[kind]
    return torch.from_numpy(patch_starts(h, threshold, max_length, width, row_reset))


def awake(model: M, seed: int) -> M:
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.output.weight, generator=generator)
    return model.eval()


@st.composite
def dpars(draw: st.DrawFn) -> tuple[DPAR, Tensor, int]:
    height, width = draw(st.sampled_from(GRIDS))
    seed = draw(st.integers(0, 999))
    torch.manual_seed(seed)
    config = DPARConfig(
        codebook_size=V,
        grid_height=height,
        grid_width=width,
        classes=CLASSES,
        width=32,
        heads=2,
        encoder_layers=draw(st.integers(1, 2)),
        patch_layers=draw(st.integers(1, 2)),
        decoder_layers=draw(st.integers(1, 2)),
        rope=draw(st.sampled_from(get_args(PatchRope))),
        decoder_start=draw(st.sampled_from(get_args(DecoderStart))),
    )
    kind = draw(st.sampled_from(BOUNDARIES))
    starts = boundaries(kind, 2, height, width, np.random.default_rng(seed))
    return awake(DPAR(config), seed), starts, draw(st.integers(0, height * width - 1))


def assert_only_later_logits_move(before: Tensor, after: Tensor, k: int) -> None:
    assert torch.equal(before[0, : k + 1], after[0, : k + 1])
    assert torch.equal(before[1], after[1])  # the other image
    for later in range(k + 1, min(k + 2, before.shape[1])):
        assert not torch.equal(before[0, later], after[0, later])


def with_another_token(codes: Tensor, k: int) -> Tensor:
    changed = codes.clone()
    changed[0, k] = (changed[0, k] + 1) % V
    return changed


@SOME
@given(dpars())
@torch.no_grad()
def test_changing_a_token_leaves_earlier_logits_bit_identical(case: tuple[DPAR, Tensor, int]) -> None:
    model, starts, k = case
    codes, labels = torch.randint(V, starts.shape), torch.tensor([0, CLASSES])
    before = model(codes, labels, starts)
    assert_only_later_logits_move(before, model(with_another_token(codes, k), labels, starts), k)


@pytest.mark.parametrize("kind", BOUNDARIES)
@torch.no_grad()
def test_no_logits_depend_on_their_own_or_later_tokens(kind: str) -> None:
    torch.manual_seed(0)
    config = DPARConfig(codebook_size=V, grid_height=3, grid_width=5, classes=CLASSES, width=32, heads=2)
    model = awake(DPAR(config), 0)
    starts = boundaries(kind, 2, 3, 5, np.random.default_rng(3))
    codes, labels = torch.randint(V, starts.shape), torch.tensor([1, 2])
    before = model(codes, labels, starts)
    for k in range(15):
        assert_only_later_logits_move(before, model(with_another_token(codes, k), labels, starts), k)


@SOME
@given(dpars())
def test_a_patch_reaches_no_logits_of_its_own_or_earlier_tokens(case: tuple[DPAR, Tensor, int]) -> None:
    model, starts, _ = case
    layout = PatchLayout.from_starts(starts)
    codes, labels = torch.randint(V, starts.shape), torch.tensor([0, 1])
    condition = model.cls_embedding(labels).detach()
    patches, tokens = model.encode(codes, layout)
    patches, tokens = patches.detach().requires_grad_(), tokens.detach()  # only gradients through the patches
    logits = model.decode(condition, tokens, model.transform(condition, patches, layout), layout).flatten(0, 1)
    for j in range(layout.n_patches):
        owned = layout.patch_of_token == j
        reaches = torch.autograd.grad(logits[owned].sum(), patches, retain_graph=True)[0].abs().sum(dim=1) > 0
        image = layout.image_of_patch == layout.image_of_patch[j]
        earlier = image & (torch.arange(layout.n_patches) < j)
        assert reaches.tolist() == earlier.tolist()  # all earlier patches of its image, and nothing else


@torch.no_grad()
def test_the_last_token_of_a_patch_first_reaches_the_next_patch() -> None:
    torch.manual_seed(0)
    config = DPARConfig(codebook_size=V, grid_height=2, grid_width=6, classes=CLASSES, width=32, heads=2)
    model = awake(DPAR(config), 0)
    starts = (torch.arange(12) % 4 == 0).unsqueeze(0).repeat(2, 1)
    layout = PatchLayout.from_starts(starts)
    codes = torch.randint(V, (2, 12))
    condition = model.cls_embedding(torch.tensor([0, 1]))
    outputs = [
        model.transform(condition, model.encode(c, layout)[0], layout) for c in (codes, with_another_token(codes, 7))
    ]
    same = (outputs[0] == outputs[1]).all(dim=1)
    assert same.tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]  # token 7 ends patch 1, read first by output 2


@SOME
@given(st.sampled_from(GRIDS), st.integers(1, 3), st.integers(0, 999), st.data())
@torch.no_grad()
def test_changing_a_token_leaves_llamagens_earlier_logits_bit_identical(
    grid: tuple[int, int], layers: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    height, width = grid
    model = awake(
        LlamaGen(
            LlamaGenConfig(
                codebook_size=V,
                grid_height=height,
                grid_width=width,
                classes=CLASSES,
                width=32,
                heads=2,
                layers=layers,
            )
        ),
        seed,
    )
    k = data.draw(st.integers(0, height * width - 1))
    codes, labels = torch.randint(V, (2, height * width)), torch.tensor([0, CLASSES])
    before = model(codes, labels)
    assert_only_later_logits_move(before, model(with_another_token(codes, k), labels), k)


@SOME
@given(st.sampled_from(GRIDS), st.integers(0, 999), st.data())
@torch.no_grad()
def test_without_a_start_token_logits_depend_on_earlier_tokens_only(
    grid: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    sizes = {"codebook_size": V, "grid_height": grid[0], "grid_width": grid[1], "width": 32, "heads": 2, "layers": 2}
    model = awake(LlamaGen(LlamaGenConfig(classes=0, start_token=False, **sizes)), seed)
    n = model.config.n_tokens
    k = data.draw(st.integers(0, n - 1))
    codes = torch.randint(V, (2, n))
    before, after = model(codes), model(with_another_token(codes, k))
    assert before.shape == (2, n - 1, V)  # entry i is for token i + 1
    assert torch.equal(before[0, :k], after[0, :k])
    assert torch.equal(before[1], after[1])
    if k < n - 1:
        assert not torch.equal(before[0, k], after[0, k])


@torch.no_grad()
def test_the_class_reaches_every_logit() -> None:
    torch.manual_seed(0)
    config = DPARConfig(codebook_size=V, grid_height=3, grid_width=5, classes=CLASSES, width=32, heads=2)
    model = awake(DPAR(config), 0)
    starts = boundaries("length 4", 1, 3, 5, np.random.default_rng(0))
    codes = torch.randint(V, (1, 15))
    one, other = (model(codes, torch.tensor([label]), starts) for label in (0, 1))
    assert (one != other).any(dim=2).all()

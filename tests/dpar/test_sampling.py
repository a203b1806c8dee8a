"""Sampling uses the logits, boundaries, likelihoods and cost of the forward pass in training."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpar import DPAR, LlamaGen, SamplingOptions, patch_starts, static_starts
from dpar.cpu_kernels import available
from dpar.flops import count
from dpar.guidance import draw, uniforms
from dpar.rope import PatchRope
from tests.dpar.sampled import (
    LABELS,
    WIDTH,
    N,
    Seen,
    V,
    dpar,
    forced,
    llamagen,
    sample_with,
    unconditional,
    usual_entropy,
)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("encoder_layers", [1, 2])
@pytest.mark.parametrize("rope", get_args(PatchRope))
def test_logits_in_sampling_equal_teacher_forcing(rope: PatchRope, encoder_layers: int, cfg_scale: float) -> None:
    model, entropy_model, seen = dpar(rope=rope, encoder_layers=encoder_layers), unconditional(), Seen()
    codes, starts = sample_with(
        model,
        entropy_model,
        LABELS,
        cfg_scale=cfg_scale,
        threshold=usual_entropy(entropy_model),
        max_length=4,
        observe=seen,
    )
    assert len({tuple(row) for row in starts.tolist()}) == len(LABELS)  # boundaries do differ between images
    torch.testing.assert_close(seen.logits(), forced(model, codes, LABELS, starts, cfg_scale), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    start_token=st.booleans(),
    decoder_start=st.sampled_from(["learned", "class"]),
    patch_layers=st.integers(1, 3),
    decoder_layers=st.integers(1, 3),
    margin=st.floats(-0.3, 0.3),
    max_length=st.sampled_from([None, 1, 2, 4]),
    row_reset=st.booleans(),
    cfg_scale=st.sampled_from([1.0, 1.5]),
)
def test_logits_in_sampling_equal_teacher_forcing_under_any_rule(
    seed: int,
    start_token: bool,
    decoder_start: str,
    patch_layers: int,
    decoder_layers: int,
    margin: float,
    max_length: int | None,
    row_reset: bool,
    cfg_scale: float,
) -> None:
    model = dpar(
        seed,
        decoder_start=decoder_start,
        patch_layers=patch_layers,
        decoder_layers=decoder_layers,
    )
    entropy_model, seen = unconditional(seed + 1, start_token), Seen()
    threshold = usual_entropy(entropy_model) + margin
    rule: dict[str, Any] = {"threshold": threshold, "max_length": max_length, "row_reset": row_reset}
    codes, starts = sample_with(model, entropy_model, LABELS, cfg_scale=cfg_scale, seed=seed, observe=seen, **rule)
    torch.testing.assert_close(seen.logits(), forced(model, codes, LABELS, starts, cfg_scale), atol=1e-4, rtol=0)
    expected = patch_starts(entropy_model.entropy(codes), grid_width=WIDTH, **rule)
    assert starts.tolist() == expected.tolist()


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_logits_in_llamagen_sampling_equal_teacher_forcing(cfg_scale: float) -> None:
    model, seen = llamagen(), Seen()
    codes, starts = sample_with(model, None, LABELS, cfg_scale=cfg_scale, observe=seen)
    torch.testing.assert_close(seen.logits(), forced(model, codes, LABELS, starts, cfg_scale), atol=1e-4, rtol=0)
    assert bool(starts.all())  # every token is its own patch


@pytest.mark.parametrize("start_token", [True, False])
def test_online_boundaries_equal_those_of_stored_entropies_for_both_kinds_of_entropy_model(start_token: bool) -> None:
    model, entropy_model = dpar(), unconditional(start_token=start_token)
    threshold = usual_entropy(entropy_model)
    codes, starts = sample_with(model, entropy_model, LABELS, threshold=threshold)
    expected = patch_starts(entropy_model.entropy(codes), threshold, 4, WIDTH)
    assert starts.tolist() == expected.tolist()


@pytest.mark.parametrize("length", [1.0, 1.81, 3.5])
def test_static_sampling_has_static_boundaries_and_needs_no_entropy_model(length: float) -> None:
    model, seen = dpar(), Seen()
    codes, starts = sample_with(model, None, LABELS, static_length=length, observe=seen)
    assert starts.tolist() == [static_starts(N, length).tolist()] * len(LABELS)
    torch.testing.assert_close(seen.logits(), forced(model, codes, LABELS, starts, 1.0), atol=1e-4, rtol=0)


def test_with_an_infinite_threshold_length_and_rows_decide() -> None:
    _, starts = sample_with(dpar(), None, LABELS, threshold=math.inf, max_length=2)
    expected = patch_starts(np.zeros((len(LABELS), N), np.float32), math.inf, 2, WIDTH)
    assert starts.tolist() == expected.tolist()


@pytest.mark.parametrize("cfg_scale", [1, 2])
def test_greedy_tokens_equal_llamagens_own(gpt_tiny: tuple[LlamaGen, dict[str, Any]], cfg_scale: int) -> None:
    model, arrays = gpt_tiny
    labels = torch.from_numpy(arrays["greedy_labels"])
    codes, _ = sample_with(model, None, labels, cfg_scale=float(cfg_scale), temperature=0)
    assert codes.tolist() == arrays[f"greedy_cfg{cfg_scale}"].tolist()


def own_log_probs(model: DPAR | LlamaGen, codes: Tensor, starts: Tensor) -> Tensor:
    logits = forced(model, codes, LABELS, starts, 1.0)
    return logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", ["dpar", "llamagen"])
@pytest.mark.parametrize(
    "how", [{}, {"cfg_scale": 2.0}, {"temperature": 0.7, "top_k": 5}, {"cfg_scale": 3.0, "cfg_schedule": "linear"}]
)
def test_log_probabilities_of_a_sample_are_those_of_teacher_forcing(family: str, how: dict[str, Any]) -> None:
    model: Any = dpar() if family == "dpar" else llamagen()
    rule: dict[str, Any] = {"static_length": 1.81} if family == "dpar" else {}
    seen = Seen()
    codes, starts = sample_with(model, None, LABELS, observe_log_prob=seen, **rule, **how)
    torch.testing.assert_close(seen.logits(), own_log_probs(model, codes, starts), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=15)
@given(share=st.floats(0, 1), seed=st.integers(0, 100), cfg_scale=st.sampled_from([1.0, 2.0]))
def test_known_tokens_are_kept_and_all_others_sampled_after_them(share: float, seed: int, cfg_scale: float) -> None:
    model, entropy_model, rng = dpar(), unconditional(), torch.Generator().manual_seed(seed)
    known = torch.randint(V, (len(LABELS), N), generator=rng)
    keep = torch.rand(known.shape, generator=rng) < share
    seen, threshold = Seen(), usual_entropy(entropy_model)
    rule: dict[str, Any] = {"threshold": threshold, "cfg_scale": cfg_scale, "seed": seed}
    codes, starts = sample_with(model, entropy_model, LABELS, known=known, keep=keep, observe=seen, **rule)
    assert torch.equal(codes[keep], known[keep])
    assert starts.tolist() == patch_starts(entropy_model.entropy(codes), threshold, 4, WIDTH).tolist()
    logits = seen.logits()
    torch.testing.assert_close(logits, forced(model, codes, LABELS, starts, cfg_scale), atol=1e-4, rtol=0)
    noise = torch.from_numpy(uniforms(seed, range(len(LABELS)), N))
    drawn = torch.stack([draw(logits[:, i], noise[:, i], SamplingOptions()) for i in range(N)], dim=1)
    assert torch.equal(codes[~keep], drawn[~keep])


def test_a_fully_known_image_is_returned_with_its_likelihood() -> None:
    model, seen = dpar(), Seen()
    known = torch.randint(V, (len(LABELS), N))
    codes, starts = sample_with(
        model, None, LABELS, static_length=2.0, known=known, keep=known >= 0, observe_log_prob=seen
    )
    assert torch.equal(codes, known)
    torch.testing.assert_close(seen.logits(), own_log_probs(model, known, starts), atol=1e-4, rtol=0)


def test_without_known_tokens_sampling_is_unchanged() -> None:
    model, known = llamagen(), torch.zeros(len(LABELS), N, dtype=torch.long)
    codes, _ = sample_with(model, None, LABELS, known=known, keep=known > 0)
    assert torch.equal(codes, sample_with(model, None, LABELS)[0])


class Products(TorchDispatchMode):
    """Counts the multiply-accumulates of all products of rows with a matrix."""

    done = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if str(function).startswith(("aten.mm.", "aten.addmm.", "mkldnn._linear_pointwise.")):
            self.done += out.numel() * args[0].shape[-1]
        return out


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("on_onednn", [True, False])
def test_sampling_costs_the_counted_multiply_accumulates(
    guided: bool, on_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_onednn and not available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: on_onednn)
    for module in ("cpu_kernels", "steppers"):
        monkeypatch.setattr(f"dpar.{module}.padded", lambda rows: rows)  # padding rows are not part of the method
    model, entropy_model = dpar(encoder_layers=2), unconditional()
    threshold = usual_entropy(entropy_model)
    with Products() as products:
        _, starts = sample_with(model, entropy_model, LABELS, threshold=threshold, cfg_scale=2.0 if guided else 1.0)
    patches = int(starts.sum()) / len(LABELS)
    assert 5 < patches < N
    counted = count(model.config, N / patches).sampling(count(entropy_model.config), guidance=guided)
    # The column counts a forward pass; sampling does not encode the last token and the last patch.
    block = sum(p.numel() for p in model.encoder_layers()[0].block.parameters() if p.ndim == 2)
    in_last_patch = sum(N - int(row.nonzero().max()) for row in starts) / len(LABELS)
    unread = model.config.encoder_layers * (block + (2 + 2 * in_last_patch) * model.config.width**2)
    assert products.done / len(LABELS) == pytest.approx(counted - unread, rel=1e-9)


def test_sampling_leaves_no_gradients_and_does_not_change_the_model() -> None:
    model = dpar()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codes, _ = sample_with(model, None, LABELS, static_length=2.0)
    again, _ = sample_with(model, None, LABELS, static_length=2.0)
    assert codes.tolist() == again.tolist()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

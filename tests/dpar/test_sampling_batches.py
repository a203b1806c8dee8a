"""An image depends on its seed and index, not on the batch that it is sampled in."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.dpar.sampled import CLASSES, LABELS, N, Seen, dpar, llamagen, sample_with, unconditional, usual_entropy


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_depends_on_seed_and_index_not_on_the_batch(cfg_scale: float) -> None:
    model, entropy_model = dpar(), llamagen()
    rule: dict[str, Any] = {"threshold": usual_entropy(entropy_model), "cfg_scale": cfg_scale, "seed": 5}
    indices = [7, 0, 12_345, 3]
    together, their_starts = sample_with(model, entropy_model, LABELS, indices=indices, **rule)
    for b, index in enumerate(indices):
        alone, its_starts = sample_with(model, entropy_model, LABELS[b : b + 1], indices=[index], **rule)
        assert alone.tolist() == together[b : b + 1].tolist()
        assert its_starts.tolist() == their_starts[b : b + 1].tolist()


def test_a_llamagen_image_depends_on_seed_and_index_not_on_the_batch() -> None:
    model = llamagen()
    together, _ = sample_with(model, None, LABELS, indices=[4, 5, 6, 7])
    alone, _ = sample_with(model, None, LABELS[2:3], indices=[6])
    assert alone.tolist() == together[2:3].tolist()


@settings(deadline=None, max_examples=15)
@given(
    batches=st.permutations(range(17)).flatmap(
        lambda order: st.sets(st.integers(1, 16), max_size=5).map(lambda cuts: np.split(order, sorted(cuts)))
    ),
    in_flight=st.integers(1, 17),
    family=st.sampled_from(["dpar", "llamagen"]),
    cfg_scale=st.sampled_from([1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9]),
)
def test_images_are_the_same_in_batches_of_any_size_and_order(
    batches: list[Any], in_flight: int, family: str, cfg_scale: float, top_p: float
) -> None:
    model: Any = dpar(encoder_layers=2) if family == "dpar" else llamagen(7)
    entropy_model = unconditional() if family == "dpar" else None
    rule: dict[str, Any] = {"threshold": usual_entropy(unconditional())} if family == "dpar" else {}
    labels = torch.arange(17) % (CLASSES + 1)

    def run(indices: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen = Seen()
        codes, starts = sample_with(
            model,
            entropy_model,
            labels[indices],
            indices=[int(i) for i in indices],
            cfg_scale=cfg_scale,
            top_p=top_p,
            observe=seen,
            **how,
            **rule,
        )
        return codes, starts, seen.logits()

    together = run(np.arange(17))
    for indices in batches:
        for ours, theirs in zip(run(indices, batch=in_flight), together, strict=True):
            assert torch.equal(ours, theirs[indices])  # logits too, to the last bit


def test_without_onednn_an_image_does_not_depend_on_the_batch_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: False)
    model, entropy_model, labels = dpar(), llamagen(), torch.arange(9) % CLASSES
    rule: dict[str, Any] = {"threshold": usual_entropy(entropy_model), "cfg_scale": 2.0}
    together, _ = sample_with(model, entropy_model, labels, **rule)
    for batch in (1, 4):
        assert torch.equal(sample_with(model, entropy_model, labels, batch=batch, **rule)[0], together)


def test_the_patch_transformer_runs_only_for_images_that_start_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cpu_kernels", "steppers"):
        monkeypatch.setattr(f"dpar.{module}.padded", lambda rows: rows)  # so that rows are images
    model, entropy_model, labels = dpar(), unconditional(), torch.arange(24) % CLASSES
    patch_steps, token_steps = [], []
    model.decoder_layers()[0].patch_norm.register_forward_hook(lambda part, args, out: patch_steps.append(len(out)))
    model.norm.register_forward_hook(lambda part, args, out: token_steps.append(len(out)))
    monkeypatch.setattr("dpar.cpu_kernels.available", lambda: False)  # so that the hooked modules run
    rule: dict[str, Any] = {"threshold": usual_entropy(entropy_model), "row_reset": False, "max_length": None}
    _, starts = sample_with(model, entropy_model, labels, batch=8, **rule)
    assert token_steps == [8] * 3 * N
    begun = [int(count) for part in starts.split(8) for count in part.sum(dim=0) if count]
    assert patch_steps == begun


@pytest.mark.parametrize("batch", [1, 2, 5, 24, 30])
def test_finished_images_are_reported_per_batch(batch: int) -> None:
    finished: list[int] = []
    sample_with(llamagen(), None, torch.zeros(24, dtype=torch.long), batch=batch, advance=finished.append)
    assert sum(finished) == 24
    assert max(finished) == min(batch, 24)


def test_a_wide_model_gives_the_same_images_in_batches_of_any_size() -> None:
    sizes: dict[str, Any] = {"width": 768, "heads": 12, "codebook_size": 2048, "grid_height": 2, "grid_width": 8}
    model, entropy_model = dpar(patch_layers=1, decoder_layers=1, **sizes), llamagen(layers=1, **sizes)
    codes = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(0))
    threshold = float(entropy_model.entropy(codes)[:, 1:].float().median())

    def run(begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        seen = Seen()
        found = sample_with(
            model,
            entropy_model,
            torch.zeros(end - begin).long(),
            indices=range(begin, end),
            cfg_scale=2.0,
            threshold=threshold,
            observe=seen,
        )
        return *found, seen.logits()

    together = run(0, 11)
    assert 16 < int(together[1].sum()) < 11 * 16  # boundaries of every kind
    for begin, end in ((0, 1), (6, 7), (1, 6), (3, 11)):
        for ours, theirs in zip(run(begin, end), together, strict=True):
            assert torch.equal(ours, theirs[begin:end])


def test_another_seed_or_index_gives_another_image() -> None:
    model, labels = llamagen(), torch.zeros(3, dtype=torch.long)
    codes, _ = sample_with(model, None, labels, indices=[0, 1, 2])
    other, _ = sample_with(model, None, labels, indices=[0, 1, 2], seed=1)
    assert len({tuple(row) for row in [*codes.tolist(), *other.tolist()]}) == 6


def test_images_are_numbered_from_zero_when_no_indices_are_given() -> None:
    model = llamagen()
    assert (
        sample_with(model, None, LABELS)[0].tolist() == sample_with(model, None, LABELS, indices=range(4))[0].tolist()
    )

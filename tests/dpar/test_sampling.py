import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpar import (
    DPAR,
    DPARConfig,
    LlamaGen,
    LlamaGenConfig,
    ModelError,
    PatchRule,
    SamplingOptions,
    patch_starts,
    sample,
    static_starts,
)
from dpar.cpu_kernels import available
from dpar.flops import count
from dpar.guidance import draw, keep_likeliest, uniforms
from dpar.rope import PatchRope

V, CLASSES, HEIGHT, WIDTH = 19, 3, 3, 5
N = HEIGHT * WIDTH
SIZES: dict[str, Any] = {
    "codebook_size": V,
    "grid_height": HEIGHT,
    "grid_width": WIDTH,
    "classes": CLASSES,
    "width": 32,
    "heads": 2,
}
LABELS = torch.tensor([0, 2, 1, CLASSES])
LAST_BELOW_ONE = 1 - 2**-53  # the largest number that a uniform generator gives


def dpar(seed: int = 0, **sizes: Any) -> DPAR:
    torch.manual_seed(seed)
    model = DPAR(DPARConfig(**{**SIZES, "patch_layers": 2, "decoder_layers": 2, **sizes})).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def llamagen(seed: int = 1, **sizes: Any) -> LlamaGen:
    torch.manual_seed(seed)
    model = LlamaGen(LlamaGenConfig(**{**SIZES, "layers": 2, **sizes})).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def unconditional(seed: int = 1, start_token: bool = False) -> LlamaGen:
    """Build an entropy model: without a start token, or a class-conditional LlamaGen used with its guidance class."""
    return llamagen(seed, classes=7 if start_token else 0, start_token=start_token)


def usual_entropy(entropy_model: LlamaGen) -> float:
    codes = torch.randint(V, (16, N), generator=torch.Generator().manual_seed(0))
    return float(entropy_model.entropy(codes)[:, 1:].float().median())


RULE_FIELDS = {"threshold", "max_length", "row_reset", "static_length"}
OPTION_FIELDS = {field.name for field in dataclasses.fields(SamplingOptions)}


def sample_with(
    model: DPAR | LlamaGen, entropy_model: LlamaGen | None, labels: Tensor, **how: Any
) -> tuple[Tensor, Tensor]:
    """Call :func:`dpar.sample` with the fields of rule and options as keywords."""
    rule_fields = {name: how.pop(name) for name in RULE_FIELDS & how.keys()}
    options = SamplingOptions(**{name: how.pop(name) for name in OPTION_FIELDS & how.keys()})
    rule = None
    if "static_length" in rule_fields:
        rule = PatchRule.static(rule_fields["static_length"])
    elif rule_fields:
        rule = PatchRule(**rule_fields)
    return sample(model, labels, entropy_model, rule, options, **how)


class Seen:
    """Records the logits of sampling at each token, (B, N, ...)."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def __call__(self, images: slice, position: int, values: Tensor) -> None:
        for image, value in zip(range(images.start, images.stop), values, strict=True):
            assert (image, position) not in self.found
            assert position == 0 or (image, position - 1) in self.found
            self.found[image, position] = value

    def logits(self) -> Tensor:
        images = max(image for image, _ in self.found) + 1
        return torch.stack([torch.stack([self.found[image, i] for i in range(N)]) for image in range(images)])


@torch.no_grad()
def forced(model: DPAR | LlamaGen, codes: Tensor, labels: Tensor, starts: Tensor, cfg_scale: float) -> Tensor:
    extra = (starts,) if isinstance(model, DPAR) else ()
    conditional = model(codes, labels, *extra)
    if cfg_scale == 1.0:
        return conditional
    unconditional = model(codes, None, *extra)
    return unconditional + cfg_scale * (conditional - unconditional)


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


def test_uniforms_are_a_function_of_seed_index_and_position() -> None:
    numbers = uniforms(3, [0, 9, 1], 50)
    assert numbers.shape == (3, 50)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == 150
    np.testing.assert_array_equal(uniforms(3, [9], 20)[0], numbers[1, :20])
    assert not np.isin(uniforms(4, [9], 50), numbers).any()


def test_drawing_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([0.0, 0.125, 0.0, 0.5, 0.375, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.1249, 0.1251, 0.6249, 0.6251, LAST_BELOW_ONE], dtype=torch.float64)
    tokens = draw(p.log().expand(6, 6), u, SamplingOptions())
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


def test_shares_of_evenly_spaced_numbers_are_the_probabilities() -> None:
    p = torch.tensor([0.07, 0.4, 0.03, 0.5], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw(p.log().expand(1000, 4), u, SamplingOptions())
    assert tokens.bincount().tolist() == [70, 400, 30, 500]


@settings(deadline=None, max_examples=200)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1)), min_size=1, max_size=12).filter(any),
    u=st.one_of(st.sampled_from([0.0, LAST_BELOW_ONE]), st.floats(0, LAST_BELOW_ONE)),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.1, 10),
)
def test_no_token_of_zero_probability_is_drawn(
    weights: list[float], u: float, top_k: int, top_p: float, temperature: float
) -> None:
    logits = torch.tensor([weights], dtype=torch.float64).log()
    options = SamplingOptions(top_k=top_k, top_p=top_p, temperature=temperature)
    token = int(draw(logits, torch.tensor([u], dtype=torch.float64), options))
    kept = keep_likeliest((logits / temperature).softmax(-1), top_k, top_p)[0]
    assert kept[token] > 0
    assert weights[token] > 0


def test_temperature_divides_the_logits() -> None:
    logits, u = torch.randn(500, 7), torch.rand(500, dtype=torch.float64)
    cooled = draw(logits, u, SamplingOptions(temperature=0.25))
    assert cooled.tolist() == draw(logits * 4, u, SamplingOptions()).tolist()
    assert cooled.tolist() != draw(logits, u, SamplingOptions()).tolist()


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(50, 7)
    assert draw(logits, torch.rand(50).double(), SamplingOptions(temperature=0)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0.125, 0.5, 0.0625, 0.25, 0.0625]),
        (5, 1.0, [0.125, 0.5, 0.0625, 0.25, 0.0625]),
        (99, 1.0, [0.125, 0.5, 0.0625, 0.25, 0.0625]),
        (2, 1.0, [0, 0.5, 0, 0.25, 0]),
        (1, 1.0, [0, 0.5, 0, 0, 0]),
        (0, 0.01, [0, 0.5, 0, 0, 0]),
        (0, 0.5, [0, 0.5, 0, 0, 0]),  # the likeliest reaches exactly 0.5
        (0, 0.51, [0, 0.5, 0, 0.25, 0]),
        (0, 0.9, [0.125, 0.5, 0.0625, 0.25, 0]),  # of equals, the first
        (2, 0.6, [0, 0.5, 0, 0, 0]),  # the first of the two kept has two thirds
        (2, 0.7, [0, 0.5, 0, 0.25, 0]),
    ],
)
def test_the_likeliest_tokens_are_kept(top_k: int, top_p: float, kept: list[float]) -> None:
    p = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]])
    assert keep_likeliest(p, top_k, top_p).tolist() == [kept]


def test_a_top_k_of_one_samples_greedily() -> None:
    model = llamagen()
    assert (
        sample_with(model, None, LABELS, top_k=1)[0].tolist()
        == sample_with(model, None, LABELS, temperature=0)[0].tolist()
    )


@pytest.mark.parametrize(
    ("schedule", "power", "scales"),
    [
        ("constant", 1.0, [3, 3, 3, 3]),
        ("linear", 1.0, [1, 1.5, 2, 2.5]),
        ("power-cosine", 1.0, [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5)]),
        (
            "power-cosine",
            2.0,
            [1, 2 - math.cos(math.pi / 16), 2 - math.cos(math.pi / 4), 2 - math.cos(math.pi * 9 / 16)],
        ),
        ("power-cosine", 0.0, [3, 3, 3, 3]),
    ],
)
def test_guidance_follows_its_schedule(schedule: Any, power: float, scales: list[float]) -> None:
    guidance = SamplingOptions(cfg_scale=3.0, cfg_schedule=schedule, cfg_power=power)
    assert [guidance.guidance_at(i, 4) for i in range(4)] == pytest.approx(scales)


@pytest.mark.parametrize("schedule", ["linear", "power-cosine"])
def test_scheduled_guidance_combines_the_logits_of_teacher_forcing(schedule: Any) -> None:
    model, seen = llamagen(), Seen()
    codes, starts = sample_with(model, None, LABELS, cfg_scale=3.0, cfg_schedule=schedule, cfg_power=2.0, observe=seen)
    conditional, unconditional = (
        forced(model, codes, LABELS, starts, 1.0),
        forced(model, codes, LABELS * 0 + CLASSES, starts, 1.0),
    )
    guidance = SamplingOptions(cfg_scale=3.0, cfg_schedule=schedule, cfg_power=2.0)
    scales = torch.tensor([guidance.guidance_at(i, N) for i in range(N)])[:, None]
    expected = unconditional + scales * (conditional - unconditional)
    torch.testing.assert_close(seen.logits(), expected, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize(
    ("settings_", "fault"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be above 0 and at most 1"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"cfg_scale": 0.0}, "cfg_scale is 0.0; it must be above 0"),
        ({"cfg_scale": math.nan}, "cfg_scale is nan"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'; it must be one of constant, linear, power-cosine"),
        ({"cfg_power": -1.0}, "cfg_power is -1.0"),
        ({"known": torch.zeros(4, N)}, "known and keep go together"),
        ({"known": torch.zeros(3, N).long(), "keep": torch.zeros(4, N).bool()}, r"known is \(3, 15\); \(4, 15\)"),
        ({"known": torch.zeros(4, N).long(), "keep": torch.zeros(4, 9).bool()}, r"keep is \(4, 9\)"),
        ({"known": torch.zeros(4, N).long(), "keep": torch.zeros(4, N)}, "keep is torch.float32; bool"),
        ({"known": torch.full((4, N), V), "keep": torch.ones(4, N).bool()}, "known codes range from 19 to 19"),
        ({"indices": [0, 1]}, "2 indices for 4 labels"),
        ({"indices": [3]}, "1 indices for 4 labels"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        sample_with(llamagen(), None, LABELS, **settings_)


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (torch.zeros(0, dtype=torch.long), r"labels are \(0,\)"),
        (torch.zeros(2, 2, dtype=torch.long), r"labels are \(2, 2\)"),
        (torch.tensor([0, -1]), "labels range from -1 to 0; this model has classes 0 to 2, and 3 for no class"),
        (torch.tensor([1, 4]), "labels range from 1 to 4"),
    ],
)
def test_labels_out_of_range_are_refused(labels: Tensor, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        sample_with(llamagen(), None, labels)


def test_an_entropy_model_without_a_start_token_is_not_sampled_from() -> None:
    with pytest.raises(ModelError, match="without a start token is an entropy model; it cannot sample"):
        sample_with(unconditional(), None, torch.zeros(2, dtype=torch.long))


def test_a_threshold_without_an_entropy_model_is_refused() -> None:
    with pytest.raises(ModelError, match="an entropy model is needed"):
        sample_with(dpar(), None, LABELS, threshold=2.0)


def test_dpar_without_a_rule_or_a_threshold_is_refused() -> None:
    with pytest.raises(ModelError, match="a DPAR model needs a patch rule"):
        sample(dpar(), LABELS, unconditional())
    with pytest.raises(ModelError, match="the patch rule has no threshold"):
        sample(dpar(), LABELS, unconditional(), PatchRule())


@pytest.mark.parametrize(
    ("name", "value"), [("codebook_size", V + 1), ("grid_height", HEIGHT + 1), ("grid_width", WIDTH + 1)]
)
def test_an_entropy_model_for_other_tokens_is_refused(name: str, value: int) -> None:
    other = llamagen(**{name: value})
    assert dataclasses.asdict(other.config)[name] == value
    with pytest.raises(ModelError, match=f"the entropy model's {name} is {value}, the model's {value - 1}"):
        sample_with(dpar(), other, LABELS, threshold=2.0)


@pytest.mark.parametrize(
    ("settings_", "fault"),
    [
        ({"static_length": 0.5}, "length is 0.5"),
        ({"threshold": math.inf, "max_length": 0}, "max_length is 0"),
        ({"threshold": math.nan}, "threshold is not a number"),
    ],
)
def test_an_invalid_rule_is_refused(settings_: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        sample_with(dpar(), None, LABELS, **settings_)

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar import DPAR, LlamaGen, PatchRule, SamplingOptions, static_starts
from dpar.graphs import Graphs
from dpar.patching import OnlinePatcher
from dpar.rope import PatchRope
from dpar.sampling import Sampler
from dpar.static_cache import StaticCache
from dpar.static_steppers import HalfLinear, StaticPatcher, StaticPatchStepper, half_linears, longest_patch
from tests.dpar.sampled import (
    CLASSES,
    WIDTH,
    N,
    Seen,
    V,
    dpar,
    forced,
    llamagen,
    unconditional,
    usual_entropy,
)
from tests.dpar.test_kv_cache import HEAD_DIM, HEADS, causal, tokens

CPU = torch.device("cpu")
SOME = settings(deadline=None, max_examples=25)
ROPES = st.sampled_from(get_args(PatchRope))
IMAGES = st.integers(1, 9)
RULES = st.one_of(
    st.builds(
        PatchRule,
        threshold=st.floats(1.5, 2.9),
        max_length=st.sampled_from([None, 1, 2, 4]),
        row_reset=st.booleans(),
    ),
    st.floats(1, 6).map(PatchRule.static),
)


def labels_of(images: int) -> Tensor:
    return torch.arange(images) % (CLASSES + 1)


class Sizes:
    """Records the numbers of images on which the patch transformer ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[tuple[int, int]] = []  # begun, size
        run = StaticPatchStepper._patches

        def noted(stepper: StaticPatchStepper, size: int, leading: bool, keys: int) -> None:
            self.used.append((int(stepper.starts.sum()), size))
            run(stepper, size, leading, keys)

        monkeypatch.setattr(StaticPatchStepper, "_patches", noted)


@SOME
@given(
    seed=st.integers(0, 1000),
    images=IMAGES,
    rule=RULES,
    rope=ROPES,
    encoder_layers=st.integers(1, 2),
    start_token=st.booleans(),
    decoder_start=st.sampled_from(["learned", "class"]),
    cfg_scale=st.sampled_from([1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9]),
)
def test_static_steppers_equal_cpu_steppers_and_teacher_forcing(
    seed: int,
    images: int,
    rule: PatchRule,
    rope: PatchRope,
    encoder_layers: int,
    start_token: bool,
    decoder_start: str,
    cfg_scale: float,
    top_p: float,
) -> None:
    model = dpar(
        seed,
        rope=rope,
        encoder_layers=encoder_layers,
        decoder_start=decoder_start,
    )
    entropy_model, labels = unconditional(seed + 1, start_token), labels_of(images)
    options, seen = SamplingOptions(cfg_scale=cfg_scale, top_p=top_p, seed=seed), Seen()
    codes, starts = Sampler(model, entropy_model, static=True).sample(labels, rule, options, observe=seen)
    torch.testing.assert_close(seen.logits(), forced(model, codes, labels, starts, cfg_scale), atol=1e-4, rtol=0)
    expected = Sampler(model, entropy_model).sample(labels, rule, options)
    assert torch.equal(codes, expected[0])
    assert torch.equal(starts, expected[1])


@SOME
@given(seed=st.integers(0, 1000), images=IMAGES, cfg_scale=st.sampled_from([1.0, 2.0]))
def test_the_static_llamagen_stepper_equals_the_cpu_stepper_and_teacher_forcing(
    seed: int, images: int, cfg_scale: float
) -> None:
    model, labels, seen = llamagen(seed), labels_of(images), Seen()
    options = SamplingOptions(cfg_scale=cfg_scale, seed=seed)
    codes, starts = Sampler(model, static=True).sample(labels, options=options, observe=seen)
    torch.testing.assert_close(seen.logits(), forced(model, codes, labels, starts, cfg_scale), atol=1e-4, rtol=0)
    assert torch.equal(codes, Sampler(model).sample(labels, options=options)[0])
    assert bool(starts.all())


@SOME
@given(share=st.floats(0, 1), seed=st.integers(0, 100), cfg_scale=st.sampled_from([1.0, 2.0]))
def test_known_tokens_are_kept_by_static_steppers_too(share: float, seed: int, cfg_scale: float) -> None:
    model, entropy_model, labels, rng = dpar(), unconditional(), labels_of(5), torch.Generator().manual_seed(seed)
    known = torch.randint(V, (5, N), generator=rng)
    keep = torch.rand(known.shape, generator=rng) < share
    rule, options = PatchRule(threshold=usual_entropy(entropy_model)), SamplingOptions(cfg_scale=cfg_scale, seed=seed)
    codes, starts = (
        Sampler(model, entropy_model, static=static).sample(labels, rule, options, known=known, keep=keep)
        for static in (True, False)
    )
    assert torch.equal(codes[0][keep], known[keep])
    assert torch.equal(codes[0], starts[0])
    assert torch.equal(codes[1], starts[1])


@SOME
@given(sizes=st.lists(IMAGES, min_size=2, max_size=5), batch=IMAGES, guided=st.booleans(), rule=RULES)
def test_a_sampler_gives_the_same_images_after_other_batches(
    sizes: list[int], batch: int, guided: bool, rule: PatchRule
) -> None:
    model, entropy_model, options = dpar(), unconditional(), SamplingOptions(cfg_scale=2.0 if guided else 1.0)
    kept = Sampler(model, entropy_model, static=True)
    for images in sizes:  # larger and smaller than the cached steppers
        found = kept.sample(labels_of(images), rule, options, batch=batch)
        fresh = Sampler(model, entropy_model, static=True).sample(labels_of(images), rule, options)
        assert torch.equal(found[0], fresh[0])
        assert torch.equal(found[1], fresh[1])


def test_a_sampler_reuses_its_steppers_for_batches_that_fit_but_not_for_other_guidance() -> None:
    sampler, rule = Sampler(dpar(), unconditional(), static=True), PatchRule(threshold=2.0)
    guided, plain = SamplingOptions(cfg_scale=2.0), SamplingOptions()
    sampler.sample(labels_of(8), rule, guided, batch=4)
    first = sampler._static_steppers.stepper
    sampler.sample(labels_of(3), PatchRule(threshold=2.4), SamplingOptions(cfg_scale=1.5), batch=4)
    assert sampler._static_steppers.stepper is first
    sampler.sample(labels_of(3), rule, plain, batch=4)
    assert sampler._static_steppers.stepper is not first


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_patch_transformer_runs_on_the_smallest_size_that_fits(
    batch: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, entropy_model = Sizes(monkeypatch), unconditional()
    rule = PatchRule(threshold=usual_entropy(entropy_model), row_reset=False, max_length=None)
    _, starts = Sampler(dpar(), entropy_model, static=True).sample(labels_of(batch), rule)
    assert [begun for begun, _ in seen.used] == [n for n in starts.sum(dim=0).tolist() if n]
    assert all(size == next(s for s in sizes if s >= begun) for begun, size in seen.used)


@pytest.mark.parametrize("family", [dpar, llamagen])
def test_steps_read_only_the_filled_part_of_caches_and_equal_the_cpu(
    family: Callable[..., DPAR | LlamaGen],
) -> None:
    model, labels = family(grid_height=6, grid_width=8), labels_of(3)
    rule, options = PatchRule.static(1.8), SamplingOptions(cfg_scale=2.0)
    sampler = Sampler(model, static=True)
    codes, _ = sampler.sample(labels, rule if family is dpar else None, options)
    assert torch.equal(codes, Sampler(model).sample(labels, rule if family is dpar else None, options)[0])
    stepper = sampler._static_steppers.stepper
    assert stepper is not None
    assert {("logits", 16), ("logits", 32), ("logits", 48)} <= stepper.graphs.warm


def test_padding_rows_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, entropy_model, labels = dpar(encoder_layers=2), unconditional(), labels_of(7)
    rule, options = PatchRule(threshold=usual_entropy(entropy_model)), SamplingOptions(cfg_scale=2.0)

    def logits(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        sampler, seen = Sampler(model, entropy_model, static=True), Seen()
        sampler._static_steppers.generator(labels, True, 4).sizes = sizes  # type: ignore[union-attr]
        codes, starts = sampler.sample(labels, rule, options, observe=seen)
        return codes, starts, seen.logits()

    padded, exact = logits([7]), logits([1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(padded[0], exact[0])
    assert torch.equal(padded[1], exact[1])
    torch.testing.assert_close(padded[2], exact[2], atol=1e-5, rtol=0)


def test_attention_token_by_token_equals_that_of_the_sequence() -> None:
    q, k, v = tokens(5, 40)
    cache = StaticCache(5, 40, HEADS, HEAD_DIM, CPU, torch.float32)
    places = [cache.together_at(torch.tensor([i]), cache.length(i)) for i in range(40)]
    out = torch.stack([cache.attend(place)(q[i], k[i], v[i]) for i, place in enumerate(places)])
    torch.testing.assert_close(out, causal(q, k, v), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(walk=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=40), padding=st.integers(0, 3))
def test_rows_at_different_positions_attend_to_their_own_past(walk: list[set[int]], padding: int) -> None:
    q, k, v = tokens(6, 40)  # the last row is padding
    whole, at, cache = causal(q, k, v), torch.zeros(6).long(), StaticCache(6, 40, HEADS, HEAD_DIM, CPU, torch.float32)
    for chosen in walk:
        rows = torch.tensor([*sorted(chosen), *[5] * padding])
        where = at[rows]
        places = cache.at_own(rows, where, cache.length(int(where.max())))
        out = cache.attend(places)(*(x[where, rows] for x in (q, k, v)))
        count = len(chosen)
        torch.testing.assert_close(out[:count], whole[where, rows][:count], atol=1e-5, rtol=0)
        at[rows[:count]] += 1


@SOME
@given(rule=RULES, seed=st.integers(0, 1000))
def test_the_rule_on_a_device_equals_the_rule_on_the_host(rule: PatchRule, seed: int) -> None:
    entropies = torch.rand(7, N, generator=torch.Generator().manual_seed(seed)) * 3
    on_device, on_host = StaticPatcher(rule, 7, N, WIDTH, CPU), OnlinePatcher(rule, 7, N, WIDTH)
    starts = []
    for i in range(N):
        entropy = entropies[:, i] if rule.needs_entropy else None
        starts.append(on_device.step(i, entropy))
        assert starts[-1].tolist() == on_host.step(i, entropy).tolist()
    longest = longest_patch(rule, N, WIDTH)
    for row in torch.stack(starts, dim=1):
        begins = [*row.nonzero().flatten().tolist(), N]
        assert max(end - begin for begin, end in pairwise(begins)) <= longest


def test_the_longest_patch_is_bounded_by_limit_row_or_image() -> None:
    assert longest_patch(PatchRule(threshold=2.0), 256, 16) == 4
    assert longest_patch(PatchRule(threshold=2.0, max_length=None), 256, 16) == 16
    assert longest_patch(PatchRule(threshold=2.0, max_length=None, row_reset=False), 256, 16) == 256
    assert longest_patch(PatchRule.static(1.81), 256, 16) == 2
    assert static_starts(256, 1.81).sum() >= 256 / 2


@pytest.mark.parametrize("family", ["dpar", "llamagen"])
def test_half_linears_equal_autocast(family: str) -> None:
    model: Any = dpar() if family == "dpar" else llamagen()
    half = half_linears(model, torch.bfloat16)
    assert all(isinstance(m, HalfLinear) for m in half.modules() if isinstance(m, torch.nn.Linear))
    assert half.tok_embeddings.weight is model.tok_embeddings.weight
    assert model.output.weight.dtype == torch.float32  # the model is unchanged
    codes, extra = torch.randint(V, (3, N)), (torch.ones(3, N, dtype=torch.bool),) if family == "dpar" else ()
    with torch.no_grad():
        found = half(codes, None, *extra)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(codes, None, *extra)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_under_autocast_static_steppers_use_bfloat16_and_are_close_to_teacher_forcing() -> None:
    model, entropy_model, labels, seen = dpar(), unconditional(), labels_of(4), Seen()
    sampler = Sampler(model, entropy_model, static=True)
    with torch.autocast("cpu", torch.bfloat16):
        codes, starts = sampler.sample(labels, PatchRule(threshold=2.0), observe=seen)
    stepper = sampler._static_steppers.stepper
    assert isinstance(stepper, StaticPatchStepper)
    assert {cache.k.dtype for cache in (*stepper.patch_cache, *stepper.decoder_cache)} == {torch.bfloat16}
    torch.testing.assert_close(seen.logits(), forced(model, codes, labels, starts, 1.0), atol=0.1, rtol=0)


class FakeGraph:
    """Replaces a CUDA graph: counts captures, and runs the captured function on replay."""

    def __init__(self, step: Any) -> None:
        self.replay = step


def test_a_step_warms_up_is_captured_once_and_takes_effect_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[FakeGraph] = []

    def capture(graphs: Graphs, step: Any) -> FakeGraph:
        captured.append(FakeGraph(step))
        return captured[-1]

    monkeypatch.setattr(Graphs, "_capture", capture)
    graphs, done = Graphs(torch.device("cuda")), {"a": 0, "b": 0}

    def step(key: str) -> None:
        done[key] += 1

    for runs in range(1, 6):
        for key in done:
            graphs.run(key, lambda key=key: step(key))  # type: ignore[misc]
            assert done[key] == runs
        assert len(captured) == (0 if runs == 1 else 2)


def test_graphs_call_steps_directly_on_a_cpu_and_when_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphs, "_capture", lambda *_: pytest.fail("captured"))
    for graphs in (Graphs(CPU), Graphs(torch.device("cuda"), enabled=False)):
        done: list[int] = []
        for i in range(4):
            graphs.run("step", lambda i=i, done=done: done.append(i))  # type: ignore[misc]
        assert done == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["dpar", "llamagen"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_graphs_on_a_gpu_equal_plain_steps_and_the_cpu(family: str, cfg_scale: float) -> None:
    model: DPAR | LlamaGen = dpar() if family == "dpar" else llamagen()
    entropy_model, labels = unconditional(), labels_of(6)
    rule, options = PatchRule(threshold=usual_entropy(entropy_model)), SamplingOptions(cfg_scale=cfg_scale)
    expected = Sampler(model, entropy_model).sample(labels, rule, options)
    for graphs in (True, False):
        sampler = Sampler(model.cuda(), entropy_model.cuda(), graphs=graphs)
        for _ in range(2):
            codes, starts = sampler.sample(labels, rule, options, batch=4)
            assert torch.equal(codes.cpu(), expected[0])
            assert torch.equal(starts.cpu(), expected[1])

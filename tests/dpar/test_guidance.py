"""Drawing a token from logits, and classifier-free guidance."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpar import SamplingOptions
from dpar.guidance import draw, keep_likeliest, uniforms
from tests.dpar.sampled import CLASSES, LABELS, N, Seen, forced, llamagen, sample_with

LAST_BELOW_ONE = 1 - 2**-53  # the largest number that a uniform generator gives


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
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator)
    u = torch.rand(500, dtype=torch.float64, generator=generator)
    cooled = draw(logits, u, SamplingOptions(temperature=0.25))
    assert cooled.tolist() == draw(logits * 4, u, SamplingOptions()).tolist()
    assert cooled.tolist() != draw(logits, u, SamplingOptions()).tolist()


def test_temperature_zero_takes_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    u = torch.rand(50, dtype=torch.float64, generator=generator)
    assert draw(logits, u, SamplingOptions(temperature=0)).tolist() == logits.argmax(-1).tolist()


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

"""The cost of a sampled token on a GPU: waits of the host, kernels and launches."""

from typing import Any

import pytest
import torch

from dpar import DPAR, LlamaGen, PatchRule, SamplingOptions
from dpar.sampling import Sampler
from tests.cuda.shadow import Counts, shadow_cuda
from tests.dpar.sampled import LABELS, N, dpar, llamagen, unconditional, usual_entropy

PER_BATCH = 2  # waits at the start of a batch: for labels and noise
OPTIONS = SamplingOptions(cfg_scale=2.0)


def cost_of_a_batch(model: DPAR | LlamaGen, entropy_model: LlamaGen | None, rule: PatchRule | None) -> Counts:
    """Return the counts of the third batch, when every step has been captured."""
    with shadow_cuda() as counts, torch.autocast("cuda", torch.bfloat16):
        sampler = Sampler(model.to("cuda"), None if entropy_model is None else entropy_model.to("cuda"))
        for _ in range(3):
            counts.kernels.clear()
            counts.waits.clear()
            counts.launches = 0
            sampler.sample(LABELS, rule, OPTIONS)
    return counts


@pytest.fixture(scope="module")
def dpar_b() -> Counts:
    """Counts for tiny models with the layers of DPAR-B and llamagen-b: only layers determine the number of kernels."""
    entropy_model = llamagen(1, classes=0, start_token=False, layers=12)
    rule = PatchRule(threshold=usual_entropy(entropy_model))
    return cost_of_a_batch(dpar(encoder_layers=1, patch_layers=8, decoder_layers=3), entropy_model, rule)


@pytest.fixture(scope="module")
def llamagen_b() -> Counts:
    return cost_of_a_batch(llamagen(layers=12), None, None)


def test_dpar_waits_for_the_device_at_most_once_per_token(dpar_b: Counts) -> None:
    assert sum(dpar_b.waits.values()) <= N + PER_BATCH


def test_llamagen_never_waits_for_the_device_between_tokens(llamagen_b: Counts) -> None:
    assert sum(llamagen_b.waits.values()) <= PER_BATCH


def test_a_static_rule_waits_for_the_device_at_most_once_per_token() -> None:
    counts = cost_of_a_batch(dpar(), None, PatchRule.static(1.81))
    assert sum(counts.waits.values()) <= N + PER_BATCH


@pytest.mark.parametrize(("family", "kernels", "launches"), [("dpar", 620, 33), ("llamagen", 275, 23)])
def test_kernels_and_launches_per_token_stay_within_bounds(
    family: str, kernels: int, launches: int, dpar_b: Counts, llamagen_b: Counts
) -> None:
    counts: Any = dpar_b if family == "dpar" else llamagen_b
    assert sum(counts.kernels.values()) / N <= kernels
    assert counts.launches / N <= launches


def test_without_autocast_and_with_top_p_there_is_at_most_one_wait_per_token() -> None:
    entropy_model = unconditional()
    rule = PatchRule(threshold=usual_entropy(entropy_model))
    with shadow_cuda() as counts:
        sampler = Sampler(dpar().to("cuda"), entropy_model.to("cuda"))
        for _ in range(2):
            counts.waits.clear()
            sampler.sample(LABELS, rule, SamplingOptions(cfg_scale=2.0, top_k=10, top_p=0.9))
    assert sum(counts.waits.values()) <= N + PER_BATCH

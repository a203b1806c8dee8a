import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpar import ModelError, patch_starts, static_starts, stored_entropy, token_entropy
from dpar.patching import BLOCK, PatchRule

QUICK = settings(deadline=None, max_examples=150)
THRESHOLDS = [0.0, 0.5, 1.0, 2.25, math.inf, -math.inf]
# few values, so that many entropies equal the threshold
ENTROPIES = st.one_of(st.sampled_from([*THRESHOLDS, 0.3, 7.8]), st.floats(0, 9.75, width=16))
LENGTHS = st.one_of(st.none(), st.integers(1, 6), st.integers(30, 1000))


def by_the_rule(h: Any, threshold: float, max_length: int | None, grid_width: int, row_reset: bool) -> list[bool]:
    starts: list[bool] = []
    run = 0
    for i in range(len(h)):
        start = i <= 1 or np.float32(h[i]) > np.float32(threshold) or run == max_length
        start = bool(start or (row_reset and i % grid_width == 0))
        run = 1 if start else run + 1
        starts.append(start)
    return starts


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "threshold": draw(st.one_of(st.sampled_from(THRESHOLDS), st.floats(0, 9.7))),
        "max_length": draw(LENGTHS),
        "grid_width": draw(st.integers(1, 9)),
        "row_reset": draw(st.booleans()),
    }


@st.composite
def entropies(draw: st.DrawFn) -> NDArray[np.float16]:
    images, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    values = draw(st.lists(ENTROPIES, min_size=images * n, max_size=images * n))
    return np.array(values, dtype=np.float16).reshape(images, n)


@QUICK
@given(entropies(), rules())
def test_starts_of_arrays_follow_the_rule(h: NDArray[np.float16], rule: dict[str, Any]) -> None:
    starts = patch_starts(h, **rule)
    assert starts.dtype == np.bool_
    assert starts.tolist() == [by_the_rule(row, **rule) for row in h]


@QUICK
@given(entropies(), rules())
def test_starts_of_tensors_equal_those_of_arrays(h: NDArray[np.float16], rule: dict[str, Any]) -> None:
    starts = patch_starts(torch.from_numpy(h), **rule)
    assert starts.dtype == torch.bool
    np.testing.assert_array_equal(starts.numpy(), patch_starts(h, **rule))


@QUICK
@given(entropies(), rules())
def test_starts_do_not_depend_on_the_float_type_of_entropies(h: NDArray[np.float16], rule: dict[str, Any]) -> None:
    stored = patch_starts(h, **rule)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(patch_starts(h.astype(dtype), **rule), stored)
        np.testing.assert_array_equal(patch_starts(torch.from_numpy(h.astype(dtype)), **rule).numpy(), stored)


def test_an_entropy_equal_to_the_threshold_starts_no_patch() -> None:
    at, above = np.float32(7.8), np.nextafter(np.float32(7.8), np.float32(9))
    h = np.array([0, 0, at, above, at], dtype=np.float32)
    assert patch_starts(h, 7.8, None, 16, row_reset=False).tolist() == [True, True, False, True, False]


def test_tokens_0_and_1_start_patches_whatever_their_entropy() -> None:
    starts = patch_starts(np.zeros(8, np.float32), math.inf, None, 8)
    assert np.flatnonzero(starts).tolist() == [0, 1]
    assert patch_starts(np.zeros(1, np.float32), math.inf, None, 8).tolist() == [True]


def test_the_width_of_the_grid_has_no_default() -> None:
    with pytest.raises(TypeError, match="grid_width"):
        patch_starts(np.zeros(8, np.float32), 7.8, 4)  # type: ignore[call-overload]


def test_arguments_are_not_modified() -> None:
    h = np.array([[0.0, 1.0, 5.0]], dtype=np.float32)
    tensor = torch.from_numpy(h.copy())
    patch_starts(h, 2.0, 4, 16)
    patch_starts(tensor, 2.0, 4, 16)
    stored_entropy(tensor)
    assert h.tolist() == tensor.tolist() == [[0.0, 1.0, 5.0]]


def test_leading_dimensions_are_images() -> None:
    h = np.random.default_rng(0).uniform(0, 9.7, (2, 3, 4, 20)).astype(np.float32)
    starts = patch_starts(h, 7.0, 3, 5)
    tensors = patch_starts(torch.from_numpy(h), 7.0, 3, 5)
    assert starts.shape == tensors.shape == h.shape
    for place in np.ndindex(2, 3, 4):
        assert starts[place].tolist() == patch_starts(h[place], 7.0, 3, 5).tolist() == tensors[place].tolist()


def test_images_of_more_than_32767_tokens_follow_the_rule() -> None:
    h = np.random.default_rng(0).uniform(0, 1, 40_000).astype(np.float16)
    assert patch_starts(h, 0.999, 7, 200, True).tolist() == by_the_rule(h, 0.999, 7, 200, True)


# Table 3 of the paper: each row of it, as settings of patch_starts and static_starts.


def test_boundaries_of_an_image_do_not_depend_on_the_chunk_size() -> None:
    h = np.random.default_rng(0).uniform(0, 9.7, (2 * BLOCK // 96 + 3, 96)).astype(np.float16)
    whole = patch_starts(h, 7.8, 4, 16)
    np.testing.assert_array_equal(
        whole, np.concatenate([patch_starts(part, 7.8, 4, 16) for part in np.array_split(h, 7)])
    )
    assert whole[-1].tolist() == by_the_rule(h[-1], 7.8, 4, 16, True)


def test_table_3_row_1_static_patches_need_no_entropy() -> None:
    h = np.random.default_rng(1).uniform(0, 9.7, 64).astype(np.float32)
    starts = patch_starts(h, math.inf, 4, 16, row_reset=False)
    assert starts.tolist() == [i == 0 or i % 4 == 1 for i in range(64)]
    assert static_starts(64, 4).tolist() == [i % 4 == 0 for i in range(64)]


def test_table_3_row_2_entropy_alone() -> None:
    h = np.random.default_rng(2).uniform(0, 9.7, 64).astype(np.float32)
    expected = h > 7.8
    expected[:2] = True
    assert patch_starts(h, 7.8, None, 16, row_reset=False).tolist() == expected.tolist()


def test_table_3_row_3_entropy_and_length() -> None:
    h = np.array([0, 9, 0, 0, 0, 0, 9, 0, 0, 0], dtype=np.float32)
    starts = patch_starts(h, 7.8, 3, 4, row_reset=False)
    assert np.flatnonzero(starts).tolist() == [0, 1, 4, 6, 9]


def test_table_3_row_4_entropy_length_and_rows() -> None:
    h = np.array([0, 9, 0, 0, 0, 0, 9, 0, 0, 0], dtype=np.float32)
    starts = patch_starts(h, 7.8, 3, 4, row_reset=True)
    assert np.flatnonzero(starts).tolist() == [0, 1, 4, 6, 8]


def test_row_reset_alone_gives_one_patch_per_row_after_the_first_token() -> None:
    starts = patch_starts(np.zeros(15, np.float32), math.inf, None, 5, row_reset=True)
    assert np.flatnonzero(starts).tolist() == [0, 1, 5, 10]


@QUICK
@given(st.integers(1, 600), st.integers(100, 900).map(lambda x: x / 100))
def test_static_starts_follow_their_formula(n: int, length: float) -> None:
    starts = static_starts(n, length)
    assert starts.tolist() == [math.floor(i / length) != math.floor((i - 1) / length) for i in range(n)]
    assert starts.sum() == math.floor((n - 1) / length) + 1
    lengths = np.diff(np.flatnonzero(starts))  # of all patches but the last
    assert set(lengths.tolist()) <= {math.floor(length), math.ceil(length)}


def test_256_tokens_have_141_static_patches_of_length_1_81() -> None:
    starts = static_starts(256, 1.81)
    assert starts.sum() == 141
    assert 256 / starts.sum() == pytest.approx(1.81, rel=0.01)


@QUICK
@given(entropies(), rules())
def test_online_boundaries_equal_those_of_stored_entropies(h: NDArray[np.float16], rule: dict[str, Any]) -> None:
    # a full-precision entropy near a threshold: only its rounding decides
    exact = torch.from_numpy(h.astype(np.float32)) * (1 + 1e-5)
    n = exact.shape[1]
    grid_width = rule.pop("grid_width")
    patcher = PatchRule(**rule).online(len(exact), n, grid_width)
    online = np.stack([patcher.step(i, exact[:, i] if i else None) for i in range(n)], axis=1)
    assert online.tolist() == patch_starts(stored_entropy(exact), grid_width=grid_width, **rule).tolist()


def test_online_boundaries_without_entropies_follow_length_and_rows() -> None:
    patcher = PatchRule(threshold=math.inf, max_length=3).online(2, 15, grid_width=5)
    online = np.stack([patcher.step(i, None) for i in range(15)], axis=1)
    expected = patch_starts(np.zeros((2, 15), np.float32), math.inf, 3, 5)
    assert online.tolist() == expected.tolist()


@QUICK
@given(st.integers(1, 100), st.integers(100, 500).map(lambda x: x / 100))
def test_online_static_boundaries_equal_static_starts(n: int, length: float) -> None:
    patcher = PatchRule.static(length).online(3, n, grid_width=16)
    online = np.stack([patcher.step(i, torch.ones(3)) for i in range(n)], axis=1)
    assert online.tolist() == [static_starts(n, length).tolist()] * 3


@QUICK
@given(entropies(), rules())
def test_a_rule_gives_the_starts_of_the_function(h: NDArray[np.float16], values: dict[str, Any]) -> None:
    grid_width = values.pop("grid_width")
    rule = PatchRule(**values)
    expected = patch_starts(h, grid_width=grid_width, **values)
    np.testing.assert_array_equal(rule.starts(h, grid_width), expected)
    np.testing.assert_array_equal(rule.starts(torch.from_numpy(h), grid_width).numpy(), expected)


def test_a_static_rule_gives_every_image_the_same_starts() -> None:
    h, expected = np.zeros((2, 3, 20), np.float16), static_starts(20, 1.81)
    for starts in (PatchRule.static(1.81).starts(h, 5), PatchRule.static(1.81).starts(torch.from_numpy(h), 5).numpy()):
        assert starts.shape == h.shape
        assert (starts == expected).all()


@pytest.mark.parametrize(
    "rule", [PatchRule(threshold=7.8), PatchRule(max_length=None, row_reset=False), PatchRule.static(1.81)]
)
def test_a_rule_loads_from_its_record_and_ignores_other_fields(rule: PatchRule) -> None:
    record = json.loads(json.dumps(rule.to_dict() | {"tokenizer": "vq"}))
    assert PatchRule.from_dict(record) == rule


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"strategy": "random"}, "strategy is 'random'; it must be one of entropy, static"),
        ({"strategy": "static", "max_length": None, "row_reset": False}, "a static rule needs static_length"),
        ({"strategy": "static", "static_length": 2.0}, "a static rule has no threshold, max_length or row_reset"),
        ({"static_length": 2.0}, "static_length belongs to a static rule"),
    ],
)
def test_invalid_values_of_a_rule_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        PatchRule(**values)


def test_a_rule_without_a_threshold_places_no_patches() -> None:
    with pytest.raises(ModelError, match="the rule has no threshold; give one, in nats"):
        PatchRule().starts(np.zeros(4, np.float32), 2)
    with pytest.raises(ModelError, match="the rule has no threshold"):
        PatchRule().online(1, 4, 2)


def test_entropies_are_needed_unless_the_rule_is_static_or_its_threshold_is_infinite() -> None:
    assert PatchRule(threshold=7.8).needs_entropy
    assert PatchRule().needs_entropy
    assert not PatchRule(threshold=math.inf).needs_entropy
    assert not PatchRule.static(2).needs_entropy


def test_stored_entropy_is_float16_with_an_infinite_first() -> None:
    stored = stored_entropy(torch.tensor([[1.0, 7.8001, 2.0]]))
    assert stored.dtype == torch.float16
    assert stored.tolist() == [[math.inf, float(np.float16(7.8001)), 2.0]]


@pytest.mark.parametrize("size", [2, 512, 16384])
def test_entropy_of_equal_logits_is_ln_v(size: int) -> None:
    assert token_entropy(torch.full((3, size), 2.5)).tolist() == pytest.approx([math.log(size)] * 3, abs=1e-4)


def test_entropy_of_certainty_is_zero() -> None:
    logits = torch.full((4, 512), -1e4)
    logits[range(4), range(4)] = 0
    certain = torch.full((1, 8), -math.inf)
    certain[0, 3] = 0
    assert token_entropy(logits).tolist() == [0.0] * 4
    assert token_entropy(certain).tolist() == [0.0]


def test_entropy_is_that_of_the_distribution_in_nats() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    entropy = token_entropy(torch.from_numpy(np.log(p)).to(torch.float64))
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(1.75 * math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("settings_", "fault"),
    [
        ({"threshold": 1.0, "max_length": 0}, "max_length is 0"),
        ({"threshold": 1.0, "max_length": -3}, "max_length is -3"),
        ({"threshold": 1.0, "grid_width": 0}, "grid_width is 0"),
        ({"threshold": math.nan}, "threshold is not a number"),
    ],
)
def test_a_bad_rule_is_refused_by_name(settings_: dict[str, Any], fault: str) -> None:
    h = np.zeros(8, np.float32)
    settings_ = {"max_length": 4, "grid_width": 16} | settings_
    with pytest.raises(ValueError, match=fault):
        patch_starts(h, **settings_)
    with pytest.raises(ValueError, match=fault):
        patch_starts(torch.from_numpy(h), **settings_)
    with pytest.raises(ValueError, match=fault):
        PatchRule(**{k: v for k, v in settings_.items() if k != "grid_width"}).online(1, 8, settings_["grid_width"])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_entropies_without_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no tokens: its shape is \("):
        patch_starts(np.zeros(shape, np.float32), 1.0, 4, 16)
    with pytest.raises(ValueError, match=r"no tokens: its shape is \("):
        patch_starts(torch.zeros(shape), 1.0, 4, 16)


@pytest.mark.parametrize("length", [0.99, 0.0, -2.0, math.nan, math.inf])
def test_a_bad_static_length_is_refused_by_value(length: float) -> None:
    with pytest.raises(ValueError, match=f"length is {length}"):
        static_starts(16, length)


def test_static_patches_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="n_tokens is 0"):
        static_starts(0, 2.0)

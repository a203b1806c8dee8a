"""`dpar patchify --target-length`: the threshold that gives a mean patch length."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpar import LlamaGen
from dpar.patching import PatchRule, patch_starts
from pipeline.patchify import find_threshold
from pipeline.runtime.errors import StageError
from tests.pipeline.patchified import GRID, N, Said, build_codes, entropy_of, run, save_inputs, starts_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("target", [1.2, 1.81, 2.5])
def test_a_target_length_is_reached_within_one_percent_on_all_data(home: Path, tmp_path: Path, target: float) -> None:
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), target_length=target)
    starts = starts_of(tmp_path / "a")
    assert starts.size / starts.sum() == pytest.approx(target, rel=0.01)
    expected = patch_starts(entropy_of(tmp_path / "a"), manifest.settings["threshold"], 4, GRID[1], True)
    np.testing.assert_array_equal(starts, expected)


def test_a_target_length_is_reached_from_a_sample_of_the_images_too(home: Path, tmp_path: Path) -> None:
    build_codes(tmp_path / "codes", sizes=(900, 600), views=1)
    model = str(home / "entropy")
    run(tmp_path / "codes", tmp_path / "a", entropy_model=model, target_length=1.81, sample=500)
    starts = starts_of(tmp_path / "a")
    assert starts.size / starts.sum() == pytest.approx(1.81, rel=0.01)


@pytest.mark.parametrize(
    ("rule", "longest"),
    [({}, "2.667"), ({"row_reset": False}, "3.429"), ({"max_length": 2}, "1.846"), ({"max_length": 1}, "1.000")],
)
def test_a_target_length_out_of_reach_is_refused_with_the_range(
    home: Path, tmp_path: Path, rule: dict[str, Any], longest: str
) -> None:
    with pytest.raises(StageError, match=rf"--target-length 4\.5 cannot be reached.*lengths from 1 to {longest}"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), target_length=4.5, **rule)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("row_reset", "target"), [(True, 4.7), (False, 11.0)])
def test_without_a_limit_patches_reach_to_the_end_of_a_row_or_of_the_image(
    home: Path, tmp_path: Path, row_reset: bool, target: float
) -> None:
    rule = {"target_length": target, "max_length": 0, "row_reset": row_reset}
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), **rule)
    assert manifest.statistics["mean_length"] == pytest.approx(target, rel=0.05)


def test_a_target_length_of_one_is_refused_with_the_option_to_use(home: Path, tmp_path: Path) -> None:
    model = str(home / "entropy")
    with pytest.raises(StageError, match=r"--target-length 1 makes every token its own patch; give --max-length 1"):
        run(home / "arrow", tmp_path / "a", entropy_model=model, target_length=1.0)
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=model, target_length=1.0, max_length=1)
    assert manifest.statistics["mean_length"] == 1


def test_a_model_with_constant_entropies_is_one_message(home: Path, tmp_path: Path) -> None:
    LlamaGen(LlamaGen.from_pretrained(home / "entropy").config).save_pretrained(tmp_path / "new")  # its head is zero
    with pytest.raises(StageError, match=r"--target-length 2 cannot be reached"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(tmp_path / "new"), target_length=2.0)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(2, 5)),
    st.booleans(),
    st.floats(1, 3),
)
def test_no_other_threshold_is_closer_to_the_target_length(
    seed: int, levels: int, max_length: int | None, row_reset: bool, target: float
) -> None:
    entropy = (np.random.default_rng(seed).integers(1, levels + 1, (3, N)) / 2).astype(np.float16)
    entropy[:, 0] = np.inf

    def length(threshold: float) -> float:
        return entropy.size / int(patch_starts(entropy, threshold, max_length, GRID[1], row_reset).sum())

    reachable = [length(threshold) for threshold in np.arange(levels + 1) / 2]
    try:
        found = find_threshold(entropy, target, PatchRule(max_length=max_length, row_reset=row_reset), GRID[1])
    except StageError:
        assert target > 1.01 * max(reachable)
        return
    assert found.length == length(found.value)
    assert found.deviation(target) == pytest.approx(min(abs(one / target - 1) for one in reachable))


def test_an_unrepresentative_sample_is_reported_with_a_better_threshold(home: Path, tmp_path: Path) -> None:
    said = Said()
    run(home / "arrow", tmp_path / "a", progress=said, entropy_model=str(home / "entropy"), target_length=2.0, sample=1)
    match = re.search(r"the sample of 1 was not representative\..* --threshold ([\d.]+)` moves", said.text)
    assert match, said.text
    moved = run(tmp_path / "a", tmp_path / "b", threshold=float(match[1]))
    assert moved.statistics["mean_length"] == pytest.approx(2.0, rel=0.01)


def test_an_unreachable_target_length_is_reported(home: Path, tmp_path: Path) -> None:
    build_codes(tmp_path / "codes", sizes=(1,), views=1)
    said = Said()
    run(tmp_path / "codes", tmp_path / "a", progress=said, entropy_model=str(home / "entropy"), target_length=2.1)
    # 24 tokens in 11 or in 12 patches
    assert "3.9% from --target-length 2.1; no threshold comes closer, the next one gives 2.000" in said.text

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cli import in_this_process
from pipeline.boundary_agreement import COMPARISON, compare, lines
from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import PatchifySettings
from shards.reader import open_artifact
from tests.pipeline.patchified import GRID, QUIET, N, build_codes, run, save_entropy_run, save_model

ROWS = 33


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compared")
    save_model(home / "large")
    save_model(home / "small", seed=1)
    build_codes(home / "codes")
    return home


def chosen(home: Path, models: tuple[str, str] = ("large", "small"), **values: Any) -> PatchifySettings:
    names = (str(home / models[0]), str(home / models[1]))
    return PatchifySettings(**{"compare": names, "device": "cpu", "precision": "fp32", **values})


def starts(home: Path, model: str, threshold: float, out: Path) -> NDArray[np.bool_]:
    """Return the boundaries of view ``i`` of image ``i`` as `dpar patchify` writes them."""
    run(home / "codes", out, entropy_model=str(home / model), threshold=threshold)
    found = open_artifact(out).gather(*np.divmod(np.arange(2 * ROWS), 2)).starts
    assert found is not None
    return found


def test_agreement_is_computed_on_the_boundaries_of_patchify(home: Path, tmp_path: Path) -> None:
    found = compare(home / "codes", tmp_path / "out", chosen(home, threshold=2.0), QUIET)
    first, second = (starts(home, model, 2.0, tmp_path / model) for model in ("large", "small"))
    assert [model["mean_length"] for model in found["models"]] == [first.size / first.sum(), second.size / second.sum()]
    agreed = total = both = either = 0
    rates: tuple[list[bool], list[bool]] = ([], [])
    for a, b in zip(first, second, strict=True):
        for i in range(N):
            if i % GRID[1]:
                total += 1
                agreed += a[i] == b[i]
                both += a[i] and b[i]
                either += a[i] or b[i]
                rates[0].append(a[i])
                rates[1].append(b[i])
    p, q = np.mean(rates[0]), np.mean(rates[1])
    chance = p * q + (1 - p) * (1 - q)
    assert found["agreement"] == pytest.approx(agreed / total)
    assert found["shared_starts"] == pytest.approx(both / either)
    assert found["agreement_by_chance"] == pytest.approx(chance)
    assert 0 < found["agreement"] < 1
    assert json.loads((tmp_path / "out" / COMPARISON).read_text()) == found


def test_a_model_agrees_with_itself(home: Path, tmp_path: Path) -> None:
    found = compare(home / "codes", tmp_path / "out", chosen(home, ("large", "large"), target_length=1.5), QUIET)
    assert found["agreement"] == found["shared_starts"] == 1.0
    assert found["entropy_correlation"] == pytest.approx(1.0)


def test_each_model_gets_the_threshold_for_the_requested_length(home: Path, tmp_path: Path) -> None:
    found = compare(home / "codes", tmp_path / "out", chosen(home, target_length=1.5), QUIET)
    one, other = found["models"]
    assert one["threshold"] != other["threshold"]
    assert one["mean_length"] == pytest.approx(1.5, rel=0.01)
    assert other["mean_length"] == pytest.approx(1.5, rel=0.01)


def test_the_command_prints_both_models_and_writes_no_artifact(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(home / "large"), str(home / "small")]
    in_this_process(
        ["patchify", str(home / "codes"), str(tmp_path / "out"), "--compare", *models, "--target-length", "1.5"]
    )
    said = capsys.readouterr().out
    assert all(f"{model}: " in said for model in models)
    assert "they agree on" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [COMPARISON]


def test_a_model_of_another_codebook_is_refused(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", codebook_size=64)
    settings = chosen(home, threshold=3.0, compare=(str(home / "large"), str(tmp_path / "other")))
    with pytest.raises(StageError, match="its codebook size is 32, the model's 64"):
        compare(home / "codes", tmp_path / "out", settings, QUIET)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_tokenizer_is_refused_before_any_is_measured(home: Path, tmp_path: Path) -> None:
    other = save_entropy_run(tmp_path / "run", {"path": "other/vq", "fingerprint": "ab" * 32})
    settings = chosen(home, threshold=3.0, compare=(str(home / "large"), str(other)))
    with pytest.raises(StageError, match=r"run was trained on codes of the tokenizer other/vq \(abababababab\)"):
        compare(home / "codes", tmp_path / "out", settings, QUIET)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_entropies_are_all_equal_has_no_correlation(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "even", std=0.0)
    settings = chosen(home, threshold=3.0, compare=(str(home / "large"), str(tmp_path / "even")))
    found = compare(home / "codes", tmp_path / "out", settings, QUIET)
    assert found["entropy_correlation"] is None
    assert json.loads((tmp_path / "out" / COMPARISON).read_text()) == found
    assert "entropy correlation undefined" in lines(found)[-1]


@pytest.mark.parametrize(
    "wrong", [{"entropy_model": "e"}, {"strategy": "static", "static_length": 2.0, "threshold": None}]
)
def test_settings_incompatible_with_a_comparison_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="--compare"):
        PatchifySettings(**{"compare": ("a", "b"), "threshold": 1.0, **wrong})

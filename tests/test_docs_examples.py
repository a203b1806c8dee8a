"""The Python examples of docs/ that train and evaluate run unchanged."""

import math
from pathlib import Path
from typing import Any

import pytest

from dpar import DPAR
from tests.pipeline.sampled import V, save_home
from tests.test_readme import ROOT, blocks


def test_the_training_loop_of_the_documentation_is_25_lines_and_trains_dpar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block for block in blocks(ROOT / "docs" / "training.md", "python") if "ArtifactDataset" in block)
    assert len([line for line in code.splitlines() if line]) <= 25
    save_home(tmp_path, ("bird", "cat"), a_class=16)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["loss"].item() < math.log(V) - 0.01  # of a model that knows nothing
    assert DPAR.from_pretrained("model").config == names["model"].config


@pytest.mark.slow
def test_the_example_of_the_documentation_goes_from_images_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "example.md", "python"):
        exec(compile(block, "docs/example.md", "exec"), names)
    assert len(names["drawn"].images) == 4
    assert names["fewer"].patches < names["patched"].patches
    run, continued = (names["scores"][name].newest for name in ("run", "continued"))
    assert continued.bits_per_token < run.bits_per_token < math.log2(1024)  # of a model that knows nothing
    assert run.bits_per_token_interval is not None
    assert all(cell.scores for results in names["scores"].values() for cell in results.cells)
    assert (tmp_path / "scores-run/cells/cfg-2/nearest.png").is_file()

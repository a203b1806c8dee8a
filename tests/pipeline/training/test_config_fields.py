"""`dpar train --set`: fields of the model's config."""

import json
from pathlib import Path

import pytest

from dpar.errors import ModelError
from pipeline.runtime.errors import StageError
from tests.pipeline.trained import build, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def test_set_changes_fields_of_the_models_config(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", set=("width=64", "heads=2", "rope=2d"), steps=1)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["width"], config["heads"]) == (64, 2)
    assert config["rope"] == "2d"


def test_a_run_does_not_resume_under_other_set_fields(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", set=("width=64", "heads=2"), steps=1)
    with pytest.raises(StageError, match=r"set was \['width=64', 'heads=2'\] and is now \['width=32', 'heads=2'\]"):
        run(patches, tmp_path / "run", set=("width=32", "heads=2"), steps=1)


def test_runs_without_set_do_not_record_it(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", steps=1)
    assert "set" not in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["settings"]


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("width", "is not field=value"),
        ("widht=64", "dpar-tiny has no field 'widht'; did you mean 'width'"),
        ("width=wide", "it must be a whole number"),
        ("rope=3d", "it must be one of dynamic, dynamic-compact, 2d"),
        ("classes=3", "classes follows from the data"),
        ("dropout=0.2", "use --dropout instead"),
        ("patch_layers=0", "patch_layers is 0; it must be at least 1"),
    ],
)
def test_a_field_that_cannot_be_set_is_one_message(patches: Path, tmp_path: Path, field: str, says: str) -> None:
    with pytest.raises((StageError, ModelError), match=says):
        run(patches, tmp_path / "run", set=(field,))
    assert not (tmp_path / "run").exists()

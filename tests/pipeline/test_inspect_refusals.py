"""Artifacts, outputs and settings that `dpar inspect` refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import InspectSettings
from shards.errors import ArtifactError
from tests.pipeline.inspections import build, look, save_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


def test_verify_names_every_damaged_shard(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    assert look(artifact, verify=True)["verified"]
    shard = artifact / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"1 of 2 shards.*00001\.arrow.*rerun the command that made it"):
        look(artifact, verify=True)
    (artifact / "00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"2 of 2 shards.*00000\.arrow.*00001\.arrow"):
        look(artifact, verify=True)


def test_patches_without_class_statistics_are_refused_with_a_remedy(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["statistics"]["classes"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StageError, match=r"lacks statistics of its classes.*dpar patchify"):
        look(artifact)


def test_unknown_keys_and_classes_are_refused_with_near_matches(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    with pytest.raises(StageError, match=r"no image 'cat/9\.png'.*did you mean 'cat/"):
        look(artifact, tmp_path / "look", keys=("cat/9.png",))
    with pytest.raises(StageError, match=r"no class 'cats'.*did you mean 'cat'"):
        look(artifact, tmp_path / "look", classes=("cats",))


def test_nothing_is_written_into_an_artifact_or_over_a_file(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    (tmp_path / "file").write_text("")
    for out in (artifact, artifact / "look"):
        with pytest.raises(StageError, match="part of an artifact"):
            look(artifact, out)
    with pytest.raises(StageError, match="is a file"):
        look(artifact, tmp_path / "file")


def test_anything_but_an_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact"):
        look(tmp_path)


@pytest.mark.parametrize("wrong", [{"images": -1}, {"batch": 0}, {"threshold": (float("nan"),)}])
def test_invalid_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="|".join(wrong)):
        InspectSettings(**wrong)


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "a threshold of words": ({"settings": {"threshold": "7"}}, "field settings.threshold is '7', expected a finite"),
    "an endless limit": ({"settings": {"max_length": -1}}, "field settings is not a patch rule: max_length is -1"),
    "a static rule without a length": (
        {"settings": {"strategy": "static"}},
        "is not a patch rule: a static rule needs",
    ),
    "settings of codes in a list": ({"settings": {"codes_settings": []}}, "settings.codes_settings is [], expected"),
    "lengths in a list": ({"statistics": {"lengths": [1]}}, "field statistics.lengths is [1], expected an object"),
    "a length of words": (
        {"statistics": {"lengths": {"two": 1}}},
        "lengths counts 'two', expected up to 64",
    ),
    "a length without end": ({"statistics": {"lengths": {"9" * 9: 1}}}, "statistics.lengths counts '999999999'"),
    "no lengths": ({"statistics": {"lengths": {}}}, "field statistics.lengths is empty"),
    "no classes": ({"statistics": {"classes": []}}, "field statistics.classes is empty"),
    "a class without numbers": (
        {"statistics": {"classes": [{"class": "cat"}]}},
        "field statistics.classes[0].images is missing, expected an integer of at least 1",
    ),
    "a mean of words": ({"statistics": {"mean_length": "2"}}, "field statistics.mean_length is '2', expected a finite"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_settings_or_statistics_of_a_wrong_type_are_one_message(made: Path, tmp_path: Path, forged: str) -> None:
    changes, says = FORGED[forged]
    path = build(made, tmp_path / "a")[0] / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, values in changes.items():
        manifest[name] |= values
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError) as refusal:
        look(tmp_path / "a")
    assert str(refusal.value).startswith(f"{path}: field ")
    assert says in str(refusal.value)


@pytest.mark.parametrize("tokenizer", [{}, {"path": 3, "fingerprint": ""}, {"path": "x", "fingerprint": None}])
def test_a_tokenizer_that_is_not_recorded_is_one_message(made: Path, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    path = build(made, tmp_path / "a")[0] / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"tokenizer": tokenizer}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json: field tokenizer\.(path|fingerprint) is "):
        look(tmp_path / "a", tmp_path / "look")

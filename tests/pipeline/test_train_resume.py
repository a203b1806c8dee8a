"""`dpar train` on a run that exists: from its checkpoints, with more steps, or with other settings."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.runtime.errors import StageError
from tests.pipeline.trained import build, digests, largest_difference, metrics, results, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def test_resuming_from_a_checkpoint_gives_the_same_bytes(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 6, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000006")
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


@pytest.mark.parametrize("left", [0, 7, 1000, -1000])
def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(patches: Path, tmp_path: Path, left: int) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (newest,) = (tmp_path / "b" / "checkpoints" / "step-00000004").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:left])
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


def test_a_run_stopped_before_its_first_checkpoint_restarts_with_its_metrics(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a")
    before, whole = digests(tmp_path / "a"), results(tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        shutil.rmtree(path)
    run(patches, tmp_path / "a")
    assert digests(tmp_path / "a") == before
    assert results(tmp_path / "a") == whole


def test_a_truncated_line_of_metrics_is_dropped(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    whole = results(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000004")
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run(patches, tmp_path / "a", **settings)
    assert results(tmp_path / "a") == whole


def test_a_finished_run_is_not_trained_again(patches: Path, tmp_path: Path) -> None:
    first = run(patches, tmp_path / "a")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.safetensors")}
    assert run(patches, tmp_path / "a") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.safetensors")} == stamps


def test_only_the_newest_two_checkpoints_are_kept(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=7, checkpoint_every=2)
    assert saved(tmp_path / "a") == ["step-00000006", "step-00000007"]
    run(patches, tmp_path / "b", steps=7, checkpoint_every=2, keep=3)
    assert saved(tmp_path / "b") == ["step-00000004", "step-00000006", "step-00000007"]


def test_other_settings_or_data_over_a_run_are_refused_with_both_values(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    before = digests(tmp_path / "a")
    with pytest.raises(StageError) as refusal:
        run(patches, tmp_path / "a", steps=1, lr=5e-4, batch=2)
    assert "lr was 0.001 and is now 0.0005" in str(refusal.value)
    assert "batch was 4 and is now 2" in str(refusal.value)
    build(tmp_path / "other", seed=7)
    with pytest.raises(StageError, match="artifact was"):
        run(tmp_path / "other", tmp_path / "a", steps=1)
    assert digests(tmp_path / "a") == before


def test_more_steps_continue_to_the_weights_of_one_long_run_and_fewer_are_refused(
    patches: Path, tmp_path: Path
) -> None:
    run(patches, tmp_path / "a", steps=2)
    run(patches, tmp_path / "a", steps=4)
    run(patches, tmp_path / "b", steps=4)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    history = json.loads((tmp_path / "a" / "run.json").read_text())["history"]
    assert [start["step"] for start in history] == [0, 2]
    assert history[1]["changed"] == {"steps": [2, 4]}
    run(patches, tmp_path / "a", steps=None, epochs=1.5)  # six steps
    assert metrics(tmp_path / "a")[-1]["step"] == 6
    with pytest.raises(StageError, match="steps was None and is now 3"):
        run(patches, tmp_path / "a", steps=3)


def test_settings_that_do_not_affect_the_result_may_change(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    run(patches, tmp_path / "a", steps=1, log_every=3, micro_batch=2, checkpoint_every=9, eval_every=5)


def test_override_accepts_other_settings_and_records_them_with_the_step(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    run(patches, out, steps=2)
    run(patches, out, steps=4, lr=5e-4, ema=0.5, override=True)
    assert [(line["step"], line["lr"]) for line in metrics(out)] == [(1, 1e-3), (2, 1e-3), (3, 5e-4), (4, 5e-4)]
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["lr"] == 5e-4
    assert [start["step"] for start in record["history"]] == [0, 2]
    assert record["history"][1]["changed"] == {"ema": [0.0, 0.5], "lr": [0.001, 0.0005], "steps": [2, 4]}
    run(patches, out, steps=4, lr=5e-4, ema=0.5)  # the settings of the last run are recorded
    with pytest.raises(StageError, match=r"model was 'dpar-tiny' and is now 'llamagen-tiny'\. Name another output$"):
        run(patches, out, steps=4, lr=5e-4, ema=0.5, model="llamagen-tiny", override=True)


def test_a_folder_killed_before_the_first_record_is_accepted(patches: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "run.json.4711.part").write_text("{")
    run(patches, tmp_path / "a", steps=1)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "mine").touch()
    with pytest.raises(StageError, match="holds something else"):
        run(patches, tmp_path / "b", steps=1)


def test_a_folder_with_other_files_is_refused_and_unchanged(patches: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(patches, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

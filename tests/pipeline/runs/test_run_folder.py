"""A run directory: its lock, leftovers of kills, and records with wrong values."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.run_folder import RunFolder, read_metrics, read_run
from pipeline.runtime.errors import StageError

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runs.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), "train", {}, {}):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    """Lock the run in ``folder`` from another process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(100))
    return path


def test_a_run_in_use_is_refused_with_its_holder_and_cleaned_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = hold(out)
    try:
        temporary = leave(out / "model" / ".tmpa1B2c3")
        record = (out / "run.json").read_bytes()
        with pytest.raises(StageError) as refusal:
            RunFolder(out, "train", {}, {})
        assert f"{out} is in use by process {process.pid} on " in str(refusal.value)
        assert "since 2" in str(refusal.value)
        assert "Wait until that command ends, stop it, or name another output" in str(refusal.value)
        assert temporary.exists()  # it may be the other process's
        assert (out / "run.json").read_bytes() == record
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    leftovers = [
        temporary,
        leave(out / "model-ema" / "model.safetensors.part"),
        leave(out / "model" / "config.json.part"),
    ]
    others = [leave(out / "model" / name) for name in ("model.safetensors", ".tmp", "mine.part", ".tmpa1B2c3.txt")]
    others += [leave(out / ".tmpa1B2c3"), leave(out / "sheets" / ".tmpa1B2c3")]
    write_settings(out)
    RunFolder(out, "train", {"batch": 1}, INPUTS).close()
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


INPUTS: dict[str, Any] = {
    "tokenizer": {"path": "vq", "fingerprint": "0"},
    "entropy_model": None,
    "patch_rule": None,
    "class_names": ["a"],
}


def write_settings(out: Path, **changes: Any) -> None:
    """Write a record of a run with some values changed."""
    record = {
        "format_version": 2,
        "kind": "train",
        "steps": 10,
        "settings": {"batch": 1},
        "inputs": INPUTS,
        "history": [],
    } | changes
    out.mkdir(exist_ok=True)
    (out / "run.json").write_text(json.dumps(record))


def test_a_run_is_unlocked_when_closed_or_refused(tmp_path: Path) -> None:
    write_settings(tmp_path / "a")
    with RunFolder(tmp_path / "a", "train", {"batch": 1}, INPUTS, steps=10):
        pass
    with pytest.raises(StageError, match="batch was 1 and is now 2"):
        RunFolder(tmp_path / "a", "train", {"batch": 2}, INPUTS, steps=10)
    RunFolder(tmp_path / "a", "train", {"batch": 1}, INPUTS, steps=10).close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": "ten"}, "field steps is 'ten', expected an integer or null"),
        ({"steps": True}, "field steps is True, expected an integer"),
        ({"steps": 2**63}, "is damaged: .* has more than 64 bits"),
        ({"kind": "trian"}, "field kind is 'trian', expected one of tokenizer, entropy, train"),
        ({"settings": []}, r"field settings is \[\], expected an object"),
        ({"settings": {"batch": 1.5}}, "field settings.batch is 1.5, expected an integer"),
        ({"settings": {}}, "field settings.batch is missing, expected an integer"),
        ({"inputs": {**INPUTS, "class_names": "abc"}}, "field inputs.class_names is 'abc', expected a list"),
        ({"inputs": {**INPUTS, "class_names": ["a", None]}}, r"field inputs.class_names\[1\] is null, expected text"),
        ({"inputs": {**INPUTS, "tokenizer": {"path": "vq"}}}, "field inputs.tokenizer.fingerprint is missing"),
        ({"inputs": {**INPUTS, "patch_rule": "rule"}}, "field inputs.patch_rule is 'rule', expected an object"),
        ({"history": "long"}, "field history is 'long', expected a list"),
    ],
)
def test_a_run_record_with_a_wrong_value_is_one_sentence_with_file_name_and_type(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    write_settings(tmp_path / "a", **changes)
    with pytest.raises(StageError, match=rf"{tmp_path}/a/run\.json:? {says}.*\. Restore {tmp_path}"):
        read_run(tmp_path / "a")


def test_a_run_of_the_first_architecture_is_refused_with_a_remedy(tmp_path: Path) -> None:
    write_settings(tmp_path / "a", format_version=1)
    with pytest.raises(StageError, match=r"format version 1; this version reads 2.*train again with `dpar train`"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "{", "\xff"])
def test_a_run_record_that_is_not_a_json_object_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StageError, match=rf"{tmp_path}/run\.json .*\. Restore {tmp_path}"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("oops", "is not valid JSON"),
        ("[1, 2]", r"is \[1, 2\], expected an object"),
        ('{"loss": 1.0}', "field step is missing, expected an integer"),
        ('{"step": "two"}', "field step is 'two', expected an integer"),
        ('{"step": 2, "loss": "low"}', "field loss is 'low', expected a finite number"),
        ('{"step": 2, "loss": 1' + "0" * 400 + "}", "has more than 64 bits"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_line_of_metrics_with_a_wrong_value_is_one_sentence_with_its_number(
    tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n' + line + '\n{"step": 3, "loss": 2.5}\n')
    with pytest.raises(StageError, match=rf"line 2 of {tmp_path}/metrics\.jsonl.* {says}.*\. Remove the line"):
        read_metrics(tmp_path)


def test_numbers_that_are_not_finite_are_null_in_the_metrics_and_read_as_none(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a", "train", {}, {}) as run:
        run.log(step=1, loss=float("nan"), grad_norm=float("inf"), lr=0.5)
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": 1e999}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "a") == [{"step": 1, "loss": None, "lr": None}]

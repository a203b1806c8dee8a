import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shards.locks import FOLDER, Claims
from shards.scratch import Scratch, remove_abandoned

HOLD = """
from shards.scratch import Scratch
scratch = Scratch()
(scratch.folder / "00000.arrow").write_bytes(bytes(9))
print(scratch.folder, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_the_next_process_removes_what_a_killed_one_left_and_nothing_of_one_that_lives(tmp_path: Path) -> None:
    (tmp_path / "dpar-scratch").mkdir()  # somebody's
    arguments = [sys.executable, "-c", HOLD]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        assert left.parent == tmp_path
        remove_abandoned()
        assert [path.name for path in left.iterdir()] == ["00000.arrow"]
        process.kill()
        process.wait()
        with Scratch() as own:
            assert {path.name for path in tmp_path.iterdir()} == {own.name, "dpar-scratch"}
    assert [path.name for path in tmp_path.iterdir()] == ["dpar-scratch"]


def test_a_temporary_directory_ends_with_its_object(tmp_path: Path) -> None:
    scratch = Scratch()
    (scratch.folder / "a").touch()
    del scratch
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_a_folder_that_is_gone_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "gone").claim(FOLDER)
    assert list(tmp_path.iterdir()) == []

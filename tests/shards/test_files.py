from pathlib import Path

import pytest

from shards.files import atomic_path, write_json, write_text


def test_a_failing_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    path.write_text("before")
    with pytest.raises(FileNotFoundError), atomic_path(path) as part:
        (part.write_text("half"), (tmp_path / "gone").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["it.txt"]
    assert path.read_text() == "before"


def test_the_file_is_replaced_only_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    path.write_text("before")
    with atomic_path(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_writers_in_different_processes_have_different_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    other = path.with_name("it.txt.1.part")
    other.write_text("of process 1")
    write_text(path, "it")
    assert other.read_text() == "of process 1"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_files_have_no_invalid_numbers(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1.0, "b": None})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": [value]})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]

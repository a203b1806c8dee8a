from pathlib import Path

import pytest

from dpar.files import atomic_path


def test_a_file_is_replaced_only_when_its_successor_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    with atomic_path(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

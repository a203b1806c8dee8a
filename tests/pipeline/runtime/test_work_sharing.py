import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.errors import StageError
from pipeline.runtime.work_sharing import Parts, claim_folder, claim_parts, write_once
from tests.pipeline.sampled import start


def make_all(out: Path, n: int) -> None:
    """Process pieces: append a line to a piece's file each time, and record that all were done at the end."""
    for index in claim_parts(out / "pieces", n, lambda i: (out / f"{i}").is_file()):
        with open(out / f"{index}.times", "a") as file:
            file.write("made\n")
        (out / f"{index}").touch()
    assert all((out / f"{i}").is_file() for i in range(n))


@given(n=st.integers(0, 7), world_size=st.integers(1, 9), rank=st.integers(0, 8))
def test_a_single_process_of_any_rank_processes_every_piece_once(n: int, world_size: int, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank % world_size))
        patch.setenv("WORLD_SIZE", str(world_size))
        make_all(Path(folder), n)
        assert [(Path(folder) / f"{i}.times").read_text() for i in range(n)] == ["made\n"] * n


def test_processes_share_the_pieces_and_all_wait_for_the_last(tmp_path: Path) -> None:
    crowd = [start(lambda: make_all(tmp_path, 40), rank, 4) for rank in range(4)]
    for process in crowd:
        process.join()
        assert process.exitcode == 0
    assert [(tmp_path / f"{i}.times").read_text() for i in range(40)] == ["made\n"] * 40


def test_a_piece_of_a_killed_process_is_processed_by_another(tmp_path: Path) -> None:
    def hang() -> None:
        for index in claim_parts(tmp_path / "pieces", 3, lambda i: (tmp_path / f"{i}").is_file()):
            (tmp_path / f"{index}.begun").touch()
            signal.pause()

    victim = start(hang)
    while not (tmp_path / "0.begun").exists():
        pass
    waiting = start(lambda: make_all(tmp_path, 3))
    while not (tmp_path / "2").exists():
        pass
    assert not (tmp_path / "0").exists()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    waiting.join()
    assert waiting.exitcode == 0
    assert (tmp_path / "0").exists()


def test_a_piece_finished_by_another_process_is_not_processed_again(tmp_path: Path) -> None:
    looked: list[int] = []

    def there(index: int) -> bool:  # finished between the first check and the lock
        looked.append(index)
        return looked.count(index) > 1

    assert list(claim_parts(tmp_path / "pieces", 3, there)) == []
    assert looked == [0, 0, 1, 1, 2, 2]


def test_parts_return_saved_results_in_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", 3)
    for index in parts.missing():
        parts.save(index, x=np.arange(index * 2, index * 2 + 2), y=np.full((1, 2), index))
    assert parts.joined("x").tolist() == [0, 1, 2, 3, 4, 5]
    assert parts.load(2)["y"].tolist() == [[2, 2]]
    assert list(parts.missing()) == []


def test_a_result_is_computed_once_and_read_afterwards(tmp_path: Path) -> None:
    assert write_once(tmp_path / "a" / "it.json", lambda: {"x": [1.5, None]}) == {"x": [1.5, None]}
    assert write_once(tmp_path / "a" / "it.json", lambda: {"x": "other"}) == {"x": [1.5, None]}


def test_a_folder_can_be_claimed_during_another_claim_and_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "eval.json.part").write_text("{")
    claim_folder(tmp_path, "eval.json", {"a": 1}, "holds other results")
    claim_folder(tmp_path, "eval.json", {"a": 1}, "holds other results")
    with pytest.raises(StageError, match="holds other results"):
        claim_folder(tmp_path, "eval.json", {"a": 2}, "holds other results")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "probe.json.part").touch()
    with pytest.raises(StageError, match="holds something else"):
        claim_folder(tmp_path / "else", "eval.json", {"a": 1}, "holds other results")

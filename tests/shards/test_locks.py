import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from shards.locks import FOLDER, Claims


@pytest.mark.parametrize("piece", [7, "it.process", FOLDER])
def test_a_piece_has_one_owner_until_it_is_released(tmp_path: Path, piece: int | str) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.claim(piece)
    assert not second.claim(piece)
    first.release(piece)
    assert second.claim(piece)


def test_a_failed_claim_does_not_release_an_earlier_one(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.claim(1)
    with claims.claimed(1) as claimed:
        assert not claimed
    assert not Claims(tmp_path).claim(1)


def test_claims_that_are_dropped_are_released(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.claim(1)
    del claims
    assert Claims(tmp_path).claim(1)


def test_a_waiting_process_gets_the_piece_of_a_killed_one(tmp_path: Path) -> None:
    def hang() -> None:
        claims = Claims(tmp_path)
        claims.claim(1)
        (tmp_path / "claimed").touch()
        signal.pause()

    victim = multiprocessing.get_context("fork").Process(target=hang)
    victim.start()
    while not (tmp_path / "claimed").exists():
        pass
    assert not Claims(tmp_path).claim(1)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    assert Claims(tmp_path).claim(1, wait=True)
    victim.join()


def test_without_file_locks_claims_succeed_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    claims = Claims(tmp_path)
    assert claims.claim(1)
    assert Claims(tmp_path).claim(1)
    assert not claims.has_locks


def test_a_claim_does_not_create_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "gone").claim(1)
    assert not (tmp_path / "gone").exists()

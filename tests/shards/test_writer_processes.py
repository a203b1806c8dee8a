"""Several processes that write one artifact: shared work, claims on shards, repairs, missing ranks."""

import errno
import threading
from pathlib import Path

import pytest

from shards.errors import ArtifactError
from shards.manifest import BUILD, Container, LeftOut
from tests.shards.builds import N_SHARDS, SETTINGS, files, flip, make_manifest, opened, run, shard_rows, stamps, start


@pytest.mark.parametrize(("container", "processes"), [("arrow", 2), ("arrow", 3), ("webdataset", 2)])
def test_any_number_of_processes_write_the_same_bytes(tmp_path: Path, container: Container, processes: int) -> None:
    started = [start(tmp_path / "many", container, rank, processes, 0.0, 0) for rank in range(processes)]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    run(tmp_path / "one", container)
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_concurrent_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    run(tmp_path / "one")
    out = tmp_path / "many"
    builds = [opened(out) for _ in range(3)]
    shares = [build.todo(rank, 3) for rank, build in enumerate(builds)]
    held = [next(share) for share in shares]  # each at its first shard before any is done
    for rank, (build, share) in enumerate(zip(builds, shares, strict=True)):
        for index in (held[rank], *share):
            left = [LeftOut(key=f"{index}.jpg", reason="empty file")] if index % 3 == 0 else []
            build.add(index, shard_rows(index), statistics={"n": index}, left_out=left)
        if rank < 2:
            assert build.finish(make_manifest) is None
    made = builds[2].finish(make_manifest)
    assert made is not None
    assert [build.finish(make_manifest) for build in builds] == [made] * 3
    assert files(out) == files(tmp_path / "one")


def test_a_process_repairs_its_shard_while_another_finds_all_done(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "many")
    flip(tmp_path / "many" / "00001.arrow")
    first, second = opened(tmp_path / "many"), opened(tmp_path / "many")
    damaged = second.todo(1, 2)
    index = next(damaged)
    assert list(first.todo(0, 2)) == []
    assert first.finish(make_manifest) is None
    second.add(index, shard_rows(index), statistics={"n": index})
    assert list(damaged) == []
    assert second.finish(make_manifest) is not None
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("processes", [2, 3])
def test_runs_started_by_hand_share_the_work_and_write_the_same_bytes(tmp_path: Path, processes: int) -> None:
    out = tmp_path / "many"
    started = [start(out, "arrow", 0, 1, 0.02, 1) for _ in range(processes)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    wrote = [int(line) for text, _ in said for line in text.split()]
    assert sorted(wrote) == list(range(N_SHARDS))  # none twice
    run(tmp_path / "one", large=True)
    assert files(out) == files(tmp_path / "one")


def test_the_shards_of_a_missing_rank_are_written_by_the_others(tmp_path: Path) -> None:
    assert run(tmp_path / "a", rank=1, world_size=3) is not None
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_each_process_starts_at_a_different_shard(tmp_path: Path) -> None:
    builds = [opened(tmp_path / "a") for _ in range(4)]
    assert [next(build.todo(rank, 4)) for rank, build in enumerate(builds)] == [0, 3, 6, 9]


def test_a_shard_stays_claimed_until_it_is_added(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a", n_shards=3), opened(tmp_path / "a", n_shards=3)
    assert list(first.todo()) == [0, 1, 2]  # all pulled, none written
    assert list(second.todo()) == []
    assert second.remaining() == 3
    first.add(1, shard_rows(1))
    assert second.remaining() == 2
    first.close()
    assert list(second.todo()) == [0, 2]


def test_looking_for_records_while_they_are_removed_finds_none(tmp_path: Path) -> None:
    build = opened(tmp_path / "a")
    folder, aside = tmp_path / "a" / BUILD, tmp_path / "aside"
    stop = threading.Event()

    def remove_and_return() -> None:
        while not stop.is_set():
            folder.rename(aside)
            aside.rename(folder)

    remover = threading.Thread(target=remove_and_return)
    remover.start()
    try:
        assert all(build.records.finished() == set() for _ in range(2000))
    finally:
        stop.set()
        remover.join()


def test_an_interrupted_process_releases_its_claims(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "a")

    def break_off() -> None:
        for _ in first.todo():
            raise KeyError

    with pytest.raises(KeyError) as broken:
        break_off()
    assert next(second.todo()) == 0, broken  # even while the traceback is held


def test_a_killed_process_leaves_no_claim(tmp_path: Path) -> None:
    process = start(tmp_path / "a", "arrow", 0, 1, 60, 0)  # it pauses after its first shard
    while not list((tmp_path / "a" / BUILD).glob("*.json")) or len(stamps(tmp_path / "a")) < 1:
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert run(tmp_path / "a") is not None
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_without_file_locks_ranks_write_their_stripes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    out = tmp_path / "many"
    builds = [opened(out) for _ in range(2)]
    for rank, build in enumerate(builds):
        wrote = []
        for index in build.todo(rank, 2):
            left = [LeftOut(key=f"{index}.jpg", reason="empty file")] if index % 3 == 0 else []
            build.add(index, shard_rows(index), statistics={"n": index}, left_out=left)
            wrote.append(index)
        assert sorted(wrote) == list(range(rank, N_SHARDS, 2))
    assert builds[1].finish(make_manifest) is not None
    flip(out / "00004.arrow")
    assert run(out) is not None
    run(tmp_path / "one")
    assert files(out) == files(tmp_path / "one")


def test_damaged_shards_of_a_missing_rank_are_rebuilt(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "a")
    flip(tmp_path / "a" / "00001.arrow")
    assert run(tmp_path / "a", rank=0, world_size=2) is not None
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_a_later_process_trusts_shards_of_a_running_one(tmp_path: Path) -> None:
    first = opened(tmp_path / "a")
    share = first.todo()
    first.add(next(share), shard_rows(0))
    written = stamps(tmp_path / "a")
    second = opened(tmp_path / "a")
    assert not list((tmp_path / "a" / BUILD).glob("*.unchecked"))
    assert next(share) == 1
    assert next(second.todo()) == 2
    assert stamps(tmp_path / "a") == written


def test_overwrite_is_refused_while_others_write(tmp_path: Path) -> None:
    first = opened(tmp_path / "a")
    first.add(next(first.todo()), shard_rows(0))
    first = opened(tmp_path / "a")
    share = first.todo()
    index = next(share)
    before = files(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"1 process is writing to .* threshold was 1\.5 and is now 9"):
        opened(tmp_path / "a", settings={**SETTINGS, "threshold": 9}, overwrite=True)
    assert files(tmp_path / "a") == before
    first.add(index, shard_rows(index))
    share.close()
    run(tmp_path / "a", settings={**SETTINGS, "threshold": 9}, overwrite=True)
    run(tmp_path / "b", settings={**SETTINGS, "threshold": 9})
    assert files(tmp_path / "a") == files(tmp_path / "b")

import ast
import errno
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ArtifactError
from shards.left_out import LEFT_OUT
from shards.manifest import BUILD, MANIFEST, Container, LeftOut, Manifest, ShardInfo
from shards.reader import open_artifact
from shards.rows import EXTENSION, Rows
from shards.storage import Location, location
from shards.writer import ArtifactBuild

N_SHARDS = 12
GRID, VIEWS = (8, 8), 2
SETTINGS: dict[str, Any] = {"threshold": 1.5, "data": "föto", "sizes": [1, 2]}
CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")


def shard_rows(index: int, large: bool = False) -> Rows:
    """Return the rows of shard ``index``; every fifth shard is empty."""
    rng = np.random.default_rng(index)
    count = 0 if index % 5 == 4 else 500 if large else 3
    shape = (count, VIEWS, GRID[0] * GRID[1])
    return Rows(
        keys=[f"é{index}/{i}" for i in range(count)],
        labels=np.full(count, index, np.int32),
        codes=rng.integers(0, 32, shape).astype(np.uint16),
        entropy=rng.random(shape).astype(np.float16),
        starts=rng.random(shape) < 0.5,
    )


def make_manifest(shards: tuple[ShardInfo, ...], settings: dict[str, Any] = SETTINGS) -> Manifest:
    return Manifest(
        kind="patches",
        container="webdataset" if shards[0].name.endswith(".tar") else "arrow",
        grid=GRID,
        codebook_size=32,
        views=VIEWS,
        class_names=("a", "b"),
        rows=sum(shard.rows for shard in shards),
        shards=shards,
        settings=settings,
        source={},
        tokenizer={"path": "vq", "fingerprint": "0" * 64},
        left_out=sum(len(shard.left_out) for shard in shards),
    )


def opened(out: Location, container: Container = "arrow", **options: Any) -> ArtifactBuild:
    values = {"settings": SETTINGS, "n_shards": N_SHARDS, "container": container, **options}
    return ArtifactBuild(out, **values)


def run(
    out: Location,
    container: Container = "arrow",
    rank: int = 0,
    world_size: int = 1,
    pause: float = 0.0,
    large: bool = False,
    **options: Any,
) -> Manifest | None:
    build = opened(out, container, **options)
    for index in build.todo(rank, world_size):
        reasons = [LeftOut(key=f"{index}.jpg", reason="empty file")] if index % 3 == 0 else []
        build.add(index, shard_rows(index, large), statistics={"n": index}, left_out=reasons)
        sys.stdout.write(f"{index}\n")  # for the parent process
        time.sleep(pause)
    return build.finish(lambda shards: make_manifest(shards, build.settings))


def start(out: Location, *arguments: object) -> subprocess.Popen[bytes]:
    """Start ``run`` in a new process."""
    command = [sys.executable, __file__, str(out), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[0-9]*")}


@pytest.mark.slow
@pytest.mark.parametrize(("container", "kills"), [("arrow", 6), ("webdataset", 2)])
def test_a_build_killed_repeatedly_ends_with_the_same_bytes(tmp_path: Path, container: Container, kills: int) -> None:
    out = tmp_path / "killed"
    chance = random.Random(container)
    for kill in range(kills):
        before = stamps(out)
        recorded = {path.stem for path in (out / BUILD).glob("[0-9]*.json")}
        process = start(out, container, 0, 1, 0.02, 1)
        while process.poll() is None:
            if kill % 2:  # in the middle of a write
                if {path.name for path in out.glob("[0-9]*.part")} - before.keys():
                    time.sleep(chance.random() * 0.002)
                    break
            elif len(list((out / BUILD).glob("[0-9]*.json"))) > len(recorded):  # some time after a shard
                time.sleep(chance.random() * 0.03)
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        assert not (out / MANIFEST).exists()
        after = stamps(out)
        for index in recorded:
            assert after[f"{index}{EXTENSION[container]}"] == before[f"{index}{EXTENSION[container]}"]
    before = stamps(out)
    recorded = {path.stem for path in (out / BUILD).glob("[0-9]*.json")}
    assert 0 < len(recorded) < N_SHARDS
    run(out, container, large=True)
    for index in recorded:
        assert stamps(out)[f"{index}{EXTENSION[container]}"] == before[f"{index}{EXTENSION[container]}"]
    run(tmp_path / "whole", container, large=True)
    assert files(out) == files(tmp_path / "whole")


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    build = opened(tmp_path / "a")
    build.add(0, shard_rows(0), left_out=[LeftOut(key="0.jpg", reason="empty file")], statistics={"n": 0})
    for name in ("00001.arrow.77.part", f"{MANIFEST}.77.part", f"{BUILD}/00001.json.77.part"):
        (tmp_path / "a" / name).write_bytes(b"half of it")
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("container", CONTAINERS)
def test_rerunning_a_finished_build_changes_nothing(tmp_path: Path, container: Container) -> None:
    first = run(tmp_path / "a", container)
    before, bytes_before = stamps(tmp_path / "a"), files(tmp_path / "a")
    written = (tmp_path / "a" / MANIFEST).stat()
    assert run(tmp_path / "a", container) == first
    assert stamps(tmp_path / "a") == before
    assert files(tmp_path / "a") == bytes_before
    assert (tmp_path / "a" / MANIFEST).stat().st_mtime_ns == written.st_mtime_ns


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("finished", [True, False])
def test_only_damaged_or_missing_shards_are_rebuilt(tmp_path: Path, harm: Any, finished: bool) -> None:
    out = tmp_path / "a"
    run(tmp_path / "whole")
    if finished:
        run(out)
    else:
        build = opened(out)
        for index in range(5):
            left = [LeftOut(key=f"{index}.jpg", reason="empty file")] if index % 3 == 0 else []
            build.add(index, shard_rows(index), statistics={"n": index}, left_out=left)
        build.close()
    before = stamps(out)
    harm(out / "00002.arrow")
    run(out)
    assert files(out) == files(tmp_path / "whole")
    for name, stamp in before.items():
        if name != "00002.arrow":
            assert stamps(out)[name] == stamp


def test_a_kill_before_the_settings_were_recorded_does_not_stop_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "a" / BUILD).mkdir(parents=True)
    assert run(tmp_path / "a") is not None


def test_a_kill_after_the_manifest_leaves_a_complete_artifact(tmp_path: Path) -> None:
    run(tmp_path / "a")
    bytes_before = files(tmp_path / "a")
    opened(tmp_path / "b").add(0, shard_rows(0))
    shutil.copytree(tmp_path / "b" / BUILD, tmp_path / "a" / BUILD)
    assert len(open_artifact(tmp_path / "a")) > 0
    run(tmp_path / "a")
    assert files(tmp_path / "a") == bytes_before


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_each_difference_and_nothing_changes(tmp_path: Path, finished: bool) -> None:
    if finished:
        run(tmp_path / "a")
    else:
        opened(tmp_path / "a").add(0, shard_rows(0))
    before = files(tmp_path / "a")
    other = {**SETTINGS, "threshold": 2.5, "new": "x"}
    with pytest.raises(ArtifactError) as refusal:
        opened(tmp_path / "a", settings=other)
    text = str(refusal.value)
    assert "threshold was 1.5 and is now 2.5" in text
    assert "new was None and is now 'x'" in text
    assert "--overwrite" in text
    assert "sizes" not in text
    assert files(tmp_path / "a") == before


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_replaces_an_artifact_of_other_settings(tmp_path: Path, finished: bool) -> None:
    if finished:
        run(tmp_path / "a", "webdataset", settings={**SETTINGS, "threshold": 9})
    else:
        build = opened(tmp_path / "a", "webdataset", settings={**SETTINGS, "threshold": 9})
        build.add(3, shard_rows(3))
        build.close()
    run(tmp_path / "a", overwrite=True)
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_overwrite_keeps_an_artifact_of_the_same_settings(tmp_path: Path) -> None:
    run(tmp_path / "a")
    before = stamps(tmp_path / "a")
    run(tmp_path / "a", overwrite=True)
    assert stamps(tmp_path / "a") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.tex"):
        opened(tmp_path, overwrite=overwrite)
    assert files(tmp_path) == {"thesis.tex": hashlib.sha256(b"years of work").hexdigest()}
    assert not (tmp_path / BUILD).exists()


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArtifactError, match="is a file; name a directory"):
        opened(tmp_path / "a")


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


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_artifact_of_empty_shards_alone_can_be_written_and_read(tmp_path: Path, container: Container) -> None:
    build = opened(tmp_path / "a", container, n_shards=2)
    for index in build.todo():
        build.add(index, shard_rows(4))
    build.finish(make_manifest)
    artifact = open_artifact(tmp_path / "a", kind="patches")
    assert len(artifact) == 0
    assert [len(artifact.shard_rows(index)) for index in range(2)] == [0, 0]
    assert list(artifact.damaged()) == []


def test_what_was_left_out_is_listed_with_its_reason_in_order(tmp_path: Path) -> None:
    build = opened(tmp_path / "a", n_shards=3)
    build.add(2, shard_rows(2), left_out=[LeftOut(key="ü/z.jpg", reason="truncated")])
    build.add(0, shard_rows(0), left_out=[LeftOut(key="a.jpg", reason="empty file"), LeftOut(key="b", reason="gone")])
    assert not (tmp_path / "a" / LEFT_OUT).exists()
    build.add(1, shard_rows(1))
    manifest = build.finish(make_manifest)
    assert manifest is not None
    assert manifest.left_out == 3
    assert (tmp_path / "a" / LEFT_OUT).read_text(encoding="utf-8") == (
        "key\treason\na.jpg\tempty file\nb\tgone\nü/z.jpg\ttruncated\n"
    )
    assert run(tmp_path / "b") is not None
    build = opened(tmp_path / "c", n_shards=1)
    build.add(0, shard_rows(0))
    build.finish(make_manifest)
    assert not (tmp_path / "c" / LEFT_OUT).exists()


def test_an_unfinished_build_is_not_an_artifact(tmp_path: Path) -> None:
    opened(tmp_path / "a").add(0, shard_rows(0))
    with pytest.raises(ArtifactError, match="not finished: rerun the command that makes it"):
        open_artifact(tmp_path / "a")


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


def test_looking_for_records_while_another_process_removes_them_finds_none(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_disk_error_is_one_message_and_leaves_no_partial_shard(tmp_path: Path, container: Container) -> None:
    out = tmp_path / "a"
    build = opened(out, container)
    build.add(0, shard_rows(0))
    before = files(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a shard does not fit
    try:
        with pytest.raises(ArtifactError) as refusal:
            build.add(1, shard_rows(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(refusal.value)
    assert "00001" in text
    assert "File too large; run the same command again. 1 finished shards are kept" in text
    assert files(out) == before
    build.close()
    run(out, container)
    run(tmp_path / "b", container)
    assert len(open_artifact(out)) == len(open_artifact(tmp_path / "b"))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=15, deadline=None)
def test_an_input_left_out_is_one_line_of_two_fields_for_any_name(key: str, reason: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        build = opened(Path(home) / "a", n_shards=1)
        build.add(0, shard_rows(0), left_out=[LeftOut(key=key, reason=reason)])
        build.finish(make_manifest)
        text = (Path(home) / "a" / LEFT_OUT).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) == 2
    fields = [
        re.sub(r"\\(x..|u....|.)", lambda found: ast.literal_eval(f'"{found[0]}"'), field)
        for field in lines[1].split("\t")
    ]
    assert fields == [key, reason]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\x1b[31mred", "a\tb\nc"])
def test_the_listing_of_inputs_left_out_has_no_formulas_and_no_escape_codes(tmp_path: Path, name: str) -> None:
    build = opened(tmp_path / "a", n_shards=1)
    build.add(0, shard_rows(0), left_out=[LeftOut(key=name, reason=name)])
    build.finish(make_manifest)
    _, line = (tmp_path / "a" / LEFT_OUT).read_text(encoding="utf-8").splitlines()
    key, reason = line.split("\t")
    assert key == reason
    assert key[0] not in "=+-@"
    assert key.isprintable()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' + "9" * 400 + "}"])
def test_damaged_settings_of_an_unfinished_artifact_are_named(tmp_path: Path, text: str) -> None:
    opened(tmp_path / "a").close()
    (tmp_path / "a" / BUILD / "settings.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"settings\.json is damaged"):
        opened(tmp_path / "a")


def test_a_shards_size_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = run(tmp_path / "a")
    assert manifest is not None
    assert [shard.bytes for shard in manifest.shards] == [
        (tmp_path / "a" / shard.name).stat().st_size for shard in manifest.shards
    ]


if __name__ == "__main__":
    folder, kind, rank, world_size, pause, large = sys.argv[1:]
    os.environ.pop("PYTHONPATH", None)
    run(location(folder), kind, int(rank), int(world_size), float(pause), bool(int(large)))  # type: ignore[arg-type]

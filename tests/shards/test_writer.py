"""Writing an artifact: kills, reruns, damage, other settings, overwriting and full disks."""

import hashlib
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ArtifactError
from shards.manifest import BUILD, MANIFEST, Container, LeftOut
from shards.reader import open_artifact
from shards.rows import EXTENSION
from tests.shards.builds import (
    CONTAINERS,
    N_SHARDS,
    SETTINGS,
    files,
    flip,
    make_manifest,
    opened,
    run,
    shard_rows,
    stamps,
    start,
)


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

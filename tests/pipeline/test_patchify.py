"""`dpar patchify`: entropies, boundaries and statistics, in any container, number of processes and order of runs."""

import contextlib
import itertools
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dpar import LlamaGen
from dpar.patching import patch_starts, static_starts, token_entropy
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress, Stopped, Task
from pipeline.settings.artifacts import PatchifySettings
from shards.manifest import Container
from shards.reader import open_artifact
from shards.writer import ArtifactBuild
from tests.pipeline.patchified import (
    CONTAINERS,
    GRID,
    QUIET,
    SIZES,
    VIEWS,
    N,
    Said,
    build_codes,
    entropy_of,
    everything,
    files,
    run,
    save_inputs,
    starts_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


class Interrupt(Progress):
    """Presses Ctrl-C during the second shard."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        class Pressing(Task):
            def advance(self, n: int = 1, note: str = "") -> None:
                super().advance(n, note)
                if self._done == SIZES[0] + 1:
                    signal.raise_signal(signal.SIGINT)

        yield Pressing(None, Console(quiet=True), title, 10**9, unit)


@pytest.mark.parametrize("container", CONTAINERS)
def test_entropies_are_computed_from_teacher_forced_logits(home: Path, tmp_path: Path, container: Container) -> None:
    manifest = run(home / container, tmp_path / "a", entropy_model=str(home / "entropy"), threshold=2.5)
    rows, codes = everything(tmp_path / "a"), everything(home / container)
    assert manifest.container == container
    assert rows.keys == codes.keys
    np.testing.assert_array_equal(rows.labels, codes.labels)
    np.testing.assert_array_equal(rows.codes, codes.codes)
    assert rows.entropy is not None
    with torch.no_grad():
        logits = LlamaGen.from_pretrained(home / "entropy")(torch.from_numpy(codes.codes.reshape(-1, N).astype(int)))
    expected = token_entropy(logits).numpy().reshape(*rows.entropy.shape[:2], N - 1)  # token 0 is not predicted
    assert np.isinf(rows.entropy[..., 0]).all()
    np.testing.assert_allclose(rows.entropy[..., 1:].astype(float), expected, rtol=2**-10)
    assert rows.entropy[..., 1:].std() > 0.05


def test_entropies_do_not_depend_on_batch_size_or_on_other_images(home: Path, tmp_path: Path) -> None:
    model = {"entropy_model": str(home / "entropy"), "threshold": 2.5}
    run(home / "arrow", tmp_path / "a", batch=64, **model)
    run(home / "arrow", tmp_path / "b", batch=1, **model)
    build_codes(tmp_path / "few", sizes=(3,), first=7)
    run(tmp_path / "few", tmp_path / "c", **model)
    whole = entropy_of(tmp_path / "a").astype(float)
    np.testing.assert_allclose(entropy_of(tmp_path / "b").astype(float), whole, rtol=2**-10)
    np.testing.assert_allclose(entropy_of(tmp_path / "c").astype(float), whole[7:10], rtol=2**-10)


@pytest.mark.parametrize("max_length", [0, 1, 3])
@pytest.mark.parametrize("row_reset", [False, True])
def test_boundaries_follow_the_rule_on_stored_entropies(
    home: Path, tmp_path: Path, max_length: int, row_reset: bool
) -> None:
    rule = {"threshold": 3.0, "max_length": max_length, "row_reset": row_reset}
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), **rule)
    expected = patch_starts(entropy_of(tmp_path / "a"), 3.0, max_length or None, GRID[1], row_reset)
    np.testing.assert_array_equal(starts_of(tmp_path / "a"), expected)
    assert (rule | {"max_length": max_length or None}).items() <= manifest.settings.items()


@pytest.mark.parametrize("container", CONTAINERS)
def test_statistics_equal_a_plain_count(home: Path, tmp_path: Path, container: Container) -> None:
    found = run(home / container, tmp_path / "a", entropy_model=str(home / "entropy"), threshold=2.5).statistics
    lengths: dict[str, int] = {}
    counts: dict[str, int] = {}
    starts, labels = starts_of(tmp_path / "a"), everything(tmp_path / "a").labels
    sequences = starts.reshape(-1, N)
    for sequence in sequences:
        first = [*np.flatnonzero(sequence).tolist(), N]
        counts[str(len(first) - 1)] = counts.get(str(len(first) - 1), 0) + 1
        for a, b in itertools.pairwise(first):
            lengths[str(b - a)] = lengths.get(str(b - a), 0) + 1
    patches = int(sequences.sum())
    expected = {
        "sequences": len(sequences),
        "patches": patches,
        "tokens_per_image": N,
        "patches_per_image": patches / len(sequences),
        "mean_length": sequences.size / patches,
        "tokens_saved": 1 - patches / sequences.size,
        "lengths": dict(sorted(lengths.items())),
        "patch_counts": dict(sorted(counts.items(), key=lambda item: int(item[0]))),
        "classes": [
            {
                "class": name,
                "images": int((labels == label).sum()),
                "patches_per_image": starts[labels == label].sum() / (labels == label).sum() / VIEWS,
                "mean_length": starts[labels == label].size / starts[labels == label].sum(),
            }
            for label, name in enumerate("ab")
        ],
    }
    assert len(lengths) > 1
    assert found == expected


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("rule", [{"threshold": 2.7, "max_length": 0}, {"target_length": 1.5}])
def test_changing_boundaries_needs_no_model_and_equals_patchifying_again(
    home: Path, tmp_path: Path, container: Container, rule: dict[str, Any]
) -> None:
    shutil.copytree(home / "entropy", tmp_path / "model")
    run(home / container, tmp_path / "before", entropy_model=str(tmp_path / "model"), threshold=3.1)
    run(home / container, tmp_path / "anew", entropy_model=str(tmp_path / "model"), **rule)
    shutil.rmtree(tmp_path / "model")
    run(tmp_path / "before", tmp_path / "moved", **rule)
    assert files(tmp_path / "moved") == files(tmp_path / "anew")


@pytest.mark.parametrize("length", [1.81, 3.0])
def test_static_patches_need_no_model_and_have_their_length(home: Path, tmp_path: Path, length: float) -> None:
    manifest = run(home / "arrow", tmp_path / "a", strategy="static", static_length=length)
    starts = starts_of(tmp_path / "a")
    np.testing.assert_array_equal(starts, np.broadcast_to(static_starts(N, length), starts.shape))
    assert np.isnan(entropy_of(tmp_path / "a")[..., 1:]).all()
    assert manifest.entropy_model is None
    assert manifest.settings["static_length"] == length


def test_static_patches_keep_stored_entropies(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    run(tmp_path / "a", tmp_path / "b", strategy="static", static_length=2.0)
    run(tmp_path / "b", tmp_path / "c", threshold=3.0)
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_a_patches_artifact_is_converted_between_containers_and_back(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    run(tmp_path / "a", tmp_path / "b", threshold=3.0, container="webdataset")
    assert [path.suffix for path in sorted((tmp_path / "b").glob("0*"))] == [".tar"] * 3
    for name in ("codes", "labels", "entropy", "starts"):
        one, other = (getattr(everything(tmp_path / folder), name) for folder in "ab")
        np.testing.assert_array_equal(one, other)
    assert everything(tmp_path / "a").keys == everything(tmp_path / "b").keys
    run(tmp_path / "b", tmp_path / "c", threshold=3.0, container="arrow")
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_patches_keep_the_record_of_their_codes(home: Path, tmp_path: Path) -> None:
    codes = open_artifact(home / "arrow").manifest
    found = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    for name in ("grid", "codebook_size", "views", "class_names", "rows", "source", "tokenizer", "left_out"):
        assert getattr(found, name) == getattr(codes, name)
    assert found.settings["codes"] == codes.fingerprint()
    assert found.settings["codes_settings"] == codes.settings


@pytest.mark.parametrize("rule", [{"threshold": 3.0}, {"target_length": 1.81}])
def test_any_single_rank_writes_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    settings = PatchifySettings(entropy_model=str(home / "entropy"), device="cpu", precision="fp32", **rule)
    patchify(home / "arrow", tmp_path / "one", settings, QUIET)
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("RANK", "5")
    patchify(home / "arrow", tmp_path / "other", settings, QUIET)
    assert files(tmp_path / "other") == files(tmp_path / "one")


@pytest.mark.parametrize("processes", [2, 7])
def test_processes_started_by_hand_write_the_same_bytes_as_one(home: Path, tmp_path: Path, processes: int) -> None:
    codes = build_codes(tmp_path / "codes", sizes=(9, 4, 0, 8, 7, 3, 11, 5, 6))
    model = str(home / "entropy")
    settings = PatchifySettings(entropy_model=model, target_length=1.81, device="cpu", precision="fp32")
    patchify(codes, tmp_path / "one", settings, QUIET)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.patchify"])
    started = [context.Process(target=patchify, args=(codes, tmp_path / "all", settings)) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes
    assert files(tmp_path / "all") == files(tmp_path / "one")


def test_a_process_reports_shards_left_to_others_and_resuming_does_not_sample_again(home: Path, tmp_path: Path) -> None:
    model = str(home / "entropy")
    settings = PatchifySettings(entropy_model=model, target_length=1.81, device="cpu", precision="fp32")
    whole = patchify(home / "arrow", tmp_path / "one", settings, QUIET)
    assert whole is not None
    other = ArtifactBuild(tmp_path / "two", settings=whole.settings, n_shards=3, container="arrow")
    work = other.todo()
    assert next(work) == 0  # another process works on the first shard
    said = Said()
    assert patchify(home / "arrow", tmp_path / "two", settings, said) is None
    assert "on a sample" in said.text
    assert "1 shards are still being written by other processes" in said.text
    other.close()
    said = Said()
    assert patchify(home / "arrow", tmp_path / "two", settings, said) is not None
    assert "on a sample" not in said.text
    assert files(tmp_path / "two") == files(tmp_path / "one")
    said = Said()
    assert patchify(home / "arrow", tmp_path / "two", settings, said) is not None  # now finished
    assert "on a sample" not in said.text


def test_ctrl_c_stops_within_a_batch_and_resuming_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    model: dict[str, Any] = {"entropy_model": str(home / "entropy"), "threshold": 3.0, "batch": 1}
    with pytest.raises(Stopped, match="Finished shards are kept"):
        run(home / "arrow", tmp_path / "a", progress=Interrupt(), **model)
    assert not (tmp_path / "a" / "manifest.json").exists()
    run(home / "arrow", tmp_path / "a", **model)
    run(home / "arrow", tmp_path / "b", **model)
    assert files(tmp_path / "a") == files(tmp_path / "b")

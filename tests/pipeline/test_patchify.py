import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import dpar
from dpar import LlamaGen, LlamaGenConfig
from dpar.patching import PatchRule, patch_starts, static_starts, token_entropy
from pipeline.convert import convert
from pipeline.patchify import find_threshold, patchify
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, Stopped, Task
from pipeline.settings.artifacts import PatchifySettings
from pipeline.settings.models import ConvertSettings
from shards.errors import ArtifactError
from shards.manifest import Container, Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts, summary
from shards.reader import open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild

V, GRID, N, VIEWS = 32, (4, 6), 24, 2
SIZES = (20, 0, 13)  # images per shard
CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
QUIET = Progress(quiet=True)
TOKENIZER = {"path": "vq", "fingerprint": "0" * 64}


pytestmark = pytest.mark.usefixtures("one_thread")


def save_model(path: Path, seed: int = 0, std: float = 0.4, **sizes: Any) -> Path:
    torch.manual_seed(seed)
    values: dict[str, Any] = {"codebook_size": V, "grid_height": GRID[0], "grid_width": GRID[1], **sizes}
    model = LlamaGen(LlamaGenConfig(classes=0, start_token=False, width=32, heads=2, layers=2, **values))
    torch.nn.init.normal_(model.output.weight, std=std)
    return model.save_pretrained(path)


def build_codes(
    out: Path, sizes: tuple[int, ...] = SIZES, container: Container = "arrow", first: int = 0, views: int = VIEWS
) -> Path:
    """Build an artifact of random codes; image ``i`` of shard ``s`` has the same codes in any artifact."""
    settings = {"data": "photos", "image_size": 16}
    build = ArtifactBuild(out, settings=settings, n_shards=len(sizes), container=container)
    for index in build.todo():
        count = sizes[index]
        codes = np.stack(
            [np.random.default_rng([index, i]).integers(0, V, (views, N)) for i in range(first, first + count)]
            or [np.zeros((views, N), np.int64)]
        )[:count]
        keys = [f"{index}/{i}.png" for i in range(first, first + count)]
        labels = np.arange(first, first + count, dtype=np.int32) % 2
        build.add(index, Rows(keys=keys, labels=labels, codes=codes.astype(np.uint16)))

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="codes",
            container=container,
            grid=GRID,
            codebook_size=V,
            views=views,
            class_names=("a", "b"),
            rows=sum(sizes),
            shards=shards,
            settings=settings,
            source={"kind": "folder"},
            tokenizer=TOKENIZER,
            left_out=3,
        )

    build.finish(manifest)
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_model(home / "entropy")
    for container in CONTAINERS:
        build_codes(home / container, container=container)
    return home


def run(codes: Path, out: Path, **values: Any) -> Manifest:
    progress = values.pop("progress", QUIET)
    manifest = patchify(codes, out, PatchifySettings(**{"device": "cpu", "precision": "fp32", **values}), progress)
    assert manifest is not None
    return manifest


class Said(Progress):
    """Records the messages of a stage."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=1000), quiet=False)

    @property
    def text(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined]


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


def everything(artifact: Path) -> Rows:
    opened = open_artifact(artifact)
    parts = [opened.shard_rows(index) for index in range(len(opened.manifest.shards))]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("labels", "codes", "entropy", "starts")
        if getattr(parts[0], name) is not None
    }
    return Rows(keys=[key for part in parts for key in part.keys], **columns)


def entropy_of(artifact: Path) -> np.ndarray:
    found = everything(artifact).entropy
    assert found is not None
    return found


def starts_of(artifact: Path) -> np.ndarray:
    found = everything(artifact).starts
    assert found is not None
    return found


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def test_statistics_of_parts_add_up_to_those_of_all() -> None:
    rng = np.random.default_rng(0)
    starts = rng.random((50, 3, N)) < 0.6
    starts[..., 0] = True
    labels = rng.integers(0, 7, 50).astype(np.int32)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 50)]
    names = ("a", "b", "c")
    whole, parts = (
        merge_counts(
            [json.loads(json.dumps(count_patches(starts[cut], labels[cut]))) for cut in some],
            n_tokens=N,
            views=3,
            class_names=names,
        )
        for some in ([slice(0, 50)], cuts)
    )
    assert parts == whole
    assert [entry["class"] for entry in whole["classes"]] == ["a", "b", "c", *(f"label {i}" for i in range(3, 7))]


def test_the_summary_names_the_spread_over_images_and_the_extreme_classes() -> None:
    starts = np.zeros((4, 1, 8), bool)
    for image, patches in enumerate((1, 2, 4, 8)):
        starts[image, 0, :: 8 // patches] = True
    counts = [count_patches(starts, np.arange(4, dtype=np.int32))]
    lines = summary(merge_counts(counts, n_tokens=8, views=1, class_names=("sky", "sea", "owl", "fur")))
    assert lines == [
        "mean patch length 2.133, 53.1% of tokens saved",
        "patches per image: mean 3.8, median 2, 1 to 8 (of 8 tokens)",
        "patch lengths: 1 53.3%, 2 26.7%, 4 13.3%, 8 6.7%",
        "most compressible classes, by mean length: sky 8.00, sea 4.00",
        "least compressible classes, by mean length: fur 1.00, owl 2.00",
    ]


def test_the_summary_of_static_patches_names_no_extreme_classes() -> None:
    starts = np.broadcast_to(static_starts(8, 2), (4, 1, 8))
    counts = [count_patches(starts, np.arange(4, dtype=np.int32))]
    lines = summary(merge_counts(counts, n_tokens=8, views=1, class_names=("sky", "sea", "owl", "fur")))
    assert len(lines) == 3


@pytest.mark.parametrize("target", [1.2, 1.81, 2.5])
def test_a_target_length_is_reached_within_one_percent_on_all_data(home: Path, tmp_path: Path, target: float) -> None:
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), target_length=target)
    starts = starts_of(tmp_path / "a")
    assert starts.size / starts.sum() == pytest.approx(target, rel=0.01)
    expected = patch_starts(entropy_of(tmp_path / "a"), manifest.settings["threshold"], 4, GRID[1], True)
    np.testing.assert_array_equal(starts, expected)


def test_a_target_length_is_reached_from_a_sample_of_the_images_too(home: Path, tmp_path: Path) -> None:
    build_codes(tmp_path / "codes", sizes=(900, 600), views=1)
    model = str(home / "entropy")
    run(tmp_path / "codes", tmp_path / "a", entropy_model=model, target_length=1.81, sample=500)
    starts = starts_of(tmp_path / "a")
    assert starts.size / starts.sum() == pytest.approx(1.81, rel=0.01)


@pytest.mark.parametrize(
    ("rule", "longest"),
    [({}, "2.667"), ({"row_reset": False}, "3.429"), ({"max_length": 2}, "1.846"), ({"max_length": 1}, "1.000")],
)
def test_a_target_length_out_of_reach_is_refused_with_the_range(
    home: Path, tmp_path: Path, rule: dict[str, Any], longest: str
) -> None:
    with pytest.raises(StageError, match=rf"--target-length 4\.5 cannot be reached.*lengths from 1 to {longest}"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), target_length=4.5, **rule)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("row_reset", "target"), [(True, 4.7), (False, 11.0)])
def test_without_a_limit_patches_reach_to_the_end_of_a_row_or_of_the_image(
    home: Path, tmp_path: Path, row_reset: bool, target: float
) -> None:
    rule = {"target_length": target, "max_length": 0, "row_reset": row_reset}
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), **rule)
    assert manifest.statistics["mean_length"] == pytest.approx(target, rel=0.05)


def test_a_target_length_of_one_is_refused_with_the_option_to_use(home: Path, tmp_path: Path) -> None:
    model = str(home / "entropy")
    with pytest.raises(StageError, match=r"--target-length 1 makes every token its own patch; give --max-length 1"):
        run(home / "arrow", tmp_path / "a", entropy_model=model, target_length=1.0)
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=model, target_length=1.0, max_length=1)
    assert manifest.statistics["mean_length"] == 1


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(2, 5)),
    st.booleans(),
    st.floats(1, 3),
)
def test_no_other_threshold_is_closer_to_the_target_length(
    seed: int, levels: int, max_length: int | None, row_reset: bool, target: float
) -> None:
    entropy = (np.random.default_rng(seed).integers(1, levels + 1, (3, N)) / 2).astype(np.float16)
    entropy[:, 0] = np.inf

    def length(threshold: float) -> float:
        return entropy.size / int(patch_starts(entropy, threshold, max_length, GRID[1], row_reset).sum())

    reachable = [length(threshold) for threshold in np.arange(levels + 1) / 2]
    try:
        found = find_threshold(entropy, target, PatchRule(max_length=max_length, row_reset=row_reset), GRID[1])
    except StageError:
        assert target > 1.01 * max(reachable)
        return
    assert found.length == length(found.value)
    assert found.deviation(target) == pytest.approx(min(abs(one / target - 1) for one in reachable))


def test_an_unrepresentative_sample_is_reported_with_a_better_threshold(home: Path, tmp_path: Path) -> None:
    said = Said()
    run(home / "arrow", tmp_path / "a", progress=said, entropy_model=str(home / "entropy"), target_length=2.0, sample=1)
    match = re.search(r"the sample of 1 was not representative\..* --threshold ([\d.]+)` moves", said.text)
    assert match, said.text
    moved = run(tmp_path / "a", tmp_path / "b", threshold=float(match[1]))
    assert moved.statistics["mean_length"] == pytest.approx(2.0, rel=0.01)


def test_an_unreachable_target_length_is_reported(home: Path, tmp_path: Path) -> None:
    build_codes(tmp_path / "codes", sizes=(1,), views=1)
    said = Said()
    run(tmp_path / "codes", tmp_path / "a", progress=said, entropy_model=str(home / "entropy"), target_length=2.1)
    # 24 tokens in 11 or in 12 patches
    assert "3.9% from --target-length 2.1; no threshold comes closer, the next one gives 2.000" in said.text


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


def test_codes_without_an_entropy_model_are_refused_with_a_remedy(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no entropies; name the entropy model with --entropy-model"):
        run(home / "arrow", tmp_path / "a", threshold=3.0)


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


def test_entropy_patches_of_static_ones_without_entropies_are_refused(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", strategy="static", static_length=2.0)
    with pytest.raises(StageError, match="holds no entropies"):
        run(tmp_path / "a", tmp_path / "b", threshold=3.0)
    with pytest.raises(StageError, match=r"holds no entropies.*patchify the codes"):
        run(tmp_path / "a", tmp_path / "b", threshold=3.0, entropy_model=str(home / "entropy"))


def test_a_threshold_that_makes_every_token_a_patch_is_refused_with_the_range(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"--threshold 0\.1 makes every token its own patch.* range from .* nats"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=0.1)
    manifest = run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=0.1, max_length=1)
    assert manifest.statistics["mean_length"] == 1


def test_a_model_with_constant_entropies_is_one_message(home: Path, tmp_path: Path) -> None:
    LlamaGen(LlamaGen.from_pretrained(home / "entropy").config).save_pretrained(tmp_path / "new")  # its head is zero
    with pytest.raises(StageError, match=r"--target-length 2 cannot be reached"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(tmp_path / "new"), target_length=2.0)


def test_an_entropy_model_with_weights_that_are_not_numbers_is_refused(home: Path, tmp_path: Path) -> None:
    model = LlamaGen.from_pretrained(home / "entropy")
    torch.nn.init.constant_(model.norm.weight, math.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(StageError, match=r"broken gives no entropies: its weights hold NaN or infinity"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(tmp_path / "broken"), threshold=1.0)
    assert not list((tmp_path / "a").glob("*.arrow"))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"codebook_size": 16}, "codebook size is 32, the model's 16"),
        ({"grid_height": 3}, "grid is 4×6, the model's 3×6"),
    ],
)
def test_an_entropy_model_of_other_codes_is_refused_with_both_sides(
    home: Path, tmp_path: Path, sizes: dict[str, int], says: str
) -> None:
    save_model(tmp_path / "other", **sizes)
    with pytest.raises(StageError, match=f"{home}/arrow does not fit the model: its {says}"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(tmp_path / "other"), threshold=3.0)
    assert not (tmp_path / "a").exists()


def save_entropy_run(run: Path, tokenizer: dict[str, str], seed: int = 0) -> Path:
    """Save a run as `dpar entropy` does, trained on codes of ``tokenizer``."""
    save_model(run / "model", seed)
    record = {"format_version": 2, "kind": "entropy", "settings": {}, "inputs": {"tokenizer": tokenizer}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def test_an_entropy_model_of_another_tokenizer_is_refused_with_both(home: Path, tmp_path: Path) -> None:
    run_of_another = save_entropy_run(tmp_path / "run", {"path": "other/vq", "fingerprint": "ab" * 32})
    for name in (run_of_another, run_of_another / "model"):
        with pytest.raises(StageError, match=r"other/vq \(abababababab\).*arrow holds codes of vq \(000000000000\)"):
            run(home / "arrow", tmp_path / "out", entropy_model=str(name), threshold=2.0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StageError, match=rf"`dpar convert {run_of_another} NEW`"):
        run(home / "arrow", tmp_path / "out", entropy_model=str(run_of_another), threshold=2.0)
    convert(str(run_of_another), tmp_path / "new", ConvertSettings(), QUIET)
    assert run(home / "arrow", tmp_path / "out", entropy_model=str(tmp_path / "new"), threshold=2.0).rows == sum(SIZES)


def test_an_entropy_model_of_the_same_tokenizer_is_accepted_at_any_path(home: Path, tmp_path: Path) -> None:
    moved = {"path": "elsewhere/vq", "fingerprint": TOKENIZER["fingerprint"]}
    entropy = save_entropy_run(tmp_path / "run", moved)
    assert run(home / "arrow", tmp_path / "out", entropy_model=str(entropy), threshold=2.0).rows == sum(SIZES)
    record = {"format_version": 2, "kind": "entropy", "settings": {}, "inputs": {"tokenizer": 3}}
    (entropy / "run.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match=r"run\.json.*tokenizer"):
        run(home / "arrow", tmp_path / "other", entropy_model=str(entropy), threshold=2.0)


def test_another_entropy_model_than_the_stored_entropies_came_from_is_refused(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(StageError, match="already holds entropies, of another entropy model"):
        run(tmp_path / "a", tmp_path / "b", entropy_model=str(tmp_path / "other"), threshold=2.5)
    manifest = run(tmp_path / "a", tmp_path / "b", entropy_model=str(home / "entropy"), threshold=2.5)
    assert manifest.entropy_model is not None
    assert manifest.entropy_model["fingerprint"] == dpar.fingerprint(home / "entropy")


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


def test_a_damaged_shard_of_the_input_is_named_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "arrow", tmp_path / "codes")
    shard = tmp_path / "codes" / "00002.arrow"
    data = bytearray(shard.read_bytes())
    data[-len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"00002\.arrow"):
        run(tmp_path / "codes", tmp_path / "a", strategy="static", static_length=2.0)
    assert not (tmp_path / "a").exists()
    run(tmp_path / "codes", tmp_path / "a", strategy="static", static_length=2.0, verify=False)


def test_ctrl_c_stops_within_a_batch_and_resuming_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    model: dict[str, Any] = {"entropy_model": str(home / "entropy"), "threshold": 3.0, "batch": 1}
    with pytest.raises(Stopped, match="Finished shards are kept"):
        run(home / "arrow", tmp_path / "a", progress=Interrupt(), **model)
    assert not (tmp_path / "a" / "manifest.json").exists()
    run(home / "arrow", tmp_path / "a", **model)
    run(home / "arrow", tmp_path / "b", **model)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_other_settings_over_an_artifact_are_refused_with_both_values(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    with pytest.raises(ValueError, match=r"threshold was 3\.0 and is now 2\.5"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=2.5)

"""`dpar sample`: images, classes, boundaries and files, runs that are killed or shared, and refused settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpar
from dpar import DPAR, LlamaGen, PatchRule, SamplingOptions
from dpar.patching import static_starts
from dpar.sampling import sample
from dpar.tokenizer import VQTokenizer
from pipeline.generation.generator import decode
from pipeline.inspect import inspect
from pipeline.patchify import patchify
from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import InspectSettings, PatchifySettings
from pipeline.settings.sampling import SampleSettings
from shards.errors import ArtifactError
from tests.pipeline.sample_runs import CLASSES, FOLDERS, codes_of, held, pictures, run, save_runs, write_image
from tests.pipeline.sampled import CPU, QUIET, RULE, SIDE, SIZE, N, everything, killed_again_and_again, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


def test_pictures_of_every_class_are_written(home: Path, tmp_path: Path) -> None:
    made = run(home, tmp_path / "out", per_class=3, shard_size=4)
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert pictures(tmp_path / "out") == [f"{FOLDERS[i // 3]}/{i:06d}.png" for i in numbers]
    found = held(tmp_path / "out")
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found["codes"].shape == found["starts"].shape == (9, N)
    assert made["images"] == 9
    assert made["patches_per_image"] == pytest.approx(found["starts"].sum() / 9)
    assert Path(made["sheet"]) == tmp_path / "out" / "sheet.png"
    assert found["made"].settings["weights"] == dpar.fingerprint(home / "dpar" / "model")
    assert found["made"].settings["seed"] == 0
    assert found["made"].class_names == CLASSES
    pixels = decode(VQTokenizer.from_pretrained(home / "vq"), found["codes"], (SIDE, SIDE))
    for name, expected in zip(pictures(tmp_path / "out"), pixels, strict=True):
        shown = np.asarray(Image.open(tmp_path / "out" / "images" / name)).astype(int)
        np.testing.assert_allclose(shown, expected, atol=1)


def test_the_codes_are_an_artifact_that_other_commands_open(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", per_class=1)
    inspect(tmp_path / "out" / "codes", tmp_path / "pages", InspectSettings(images=2, verify=True, device="cpu"))
    assert (tmp_path / "pages" / "index.html").is_file()
    coarse = PatchifySettings(threshold=3.0, max_length=2, **CPU)
    run(home, tmp_path / "llama", "llama", per_class=1)
    with pytest.raises(StageError, match="holds no entropies"):
        patchify(tmp_path / "llama" / "codes", tmp_path / "patches", coarse, QUIET)
    again = PatchifySettings(entropy_model=str(home / "entropy"), **RULE, **CPU)
    made = patchify(tmp_path / "llama" / "codes", tmp_path / "patches", again, QUIET)
    assert made is not None
    assert made.rows == 3


@pytest.mark.parametrize("wanted", [("fish", "bird"), ("2", "0"), ("fish", "0")])
def test_classes_are_chosen_by_name_or_number(home: Path, tmp_path: Path, wanted: tuple[str, ...]) -> None:
    run(home, tmp_path / "out", classes=wanted)
    assert held(tmp_path / "out")["labels"].tolist() == [2, 2, 0, 0]
    assert {name.split("/")[0] for name in pictures(tmp_path / "out")} == {FOLDERS[0], FOLDERS[2]}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("fihs", "did you mean 'fish'"), ("cat", "cat & dog"), ("3", "Numbers go from 0 to 2"), ("-1", "no class")],
)
def test_an_unknown_class_is_refused_with_the_nearest(home: Path, tmp_path: Path, wanted: str, says: str) -> None:
    with pytest.raises(StageError, match=rf"no class '{wanted}'") as refusal:
        run(home, tmp_path / "out", classes=(wanted,))
    assert says in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["dpar", "static", "llama"])
def test_an_image_does_not_depend_on_the_rest_of_the_batch(home: Path, tmp_path: Path, model: str) -> None:
    run(home, tmp_path / "whole", model, batch=32, per_class=3)
    run(home, tmp_path / "parts", model, batch=2, per_class=3)
    whole, parts = held(tmp_path / "whole"), held(tmp_path / "parts")
    for name in ("codes", "labels") if model == "llama" else ("codes", "starts", "labels"):
        np.testing.assert_array_equal(whole[name], parts[name])
    assert len(np.unique(whole["codes"], axis=0)) > 6


def test_another_seed_gives_other_images_and_the_same_seed_the_same(home: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(home, tmp_path / name, seed=seed)
    np.testing.assert_array_equal(held(tmp_path / "a")["codes"], held(tmp_path / "b")["codes"])
    assert (held(tmp_path / "a")["codes"] != held(tmp_path / "c")["codes"]).any(axis=1).all()


def test_codes_and_boundaries_equal_the_librarys_under_the_training_rule(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", cfg_scale=1.7)
    codes, starts = sample(
        DPAR.from_pretrained(home / "dpar" / "model"),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        LlamaGen.from_pretrained(home / "entropy"),
        PatchRule(**RULE),
        SamplingOptions(cfg_scale=1.7),
    )
    np.testing.assert_array_equal(held(tmp_path / "out")["codes"], codes.numpy())
    np.testing.assert_array_equal(held(tmp_path / "out")["starts"], starts.numpy())


def test_the_rule_can_be_set_for_sampling(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "coarse", threshold=9.0, max_length=0)
    assert (held(tmp_path / "coarse")["starts"].sum(axis=1) == SIDE + 1).all()  # only token 1 and the rows
    run(home, tmp_path / "one", threshold=9.0, max_length=0, row_reset=False)
    assert (held(tmp_path / "one")["starts"].sum(axis=1) == 2).all()  # tokens 0 and 1
    run(home, tmp_path / "fine", max_length=1)
    assert held(tmp_path / "fine")["starts"].all()


def test_a_static_run_needs_no_entropy_model_and_has_its_own_boundaries(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", "static")
    starts = held(tmp_path / "out")["starts"]
    np.testing.assert_array_equal(starts, np.broadcast_to(static_starts(N, 1.81), starts.shape))
    with pytest.raises(StageError, match="trained on static patches, which have no --threshold"):
        run(home, tmp_path / "other", "static", threshold=3.0)


def test_ten_kills_do_not_change_the_files(home: Path, tmp_path: Path) -> None:
    many: dict[str, Any] = {"per_class": 8, "shard_size": 2, "npz": True}
    hits = killed_again_and_again(lambda: run(home, tmp_path / "killed", **many), tmp_path / "killed", kills=10)
    run(home, tmp_path / "whole", **many)
    assert hits == 10
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_two_processes_write_the_same_files_as_one(home: Path, tmp_path: Path) -> None:
    many: dict[str, Any] = {"per_class": 4, "shard_size": 2, "npz": True}
    both = [start(lambda: run(home, tmp_path / "two", **many), rank, 2) for rank in (0, 1)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    run(home, tmp_path / "one", **many)
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("model", ["dpar", "static", "llama"])
def test_sampling_and_editing_run_on_a_gpu(home: Path, tmp_path: Path, model: str) -> None:
    image = write_image(tmp_path / "image.png")
    run(home, tmp_path / "new", model, device="cuda", npz=True)
    assert len(pictures(tmp_path / "new")) == 6
    run(home, tmp_path / "edit", model, device="cuda", image=image, keep_rows=1, classes=("fish",))
    np.testing.assert_array_equal(held(tmp_path / "edit")["codes"][0, :SIDE], codes_of(home, image)[:SIDE])


def test_npz_has_the_format_of_adms_suite_with_any_other_output(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "both", npz=True, per_class=3, shard_size=4)
    run(home, tmp_path / "alone", npz=True, png=False, per_class=3, shard_size=4)
    both, alone = ((tmp_path / name / "samples.npz").read_bytes() for name in ("both", "alone"))
    assert both == alone
    assert not (tmp_path / "alone" / "images").exists()
    with np.load(tmp_path / "both" / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (9, SIZE, SIZE, 3)
    assert labels.tolist() == held(tmp_path / "both")["labels"].tolist()
    for i, name in enumerate(pictures(tmp_path / "both")):
        np.testing.assert_array_equal(images[i], np.asarray(Image.open(tmp_path / "both" / "images" / name)))


def test_pictures_can_be_added_after_the_codes(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", png=False)
    codes = (tmp_path / "out" / "codes" / "00000.arrow").stat().st_mtime_ns
    run(home, tmp_path / "out", npz=True)
    assert len(pictures(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "samples.npz").is_file()
    assert (tmp_path / "out" / "codes" / "00000.arrow").stat().st_mtime_ns == codes


def test_a_count_is_spread_over_the_classes_evenly_or_at_random(home: Path, tmp_path: Path) -> None:
    labels = {}
    kinds: dict[str, dict[str, Any]] = {"even": {}, "a": {"labels": "random"}, "b": {"labels": "random", "seed": 1}}
    for name, more in kinds.items():
        run(home, tmp_path / name, per_class=None, count=40, classes=("fish", "bird"), png=False, **more)
        labels[name] = held(tmp_path / name)["labels"].tolist()
    assert labels["even"] == [2, 0] * 20
    assert set(labels["a"]) == {0, 2}
    assert labels["a"] != labels["b"]
    assert 5 < labels["a"].count(0) < 35


def test_the_first_images_of_a_longer_run_equal_those_of_a_shorter_one(home: Path, tmp_path: Path) -> None:
    for name, count in (("short", 5), ("long", 8)):
        run(home, tmp_path / name, per_class=None, count=count, shard_size=3, png=False)
    short, long = held(tmp_path / "short"), held(tmp_path / "long")
    np.testing.assert_array_equal(short["codes"], long["codes"][:5])
    np.testing.assert_array_equal(short["starts"], long["starts"][:5])


@pytest.mark.parametrize("schedule", ["linear", "power-cosine"])
def test_guidance_schedules_equal_the_librarys(home: Path, tmp_path: Path, schedule: Any) -> None:
    run(home, tmp_path / "out", cfg_scale=3.0, cfg_schedule=schedule, cfg_power=2.0, per_class=1, png=False)
    codes, _ = sample(
        DPAR.from_pretrained(home / "dpar" / "model"),
        torch.tensor([0, 1, 2]),
        LlamaGen.from_pretrained(home / "entropy"),
        PatchRule(**RULE),
        SamplingOptions(cfg_scale=3.0, cfg_schedule=schedule, cfg_power=2.0),
    )
    np.testing.assert_array_equal(held(tmp_path / "out")["codes"], codes.numpy())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"top_p": 0.0}, "--top-p is 0"),
        ({"cfg_scale": 0.0}, "--cfg-scale is 0"),
        ({"per_class": 2, "count": 3}, "one of --per-class and --count"),
        ({"labels": "random"}, "--labels random needs --count"),
        ({"mask": Path("m.png")}, "need --image"),
        ({"image": Path("i.png"), "classes": ("a",)}, "one of --mask and --keep-rows"),
        ({"image": Path("i.png"), "keep_rows": 1}, "needs one --classes"),
    ],
)
def test_invalid_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        SampleSettings(**values)


def test_a_threshold_for_llamagen_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="a LlamaGen has no patches"):
        run(home, tmp_path / "out", "llama", threshold=2.0)


def test_a_folder_with_other_files_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(home, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_settings_are_refused_and_overwrite_replaces_everything(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", per_class=3, npz=True)
    before = everything(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"images was 9 and is now 1.*--overwrite"):
        run(home, tmp_path / "out", classes=("bird",), per_class=1)
    assert everything(tmp_path / "out") == before
    run(home, tmp_path / "out", classes=("bird",), per_class=1, overwrite=True)
    assert pictures(tmp_path / "out") == [f"{FOLDERS[0]}/000000.png"]
    assert not (tmp_path / "out" / "samples.npz").exists()

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpar
from dpar import DPAR, LlamaGen, PatchRule, SamplingOptions
from dpar.errors import ModelError
from dpar.patching import static_starts
from dpar.sampling import sample
from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.convert import convert
from pipeline.generation.classes import choose_classes
from pipeline.generation.generator import Generator, decode
from pipeline.generation.nearest import find_nearest, open_training
from pipeline.inspect import inspect
from pipeline.patchify import patchify
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.errors import StageError
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import InspectSettings, PatchifySettings, TokenizeSettings
from pipeline.settings.models import ConvertSettings
from pipeline.settings.sampling import SampleSettings
from pipeline.sources.crops import views
from pipeline.tokenize import tokenize
from shards.errors import ArtifactError
from shards.reader import open_artifact
from tests.pipeline.sampled import (
    CPU,
    QUIET,
    RULE,
    SIDE,
    SIZE,
    N,
    V,
    everything,
    killed_again_and_again,
    save_home,
    save_run,
    start,
)

CLASSES = ("bird", "cat & dog", "fish")
FOLDERS = ("0000-bird", "0001-cat_dog", "0002-fish")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, an entropy model, patches, and runs of LlamaGen and of DPAR with both strategies."""
    home = tmp_path_factory.mktemp("made")
    save_home(home, CLASSES, a_class=2)
    static = PatchifySettings(strategy="static", static_length=1.81, **CPU)
    patchify(home / "codes", home / "static patches", static, QUIET)
    save_run(home / "dpar", home / "patches", "dpar-tiny")
    save_run(home / "static", home / "static patches", "dpar-tiny")
    save_run(home / "llama", home / "codes", "llamagen-tiny", std=0.05)
    return home


def run(home: Path, out: Path, model: str = "dpar", **values: Any) -> dict[str, Any]:
    return sample_pictures(home / model, out, SampleSettings(**{**CPU, "per_class": 2, **values}), QUIET)


def held(out: Path) -> dict[str, Any]:
    artifact = open_artifact(out / "codes", verify=True)
    rows = np.arange(len(artifact))
    batch = artifact.gather(rows, np.zeros_like(rows))
    return {"codes": batch.codes, "starts": batch.starts, "labels": batch.labels, "made": artifact.manifest}


def pictures(out: Path) -> list[str]:
    return sorted(path.relative_to(out / "images").as_posix() for path in out.glob("images/*/*.png"))


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


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder to which the tokenizer and the entropy model are moved during a test."""
    for name in ("vq", "entropy"):
        shutil.move(home / name, tmp_path / name)
    yield tmp_path
    for name in ("vq", "entropy"):
        shutil.move(tmp_path / name, home / name)


def test_a_llamagen_run_needs_no_entropy_model(home: Path, moved: Path) -> None:
    run(home, moved / "out", "llama", tokenizer=str(moved / "vq"))
    assert held(moved / "out")["made"].kind == "codes"


@pytest.mark.parametrize(("option", "other"), [("tokenizer", "entropy_model"), ("entropy_model", "tokenizer")])
def test_a_moved_part_is_refused_with_the_option_to_use(home: Path, moved: Path, option: str, other: str) -> None:
    places = {"tokenizer": str(moved / "vq"), "entropy_model": str(moved / "entropy")}
    flag = "--" + option.replace("_", "-")
    with pytest.raises(StageError, match=rf"no model at .*If it has moved, name it with {flag}"):
        run(home, moved / "out", **{other: places[other]})
    assert not (moved / "out").exists()
    run(home, moved / "out", **places)


@pytest.mark.parametrize("option", ["tokenizer", "entropy_model"])
def test_a_part_with_other_weights_is_refused_with_both_fingerprints(home: Path, tmp_path: Path, option: str) -> None:
    kind: Any = VQTokenizer if option == "tokenizer" else LlamaGen
    source = home / ("vq" if option == "tokenizer" else "entropy")
    torch.manual_seed(9)
    kind(kind.from_pretrained(source).config).save_pretrained(tmp_path / "other")
    theirs, ours = (dpar.fingerprint(path)[:12] for path in (tmp_path / "other", source))
    with pytest.raises(StageError, match=f"has weights {theirs}, but {ours} are needed"):
        run(home, tmp_path / "out", **{option: str(tmp_path / "other")})


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
    ("name", "label"), [("n01440764 tench", 1), ("n01440764", 1), ("tench", 1), ("1", 1), ("crane", None)]
)
def test_a_class_is_named_by_wordnet_id_words_or_number(name: str, label: int | None) -> None:
    names = ("n01443537 goldfish", "n01440764 tench", "n02012849 crane", "n03126707 crane")
    if label is None:
        with pytest.raises(StageError, match="the name of 2 classes"):
            choose_classes(names, (name,))
    else:
        assert choose_classes(names, (name,)) == [label]


def write_image(path: Path, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def codes_of(home: Path, image: Path) -> np.ndarray:
    pixels = views(Image.open(image), SIZE, "center", (1.0,))
    return VQTokenizer.from_pretrained(home / "vq").encode(from_uint8(torch.from_numpy(pixels)))[0].numpy()


@pytest.mark.parametrize("model", ["dpar", "static", "llama"])
def test_kept_rows_are_unchanged_and_the_rest_is_sampled(home: Path, tmp_path: Path, model: str) -> None:
    image = write_image(tmp_path / "image.png", (13, 9))
    edit: dict[str, Any] = {"image": image, "keep_rows": 2, "classes": ("fish",), "per_class": 3}
    run(home, tmp_path / "out", model, **edit)
    codes = held(tmp_path / "out")["codes"]
    np.testing.assert_array_equal(
        codes[:, : 2 * SIDE], np.broadcast_to(codes_of(home, image)[: 2 * SIDE], (3, 2 * SIDE))
    )
    assert len(np.unique(codes[:, 2 * SIDE :], axis=0)) == 3
    assert Image.open(tmp_path / "out" / "sheet.png").width > 3 * 128
    with pytest.raises(ArtifactError, match="known was"):
        run(home, tmp_path / "out", model, **{**edit, "keep_rows": 1})


def test_a_token_with_any_masked_pixel_is_sampled_and_no_other(home: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[3, 5] = 255  # one pixel of token (1, 2)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(home, tmp_path / "out", image=image, mask=tmp_path / "mask.png", classes=("0",), per_class=16)
    changed = (held(tmp_path / "out")["codes"] != codes_of(home, image)).any(axis=0)
    assert np.flatnonzero(changed).tolist() == [SIDE + 2]


def test_invalid_edits_are_refused_before_sampling(home: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.png", (13, 9))
    other = write_image(tmp_path / "other.png", (9, 13))
    black = tmp_path / "black.png"
    Image.new("L", (13, 9)).save(black)
    fish: dict[str, Any] = {"image": image, "classes": ("fish",)}
    for more, says in (
        ({"mask": other}, "9×13 pixels, the image .* 13×9; both must have the same size"),
        ({"mask": black}, "nothing to sample: .*no white pixel"),
        ({"keep_rows": SIDE}, "keeps all 4 rows"),
        ({"mask": tmp_path / "gone.png"}, "there is no image .*gone.png"),
    ):
        with pytest.raises(StageError, match=says):
            run(home, tmp_path / "out", **fish, **more)
    assert not (tmp_path / "out").exists()


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


@pytest.fixture(scope="module")
def authors_file(home: Path) -> Path:
    """The weights of the run ``dpar`` in the format of DPAR's authors."""
    convert(str(home / "dpar"), home / "dpar.pt", ConvertSettings(), QUIET)
    return home / "dpar.pt"


def test_an_authors_checkpoint_samples_the_images_of_its_run(home: Path, authors_file: Path, tmp_path: Path) -> None:
    parts = {"tokenizer": str(home / "vq"), "entropy_model": str(home / "entropy")}
    run(home, tmp_path / "run", classes=("1",))
    run(home, tmp_path / "file", authors_file.name, classes=("1",), **parts, **RULE)
    for name in ("codes", "starts"):
        np.testing.assert_array_equal(held(tmp_path / "run")[name], held(tmp_path / "file")[name])


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("tokenizer", "does not say which tokenizer decodes its codes; name it with --tokenizer"),
        ("entropy_model", "does not say which entropy model places its patches; name it with --entropy-model"),
        ("threshold", r"do not record an entropy threshold; give --threshold \(nats\)"),
    ],
)
def test_settings_missing_from_an_authors_checkpoint_are_asked_for(
    home: Path, authors_file: Path, tmp_path: Path, missing: str, says: str
) -> None:
    given = {"tokenizer": str(home / "vq"), "entropy_model": str(home / "entropy"), "threshold": 3.1}
    with pytest.raises(StageError, match=says):
        run(home, tmp_path / "out", authors_file.name, **{k: v for k, v in given.items() if k != missing})
    assert not (tmp_path / "out").exists()


def test_a_threshold_for_llamagen_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="a LlamaGen has no patches"):
        run(home, tmp_path / "out", "llama", threshold=2.0)


@pytest.mark.parametrize(("what", "value"), [("codebook_size", 2 * V), ("grid_height", 2 * SIDE)])
def test_an_entropy_model_for_other_tokens_is_refused(home: Path, tmp_path: Path, what: str, value: int) -> None:
    config = LlamaGen.from_pretrained(home / "entropy").config
    other: dict[str, Any] = {what: value}
    LlamaGen(dataclasses.replace(config, **other)).save_pretrained(tmp_path / "entropy")
    shutil.copytree(home / "dpar", tmp_path / "dpar")
    record = json.loads((tmp_path / "dpar" / "run.json").read_text(encoding="utf-8"))
    record["inputs"]["entropy_model"]["fingerprint"] = dpar.fingerprint(tmp_path / "entropy")
    (tmp_path / "dpar" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"the entropy model's {what} is {value}"):
        run(tmp_path, tmp_path / "out", entropy_model=str(tmp_path / "entropy"))
    assert not (tmp_path / "out").exists()


def test_weights_inside_a_run_use_the_runs_record(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar", tmp_path / "dpar")
    model = DPAR.from_pretrained(tmp_path / "dpar" / "model")
    torch.nn.init.normal_(model.output.weight, std=0.1)
    model.save_pretrained(tmp_path / "dpar" / "model-ema")
    run(tmp_path, tmp_path / "out", "dpar/model-ema", per_class=1)
    made = held(tmp_path / "out")["made"]
    assert made.settings["weights"] == dpar.fingerprint(tmp_path / "dpar" / "model-ema")
    assert made.class_names == CLASSES


def test_a_run_without_weights_yet_is_one_message(home: Path, tmp_path: Path) -> None:
    record = json.loads((home / "dpar" / "run.json").read_text(encoding="utf-8"))
    RunFolder(tmp_path / "new", record["kind"], record["settings"], record["inputs"]).close()
    with pytest.raises(ModelError, match=f"the run {tmp_path}/new has no weights yet: it has not written"):
        sample_pictures(tmp_path / "new", tmp_path / "out", SampleSettings(**CPU), QUIET)


def test_a_run_whose_first_weights_are_being_written_is_one_message(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar", tmp_path / "dpar")
    weights = tmp_path / "dpar" / "model" / "model.safetensors"
    weights.rename(weights.with_name("model.safetensors.part"))
    with pytest.raises((StageError, ModelError), match="no weights yet"):
        sample_pictures(tmp_path / "dpar", tmp_path / "out", SampleSettings(**CPU), QUIET)


def test_anything_but_a_run_is_refused_with_the_command_to_make_one(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"codes is not a run: it has no run\.json\. `dpar train` makes one"):
        run(home, tmp_path / "out", "codes")


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


def test_the_nearest_training_image_of_a_copy_is_its_original(home: Path) -> None:
    generator = Generator.load(home / "dpar", SampleSettings(**CPU))
    training = open_training(home / "patches", generator, "--show-nearest")
    rows = np.array([3, 0])
    copied = training.gather(rows, np.zeros_like(rows)).codes
    altered = copied.copy()
    altered[1, 5] = (altered[1, 5] + 1) % V
    nearest = find_nearest(altered, training, generator.tokenizer)
    assert nearest.rows.tolist() == rows.tolist()
    assert nearest.keys == training.keys(rows)
    assert nearest.distance[0] == pytest.approx(0, abs=1e-3)
    vectors = generator.tokenizer.quantize.vectors()
    moved = (vectors[int(altered[1, 5])] - vectors[int(copied[1, 5])]).square().sum().item()
    assert nearest.distance[1] == pytest.approx((moved / N) ** 0.5, abs=1e-3)


def test_samples_and_their_nearest_training_images_are_written(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", show_nearest=home / "patches")
    listed = json.loads((tmp_path / "out" / "nearest.json").read_text(encoding="utf-8"))
    assert [entry["sample"] for entry in listed] == [f"{i:06d}" for i in range(6)]
    artifact = open_artifact(home / "patches")
    assert {entry["nearest"] for entry in listed} <= set(artifact.keys(np.arange(len(artifact))))
    assert Image.open(tmp_path / "out" / "nearest.png").width > 6 * 128


def test_nearest_images_of_another_tokenizer_are_refused(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    VQTokenizer(VQTokenizer.from_pretrained(home / "vq").config).save_pretrained(tmp_path / "vq")
    settings = TokenizeSettings(tokenizer=str(tmp_path / "vq"), image_size=SIZE, **CPU)
    tokenize(str(home / "photos"), tmp_path / "codes", settings, QUIET)
    with pytest.raises(StageError, match="Name the artifact that the model was trained on"):
        run(home, tmp_path / "out", show_nearest=tmp_path / "codes")
    assert not (tmp_path / "out").exists()

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dpar
from dpar import DPAR, LlamaGen, LlamaGenConfig
from dpar.errors import ModelError
from dpar.patching import static_starts
from dpar.sampling import sample
from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.errors import StageError
from pipeline.generate import decode
from pipeline.patchify import patchify
from pipeline.progress import Progress
from pipeline.run import RunFolder
from pipeline.sample import sample_pictures
from pipeline.settings import PatchifySettings, SampleSettings, TokenizeSettings, TrainSettings
from pipeline.tokenize import tokenize
from pipeline.train import train

V, SIDE, SIZE = 32, 4, 8
N = SIDE * SIDE
CLASSES = ("bird", "cat & dog", "fish")
FOLDERS = ("0000-bird", "0001-cat_dog", "0002-fish")
QUIET = Progress(quiet=True)
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
RULE: dict[str, Any] = {"threshold": 3.1, "max_length": 4, "row_reset": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sharpen(run: Path) -> None:
    """Makes a run's model sure of something, so that its samples depend on its inputs."""
    model: Any = (DPAR if "dpar" in run.name or "static" in run.name else LlamaGen).from_pretrained(run / "model")
    torch.manual_seed(3)
    nn.init.normal_(model.output.weight, std=0.2)
    model.save_pretrained(run / "model")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, an entropy model, patches, and runs of DPAR on both strategies and of LlamaGen."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (home / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(home / "photos" / name / f"{i}.png")
    torch.manual_seed(0)
    vq = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(vq).save_pretrained(home / "vq")
    config = LlamaGenConfig(codebook_size=V, grid_height=SIDE, grid_width=SIDE, classes=0, width=32, heads=2, layers=2)
    entropy_model = LlamaGen(config)
    nn.init.normal_(entropy_model.output.weight, std=0.3)
    entropy_model.save_pretrained(home / "entropy")
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=SIZE, **CPU)
    tokenize(str(home / "photos"), home / "codes", settings, QUIET)
    entropy = PatchifySettings(entropy_model=str(home / "entropy"), **RULE, **CPU)
    patchify(home / "codes", home / "patches", entropy, QUIET)
    static = PatchifySettings(strategy="static", static_length=1.81, **CPU)
    patchify(home / "codes", home / "static patches", static, QUIET)
    for data, run, model in (
        ("patches", "dpar", "dpar-tiny"),
        ("static patches", "static", "dpar-tiny"),
        ("codes", "llama", "llamagen-tiny"),
    ):
        train(home / data, home / run, TrainSettings(model=model, steps=1, batch=2, **CPU), QUIET)
        sharpen(home / run)
    return home


def run(home: Path, out: Path, model: str = "dpar", **values: Any) -> dict[str, Any]:
    return sample_pictures(home / model, out, SampleSettings(**{**CPU, "per_class": 2, **values}), QUIET)


def held(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz") as file:
        return dict(file)


def pictures(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.glob("*/*.png"))


def test_pictures_of_every_class_land_in_the_output(home: Path, tmp_path: Path) -> None:
    made = run(home, tmp_path / "out", per_class=3)
    assert pictures(tmp_path / "out") == [f"{folder}/{i:04d}.png" for folder in FOLDERS for i in range(3)]
    found = held(tmp_path / "out")
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found["codes"].shape == found["starts"].shape == (9, N)
    assert made["images"] == 9
    assert made["patches_per_image"] == pytest.approx(found["starts"].sum() / 9)
    assert Path(made["sheet"]) == tmp_path / "out" / "sheet.png"
    how = json.loads(str(found["how"]))
    assert how["weights"] == dpar.fingerprint(home / "dpar" / "model")
    assert how["settings"]["seed"] == 0
    pixels = decode(VQTokenizer.from_pretrained(home / "vq"), found["codes"], (SIDE, SIDE))
    for name, expected in zip(pictures(tmp_path / "out"), pixels, strict=True):
        np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "out" / name)).astype(int), expected, atol=1)


@pytest.mark.parametrize("wanted", [("fish", "bird"), ("2", "0"), ("fish", "0")])
def test_classes_are_chosen_by_name_or_number(home: Path, tmp_path: Path, wanted: tuple[str, ...]) -> None:
    run(home, tmp_path / "out", classes=wanted)
    assert held(tmp_path / "out")["labels"].tolist() == [2, 2, 0, 0]
    assert {name.split("/")[0] for name in pictures(tmp_path / "out")} == {FOLDERS[0], FOLDERS[2]}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("fihs", "did you mean 'fish'"), ("cat", "cat & dog"), ("3", "numbers go from 0 to 2"), ("-1", "no class")],
)
def test_an_unknown_class_is_refused_with_the_nearest(home: Path, tmp_path: Path, wanted: str, says: str) -> None:
    with pytest.raises(StageError, match=rf"no class is '{wanted}'") as refusal:
        run(home, tmp_path / "out", classes=(wanted,))
    assert says in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["dpar", "static", "llama"])
def test_an_image_does_not_depend_on_what_else_is_in_the_batch(home: Path, tmp_path: Path, model: str) -> None:
    run(home, tmp_path / "whole", model, batch=32, per_class=3)
    run(home, tmp_path / "parts", model, batch=2, per_class=3)
    whole, parts = held(tmp_path / "whole"), held(tmp_path / "parts")
    for name in ("codes", "starts", "labels"):
        np.testing.assert_array_equal(whole[name], parts[name])
    assert len(np.unique(whole["codes"], axis=0)) > 6


def test_another_seed_gives_other_images_and_the_same_seed_the_same(home: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(home, tmp_path / name, seed=seed)
    np.testing.assert_array_equal(held(tmp_path / "a")["codes"], held(tmp_path / "b")["codes"])
    assert (held(tmp_path / "a")["codes"] != held(tmp_path / "c")["codes"]).any(axis=1).all()


def test_codes_and_boundaries_are_the_librarys_under_the_training_datas_rule(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", cfg_scale=1.7)
    codes, starts = sample(
        DPAR.from_pretrained(home / "dpar" / "model"),
        LlamaGen.from_pretrained(home / "entropy"),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        cfg_scale=1.7,
        **RULE,
    )
    np.testing.assert_array_equal(held(tmp_path / "out")["codes"], codes.numpy())
    np.testing.assert_array_equal(held(tmp_path / "out")["starts"], starts.numpy())


def test_the_rule_can_be_set_for_sampling(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "coarse", threshold=9.0, max_length=0)
    assert (held(tmp_path / "coarse")["starts"].sum(axis=1) == SIDE).all()  # the rows alone
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
    """A place that the tokenizer and the entropy model have moved to, for as long as a test lasts."""
    for name in ("vq", "entropy"):
        shutil.move(home / name, tmp_path / name)
    yield tmp_path
    for name in ("vq", "entropy"):
        shutil.move(tmp_path / name, home / name)


def test_a_llamagen_run_needs_no_entropy_model(home: Path, moved: Path) -> None:
    run(home, moved / "out", "llama", tokenizer=str(moved / "vq"))
    assert held(moved / "out")["starts"].all()


@pytest.mark.parametrize(("option", "other"), [("tokenizer", "entropy_model"), ("entropy_model", "tokenizer")])
def test_a_part_that_has_moved_is_asked_for_by_its_option(home: Path, moved: Path, option: str, other: str) -> None:
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
    with pytest.raises(StageError, match=f"has weights {theirs}, but {ours} made the codes"):
        run(home, tmp_path / "out", **{option: str(tmp_path / "other")})


def test_a_run_without_weights_yet_is_one_message(home: Path, tmp_path: Path) -> None:
    record = json.loads((home / "dpar" / "run.json").read_text(encoding="utf-8"))
    RunFolder(tmp_path / "new", record["kind"], record["settings"], record["inputs"])
    with pytest.raises(StageError, match=f"the run {tmp_path}/new has no weights yet: its first checkpoint is still"):
        sample_pictures(tmp_path / "new", tmp_path / "out", SampleSettings(**CPU), QUIET)


def test_a_run_whose_first_weights_are_being_written_is_one_message(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar", tmp_path / "dpar")
    weights = tmp_path / "dpar" / "model" / "model.safetensors"
    weights.rename(weights.with_name("model.safetensors.part"))
    with pytest.raises((StageError, ModelError), match="no weights yet"):
        sample_pictures(tmp_path / "dpar", tmp_path / "out", SampleSettings(**CPU), QUIET)


def test_what_is_no_run_is_refused_with_the_command_that_makes_one(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"codes is no run: it has no run\.json\. `dpar train` makes one"):
        run(home, tmp_path / "out", "codes")


def test_pictures_do_not_go_among_other_files(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(home, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_pictures_of_an_earlier_sampling_do_not_stay_among_the_new(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", per_class=3)
    run(home, tmp_path / "out", classes=("bird",), per_class=1)
    assert pictures(tmp_path / "out") == [f"{FOLDERS[0]}/0000.png"]

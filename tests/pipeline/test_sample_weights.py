"""The model, tokenizer and entropy model of `dpar sample`: found, given by an option, or refused with a reason."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpar
from dpar import DPAR, LlamaGen
from dpar.errors import ModelError
from dpar.tokenizer import VQTokenizer
from pipeline.convert import convert
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.errors import StageError
from pipeline.sample import sample_pictures
from pipeline.settings.models import ConvertSettings
from pipeline.settings.sampling import SampleSettings
from tests.pipeline.sample_runs import CLASSES, held, run, save_runs
from tests.pipeline.sampled import CPU, QUIET, RULE, SIDE, V

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


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

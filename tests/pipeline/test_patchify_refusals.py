"""Codes, entropy models and settings that `dpar patchify` refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import dpar
from dpar import LlamaGen
from pipeline.convert import convert
from pipeline.runtime.errors import StageError
from pipeline.settings.models import ConvertSettings
from shards.errors import ArtifactError
from tests.pipeline.patchified import QUIET, SIZES, TOKENIZER, run, save_entropy_run, save_inputs, save_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


def test_codes_without_an_entropy_model_are_refused_with_a_remedy(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no entropies; name the entropy model with --entropy-model"):
        run(home / "arrow", tmp_path / "a", threshold=3.0)


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


def test_other_settings_over_an_artifact_are_refused_with_both_values(home: Path, tmp_path: Path) -> None:
    run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=3.0)
    with pytest.raises(ValueError, match=r"threshold was 3\.0 and is now 2\.5"):
        run(home / "arrow", tmp_path / "a", entropy_model=str(home / "entropy"), threshold=2.5)

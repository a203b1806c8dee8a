import json
import pickle
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
from dpar.sampling import sample
from dpar.tokenizer import VQConfig, VQTokenizer, psnr
from pipeline.errors import StageError
from pipeline.evaluate import _in_chunks, evaluate
from pipeline.features import frechet_distance, inception_features, tokenizer_features
from pipeline.generate import decode
from pipeline.likelihood import bits_per_token
from pipeline.originals import load_originals
from pipeline.patchify import patchify
from pipeline.progress import Progress
from pipeline.settings import EvalSettings, PatchifySettings, TokenizeSettings, TrainSettings
from pipeline.tokenize import tokenize
from pipeline.train import train
from shards.build import ArtifactBuild
from shards.manifest import Manifest, ShardInfo
from shards.reader import open_artifact
from shards.rows import Rows

V, SIDE, SIZE = 32, 4, 8
N = SIDE * SIDE
CLASSES = ("bird", "cat")
QUIET = Progress(quiet=True)
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
RULE: dict[str, Any] = {"threshold": 3.1, "max_length": 4, "row_reset": True}
VQ = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_photos(folder: Path, a_class: int = 5) -> None:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(a_class):
            Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / name / f"{i}.png")


def save_patches(home: Path, photos: Path, codes: Path, patches: Path) -> None:
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=SIZE, shard_size=4, **CPU)
    tokenize(str(photos), codes, settings, QUIET)
    patchify(codes, patches, PatchifySettings(entropy_model=str(home / "entropy"), **RULE, **CPU), QUIET)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, an entropy model, artifacts, and runs of both families that know a little."""
    home = tmp_path_factory.mktemp("made")
    save_photos(home / "photos")
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(home / "vq")
    config = LlamaGenConfig(codebook_size=V, grid_height=SIDE, grid_width=SIDE, classes=0, width=32, heads=2, layers=2)
    entropy_model = LlamaGen(config)
    nn.init.normal_(entropy_model.output.weight, std=0.3)
    entropy_model.save_pretrained(home / "entropy")
    save_patches(home, home / "photos", home / "codes", home / "patches")
    for model in ("dpar-tiny", "llamagen-tiny"):
        settings = TrainSettings(model=model, steps=3, batch=4, lr=3e-3, **CPU)
        train(home / "patches", home / model, settings, QUIET)
    return home


def run(home: Path, out: Path, model: str = "dpar-tiny", **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"reference": home / "patches", "cfg_scale": (1.5,), "samples": 4}
    return evaluate(home / model, out, EvalSettings(**{**defaults, **CPU, **values}), QUIET)


def build_patches(out: Path, codes: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> Path:
    """A patches artifact of these sequences, (n, N) each."""
    build = ArtifactBuild(out, settings={}, n_shards=1, container="arrow")
    rows = Rows(
        keys=[str(i) for i in range(len(codes))],
        labels=labels.astype(np.int32),
        codes=codes[:, None].astype(np.uint16),
        entropy=np.zeros(codes[:, None].shape, np.float16),
        starts=starts[:, None],
    )
    build.add(0, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="patches",
            container="arrow",
            grid=(SIDE, SIDE),
            codebook_size=V,
            views=1,
            class_names=CLASSES,
            rows=len(codes),
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    build.finish(manifest)
    return out


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_bits_per_token_of_a_model_that_knows_nothing_are_log2_of_the_codebook(
    home: Path, tmp_path: Path, model: str
) -> None:
    train(home / "patches", tmp_path / "run", TrainSettings(model=model, steps=1, batch=4, lr=0.0, **CPU), QUIET)
    settings = EvalSettings(reference=home / "patches", samples=0, **CPU)
    found = evaluate(tmp_path / "run", tmp_path / "scores", settings, QUIET)
    assert found["bits_per_token"] == pytest.approx(5.0, abs=1e-6)
    assert found["bits_by_class"] == pytest.approx({"bird": 5.0, "cat": 5.0}, abs=1e-6)
    assert found["cells"] == []


@pytest.mark.parametrize("family", ["dpar-tiny", "llamagen-tiny"])
def test_bits_per_token_of_a_sample_are_what_its_sampling_cost(home: Path, tmp_path: Path, family: str) -> None:
    kind: Any = DPAR if family.startswith("dpar") else LlamaGen
    model = kind.from_pretrained(home / family / "model")
    torch.manual_seed(1)
    nn.init.normal_(model.output.weight, std=0.2)
    seen: list[torch.Tensor] = []
    labels = torch.tensor([0, 1, 1, 0, 1])
    codes, starts = sample(
        model,
        LlamaGen.from_pretrained(home / "entropy") if kind is DPAR else None,
        labels,
        cfg_scale=1.0,
        observe=lambda position, logits: seen.append(logits),
        **(RULE if kind is DPAR else {}),
    )
    chosen = torch.stack(seen, dim=1).log_softmax(dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    cost = -chosen.double() / np.log(2)
    artifact = open_artifact(build_patches(tmp_path / "a", codes.numpy(), labels.numpy(), starts.numpy()))
    found = bits_per_token(model, artifact, batch=2, precision="fp32")
    assert found.bits_per_token == pytest.approx(float(cost.mean()), abs=1e-4)
    assert cost.std() > 0.5
    for label in (0, 1):
        assert found.bits_by_class[label] == pytest.approx(float(cost[labels == label].mean()), abs=1e-4)
    assert found.patches == pytest.approx(float(starts.sum()) / 5)


def test_bits_per_token_do_not_depend_on_the_batch_size(home: Path) -> None:
    artifact = open_artifact(home / "patches")
    model = DPAR.from_pretrained(home / "dpar-tiny" / "model")
    one, other = (bits_per_token(model, artifact, batch=size, precision="fp32") for size in (1, 7))
    assert one.bits_per_token == pytest.approx(other.bits_per_token, abs=1e-5)


def test_scores_are_written_as_numbers_a_table_and_sheets(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    found = run(home, out, cfg_scale=(1.0, 2.5), samples=5)
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "results.md",
        *(f"{name}-cfg-{scale}.png" for name in ("samples", "patches") for scale in ("1", "2.5")),
    }
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == found
    assert [(cell["cfg_scale"], cell["samples"], cell["reference_images"]) for cell in found["cells"]] == [
        (1.0, 5, 10),
        (2.5, 5, 10),
    ]
    table = (out / "results.md").read_text(encoding="utf-8")
    assert f"| held-out bits per token | {found['bits_per_token']:.4f} |" in table
    for cell in found["cells"]:
        name = "tokenizer Fréchet distance"
        assert cell["distance"] == name
        assert cell[name] > 0
        assert f"| {name} at guidance {cell['cfg_scale']:g} | {cell[name]:.3f} (5 samples, 10 references) |" in table
    assert found["held_out_images"] == 10
    assert found["patches_per_image"] == pytest.approx(
        open_artifact(home / "patches").manifest.statistics["patches_per_image"]
    )


def test_the_tokenizers_quality_is_that_of_its_reconstructions(home: Path, tmp_path: Path) -> None:
    artifact = open_artifact(home / "codes")
    rows = np.arange(len(artifact))
    codes = artifact.gather(rows, np.zeros_like(rows)).codes
    decoded = decode(VQTokenizer.from_pretrained(home / "vq"), codes, (SIDE, SIDE))
    originals = load_originals(artifact.manifest, artifact.keys(rows), np.zeros_like(rows))
    expected = float(psnr(torch.from_numpy(decoded), torch.from_numpy(originals)).mean())
    found = run(home, tmp_path / "scores", samples=0)
    assert found["originals"] == len(rows)
    assert found["reconstruction_psnr_db"] == pytest.approx(expected, abs=0.01)


def test_llamagen_is_scored_on_codes_and_has_no_sheet_of_patches(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", "llamagen-tiny", reference=home / "codes")
    assert found["patches_per_image"] == N
    assert not list((tmp_path / "scores").glob("patches-*"))


def test_a_finished_cell_is_not_sampled_again(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    first = run(home, out)
    written = (out / "results.json").read_bytes()
    sheet = out / "samples-cfg-1.5.png"
    sheet.unlink()  # it would come back if the cell were sampled
    assert run(home, out) == first
    assert (out / "results.json").read_bytes() == written
    more = run(home, out, cfg_scale=(1.5, 2.0))
    assert not sheet.exists()
    assert (out / "samples-cfg-2.png").exists()
    assert more["cells"][0] == first["cells"][0]
    assert [cell["cfg_scale"] for cell in more["cells"]] == [1.5, 2.0]


def test_results_of_other_weights_or_settings_are_refused_and_kept(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-tiny", tmp_path / "run")
    settings = EvalSettings(reference=home / "patches", samples=0, **CPU)
    out = tmp_path / "scores"
    evaluate(tmp_path / "run", out, settings, QUIET)
    before = (out / "results.json").read_bytes()
    model = DPAR.from_pretrained(tmp_path / "run" / "model")
    nn.init.normal_(model.output.weight, std=0.1)
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(StageError, match=f"{out} holds results of other weights or settings"):
        evaluate(tmp_path / "run", out, settings, QUIET)
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(StageError, match="other weights or settings"):
        evaluate(home / "dpar-tiny", out, settings, QUIET)


def test_a_folder_with_something_else_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(home, tmp_path)


def test_a_reference_of_another_tokenizer_is_refused_with_both(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    VQTokenizer(VQ).save_pretrained(tmp_path / "vq")
    shutil.copytree(home / "entropy", tmp_path / "entropy")
    save_patches(tmp_path, home / "photos", tmp_path / "codes", tmp_path / "patches")
    ours, theirs = (dpar.fingerprint(folder / "vq")[:12] for folder in (home, tmp_path))
    with pytest.raises(StageError, match=f"made by tokenizer {theirs}, the run's training data by {ours}"):
        run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert not (tmp_path / "scores").exists()


def test_without_the_originals_there_are_likelihood_and_samples_but_no_distance(home: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", a_class=2)
    save_patches(home, tmp_path / "photos", tmp_path / "codes", tmp_path / "patches")
    shutil.rmtree(tmp_path / "photos")
    found = run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert found["originals"] == 0
    assert found["bits_per_token"] > 0
    assert "distance" not in found["cells"][0]
    assert (tmp_path / "scores" / "samples-cfg-1.5.png").exists()


@pytest.mark.parametrize("kind", ["tokenizer", "entropy"])
def test_what_is_no_run_of_train_is_refused(home: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(StageError, match=r"is no run: it has no run\.json"):
        run(home, tmp_path / "a", "codes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": kind, "settings": {}, "inputs": {}}))
    with pytest.raises(StageError, match=f"a run of `dpar {kind}`; one of `dpar train` is needed"):
        evaluate(tmp_path / "run", tmp_path / "a", EvalSettings(reference=home / "patches", **CPU), QUIET)


def features(seed: int, n: int = 400, d: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_the_distance_of_a_set_from_itself_is_zero_and_moved_is_the_square_of_the_move() -> None:
    a = features(0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 3.0) == pytest.approx(9 * a.shape[1], rel=1e-9)


@pytest.mark.parametrize("d", [1, 48])
def test_the_distance_is_the_number_of_torch_fidelitys_formula(d: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(0, d=d), features(1, n=300, d=d)
    statistics = [{"mu": x.mean(axis=0), "sigma": np.atleast_2d(np.cov(x, rowvar=False))} for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) > 0.1


def test_the_distance_is_the_number_of_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = features(2), features(3)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_of_the_tokenizer_do_not_depend_on_the_batch_size(home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    one, other = (tokenizer_features(tokenizer, batch)(pixels) for batch in (2, 5))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_our_fid_is_torch_fidelitys_own_on_the_same_images_and_weights(tmp_path: Path) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Newborn(FeatureExtractorInceptionV3):
        """Keeps the weights that it is made with: there is no other way around its download."""

        def load_state_dict(self, *_: Any) -> None:
            pass

    torch.save({}, tmp_path / "nothing.pth")
    torch.manual_seed(0)
    newborn = Newborn("inception", ["2048"], feature_extractor_weights_path=str(tmp_path / "nothing.pth"))
    for module in newborn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(newborn.state_dict(), tmp_path / "inception.pth")
    extract = inception_features(tmp_path / "inception.pth", torch.device("cpu"))
    rng = np.random.default_rng(0)
    found = []
    for name, count, brightest in (("a", 4, 256), ("b", 3, 160)):
        (tmp_path / name).mkdir()
        pixels = rng.integers(0, brightest, (count, 40, 40, 3)).astype(np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        found.append(extract(pixels))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        cuda=False,
        fid=True,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )["frechet_inception_distance"]
    assert theirs > 0
    assert frechet_distance(*found) == pytest.approx(theirs, rel=1e-3)


class Trap:
    """Pickled, it is a call: whoever unpickles it without restraint makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_weights_file_with_code_in_it_is_refused_not_run(home: Path, tmp_path: Path, how: str) -> None:
    pytest.importorskip("torch_fidelity")
    held = {"Conv2d_1a_3x3.conv.weight": Trap(tmp_path / "sprung")}
    weights = tmp_path / "inception.pth"
    if how == "torch":
        torch.save(held, weights)
    else:
        weights.write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(StageError, match=f"Inception's weights could not be had in {weights}"):
        run(home, tmp_path / "scores", features="inception", inception_weights=weights)
    assert not (tmp_path / "sprung").exists()


def test_inception_weights_that_are_something_else_are_one_message(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("other.pth", "missing.pth"):
        with pytest.raises(StageError, match=f"could not be had in {tmp_path / name}"):
            inception_features(tmp_path / name, torch.device("cpu"))


@pytest.mark.parametrize("n", [1, 1000, 1001, 2500])
def test_images_are_gone_through_in_order_at_most_a_thousand_at_a_time(n: int) -> None:
    parts = _in_chunks(np.arange(n))
    assert max(len(part) for part in parts) <= 1000
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(n))

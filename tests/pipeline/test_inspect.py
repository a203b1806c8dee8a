import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpar
from dpar.patching import PatchRule, patch_starts, static_starts
from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.generation.generator import decode
from pipeline.inspect import inspect, spread
from pipeline.reports.inspection import tables
from pipeline.reports.inspection_record import Inspection
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.scoring.survey import entropy_quantiles
from pipeline.settings.artifacts import InspectSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import views
from pipeline.sources.originals import load_originals
from shards.errors import ArtifactError
from shards.manifest import Container, Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts, patch_lengths
from shards.reader import open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild

V, GRID, N = 32, (8, 8), 64
CLASSES = ("bird", "cat", "dög & <b>")
A_CLASS = 4  # images
THRESHOLD, MAX_LENGTH = 2.0, 4
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and a tokenizer."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (home / "photos" / name).mkdir(parents=True)
        for i in range(A_CLASS):
            Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(home / "photos" / name / f"{i}.png")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    return home


def build(
    made: Path,
    out: Path,
    kind: str = "patches",
    container: Container = "arrow",
    n_views: int = 2,
    strategy: str = "entropy",
) -> tuple[Path, Rows]:
    """Build an artifact of random codes and entropies in two shards; return it with its rows."""
    source = open_indexed(str(made / "photos"))
    rng = np.random.default_rng(1)
    shape = (len(source), n_views, N)
    entropy = (rng.random(shape) * 4).astype(np.float16)
    entropy[:4] /= 4  # birds are easy
    if strategy == "static":
        entropy[:] = np.nan
    entropy[..., 0] = np.inf
    starts = patch_starts(entropy, THRESHOLD, MAX_LENGTH, GRID[1], True)
    if strategy == "static":
        starts = np.broadcast_to(static_starts(N, 1.81), shape).copy()
    every = Rows(
        keys=[source.key(i) for i in range(len(source))],
        labels=np.array([source.label(i) for i in range(len(source))], np.int32),
        codes=rng.integers(0, V - 2, shape).astype(np.uint16),
        entropy=entropy if kind == "patches" else None,
        starts=starts if kind == "patches" else None,
    )
    codes_settings: dict[str, Any] = {
        "data": str(made / "photos"),
        "split": None,
        "classes": [],
        "limit": None,
        "image_size": 16,
        "views": "flip",
        "crop_range": [1.0],
    }
    rule = {"threshold": THRESHOLD, "max_length": MAX_LENGTH, "row_reset": True, "strategy": "entropy"}
    if strategy == "static":
        rule = PatchRule.static(1.81).to_dict()
    settings = codes_settings if kind == "codes" else {"codes_settings": codes_settings, **rule}
    writer = ArtifactBuild(out, settings=settings, n_shards=2, container=container)
    for index, here in enumerate((slice(0, 5), slice(5, None))):
        columns: dict[str, Any] = {
            f.name: None if getattr(every, f.name) is None else getattr(every, f.name)[here]
            for f in dataclasses.fields(Rows)
        }
        rows = Rows(**columns)
        writer.add(index, rows, None if rows.starts is None else count_patches(rows.starts, rows.labels))

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="codes" if kind == "codes" else "patches",
            container=container,
            grid=GRID,
            codebook_size=V,
            views=n_views,
            class_names=CLASSES,
            rows=len(source),
            shards=shards,
            settings=settings,
            source=source.describe(),
            tokenizer={"path": str(made / "vq"), "fingerprint": dpar.fingerprint(made / "vq")},
            made_by={"python": "3"},
            statistics=merge_counts(
                [shard.statistics for shard in shards], n_tokens=N, views=n_views, class_names=CLASSES
            )
            if kind == "patches"
            else {},
        )

    writer.finish(manifest)
    return out, every


def inspected(artifact: Path, out: Path | None = None, **settings: Any) -> Inspection:
    return inspect(artifact, out, InspectSettings(device="cpu", **settings), QUIET)


def look(artifact: Path, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    return inspected(artifact, out, **settings).to_json()


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_numbers_of_patches_equal_a_plain_count(made: Path, tmp_path: Path, container: Container) -> None:
    artifact, rows = build(made, tmp_path / "a", container=container)
    found = look(artifact, threshold=(1.0,))
    assert rows.starts is not None
    assert rows.entropy is not None
    sequences = rows.starts.reshape(-1, N)
    lengths: dict[str, int] = {}
    for sequence in sequences:
        first = [i for i in range(N) if sequence[i]]
        for a, b in zip(first, [*first[1:], N], strict=True):
            lengths[str(b - a)] = lengths.get(str(b - a), 0) + 1
    patches = found["patches"]
    assert patches["lengths"] == dict(sorted(lengths.items()))
    assert patches["mean_length"] == pytest.approx(sequences.size / sequences.sum())
    assert patches["tokens_saved"] == pytest.approx(1 - sequences.sum() / sequences.size)
    by_class = [rows.starts[rows.labels == c].size / rows.starts[rows.labels == c].sum() for c in range(3)]
    assert patches["class_mean_length"]["min"] == pytest.approx(min(by_class))
    assert patches["class_mean_length"]["median"] == pytest.approx(np.median(by_class))
    assert patches["class_mean_length"]["max"] == pytest.approx(max(by_class))
    finer = patch_starts(rows.entropy, 1.0, MAX_LENGTH, GRID[1], True)
    assert found["thresholds"][0]["mean_length"] == pytest.approx(finer.size / finer.sum())
    assert found["entropy"]["mean"] == pytest.approx(rows.entropy[..., 1:].astype(np.float64).mean())
    json.dumps(found)


def test_both_containers_give_the_same_numbers(made: Path, tmp_path: Path) -> None:
    one = look(build(made, tmp_path / "a", container="arrow")[0])
    other = look(build(made, tmp_path / "b", container="webdataset")[0])
    for name in ("codebook", "entropy", "patches", "compressible"):
        assert one[name] == other[name]


def test_codebook_use_counts_the_codes_that_occur(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a", kind="codes")
    found = look(artifact)
    assert found["codebook"]["used"] == len(np.unique(rows.codes)) == V - 2
    assert found["codebook"]["share"] == (V - 2) / V
    p = np.bincount(rows.codes.ravel()) / rows.codes.size
    assert found["codebook"]["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["patches"] is None
    assert found["entropy"] is None


def test_the_most_compressible_class_and_image_have_the_fewest_patches(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a")
    found = look(artifact)["compressible"]
    assert rows.starts is not None
    patches = rows.starts.sum((1, 2)) / 2
    assert found["classes"]["most"][0]["class"] == "bird"
    assert found["images"]["most"][0]["patches_per_image"] == patches.min()
    assert found["images"]["least"][0]["key"] == rows.keys[11 - int(np.argmax(patches[::-1]))]
    named = [image["key"] for end in ("most", "least") for image in found["images"][end]]
    assert len(named) == len(set(named))


def test_entropy_quantiles_are_exact() -> None:
    values = np.random.default_rng(0).random(1001).astype(np.float16) * 9
    counts = np.bincount(np.append(values, [np.inf, np.nan]).astype(np.float16).view(np.uint16), minlength=2**16)
    expected = np.quantile(values.astype(np.float64), [0, 0.1, 0.5, 1], method="inverted_cdf")
    assert entropy_quantiles(counts, [0, 0.1, 0.5, 1]) == expected.tolist()


def test_patches_end_at_the_end_of_an_image() -> None:
    starts = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert patch_lengths(starts).tolist() == [3, 1, 2]
    assert patch_lengths(np.zeros((0, 3), bool)).tolist() == []


def test_images_are_spread_evenly_over_classes() -> None:
    labels = np.repeat(np.arange(4), 10).astype(np.int32)
    assert np.bincount(labels[spread(labels, 8, range(4))]).tolist() == [2, 2, 2, 2]
    assert len(set(labels[spread(labels, 2, range(4))])) == 2
    assert set(labels[spread(labels, 3, [1, 3])]) == {1, 3}
    assert len(spread(labels, 100, range(4))) == 40
    assert len(spread(labels, 0, range(4))) == 0


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_a_page_shows_original_decoded_entropy_and_each_set_of_patches(
    made: Path, tmp_path: Path, container: Container
) -> None:
    artifact, _ = build(made, tmp_path / "a", container=container)
    out = tmp_path / "look"
    found = look(artifact, out, images=3, threshold=(1.0, 3.0))
    kinds = ("original", "decoded", "entropy", "patches-0", "patches-1", "patches-2")
    assert found["pictures"] == [f"{i:03d}-{kind}.png" for i in range(3) for kind in kinds] + ["patches.png"]
    assert {p.name for p in out.iterdir()} == {*found["pictures"], "index.html", "numbers.json"}
    assert json.loads((out / "numbers.json").read_text(encoding="utf-8")) == found
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/webp;base64,') == page.count("src=") == 19
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert "dög &amp; &lt;b&gt;" in page
    assert "<b>" not in page
    assert found["notes"] == []


def test_keys_and_classes_choose_what_is_drawn(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    look(artifact, tmp_path / "keys", keys=("cat/2.png", "bird/1.png"))
    page = (tmp_path / "keys" / "index.html").read_text(encoding="utf-8")
    assert page.index("<h2>cat/2.png</h2>") < page.index("<h2>bird/1.png</h2>")
    assert page.count("<figure") == 4
    look(artifact, tmp_path / "classes", classes=("cat",), images=2)
    page = (tmp_path / "classes" / "index.html").read_text(encoding="utf-8")
    assert page.count("<h2>cat/") == 2
    assert "<h2>bird/" not in page


def test_reconstructions_are_shown_next_to_originals_with_their_psnr(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    found = look(artifact, tmp_path / "look", images=2)
    assert found["pictures"][-1] == "reconstructions.png"
    assert " dB PSNR" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_without_their_source_images_are_drawn_without_originals_and_a_note_says_so(made: Path, tmp_path: Path) -> None:
    here = tmp_path / "copy"
    shutil.copytree(made, here)
    artifact, _ = build(here, tmp_path / "a")
    shutil.rmtree(here / "photos")
    found = look(artifact, tmp_path / "look", images=1)
    assert found["pictures"] == ["000-decoded.png", "000-entropy.png", "000-patches-0.png", "patches.png"]
    assert "no longer available" in found["notes"][0]
    assert "Originals are not shown" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_static_patches_without_entropies_are_drawn_without_entropy_maps(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", strategy="static")
    found = inspected(artifact, tmp_path / "look", images=1)
    assert found.entropy is None
    assert found.pictures[:-1] == ["000-original.png", "000-decoded.png", "000-patches-0.png"]
    assert any("static, length 1.81 (stored)" in row for table in tables(found) for row in table.rows)
    with pytest.raises(StageError, match="holds no entropies, which --threshold needs"):
        look(artifact, threshold=(1.0,))


def test_static_patches_list_no_most_compressible_classes(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", strategy="static")
    found = inspected(artifact, tmp_path / "look", images=0)
    assert found.compressible is None
    assert not any("ompressible" in table.caption or "of a class" in table.caption for table in tables(found))
    assert "ompressible" not in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_originals_equal_the_tokenized_pixels(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a")
    manifest = open_artifact(artifact).manifest
    source = open_indexed(str(made / "photos"))
    wanted = [7, 2, 7]
    found = load_originals(manifest, [rows.keys[i] for i in wanted], [0, 1, 1])
    for pixels, i, view in zip(found, wanted, [0, 1, 1], strict=True):
        np.testing.assert_array_equal(pixels, views(source.load(i), 16, "flip", [1.0])[view])


def test_an_image_that_has_left_the_source_is_named(made: Path, tmp_path: Path) -> None:
    manifest = open_artifact(build(made, tmp_path / "a", kind="codes")[0]).manifest
    with pytest.raises(StageError, match=r"1 of 2 images are no longer in their source, the first 'cat/99\.png'"):
        load_originals(manifest, ["cat/99.png", "cat/1.png"], [0, 0])


def test_decoding_in_batches_gives_the_same_images(made: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(made / "vq")
    codes = np.random.default_rng(0).integers(0, V, (5, N))
    np.testing.assert_allclose(
        decode(tokenizer, codes, GRID, batch=2).astype(int), decode(tokenizer, codes, GRID).astype(int), atol=1
    )


def test_another_tokenizer_is_refused_with_both_fingerprints(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    torch.manual_seed(1)
    VQTokenizer(VQTokenizer.from_pretrained(made / "vq").config).save_pretrained(tmp_path / "other")
    ours, other = (dpar.fingerprint(path)[:12] for path in (made / "vq", tmp_path / "other"))
    with pytest.raises(StageError, match=f"{other}.*{ours}"):
        look(artifact, tmp_path / "look", tokenizer=str(tmp_path / "other"))


def test_a_moved_tokenizer_can_be_given_and_statistics_need_none(made: Path, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(made, home)
    artifact, _ = build(home, tmp_path / "a")
    shutil.move(home / "vq", home / "moved")
    with pytest.raises(StageError, match="--tokenizer"):
        look(artifact, tmp_path / "look")
    assert look(artifact, tmp_path / "look", images=0)["pictures"] == []
    assert look(artifact, tmp_path / "look", images=1, tokenizer=str(home / "moved"))["pictures"]


def test_verify_names_every_damaged_shard(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    assert look(artifact, verify=True)["verified"]
    shard = artifact / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"1 of 2 shards.*00001\.arrow.*rerun the command that made it"):
        look(artifact, verify=True)
    (artifact / "00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"2 of 2 shards.*00000\.arrow.*00001\.arrow"):
        look(artifact, verify=True)


def test_patches_without_class_statistics_are_refused_with_a_remedy(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["statistics"]["classes"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StageError, match=r"lacks statistics of its classes.*dpar patchify"):
        look(artifact)


def test_unknown_keys_and_classes_are_refused_with_near_matches(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    with pytest.raises(StageError, match=r"no image 'cat/9\.png'.*did you mean 'cat/"):
        look(artifact, tmp_path / "look", keys=("cat/9.png",))
    with pytest.raises(StageError, match=r"no class 'cats'.*did you mean 'cat'"):
        look(artifact, tmp_path / "look", classes=("cats",))


def test_nothing_is_written_into_an_artifact_or_over_a_file(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a")
    (tmp_path / "file").write_text("")
    for out in (artifact, artifact / "look"):
        with pytest.raises(StageError, match="part of an artifact"):
            look(artifact, out)
    with pytest.raises(StageError, match="is a file"):
        look(artifact, tmp_path / "file")


def test_anything_but_an_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artifact"):
        look(tmp_path)


def test_tables_have_as_many_cells_in_a_row_as_in_the_header(made: Path, tmp_path: Path) -> None:
    for kind in ("codes", "patches"):
        inspection = inspected(build(made, tmp_path / kind, kind=kind)[0])
        for table in tables(inspection):
            assert {len(row) for row in table.rows} == {len(table.header)}
            assert all(isinstance(cell, str) for row in table.rows for cell in row)


@pytest.mark.parametrize("wrong", [{"images": -1}, {"batch": 0}, {"threshold": (float("nan"),)}])
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StageError):
        InspectSettings(**wrong)


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "a threshold of words": ({"settings": {"threshold": "7"}}, "field settings.threshold is '7', expected a finite"),
    "an endless limit": ({"settings": {"max_length": -1}}, "field settings is not a patch rule: max_length is -1"),
    "a static rule without a length": (
        {"settings": {"strategy": "static"}},
        "is not a patch rule: a static rule needs",
    ),
    "settings of codes in a list": ({"settings": {"codes_settings": []}}, "settings.codes_settings is [], expected"),
    "lengths in a list": ({"statistics": {"lengths": [1]}}, "field statistics.lengths is [1], expected an object"),
    "a length of words": (
        {"statistics": {"lengths": {"two": 1}}},
        "lengths counts 'two', expected up to 64",
    ),
    "a length without end": ({"statistics": {"lengths": {"9" * 9: 1}}}, "statistics.lengths counts '999999999'"),
    "no lengths": ({"statistics": {"lengths": {}}}, "field statistics.lengths is empty"),
    "no classes": ({"statistics": {"classes": []}}, "field statistics.classes is empty"),
    "a class without numbers": (
        {"statistics": {"classes": [{"class": "cat"}]}},
        "field statistics.classes[0].images is missing, expected an integer of at least 1",
    ),
    "a mean of words": ({"statistics": {"mean_length": "2"}}, "field statistics.mean_length is '2', expected a finite"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_settings_or_statistics_of_a_wrong_type_are_one_message(made: Path, tmp_path: Path, forged: str) -> None:
    changes, says = FORGED[forged]
    path = build(made, tmp_path / "a")[0] / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, values in changes.items():
        manifest[name] |= values
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError) as refusal:
        look(tmp_path / "a")
    assert str(refusal.value).startswith(f"{path}: field ")
    assert says in str(refusal.value)


@pytest.mark.parametrize("tokenizer", [{}, {"path": 3, "fingerprint": ""}, {"path": "x", "fingerprint": None}])
def test_a_tokenizer_that_is_not_recorded_is_one_message(made: Path, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    path = build(made, tmp_path / "a")[0] / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"tokenizer": tokenizer}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json: field tokenizer\.(path|fingerprint) is "):
        look(tmp_path / "a", tmp_path / "look")

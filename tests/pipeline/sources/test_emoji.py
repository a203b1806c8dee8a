import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.inspect import inspect
from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import InspectSettings, TokenizeSettings
from pipeline.sources import IndexedSource, open_indexed
from pipeline.sources.build_emoji import CLASSES, LEAST_TRAINING, base_emoji, build, group, held_out
from pipeline.sources.emoji import TAR
from pipeline.sources.originals import load_originals
from pipeline.tokenize import tokenize

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def emoji() -> dict[str, IndexedSource]:
    return {split: open_indexed("builtin:emoji", split=split) for split in SPLITS}


def name(source: IndexedSource, i: int) -> str:
    return Path(source.key(i)).stem


def test_both_splits_together_are_3391_images_of_the_same_51_classes(emoji: dict[str, IndexedSource]) -> None:
    assert [len(emoji[split]) for split in SPLITS] == [3030, 361]
    assert emoji["train"].class_names == emoji["validation"].class_names == tuple(sorted(CLASSES))
    assert len(CLASSES) == 51
    assert not emoji["train"].left_out
    assert not emoji["validation"].left_out


def test_each_class_has_20_training_images_and_one_held_out(emoji: dict[str, IndexedSource]) -> None:
    for split, least in zip(SPLITS, (LEAST_TRAINING, 1), strict=True):
        counts = Counter(emoji[split].label(i) for i in range(len(emoji[split])))
        assert len(counts) == len(CLASSES)
        assert min(counts.values()) >= least


def test_no_base_emoji_is_in_both_splits(emoji: dict[str, IndexedSource]) -> None:
    train, validation = ({base_emoji(name(emoji[s], i)) for i in range(len(emoji[s]))} for s in SPLITS)
    assert not train & validation


def test_no_held_out_image_looks_the_same_as_a_training_image(emoji: dict[str, IndexedSource]) -> None:
    train, validation = (
        np.stack([np.asarray(emoji[s].load(i).resize((16, 16)), np.float32).ravel() for i in range(len(emoji[s]))])
        for s in SPLITS
    )
    squared = (train**2).sum(1)[:, None] + (validation**2).sum(1) - 2 * train @ validation.T
    assert np.sqrt(squared.min() / train.shape[1]) > 0.02 * 255


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1f44b-1f3fd", "1f44b"),  # skin tone
        ("1f3c3-1f3ff-200d-2640-fe0f-200d-27a1-fe0f", "1f3c3"),  # gender and direction
        ("1f469-1f3fb-200d-1f9b0", "1f9d1"),  # hair
        ("1f468-1f3fe-200d-1f692", "1f9d1-200d-1f692"),
        ("1f469-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3ff", "1f48f"),
        ("1f467-1f3fb", "1f9d2"),
        ("39-fe0f-20e3", "0039-20e3"),
        ("a9-fe0f", "00a9"),
        ("1f400", "1f400"),
    ],
)
def test_variants_share_their_base_emoji(variant: str, base: str) -> None:
    assert base_emoji(variant) == base


def test_the_emoji_are_128_px_on_white(emoji: dict[str, IndexedSource]) -> None:
    for i in range(0, len(emoji["validation"]), 20):
        pixels = np.asarray(emoji["validation"].load(i))
        assert pixels.shape == (128, 128, 3)
        assert pixels[0].min() > 245  # transparent in the original: above every emoji


def test_the_listing_of_the_emoji_is_the_same_in_every_version(emoji: dict[str, IndexedSource]) -> None:
    # Hard-coded: a change would silently turn earlier artifacts into another data set.
    listings = [str(emoji[split].describe()["listing_sha256"])[:12] for split in SPLITS]
    assert listings == ["2778bbe9e965", "83c9e35c3f65"]


def test_plain_webdataset_opens_the_tar(emoji: dict[str, IndexedSource]) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(TAR), shardshuffle=False).decode("pil"))
    assert len(samples) == 3391
    keys = {f"{split}/{source.key(i)}" for split, source in emoji.items() for i in range(len(source))}
    assert {f"{sample['__key__']}.webp" for sample in samples} == keys
    assert all(sample["webp"].size == (128, 128) for sample in samples)


def test_classes_and_limit_choose_from_the_emoji() -> None:
    source = open_indexed("builtin:emoji", classes=["flag", "animal mammal"], limit=7)
    assert source.class_names == ("animal mammal", "flag")
    assert [source.label(i) for i in range(len(source))] == [0] * 4 + [1] * 3
    assert source.key(0).startswith("animal mammal/")


def test_an_unknown_split_or_class_of_the_emoji_lists_the_available_ones() -> None:
    with pytest.raises(StageError, match=r"builtin:emoji: no folder for the split 'test' in it; available: train, val"):
        open_indexed("builtin:emoji", split="test")
    with pytest.raises(StageError, match="no class 'flags' in this data; did you mean 'flag'"):
        open_indexed("builtin:emoji", classes=["flags"])


def test_emoji_are_tokenized_and_inspected_beside_their_originals(
    tmp_path: Path, emoji: dict[str, IndexedSource]
) -> None:
    settings = TokenizeSettings(tokenizer="builtin:photos", image_size=128, split="validation", limit=4)
    manifest = tokenize("builtin:emoji", tmp_path / "codes", settings)
    assert manifest is not None
    keys = [emoji["validation"].key(0), "animal mammal/1f400.webp"]
    load = emoji["validation"].find(keys)
    originals = load_originals(manifest, keys, [0, 0])
    np.testing.assert_array_equal(originals, np.stack([np.asarray(load[key]()) for key in keys]))
    inspect(tmp_path / "codes", tmp_path / "pages", InspectSettings(device="cpu"))
    assert (tmp_path / "pages" / "index.html").is_file()


def package_of(folder: Path, *names: str) -> tuple[Path, Path]:
    """Return the folders of two npm packages with these emoji, all of them animals."""
    (folder / "assets").mkdir(parents=True)
    for i, emoji in enumerate(names):
        image = Image.new("RGBA", (256, 256 + 8 * (i == 0)))
        ImageDraw.Draw(image).rectangle((64, 68, 127, 131), fill=(40 * i, 0, 255, 255))
        image.save(folder / "assets" / f"{emoji}.webp", lossless=True)
    fields = [{"unified": n.upper(), "non_qualified": None, "subcategory": "animal-mammal"} for n in names]
    (folder / "emoji.json").write_text(json.dumps(fields))
    return folder, folder


def test_building_twice_writes_the_same_bytes_on_white(tmp_path: Path) -> None:
    packages = package_of(tmp_path / "package", "1f400", "1f402")
    build(*packages, tmp_path / "a.tar")
    build(*packages, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    source = open_indexed(str(tmp_path / "a.tar"), split="train")
    assert [source.key(i) for i in range(len(source))] == ["animal mammal/1f400.webp", "animal mammal/1f402.webp"]
    for i in range(2):
        pixels = np.asarray(source.load(i)).astype(int)
        np.testing.assert_allclose(pixels[[0, 127, 80], [0, 127, 80]], 255, atol=3)
        np.testing.assert_allclose(pixels[48, 48], (40 * i, 0, 255), atol=8)


def test_building_refuses_an_image_without_class_and_a_wrong_folder(tmp_path: Path) -> None:
    images, subgroups = package_of(tmp_path / "package", "1f400")
    (images / "assets" / "1f400.webp").rename(images / "assets" / "1fbff.webp")
    with pytest.raises(StageError, match=r"1fbff\.webp: emoji\.json has no such emoji"):
        build(images, subgroups, tmp_path / "a.tar")
    with pytest.raises(StageError, match=r"no assets/\*\.webp found. Expected the npm package"):
        build(tmp_path, subgroups, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_identical_images_are_in_the_same_split() -> None:
    black, white = Image.new("RGB", (128, 128)), Image.new("RGB", (128, 128), "white")
    assert group({"1f431": black, "1f63a": black.copy(), "1f400": white}) == {
        "1f431": "1f431",
        "1f63a": "1f431",
        "1f400": "1f400",
    }


def test_held_out_is_a_tenth_but_leaves_20_for_training_and_splits_no_group_of_two_classes() -> None:
    names = [f"{letter}{i}" for letter in "ab" for i in range(100 if letter == "a" else 21)]
    classes = {name: name[0] for name in names}
    groups = {name: "shared" if name in ("a0", "b0") else name for name in names}
    chosen = held_out(classes, groups)
    assert Counter(classes[name] for name in names if groups[name] in chosen) == {"a": 10, "b": 1}
    assert "shared" not in chosen


def test_the_shipped_emoji_take_at_most_8_mb_and_come_with_their_licence() -> None:
    assert TAR.stat().st_size <= 8e6
    assert "Microsoft" in (TAR.parent / "LICENSE").read_text()
    assert "fluent-emoji-3d" in (TAR.parent / "README.md").read_text()

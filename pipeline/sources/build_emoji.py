"""Build the tar of ``builtin:emoji`` from two npm packages.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emoji-datasource-google@16.0.0     # unpack each
    python -m pipeline.sources.build_emoji fluent-emoji-3d/package emoji-datasource-google/package emoji.tar

The first package has the images (``assets/CODE-POINTS.webp``, 256 px, transparent), the second the subgroup of each
emoji (``emoji.json``). The tar has members ``SPLIT/CLASS/CODE-POINTS.webp``, 128 px on white. The same packages and
the same Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.runtime.errors import StageError

SIDE = 128
QUALITY = 75
HELD_OUT = 0.1  # approximate share of each class that is held out; base emoji are not divided
LEAST_TRAINING = 20  # fewest training images of a class
NEAR = 0.04  # two images below this distance are variants: root mean square of RGB in [0, 1], both at 32 px
CLASSES = {
    "animal bird": ["animal-bird"],
    "animal fish reptile bug": ["animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"],
    "animal mammal": ["animal-mammal"],
    "arrow": ["arrow"],
    "body part": ["body-parts", "hand-prop"],
    "book mail": ["book-paper", "mail"],
    "clock": ["time"],
    "clothing": ["clothing"],
    "drink dishware": ["drink", "dishware"],
    "electronics": ["phone", "computer", "light & video"],
    "event award": ["event", "award-medal"],
    "face creature": ["face-negative", "face-costume", "cat-face", "monkey-face"],
    "face happy": ["face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses"],
    "face neutral": ["face-hand", "face-neutral-skeptical", "face-sleepy"],
    "face unhappy": ["face-unwell", "face-concerned"],
    "family couple": ["family", "person-symbol"],
    "flag": ["flag", "country-flag", "subdivision-flag"],
    "food asian sweet": ["food-asian", "food-sweet"],
    "food fruit vegetable": ["food-fruit", "food-vegetable"],
    "food prepared": ["food-prepared"],
    "game art": ["game", "arts & crafts"],
    "hand fingers": ["hand-fingers-partial"],
    "hand fist": ["hand-fingers-closed"],
    "hand open": ["hand-fingers-open"],
    "hand pointing": ["hand-single-finger"],
    "hand pair": ["hands"],
    "heart": ["heart"],
    "household": ["household", "hotel", "other-object"],
    "letter number": ["alphanum", "keycap"],
    "media button": ["av-symbol"],
    "music sound": ["sound", "music", "musical-instrument"],
    "office money": ["office", "writing", "money"],
    "person activity": ["person-activity"],
    "person fantasy": ["person-fantasy"],
    "person gesture": ["person-gesture"],
    "person portrait": ["person"],
    "person resting": ["person-resting"],
    "person role": ["person-role"],
    "person sport": ["person-sport"],
    "place building": ["place-building", "place-religious"],
    "place scenery": ["place-map", "place-geographic", "place-other"],
    "plant": ["plant-flower", "plant-other"],
    "shape": ["geometric"],
    "sign": ["transport-sign", "warning"],
    "sky weather": ["sky & weather"],
    "sport equipment": ["sport"],
    "symbol": ["emotion", "gender", "math", "punctuation", "currency", "other-symbol"],
    "tool science medical": ["tool", "lock", "science", "medical"],
    "transport air water": ["transport-water", "transport-air"],
    "transport ground": ["transport-ground"],
    "zodiac religion": ["religion", "zodiac"],
}
"""The Unicode subgroups of each class; small ones are merged with the most similar."""

_ENGLAND = "1f3f4-e0067_e0062"  # and Scotland and Wales: the image package's own spelling
# Variants that no code point marks: gender, age by gender, mirror images, and the hours of a clock.
_VARIANTS = (
    ("1f9d1", "1f468 1f469 1f471 1f9d4"),
    ("1f9d2", "1f466 1f467"),
    ("1f9d3", "1f474 1f475"),
    ("1f478", "1f934"),
    ("1f385", "1f936 1f9d1-200d-1f384"),
    ("1f483", "1f57a"),
    ("1f930", "1fac3 1fac4"),
    ("1f46b", "1f46c 1f46d 1f9d1-200d-1f91d-200d-1f9d1"),
    ("1f48f", "1f9d1-200d-2764-200d-1f48b-200d-1f9d1"),
    ("1f491", "1f9d1-200d-2764-200d-1f9d1"),
    ("1f91d", "1faf1-200d-1faf2"),
    ("1f446", "1f447 1f448 1f449 261d"),
    ("1f44d", "1f44e"),
    ("1f91b", "1f91c"),
    ("1faf1", "1faf2"),
    ("1faf7", "1faf8"),
    ("1f50d", "1f50e"),
    ("1f550", " ".join(f"{code:x}" for code in range(0x1F551, 0x1F568))),
)
_BASES = {variant: base for base, variants in _VARIANTS for variant in variants.split()}


def base_emoji(name: str) -> str:
    """Return the code points of an image without skin tone, gender, hair and direction."""
    name = re.sub(r"-(1f3f[b-f]|fe0f)", "", name)
    name = re.sub(r"-200d-(2640|2642|27a1|1f9b[0-3])", "", name)
    name = re.sub(r"^[0-9a-f]{2}(?![0-9a-f])", r"00\g<0>", name)  # some keycaps occur with and without zeros
    if name in _BASES:
        return _BASES[name]
    # Replace men, women and children in a sequence; the result may be a variant, too.
    people = ("1f9d1", "1f9d2", "1f9d3")
    parts = [_BASES[part] if _BASES.get(part) in people else part for part in name.split("-")]
    return _BASES.get("-".join(parts), "-".join(parts))


def read_classes(datasource: Path) -> dict[str, str]:
    """Return the class of each emoji's code points, all padded to four digits and in lower case."""
    class_of = {subgroup: name for name, subgroups in CLASSES.items() for subgroup in subgroups}
    classes = {}
    for emoji in json.loads((datasource / "emoji.json").read_text("utf-8")):
        if emoji["subcategory"] in class_of:
            for variant in (emoji, *emoji.get("skin_variations", {}).values()):
                for code in (variant["unified"], variant["non_qualified"]):
                    if code:
                        classes[code.lower()] = class_of[emoji["subcategory"]]
    return classes


def class_of_image(name: str, classes: Mapping[str, str]) -> str:
    """Return the class of an image by its file name; some lack leading zeros, some flags have underscores.

    Raises:
        StageError: the emoji is not in a class.
    """
    if name.startswith(_ENGLAND):
        return "flag"
    for code in (name, "00" + name):
        if code in classes:
            return classes[code]
    raise StageError(f"{name}.webp: emoji.json has no such emoji in the subgroups of any class; add it to CLASSES")


def read_image(path: Path) -> Image.Image:
    """Return one image on white, (SIDE, SIDE) RGB."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    side = min(image.size)  # four images are 8 px taller than wide, with empty margins
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = white.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def group(images: Mapping[str, Image.Image]) -> dict[str, str]:
    """Return the base emoji of each image; base emoji that look the same are joined."""
    names = list(images)
    parent = {base: base for base in map(base_emoji, names)}

    def root(base: str) -> str:
        while parent[base] != base:
            base = parent[base]
        return base

    small = [np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float64).ravel() for image in images.values()]
    pixels = np.stack(small) / 255
    squares = (pixels**2).sum(1)
    distances = (squares[:, None] + squares - 2 * pixels @ pixels.T) / pixels.shape[1]
    for i, j in np.argwhere(np.triu(distances < NEAR**2, 1)):
        one, other = sorted((root(base_emoji(names[i])), root(base_emoji(names[j]))))
        parent[other] = one
    return {name: root(base_emoji(name)) for name in names}


def held_out(classes: Mapping[str, str], groups: Mapping[str, str]) -> set[str]:
    """Return the groups of the validation split: about a tenth of each class, in an order drawn by hash.

    Args:
        classes: class of each image.
        groups: group of each image.
    """
    sizes = Counter(groups.values())
    in_classes: defaultdict[str, set[str]] = defaultdict(set)
    for name, base in groups.items():
        in_classes[base].add(classes[name])
    chosen: set[str] = set()
    for class_name, total in Counter(classes.values()).items():
        # A group with images of several classes stays in the training split.
        candidates = [base for base, names in in_classes.items() if names == {class_name}]
        candidates.sort(key=lambda base: hashlib.sha256(base.encode()).digest())
        quota = min(round(HELD_OUT * total), total - LEAST_TRAINING)
        for base in candidates:
            if sizes[base] <= 2 * quota:  # brings the class closer to its quota
                chosen.add(base)
                quota -= sizes[base]
    return chosen


def build(package: Path, datasource: Path, out: Path) -> None:
    """Write the tar.

    Raises:
        StageError: the package has no images, or one without a class.
    """
    images = {path.stem: read_image(path) for path in sorted((package / "assets").glob("*.webp"))}
    if not images:
        raise StageError(f"{package}: no assets/*.webp found. Expected the npm package @lobehub/fluent-emoji-3d.")
    by_code = read_classes(datasource)
    classes = {name: class_of_image(name, by_code) for name in images}
    groups = group(images)
    validation = held_out(classes, groups)
    members = {
        f"{'validation' if groups[name] in validation else 'train'}/{classes[name]}/{name}.webp": image
        for name, image in images.items()
    }
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in sorted(members):
            data = io.BytesIO()
            members[member].save(data, "WEBP", quality=QUALITY, method=6)
            info = tarfile.TarInfo(member)  # time 0, owner 0
            info.size = data.tell()
            data.seek(0)
            tar.addfile(info, data)


def main() -> None:
    """Run `build` on the command line's paths."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.sources.build_emoji", description="Build builtin:emoji.")
    parser.add_argument("package", type=Path, help="folder of the npm package @lobehub/fluent-emoji-3d 1.1.0")
    parser.add_argument("datasource", type=Path, help="folder of the npm package emoji-datasource-google 16.0.0")
    parser.add_argument("out", type=Path, help="tar to write")
    arguments = parser.parse_args()
    build(arguments.package, arguments.datasource, arguments.out)


if __name__ == "__main__":
    main()

"""The images that an artifact was made from, found again in their source by the artifact's own record.

    pixels = load_originals(artifact.manifest, artifact.keys(rows), views=np.zeros(len(rows), np.int64))

Pixel for pixel what the tokenizer saw, as long as the source has not changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.sources import Source, UnusableImage, open_source
from pipeline.views import views as crops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shards.manifest import Manifest


def load_originals(
    manifest: Manifest, keys: Sequence[str], views: Sequence[int] | NDArray[np.integer[Any]]
) -> NDArray[np.uint8]:
    """The crops whose codes the artifact holds.

    Args:
        manifest: of a codes or a patches artifact.
        keys: of the images, n of them.
        views: which view of each, n of them.

    Returns:
        (n, size, size, 3) uint8.

    Raises:
        StageError: the source is gone, has no image of one of the keys, or the image is now unusable.
    """
    settings = tokenize_settings(manifest)
    source = _open(manifest, settings)
    load = source.find(keys)
    missing = sorted(set(keys) - set(load))
    if missing:
        raise StageError(
            f"{len(missing)} of {len(set(keys))} images are not in their source any more, the first {missing[0]!r}"
        )
    size = int(settings["image_size"])
    out = np.empty((len(keys), size, size, 3), np.uint8)
    for i, (key, view) in enumerate(zip(keys, views, strict=True)):
        try:
            out[i] = crops(load[key](), size, settings["views"], settings["crop_range"])[int(view)]
        except UnusableImage as error:
            raise StageError(f"image {key!r} of {settings['data']} cannot be read any more: {error.reason}") from error
    return out


def tokenize_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings with which the codes of an artifact of either kind were made."""
    settings: dict[str, Any] = manifest.settings
    return settings if manifest.kind == "codes" else settings["codes_settings"]


def _open(manifest: Manifest, settings: dict[str, Any]) -> Source:
    # Without the limit: what has been added to the source since would otherwise push images out of its listing.
    made_from, classes = manifest.source, settings["classes"]
    columns = {name: made_from.get(name) for name in ("image_column", "label_column")}
    location = made_from.get("location")
    is_folder = made_from.get("kind") == "folder"  # its location is within the split already
    if location and (not is_folder or os.path.isdir(location)):
        split = None if is_folder else made_from.get("split")
        try:  # holds wherever the command is run from
            return open_source(location, split=split, classes=classes, **columns)
        except StageError:
            pass
    try:
        return open_source(settings["data"], split=settings["split"], classes=classes, **columns)
    except StageError as error:
        raise StageError(f"the images that the codes were made from are not there any more: {error}") from error

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
    where = _positions(source, keys)
    size = int(settings["image_size"])
    out = np.empty((len(keys), size, size, 3), np.uint8)
    for i, (key, view) in enumerate(zip(keys, views, strict=True)):
        try:
            out[i] = crops(source.load(where[key]), size, settings["views"], settings["crop_range"])[int(view)]
        except UnusableImage as error:
            raise StageError(f"image {key!r} of {settings['data']} cannot be read any more: {error.reason}") from error
    return out


def tokenize_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings with which the codes of an artifact of either kind were made."""
    settings: dict[str, Any] = manifest.settings
    return settings if manifest.kind == "codes" else settings["codes_settings"]


def _open(manifest: Manifest, settings: dict[str, Any]) -> Source:
    # Without the limit: what has been added to the source since would otherwise push images out of its listing.
    location = manifest.source.get("location")
    if manifest.source.get("kind") == "folder" and location and os.path.isdir(location):
        return open_source(location, classes=settings["classes"])  # holds wherever the command is run from
    try:
        return open_source(settings["data"], split=settings["split"], classes=settings["classes"])
    except StageError as error:
        raise StageError(f"the images that the codes were made from are not there any more: {error}") from error


def _positions(source: Source, keys: Sequence[str]) -> dict[str, int]:
    """Where each of the keys is in the source."""
    wanted = set(keys)
    found: dict[str, int] = {}
    for i in range(len(source)):
        if len(found) == len(wanted):
            break
        if (key := source.key(i)) in wanted:
            found[key] = i
    missing = sorted(wanted - set(found))
    if missing:
        raise StageError(
            f"{len(missing)} of {len(wanted)} images are not in their source any more, the first {missing[0]!r}"
        )
    return found

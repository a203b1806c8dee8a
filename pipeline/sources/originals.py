"""The original images of an artifact, loaded from the source that its manifest records.

    pixels = load_originals(artifact.manifest, artifact.keys(rows), views=np.zeros(len(rows), np.int64))

They are exactly the pixels that the tokenizer received, unless the source has changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.runtime.errors import StageError
from pipeline.settings.fields import Views
from pipeline.sources import HUB, Source, UnusableImage, open_source
from pipeline.sources.crops import n_views
from pipeline.sources.crops import views as crops
from shards.errors import ArtifactError
from shards.records import Positive, parse
from shards.storage import is_url

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shards.manifest import Manifest


T = TypeVar("T")

MOST_DOWNSAMPLING = 64  # pixels along a side of a token
FETCHED = ("http", "https", "s3", "gs")  # kinds of URLs in a manifest that are fetched if the user allows it


@dataclass(frozen=True, kw_only=True)
class TokenizeRecord:
    """The settings of tokenization that a manifest must record."""

    data: str
    split: str | None
    classes: tuple[str, ...]
    image_size: Positive
    views: Views
    crop_range: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The source of the images as a manifest may record it."""

    kind: str | None = None
    location: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def load_originals(
    manifest: Manifest, keys: Sequence[str], views: Sequence[int] | NDArray[np.integer[Any]], *, fetch: bool = False
) -> NDArray[np.uint8]:
    """Return the crops that were encoded into an artifact's codes.

    Args:
        manifest: of a codes or a patches artifact.
        keys: n keys of images.
        views: n views, one of each image.
        fetch: allow fetching images over the network, from the address in the manifest, whoever wrote it.

    Returns:
        (n, size, size, 3) uint8.

    Raises:
        StageError: the source is gone or not on this machine, lacks one of the keys, or an image is now unusable; or
            the manifest does not record the source.
    """
    settings = tokenize_settings(manifest)
    source = _open(_recorded(SourceRecord, manifest.source, "source"), settings, fetch)
    load = source.find(keys)
    missing = sorted(set(keys) - set(load))
    if missing:
        raise StageError(
            f"{len(missing)} of {len(set(keys))} images are no longer in their source, the first {missing[0]!r}"
        )
    size = settings.image_size
    if size > MOST_DOWNSAMPLING * max(manifest.grid) or n_views(settings.views, settings.crop_range) != manifest.views:
        raise StageError(
            f"the manifest contradicts itself: its images of {size} pixels, views {settings.views} at "
            f"{len(settings.crop_range)} crop ranges, do not make {manifest.views} views of {manifest.grid} tokens"
        )
    out = np.empty((len(keys), size, size, 3), np.uint8)
    for i, (key, view) in enumerate(zip(keys, views, strict=True)):
        try:
            out[i] = crops(load[key](), size, settings.views, settings.crop_range)[int(view)]
        except UnusableImage as error:
            raise StageError(f"image {key!r} of {settings.data} can no longer be read: {error.reason}") from error
    return out


def tokenize_settings(manifest: Manifest) -> TokenizeRecord:
    """Return the settings with which an artifact's codes were made, for codes and patches."""
    if manifest.kind == "codes":
        return _recorded(TokenizeRecord, manifest.settings, "settings")
    return _recorded(TokenizeRecord, manifest.settings.get("codes_settings"), "settings.codes_settings")


def _recorded(kind: type[T], values: Any, at: str) -> T:
    try:
        return parse(kind, values, "the manifest", at=at, ignore_unknown=True)
    except ArtifactError as error:
        raise StageError(f"the images that the codes were made from are not recorded: {error}") from error


def _open(recorded: SourceRecord, settings: TokenizeRecord, fetch: bool) -> Source:
    # Without the limit: images added to the source later would otherwise displace others.
    columns = {"image_column": recorded.image_column, "label_column": recorded.label_column}
    options: dict[str, Any] = {"classes": settings.classes, "local_only": not fetch, **columns}
    location = recorded.location
    is_folder = recorded.kind == "folder"  # its location already includes the split
    if location and (not is_folder or os.path.isdir(location)):
        split = None if is_folder else recorded.split
        _check_scheme(location)
        try:  # works from any working directory
            return open_source(location, split=split, **options)
        except StageError:
            pass
    _check_scheme(settings.data)
    try:
        return open_source(settings.data, split=settings.split, **options)
    except StageError as error:
        raise StageError(f"the images that the codes were made from are no longer available: {error}") from error


def _check_scheme(location: str) -> None:
    """Raise StageError for a URL that could make fsspec do more than fetch a file."""
    scheme = location.partition(":")[0].lower()
    if is_url(location) and not location.startswith(HUB) and ("::" in location or scheme not in (*FETCHED, "file")):
        raise StageError(f"{location}: a manifest may name files here and {', '.join(FETCHED)} URLs, no other kind")

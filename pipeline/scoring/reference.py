"""What samples are compared with: an artifact's originals, a folder of images, or an ``.npz``.

    source = open_reference(Path("VIRTUAL_imagenet256_labeled.npz"), extract)    # checked, nothing computed yet
    reference = source.measured or Reference.of(features, images)

An ``.npz`` holds images (``arr_0``), statistics (``mu``, ``sigma``, and for sFID ``mu_s``, ``sigma_s``), both, as
ADM's do, or the output of `Reference.save`. Stored statistics are used unchanged. KID, precision and recall need images
or their features, of at most 10,000 evenly spread images, the number that ADM's suite uses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Generator as Indices
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.generation.npz import IMAGES, NpzImages, array_names, open_array, open_npz, read_floats
from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.provenance import made_by
from pipeline.runtime.work_sharing import Parts, claim_parts
from pipeline.scoring.features import SPATIAL_FEATURES, Extractor, Features, Statistics, resize
from pipeline.sources import UnusableImage
from pipeline.sources.decode import EXTENSIONS, read_image
from pipeline.sources.originals import load_originals, tokenize_settings
from shards.files import atomic_path, file_sha256
from shards.manifest import MANIFEST
from shards.reader import Artifact, open_artifact
from shards.storage import Location, Url, is_file

CHUNK = 500  # images in memory at the same time
NEEDED = ("pool", "spatial")  # features of a reference
NEIGHBOURS_OF = 10_000  # most images of the reference for precision and recall
CENTRE_OF_TEN = 4  # index of the centre crop among the views of a ten-crop
SYMMETRY = 1e-3  # relative tolerance for the symmetry of a covariance; float16 has this precision
LARGEST_COVARIANCE = 1e100  # whose products are still finite
LARGEST_PROVENANCE = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Features of the reference that scores need."""

    statistics: Statistics
    features: NDArray[np.float32] | None  # (m, d), m at most NEIGHBOURS_OF; None if there are only statistics
    spatial: Statistics | None = None  # of Inception's spatial features, for sFID

    @classmethod
    def of(cls, features: Features, stored: Reference | None = None) -> Reference:
        """Return the reference of the features of all images, with the statistics of ``stored`` if given."""
        pool = features["pool"]
        if stored is None:
            spatial = Statistics.of(features["spatial"]) if "spatial" in features else None
            stored = cls(statistics=Statistics.of(pool), features=None, spatial=spatial)
        return dataclasses.replace(stored, features=pool[spread(len(pool))])

    def save(self, path: Path, provenance: dict[str, Any]) -> None:
        """Write an ``.npz`` that :func:`open_reference` accepts, atomically."""
        arrays: dict[str, Any] = {"mu": self.statistics.mu, "sigma": self.statistics.sigma}
        arrays |= {} if self.spatial is None else {"mu_s": self.spatial.mu, "sigma_s": self.spatial.sigma}
        arrays |= {} if self.features is None else {"features": self.features}
        record = provenance | {"images": self.statistics.images, "made_by": made_by()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part, open(part, "wb") as file:
            np.savez(file, provenance=np.array(json.dumps(record)), **arrays)

    @classmethod
    def load(cls, path: Path, extract: Extractor | None = None) -> Reference:
        """Read statistics from an ``.npz``, and features if it has them.

        Args:
            path: the file.
            extract: the extractor of the samples' features; if given, the file's must be of the same kind.

        Raises:
            StageError: they are of other features, or damaged.
        """
        with open_npz(path) as archive:
            record, shapes = _provenance(archive), _shapes(archive)
            width = _width(shapes, "mu", "sigma", path)
            if extract is not None:
                _check_network(record, width, extract, path)
            statistics = _read_statistics(archive, "mu", "sigma", width, record.get("images"))
            spatial = None
            if {"mu_s", "sigma_s"} <= shapes.keys():
                spatial_width = _width(shapes, "mu_s", "sigma_s", path)
                if spatial_width != SPATIAL_FEATURES:
                    raise StageError(f"{path}: mu_s has {spatial_width} entries; {SPATIAL_FEATURES} are needed")
                spatial = _read_statistics(archive, "mu_s", "sigma_s", spatial_width, record.get("images"))
            features = None
            if "features" in shapes:
                rows = min(shapes["features"][0], NEIGHBOURS_OF) if shapes["features"] else 0
                features = read_floats(archive, "features", (rows, width)).astype(np.float32)
        return cls(statistics=statistics, features=features, spatial=spatial)


def network_of(path: Path) -> str:
    """Return the network of the statistics in an ``.npz``; Inception if the file does not record it."""
    with open_npz(path) as archive:
        return str(_provenance(archive).get("features", "inception"))


def _shapes(archive: zipfile.ZipFile) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        if f"{name}.npy" in archive.namelist():
            with open_array(archive, name) as (_, (shape, _, _)):
                shapes[name] = shape
    return shapes


def _width(shapes: dict[str, tuple[int, ...]], mu: str, sigma: str, path: Path) -> int:
    """Return the number of entries of a mean; raise StageError unless the covariance has the same size."""
    width = shapes[mu][0] if shapes[mu] else 0
    if shapes[mu] != (width,) or shapes.get(sigma) != (width, width):
        raise StageError(f"{path}: {mu} is {shapes[mu]} and {sigma} {shapes.get(sigma)}; (d,) and (d, d) are needed")
    return width


def _read_statistics(archive: zipfile.ZipFile, mu: str, sigma: str, width: int, images: int | None) -> Statistics:
    mean, covariance = read_floats(archive, mu, (width,)), read_floats(archive, sigma, (width, width))
    _check_covariance(covariance, Path(str(archive.filename)))
    return Statistics(mean, covariance, images)


def _check_network(record: dict[str, Any], width: int, extract: Extractor, path: Path) -> None:
    """Raise StageError unless statistics of ``width`` numbers are of the features of ``extract``."""
    stored = (record.get("features", "inception"), width)
    if stored != (extract.name, extract.dimension):
        raise StageError(
            f"{path} has statistics of {stored[1]} {stored[0]} features; --features {extract.name} has "
            f"{extract.dimension}"
        )
    if (weights := record.get("weights", extract.weights)) != extract.weights:
        raise StageError(
            f"{path} was measured with other weights of the {extract.name} features "
            f"({weights[:12]}, here {extract.weights[:12]}); distances would be meaningless"
        )


def _provenance(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the provenance that `Reference.save` wrote; empty for other files."""
    if "provenance.npy" not in archive.namelist():
        return {}
    with open_array(archive, "provenance") as (file, (shape, _, kind)):
        text = ""
        if shape == () and kind.kind == "U" and kind.itemsize <= LARGEST_PROVENANCE:
            text = str(np.frombuffer(file.read(kind.itemsize), kind)[0])
    try:
        record = json.loads(text)
        kinds = {"images": int, "features": str, "weights": str}
        plain = all(type(record[name]) is kind for name, kind in kinds.items() if record.get(name) is not None)
        if plain and (record.get("images") is None or record["images"] > 1):
            return {name: record[name] for name in kinds if record.get(name) is not None}
    except (ValueError, RecursionError, AttributeError):
        pass
    raise StageError(f"{archive.filename}: its provenance is damaged; `dpar eval --save-reference` writes it as JSON")


def _check_covariance(sigma: NDArray[np.float64], path: Path) -> None:
    """Raise StageError unless ``sigma`` (d, d) can be a covariance: symmetric, without negative variances."""
    largest = float(np.abs(sigma).max(initial=0.0))
    if largest > LARGEST_COVARIANCE or not np.allclose(sigma, sigma.T, rtol=SYMMETRY, atol=SYMMETRY * largest):
        raise StageError(f"{path}: sigma is not a covariance: it is not symmetric, or its numbers are too large")
    if float(np.diagonal(sigma).min(initial=0.0)) < 0:
        raise StageError(f"{path}: sigma is not a covariance: it has a negative number on its diagonal")


class Images(Protocol):
    """Numbered images of one size."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, first: int, end: int) -> NDArray[np.uint8]:
        """Return images ``first`` to ``end - 1``: (end - first, H, W, 3) uint8."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSource:
    """An opened reference: images, or measured statistics, or both."""

    images: Images | None
    measured: Reference | None
    artifact: Artifact | None
    fingerprint: str


def is_artifact(path: Location) -> bool:
    """Return whether a reference is an artifact; only artifacts can be at a URL."""
    return isinstance(path, Url) or is_file(path / MANIFEST)


def open_reference(path: Location, extract: Extractor, fetch: bool = False) -> ReferenceSource:
    """Open the reference at ``path``, without computing anything; ``fetch`` allows fetching an artifact's originals.

    Raises:
        StageError, ArtifactError: samples cannot be compared with it, or its images differ in size, are
            not in colour, or are damaged.
    """
    if isinstance(path, Url) or is_artifact(path):
        artifact = open_artifact(path)
        return ReferenceSource(
            images=Originals(artifact, fetch),
            measured=None,
            artifact=artifact,
            fingerprint=artifact.manifest.fingerprint(),
        )
    if path.is_dir():
        folder = FolderImages(path)
        return ReferenceSource(images=folder, measured=None, artifact=None, fingerprint=folder.fingerprint)
    if path.suffix == ".npz":
        names = array_names(path)
        images = NpzImages(path) if IMAGES in names else None
        stored = {"mu", "sigma"} <= names and (images is None or network_of(path) == extract.name)
        measured = Reference.load(path, extract) if stored else None
        if images is None and measured is None:
            listed = ", ".join(repr(name)[1:-1] for name in sorted(names)[:8]) or "nothing"
            raise StageError(f"{path} has {listed}; a reference needs arr_0, or mu and sigma")
        return ReferenceSource(images=images, measured=measured, artifact=None, fingerprint=file_sha256(path))
    what = "does not exist" if not path.exists() else "is none of these"
    raise StageError(f"a reference is an artifact, a folder of images, or an .npz file; {path} {what}")


def measure_reference(
    source: ReferenceSource,
    extract: Extractor,
    path: Path,
    provenance: dict[str, Any],
    progress: Progress,
    engine: Engine,
) -> Reference | None:
    """Return the reference's features, computed once by the processes that share ``path``.

    Args:
        source: from :func:`open_reference`.
        extract: computes features.
        path: ``.npz`` file for the result.
        provenance: stored in that file.
        progress: where to report.
        engine: computes the features.

    Returns:
        None, with a message, if the originals of an artifact are unavailable.

    Raises:
        StageError: an image cannot be read.
    """
    images, measured = source.images, source.measured
    if measured is not None and (measured.features is not None or images is None):
        return measured
    assert images is not None  # a source without statistics has images
    parts = Parts(path.with_suffix(""), -(-len(images) // CHUNK), path.is_file)

    def work(indices: Indices[int, None, None], count: Count) -> None:
        for index in indices:
            pixels = images.read(index * CHUNK, min((index + 1) * CHUNK, len(images)))
            features = extract(resize(pixels, extract.side(pixels.shape[1])))
            parts.save(index, **{name: features[name] for name in NEEDED if name in features})
            count.advance(len(pixels))

    try:
        with progress.task("reference", len(images), "images") as task:
            engine.run(parts.pieces, work, task)
    except StageError as error:
        if not isinstance(images, Originals):
            raise
        progress.say(f"no distance to the reference: {error}")
        return None
    for _ in claim_parts(path, 1, lambda _: path.is_file()):
        needed = [name for name in NEEDED if name in parts.load(0)]
        Reference.of({name: parts.joined(name) for name in needed}, measured).save(path, provenance)
    shutil.rmtree(parts.folder, ignore_errors=True)
    return Reference.load(path)


class Originals:
    """The images that an artifact was made from."""

    def __init__(self, artifact: Artifact, fetch: bool) -> None:
        self.artifact, self._fetch = artifact, fetch

    def __len__(self) -> int:
        return len(self.artifact)

    def read(self, first: int, end: int) -> NDArray[np.uint8]:
        """See :class:`Images`."""
        return self.read_rows(np.arange(first, end))

    def read_rows(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images (n, H, W, 3) uint8 of rows (n,): centre crops, if the artifact has them."""
        manifest = self.artifact.manifest
        central = CENTRE_OF_TEN if tokenize_settings(manifest).views == "ten-crop" else 0
        return load_originals(manifest, self.artifact.keys(rows), np.full_like(rows, central), fetch=self._fetch)


class FolderImages:
    """All images below a folder, in order of their names."""

    def __init__(self, folder: Path) -> None:
        """List the images and read their headers.

        Raises:
            StageError: there are none, they differ in size, or one is not in colour or not readable.
        """
        files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
        self.paths = sorted(path for path in files if path.suffix.lower() in EXTENSIONS and path.is_file())
        if len(self.paths) < 2:
            raise StageError(f"{folder} holds {len(self.paths)} images; a reference needs at least 2")
        digest, first = hashlib.sha256(), None
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    size, bands = image.size, image.mode
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise StageError(f"{path} cannot be read as an image: {error}") from error
            first = first or size
            if bands not in ("RGB", "RGBA", "P"):
                raise StageError(f"{path} is not in colour (mode {bands}); a reference needs colour images")
            if size != first:
                raise StageError(
                    f"{path} is {size[0]}×{size[1]} pixels, {self.paths[0]} {first[0]}×{first[1]}; the images of a "
                    "reference must have the same size. `dpar tokenize` crops a folder as for training, and its output "
                    "can be a reference"
                )
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, first: int, end: int) -> NDArray[np.uint8]:
        """See :class:`Images`."""
        return self.read_rows(np.arange(first, end))

    def read_rows(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images (n, H, W, 3) uint8 of rows (n,)."""
        pixels = []
        for path in (self.paths[row] for row in rows):
            try:
                pixels.append(np.asarray(read_image(path)))
            except UnusableImage as error:
                raise StageError(f"{path} cannot be used: {error.reason}") from error
        return np.stack(pixels)


def spread(rows: int, most: int = NEIGHBOURS_OF) -> NDArray[np.int64]:
    """Return the indices of at most ``most`` evenly spread rows out of ``rows``, (n,) int64."""
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most).astype(np.int64)

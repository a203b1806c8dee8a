"""The scores of samples, and of a second set of real images: the best that samples can be expected to reach.

scores = scores_of(features, reference, bootstrap)
floor = measure_floor(Path("scores/floor"), source, samples, reference, extract, bootstrap, progress, engine)
"""

from __future__ import annotations

import shutil
from collections.abc import Generator as Indices
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.work_sharing import Parts, write_once
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.features import (
    Extractor,
    Features,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
    resize,
)
from pipeline.scoring.kernel_distance import kernel_distance
from pipeline.scoring.records import Floor, Scores
from pipeline.scoring.reference import CHUNK, FolderImages, Originals, Reference, open_reference, spread
from shards.storage import Location


def scores_of(samples: Features, reference: Reference, bootstrap: Bootstrap) -> Scores:
    """Return all scores that the features of samples allow; distances need at least 2 images."""
    pool, score = samples["pool"], inception_score(samples["logits"]) if "logits" in samples else None
    distance = frechet_distance(Statistics.of(pool), reference.statistics)
    pair = kernel = kernel_interval = spatial = spatial_interval = None
    if reference.features is not None:
        pair = precision_recall(pool, reference.features)
        if len(reference.features) > 1:
            part = pool[spread(len(pool))]
            kernel = kernel_distance(part, reference.features)
            kernel_interval = bootstrap.kernel(part, reference.features, kernel[0])
    if reference.spatial is not None and "spatial" in samples:
        spatial = frechet_distance(Statistics.of(samples["spatial"]), reference.spatial)
        spatial_interval = bootstrap.frechet(samples["spatial"], reference.spatial, spatial)
    return Scores(
        distance=distance,
        distance_interval=bootstrap.frechet(pool, reference.statistics, distance),
        spatial_distance=spatial,
        spatial_distance_interval=spatial_interval,
        kernel_distance=None if kernel is None else kernel[0],
        kernel_distance_interval=kernel_interval,
        kernel_distance_error=None if kernel is None else kernel[1],
        reference_images=reference.statistics.images,
        inception_score=None if score is None else score[0],
        inception_score_std=None if score is None else score[1],
        precision=None if pair is None else pair[0],
        recall=None if pair is None else pair[1],
    )


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """A second set of real images."""

    path: Location
    images: Originals | FolderImages
    fingerprint: str

    @classmethod
    def open(cls, path: Location, extract: Extractor, fetch: bool) -> RealImages:
        """Open the images at ``path``, without computing anything; ``fetch`` allows fetching originals.

        Raises:
            StageError, ArtifactError: it is not an artifact or a folder of at least 2 images.
        """
        source = open_reference(path, extract, fetch)
        if not isinstance(source.images, Originals | FolderImages) or len(source.images) < 2:
            raise StageError(f"--floor {path} must be an artifact or a folder, of at least 2 images")
        return cls(path=path, images=source.images, fingerprint=source.fingerprint)


def measure_floor(
    folder: Path,
    source: RealImages,
    samples: int,
    reference: Reference,
    extract: Extractor,
    bootstrap: Bootstrap,
    progress: Progress,
    engine: Engine,
) -> Floor:
    """Return the scores of real images against the reference, measured once and shared by processes.

    Args:
        folder: of the record, whose name has the source's fingerprint and the number of images.
        source: the second set.
        samples: images to compare, evenly spread over the source; 0 is all.
        reference: what they are compared with.
        extract: computes their features.
        bootstrap: computes intervals.
        progress: where to report.
        engine: computes the features.

    Raises:
        StageError: the originals cannot be read, or the distance is not finite.
    """
    images = source.images
    chosen = spread(len(images), samples or len(images))
    record = folder / f"{source.fingerprint[:16]}-{len(chosen)}.json"
    parts = Parts(record.with_suffix(""), -(-len(chosen) // CHUNK), record.is_file)

    def work(indices: Indices[int, None, None], count: Count) -> None:
        for index in indices:
            rows = chosen[index * CHUNK : (index + 1) * CHUNK]
            pixels = images.read_rows(rows)
            parts.save(index, **extract(resize(pixels, extract.side(pixels.shape[1]))))
            count.advance(len(rows))

    with progress.task("floor", len(chosen), "images") as task:
        engine.run(parts.pieces, work, task)

    def finish() -> Floor:
        assert extract.name != "dinov2"  # never the first network
        scores = scores_of({name: parts.joined(name) for name in parts.load(0)}, reference, bootstrap)
        return Floor(
            source=str(source.path),
            fingerprint=source.fingerprint,
            samples=len(chosen),
            features=extract.name,
            scores=scores,
        )

    values = write_once(record, lambda: finish().to_json())
    shutil.rmtree(parts.folder, ignore_errors=True)
    return Floor.from_json(values, str(record))

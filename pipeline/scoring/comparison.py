"""Comparison of samples with the reference on the features of a network; an evaluation may use several networks.

    comparisons = open_comparisons(settings, generator.tokenizer_origin, out, engine)    # checked, nothing computed yet
    reference = comparisons[0].reference(progress)
    features = comparisons[0].features_of(folder, generator, artifact, done, progress)

The first is that of ``--features``, also used for reconstructions, floor and plots. ``--dinov2-weights`` adds another.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator as Indices
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.generation.generator import Generator
from pipeline.runs.weights import load_tokenizer
from pipeline.runtime.device import choose_device
from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.progress import Progress
from pipeline.runtime.work_sharing import Parts
from pipeline.scoring.dinov2 import DinoFeatures
from pipeline.scoring.efficientnet import EfficientNetFeatures
from pipeline.scoring.features import Extractor, InceptionFeatures, TokenizerFeatures
from pipeline.scoring.records import DISTANCE, KERNEL_DISTANCE, PREFIX, SPATIAL_DISTANCE, Measure
from pipeline.scoring.reference import Reference, ReferenceSource, measure_reference, open_reference
from pipeline.settings.sampling import EvalSettings
from shards.reader import Artifact


@dataclass
class Comparison:
    """A network, and the reference's features."""

    extract: Extractor
    source: ReferenceSource
    name: str  # of the reference, as given
    path: Path  # file of its features
    engine: Engine  # computes features
    _reference: Reference | None = None

    def reference(self, progress: Progress) -> Reference | None:
        """Return the reference's features, measured once; None if its originals are unavailable."""
        if self._reference is None:
            self._reference = measure_reference(
                self.source, self.extract, self.path, self.provenance(), progress, self.engine
            )
        return self._reference

    def provenance(self) -> dict[str, Any]:
        """Return the provenance stored with the reference's statistics."""
        return {"features": self.extract.name, "weights": self.extract.weights, "reference": self.name}

    def folder(self, cell: Path) -> Path:
        """Return the folder of a cell's features, which exists until they are scored."""
        return cell / f"features-{self.extract.name}"

    def features_of(
        self, cell: Path, generator: Generator, artifact: Artifact, done: Callable[[], bool], progress: Progress
    ) -> Parts:
        """Compute features of a cell's samples, one part per shard, shared by processes.

        Args:
            cell: its folder.
            generator: its tokenizer decodes the samples.
            artifact: the samples.
            done: whether the parts are no longer needed.
            progress: where to report.
        """
        parts = Parts(self.folder(cell), len(artifact.manifest.shards), done)
        extract, side = self.extract, self.extract.side(generator.image_size[0])

        def work(indices: Indices[int, None, None], count: Count) -> None:
            for index in indices:
                pixels = generator.decode(artifact.shard_rows(index).codes[:, 0], side)
                parts.save(index, **extract(pixels))
                count.advance(len(pixels))

        with progress.task(f"score {cell.name}, {extract.name}", len(artifact), "images") as task:
            self.engine.run(parts.pieces, work, task)
        return parts

    def measures(self, reference: Reference, samples: int, labels: str, precision: str) -> list[Measure]:
        """Return how each score by this network is measured.

        Args:
            reference: its features.
            samples: number of images compared with it.
            labels: how their classes are chosen.
            precision: of decoding them.
        """
        name, compared = self.extract.name, reference.features
        stored = self.source.measured is not None
        all_images = (f"statistics stored in {self.name}" if stored else self.name, reference.statistics.images)
        scores: dict[str, tuple[str | None, int | None]] = {DISTANCE[name]: all_images}
        if reference.spatial is not None:
            scores[SPATIAL_DISTANCE] = all_images
        if compared is not None:
            some = (f"images of {self.name}", len(compared))
            scores |= {KERNEL_DISTANCE[name]: some, f"{PREFIX[name]}precision": some, f"{PREFIX[name]}recall": some}
        if name == "inception":
            scores["inception_score"] = (None, None)
        return [
            Measure(
                score=score,
                network=self.extract.network,
                weights=self.extract.weights,
                resize=self.extract.resize,
                reference=source,
                reference_images=images,
                samples=samples,
                labels=labels,
                decode_precision=precision,
            )
            for score, (source, images) in scores.items()
        ]


def open_comparisons(settings: EvalSettings, tokenizer: dict[str, str], out: Path, engine: Engine) -> list[Comparison]:
    """Return one comparison per network of an evaluation, that of ``--features`` first.

    Args:
        settings: the networks and the reference.
        tokenizer: path and fingerprint of the samples' tokenizer.
        out: folder for the reference's features.
        engine: computes features.

    Raises:
        StageError, ArtifactError: a network's weights or the reference cannot be used.
    """
    s = settings
    extractors: list[Extractor] = [engine.load(_first, s, tokenizer)]
    if s.dinov2_weights is not None:
        extractors.append(engine.load(_dino, s.dinov2_weights, s.device, s.scoring_batch))
    return [
        Comparison(
            extract=extract,
            source=open_reference(s.reference, extract, s.fetch_originals),
            name=str(s.reference),
            path=out / ("reference-dinov2.npz" if extract.name == "dinov2" else "reference.npz"),
            engine=engine,
        )
        for extract in extractors
    ]


def _first(settings: EvalSettings, tokenizer: dict[str, str]) -> Extractor:
    """Return the network of ``--features``."""
    s, device = settings, choose_device(settings.device)
    if s.network == "inception":
        return InceptionFeatures(s.inception_weights, device, s.scoring_batch)
    if s.network == "efficientnet":
        return EfficientNetFeatures(device, s.scoring_batch)
    encoder = load_tokenizer(tokenizer["path"], tokenizer["fingerprint"]).to(device)
    return TokenizerFeatures(encoder, tokenizer["fingerprint"], s.scoring_batch)


def _dino(weights: Path, device: str, batch: int) -> Extractor:
    return DinoFeatures(weights, choose_device(device), batch)

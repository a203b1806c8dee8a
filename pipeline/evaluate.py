"""``dpar eval RUN OUT --reference R``: likelihood of held-out images and quality of samples.

    results = evaluate(Path("run"), Path("scores"), EvalSettings(reference=Path("validation-patches")))

    OUT/results.json, .csv, .md   all numbers and their provenance
    OUT/quality-vs-*.png          against guidance, patch length and training FLOPs, if these vary
    OUT/likelihood/NAME.json      each row of the held-out table: bits per token, patches and GMACs per image
    OUT/cells/NAME/               each cell of the table: its codes as an artifact, its numbers, its sheets, and
                                  samples above their nearest training images
    OUT/reference.npz             the reference's statistics
    OUT/floor/                    the scores of a second set of real images, with ``--floor``

A row of the held-out table is a combination of checkpoint, threshold and maximum patch length; the held-out images are
patchified again with its rule, from their stored entropies. A cell is a row with a guidance scale. RUN may also be a
LlamaGen that was trained elsewhere: its checkpoint file, or a directory of weights without a run.

Bits per token are exact. The distance between samples and reference is FID with ``--features inception``; on the
tokenizer's features it has another name and compares only with distances on the same features. All scores have
confidence intervals, and the results record how each was measured. Any number of processes may work on one OUT, and a
killed evaluation resumes; the numbers do not depend on either.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpar.llamagen import LlamaGen
from dpar.patching import PatchRule
from pipeline.generation.generator import Generator, weights_fingerprint
from pipeline.generation.nearest import open_training, recorded_training, shown_rows
from pipeline.generation.sampled_artifact import Plan, labels_like, labels_of, write_sampled
from pipeline.runtime.device import choose_device, precision_name, rank, world_size
from pipeline.runtime.engine import Engine, open_engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.work_sharing import Parts, claim_folder, claim_parts, write_once
from pipeline.sample import sample_sheet, save_picture, write_nearest
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.candidates import Candidate, Row, candidates, training_flops
from pipeline.scoring.comparison import open_comparisons
from pipeline.scoring.features import Statistics, frechet_distance
from pipeline.scoring.floor import RealImages, measure_floor, scores_of
from pipeline.scoring.held_out import check_held_out, held_out_rule, measure_held_out
from pipeline.scoring.likelihood import check_same_classes
from pipeline.scoring.protocol import deviations
from pipeline.scoring.reconstruction import reconstruct
from pipeline.scoring.records import Cell, Floor, HeldOutRow, Measure, Reconstruction, Results, Scores
from pipeline.scoring.reference import CHUNK, NEEDED, Originals, Reference, is_artifact
from pipeline.scoring.results import write_results
from pipeline.settings.fields import identity as settings_identity
from pipeline.settings.sampling import EvalSettings
from shards.errors import ArtifactError
from shards.reader import Artifact, open_artifact
from shards.storage import Location

FORMAT = 3  # of OUT's files; 2 had no intervals, and 1 computed bits per token with the stored boundaries


def evaluate(run: Path, out: Path, settings: EvalSettings, progress: Progress | None = None) -> Results:
    """Score a run of ``dpar train``, or a LlamaGen's weights.

    Results that ``out`` already has are not computed again.

    Returns:
        The contents of ``results.json``.

    Raises:
        StageError, ModelError, ArtifactError: run, reference, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    stopped = f"Stopped. Finished scores are kept in {out}; run the same command again to resume."
    with stops_with(stopped), open_engine(settings, progress) as engine:
        job = _Evaluation(run, out, settings, progress, engine)
        likelihoods = [job.likelihood(row) for row in job.rows]
        reconstruction = job.reconstruction()
        job.sample_cells(likelihoods)
        return write_results(
            out,
            likelihoods[0],
            reconstruction,
            job.identity,
            job.floor(),
            job.measures(),
            (settings.protocol, job.deviations),
        )


class _Evaluation:
    """The inputs of :func:`evaluate`, checked before anything is computed."""

    def __init__(self, run: Path, out: Path, settings: EvalSettings, progress: Progress, engine: Engine) -> None:
        self.run, self.out, self.settings, self.progress, self.engine = run, out, settings, progress, engine
        place = settings.held_out or (settings.reference if is_artifact(settings.reference) else None)
        self.artifact: Artifact | None = None if place is None else _open(place)
        self.candidates = candidates(run, settings.checkpoint)
        choices = list(itertools.product(settings.threshold or (None,), settings.max_length or (None,)))
        self.rows = [
            Row(candidate=candidate, threshold=threshold, max_length=length)
            for candidate in self.candidates
            for threshold, length in choices
        ]
        self._loaded: tuple[Candidate, Generator] | None = None
        generator = self.generator(self.rows[0])
        if self.artifact is not None:
            check_held_out(self.artifact, generator, run)
        self.comparisons = open_comparisons(settings, generator.tokenizer_origin, out, engine)
        self.first = self.comparisons[0]
        self.extract, self.source = self.first.extract, self.first.source
        self.bootstrap = Bootstrap(seed=settings.seed, resamples=settings.bootstrap)
        self.deviations = deviations(settings, generator, self.source) if settings.protocol == "paper" else []
        self.floor_source = None
        if settings.floor is not None:
            self.floor_source = RealImages.open(settings.floor, self.extract, settings.fetch_originals)
        self.labels = self._labels(generator)
        images, compares = self.source.images, settings.images > 0 or settings.save_reference is not None
        if compares and self.source.measured is None and images is not None and len(images) < 2:
            raise StageError(f"{settings.reference} holds {len(images)} images; a reference needs at least 2")
        self._rules = self._held_out_rules(generator, choices)
        self.training = self._open_training(generator)
        self.identity = self._identity()
        claim_folder(out, "eval.json", self.identity, "holds results of other weights or settings")
        self._warn()

    def _open_training(self, generator: Generator) -> Artifact | None:
        """Return the artifact to search for nearest training images; None, with a message, if unavailable."""
        path = self.settings.training or recorded_training(self.run)
        if not self.settings.images:
            return None
        try:
            if path is None:
                raise StageError(f"{self.run} does not record its training artifact; name it with --training")
            return open_training(path, generator, "--training")
        except (ArtifactError, StageError) as error:
            if self.settings.training is not None:
                raise
            self.progress.say(f"no sheet of nearest training images: {error}")
            return None

    def generator(self, row: Row) -> Generator:
        """Return the generator of a row, with its rule."""
        candidate = row.candidate
        if self._loaded is None or self._loaded[0] != candidate:
            self._loaded = None  # one model in memory at a time
            load = self.engine.load
            self._loaded = (candidate, load(Generator.load, self.run, self.settings, self.artifact, candidate.path))
        return self.engine.load(Generator.with_rule, self._loaded[1], row.threshold, row.max_length)

    def _labels(self, generator: Generator) -> NDArray[np.int64]:
        """Return the classes of a cell's images, (samples,) int64."""
        s, names, artifact = self.settings, generator.class_names, self.source.artifact
        if s.labels != "reference":
            return labels_of(list(range(len(names))), s.images, s.labels, s.seed)
        if artifact is None:
            raise StageError(f"--labels reference needs the classes of an artifact; {s.reference} has none")
        check_same_classes(names, artifact.manifest.class_names, str(self.run), str(s.reference))
        rows = np.arange(len(artifact))
        return labels_like(artifact.gather(rows, np.zeros_like(rows)).labels, s.images)

    def _held_out_rules(
        self, generator: Generator, choices: list[tuple[float | None, int | None]]
    ) -> dict[tuple[float | None, int | None], PatchRule | None]:
        """Return, by threshold and maximum length, the rule for held-out images; None keeps stored boundaries."""
        rules: dict[tuple[float | None, int | None], PatchRule | None] = {}
        for choice in choices:
            chosen = generator.with_rule(*choice)  # refuses a rule that the model cannot sample with
            explicit = (*choice, self.settings.row_reset) != (None, None, None)
            if self.artifact is not None:
                rules[choice] = held_out_rule(self.artifact, chosen, explicit, self.progress)
        return rules

    def _identity(self) -> dict[str, Any]:
        """Return what determines the results, except the choice of cells."""
        chosen = settings_identity(self.settings)
        newest = None if self.settings.checkpoint else weights_fingerprint(str(self.run))
        identity: dict[str, Any] = {"run": str(self.run), "weights": newest, "reference": self.source.fingerprint}
        identity["format"] = FORMAT
        identity["held_out"] = None if self.artifact is None else self.artifact.manifest.fingerprint()
        identity["features_of"] = {c.extract.name: c.extract.weights for c in self.comparisons}
        as_json: dict[str, Any] = json.loads(json.dumps(identity | chosen, default=str))
        return as_json

    def _warn(self) -> None:
        """Warn about deviations from a protocol, and about distances that are not FID or are of too few images."""
        for line in self.deviations:
            self.progress.say(f"not as in the paper: {line}")
        if self.settings.features == "tokenizer":
            self.progress.say("distances on the tokenizer's features are not FID; compare them only with each other")
        known = self.source.measured
        in_reference = known.statistics.images if known is not None else len(self.source.images or ())
        counts = {"reference": in_reference, "samples": self.settings.images}
        few = [f"{n} {name}" for name, n in counts.items() if n is not None and 0 < n <= self.extract.dimension]
        if few:
            self.progress.say(
                f"{' and '.join(few)} images are few for {self.extract.dimension} features: the covariance is "
                "rank-deficient and the distance too large; compare it only with distances between as many images"
            )

    def likelihood(self, row: Row) -> HeldOutRow:
        """Return the row's exact bits per token on the held-out artifact, and the model's cost there."""
        weights = weights_fingerprint(row.candidate.path or str(self.run))
        path = self.out / "likelihood" / f"{row.name or 'newest'}.json"
        if self.artifact is None:
            tokens = self.generator(row).model.config.n_tokens
            record = HeldOutRow(weights=weights, tokens_per_image=tokens)
            record = HeldOutRow.from_json(write_once(path, record.to_json), str(path))
        else:
            rule = self._rules[row.threshold, row.max_length]
            load = functools.partial(self.generator, row)
            record = measure_held_out(
                path, row, weights, self.artifact, rule, load, self.settings, self.progress, self.engine
            )
        if record.weights != weights:
            raise StageError(f"{self.out} holds results of other weights called {row.name}; name another directory")
        return record

    def reconstruction(self) -> Reconstruction | None:
        """Return how well the tokenizer reconstructs the held-out images; None without a held-out artifact."""
        if self.artifact is None:
            return None
        path = self.out / "reconstruction.json"
        artifact, folder = self.artifact, self.out / "originals"
        generator = self.generator(self.rows[0])
        try:
            with self.progress.task("compare reconstructions", len(artifact), "images") as task:
                parts = reconstruct(
                    generator,
                    artifact,
                    self.extract,
                    folder,
                    self.engine,
                    task,
                    chunk=CHUNK,
                    done=path.is_file,
                    fetch=self.settings.fetch_originals,
                )
        except StageError as error:
            self.progress.say(f"no originals: {error}")
            return Reconstruction(features=self.settings.network, originals=0)

        def finish() -> Reconstruction:
            originals = {name: parts.joined(name) for name in NEEDED if name in parts.load(0)}
            images, several = self.source.images, len(artifact) > 1  # one image has no covariance
            if several and isinstance(images, Originals) and images.artifact.folder == artifact.folder:
                Reference.of(originals).save(self.first.path, self.first.provenance())
            distance = interval = None
            if several:
                decoded = parts.joined("decoded")
                distance = frechet_distance(Statistics.of(originals["pool"]), Statistics.of(decoded))
                interval = self.bootstrap.frechet(decoded, originals["pool"], distance)
            return Reconstruction(
                features=self.settings.network,
                originals=len(artifact),
                psnr_db=float(parts.joined("psnr").mean()),
                ssim=float(parts.joined("ssim").mean()),
                distance=distance,
                distance_interval=interval,
            )

        values = write_once(path, lambda: finish().to_json())
        shutil.rmtree(folder, ignore_errors=True)
        return Reconstruction.from_json(values, self.settings.network, str(path))

    def sample_cells(self, likelihoods: list[HeldOutRow]) -> None:
        """Sample and score the cells that are missing."""
        s = self.settings
        references = [c.reference(self.progress) for c in self.comparisons] if s.images else []
        if s.save_reference is not None:
            measured = self.first.reference(self.progress)
            if measured is None:
                raise StageError(f"--save-reference: nothing could be measured of {s.reference}")
            for _ in claim_parts(self.out / "save-reference", 1, lambda _: False):
                measured.save(s.save_reference, self.first.provenance())
        if not s.images:
            return
        for row, likelihood in zip(self.rows, likelihoods, strict=True):
            for scale in s.cfg_scale:
                folder = self.out / "cells" / row.cell_name(scale)
                if not (folder / "cell.json").is_file():
                    self._cell(folder, row.candidate, self.generator(row), scale, likelihood, references)
                for parts in (folder / "seconds", *(c.folder(folder) for c in self.comparisons)):
                    shutil.rmtree(parts, ignore_errors=True)

    def floor(self) -> Floor | None:
        """Return the scores of the second set of real images; None without one, or without a reference."""
        source, samples = self.floor_source, self.settings.images
        if source is None or (reference := self.first.reference(self.progress)) is None:
            return None
        return measure_floor(
            self.out / "floor", source, samples, reference, self.extract, self.bootstrap, self.progress, self.engine
        )

    def measures(self) -> list[Measure]:
        """Return how each score of the samples is measured."""
        s, measures = self.settings, []
        if s.images:
            precision = precision_name(choose_device(s.device), s.decode_precision)
            for comparison in self.comparisons:
                if (reference := comparison.reference(self.progress)) is not None:
                    measures += comparison.measures(reference, s.images, s.labels, precision)
        return measures

    def _cell(
        self,
        folder: Path,
        candidate: Candidate,
        generator: Generator,
        scale: float,
        likelihood: HeldOutRow,
        references: list[Reference | None],
    ) -> None:
        """Write one cell: its samples, scores and sheets."""
        s, path = self.settings, folder / "cell.json"
        labels, training = self.labels, self.training
        n_shards = -(-s.images // s.shard_size)
        seconds = Parts(folder / "seconds", n_shards, path.is_file)
        artifact = write_sampled(
            generator,
            Plan(labels=labels, cfg_scale=scale),
            folder / "codes",
            self.progress,
            f"sample {folder.name}",
            self.engine,
            sampled=lambda index, took: seconds.save(index, seconds=np.array([took])),
        )
        scored = [
            (c.extract.name, c.features_of(folder, generator, artifact, path.is_file, self.progress), reference)
            for c, reference in zip(self.comparisons, references, strict=True)
            if reference is not None
        ]

        def draw() -> None:
            for picture, with_patches in (("samples", False), ("patches", True)):
                if with_patches and isinstance(generator.model, LlamaGen):
                    continue
                drawn = sample_sheet(generator, artifact, labels, patches=with_patches, columns=s.sheet_per_class)
                save_picture(drawn, folder / f"{picture}.png")
            if training is not None:
                write_nearest(generator, artifact, shown_rows(s.images), labels, training, folder)

        def finish() -> Cell:
            n_tokens = artifact.manifest.n_tokens
            complete = all(index in seconds for index in range(n_shards))
            patches = artifact.manifest.statistics.get("patches_per_image", float(n_tokens))
            self.engine.call(draw)
            scores: dict[str, Scores] = {
                name: scores_of({part: parts.joined(part) for part in parts.load(0)}, reference, self.bootstrap)
                for name, parts, reference in scored
            }
            return Cell(
                name=folder.name,
                checkpoint=candidate.name or None,
                step=candidate.step,
                training_flops=training_flops(self.run, candidate, generator.model),
                cfg_scale=scale,
                cfg_schedule=s.cfg_schedule,
                threshold=None if generator.rule is None else generator.rule.threshold,
                max_length=None if generator.rule is None else generator.rule.max_length,
                samples=s.images,
                labels=s.labels,
                features=s.network,
                decode_precision=precision_name(generator.device, s.decode_precision),
                tokens_per_image=n_tokens,
                patches_per_image=patches,
                mean_length=n_tokens / patches,
                bits_per_token=likelihood.bits_per_token,
                bits_per_token_interval=likelihood.bits_per_token_interval,
                held_out_patches_per_image=likelihood.patches_per_image,
                held_out_mean_length=likelihood.mean_length,
                gmacs_per_image=likelihood.gmacs_per_image,
                images_per_second=s.images / float(seconds.joined("seconds").sum()) if complete else None,
                scores=scores.pop(s.network, None),
                also=scores,
            )

        write_once(path, lambda: finish().to_json())


def _open(place: Location) -> Artifact:
    """Open an artifact and verify its shards; under ``torchrun`` each process verifies some."""
    return open_artifact(place, verify=True, share=(rank(), world_size()))

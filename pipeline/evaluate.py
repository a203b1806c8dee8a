"""``dpar eval RUN OUT --reference R``: how well a run predicts, and how its samples look.

    results = evaluate(Path("run"), Path("scores"), EvalSettings(reference=Path("validation-patches")))

    OUT/results.json, .csv, .md   all numbers, and what made them
    OUT/quality-vs-*.png          against guidance, patch length and training FLOPs, where there are several of them
    OUT/likelihood/NAME.json      each row of the held-out table: bits per token, patches and GMACs per image
    OUT/cells/NAME/               each cell of the table: its codes as an artifact, its numbers, its sheets
    OUT/reference.npz             the reference's statistics

A row of the held-out table is a combination of checkpoint, threshold and longest patch; the held-out images are cut
anew by its rule, from their stored entropies. A cell is a row with a guidance scale. RUN may also be a LlamaGen that
was trained elsewhere: its own file, or a directory of weights without a run.

Bits per token are exact. The distance between samples and reference is FID with ``--features inception``; on the
tokenizer's own features it goes by another name and compares only with its like. Any number of processes may work on
one OUT; what was killed goes on where it was, and numbers do not depend on either.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpar.flops import TRAINING_FLOPS_A_MAC, count
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import PatchRule
from pipeline.generation.generator import Generator, run_of, weights_fingerprint
from pipeline.generation.sampled_artifact import Plan, labels_of, write_sampled
from pipeline.runs.run_folder import read_metrics, read_run
from pipeline.runtime.device import precision_name, rank, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.runtime.work_sharing import Parts, claim_folder, claim_parts, write_once
from pipeline.sample import sample_sheet, save_picture, shard_pixels
from pipeline.scoring.features import (
    Extractor,
    Features,
    InceptionFeatures,
    Statistics,
    TokenizerFeatures,
    frechet_distance,
    inception_score,
    precision_recall,
    resize,
)
from pipeline.scoring.likelihood import Likelihood, check_compatible, check_same_classes, nats_per_token
from pipeline.scoring.reconstruction import reconstruct
from pipeline.scoring.reference import Originals, Reference, open_reference
from pipeline.scoring.results import write_results
from pipeline.settings.fields import identity as settings_identity
from pipeline.settings.sampling import EvalSettings
from shards.manifest import MANIFEST
from shards.reader import Artifact, open_artifact

CHUNK = 500  # images held in memory at once
DISTANCE = {"inception": "FID", "tokenizer": "tokenizer Fréchet distance"}
RECONSTRUCTION = {"inception": "rFID", "tokenizer": "tokenizer reconstruction distance"}
PREFIX = {"inception": "", "tokenizer": "tokenizer_"}  # of precision and recall
FORMAT = 2  # of what OUT holds; in 1 bits per token were by the stored boundaries in every row


def evaluate(run: Path, out: Path, settings: EvalSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Scores a run of ``dpar train``, or a LlamaGen's weights.

    What is in ``out`` already is not computed again.

    Returns:
        What ``results.json`` holds.

    Raises:
        StageError, ModelError, ArtifactError: run, reference, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    job = _Evaluation(run, out, settings, progress or Progress())
    with stops_with(f"Stopped. What was scored is kept in {out}; run the same command again to go on."):
        likelihoods = [job.likelihood(row) for row in job.rows]
        found = likelihoods[0] | job.reconstruction()
        job.sample_cells(likelihoods)
        return write_results(out, found | {"identity": job.identity, "made_by": made_by()}, job.progress)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to score: the run's newest, or another checkpoint of it."""

    name: str  # in cells' names; empty for the newest
    path: str | None  # None for the newest
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the held-out table."""

    candidate: Candidate
    threshold: float | None  # nats; None is the training data's
    max_length: int | None  # 0 is no limit; None is the training data's

    @property
    def name(self) -> str:
        """Of its file, and the beginning of its cells' names; empty for the run's newest weights and own rule."""
        parts = [self.candidate.name] if self.candidate.name else []
        parts += [] if self.threshold is None else [f"threshold-{_number(self.threshold)}"]
        parts += [] if self.max_length is None else [f"max-length-{self.max_length}"]
        return "-".join(parts)


class _Evaluation:
    """What :func:`evaluate` works on, checked before anything is computed."""

    def __init__(self, run: Path, out: Path, settings: EvalSettings, progress: Progress) -> None:
        self.run, self.out, self.settings, self.progress = run, out, settings, progress
        place = settings.held_out or (settings.reference if (settings.reference / MANIFEST).is_file() else None)
        self.artifact: Artifact | None = None if place is None else _open(place)
        self.candidates = _candidates(run, settings)
        choices = list(itertools.product(settings.threshold or (None,), settings.max_length or (None,)))
        self.rows = [
            Row(candidate=candidate, threshold=threshold, max_length=length)
            for candidate in self.candidates
            for threshold, length in choices
        ]
        self._loaded: tuple[Candidate, Generator] | None = None
        generator = self.generator(self.rows[0])
        if self.artifact is not None:
            name = str(self.artifact.folder)
            check_compatible(generator.model, self.artifact.manifest, name)
            check_same_classes(generator.class_names, self.artifact.manifest.class_names, str(run), name)
            _check_tokenizer(generator, self.artifact)
        self.extract: Extractor = (
            InceptionFeatures(settings.inception_weights, generator.device, settings.batch)
            if settings.features == "inception"
            else TokenizerFeatures(generator.tokenizer, generator.tokenizer_origin["fingerprint"], settings.batch)
        )
        self.source = open_reference(settings.reference, self.extract, settings.fetch_originals)
        images, compares = self.source.images, settings.samples > 0 or settings.save_reference is not None
        if compares and self.source.measured is None and images is not None and len(images) < 2:
            raise StageError(f"{settings.reference} holds {len(images)} images; a reference needs at least 2")
        self._rules = {choice: self._rule(generator.with_rule(*choice), *choice) for choice in choices}
        self.identity = self._identity()
        claim_folder(out, "eval.json", self.identity, "holds results of other weights or settings")
        self._warn()

    def generator(self, row: Row) -> Generator:
        """The model of a row, with all that sampling needs, and its rule."""
        candidate = row.candidate
        if self._loaded is None or self._loaded[0] != candidate:
            self._loaded = None  # one model in memory at a time
            self._loaded = (candidate, Generator.load(self.run, self.settings, self.artifact, candidate.path))
        return self._loaded[1].with_rule(row.threshold, row.max_length)

    def _rule(self, generator: Generator, threshold: float | None, max_length: int | None) -> PatchRule | None:
        """The rule by which the held-out images are cut into patches; None leaves them as they are stored.

        Raises:
            StageError: a rule was asked for, and they have no entropies of the run's entropy model.
        """
        wanted = generator.rule
        if self.artifact is None or wanted is None:
            return None
        manifest, folder = self.artifact.manifest, self.artifact.folder
        stored = wanted == PatchRule.from_dict(manifest.settings)
        if wanted.strategy == "static":  # which needs no entropies
            return None if stored else wanted
        theirs, ours = manifest.entropy_model, generator.entropy_origin
        assert ours is not None  # or the rule would be static
        asked = (threshold, max_length, self.settings.row_reset) != (None, None, None)
        if stored and theirs is None:  # samples of the run
            return None
        if theirs is not None and theirs["fingerprint"] == ours["fingerprint"]:
            if not (stored or asked):
                self.progress.say(f"{folder} is cut by the run's patch rule, which is not the one that it is stored by")
            return None if stored else wanted
        why = "it holds no entropies"
        if theirs is not None:
            why = f"its entropies are of {theirs['path']} ({theirs['fingerprint'][:12]})"
        why += f", and the run's entropy model is {ours['path']} ({ours['fingerprint'][:12]})"
        if not asked:
            self.progress.say(f"bits per token are by the boundaries stored in {folder}, not by the run's: {why}")
            return None
        raise StageError(
            f"{folder} cannot be cut by --threshold, --max-length or --row-reset: {why}. `dpar patchify` its codes "
            "with that model, or leave these options out"
        )

    def _identity(self) -> dict[str, Any]:
        """What decides the results, apart from which cells are asked for."""
        chosen = settings_identity(self.settings)
        newest = None if self.settings.checkpoint else weights_fingerprint(str(self.run))
        identity: dict[str, Any] = {"run": str(self.run), "weights": newest, "reference": self.source.fingerprint}
        identity["format"] = FORMAT
        identity["held_out"] = None if self.artifact is None else self.artifact.manifest.fingerprint()
        identity["features_of"] = self.extract.weights
        as_json: dict[str, Any] = json.loads(json.dumps(identity | chosen, default=str))
        return as_json

    def _warn(self) -> None:
        """Says what a number of images too small does to the distance."""
        if self.settings.features == "tokenizer":
            self.progress.say("distances on the tokenizer's own features compare only among themselves; none is FID")
        known = self.source.measured
        held = known.statistics.images if known is not None else len(self.source.images or ())
        counts = {"reference": held, "samples": self.settings.samples}
        few = [f"{n} {name}" for name, n in counts.items() if n is not None and 0 < n <= self.extract.dimension]
        if few:
            self.progress.say(
                f"{' and '.join(few)} images are few for {self.extract.dimension} features: the covariance is not of "
                "full rank and the distance comes out too large; compare it only with distances between as many images"
            )

    def likelihood(self, row: Row) -> dict[str, Any]:
        """Exact bits per token on the held-out artifact, cut by the row's rule, and what the model costs on it."""
        candidate = row.candidate
        weights = weights_fingerprint(candidate.path or str(self.run))
        path = self.out / "likelihood" / f"{row.name or 'newest'}.json"
        artifact, settings = self.artifact, self.settings
        rule = self._rules[row.threshold, row.max_length]
        images = 0 if artifact is None else len(artifact)
        parts = Parts(path.with_suffix(""), -(-images // CHUNK), path.is_file)
        with self.progress.task(" ".join(["bits per token", row.name]).strip(), images, "images") as task:
            for index in parts.missing():
                assert artifact is not None  # or there would be no parts
                rows = np.arange(index * CHUNK, min((index + 1) * CHUNK, images))
                model = self.generator(row).model
                nats, labels, patches = nats_per_token(
                    model, artifact, rows, settings.batch, settings.precision, rule=rule
                )
                parts.save(index, nats=nats, labels=labels, patches=np.array([patches]))
                task.advance(len(rows))

        def measure() -> dict[str, Any]:
            model = self.generator(row).model
            config = model.config
            if artifact is None:
                return {"weights": weights, "tokens_per_image": config.n_tokens}
            applied = {}
            if isinstance(model, DPAR):
                applied = (rule or PatchRule.from_dict(artifact.manifest.settings)).to_dict()
            names = artifact.manifest.class_names
            patches = int(parts.joined("patches").sum())
            found = Likelihood.of(parts.joined("nats"), parts.joined("labels"), patches, names)
            if not math.isfinite(found.bits_per_token):
                raise StageError(
                    f"{candidate.path or self.run} has no finite bits per token on {artifact.folder}: its weights hold "
                    "NaN or infinity, or numbers too large for --precision"
                )
            cost = count(config, config.n_tokens / found.patches)
            pairs = zip(names, found.bits_by_class, strict=True)
            return {
                "weights": weights,
                "name": row.name,
                "checkpoint": candidate.name or None,
                "step": candidate.step,
                **{name: applied.get(name) for name in ("threshold", "max_length", "row_reset", "static_length")},
                "bits_per_token": found.bits_per_token,
                "bits_by_class": {name: bits for name, bits in pairs if not math.isnan(bits)},
                "held_out_images": found.images,
                "patches_per_image": found.patches,
                "mean_length": config.n_tokens / found.patches,
                "tokens_per_image": config.n_tokens,
                "gmacs_per_image": cost.linear / 1e9,
                "parameters": cost.parameters,
            }

        found = write_once(path, measure)
        shutil.rmtree(parts.folder, ignore_errors=True)
        if found["weights"] != weights:
            raise StageError(f"{self.out} holds results of other weights called {row.name}; name another directory")
        return found

    def reconstruction(self) -> dict[str, Any]:
        """How much the tokenizer keeps of the held-out images, where their originals can still be read."""
        if self.artifact is None:
            return {}
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
                    chunk=CHUNK,
                    done=path.is_file,
                    advance=task.advance,
                    fetch=self.settings.fetch_originals,
                )
        except StageError as error:
            self.progress.say(f"no originals: {error}")
            return {"originals": 0}

        def finish() -> dict[str, Any]:
            originals = parts.joined("pool")
            images, several = self.source.images, len(artifact) > 1  # one image has no covariance
            if several and isinstance(images, Originals) and images.artifact.folder == artifact.folder:
                self._save(Reference.of(originals))
            found = {
                "originals": len(artifact),
                "reconstruction_psnr_db": float(parts.joined("psnr").mean()),
                "reconstruction_ssim": float(parts.joined("ssim").mean()),
            }
            if several:
                statistics = (Statistics.of(originals), Statistics.of(parts.joined("decoded")))
                found[RECONSTRUCTION[self.extract.name]] = frechet_distance(*statistics)
            return found

        found = write_once(path, finish)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def reference(self) -> Reference | None:
        """The reference's features, measured once; None, after a word, where its originals are gone."""
        path = self.out / "reference.npz"
        images, measured = self.source.images, self.source.measured
        if measured is not None and (measured.features is not None or images is None):
            return measured
        assert images is not None  # a source without statistics has images
        parts = Parts(self.out / "reference", -(-len(images) // CHUNK), path.is_file)
        try:
            with self.progress.task("reference", len(images), "images") as task:
                for index in parts.missing():
                    pixels = images.read(index * CHUNK, min((index + 1) * CHUNK, len(images)))
                    parts.save(index, pool=self.extract(resize(pixels, self.extract.side(pixels.shape[1])))["pool"])
                    task.advance(len(pixels))
        except StageError as error:
            if not isinstance(images, Originals):
                raise
            self.progress.say(f"no distance to the reference: {error}")
            return None
        for _ in claim_parts(path, 1, lambda _: path.is_file()):
            self._save(Reference.of(parts.joined("pool"), None if measured is None else measured.statistics))
        shutil.rmtree(parts.folder, ignore_errors=True)
        return Reference.load(path)

    def _save(self, reference: Reference) -> None:
        reference.save(self.out / "reference.npz", self._provenance())

    def _provenance(self) -> dict[str, Any]:
        s = self.settings
        return {"features": self.extract.name, "weights": self.extract.weights, "reference": str(s.reference)}

    def sample_cells(self, likelihoods: list[dict[str, Any]]) -> None:
        """Samples and scores the cells that are not there yet."""
        s = self.settings
        reference = self.reference() if s.samples or s.save_reference is not None else None
        if s.save_reference is not None:
            if reference is None:
                raise StageError(f"--save-reference: nothing could be measured of {s.reference}")
            target, measured = s.save_reference, reference
            for _ in claim_parts(self.out / "save-reference", 1, lambda _: False):
                measured.save(target, self._provenance())
        if not s.samples:
            return
        for row, likelihood in zip(self.rows, likelihoods, strict=True):
            for scale in s.cfg_scale:
                folder = self.out / "cells" / "-".join(filter(None, [row.name, f"cfg-{_number(scale)}"]))
                if not (folder / "cell.json").is_file():
                    self._cell(folder, row.candidate, self.generator(row), scale, likelihood, reference)
                for parts in ("seconds", "features"):
                    shutil.rmtree(folder / parts, ignore_errors=True)

    def _cell(
        self,
        folder: Path,
        candidate: Candidate,
        generator: Generator,
        scale: float,
        likelihood: dict[str, Any],
        reference: Reference | None,
    ) -> None:
        """One combination of settings: its samples, their scores, and two sheets."""
        s, path = self.settings, folder / "cell.json"
        labels = labels_of(list(range(len(generator.class_names))), s.samples, s.labels, s.seed)
        n_shards = -(-s.samples // s.shard_size)
        seconds = Parts(folder / "seconds", n_shards, path.is_file)
        artifact = write_sampled(
            generator,
            Plan(labels=labels, cfg_scale=scale),
            folder / "codes",
            self.progress,
            f"sample {folder.name}",
            sampled=lambda index, took: seconds.save(index, seconds=np.array([took])),
        )
        features = Parts(folder / "features", n_shards, path.is_file)
        side = self.extract.side(generator.image_size[0])
        if reference is not None:
            with self.progress.task(f"score {folder.name}", s.samples, "images") as task:
                for index in features.missing():
                    pixels = shard_pixels(generator, artifact, index, side)
                    features.save(index, **self.extract(pixels))
                    task.advance(len(pixels))

        def finish() -> dict[str, Any]:
            n_tokens = artifact.manifest.n_tokens
            whole = all(index in seconds for index in range(n_shards))
            patches = artifact.manifest.statistics.get("patches_per_image", float(n_tokens))
            for picture, with_patches in (("samples", False), ("patches", True)):
                if with_patches and isinstance(generator.model, LlamaGen):
                    continue
                drawn = sample_sheet(generator, artifact, labels, patches=with_patches, columns=s.sheet_per_class)
                save_picture(drawn, folder / f"{picture}.png")
            cell = {
                "name": folder.name,
                "checkpoint": candidate.name or None,
                "step": candidate.step,
                "training_flops": self._training_flops(candidate, generator.model),
                "cfg_scale": scale,
                "cfg_schedule": s.cfg_schedule,
                "threshold": None if generator.rule is None else generator.rule.threshold,
                "max_length": None if generator.rule is None else generator.rule.max_length,
                "samples": s.samples,
                "labels": s.labels,
                "features": s.features,
                "decode_precision": precision_name(generator.device, s.decode_precision),
                "tokens_per_image": n_tokens,
                "patches_per_image": patches,
                "mean_length": n_tokens / patches,
                "bits_per_token": likelihood.get("bits_per_token"),
                "held_out_patches_per_image": likelihood.get("patches_per_image"),
                "held_out_mean_length": likelihood.get("mean_length"),
                "gmacs_per_image": likelihood.get("gmacs_per_image"),
                # of one process; codes that were there already were sampled nobody knows how fast
                "images_per_second": s.samples / float(seconds.joined("seconds").sum()) if whole else None,
            }
            if reference is None:
                return cell
            names = ("pool", "logits") if s.features == "inception" else ("pool",)
            return cell | self._scores({name: features.joined(name) for name in names}, reference)

        write_once(path, finish)

    def _scores(self, samples: Features, reference: Reference) -> dict[str, Any]:
        name, prefix = DISTANCE[self.extract.name], PREFIX[self.extract.name]
        distance = frechet_distance(Statistics.of(samples["pool"]), reference.statistics)
        found: dict[str, Any] = {"distance": name, name: distance, "reference_images": reference.statistics.images}
        if "logits" in samples and (score := inception_score(samples["logits"])) is not None:
            found |= {"inception_score": score[0], "inception_score_std": score[1]}
        if reference.features is not None:
            pair = precision_recall(samples["pool"], reference.features)
            if pair is not None:
                found |= {f"{prefix}precision": pair[0], f"{prefix}recall": pair[1]}
        return found

    def _training_flops(self, candidate: Candidate, model: DPAR | LlamaGen) -> float | None:
        """What training up to the candidate's step has cost (paper section 4.3), where that is known."""
        home = run_of(self.run)
        if home is None or candidate.step is None:
            return None
        measured = [
            line["training_gflops_per_image"] for line in read_metrics(home) if "training_gflops_per_image" in line
        ]
        record = read_run(home)
        length = 1.0 if isinstance(model, LlamaGen) else record["inputs"].get("mean_patch_length")
        if measured:
            image = measured[-1] * 1e9
        elif length is not None:
            image = TRAINING_FLOPS_A_MAC * count(model.config, length).linear
        else:
            return None
        return float(image * candidate.step * record["settings"]["batch"])


def _open(place: Path) -> Artifact:
    """An artifact, all of its shards checked; under ``torchrun`` each process checks some."""
    return open_artifact(place, verify=True, share=(rank(), world_size()))


def _candidates(run: Path, settings: EvalSettings) -> list[Candidate]:
    """The weights to score, each once."""
    home = run_of(run)
    if not settings.checkpoint:
        steps = [] if home is None else [line["step"] for line in read_metrics(home) if "step" in line]
        return [Candidate(name="", path=None, step=max(steps, default=None))]
    found: dict[str, Candidate] = {}
    for given in settings.checkpoint:
        inside = [] if home is None else [home / folder / given for folder in ("checkpoints", "")]
        path = str(next((place for place in (Path(given), *inside) if place.exists()), given))
        step = re.search(r"step-(\d+)", path)
        slug = re.sub(r"[^\w-]+", "_", Path(path).name).strip("_")[:40]
        found.setdefault(path, Candidate(name=slug, path=path, step=None if step is None else int(step[1])))
    names = [candidate.name for candidate in found.values()]
    for name in names:
        if names.count(name) > 1:
            raise StageError(f"--checkpoint: several are called {name}, which names the cells of the table")
    return list(found.values())


def _number(value: float) -> str:
    """A number in a name: short, and another one for every number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _check_tokenizer(generator: Generator, artifact: Artifact) -> None:
    ours = generator.tokenizer_origin["fingerprint"]
    theirs = artifact.manifest.tokenizer["fingerprint"]
    if ours != theirs:
        raise StageError(
            f"{artifact.folder} was made by tokenizer {theirs[:12]}, the run's training data by {ours[:12]}; "
            "bits per token would mean nothing"
        )

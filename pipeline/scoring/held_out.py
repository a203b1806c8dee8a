"""The held-out artifact of an evaluation: the patch rule to use on it, and a model's likelihood of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from collections.abc import Generator as Indices
from pathlib import Path

import numpy as np

from dpar.flops import count
from dpar.model import DPAR
from dpar.patching import PatchRule
from pipeline.generation.generator import Generator
from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.work_sharing import Parts, write_once
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.candidates import Row
from pipeline.scoring.likelihood import Likelihood, check_compatible, check_same_classes, nats_per_token
from pipeline.scoring.records import HeldOutRow
from pipeline.scoring.reference import CHUNK
from pipeline.settings.sampling import EvalSettings
from shards.reader import Artifact


def check_held_out(artifact: Artifact, generator: Generator, run: Path) -> None:
    """Raise StageError unless the run's model can be scored on an artifact."""
    name = str(artifact.folder)
    check_compatible(generator.model, artifact.manifest, name)
    check_same_classes(generator.class_names, artifact.manifest.class_names, str(run), name)
    trained_on, made_by = generator.tokenizer_origin["fingerprint"], artifact.manifest.tokenizer["fingerprint"]
    if trained_on != made_by:
        raise StageError(
            f"{name} was made with tokenizer {made_by[:12]}, the run's training data with {trained_on[:12]}; "
            "bits per token would be meaningless"
        )


def held_out_rule(artifact: Artifact, generator: Generator, explicit: bool, progress: Progress) -> PatchRule | None:
    """Return the rule for patchifying the held-out images; None keeps the stored boundaries.

    Args:
        artifact: the held-out images.
        generator: with the rule of the row.
        explicit: whether options request this rule, so that the stored boundaries are not acceptable.
        progress: reports where the boundaries come from, unless they are stored and by the run's rule.

    Raises:
        StageError: options request a rule, but the artifact has no entropies of the run's entropy model.
    """
    wanted = generator.rule
    if wanted is None:
        return None
    manifest, folder = artifact.manifest, artifact.folder
    stored = wanted == PatchRule.from_dict(manifest.settings)
    if wanted.strategy == "static":  # needs no entropies
        return None if stored else wanted
    model, artifacts_model = generator.entropy_origin, manifest.entropy_model
    assert model is not None  # or the rule would be static
    if stored and artifacts_model is None:  # samples of the run
        return None
    if artifacts_model is not None and artifacts_model["fingerprint"] == model["fingerprint"]:
        if not (stored or explicit):
            progress.say(f"{folder} is patchified with the run's patch rule, which differs from the stored one")
        return None if stored else wanted
    reason = "it holds no entropies"
    if artifacts_model is not None:
        reason = f"its entropies are of {artifacts_model['path']} ({artifacts_model['fingerprint'][:12]})"
    reason += f", and the run's entropy model is {model['path']} ({model['fingerprint'][:12]})"
    if not explicit:
        progress.say(f"bits per token use the boundaries stored in {folder}, not the run's: {reason}")
        return None
    raise StageError(
        f"{folder} cannot be patchified with --threshold, --max-length or --row-reset: {reason}. Run `dpar patchify` "
        "on its codes with that model, or omit these options"
    )


def measure_held_out(
    path: Path,
    row: Row,
    weights: str,
    artifact: Artifact,
    rule: PatchRule | None,
    load: Callable[[], Generator],
    settings: EvalSettings,
    progress: Progress,
    engine: Engine,
) -> HeldOutRow:
    """Return a row's exact bits per token on the held-out artifact, and the model's cost there.

    Args:
        path: the row's JSON file; if missing, the processes that share the work write it.
        row: the weights and the rule.
        weights: fingerprint of the weights.
        artifact: the held-out images.
        rule: for patchifying them; None keeps the stored boundaries.
        load: returns the row's model; called only if something is left to compute.
        settings: batch and precision.
        progress: where to report.
        engine: computes the likelihoods.

    Raises:
        StageError: the likelihood is not finite.
    """
    parts = Parts(path.with_suffix(""), -(-len(artifact) // CHUNK), path.is_file)
    if not all(map(parts.pieces.is_done, range(parts.n))):
        generator = load()

        def work(indices: Indices[int, None, None], count: Count) -> None:
            for index in indices:
                rows = np.arange(index * CHUNK, min((index + 1) * CHUNK, len(artifact)))
                nats, labels, patches = nats_per_token(
                    generator.model, artifact, rows, settings.scoring_batch, settings.precision, rule=rule
                )
                parts.save(index, nats=nats, labels=labels, patches=np.array([patches]))
                count.advance(len(rows))

        with progress.task(" ".join(["bits per token", row.name]).strip(), len(artifact), "images") as task:
            engine.run(parts.pieces, work, task)

    def finish() -> HeldOutRow:
        generator, names = load(), artifact.manifest.class_names
        model = generator.model
        patches = int(parts.joined("patches").sum())
        nats, bootstrap = parts.joined("nats"), Bootstrap(seed=settings.seed, resamples=settings.bootstrap)
        likelihood = Likelihood.of(nats, parts.joined("labels"), patches, names)
        if not math.isfinite(likelihood.bits_per_token):
            raise StageError(
                f"{generator.name} has no finite bits per token on {artifact.folder}: its weights hold NaN or "
                "infinity, or numbers too large for --precision"
            )
        applied = {}
        if isinstance(model, DPAR):
            applied = (rule or PatchRule.from_dict(artifact.manifest.settings)).to_dict()
        length = model.config.n_tokens / likelihood.patches
        cost = count(model.config, length)
        by_class = zip(names, likelihood.bits_by_class, strict=True)
        return HeldOutRow(
            weights=weights,
            name=row.name,
            checkpoint=row.candidate.name or None,
            step=row.candidate.step,
            **{name: applied.get(name) for name in ("threshold", "max_length", "row_reset", "static_length")},
            bits_per_token=likelihood.bits_per_token,
            bits_per_token_interval=bootstrap.mean(nats / math.log(2)),
            bits_by_class={name: bits for name, bits in by_class if not math.isnan(bits)},
            held_out_images=likelihood.images,
            patches_per_image=likelihood.patches,
            mean_length=length,
            tokens_per_image=model.config.n_tokens,
            gmacs_per_image=cost.linear / 1e9,
            parameters=cost.parameters,
        )

    values = write_once(path, lambda: finish().to_json())
    shutil.rmtree(parts.folder, ignore_errors=True)
    return HeldOutRow.from_json(values, str(path))

"""``dpar train PATCHES OUT`` and ``dpar entropy CODES OUT``: train a generator or the entropy model.

train(Path("patches"), Path("run"), TrainSettings(model="dpar-b"))
train_entropy(Path("codes"), Path("entropy"), EntropySettings(model="llamagen-b"))
train_entropy(Path("codes"), Path("entropy"), EntropySettings(from_llamagen="c2i_B_256.pt"))     # trains nothing
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dpar.attention import choose_backend
from dpar.llamagen import LlamaGen, LlamaGenConfig
from dpar.locations import CONFIG, weights_path
from dpar.model import DPAR, DPARConfig
from dpar.patching import PatchRule
from dpar.presets import preset
from dpar.pretrained import fingerprint, read_weights, write_weights
from dpar.tensors import check_tensors, load_tensors
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.weights import check_grid_and_codebook
from pipeline.runtime.device import choose_device, fast_bf16, precision_name, rank, world_size
from pipeline.runtime.distributed import barrier, process_group
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.scoring.likelihood import check_compatible, check_same_classes
from pipeline.settings.fields import run_time_fields
from pipeline.settings.training import EntropySettings, OptimSettings, TrainSettings
from pipeline.training.config_fields import parse_config_fields
from pipeline.training.loop import Objective, fit
from pipeline.training.memory import enough_memory
from pipeline.training.preview import Painter
from pipeline.training.schedule import total_steps
from pipeline.training.trackers import check_trackers
from shards.cache import ShardCache
from shards.manifest import Manifest
from shards.reader import Artifact, open_artifact
from shards.storage import Location

FIXED = ("model", "grid")  # settings that determine the tensors of a checkpoint
CLASS_EMBEDDING = "cls_embedding.embedding_table.weight"  # its last row is the guidance class


def train(patches: Location, out: Path, settings: TrainSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Train DPAR, or LlamaGen on the same data, and return the run's last metrics. A stopped run resumes.

    Args:
        patches: a patches artifact, or its URL; for LlamaGen codes are enough.
        out: the run's directory.
        settings: see :class:`TrainSettings`.
        progress: where to report.

    Raises:
        StageError, ModelError, ArtifactError: data, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    artifact = _open(patches, settings)
    config = _config(artifact.manifest, settings, classes=len(artifact.manifest.class_names))
    with enough_memory(settings, out):
        return _train("train", artifact, out, config, settings, settings.guidance_dropout, progress or Progress())


def train_entropy(
    codes: Location, out: Path, settings: EntropySettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the entropy model, or take it from a LlamaGen; see :func:`train`.

    Like the DPAR authors' model, it is a LlamaGen without classes and without a start token: token 0 is read but not
    predicted, so losses and bits per token are means over N - 1 tokens.
    """
    progress = progress or Progress()
    artifact = _open(codes, settings)
    if settings.from_llamagen is not None:
        return entropy_from_llamagen(artifact, out, settings.from_llamagen, progress)
    if not settings.model.startswith("llamagen-"):
        raise StageError(f"--model is {settings.model!r}; the entropy model must be a LlamaGen: llamagen-…")
    config = _config(artifact.manifest, settings, classes=0, start_token=False)
    n = artifact.manifest.n_tokens
    progress.say(
        f"the entropy model predicts {n - 1} of {n} tokens per image; losses and bits per token are means over those"
    )
    with enough_memory(settings, out):
        return _train("entropy", artifact, out, config, settings, None, progress)


def entropy_from_llamagen(artifact: Artifact, out: Path, name: str, progress: Progress) -> dict[str, Any]:
    """Write a run whose entropy model is a class-conditional LlamaGen with its guidance class as start token.

    LlamaGen is trained with that class in place of a tenth of the labels, so with it the model is unconditional. The
    run stores only that row of the class embedding, and is used like a trained run.

    Args:
        artifact: the codes whose entropies will be measured.
        out: the run's directory.
        name: a checkpoint file or other weights of a LlamaGen.
        progress: where to report.

    Returns:
        No metrics.

    Raises:
        StageError, ModelError: the weights are not a LlamaGen's, or for another grid or codebook than the codes.
    """
    path = weights_path(name)
    weights = read_weights(path, LlamaGen.model_type)
    config = weights.make_config(LlamaGenConfig)
    check_grid_and_codebook(config, artifact.manifest, name, str(artifact.folder))
    with torch.device("meta"):
        model = LlamaGen(config)
    check_tensors(model, weights.tensors, weights.source)
    if rank() == 0:
        origin = {"path": name, "fingerprint": fingerprint(path)}
        data = {"data": str(artifact.folder), "artifact": artifact.manifest.fingerprint()}
        with RunFolder(out, "entropy", {"from_llamagen": origin}, data | lineage(artifact.manifest)) as run:
            if not (run.model / CONFIG).is_file():
                values, tensors = dataclasses.asdict(dataclasses.replace(config, classes=0)), weights.tensors
                note = f"An entropy model: `{Path(name).name}` (SHA-256 `{origin['fingerprint']}`)"
                if config.start_token:
                    tensors = tensors | {CLASS_EMBEDDING: tensors[CLASS_EMBEDDING][-1:]}
                    note += " read at its guidance class"
                write_weights(run.model, LlamaGen.model_type, values, tensors, note + ".")
        progress.say(f"weights: {run.model}, from {name}, used without classes")
    return {}


def _open(path: Location, settings: OptimSettings) -> Artifact:
    """Open an artifact; with ``settings.verify`` each process of ``torchrun`` verifies some of its shards."""
    cache = None if settings.cache is None else ShardCache(settings.cache, int(settings.cache_size * 1e9))
    return open_artifact(path, verify=settings.verify, share=(rank(), world_size()), cache=cache)


def _config(manifest: Manifest, settings: TrainSettings | EntropySettings, **sizes: Any) -> DPARConfig | LlamaGenConfig:
    return preset(
        settings.model,
        **parse_config_fields(settings.model, settings.set),
        codebook_size=manifest.codebook_size,
        grid_height=manifest.grid[0],
        grid_width=manifest.grid[1],
        dropout=settings.dropout,
        **sizes,
    )


def _train(
    kind: str,
    artifact: Artifact,
    out: Path,
    config: DPARConfig | LlamaGenConfig,
    settings: OptimSettings,
    guidance_dropout: float | None,
    progress: Progress,
) -> dict[str, Any]:
    unconditional = guidance_dropout is None
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    model = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
    check_compatible(model, artifact.manifest, str(artifact.folder), unconditional)
    validation = _open_validation(settings, model, artifact.manifest, unconditional)
    steps = total_steps(settings, len(artifact))  # refuses a batch that does not divide, before anything is written
    check_trackers(tensorboard=settings.tensorboard, wandb=settings.wandb)
    resolved: dict[str, Any] = {"device": str(device), "precision": precision_name(device, settings.precision)}
    resolved |= {"processes": world_size(), "steps": steps, **_prepare(model, settings, device, progress)}
    if settings.init is not None and not any((out / "checkpoints").glob("step-*")):
        resolved["init"] = initialise(model, settings.init)
    inputs = {"data": str(artifact.folder), "artifact": artifact.manifest.fingerprint(), **lineage(artifact.manifest)}
    with process_group(device):
        if rank() != 0:
            barrier()  # the first process creates the folder
        with RunFolder(
            out,
            kind,
            _recorded(settings),
            inputs,
            steps=steps,
            free=run_time_fields(settings),
            fixed=FIXED,
            override=settings.override,
            resolved=resolved,
        ) as run:
            if rank() == 0:
                barrier()
            painter = None
            if settings.sheet and not unconditional:
                painter = Painter.load(
                    model,
                    inputs,
                    images=settings.sheet,
                    seed=settings.seed,
                    precision=settings.precision,
                    device=device,
                    progress=progress,
                )
            objective = Objective(
                artifact=artifact,
                validation=validation,
                unconditional=unconditional,
                guidance_dropout=guidance_dropout or 0.0,
                painter=painter,
            )
            result = fit(model.to(device), objective, run, settings, progress)
    if rank() == 0:
        progress.say(f"weights: {run.model}")
    return result


def _recorded(settings: OptimSettings) -> dict[str, Any]:
    """Return the settings for run.json; without an empty ``set``, which runs of earlier versions lack."""
    places = {"validation": settings.validation, "cache": settings.cache}
    values = dataclasses.asdict(settings) | {name: place and str(place) for name, place in places.items()}
    return {name: value for name, value in values.items() if name != "set" or value}


def _prepare(
    model: DPAR | LlamaGen, settings: OptimSettings, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Choose compilation, recomputation and attention backend; return the choices for the run record.

    Says so if the requested precision is the slower one.

    Raises:
        ModelError: the requested attention backend cannot run here.
    """
    compiled = device.type == "cuda" if settings.compile is None else settings.compile
    if compiled:
        model.compile_layers()
    model.checkpoint_layers = settings.checkpoint_layers
    chosen: dict[str, Any] = {"compile": compiled}
    if settings.precision == "bf16" and not fast_bf16(device):
        progress.say(f"precision: bf16, although {device} computes fp32 faster; --precision auto takes fp32")
    if isinstance(model, DPAR):
        dtype = torch.bfloat16 if precision_name(device, settings.precision) == "bf16" else torch.float32
        backend, reason = choose_backend(device, dtype, settings.attention)
        model.attention_backend = backend
        progress.say(f"attention: {backend} ({reason})")
        chosen |= {"attention": backend, "attention_reason": reason}
    return chosen


def initialise(model: DPAR | LlamaGen, name: str) -> dict[str, str]:
    """Load the weights called ``name`` into ``model``; return their path and fingerprint.

    Raises:
        StageError, ModelError: their shapes, grid, heads or rotary positions differ.
    """
    path = weights_path(name)
    weights = read_weights(path, model.model_type)
    load_tensors(model, weights.tensors, weights.source)
    stored = dataclasses.asdict(weights.make_config(model.config_class))
    wanted = dataclasses.asdict(model.config)
    other = [f"{key} {value} is not {wanted[key]}" for key, value in stored.items() if value != wanted[key]]
    other = [text for text in other if not text.startswith("dropout ")]
    if other:
        raise StageError(f"--init {name} does not fit this run's model: {'; '.join(other)}")
    return {"path": name, "fingerprint": fingerprint(path)}


def lineage(manifest: Manifest) -> dict[str, Any]:
    """Return what sampling needs to know of the data: tokenizer, entropy model, patch rule, grid, classes."""
    return {
        "tokenizer": manifest.tokenizer,
        "entropy_model": manifest.entropy_model,
        "patch_rule": PatchRule.from_dict(manifest.settings).to_dict() if manifest.kind == "patches" else None,
        "grid": list(manifest.grid),
        "class_names": list(manifest.class_names),
        "mean_patch_length": manifest.statistics.get("mean_length"),
    }


def _open_validation(
    settings: OptimSettings, model: DPAR | LlamaGen, training: Manifest, unconditional: bool
) -> Artifact | None:
    path = settings.validation
    if path is None:
        return None
    artifact = _open(path, settings)
    check_compatible(model, artifact.manifest, str(path), unconditional)
    wanted, given = training.tokenizer["fingerprint"], artifact.manifest.tokenizer["fingerprint"]
    if wanted != given:
        raise StageError(f"{path} was made with tokenizer {given[:12]}, the training data with {wanted[:12]}")
    if not unconditional:
        check_same_classes(training.class_names, artifact.manifest.class_names, "the training data", str(path))
    return artifact

"""Finding and loading the models that stages pass on to each other, by path, run, Hub name or built-in name.

tokenizer = load_tokenizer("builtin:photos")                             # or LlamaGen's vq_ds16_c2i.pt
entropy_model = load_entropy_model("runs/entropy", fingerprint=manifest.entropy_model["fingerprint"])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpar.bundle import BUILTIN_PREFIX, BUNDLE, Bundle, Part
from dpar.llamagen import LlamaGen, SequenceConfig
from dpar.model import DPAR
from dpar.pretrained import fingerprint, local_folder, model_type, weights_path
from dpar.tokenizer import VQTokenizer
from pipeline.runs.run_folder import read_run
from pipeline.runtime.errors import StageError
from shards.manifest import Manifest


def load_tokenizer(name: str, expected: str | None = None) -> VQTokenizer:
    """The VQ tokenizer called ``name``, in evaluation mode on the CPU.

    Args:
        name: a directory, run, Hub repository, built-in name, or LlamaGen's own file.
        expected: the fingerprint its weights must have; None takes any.

    Raises:
        StageError: its weights are not those that were expected.
        ModelError: it cannot be loaded.
    """
    path = locate_weights(name, expected, "tokenizer")
    return VQTokenizer.from_pretrained(path)


def load_entropy_model(name: str, expected: str | None = None) -> LlamaGen:
    """The entropy model called ``name``; see :func:`load_tokenizer`."""
    path = locate_weights(name, expected, "entropy_model")
    return LlamaGen.from_pretrained(path)


def load_model(name: str) -> DPAR | LlamaGen:
    """The generator called ``name``, a DPAR or a LlamaGen; see :func:`load_tokenizer`."""
    path = weights_path(name)
    return DPAR.from_pretrained(path) if model_type(path) == DPAR.model_type else LlamaGen.from_pretrained(path)


def check_grid_and_codebook(config: SequenceConfig, manifest: Manifest, name: str, codes: str) -> None:
    """Raises StageError where the model called ``name`` is for another grid or codebook than the artifact ``codes``.

    A grid has to be the same one: rotary positions count the rows and columns of the grid that was trained on.
    """
    ours = ((config.grid_height, config.grid_width), config.codebook_size)
    theirs = (manifest.grid, manifest.codebook_size)
    if ours != theirs:
        (height, width), size = ours
        raise StageError(
            f"{name} is a model of {height}×{width} tokens of {size} codes, and {codes} holds "
            f"{manifest.grid[0]}×{manifest.grid[1]} tokens of {manifest.codebook_size} codes; weights serve the grid "
            "and the codebook that they were trained on alone (positions count rows and columns of that grid)"
        )


def check_same_tokenizer(name: str, tokenizer: Mapping[str, str], codes: str) -> None:
    """Check that the entropy model called ``name`` was trained on codes of ``tokenizer``, the one of ``codes``.

    A run records the tokenizer of its data. Weights without a run have no such record, so nothing is checked for them.

    Raises:
        StageError: the run was trained on codes of another tokenizer, with both; its entropies would mean nothing.
    """
    path = weights_path(name, "entropy_model")
    trained = _trained_on(Path(path))
    ours, theirs = (origin.get("fingerprint") for origin in (trained, tokenizer))
    if ours is None or theirs is None or ours == theirs:
        return
    raise StageError(
        f"{name} was trained on codes of the tokenizer {trained.get('path')} ({ours[:12]}), and {codes} holds codes of "
        f"{tokenizer.get('path')} ({theirs[:12]}); its entropies of them would mean nothing. `dpar entropy` trains a "
        f"model on {codes}. If both are one tokenizer in two files, `dpar convert {name} NEW` writes weights without "
        "this record"
    )


def _trained_on(weights: Path) -> dict[str, str]:
    """The tokenizer that made a model's training data, as its run or its bundle says; empty where neither is there."""
    if (weights.parent / BUNDLE).is_file():
        return asdict(Bundle.read(weights.parent).parts["tokenizer"])
    folders = list(weights.absolute().parents)[:2] if weights.exists() else []  # the Hub has no runs
    run = next((folder for folder in folders if (folder / "run.json").is_file()), None)
    try:
        recorded: Any = {} if run is None else read_run(run)["inputs"]["tokenizer"]
        return {key: str(recorded[key]) for key in ("path", "fingerprint") if key in recorded}
    except (LookupError, TypeError, AttributeError) as error:
        raise StageError(f"{run}/run.json is damaged: it names no tokenizer of its data") from error


def bundle_inputs(folder: Path, name: str) -> dict[str, Any]:
    """What a bundle says of its training data, as the record of a run says it.

    Args:
        folder: the bundle's directory.
        name: what the user calls it; its parts are recorded by this name where it ships with the package.
    """
    bundle = Bundle.read(folder)

    def origin(part: Part) -> dict[str, str] | None:
        recorded = bundle.parts.get(part)
        if recorded is None:
            return None
        own = name if name.startswith(BUILTIN_PREFIX) else str(folder / part)
        return {"path": own if recorded.path == part else recorded.path, "fingerprint": recorded.fingerprint}

    return {
        "tokenizer": origin("tokenizer"),
        "entropy_model": origin("entropy_model"),
        "patch_rule": None if bundle.rule is None else bundle.rule.to_dict(),
        "class_names": list(bundle.class_names),
    }


def fingerprint_of(name: str, part: Part = "generator") -> str:
    """SHA-256 of the weights called ``name``; of a bundle, of its ``part``."""
    path = weights_path(name, part)
    return fingerprint(path if Path(path).is_file() else local_folder(path, part))


def locate_weights(name: str, expected: str | None, part: Part) -> Path:
    """The local directory, or file, of the weights called ``name``, if their fingerprint is the expected one."""
    path = weights_path(name, part)
    folder = Path(path) if Path(path).is_file() else local_folder(path, part)
    if expected is not None and (found := fingerprint(folder)) != expected:
        raise StageError(
            f"the {part.replace('_', ' ')} at {name} has weights {found[:12]}, but {expected[:12]} made the codes; "
            f"name the right one with --{part.replace('_', '-')}"
        )
    return folder

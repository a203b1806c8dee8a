"""Load the models that stages use, by path, run, Hub name or built-in name.

tokenizer = load_tokenizer("builtin:photos")                             # or LlamaGen's vq_ds16_c2i.pt
entropy_model = load_entropy_model("runs/entropy", fingerprint=manifest.entropy_model["fingerprint"])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpar.bundle import BUNDLE, Bundle, Part
from dpar.llamagen import LlamaGen, SequenceConfig
from dpar.locations import RUN, local_folder, part_folder, weights_path
from dpar.model import DPAR
from dpar.pretrained import fingerprint, model_type
from dpar.tokenizer import VQTokenizer
from pipeline.runs.run_folder import read_run
from pipeline.runtime.errors import StageError
from shards.manifest import Manifest


def load_tokenizer(name: str, expected: str | None = None) -> VQTokenizer:
    """Return the VQ tokenizer called ``name``, in evaluation mode on the CPU.

    Args:
        name: a directory, run, Hub repository, built-in name, or LlamaGen's own file.
        expected: the required fingerprint of its weights; None accepts any.

    Raises:
        StageError: its weights have another fingerprint.
        ModelError: it cannot be loaded.
    """
    path = locate_weights(name, expected, "tokenizer")
    return VQTokenizer.from_pretrained(path)


def load_entropy_model(name: str, expected: str | None = None) -> LlamaGen:
    """Return the entropy model called ``name``; see :func:`load_tokenizer`."""
    path = locate_weights(name, expected, "entropy_model")
    return LlamaGen.from_pretrained(path)


def load_model(name: str) -> DPAR | LlamaGen:
    """Return the generator called ``name``, a DPAR or a LlamaGen; see :func:`load_tokenizer`."""
    path = weights_path(name)
    return DPAR.from_pretrained(path) if model_type(path) == DPAR.model_type else LlamaGen.from_pretrained(path)


def check_grid_and_codebook(config: SequenceConfig, manifest: Manifest, name: str, codes: str) -> None:
    """Check that the model called ``name`` has the grid and the codebook of the artifact ``codes``.

    The grids must be equal: rotary positions count the rows and columns of the grid of training.

    Raises:
        StageError: they differ.
    """
    height, width, size = config.grid_height, config.grid_width, config.codebook_size
    if ((height, width), size) != (manifest.grid, manifest.codebook_size):
        raise StageError(
            f"{name} is a model of {height}×{width} tokens of {size} codes, but {codes} holds "
            f"{manifest.grid[0]}×{manifest.grid[1]} tokens of {manifest.codebook_size} codes; weights work only with "
            "the grid and the codebook they were trained on"
        )


def check_same_tokenizer(name: str, tokenizer: Mapping[str, str], codes: str) -> None:
    """Check that the entropy model called ``name`` was trained on codes of ``tokenizer``, like those at ``codes``.

    A run records the tokenizer of its data. Weights without a run have no such record and are not checked.

    Raises:
        StageError: the run was trained on codes of another tokenizer, so its entropies would be meaningless.
    """
    recorded = _recorded_tokenizer(Path(weights_path(name, "entropy_model")))
    trained_on, expected = (origin.get("fingerprint") for origin in (recorded, tokenizer))
    if trained_on is None or expected is None or trained_on == expected:
        return
    raise StageError(
        f"{name} was trained on codes of the tokenizer {recorded.get('path')} ({trained_on[:12]}), but {codes} holds "
        f"codes of {tokenizer.get('path')} ({expected[:12]}); its entropies would be meaningless. Train a model on "
        f"{codes} with `dpar entropy`. If both files are the same tokenizer, `dpar convert {name} NEW` writes weights "
        "without this record"
    )


def _recorded_tokenizer(weights: Path) -> dict[str, str]:
    """Return the tokenizer of a model's training data as recorded by its run or bundle; empty without either."""
    if (weights.parent / BUNDLE).is_file():
        tokenizer = weights.parent / "tokenizer"
        return {"path": str(tokenizer), "fingerprint": Bundle.read(weights.parent).parts["tokenizer"]}
    folders = list(weights.absolute().parents)[:2] if weights.exists() else []  # the Hub has no runs
    run = next((folder for folder in folders if (folder / RUN).is_file()), None)
    try:
        recorded: Any = {} if run is None else read_run(run)["inputs"]["tokenizer"]
        return {key: str(recorded[key]) for key in ("path", "fingerprint") if key in recorded}
    except (LookupError, TypeError, AttributeError) as error:
        raise StageError(f"{run}/{RUN} is damaged: it does not name the tokenizer of its data") from error


def bundle_inputs(folder: Path) -> dict[str, Any]:
    """Return the training data recorded in the bundle ``folder``, in the form of a run's inputs."""
    bundle = Bundle.read(folder)

    def origin(part: Part) -> dict[str, str] | None:
        if part not in bundle.parts:
            return None
        return {"path": str(part_folder(folder, part)), "fingerprint": bundle.parts[part]}

    return {
        "tokenizer": origin("tokenizer"),
        "entropy_model": origin("entropy_model"),
        "patch_rule": None if bundle.rule is None else bundle.rule.to_dict(),
        "class_names": list(bundle.class_names),
    }


def fingerprint_of(name: str, part: Part = "generator") -> str:
    """Return the SHA-256 of the weights called ``name``; for a bundle, of its ``part``."""
    path = weights_path(name, part)
    return fingerprint(path if Path(path).is_file() else local_folder(path, part))


def locate_weights(name: str, expected: str | None, part: Part) -> Path:
    """Return the local directory or file of the weights called ``name``; StageError if their fingerprint differs."""
    path = weights_path(name, part)
    folder = Path(path) if Path(path).is_file() else local_folder(path, part)
    if expected is not None and (actual := fingerprint(folder)) != expected:
        raise StageError(
            f"the {part.replace('_', ' ')} at {name} has weights {actual[:12]}, but {expected[:12]} are needed; "
            f"name the right one with --{part.replace('_', '-')}"
        )
    return folder

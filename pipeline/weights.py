"""Finding and loading the models that stages pass on to each other, by path, run, Hub name or built-in name.

tokenizer = load_tokenizer("builtin:photos")                             # or LlamaGen's vq_ds16_c2i.pt
entropy_model = load_entropy_model("runs/entropy", fingerprint=manifest.entropy_model["fingerprint"])
"""

from __future__ import annotations

from pathlib import Path

from dpar.checkpoint import fingerprint, local_folder, model_type, weights_path
from dpar.llamagen import LlamaGen, SequenceConfig
from dpar.model import DPAR
from dpar.tokenizer import VQTokenizer
from pipeline.errors import StageError
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
    path = checked(name, expected, "tokenizer")
    return VQTokenizer.from_pretrained(path)


def load_entropy_model(name: str, expected: str | None = None) -> LlamaGen:
    """The entropy model called ``name``; see :func:`load_tokenizer`."""
    path = checked(name, expected, "entropy model")
    return LlamaGen.from_pretrained(path)


def load_model(name: str) -> DPAR | LlamaGen:
    """The generator called ``name``, a DPAR or a LlamaGen; see :func:`load_tokenizer`."""
    path = weights_path(name)
    return DPAR.from_pretrained(path) if model_type(path) == DPAR.model_type else LlamaGen.from_pretrained(path)


def same_tokens(config: SequenceConfig, manifest: Manifest, name: str, codes: str) -> None:
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


def fingerprint_of(name: str) -> str:
    """SHA-256 of the weights called ``name``."""
    return fingerprint(weights_path(name))


def checked(name: str, expected: str | None, role: str) -> Path:
    """The local directory, or file, of the weights called ``name``, if their fingerprint is the expected one."""
    path = weights_path(name)
    folder = Path(path) if Path(path).is_file() else local_folder(path)
    if expected is not None and (found := fingerprint(folder)) != expected:
        raise StageError(
            f"the {role} at {name} has weights {found[:12]}, but {expected[:12]} made the codes; "
            f"name the right one with --{role.replace(' ', '-')}"
        )
    return folder

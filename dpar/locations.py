"""Resolve names of weights (runs, bundles, built-in weights, Hub repositories) to local directories.

weights_path("runs/dpar-b")                          # "runs/dpar-b/model"
local_folder("owner/name")                           # the snapshot, downloaded by huggingface_hub
bundle_folder("owner/name")                          # the same, or None if it is not a bundle
"""

from __future__ import annotations

import os
from pathlib import Path

from dpar.bundle import BUNDLE, PARTS, Bundle, Part
from dpar.errors import ModelError
from dpar.tensors import shown

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # files of a model directory
RUN, RUN_WEIGHTS = "run.json", "model"  # in a training run: its record, and the directory of its newest weights
# directories of dpar/weights; its README.md says how they were trained
BUILTIN = {
    "builtin:photos": "photos-vq-8",  # a tokenizer
    "builtin:emoji": "emoji",  # a bundle
    "builtin:emoji-llamagen": "emoji-llamagen",  # a bundle: the baseline
}
BUILTIN_FOLDER = Path(__file__).parent / "weights"
SHARED: dict[tuple[str, Part], str] = {("emoji-llamagen", "tokenizer"): "emoji/tokenizer"}  # which ships once


def weights_path(name: str | os.PathLike[str], part: Part = "generator") -> str:
    """Return the directory, checkpoint file or Hub name of the weights called ``name``.

    Args:
        name: a directory or file; ``owner/name`` on the Hub; a built-in name; a run, for its ``model/``; or a bundle,
            for its ``part``.
        part: of a bundle.

    Raises:
        ModelError: an unknown built-in name, a run without weights yet, or a bundle without that part.
    """
    name = os.fspath(name)
    if name.startswith("builtin:"):
        return _part_path(_builtin(name), part)
    if (Path(name) / RUN).is_file():
        if not (Path(name) / RUN_WEIGHTS / CONFIG).is_file():
            raise ModelError(f"the run {name} has no weights yet: it has not written its first checkpoint")
        return str(Path(name) / RUN_WEIGHTS)
    return _part_path(Path(name), part)


def _builtin(name: str) -> Path:
    if name not in BUILTIN:
        raise ModelError(f"no weights are called {name!r}; built in are {', '.join(BUILTIN)}")
    return BUILTIN_FOLDER / BUILTIN[name]


def _part_path(folder: Path, part: Part) -> str:
    """Return the directory of a bundle's part; ``folder`` itself if it is not a bundle."""
    if not (folder / BUNDLE).is_file():
        return str(folder)
    if part not in Bundle.read(folder).parts:
        raise ModelError(f"the bundle {folder} has no {part.replace('_', ' ')}")
    return str(part_folder(folder, part))


def part_folder(bundle: Path, part: Part) -> Path:
    """Return the directory of a part that the bundle in the directory ``bundle`` has."""
    shared = SHARED.get((bundle.name, part)) if bundle.parent == BUILTIN_FOLDER else None
    return bundle / part if shared is None else BUILTIN_FOLDER / shared


def bundle_folder(name: str | os.PathLike[str]) -> Path | None:
    """Return the directory of a bundle (for a Hub repository, a snapshot); None if ``name`` is not one."""
    name = os.fspath(name)
    if name.startswith("builtin:"):
        folder = _builtin(name)
    else:
        folder = _snapshot(name) if not Path(name).exists() and _is_hub_name(name) else Path(name)
    return folder if (folder / BUNDLE).is_file() else None


def local_folder(path: str | os.PathLike[str], part: Part = "generator") -> Path:
    """Return the directory of a model, named as for :func:`weights_path`; for a Hub repository, a snapshot."""
    path = weights_path(path, part)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; a directory with {CONFIG} and {WEIGHTS} is needed")
    if folder.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        raise ModelError(f"no model at {folder}: the file does not exist")
    if _is_hub_name(path):
        return Path(_part_path(_snapshot(path), part))
    raise ModelError(f"no model at {shown(path, quote=False)}: there is no such directory")


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _snapshot(name: str) -> Path:
    """Return a local snapshot of a Hub repository, with only the files that are read here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [BUNDLE, CONFIG, WEIGHTS, *(f"{part}/{file}" for part in PARTS for file in (CONFIG, WEIGHTS))]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(f"no model at {shown(name, quote=False)}: there is no such directory") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name} is not a local directory, and the Hub could not be read: {error}") from error

"""``dpar convert SRC DST``: checkpoint files of LlamaGen and of DPAR's authors to directories, back, and to the Hub.

    converted = convert("c2i_B_256.pt", Path("c2i-b"), ConvertSettings())       # config.json, model.safetensors, card
    converted = convert("c2i-b", Path("c2i_B_256.pt"), ConvertSettings())       # a file that LlamaGen's code loads

Tensors are copied byte for byte, in their own dtypes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from dpar import checkpoint_files
from dpar.llamagen import LlamaGen
from dpar.locations import weights_path
from dpar.model import DPAR
from dpar.pretrained import Weights, fingerprint, read_weights, write_weights
from dpar.tokenizer import VQTokenizer
from pipeline.generation.hub import push
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.models import ConvertSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MODELS: dict[str, type[Any]] = {model.model_type: model for model in (DPAR, LlamaGen, VQTokenizer)}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was converted."""

    description: str  # of the model, in one line
    parameters: int
    tensors: int
    bytes: int  # of the tensors
    fingerprint: str  # SHA-256 of what was written
    pushed_to: str | None  # address on the Hub


def convert(src: str, dst: Path, settings: ConvertSettings, progress: Progress | None = None) -> Converted:
    """Write the model ``src`` to ``dst``: a checkpoint file if ``dst`` ends in ``.pt``, else a directory.

    A file has the tensor names of LlamaGen or, for a DPAR, of its authors.

    Args:
        src: a checkpoint file, or a directory, run, Hub repository or built-in name.
        dst: a new file or directory; left unchanged if it already holds this model.
        settings: see :class:`ConvertSettings`.
        progress: where to report.

    Raises:
        StageError, ModelError: source, destination or repository cannot be used.
    """
    progress = progress or Progress()
    path = weights_path(src)
    to_file = dst.suffix == ".pt"
    if to_file and settings.push_to is not None:
        raise StageError("--push-to needs a directory, which from_pretrained can load; DST must not end in .pt")
    weights = read_weights(path, heads=settings.heads, grid=settings.grid, rope=settings.rope)
    if weights.model_type not in MODELS:
        raise StageError(f"{src} holds a {weights.model_type!r} model; expected one of {', '.join(MODELS)}")
    model = weights.meta_model(MODELS[weights.model_type])
    values = dataclasses.asdict(cast("DataclassInstance", model.config))
    if _holds(dst, weights, values):
        progress.say(f"{dst} already holds this model")
    elif to_file:
        dst.parent.mkdir(parents=True, exist_ok=True)
        checkpoint_files.write(dst, weights.model_type, values, weights.tensors)
    else:
        note = f"Converted from `{Path(src).name}`, SHA-256 `{fingerprint(path)}`."
        from_file = Path(path).is_file()
        write_weights(dst, weights.model_type, values, weights.tensors, note if from_file else "")
    return Converted(
        description=checkpoint_files.describe(weights.model_type, values),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tensors=len(weights.tensors),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values()),
        fingerprint=fingerprint(dst),
        pushed_to=None if settings.push_to is None else push(dst, settings.push_to),
    )


def _holds(dst: Path, weights: Weights, values: dict[str, Any]) -> bool:
    """Return whether ``dst`` already holds this model; False if it is missing or an empty directory.

    Raises:
        StageError: it holds something else.
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return False
    refusal = f"{dst} exists and holds something else; name a new directory, or a new file that ends in .pt"
    try:
        stored = read_weights(dst, weights.model_type)
    except ValueError as error:
        raise StageError(refusal) from error
    wanted, existing = (json.loads(json.dumps(config)) for config in (values, stored.values))
    same = all(wanted.get(name) == value for name, value in existing.items()) and all(
        name in stored.tensors
        and stored.tensors[name].dtype == tensor.dtype
        and torch.equal(stored.tensors[name], tensor)
        for name, tensor in weights.tensors.items()
    )
    if not same:
        raise StageError(refusal)
    return True

"""Checkpoint files of LlamaGen and of the DPAR authors, read without running anything in them.

    found = read("c2i_B_256.pt")
    found.model_type, found.sizes, found.tensors             # "llamagen", fields of LlamaGenConfig, name to tensor

``from_pretrained`` comes here with any path that is a file: ``.pt`` (``vq_ds16_c2i.pt``, ``c2i_B_256.pt``) or
``.safetensors``. In a ``.pt`` the state dict is looked for under ``model``, ``ema``, ``module``, ``state_dict``, in
that order, then taken for bare. Names may begin with ``module.`` (DDP) or ``_orig_mod.`` (torch.compile). Tensors of
the authors' DPAR get our names (:data:`AUTHORS_NAMES`). Sizes are read off the tensors. What tensors do not say:

- heads: ``freqs_cis`` if stored, else the training arguments, else the width, if it is a published one;
- grid: ``freqs_cis``, else the training arguments, else ``_256``, ``_384`` or ``_512`` in the file's name (pixels, 16
  per token), else 16×16;
- rotary positions of DPAR's patches: the training arguments if this module wrote the file, else ``dynamic``.

``heads``, ``grid`` and ``rope`` say it for a file that does not. A file that says otherwise is refused: rotary
positions count rows and columns of the grid that weights were trained on. Weights for 384 px would see a 256 px image
as the top left corner of a larger one, cut off at its 16th column, which they were never trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpar.errors import ModelError
from dpar.files import atomic_path
from dpar.rope import token_table, with_condition
from dpar.tensors import count_layers, shown
from dpar.torch_files import NEEDED, load, state_dict

DERIVED = ("freqs_cis", "quantize.codebook_used")  # computed anew, or a statistic of training
CODEBOOK_USED = 65536  # entries of the latter; LlamaGen's VQ does not load without it
# by width: B, L, XL, XXL, LlamaGen's 1B, 3B and 7B, DPAR's XXXL
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 3200: 32, 4096: 32, 2560: 40}
NAMES = {"GPT-B": 12, "GPT-L": 16, "GPT-XL": 20, "GPT-XXL": 24, "GPT-1B": 32, "GPT-3B": 32, "GPT-7B": 32}
# The authors' prefixes of tensor names and ours; {} is the number of a layer.
AUTHORS_NAMES = {
    "local_encoder.layers.{}.": "encoder.{}.block.",
    "local_encoder.cross_attn_layers.{}.cross_attn_norm_q.": "encoder.{}.cross_attention.patch_norm.",
    "local_encoder.cross_attn_layers.{}.cross_attn_norm_kv.": "encoder.{}.cross_attention.token_norm.",
    "local_encoder.cross_attn_layers.{}.": "encoder.{}.cross_attention.",
    "local_decoder.layers.{}.": "decoder.{}.block.",
    "local_decoder.cross_attn_layers.{}.cross_attn_norm_kv.": "decoder.{}.patch_norm.",
    "local_decoder.cross_attn_layers.{}.wo.": "decoder.{}.patch_proj.",
    "decoder_start_embedding.": "decoder_start.",
}
PUBLISHED = {"patch_query": "max", "offset_embedding": False, "decoder_start": "learned"}  # what the format can hold
TITLES = {"vq": "LlamaGen's VQ tokenizer", "llamagen": "LlamaGen's GPT", "dpar": "a DPAR model"}


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """What a checkpoint file holds."""

    path: Path
    model_type: str  # "vq", "llamagen" or "dpar"
    sizes: dict[str, Any]  # fields of VQConfig, LlamaGenConfig or DPARConfig
    tensors: dict[str, Tensor]  # by our names, in the file's own dtypes, memory-mapped if possible; without DERIVED
    key: str | None  # where the state dict lay; None: bare
    grid_from: str | None = None  # what the grid was read off; None for a VQ


def read(
    path: str | os.PathLike[str],
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    rope: str | None = None,
) -> CheckpointFile:
    """Read one file of LlamaGen or of the DPAR authors.

    Args:
        path: the file.
        heads: of the attention, for a file that does not say.
        grid: rows and columns of tokens that the weights are for, likewise.
        rope: rotary positions of a DPAR's patches, likewise.

    Raises:
        ModelError: the file is something else, with what it is; or it says other heads or another grid.
    """
    file = Path(path)
    held = load(file)
    tensors, key = state_dict(held, file)
    kind = _kind(tensors)
    if kind is None:
        raise ModelError(f"{file} holds {_other(tensors)}; {NEEDED}")
    if rope is not None and kind != "dpar":
        raise ModelError(f"{file} is {TITLES[kind]}; rope= belongs to a DPAR model")
    kept = {name: tensor for name, tensor in tensors.items() if name not in DERIVED}
    if kind == "vq":
        return CheckpointFile(path=file, model_type=kind, sizes=_vq_sizes(kept, file), tensors=kept, key=key)
    arguments = held.get("args") if key is not None else None
    said = dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else arguments
    said = said if isinstance(said, dict) else {}
    sizes = _gpt_sizes(kept, said, file)
    if kind == "dpar":
        sizes |= _dpar_depths(kept) | {"rope": _rope(said, rope, file)} | PUBLISHED
        kept = {_renamed(name, AUTHORS_NAMES): tensor for name, tensor in kept.items()}
    rotary = _rotary(tensors.get("freqs_cis"), sizes["width"], file)
    sizes["heads"] = _heads(rotary, said, sizes["width"], heads, file)
    (sizes["grid_height"], sizes["grid_width"]), grid_from = _grid(rotary, said, grid, file)
    if "freqs_cis" in tensors:
        _check_rotary(tensors["freqs_cis"], sizes, file)
    return CheckpointFile(path=file, model_type=kind, sizes=sizes, tensors=kept, key=key, grid_from=grid_from)


def write(path: Path, model_type: str, sizes: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file that LlamaGen's or the DPAR authors' code loads: ``{"model": state dict}``. Atomic.

    Heads, grid and rotary positions that neither tensors nor file name tell go into a plain ``args`` beside it, for
    :func:`read`.

    Raises:
        ModelError: the authors' DPAR has no such choices as this model's.
    """
    names = {}
    if model_type == "dpar":
        other = [f"{name} {sizes[name]!r}" for name, value in PUBLISHED.items() if sizes[name] != value]
        if other:
            raise ModelError(f"{path} cannot be written: the authors' model has no {', '.join(other)}")
        names = {ours: theirs for theirs, ours in AUTHORS_NAMES.items()}
    state = {_renamed(name, names): tensor.contiguous() for name, tensor in tensors.items()}
    held: dict[str, Any] = {"model": state}
    if model_type == "vq":
        state["quantize.codebook_used"] = torch.zeros(CODEBOOK_USED)
    else:
        grid = (sizes["grid_height"], sizes["grid_width"])
        guessed = _grid(None, {}, None, path)[0]
        arguments: dict[str, Any] = {}
        if HEADS.get(sizes["width"]) != sizes["heads"] or guessed != grid:
            arguments = {"n_head": sizes["heads"], "grid": list(grid)}
        if sizes.get("rope", "dynamic") != "dynamic":
            arguments["rope"] = sizes["rope"]
        if arguments:
            held["args"] = arguments
    with atomic_path(path) as part:
        torch.save(held, part)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """A tensor's name with its prefix replaced; longer prefixes come first in ``prefixes`` where two would match."""
    for old, new in prefixes.items():
        pattern = re.escape(old).replace(re.escape("{}"), r"(\d+)")
        if match := re.match(pattern, name):
            return new.format(*match.groups()) + name[match.end() :]
    return name


def _kind(tensors: dict[str, Tensor]) -> str | None:
    """``vq``, ``llamagen``, ``dpar``, or None if the tensors belong to none of them."""
    if any(name.startswith("local_encoder.layers.") for name in tensors):
        return "dpar"
    if any(name.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) for name in tensors):
        return "vq"
    if any(name.startswith("cls_embedding.cap_proj.") for name in tensors):
        return None
    if any(re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", name) for name in tensors):
        return "llamagen"
    return None


def _other(tensors: dict[str, Tensor]) -> str:
    if any(name.startswith("cls_embedding.cap_proj.") for name in tensors):
        return "LlamaGen's text-to-image GPT, which reads captions and not classes"
    if any(name.startswith("encoder.0.block.") for name in tensors):
        return "the weights of a directory written by save_pretrained; name the directory"
    return f"another model (its tensors: {', '.join(shown(name, quote=False) for name in list(tensors)[:3])} …)"


def _vq_sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    levels = count_layers(tensors, "encoder.conv_blocks.")
    stages = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
    needed = ["quantize.embedding.weight", "encoder.conv_in.weight", "encoder.conv_out.weight", *stages]
    codebook, first, last, *widths = _shapes(tensors, needed, "VQTokenizer", path)
    if first[0] < 1 or any(width[0] % first[0] for width in widths):
        shown = ", ".join(str(width[0]) for width in widths)
        raise ModelError(f"{path}: its widths ({shown}) are no multiples of the first layer's {first[0]}")
    return {
        "codebook_size": codebook[0],
        "codebook_dim": codebook[1],
        "channels": first[0],
        "channel_multipliers": tuple(width[0] // first[0] for width in widths),
        "residual_blocks": count_layers(tensors, "encoder.conv_blocks.0.res."),
        "latent_channels": last[0],
    }


def _gpt_sizes(tensors: dict[str, Tensor], said: dict[str, Any], path: Path) -> dict[str, Any]:
    """Sizes of a GPT, or of a DPAR but for its depths."""
    class_table, is_dpar = "cls_embedding.embedding_table.weight", _kind(tensors) == "dpar"
    if not is_dpar and class_table not in tensors:  # the authors' entropy model: nothing in front of the tokens
        (tokens,) = _shapes(tensors, ["tok_embeddings.weight"], "LlamaGen", path)
        sizes = {"codebook_size": tokens[0], "classes": 0, "width": tokens[1], "start_token": False}
    else:
        needed = ["tok_embeddings.weight", class_table]
        tokens, labels = _shapes(tensors, needed, "DPAR" if is_dpar else "LlamaGen", path)
        if _said_number(said, "num_classes", path) == labels[0]:
            raise ModelError(f"{path} was trained without a guidance class (class dropout 0); one with it is needed")
        sizes = {"codebook_size": tokens[0], "classes": labels[0] - 1, "width": tokens[1]}
    return sizes if is_dpar else sizes | {"layers": count_layers(tensors, "layers.")}


def _dpar_depths(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Layers of the three parts of a DPAR, by the authors' names."""
    return {
        "encoder_layers": count_layers(tensors, "local_encoder.layers."),
        "patch_layers": count_layers(tensors, "layers."),
        "decoder_layers": count_layers(tensors, "local_decoder.layers."),
    }


def _rope(said: dict[str, Any], asked: str | None, path: Path) -> str:
    """Rotary positions of a DPAR's patches: those that this module wrote down, or those asked for."""
    stored = said.get("rope")
    if stored is not None and not isinstance(stored, str):
        raise ModelError(f"{path}: rope in its training arguments is {shown(stored)}; a name is needed")
    if stored is not None and asked not in (None, stored):
        raise ModelError(f"{path} has rotary positions {stored!r}; {asked!r} were asked for")
    return stored or asked or "dynamic"


def _said_number(said: dict[str, Any], name: str, path: Path) -> int | None:
    """A whole number above 0 among the training arguments; None if they have no such argument, or null."""
    value: int | None = said.get(name)
    if value is not None and not _is_size(value):
        raise ModelError(f"{path}: {name} in its training arguments is {shown(value)}; a whole number is needed")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shapes(tensors: dict[str, Tensor], names: list[str], model: str, path: Path) -> list[tuple[int, ...]]:
    """Shapes of the tensors that sizes are read off."""
    faults = [f"missing {name}" for name in names if name not in tensors]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}" for name in names if name in tensors and tensors[name].ndim < 2
    ]
    if faults:
        raise ModelError(f"{path} does not fit a {model}: {'; '.join(faults)}")
    return [tuple(tensors[name].shape) for name in names]


def _rotary(freqs_cis: Tensor | None, width: int, path: Path) -> tuple[int, int] | None:
    """Heads and side of the grid, by a stored table of (1 + N, head_dim / 2, 2)."""
    if freqs_cis is None:
        return None
    side = math.isqrt(max(freqs_cis.shape[0] - 1, 0)) if freqs_cis.ndim == 3 else 0
    pairs = freqs_cis.shape[1] if freqs_cis.ndim == 3 else 0
    if side == 0 or side * side + 1 != freqs_cis.shape[0] or 0 in (pairs, width) or width % (2 * pairs):
        raise ModelError(f"{path}: freqs_cis is {tuple(freqs_cis.shape)}; (1 + N, head width / 2, 2) is needed")
    return width // (2 * pairs), side


def _heads(rotary: tuple[int, int] | None, said: dict[str, Any], width: int, asked: int | None, path: Path) -> int:
    found: int | None
    if rotary is not None:
        found = rotary[0]
    elif (heads := _said_number(said, "n_head", path)) is not None:
        found = heads
    else:
        found = NAMES.get(str(said.get("gpt_model")), HEADS.get(width))
    if found is None:
        if asked is not None:
            return asked
        raise ModelError(
            f"{path} does not say how many heads it has, and its width of {width} is none of the published ones; "
            "pass heads= to from_pretrained"
        )
    if asked not in (None, found):
        raise ModelError(f"{path} has {found} heads; {asked} were asked for")
    return found


def _grid(
    rotary: tuple[int, int] | None, said: dict[str, Any], asked: tuple[int, int] | None, path: Path
) -> tuple[tuple[int, int], str]:
    """Rows and columns of tokens, and what says so."""
    found: tuple[int, int] | None = None
    source = "freqs_cis"
    if rotary is not None:
        found = (rotary[1], rotary[1])
    elif (stored := said.get("grid")) is not None:
        if not (isinstance(stored, list) and len(stored) == 2 and all(map(_is_size, stored))):
            raise ModelError(f"{path}: grid in its training arguments is {shown(stored)}; two whole numbers are needed")
        found, source = (stored[0], stored[1]), "its training arguments"
    elif (pixels := _said_number(said, "image_size", path)) is not None:
        side = pixels // (_said_number(said, "downsample_size", path) or 16)
        found, source = (side, side), "its training arguments"
    elif named := re.findall(r"_(256|384|512)(?!\d)", path.name):
        side = int(named[-1]) // 16
        found, source = (side, side), f"_{named[-1]} in its name"
    if found is not None and asked is not None and tuple(asked) != found:
        raise ModelError(
            f"{path} is for a grid of {found[0]}×{found[1]} ({source}), and {asked[0]}×{asked[1]} was asked for: "
            "rotary positions count rows and columns of the grid that weights were trained on, so it serves that alone"
        )
    if found is not None:
        return found, source
    return (asked, "as asked") if asked is not None else ((16, 16), "LlamaGen's default; the file does not say")


def _check_rotary(freqs_cis: Tensor, sizes: dict[str, Any], path: Path) -> None:
    """Refuses a stored table that is not LlamaGen's: the model would compute with ours."""
    head_dim = sizes["width"] // sizes["heads"]
    ours = with_condition(token_table(sizes["grid_height"], sizes["grid_width"], head_dim))
    if freqs_cis.shape != ours.shape or not torch.allclose(freqs_cis.float(), ours, atol=1e-2):
        raise ModelError(f"{path} was trained with other rotary positions (freqs_cis) than LlamaGen's 2D ones")


def describe(model_type: str, sizes: dict[str, Any]) -> str:
    """A model in a line, by its config's values."""
    title = TITLES.get(model_type, model_type)
    if model_type == "vq":
        pixels = 2 ** (len(sizes["channel_multipliers"]) - 1)
        return f"{title}: {sizes['codebook_size']} codes of dimension {sizes['codebook_dim']}, {pixels} pixels a code"
    depth = "{layers} layers"
    if model_type == "dpar":
        depth = "{encoder_layers} + {patch_layers} + {decoder_layers} layers"
    classes = f"{sizes['classes']} classes" if sizes["classes"] else "no classes"
    classes += "" if sizes.get("start_token", True) else ", no start token"
    return (
        f"{title}: {depth.format(**sizes)} of width {sizes['width']}, {sizes['heads']} heads, "
        f"{sizes['grid_height']}×{sizes['grid_width']} tokens of {sizes['codebook_size']} codes, {classes}"
    )

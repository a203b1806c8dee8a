"""Class names to pictures, and pictures to patches, in a few lines (paper sections 3 and 4).

    pipe = DPARPipeline.from_pretrained("bundle")            # a directory, or "owner/name" on the Hub
    pictures = pipe(["animal mammal", 7], cfg_scale=2.0, seed=0).images
    patched = pipe.patchify(Image.open("cat.png"))           # entropies (nats), patch starts, reconstruction
    edited = pipe("cat", image=Image.open("cat.png"), keep_rows=8).images     # keeps the top 8 rows of tokens

A pipeline loads a bundle (:mod:`dpar.bundle`) and reuses one :class:`dpar.sampling.Sampler` across calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.bundle import Bundle
from dpar.class_names import find_class, nearest_class
from dpar.errors import ModelError
from dpar.guidance import GuidanceSchedule, SamplingOptions
from dpar.images import center_crop, kept_tokens, to_rgb
from dpar.llamagen import LlamaGen
from dpar.locations import bundle_folder, part_folder
from dpar.model import DPAR
from dpar.patching import PatchRule
from dpar.pretrained import fingerprint, model_type
from dpar.sampling import Sampler, check_same_tokens
from dpar.tokenizer import VQTokenizer, from_uint8, to_uint8

Label = str | int


@dataclass(frozen=True, kw_only=True)
class PipelineImages:
    """Sampled images."""

    images: list[Image.Image]
    labels: NDArray[np.int64]  # (n,)
    codes: NDArray[np.int64]  # (n, N)
    starts: NDArray[np.bool_]  # (n, N), True where a token starts a patch; everywhere for a LlamaGen
    entropies: NDArray[np.float16] | None  # (n, N) nats, +inf for token 0; None unless requested
    kept: NDArray[np.bool_] | None = None  # (N,), True where a token comes from the given image; None without one


@dataclass(frozen=True, kw_only=True)
class PatchedImage:
    """The tokens and patches of a picture."""

    codes: NDArray[np.int64]  # (H_g, W_g)
    entropies: NDArray[np.float16]  # (H_g, W_g) nats, +inf for token 0
    starts: NDArray[np.bool_]  # (H_g, W_g), True where a token starts a patch
    reconstruction: Image.Image  # decoded from the codes

    @property
    def patches(self) -> int:
        """Number of patches, M."""
        return int(self.starts.sum())


class DPARPipeline:
    """A generator with its tokenizer, its entropy model and its patch rule."""

    def __init__(
        self,
        generator: DPAR | LlamaGen,
        tokenizer: VQTokenizer,
        entropy_model: LlamaGen | None,
        rule: PatchRule | None,
        class_names: Sequence[str],
    ) -> None:
        """Take parts that are in evaluation mode and on one device.

        Raises:
            ModelError: the parts do not fit each other.
        """
        if generator.config.codebook_size != tokenizer.config.codebook_size:
            raise ModelError(
                f"the tokenizer has {tokenizer.config.codebook_size} codes, the generator "
                f"{generator.config.codebook_size}; both must come from the same training data"
            )
        if generator.config.classes != len(class_names):
            raise ModelError(f"the generator has {generator.config.classes} classes; {len(class_names)} have names")
        if entropy_model is not None:
            check_same_tokens(generator, entropy_model)
        self.generator = generator
        self.tokenizer = tokenizer
        self.entropy_model = entropy_model
        self.rule = rule
        self.class_names = tuple(class_names)
        self._sampler = Sampler(generator, entropy_model)

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """Return the pipeline of a bundle, in float32 on the CPU; :meth:`to` moves it.

        Args:
            name: a directory that ``dpar export`` wrote, or ``owner/name`` on the Hugging Face Hub.

        Raises:
            ModelError: ``name`` is not a bundle, or a part is missing, damaged or not the one that was exported.
        """
        folder = bundle_folder(name)
        if folder is None:
            raise ModelError(f"{name} is not a bundle: it has no bundle.json. `dpar export RUN DIR` writes one")
        bundle = Bundle.read(folder)
        paths = {}
        for part, recorded in bundle.parts.items():
            paths[part] = part_folder(folder, part)
            if fingerprint(paths[part]) != recorded:
                raise ModelError(f"{paths[part]} is not the {part} that {folder} was exported with; export it again")
        of_dpar = model_type(paths["generator"]) == DPAR.model_type
        entropy_path = paths.get("entropy_model")
        return cls(
            (DPAR if of_dpar else LlamaGen).from_pretrained(paths["generator"]),
            VQTokenizer.from_pretrained(paths["tokenizer"]),
            None if entropy_path is None else LlamaGen.from_pretrained(entropy_path),
            bundle.rule,
            bundle.class_names,
        )

    def to(self, device: torch.device | str) -> Self:
        """Move all parts to a device, in place."""
        for part in (self.generator, self.tokenizer, self.entropy_model):
            if part is not None:
                part.to(device)
        self._sampler = Sampler(self.generator, self.entropy_model)  # the old one is bound to the old device
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.generator.output.weight.device

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, (H_g, W_g)."""
        return self.generator.config.grid_height, self.generator.config.grid_width

    def __call__(
        self,
        classes: Label | Sequence[Label],
        *,
        images_per_class: int = 1,
        cfg_scale: float = 2.0,
        cfg_schedule: GuidanceSchedule = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        threshold: float | None = None,
        seed: int = 0,
        batch: int = 32,
        entropies: bool = False,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        keep_rows: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> PipelineImages:
        """Sample pictures; image i is a function of the seed, i and its class, not of the batch size.

        With ``image``, part of that picture is kept and the rest is sampled in raster order. The picture is cropped as
        in :meth:`patchify`.

        Args:
            classes: names or numbers.
            images_per_class: images of one class are consecutive.
            cfg_scale: s of classifier-free guidance; 1 is none.
            cfg_schedule: of the guidance over the tokens (:class:`~dpar.guidance.SamplingOptions`).
            temperature: of the logits; 0 takes the likeliest token.
            top_k: only the k likeliest tokens; 0 is all.
            top_p: only the likeliest tokens that together have this probability.
            threshold: τ in nats, above which a token starts a patch; None uses that of the training data.
            seed: of all randomness.
            batch: images sampled at once.
            entropies: whether to return the entropies of the sampled tokens as well.
            image: a picture of which a part is kept; needs ``mask`` or ``keep_rows``.
            mask: of the image's size; tokens with a white pixel are sampled.
            keep_rows: rows of tokens to keep, from the top.
            progress: called after each token with the fraction of work done; an exception it raises ends sampling.

        Raises:
            ModelError: an unknown class, or an invalid setting.
        """
        labels = np.repeat([self.label(item) for item in _as_list(classes)], images_per_class)
        options = SamplingOptions(
            cfg_scale=cfg_scale,
            cfg_schedule=cfg_schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        known, keep = self._kept(len(labels), image, mask, keep_rows)
        tokens = len(labels) * self.generator.config.n_tokens

        def observe(images: slice, position: int, _: torch.Tensor) -> None:
            assert progress is not None
            size = images.stop - images.start
            progress((images.start * self.generator.config.n_tokens + size * (position + 1)) / tokens)

        codes, starts = self._sampler.sample(
            torch.from_numpy(labels),
            self.rule_at(threshold),
            options,
            batch=batch,
            known=known,
            keep=keep,
            observe=None if progress is None else observe,
        )
        return PipelineImages(
            images=self.decode(codes, batch),
            labels=labels,
            codes=codes.cpu().numpy(),
            starts=starts.cpu().numpy(),
            entropies=self._entropy(codes, batch).cpu().numpy() if entropies else None,
            kept=None if keep is None else keep[0].numpy(),
        )

    @torch.no_grad()
    def patchify(
        self,
        image: Image.Image,
        *,
        threshold: float | None = None,
        max_length: int | None = None,
        row_reset: bool | None = None,
    ) -> PatchedImage:
        """Return the patches of a picture, centre-cropped as `dpar tokenize` does.

        Args:
            image: any size and mode; transparency becomes white.
            threshold: τ in nats; None uses that of the training data, as for the other two.
            max_length: P, most tokens in a patch; 0 for no limit.
            row_reset: whether each row of the grid starts a patch.

        Raises:
            ModelError: the pipeline has no entropy model, its grid is not square, the rule does not take these values,
                or the picture's mode has no defined range.
        """
        codes = self._encode(image)
        entropy = self._entropy(codes, 1)[0].cpu().numpy()
        rule = self.rule_at(threshold, max_length, row_reset) or PatchRule()
        return PatchedImage(
            codes=codes[0].cpu().numpy().reshape(self.grid),
            entropies=entropy.reshape(self.grid),
            starts=rule.starts(entropy, self.grid[1]).reshape(self.grid),
            reconstruction=self.decode(codes, 1)[0],
        )

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, batch: int = 32) -> list[Image.Image]:
        """Return the pictures of codes (n, N) int64."""
        parts = [to_uint8(self.tokenizer.decode(chunk, self.grid)) for chunk in codes.to(self.device).split(batch)]
        return [Image.fromarray(pixels) for pixels in torch.cat(parts).cpu().numpy()]

    def label(self, item: Label) -> int:
        """Return the label of a class, given by name or number.

        Raises:
            ModelError: the class is unknown; the message suggests the nearest name.
        """
        if isinstance(item, str):
            label = find_class(item, self.class_names)
            if label is None:
                raise ModelError(f"no class {item!r}; {nearest_class(item, self.class_names)}")
            return label
        if not 0 <= item < len(self.class_names):
            raise ModelError(f"no class {item}; they are 0 to {len(self.class_names) - 1}")
        return int(item)

    def rule_at(
        self, threshold: float | None = None, max_length: int | None = None, row_reset: bool | None = None
    ) -> PatchRule | None:
        """Return the patch rule with the given values replaced; a ``max_length`` of 0 means no limit.

        Raises:
            ModelError: the rule does not take these values: it is static, or the generator is a LlamaGen.
        """
        if threshold is None and max_length is None and row_reset is None:
            return self.rule
        if self.rule is None or self.rule.strategy == "static":
            raise ModelError("this pipeline does not patch by entropy; threshold, max_length and row_reset are unused")
        return dataclasses.replace(
            self.rule,
            threshold=self.rule.threshold if threshold is None else threshold,
            max_length=self.rule.max_length if max_length is None else max_length or None,
            row_reset=self.rule.row_reset if row_reset is None else row_reset,
        )

    def _crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the square centre of a picture at the tokenizer's size: (H, W, 3) uint8."""
        if self.grid[0] != self.grid[1]:
            raise ModelError(f"the grid has {self.grid[0]}×{self.grid[1]} tokens; pictures need a square one")
        return center_crop([to_rgb(image)], self.grid[0] * self.tokenizer.config.downsampling)

    @torch.no_grad()
    def _encode(self, image: Image.Image) -> torch.Tensor:
        """Return the codes of a picture: (1, N) int64."""
        pixels = torch.from_numpy(self._crop(image).copy()).to(self.device)
        return self.tokenizer.encode(from_uint8(pixels).unsqueeze(0))

    def _kept(
        self, count: int, image: Image.Image | None, mask: Image.Image | None, keep_rows: int | None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Return codes of a picture (count, N) and which to keep, (count, N) bool; None without a picture."""
        rows, columns = self.grid
        if image is None:
            if mask is not None or keep_rows is not None:
                raise ModelError("mask and keep_rows need an image")
            return None, None
        if (mask is None) == (keep_rows is None):
            raise ModelError("an image needs either mask or keep_rows, to say which part is kept")
        if mask is not None:
            if mask.size != image.size:
                raise ModelError(
                    f"the mask is {mask.width}×{mask.height} pixels, the image {image.width}×{image.height}; "
                    "both must have the same size"
                )
            keep = kept_tokens(self._crop(mask), self.grid)
            nothing = "the mask has no white pixel in the part of the image that is used, a square at its centre"
        else:
            if not 0 <= (keep_rows or 0) <= rows:
                raise ModelError(f"keep_rows is {keep_rows}; the image has {rows} rows of tokens")
            keep = np.repeat(np.arange(rows) < (keep_rows or 0), columns)
            nothing = f"keep_rows {keep_rows} keeps all {rows} rows of tokens"
        if keep.all():
            raise ModelError(f"there is nothing to sample: {nothing}")
        return self._encode(image).expand(count, -1), torch.from_numpy(keep).expand(count, -1)

    @torch.no_grad()
    def _entropy(self, codes: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the entropies of codes (n, N): (n, N) float16, nats."""
        if self.entropy_model is None:
            raise ModelError("this pipeline has no entropy model, which entropies need")
        return torch.cat([self.entropy_model.entropy(chunk) for chunk in codes.split(batch)])


def _as_list(classes: Label | Sequence[Label]) -> list[Label]:
    return [classes] if isinstance(classes, (str, int, np.integer)) else list(classes)

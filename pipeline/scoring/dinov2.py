"""Features of DINOv2 (Oquab et al., 2023), for FD-DINOv2 (Stein et al., 2023), from a file of its published weights.

    extract = DinoFeatures(Path("dinov2_vitl14_pretrain.pth"), device)
    features = extract(pixels)["pool"]                       # (n, 1024) of (n, H, W, 3) uint8: the class token

As in Stein et al.'s `dgm-eval`: ViT-L/14, images resized to 224 px (bicubic, antialiased) and normalised by ImageNet's
mean and standard deviation. Files of ViT-S, -B and -g are accepted too; scores record the size. torch-fidelity loads
DINOv2 only from `torch.hub`, not from a local file, so the network is timm's, which has the same modules. Its position
embeddings are interpolated here as in DINOv2's own code, which differs from timm's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.runtime.errors import StageError
from pipeline.scoring.features import Features, resize
from pipeline.settings.fields import Network
from shards.files import file_sha256

SIDE, PATCH = 224, 14  # px
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0 to 1
SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by width
OFFSET = 0.1  # patches; DINOv2's code adds it to the new grid before interpolating


class DinoFeatures:
    """DINOv2's class token after the last normalisation."""

    name: Network = "dinov2"
    resize = "to 224 px (bicubic, antialiased)"

    def __init__(self, weights: Path, device: torch.device, batch: int = 32) -> None:
        """Load the network onto a device.

        Args:
            weights: `dinov2_vitl14_pretrain.pth`, or the file of another size, as Meta publishes them.
            device: to compute on.
            batch: images at once.

        Raises:
            StageError: timm is not installed, or the file holds something else.
        """
        model, size = load_dino(weights)
        self.network, self.dimension = f"DINOv2 ViT-{size}/14", model.num_features
        self.weights = file_sha256(weights)
        self._model, self._device, self._batch = model.to(device), device, batch
        self._mean, self._deviation = (torch.tensor(x, device=device)[:, None, None] for x in (MEAN, DEVIATION))

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """See :class:`pipeline.scoring.features.Extractor`."""
        tokens = []
        for begin in range(0, len(pixels), self._batch):
            part = torch.from_numpy(resize(np.ascontiguousarray(pixels[begin : begin + self._batch]), SIDE))
            images = part.to(self._device).movedim(-1, 1).float() / 255  # (b, 3, 224, 224)
            tokens.append(self._model((images - self._mean) / self._deviation).cpu().numpy())
        return {"pool": np.concatenate(tokens)}

    def side(self, side: int) -> int:
        """See :class:`pipeline.scoring.features.Extractor`; this network resizes images itself."""
        return side


def load_dino(weights: Path) -> tuple[Any, str]:
    """Return DINOv2 in evaluation mode on the CPU, for images of 224 px, and its size: small, base, large or giant.

    Raises:
        StageError: timm is not installed, or the file holds something else.
    """
    try:
        from timm import create_model
        from timm.models.vision_transformer import checkpoint_filter_fn
    except ImportError as error:
        raise StageError("--dinov2-weights needs timm: pip install 'dpar[eval]'") from error
    try:
        tensors: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        size = SIZES[tensors["cls_token"].shape[-1]]
        if "register_tokens" in tensors:
            raise ValueError("it has registers; FD-DINOv2 is defined on the networks without")
        model: Any = create_model(f"vit_{size}_patch14_dinov2", img_size=SIDE, num_classes=0)
        tensors = {**tensors, "pos_embed": interpolated(tensors["pos_embed"], SIDE // PATCH)}
        model.load_state_dict(checkpoint_filter_fn(tensors, model))
    except Exception as error:  # any contents of the file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StageError(
            f"--dinov2-weights {weights} cannot be used: {reason}. Name a file as Meta publishes it, "
            "dinov2_vitl14_pretrain.pth"
        ) from error
    return model.eval().requires_grad_(False), size


def interpolated(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate position embeddings (1, 1 + n², d) to ``side`` × ``side`` patches, as DINOv2's own code does."""
    first, grid = positions[:, :1].float(), positions[:, 1:].float()
    n = math.isqrt(grid.shape[1])
    if n == side:
        return positions
    scale = (side + OFFSET) / n
    maps = grid.unflatten(1, (n, n)).movedim(-1, 1)  # (1, d, n, n)
    maps = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, maps.movedim(1, -1).flatten(1, 2)], dim=1)

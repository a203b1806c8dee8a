"""Features of images, and what two sets of them score: FID and its kin on Inception, or on the tokenizer's encoder.

    extract = InceptionFeatures(weights, device)             # torch-fidelity; the only ones whose distance is FID
    extract = TokenizerFeatures(tokenizer, fingerprint)
    features = extract(pixels)                               # {"pool": (n, d), …} of (n, H, W, 3) uint8
    distance = frechet_distance(Statistics.of(samples["pool"]), Statistics.of(reference["pool"]))

The scores are those of ADM's suite as torch-fidelity computes them: FID, precision and recall on Inception's 2048 pool
features, the Inception Score on its logits without biases. torch-fidelity differs from ADM's suite in three small
ways: its Inception is a port of the TensorFlow graph; it shuffles images (seeded) before it splits them for the
Inception Score; its distances for precision and recall are float32, where ADM's are partly float16.

sFID (Nash et al., 2021) is the Fréchet distance on spatial features, which torch-fidelity does not return. ADM's suite
(`evaluations/evaluator.py` of openai/guided-diffusion) takes the first 7 channels of the TensorFlow graph's
`mixed_6/conv`, 17×17 positions each. torch-fidelity calls that layer `Mixed_6d.branch1x1`; a forward hook reads it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.runtime.errors import StageError
from pipeline.settings.fields import Network
from shards.files import file_sha256

NEIGHBOURS = 3  # of precision and recall
NEIGHBOURHOOD_ROWS = 10_000  # compared at once
SPLITS = 10  # of the Inception Score
SCORED_SIDE = 256  # px; larger images are brought down to it for Inception, as the paper does

SPATIAL_CHANNELS = 7  # of Inception's `Mixed_6d.branch1x1`, for sFID
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17

# "pool" (n, d); Inception's have "logits" (n, 1008) and "spatial" (n, 2023) too
Features = dict[str, NDArray[np.float32]]


class Extractor(Protocol):
    """Images to features."""

    name: Network
    network: str  # what it is, for people
    resize: str  # what is done to images before the network sees them, for people
    dimension: int  # of "pool"
    weights: str  # fingerprint, or name, of what computes them

    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """Features of (n, H, W, 3) images."""

    def side(self, side: int) -> int:
        """The size in pixels at which square images of this size are looked at."""


class InceptionFeatures:
    """Inception's pool features and logits, as torch-fidelity computes them."""

    name: Network = "inception"
    network = "Inception-v3 of 2015-12-05 (torch-fidelity)"
    resize = "above 256 px to 256 (bicubic; samples not antialiased), to 299 px (bilinear as in TensorFlow 1)"
    dimension = 2048

    def __init__(self, weights: Path | None, device: torch.device, batch: int = 32) -> None:
        """Loads torch-fidelity's Inception.

        Args:
            weights: a file with its weights; None lets torch-fidelity fetch them.
            device: to compute on.
            batch: images at once.

        Raises:
            StageError: torch-fidelity is not installed, or the weights are unavailable or are something else.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise StageError("--features inception needs torch-fidelity: pip install 'dpar[eval]'") from error
        if weights is not None and not weights.is_file():
            raise StageError(f"Inception's weights are unavailable in {weights}: there is no such file")
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = None
                if weights is not None:
                    # torch-fidelity unpickles its file without restraint, so it gets a copy of the tensors alone.
                    path = str(Path(folder) / "inception.pth")
                    torch.save(torch.load(weights, map_location="cpu", weights_only=True), path)
                layers = ["2048", "logits_unbiased"]
                model = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=path)
        except Exception as error:  # whatever the file or the network holds; torch-fidelity has no error of its own
            where = (
                f"in {weights}" if weights is not None else "on the network; give them with --inception-weights FILE"
            )
            raise StageError(f"Inception's weights are unavailable {where}: {str(error).splitlines()[0]}") from error
        self.weights = "torch-fidelity's" if weights is None else file_sha256(weights)
        self._model, self._device, self._batch = model.to(device), device, batch
        self._spatial: torch.Tensor | None = None  # of the last forward pass
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._see_spatial)

    def _see_spatial(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]  # (b, 7, 17, 17)

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """See :class:`Extractor`."""
        pool, logits, spatial = [], [], []
        for begin in range(0, len(pixels), self._batch):
            images = torch.from_numpy(np.ascontiguousarray(pixels[begin : begin + self._batch])).movedim(-1, 1)
            outputs = self._model(images.to(self._device))
            pool.append(outputs[0].cpu().numpy())
            logits.append(outputs[1].cpu().numpy())
            assert self._spatial is not None  # the hook has run
            spatial.append(self._spatial.movedim(1, -1).flatten(1).cpu().numpy())  # channels last, as in stored mu_s
        return {name: np.concatenate(of) for name, of in (("pool", pool), ("logits", logits), ("spatial", spatial))}

    def side(self, side: int) -> int:
        """See :class:`Extractor`."""
        return min(side, SCORED_SIDE)


class TokenizerFeatures:
    """Mean and standard deviation over positions of the tokenizer's encoder outputs.

    Distances on them compare only among themselves, and are not FID.
    """

    name: Network = "tokenizer"
    network = "the tokenizer's encoder, mean and deviation over positions"
    resize = "none"

    def __init__(self, tokenizer: VQTokenizer, fingerprint: str, batch: int = 32) -> None:
        """Takes a tokenizer on its device, and the fingerprint of its weights."""
        self.weights, self._tokenizer, self._batch = fingerprint, tokenizer, batch
        self.dimension = 2 * tokenizer.config.latent_channels

    @torch.no_grad()
    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """See :class:`Extractor`."""
        device = self._tokenizer.quantize.embedding.weight.device
        pooled = []
        for begin in range(0, len(pixels), self._batch):
            part = torch.from_numpy(np.ascontiguousarray(pixels[begin : begin + self._batch]))
            maps = self._tokenizer.encoder(from_uint8(part.to(device))).flatten(2).double()
            pooled.append(torch.cat([maps.mean(dim=2), maps.std(dim=2)], dim=1).float().cpu().numpy())
        return {"pool": np.concatenate(pooled)}

    def side(self, side: int) -> int:
        """See :class:`Extractor`."""
        return side


@dataclass(frozen=True)
class Statistics:
    """The Gaussian that is fitted to a set of features."""

    mu: NDArray[np.floating]  # (d,)
    sigma: NDArray[np.floating]  # (d, d)
    images: int | None  # None if their file does not say

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Of features (n, d), n at least 2."""
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Fréchet distance between two Gaussians: Heusel et al., 2017.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½); the trace of the root is the sum of the roots of the eigenvalues.

    Raises:
        StageError: it is not finite.
    """
    move = a.mu.astype(np.float64) - b.mu.astype(np.float64)
    product = a.sigma @ b.sigma
    if not np.isfinite(product).all():
        raise StageError("the distance cannot be computed: features, or their covariances, are not finite")
    roots = np.sqrt(np.linalg.eigvals(product).astype(np.complex128)).real.sum()
    distance = float(move @ move + np.trace(a.sigma) + np.trace(b.sigma) - 2 * roots)
    if not np.isfinite(distance):
        raise StageError("the distance cannot be computed: features are not finite, or too large")
    return distance


def inception_score(logits: NDArray[np.float32]) -> tuple[float, float] | None:
    """Mean and standard deviation of the Inception Score over 10 splits of (n, 1008) logits; None for fewer images."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < SPLITS:
        return None
    scores = isc_features_to_metric(torch.from_numpy(logits), splits=SPLITS)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float, float] | None:
    """Precision and recall (Kynkäänniemi et al., 2019) of features (n, d) and (m, d), with 3 neighbours.

    None if there are too few images, or torch-fidelity (extra ``eval``) is not installed.
    """
    try:
        from torch_fidelity.metric_prc import calculate_precision_recall_part
    except ImportError:
        return None
    if min(len(samples), len(reference)) <= NEIGHBOURS:
        return None
    pair = (torch.from_numpy(samples), torch.from_numpy(reference))
    precision, recall = calculate_precision_recall_part(*pair, NEIGHBOURS, NEIGHBOURHOOD_ROWS)
    return precision, recall


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, H, W, 3) to (n, size, size, 3), bicubic with antialiasing: how a reference larger than that is looked at."""
    if pixels.shape[1:3] == (size, size):
        return pixels
    images = torch.from_numpy(pixels).movedim(-1, 1).float()
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()

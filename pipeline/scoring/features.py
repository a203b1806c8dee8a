"""Image features and the scores computed from them: FID and related scores, on Inception or the tokenizer's encoder.

    extract = InceptionFeatures(weights, device)             # torch-fidelity; only their distance is FID
    extract = TokenizerFeatures(tokenizer, fingerprint)
    features = extract(pixels)                               # {"pool": (n, d), …} of (n, H, W, 3) uint8
    distance = frechet_distance(Statistics.of(samples["pool"]), Statistics.of(reference["pool"]))

The scores are those of ADM's suite as torch-fidelity computes them: FID, precision and recall on Inception's 2048 pool
features, the Inception Score on its logits without biases. torch-fidelity differs from ADM's suite in three small
ways: its Inception is a port of the TensorFlow graph; it shuffles images (seeded) before splitting them for the
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
NEIGHBOURHOOD_ROWS = 10_000  # rows compared at once
SPLITS = 10  # of the Inception Score
SCORED_SIDE = 256  # px; larger images are downscaled to it for Inception, as in the paper

SPATIAL_CHANNELS = 7  # of Inception's `Mixed_6d.branch1x1`, for sFID
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17

# "pool" (n, d); for Inception also "logits" (n, 1008) and "spatial" (n, 2023)
Features = dict[str, NDArray[np.float32]]


class Extractor(Protocol):
    """Images to features."""

    name: Network
    network: str  # description of the network
    resize: str  # description of how images are resized for the network
    dimension: int  # of "pool"
    weights: str  # fingerprint or name of the network's weights

    def __call__(self, pixels: NDArray[np.uint8]) -> Features:
        """Return the features of (n, H, W, 3) uint8 images."""

    def side(self, side: int) -> int:
        """Return the size in pixels at which square images of ``side`` pixels are passed to the extractor."""


class InceptionFeatures:
    """Inception's pool features and logits, as torch-fidelity computes them."""

    name: Network = "inception"
    network = "Inception-v3 of 2015-12-05 (torch-fidelity)"
    resize = "above 256 px to 256 (bicubic; samples not antialiased), to 299 px (bilinear as in TensorFlow 1)"
    dimension = 2048

    def __init__(self, weights: Path | None, device: torch.device, batch: int = 32) -> None:
        """Load torch-fidelity's Inception.

        Args:
            weights: a file with its weights; None lets torch-fidelity download them.
            device: to compute on.
            batch: images at once.

        Raises:
            StageError: torch-fidelity is not installed, or the weights are unavailable or not Inception's.
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
                    # torch-fidelity unpickles any objects in its file, so it gets a copy with tensors only
                    path = str(Path(folder) / "inception.pth")
                    torch.save(torch.load(weights, map_location="cpu", weights_only=True), path)
                layers = ["2048", "logits_unbiased"]
                model = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=path)
        except Exception as error:  # torch-fidelity has no exception class of its own
            where = (
                f"in {weights}" if weights is not None else "on the network; give them with --inception-weights FILE"
            )
            raise StageError(f"Inception's weights are unavailable {where}: {str(error).splitlines()[0]}") from error
        self.weights = "torch-fidelity's" if weights is None else file_sha256(weights)
        self._model, self._device, self._batch = model.to(device), device, batch
        self._spatial: torch.Tensor | None = None  # of the last forward pass
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._record_spatial)

    def _record_spatial(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
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
        parts = (("pool", pool), ("logits", logits), ("spatial", spatial))
        return {name: np.concatenate(batches) for name, batches in parts}

    def side(self, side: int) -> int:
        """See :class:`Extractor`."""
        return min(side, SCORED_SIDE)


class TokenizerFeatures:
    """Mean and standard deviation over positions of the tokenizer's encoder outputs.

    Distances on them are not FID and compare only with each other.
    """

    name: Network = "tokenizer"
    network = "the tokenizer's encoder, mean and deviation over positions"
    resize = "none"

    def __init__(self, tokenizer: VQTokenizer, fingerprint: str, batch: int = 32) -> None:
        """Take a tokenizer on its device, and the fingerprint of its weights."""
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
    """The Gaussian fitted to a set of features."""

    mu: NDArray[np.floating]  # (d,)
    sigma: NDArray[np.floating]  # (d, d)
    images: int | None  # None if unknown

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Fit features (n, d), n at least 2."""
        return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the Fréchet distance between two Gaussians (Heusel et al., 2017).

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
    """Return mean and deviation of the Inception Score over 10 splits of (n, 1008) logits; None for fewer images."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < SPLITS:
        return None
    scores = isc_features_to_metric(torch.from_numpy(logits), splits=SPLITS)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def precision_recall(samples: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float, float] | None:
    """Return precision and recall (Kynkäänniemi et al., 2019) of features (n, d) and (m, d), with 3 neighbours.

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
    """Resize (n, H, W, 3) to (n, size, size, 3), bicubic with antialiasing: for references of another size."""
    if pixels.shape[1:3] == (size, size):
        return pixels
    images = torch.from_numpy(pixels).movedim(-1, 1).float()
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()

"""Reconstruction quality of a tokenizer: PSNR, SSIM, and features of originals and reconstructions.

parts = reconstruct(generator, artifact, extract, out / "originals", engine, task, chunk=500, done=path.is_file)
parts.joined("psnr").mean(), frechet_distance(…)          # over the parts of all processes
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator as Indices
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.tokenizer import psnr
from pipeline.generation.generator import Generator
from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.work_sharing import Parts
from pipeline.scoring.features import Extractor, resize
from pipeline.scoring.reference import NEEDED
from pipeline.sources.originals import load_originals
from shards.reader import Artifact


def reconstruct(
    generator: Generator,
    artifact: Artifact,
    extract: Extractor,
    folder: Path,
    engine: Engine,
    task: Count,
    *,
    chunk: int,
    done: Callable[[], bool],
    fetch: bool = False,
) -> Parts:
    """Compare view 0 of every image of ``artifact`` with its original.

    Args:
        generator: its tokenizer decodes.
        artifact: codes or patches.
        extract: features.
        folder: for the parts, which other processes share.
        engine: computes them.
        task: counts images.
        chunk: images in memory at the same time.
        done: whether the parts are no longer needed.
        fetch: fetch originals over the network.

    Returns:
        Parts with ``psnr`` (n,) dB, ``ssim`` (n,), ``decoded`` (n, d), and features of the originals: ``pool`` (n, d)
        and, for Inception, ``spatial``.

    Raises:
        StageError: the originals are unavailable.
    """
    parts = Parts(folder, -(-len(artifact) // chunk), done)

    def work(indices: Indices[int, None, None], count: Count) -> None:
        for index in indices:
            rows = np.arange(index * chunk, min((index + 1) * chunk, len(artifact)))
            originals = load_originals(artifact.manifest, artifact.keys(rows), np.zeros_like(rows), fetch=fetch)
            codes = artifact.gather(rows, np.zeros_like(rows)).codes
            decoded = generator.decode(codes)
            side = extract.side(originals.shape[1])
            features = extract(resize(originals, side))
            parts.save(
                index,
                psnr=psnr(torch.from_numpy(decoded), torch.from_numpy(originals)).numpy(),
                ssim=ssim(decoded, originals),
                decoded=extract(decoded if side == decoded.shape[1] else generator.decode(codes, side))["pool"],
                **{name: features[name] for name in NEEDED if name in features},
            )
            count.advance(len(rows))

    engine.run(parts.pieces, work, task)
    return parts


def ssim(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the structural similarity per image of pixels (n, H, W, 3): (n,). Windows of 7 px, as in LlamaGen."""
    from skimage.metrics import structural_similarity

    pairs = zip(images, reference, strict=True)
    return np.array([structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in pairs])

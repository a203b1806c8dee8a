"""The training images nearest to samples, to recognise memorised ones.

nearest = find_nearest(codes, open_artifact(Path("patches")), tokenizer)
nearest.keys[0], nearest.distance[0]                         # the closest training image of sample 0

Images are compared token by token, by the codebook vectors at each place of the grid. All views of a training image
count. A copy has distance 0; an image shifted by one token is far from itself, so a large distance proves less than a
small one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.locations import RUN
from dpar.tokenizer import VQTokenizer
from pipeline.generation.generator import Generator, run_of
from pipeline.reports.pictures import enlarge, sheet
from pipeline.runs.run_folder import read_run
from pipeline.runtime.errors import StageError
from shards.reader import Artifact, open_artifact
from shards.storage import Location, location

CHUNK = 2048  # training images in memory at the same time
SHOWN = 16  # samples on a sheet
SIDE_PX = 128  # smallest side of a picture on a sheet


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The closest training image of each of n samples."""

    rows: NDArray[np.int64]  # (n,) of the training artifact
    keys: list[str]
    codes: NDArray[np.int64]  # (n, N), of the view that is closest
    distance: NDArray[np.float32]  # (n,) root mean square over tokens; codebook vectors have length 1, so 0 to 2


@torch.no_grad()
def find_nearest(codes: NDArray[np.integer], training: Artifact, tokenizer: VQTokenizer) -> Nearest:
    """Return the closest training image, over all views, of images given by their codes (n, N)."""
    vectors = tokenizer.quantize.vectors().float()  # (V, codebook_dim), of length 1

    def latents(of: NDArray[np.integer]) -> torch.Tensor:
        return vectors[torch.from_numpy(of.astype(np.int64)).to(vectors.device)].flatten(1)  # (n, N * codebook_dim)

    sampled, n_tokens = latents(codes), training.manifest.n_tokens
    best = torch.full((len(codes),), -torch.inf, device=vectors.device)
    row, view = (torch.zeros(len(codes), dtype=torch.long, device=vectors.device) for _ in range(2))
    for begin in range(0, len(training), CHUNK):
        rows = np.arange(begin, min(begin + CHUNK, len(training)))
        for v in range(training.manifest.views):
            batch = training.gather(rows, np.full_like(rows, v), entropy=False)
            similarity, where = (sampled @ latents(batch.codes).T).max(dim=1)
            closer = similarity > best
            best = torch.where(closer, similarity, best)
            row, view = torch.where(closer, where + begin, row), torch.where(closer, v, view)
    rows, views = row.cpu().numpy(), view.cpu().numpy()
    return Nearest(
        rows=rows,
        keys=training.keys(rows),
        codes=training.gather(rows, views, entropy=False).codes.astype(np.int64),
        distance=(2 - 2 * best / n_tokens).clamp(min=0).sqrt().cpu().numpy(),  # |a - b|² = 2 - 2ab of unit vectors
    )


def recorded_training(run: Path) -> Location | None:
    """Return the location of a run's training data; None for weights without a run."""
    home = run_of(run)
    if home is None or not (home / RUN).is_file():
        return None
    data = read_run(home)["inputs"].get("data")
    return None if data is None else location(data)


def open_training(folder: Location, generator: Generator, option: str) -> Artifact:
    """Open the artifact whose images are compared with samples; ``option`` is the CLI option for naming another.

    Raises:
        ArtifactError: it is not an artifact.
        StageError: its codes are of another tokenizer or grid than the generator's.
    """
    training = open_artifact(folder)
    expected, actual = generator.tokenizer_origin["fingerprint"], training.manifest.tokenizer["fingerprint"]
    if expected != actual or training.manifest.grid != generator.grid:
        own, other = ("×".join(map(str, grid)) for grid in (generator.grid, training.manifest.grid))
        raise StageError(
            f"{option} {folder} holds {other} codes of the tokenizer {actual[:12]}; the samples are {own} codes "
            f"of {expected[:12]}. Name the artifact that the model was trained on"
        )
    return training


def shown_rows(samples: int) -> NDArray[np.int64]:
    """Return the samples that a sheet shows, (n,) int64: at most SHOWN, evenly spread."""
    return np.unique(np.linspace(0, samples - 1, min(SHOWN, samples)).astype(np.int64))


def nearest_sheet(
    generator: Generator, codes: NDArray[np.integer], labels: NDArray[np.int64], nearest: Nearest
) -> Image.Image:
    """Return a sheet of samples above their closest training images, with distances; at most SHOWN, evenly spread."""
    chosen = shown_rows(len(codes))
    scale = max(1, round(SIDE_PX / generator.image_size[0]))
    rows = [
        [enlarge(image, scale) for image in generator.decode(of[chosen])] for of in (np.asarray(codes), nearest.codes)
    ]
    titles = [f"{generator.class_names[labels[i]]}\ndistance {nearest.distance[i]:.2f}" for i in chosen]
    return sheet(rows, row_titles=("sampled", "nearest in training"), column_titles=titles)

"""How well a tokenizer reconstructs the images that it encodes: PSNR of a sample, measured during ``dpar tokenize``.

    due = sampled_positions(index, n_shards=12, shard_size=4096, n_items=48_000)   # in shard ``index``
    statistics = merge_reconstruction(shards)                                      # of the manifest
    lines = reconstruction_lines(manifest)                                         # for the user

The sample depends only on the listing, so any number of processes measure the same images.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from shards.manifest import Manifest, ShardInfo

SAMPLE = 64  # most images to measure
POOR_PSNR = 20.0  # dB; below it shapes are lost, not only texture
SHARD_KEY = "reconstruction_psnr"  # in a shard's statistics


def sampled_positions(index: int, *, n_shards: int, shard_size: int, n_items: int | None) -> list[int]:
    """Return positions within shard ``index`` of the images to measure, spread evenly over the listing.

    For a stream (``n_items`` is None) they are the first images of evenly spread shards.
    """
    if n_items is None:
        return list(range(sum(i * n_shards // SAMPLE == index for i in range(SAMPLE))))
    first = index * shard_size
    spread = sorted({i * n_items // SAMPLE for i in range(SAMPLE)})
    return [position - first for position in spread if first <= position < first + shard_size]


def merge_reconstruction(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """Return the manifest's ``statistics``: ``reconstruction`` with ``images``, ``psnr`` (mean), ``lowest_psnr`` (dB).

    Empty if no image was measured.
    """
    values = [float(value) for shard in shards for value in shard.statistics.get(SHARD_KEY, ())]
    if not values:
        return {}
    mean = round(sum(values) / len(values), 2)
    return {"reconstruction": {"images": len(values), "psnr": mean, "lowest_psnr": min(values)}}


def reconstruction_lines(manifest: Manifest) -> list[str]:
    """Return lines about a codes artifact's reconstruction quality, with a warning and a remedy if it is poor."""
    measured = manifest.statistics.get("reconstruction")
    if measured is None:
        return []
    psnr, images = measured["psnr"], measured["images"]
    count = "1 image" if images == 1 else f"{images} images"
    lines = [f"reconstruction: {psnr:.1f} dB PSNR, mean of {count}, lowest {measured['lowest_psnr']:.1f}"]
    if psnr < POOR_PSNR:
        lines.append(
            f"Warning: the tokenizer reconstructs these images poorly ({psnr:.1f} dB; a good one reaches "
            f"{POOR_PSNR:.0f} dB and more), and no model trained on the codes can draw better. Train a tokenizer on "
            f"these images, or train it longer, and name it with --tokenizer vq:\n  {_remedy(manifest.settings)}"
        )
    return lines


def _remedy(settings: dict[str, Any]) -> str:
    words = ["dpar", "train-tokenizer", settings["data"], "vq", "--image-size", str(settings["image_size"])]
    words += ["--split", settings["split"]] if settings["split"] else []
    for name in settings["classes"]:
        words += ["--classes", name]
    return shlex.join(words)

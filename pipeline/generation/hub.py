"""Uploading weights to the Hugging Face Hub.

address = push(Path("bundle"), "you/dpar-emoji")
"""

from __future__ import annotations

from pathlib import Path

from dpar.bundle import BUNDLE, PARTS
from dpar.locations import CARD, CONFIG, WEIGHTS
from pipeline.runtime.errors import StageError

SAMPLES = "samples.webp"  # the pictures of a bundle's model card
MODEL = (CONFIG, WEIGHTS, CARD)
UPLOADED = [*MODEL, BUNDLE, SAMPLES, *(f"{part}/{file}" for part in PARTS for file in MODEL)]


def push(folder: Path, repo: str) -> str:
    """Upload a model directory or a bundle to a repository on the Hugging Face Hub, made if it is not there.

    Returns:
        The repository's address.

    Raises:
        StageError: the Hub cannot be reached, or does not take it: no login, no permission, a name it refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=UPLOADED)
    except Exception as error:  # its transport's exceptions have no class in common
        first_line = next(iter(str(error).splitlines()), "")
        raise StageError(
            f"{folder} is written, but {repo} on the Hub did not take it ({type(error).__name__}: {first_line}). "
            "`hf auth login` gives this machine a token; run the same command again to push"
        ) from error
    return str(address)

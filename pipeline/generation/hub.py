"""Upload weights to the Hugging Face Hub.

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
    """Upload a model directory or a bundle to a repository on the Hugging Face Hub, created if missing.

    Returns:
        The repository's address.

    Raises:
        StageError: the Hub cannot be reached, or refuses: no login, no permission, an invalid name.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=UPLOADED)
    except Exception as error:  # transport errors have no common base class
        first_line = next(iter(str(error).splitlines()), "")
        raise StageError(
            f"{folder} is written, but the upload to {repo} failed ({type(error).__name__}: {first_line}). "
            "Log in with `hf auth login` and run the same command again to push"
        ) from error
    return str(address)

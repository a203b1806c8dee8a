"""Editing an image: the tokens that are kept, and those that are sampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.errors import StageError
from shards.errors import ArtifactError
from tests.pipeline.sample_runs import codes_of, held, run, save_runs, write_image
from tests.pipeline.sampled import SIDE, SIZE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("model", ["dpar", "static", "llama"])
def test_kept_rows_are_unchanged_and_the_rest_is_sampled(home: Path, tmp_path: Path, model: str) -> None:
    image = write_image(tmp_path / "image.png", (13, 9))
    edit: dict[str, Any] = {"image": image, "keep_rows": 2, "classes": ("fish",), "per_class": 3}
    run(home, tmp_path / "out", model, **edit)
    codes = held(tmp_path / "out")["codes"]
    np.testing.assert_array_equal(
        codes[:, : 2 * SIDE], np.broadcast_to(codes_of(home, image)[: 2 * SIDE], (3, 2 * SIDE))
    )
    assert len(np.unique(codes[:, 2 * SIDE :], axis=0)) == 3
    assert Image.open(tmp_path / "out" / "sheet.png").width > 3 * 128
    with pytest.raises(ArtifactError, match="known was"):
        run(home, tmp_path / "out", model, **{**edit, "keep_rows": 1})


def test_a_token_with_any_masked_pixel_is_sampled_and_no_other(home: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[3, 5] = 255  # one pixel of token (1, 2)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(home, tmp_path / "out", image=image, mask=tmp_path / "mask.png", classes=("0",), per_class=16)
    changed = (held(tmp_path / "out")["codes"] != codes_of(home, image)).any(axis=0)
    assert np.flatnonzero(changed).tolist() == [SIDE + 2]


def test_invalid_edits_are_refused_before_sampling(home: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "image.png", (13, 9))
    other = write_image(tmp_path / "other.png", (9, 13))
    black = tmp_path / "black.png"
    Image.new("L", (13, 9)).save(black)
    fish: dict[str, Any] = {"image": image, "classes": ("fish",)}
    for more, says in (
        ({"mask": other}, "9×13 pixels, the image .* 13×9; both must have the same size"),
        ({"mask": black}, "nothing to sample: .*no white pixel"),
        ({"keep_rows": SIDE}, "keeps all 4 rows"),
        ({"mask": tmp_path / "gone.png"}, "there is no image .*gone.png"),
    ):
        with pytest.raises(StageError, match=says):
            run(home, tmp_path / "out", **fish, **more)
    assert not (tmp_path / "out").exists()

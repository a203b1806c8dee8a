"""The names of ImageNet's classes."""

import re
from pathlib import Path

import pytest

from pipeline.runtime.errors import StageError
from pipeline.sources import open_indexed
from pipeline.sources.imagenet import synsets
from tests.pipeline.sources.listed import save


def test_imagenets_ids_get_their_readable_names_and_any_unambiguous_part_names_a_class(tmp_path: Path) -> None:
    for name in ["n02099601", "n02012849", "n03126707"]:
        save(tmp_path / name / "1.png")
    names = ("n02012849 crane", "n02099601 golden retriever", "n03126707 crane")
    assert open_indexed(str(tmp_path)).class_names == names
    for asked in ["n02099601", "golden retriever", "n02099601 golden retriever"]:
        assert open_indexed(str(tmp_path), classes=[asked]).class_names == names[1:2]
    with pytest.raises(StageError, match="'crane' is the name of 2 classes; choose from: n02012849 crane, n03126707"):
        open_indexed(str(tmp_path), classes=["crane"])
    with pytest.raises(StageError, match="did you mean 'golden retriever'"):
        open_indexed(str(tmp_path), classes=["golden retreiver"])


def test_one_folder_that_is_not_an_imagenet_class_keeps_all_names(tmp_path: Path) -> None:
    for name in ["n02099601", "n99999999"]:
        save(tmp_path / name / "1.png")
    assert open_indexed(str(tmp_path)).class_names == ("n02099601", "n99999999")


def test_the_names_of_imagenets_classes_are_a_thousand_in_the_order_of_their_ids() -> None:
    assert len(synsets()) == 1000
    assert list(synsets()) == sorted(synsets())
    assert all(re.fullmatch(r"n\d{8}", synset) and words.strip() for synset, words in synsets().items())

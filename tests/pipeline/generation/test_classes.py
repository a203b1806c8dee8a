"""Classes to sample, by their names or numbers."""

import pytest

from pipeline.generation.classes import choose_classes
from pipeline.runtime.errors import StageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "label"), [("n01440764 tench", 1), ("n01440764", 1), ("tench", 1), ("1", 1), ("crane", None)]
)
def test_a_class_is_named_by_wordnet_id_words_or_number(name: str, label: int | None) -> None:
    names = ("n01443537 goldfish", "n01440764 tench", "n02012849 crane", "n03126707 crane")
    if label is None:
        with pytest.raises(StageError, match="the name of 2 classes"):
            choose_classes(names, (name,))
    else:
        assert choose_classes(names, (name,)) == [label]

"""Fields of a model's config from the command line: ``--set width=128 --set rope=2d``.

preset(name, **parse_config_fields(name, ("width=128", "rope=2d")))
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from dpar.class_names import nearest
from dpar.presets import preset
from pipeline.runtime.errors import StageError

OF_THE_DATA = ("codebook_size", "grid_height", "grid_width", "classes", "start_token")


def parse_config_fields(model: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Return values of config fields, with the types that the preset's config class declares.

    Args:
        model: the preset's name.
        assignments: ``field=value``; the last one wins.

    Raises:
        StageError: no such field, a field that is set by the data or another option, or a value of the wrong type.
        ModelError: no such preset.
    """
    config_class = type(preset(model))
    hints = typing.get_type_hints(config_class)
    free = [f.name for f in dataclasses.fields(config_class) if f.name not in (*OF_THE_DATA, "dropout")]
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise StageError(f"--set {assignment} is not field=value, such as width=128")
        if name in OF_THE_DATA and name in hints:
            raise StageError(f"--set {assignment}: {name} follows from the data")
        if name == "dropout":
            raise StageError(f"--set {assignment}: use --dropout instead")
        if name not in free:
            raise StageError(f"--set {assignment}: {model} has no field {name!r}; {nearest(name, free)}")
        values[name] = _value(hints[name], text, assignment)
    return values


def _value(hint: Any, text: str, assignment: str) -> Any:
    """Parse ``text`` as a value of a field of this type.

    Raises:
        StageError: it is not such a value.
    """
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            raise StageError(f"--set {assignment}: it must be one of {', '.join(choices)}")
        return text
    kind = {int: "a whole number", float: "a number"}.get(hint)
    if kind is None:
        raise StageError(f"--set {assignment}: this field cannot be set from the command line")
    try:
        return hint(text)
    except ValueError as error:
        raise StageError(f"--set {assignment}: it must be {kind}") from error

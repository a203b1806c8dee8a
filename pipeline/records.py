"""Checked reading of the JSON records that the pipeline writes, into dataclasses.

    seal = parse(SealRecord, read_json(path))                # ValueError: steps is "ten", expected a whole number

A dataclass is the schema: its field names are the keys and its annotations the types. Keys that it does not have are
ignored, because a later version may write more. Callers add the file's name and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")

LARGEST_INTEGER = 2**63 - 1
LONGEST_VALUE = 60  # characters of a value in a message


def read_json(path: Path) -> Any:
    """Return the JSON value of a file.

    Raises:
        ValueError: it is not JSON, in one line; also for bytes that are not UTF-8.
        OSError: it cannot be read.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Return the JSON value of a text; raise ValueError, in one line, if it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except ValueError as error:
        raise ValueError("it has a number of more than 4300 digits") from error


def parse(record: type[Record], value: Any) -> Record:
    """Return ``value``, a JSON object, as an instance of the dataclass ``record``.

    Raises:
        ValueError: a key is missing or a value is of another type; the message names the key, the value and the type.
    """
    return typing.cast(Record, check(value, record))


def check(value: Any, kind: Any, name: str = "the record") -> Any:
    """Return a JSON value converted to the type ``kind``.

    Args:
        value: as ``json.loads`` returns it.
        kind: int, float, str, bool, None, Any, a Literal, a union, list, tuple or dict of these, or a dataclass.
            A float must be finite.
        name: the value's place in its record, for the message.

    Raises:
        ValueError: the value is of another type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _check_object(value, typing.cast("type[Any]", kind), name)
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, kind, parts, name)
    if origin is typing.Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif kind is float:
        if type(value) in (int, float) and abs(value) <= 1.7e308 and math.isfinite(value):
            return float(value)
    elif kind is int:
        if type(value) is int and abs(value) <= LARGEST_INTEGER:
            return value
    elif kind in (str, bool, type(None)):
        if type(value) is kind:
            return value
    elif origin is dict or kind is dict:
        if isinstance(value, dict):
            return {key: check(item, parts[1] if parts else Any, f"{name}.{key}") for key, item in value.items()}
    elif isinstance(value, list):
        if origin is list or parts[-1] is Ellipsis:
            items = [check(item, parts[0], f"{name}[{i}]") for i, item in enumerate(value)]
            return items if origin is list else tuple(items)
        if len(value) == len(parts):
            pairs = zip(value, parts, strict=True)
            return tuple(check(item, part, f"{name}[{i}]") for i, (item, part) in enumerate(pairs))
    raise ValueError(f"{name} is {_show(value)}, expected {_describe(kind)}")


def _check_object(value: Any, record: type[Any], name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_show(value)}, expected an object")
    hints = typing.get_type_hints(record)
    prefix = "" if name == "the record" else f"{name}."
    found = {}
    for field in dataclasses.fields(record):
        if field.name in value:
            found[field.name] = check(value[field.name], hints[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{field.name} is missing, expected {_describe(hints[field.name])}")
    return record(**found)


def _check_union(value: Any, kind: Any, parts: tuple[Any, ...], name: str) -> Any:
    others = [part for part in parts if part is not type(None)]
    if value is None and len(others) < len(parts):
        return None
    if len(others) == 1:  # its message names the part that is wrong
        return check(value, others[0], name)
    for part in others:
        try:
            return check(value, part, name)
        except ValueError:
            continue
    raise ValueError(f"{name} is {_show(value)}, expected {_describe(kind)}")


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if type(value) is int and abs(value) > LARGEST_INTEGER:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= LONGEST_VALUE else shown[: LONGEST_VALUE - 1] + "…"


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    if kind in names:
        return names[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(json.dumps(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin in (list, tuple):
        return "a list" if origin is list or parts[-1] is Ellipsis else f"a list of {len(parts)}"
    return "an object"

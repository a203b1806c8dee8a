"""Parse JSON files into dataclasses; an error is one sentence that names the file and the field.

    manifest = parse(Manifest, read_json(path), str(path))
    # ArtifactError: codes/manifest.json: field shards[3].rows is '12', expected an integer of at least 0

The types of the fields are the checks: ``int``, ``float``, ``str``, ``bool``, ``None``, ``X | Y``, ``Literal``,
``tuple``, ``list``, ``dict[str, X]``, ``Any`` and other dataclasses; ``Annotated[int, Range(1, 9)]`` bounds a number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from shards.errors import ArtifactError
from shards.storage import Location, read_bytes

T = TypeVar("T")

LARGEST = 2**63 - 1  # larger integers fail in numpy, Arrow and torch
SHOWN = 60  # characters of a bad value in a message


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a field."""

    low: int
    high: int = LARGEST


Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]


def read_json(path: Location) -> Any:
    """Return the JSON value in a file.

    Raises:
        ArtifactError: the file cannot be read, or is not JSON that this package could have written.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """Return the JSON value in ``data``, which is the file or line ``where``.

    Raises:
        ArtifactError: it is not JSON that this package could have written.
    """
    try:
        values = json.loads(data.decode("utf-8"), parse_int=_integer)
        json.dumps(values, ensure_ascii=False).encode()  # JSON can spell lone surrogates, which UTF-8 cannot
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: it is not valid JSON ({error})") from error
    return values


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > LARGEST:
        raise ValueError(f"the number {text[:20]}… has more than 64 bits")
    return number


def parse(kind: type[T], value: Any, where: str, *, at: str = "", ignore_unknown: bool = False) -> T:
    """Return a JSON value as an instance of a dataclass.

    Args:
        kind: the dataclass.
        value: from `json.loads`.
        where: the file, for messages.
        at: the field that contains the value, if it is not the entire file.
        ignore_unknown: ignore fields that the dataclass lacks, at every level.

    Raises:
        ArtifactError: a field is missing, unknown, of another type or out of its range.
    """
    parsed: T = _Parser(where, ignore_unknown).record(kind, value, at)
    return parsed


@functools.cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


class _Parser:
    def __init__(self, where: str, ignore_unknown: bool) -> None:
        self.where, self.ignore_unknown = where, ignore_unknown

    def record(self, kind: Any, value: Any, at: str) -> Any:
        if not isinstance(value, Mapping):
            raise self.wrong(at, value, kind)
        hints, prefix = _types(kind), f"{at}." if at else ""
        given = {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                given[field.name] = self.value(hints[field.name], value[field.name], prefix + field.name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ArtifactError(
                    f"{self.where}: field {prefix}{field.name} is missing, expected {described(hints[field.name])}"
                )
        unknown = [] if self.ignore_unknown else sorted(map(str, value.keys() - hints.keys()))
        if unknown:
            raise ArtifactError(
                f"{self.where}: field {_shown(prefix + unknown[0])} is unknown, expected only {', '.join(hints)}"
            )
        return kind(**given)

    def value(self, kind: Any, value: Any, at: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if origin is Annotated:
            limits = next(note for note in arguments[1:] if isinstance(note, Range))
            if not _same_type(arguments[0], value) or not limits.low <= value <= limits.high:
                raise self.wrong(at, value, kind)
            return self.value(arguments[0], value, at)
        if origin in (Union, types.UnionType):
            for choice in arguments:
                if _same_type(choice, value):
                    return self.value(choice, value, at)
            raise self.wrong(at, value, kind)
        if not _same_type(kind, value):
            raise self.wrong(at, value, kind)
        if dataclasses.is_dataclass(kind):
            return self.record(kind, value, at)
        if origin is tuple and arguments[-1:] != (...,):
            if len(value) != len(arguments):
                raise self.wrong(at, value, kind)
            return tuple(
                self.value(part, x, f"{at}[{i}]") for i, (part, x) in enumerate(zip(arguments, value, strict=True))
            )
        if origin in (tuple, list):
            return origin(self.value(arguments[0], x, f"{at}[{i}]") for i, x in enumerate(value))
        if origin is dict:
            return {key: self.value(arguments[1], x, f"{at}.{key}") for key, x in value.items()}
        return float(value) if kind is float else value

    def wrong(self, at: str, value: Any, kind: Any) -> ArtifactError:
        """Return the error for a value that is not of type ``kind``."""
        if not at:
            return ArtifactError(f"{self.where} is {_shown(value)}, expected {described(kind)}")
        return ArtifactError(f"{self.where}: field {at} is {_shown(value)}, expected {described(kind)}")


def _same_type(kind: Any, value: Any) -> bool:
    """Return whether a JSON value has the outer type of ``kind``."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _same_type(typing.get_args(kind)[0], value)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if origin in (tuple, list):
        return isinstance(value, list)
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if kind in (None, type(None)) else kind is Any or type(value) is kind


def described(kind: Any) -> str:
    """Return the name of a type for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = next(note for note in arguments[1:] if isinstance(note, Range))
        upper = "" if limits.high == LARGEST else f" and at most {limits.high}"
        return f"{described(arguments[0])} of at least {limits.low}{upper}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1:] != (...,):
        return f"a list of {len(arguments)}"
    if origin in (tuple, list):
        return "a list"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "an object"
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "any value")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the settings that differ, each with both values, in one line."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)

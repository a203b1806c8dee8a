from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from shards.errors import ArtifactError
from shards.records import Count, Range, parse, read_json


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: Count = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    kind: Literal["a", "b"]
    rate: float
    share: Annotated[float, Range(0, 1)] = 0.5
    seed: int | None = None
    parts: tuple[Part, ...] = ()
    sides: tuple[int, int] = (1, 1)
    names: list[str] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)
    anything: Any = None
    done: bool = False


GOOD: dict[str, Any] = {"kind": "a", "rate": 1}


def test_a_record_is_read_with_its_types() -> None:
    parsed = parse(
        Record, {**GOOD, "parts": [{"name": "x", "size": 3}], "sides": [2, 3], "counts": {"y": 4}, "seed": 7}, "r.json"
    )
    assert parsed == Record(kind="a", rate=1.0, parts=(Part(name="x", size=3),), sides=(2, 3), counts={"y": 4}, seed=7)
    assert isinstance(parsed.rate, float)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "c"}, "field kind is 'c', expected one of a, b"),
        ({"kind": ["a"]}, "field kind is ['a'], expected one of a, b"),
        ({"rate": "1"}, "field rate is '1', expected a finite number"),
        ({"rate": float("nan")}, "field rate is nan, expected a finite number"),
        ({"rate": True}, "field rate is True, expected a finite number"),
        ({"share": 1.5}, "field share is 1.5, expected a finite number of at least 0 and at most 1"),
        ({"seed": 1.0}, "field seed is 1.0, expected an integer or null"),
        ({"parts": [{"name": "x"}, {"size": 1}]}, "field parts[1].name is missing, expected text"),
        ({"parts": [{"name": "x", "size": -1}]}, "field parts[0].size is -1, expected an integer of at least 0"),
        ({"parts": [{"name": "x", "colour": 1}]}, "field 'parts[0].colour' is unknown, expected only name, size"),
        ({"parts": {}}, "field parts is {}, expected a list"),
        ({"sides": [1]}, "field sides is [1], expected a list of 2"),
        ({"names": [None]}, "field names[0] is null, expected text"),
        ({"counts": {"y": None}}, "field counts.y is null, expected an integer of at least 0"),
        ({"done": 0}, "field done is 0, expected true or false"),
    ],
)
def test_an_invalid_record_is_one_sentence_with_file_and_field(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError) as refusal:
        parse(Record, GOOD | values, "r.json")
    assert str(refusal.value) == f"r.json: {says}"


def test_a_long_or_unprintable_value_is_shown_short_and_escaped() -> None:
    with pytest.raises(ArtifactError) as refusal:
        parse(Record, {**GOOD, "rate": "\x1b[31m" + "x" * 10_000}, "r.json")
    assert len(str(refusal.value)) < 150
    assert str(refusal.value).isprintable()


def test_unknown_fields_can_be_ignored() -> None:
    assert parse(Part, {"name": "x", "colour": 1}, "r.json", ignore_unknown=True) == Part(name="x")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"1" * 30, b'{"a": -' + b"9" * 25 + b"}", b'"\\ud800"', b"[" * 10**5]
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"r\.json is damaged: it is not valid JSON"):
        read_json(tmp_path / "r.json")
    with pytest.raises(ArtifactError, match=r"missing\.json cannot be read: No such file"):
        read_json(tmp_path / "missing.json")

"""The list of inputs that were left out of an artifact."""

import ast
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.left_out import LEFT_OUT
from shards.manifest import LeftOut
from tests.shards.builds import make_manifest, opened, run, shard_rows


def test_what_was_left_out_is_listed_with_its_reason_in_order(tmp_path: Path) -> None:
    build = opened(tmp_path / "a", n_shards=3)
    build.add(2, shard_rows(2), left_out=[LeftOut(key="ü/z.jpg", reason="truncated")])
    build.add(0, shard_rows(0), left_out=[LeftOut(key="a.jpg", reason="empty file"), LeftOut(key="b", reason="gone")])
    assert not (tmp_path / "a" / LEFT_OUT).exists()
    build.add(1, shard_rows(1))
    manifest = build.finish(make_manifest)
    assert manifest is not None
    assert manifest.left_out == 3
    assert (tmp_path / "a" / LEFT_OUT).read_text(encoding="utf-8") == (
        "key\treason\na.jpg\tempty file\nb\tgone\nü/z.jpg\ttruncated\n"
    )
    assert run(tmp_path / "b") is not None
    build = opened(tmp_path / "c", n_shards=1)
    build.add(0, shard_rows(0))
    build.finish(make_manifest)
    assert not (tmp_path / "c" / LEFT_OUT).exists()


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=15, deadline=None)
def test_an_input_left_out_is_one_line_of_two_fields_for_any_name(key: str, reason: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        build = opened(Path(home) / "a", n_shards=1)
        build.add(0, shard_rows(0), left_out=[LeftOut(key=key, reason=reason)])
        build.finish(make_manifest)
        text = (Path(home) / "a" / LEFT_OUT).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) == 2
    fields = [
        re.sub(r"\\(x..|u....|.)", lambda found: ast.literal_eval(f'"{found[0]}"'), field)
        for field in lines[1].split("\t")
    ]
    assert fields == [key, reason]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\x1b[31mred", "a\tb\nc"])
def test_the_listing_of_inputs_left_out_has_no_formulas_and_no_escape_codes(tmp_path: Path, name: str) -> None:
    build = opened(tmp_path / "a", n_shards=1)
    build.add(0, shard_rows(0), left_out=[LeftOut(key=name, reason=name)])
    build.finish(make_manifest)
    _, line = (tmp_path / "a" / LEFT_OUT).read_text(encoding="utf-8").splitlines()
    key, reason = line.split("\t")
    assert key == reason
    assert key[0] not in "=+-@"
    assert key.isprintable()

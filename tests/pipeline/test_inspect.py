"""The numbers of `dpar inspect`: patches, codebook, entropy, classes and images."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpar.patching import patch_starts
from pipeline.reports.inspection import tables
from pipeline.scoring.survey import entropy_quantiles
from shards.manifest import Container
from tests.pipeline.inspections import GRID, MAX_LENGTH, N, V, build, inspected, look, save_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_numbers_of_patches_equal_a_plain_count(made: Path, tmp_path: Path, container: Container) -> None:
    artifact, rows = build(made, tmp_path / "a", container=container)
    found = look(artifact, threshold=(1.0,))
    assert rows.starts is not None
    assert rows.entropy is not None
    sequences = rows.starts.reshape(-1, N)
    lengths: dict[str, int] = {}
    for sequence in sequences:
        first = [i for i in range(N) if sequence[i]]
        for a, b in zip(first, [*first[1:], N], strict=True):
            lengths[str(b - a)] = lengths.get(str(b - a), 0) + 1
    patches = found["patches"]
    assert patches["lengths"] == dict(sorted(lengths.items()))
    assert patches["mean_length"] == pytest.approx(sequences.size / sequences.sum())
    assert patches["tokens_saved"] == pytest.approx(1 - sequences.sum() / sequences.size)
    by_class = [rows.starts[rows.labels == c].size / rows.starts[rows.labels == c].sum() for c in range(3)]
    assert patches["class_mean_length"]["min"] == pytest.approx(min(by_class))
    assert patches["class_mean_length"]["median"] == pytest.approx(np.median(by_class))
    assert patches["class_mean_length"]["max"] == pytest.approx(max(by_class))
    finer = patch_starts(rows.entropy, 1.0, MAX_LENGTH, GRID[1], True)
    assert found["thresholds"][0]["mean_length"] == pytest.approx(finer.size / finer.sum())
    assert found["entropy"]["mean"] == pytest.approx(rows.entropy[..., 1:].astype(np.float64).mean())
    json.dumps(found)


def test_both_containers_give_the_same_numbers(made: Path, tmp_path: Path) -> None:
    one = look(build(made, tmp_path / "a", container="arrow")[0])
    other = look(build(made, tmp_path / "b", container="webdataset")[0])
    for name in ("codebook", "entropy", "patches", "compressible"):
        assert one[name] == other[name]


def test_codebook_use_counts_the_codes_that_occur(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a", kind="codes")
    found = look(artifact)
    assert found["codebook"]["used"] == len(np.unique(rows.codes)) == V - 2
    assert found["codebook"]["share"] == (V - 2) / V
    p = np.bincount(rows.codes.ravel()) / rows.codes.size
    assert found["codebook"]["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["patches"] is None
    assert found["entropy"] is None


def test_the_most_compressible_class_and_image_have_the_fewest_patches(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a")
    found = look(artifact)["compressible"]
    assert rows.starts is not None
    patches = rows.starts.sum((1, 2)) / 2
    assert found["classes"]["most"][0]["class"] == "bird"
    assert found["images"]["most"][0]["patches_per_image"] == patches.min()
    assert found["images"]["least"][0]["key"] == rows.keys[11 - int(np.argmax(patches[::-1]))]
    named = [image["key"] for end in ("most", "least") for image in found["images"][end]]
    assert len(named) == len(set(named))


def test_entropy_quantiles_are_exact() -> None:
    values = np.random.default_rng(0).random(1001).astype(np.float16) * 9
    counts = np.bincount(np.append(values, [np.inf, np.nan]).astype(np.float16).view(np.uint16), minlength=2**16)
    expected = np.quantile(values.astype(np.float64), [0, 0.1, 0.5, 1], method="inverted_cdf")
    assert entropy_quantiles(counts, [0, 0.1, 0.5, 1]) == expected.tolist()


def test_static_patches_list_no_most_compressible_classes(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", strategy="static")
    found = inspected(artifact, tmp_path / "look", images=0)
    assert found.compressible is None
    assert not any("ompressible" in table.caption or "of a class" in table.caption for table in tables(found))
    assert "ompressible" not in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_tables_have_as_many_cells_in_a_row_as_in_the_header(made: Path, tmp_path: Path) -> None:
    for kind in ("codes", "patches"):
        inspection = inspected(build(made, tmp_path / kind, kind=kind)[0])
        for table in tables(inspection):
            assert {len(row) for row in table.rows} == {len(table.header)}
            assert all(isinstance(cell, str) for row in table.rows for cell in row)

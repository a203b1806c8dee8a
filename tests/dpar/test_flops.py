import pytest

from dpar import DPARConfig, ModelError, preset
from dpar.flops import PAPER_GMACS, PAPER_PARAMETERS, PAPER_PATCH_LENGTH, Cost, count, linear_macs
from pipeline.flops import HEADER, NOTES, CostRow, cost_table, markdown, tables
from pipeline.settings.models import FlopsSettings

HERE = {  # GMACs per image, the table of docs/method.md
    ("llamagen-b", 256): 24.96,
    ("llamagen-l", 256): 83.21,
    ("llamagen-xl", 256): 192.60,
    ("llamagen-b", 384): 56.17,
    ("llamagen-l", 384): 187.23,
    ("llamagen-xl", 384): 433.36,
    ("dpar-b", 256): 19.20,
    ("dpar-l", 256): 56.68,
    ("dpar-xl", 256): 125.24,
    ("dpar-b", 384): 40.89,
    ("dpar-l", 384): 117.87,
    ("dpar-xl", 384): 257.81,
}
PARAMETERS = {  # millions
    "dpar-b": 115.0,
    "dpar-l": 351.3,
    "dpar-xl": 789.5,
    "dpar-xxl": 1434.6,
    "llamagen-b": 110.9,
    "llamagen-l": 343.0,
    "llamagen-xl": 775.0,
    "llamagen-xxl": 1411.0,
}


def cost(name: str, resolution: int = 256) -> Cost:
    side = resolution // 16
    return count(preset(name, grid_height=side, grid_width=side), PAPER_PATCH_LENGTH[resolution])


@pytest.mark.parametrize(("name", "resolution"), list(HERE))
def test_linear_macs_equal_the_documentation_and_the_paper(name: str, resolution: int) -> None:
    gmacs = cost(name, resolution).linear / 1e9
    assert gmacs == pytest.approx(HERE[name, resolution], abs=0.006)
    assert gmacs == pytest.approx(PAPER_GMACS[name, resolution], rel=0.005)


def test_all_twelve_of_the_papers_figures_are_compared() -> None:
    assert set(PAPER_GMACS) == set(HERE)
    assert set(PAPER_PARAMETERS) == set(PARAMETERS)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_parameters_equal_the_documentation(name: str) -> None:
    assert cost(name).parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=0.005)


def block(d: int) -> int:
    hidden = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096}[d]
    return 4 * d * d + 3 * d * hidden


def test_macs_of_dpar_b_equal_a_formula_written_by_hand() -> None:
    n, m, d, v, layers = 256, 128, 768, 16384, (1, 8, 3)
    encoder = layers[0] * (n * block(d) + m * 2 * d * d + n * 2 * d * d)  # q and output of patches, k and v of tokens
    patches = layers[1] * m * block(d)
    decoder = layers[2] * (n * block(d) + m * d * d)  # the copy's projection acts on patches
    counted = count(preset("dpar-b"), 2.0)
    assert counted.patches == m
    assert counted.linear == encoder + patches + decoder + n * d * v
    assert counted.shared == encoder


def test_macs_of_llamagen_b_equal_a_formula_written_by_hand() -> None:
    n, d, v = 256, 768, 16384
    counted = count(preset("llamagen-b"))
    assert counted.linear == n * (12 * block(d) + d * v)
    assert counted.attention == 12 * 2 * n * n * d  # scores and weighted sum, in full squares
    assert (counted.patches, counted.shared) == (n, 0)


def test_parameters_of_dpar_b_equal_a_formula_written_by_hand() -> None:
    d, v, classes = 768, 16384, 1000
    norms = 12 * 2 * d + 2 * d + 3 * d + d  # of blocks, of the cross-attention, of the copies, before the head
    matrices = 12 * block(d) + 4 * d * d + 3 * d * d
    assert count(preset("dpar-b"), 2.0).parameters == 2 * v * d + (classes + 1) * d + d + norms + matrices


def test_dpar_b_has_as_many_parameters_as_the_authors_model() -> None:
    assert count(preset("dpar-b"), 1.81).parameters == 115_021_824


def test_an_entropy_model_without_a_start_token_costs_one_token_less() -> None:
    with_start = count(preset("llamagen-b", classes=0))
    without = count(preset("llamagen-b", classes=0, start_token=False))
    assert without.linear == with_start.linear * 255 / 256
    assert without.parameters == with_start.parameters - 768


def test_attention_over_patches_is_counted_without_skipping_masked_pairs() -> None:
    d, n = 768, 256
    assert count(preset("dpar-b"), 2.0).attention == 2 * d * (4 * n * n + 8 * 128 * 128)


@pytest.mark.parametrize(("size", "ratio"), [("b", 1.22), ("l", 0.81), ("xl", 0.70)])
def test_cost_of_sampling_with_the_papers_entropy_model_relative_to_llamagen(size: str, ratio: float) -> None:
    ours = cost(f"dpar-{size}").sampling(cost("llamagen-b"))
    assert ours / cost(f"llamagen-{size}").sampling() == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(("size", "ratio"), [("b", 1 / 1.35), ("l", 1 / 1.51)])
def test_cost_of_sampling_with_a_small_entropy_model_relative_to_llamagen(size: str, ratio: float) -> None:
    ours = cost(f"dpar-{size}").sampling(count(preset("llamagen-xs", classes=0)))
    assert ours / cost(f"llamagen-{size}").sampling() == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(("name", "millions"), [("llamagen-s", 25.0), ("llamagen-xs", 6.3)])
def test_number_of_parameters_of_small_entropy_models(name: str, millions: float) -> None:
    assert count(preset(name, classes=0)).parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_sizes_of_entropy_models_have_no_dpar() -> None:
    with pytest.raises(ModelError, match="no preset is called 'dpar-s'"):
        preset("dpar-s")


def test_sampling_runs_shared_parts_once_and_the_rest_twice_under_guidance() -> None:
    one = Cost(parameters=1, patches=1, linear=10.0, attention=0, shared=4.0)
    assert one.sampling() == 16
    assert one.sampling(guidance=False) == 10
    assert one.sampling(one) == 26
    assert one.training_flops == 60


@pytest.mark.parametrize("length", [1.0, 1.81, 2.06, 3.333])
def test_boundaries_have_the_requested_mean_length(length: float) -> None:
    config = DPARConfig(codebook_size=8, width=32, heads=2, patch_layers=1, decoder_layers=1)
    assert count(config, length).patches == pytest.approx(256 / length, abs=0.005)


@pytest.mark.parametrize("length", [0.9, 257.0, -1.0])
def test_an_impossible_patch_length_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=f"patch length is {length}; it must be from 1 to 256"):
        count(preset("dpar-tiny"), length)


def test_counting_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ModelError, match="Did you mean dpar-xxxl"):
        preset("dpar-xxxxl")
    with pytest.raises(ModelError, match="no preset is called 'llamagen-xxxl'"):
        preset("llamagen-xxxl")


@pytest.mark.parametrize("length", [1.0, 1.81, 2.5, 256.0])
def test_the_cost_at_any_mean_of_patches_is_interpolated_from_two_counts(length: float) -> None:
    config = DPARConfig(codebook_size=8, width=32, heads=2, patch_layers=2, decoder_layers=1)
    counted = count(config, length)
    assert linear_macs(config, counted.patches) == pytest.approx(counted.linear, rel=1e-9)
    assert linear_macs(preset("llamagen-tiny"), 141.4) == count(preset("llamagen-tiny")).linear


@pytest.fixture(scope="module")
def rows() -> list[CostRow]:
    return cost_table(FlopsSettings(model=("dpar-b", "llamagen-b"), image_size=(256, 384)))


def test_each_row_has_its_cost_of_sampling_and_its_differences_from_the_paper(rows: list[CostRow]) -> None:
    for row, resolution in zip(rows, (256, 256, 384, 384), strict=True):
        side = resolution // 16
        unconditional = preset("llamagen-b", classes=0, start_token=False, grid_height=side, grid_width=side)
        own, entropy_model = cost(row.model, resolution), count(unconditional)
        guided = own.sampling(entropy_model if row.model == "dpar-b" else None)
        assert row.sampling_gmacs == pytest.approx(guided / 1e9)
        assert row.gmacs_with_attention == pytest.approx((own.linear + own.attention) / 1e9)
        assert row.training_gflops == pytest.approx(6 * own.linear / 1e9)
        held = row.as_dict()
        assert held["gmacs_off"] == pytest.approx(own.linear / 1e9 / PAPER_GMACS[row.model, resolution] - 1)
        assert abs(held["gmacs_off"]) < 0.005
    assert rows[0].parameters_off == pytest.approx(115.0 / 120 - 1, abs=0.001)
    assert "120 M for DPAR-B are inconsistent" in NOTES


def test_the_table_is_narrow_enough_for_80_columns_and_the_full_one_has_every_column(rows: list[CostRow]) -> None:
    parts = tables(rows)
    assert [part.title[:6] for part in parts] == ["256 px", "384 px"]
    assert "141.4 patches per image for DPAR" in parts[0].title
    for part in parts:
        widths = [max(map(len, column)) for column in zip(part.header, *part.lines, strict=True)]
        assert sum(widths) + len(widths) + 1 <= 80
    assert [line.count("|") for line in markdown(rows).splitlines()] == [len(HEADER) + 1] * (2 + 4)


def test_another_patch_length_is_counted_without_comparison_to_the_paper() -> None:
    (row,) = cost_table(FlopsSettings(model=("dpar-tiny",), image_size=(256,), patch_length=2.5))
    assert row.patches == pytest.approx(102.4)
    assert (row.paper_gmacs, row.gmacs_off, row.paper_parameters) == (None, None, None)

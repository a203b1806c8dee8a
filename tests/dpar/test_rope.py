import math

import pytest
import torch

from dpar.rope import PatchPositions, PatchRope, patch_table, rotate, token_table, with_condition

HEAD_DIM = 32
FIRST, LAST = torch.tensor([0, 3, 7, 9]), torch.tensor([2, 6, 8, 14])


def turned(coordinate: int, pairs: int) -> list[tuple[float, float]]:
    angles = [coordinate * 10_000 ** (-k / pairs) for k in range(pairs)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def test_tokens_rotate_with_row_then_column() -> None:
    table = token_table(3, 5, HEAD_DIM)
    expected = [turned(i // 5, HEAD_DIM // 4) + turned(i % 5, HEAD_DIM // 4) for i in range(15)]
    torch.testing.assert_close(table, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["dynamic", "dynamic-compact", "2d"])
def test_patches_rotate_with_the_coordinates_of_their_kind(kind: PatchRope) -> None:
    expected = []
    for s, e in zip(FIRST.tolist(), LAST.tolist(), strict=True):
        expected.append(
            {
                "dynamic": turned(s // 5, 8)
                + turned(s % 5, 2)
                + turned(e % 5, 2)
                + turned(e % 5, 2)
                + turned(s % 5, 2),
                "dynamic-compact": turned(s // 5, 8) + turned(s % 5, 4) + turned(e % 5, 4),
                "2d": turned(s // 5, 8) + turned(s % 5, 8),
            }[kind]
        )
    torch.testing.assert_close(patch_table(FIRST, LAST, 5, HEAD_DIM, kind), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["dynamic", "dynamic-compact", "2d"])
def test_looked_up_positions_of_patches_equal_computed_ones(kind: PatchRope) -> None:
    first, last = torch.tensor([(a, b) for a in range(15) for b in range(a, 15)]).T
    found = PatchPositions(15, 5, 16, kind, "cpu").of(first, last)
    torch.testing.assert_close(found, patch_table(first, last, 5, 16, kind), atol=1e-6, rtol=0)


def test_the_condition_is_rotated_to_zero() -> None:
    table = with_condition(token_table(2, 2, HEAD_DIM))
    assert table.shape == (5, HEAD_DIM // 2, 2)
    x = torch.randn(5, 3, HEAD_DIM)
    assert rotate(x, table)[0].abs().max() == 0
    assert torch.equal(table[1:], token_table(2, 2, HEAD_DIM))


def test_rotation_multiplies_interleaved_pairs_as_complex_numbers() -> None:
    x, table = torch.randn(2, 15, 3, HEAD_DIM), token_table(3, 5, HEAD_DIM)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(table).unsqueeze(1)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(expected).flatten(-2))


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = torch.randn(15, 3, HEAD_DIM)
    table = token_table(3, 5, HEAD_DIM)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_products_of_rotated_queries_and_keys_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, HEAD_DIM)
    table = token_table(6, 6, HEAD_DIM)

    def product(at_q: int, at_k: int) -> float:
        return float((rotate(q, table[at_q : at_q + 1]) * rotate(k, table[at_k : at_k + 1])).sum())

    assert product(14, 7) == pytest.approx(product(21, 14), abs=1e-4)  # (2, 2)-(1, 1) and (3, 3)-(2, 2)
    assert product(14, 7) != pytest.approx(product(14, 8), abs=1e-4)

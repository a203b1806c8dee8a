import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar.cache import KVCache, Places, pad_rows

HEADS, HEAD_DIM, CAPACITY = 3, 16, 40


def cache(rows: int) -> KVCache:
    return KVCache(rows, CAPACITY, HEADS, HEAD_DIM, torch.device("cpu"), torch.float32)


def tokens(rows: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``steps`` tokens: (steps, rows, 1, heads, head_dim) each."""
    q, k, v = torch.randn(3, steps, rows, 1, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(rows))
    return q, k, v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.squeeze(2).permute(1, 2, 0, 3) for x in (q, k, v))  # (rows, heads, steps, head_dim)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).unsqueeze(2)


def test_one_token_a_step_attends_as_the_whole_sequence_does() -> None:
    q, k, v = tokens(5, CAPACITY)
    kept = cache(5)
    out = torch.stack([kept.at(i)(q[i], k[i], v[i]) for i in range(CAPACITY)])
    torch.testing.assert_close(out, causal(q, k, v), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(walk=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=CAPACITY))
def test_rows_that_stand_at_places_of_their_own_attend_to_their_own_past(walk: list[set[int]]) -> None:
    q, k, v = tokens(5, CAPACITY)
    whole, kept, at = causal(q, k, v), cache(5), torch.zeros(5, dtype=torch.long)
    for chosen in walk:
        rows = torch.tensor(sorted(chosen))
        where = at[rows]
        step = [pad_rows(x[where, rows]) for x in (q, k, v)]
        out = kept.at_rows(Places.of(rows, where, total=5))(*step)
        assert out.shape == step[0].shape
        torch.testing.assert_close(out[: len(rows)], whole[where, rows], atol=1e-5, rtol=0)
        at[rows] += 1


def test_a_row_attends_alike_to_the_last_bit_alone_and_among_rows_that_are_further_on() -> None:
    q, k, v = tokens(6, CAPACITY)
    alone, among = cache(1), cache(6)
    for i in range(CAPACITY):
        positions = torch.tensor([i, 2 * i, i + 7, 0, i, i + 1]) % CAPACITY
        every = Places.of(torch.arange(6), positions, total=6)
        theirs = among.at_rows(every)(q[i], k[i], v[i])
        ours = alone.at_rows(Places.of(torch.tensor([0]), torch.tensor([i]), total=1))(q[i, :1], k[i, :1], v[i, :1])
        assert torch.equal(ours, theirs[:1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(48, 100), (768, 2304), (1024, 2816), (2816, 1024)])
def test_a_matrix_product_gives_a_row_the_same_bits_among_any_number_of_rows(
    threads: int, fan_in: int, fan_out: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(fan_out, fan_in, generator=generator), torch.randn(40, fan_in, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([F.linear(pad_rows(row), weight)[:1] for row in x.split(1)])
        for rows in range(2, len(x) + 1):
            among = F.linear(pad_rows(x[-rows:]), weight)[:rows]
            assert torch.equal(among, alone[-rows:]), f"{rows} rows"
    finally:
        torch.set_num_threads(before)


def test_padding_makes_rows_a_multiple_of_four_and_eight_at_least() -> None:
    assert [pad_rows(torch.ones(rows, 2)).shape[0] for rows in (1, 8, 9, 12, 13, 16)] == [8, 8, 12, 12, 16, 16]
    assert pad_rows(torch.ones(3, 2)).sum() == 6

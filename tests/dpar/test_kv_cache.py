import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar.cpu_kernels import pad_rows
from dpar.kv_cache import KVCache, Places

HEADS, HEAD_DIM, CAPACITY = 3, 16, 40


def cache(rows: int) -> KVCache:
    return KVCache(rows, CAPACITY, HEADS, HEAD_DIM, torch.float32)


def tokens(rows: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of ``steps`` tokens: (steps, rows, 1, heads, head_dim) each."""
    q, k, v = torch.randn(3, steps, rows, 1, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(rows))
    return q, k, v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.squeeze(2).permute(1, 2, 0, 3) for x in (q, k, v))  # (rows, heads, steps, head_dim)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).unsqueeze(2)


def test_attention_token_by_token_equals_that_of_the_sequence() -> None:
    q, k, v = tokens(5, CAPACITY)
    kept = cache(5)
    places = [Places.of(np.arange(5), np.full(5, i), total=5) for i in range(CAPACITY)]
    out = torch.stack([kept.at(place)(q[i], k[i], v[i]) for i, place in enumerate(places)])
    torch.testing.assert_close(out, causal(q, k, v), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(walk=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=CAPACITY))
def test_rows_at_different_positions_attend_to_their_own_past(walk: list[set[int]]) -> None:
    q, k, v = tokens(5, CAPACITY)
    whole, kept, at = causal(q, k, v), cache(5), np.zeros(5, np.int64)
    for chosen in walk:
        rows = np.array(sorted(chosen))
        where = at[rows]
        step = [pad_rows(x[where, rows]) for x in (q, k, v)]
        out = kept.at(Places.of(rows, where, total=5))(*step)
        assert out.shape == step[0].shape
        torch.testing.assert_close(out[: len(rows)], whole[where, rows], atol=1e-5, rtol=0)
        at[rows] += 1


def test_attention_of_a_row_is_bit_identical_alone_and_with_rows_at_other_positions() -> None:
    q, k, v = tokens(6, CAPACITY)
    alone, among = cache(1), cache(6)
    for i in range(CAPACITY):
        positions = np.array([i, 2 * i, i + 7, 0, i, i + 1]) % CAPACITY
        rows = np.flatnonzero(positions % 3 != 1) if positions[0] % 3 != 1 else np.arange(6)
        theirs = among.at(Places.of(rows, positions[rows], total=6))(*(x[i, rows] for x in (q, k, v)))
        ours = alone.at(Places.of(np.array([0]), np.array([i]), total=1))(q[i, :1], k[i, :1], v[i, :1])
        assert torch.equal(ours, theirs[:1])

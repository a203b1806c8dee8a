import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpar.cache import KVCache, Places, pad_rows
from dpar.onednn import available, onednn

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
    places = [Places.of(np.arange(5), np.full(5, i), total=5) for i in range(CAPACITY)]
    out = torch.stack([kept.at(place)(q[i], k[i], v[i]) for i, place in enumerate(places)])
    torch.testing.assert_close(out, causal(q, k, v), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(walk=st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=CAPACITY))
def test_rows_that_stand_at_places_of_their_own_attend_to_their_own_past(walk: list[set[int]]) -> None:
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


def test_a_row_attends_alike_to_the_last_bit_alone_and_among_rows_that_are_elsewhere() -> None:
    q, k, v = tokens(6, CAPACITY)
    alone, among = cache(1), cache(6)
    for i in range(CAPACITY):
        positions = np.array([i, 2 * i, i + 7, 0, i, i + 1]) % CAPACITY
        rows = np.flatnonzero(positions % 3 != 1) if positions[0] % 3 != 1 else np.arange(6)
        theirs = among.at(Places.of(rows, positions[rows], total=6))(*(x[i, rows] for x in (q, k, v)))
        ours = alone.at(Places.of(np.array([0]), np.array([i]), total=1))(q[i, :1], k[i, :1], v[i, :1])
        assert torch.equal(ours, theirs[:1])


@pytest.mark.parametrize("on_onednn", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(48, 100), (768, 2304), (1024, 2816), (2816, 1024)])
def test_a_matrix_product_gives_a_row_the_same_bits_among_any_number_of_rows(
    threads: int, fan_in: int, fan_out: int, on_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_onednn and not available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr("dpar.onednn.available", lambda: on_onednn)
    linear = torch.nn.Linear(fan_in, fan_out, bias=False)
    x = torch.randn(40, fan_in, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), onednn(linear):
            assert ("forward" in vars(linear)) == on_onednn
            alone = torch.cat([linear(pad_rows(row))[:1] for row in x.split(1)])
            for rows in range(2, len(x) + 1):
                among = linear(pad_rows(x[-rows:]))[:rows]
                assert torch.equal(among, alone[-rows:]), f"{rows} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("on_onednn", "rows"), [(True, [2, 2, 3, 8, 9, 13, 16]), (False, [8, 8, 8, 8, 12, 16, 16])])
def test_padding_makes_the_rows_that_a_library_treats_alike(
    on_onednn: bool, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpar.onednn.available", lambda: on_onednn)
    assert [len(pad_rows(torch.ones(given, 2))) for given in (1, 2, 3, 8, 9, 13, 16)] == rows
    assert pad_rows(torch.ones(3, 2)).sum() == 6

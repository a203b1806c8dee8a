import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from shards.order import WINDOW, StreamingOrder, TrainingOrder, draw_keys, permuted

SIZES = {"rows": st.integers(1, 40), "views": st.integers(1, 20), "batch": st.integers(1, 50)}


def drawn(order: TrainingOrder, steps: int) -> tuple[np.ndarray, np.ndarray]:
    batches = [order.batch(step) for step in range(steps)]
    return np.concatenate([rows for rows, _ in batches]), np.concatenate([views for _, views in batches])


@given(**SIZES, seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_every_epoch_has_every_row_once(rows: int, views: int, batch: int, seed: int) -> None:
    epochs = 3
    seen, _ = drawn(TrainingOrder(rows=rows, views=views, batch=batch, seed=seed), -(-epochs * rows // batch))
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(**SIZES, seed=st.integers(0, 100), steps=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_batch_depends_only_on_seed_and_step(rows: int, views: int, batch: int, seed: int, steps: list[int]) -> None:
    worn = TrainingOrder(rows=rows, views=views, batch=batch, seed=seed)
    for step in steps:  # whatever was requested before
        fresh = TrainingOrder(rows=rows, views=views, batch=batch, seed=seed)
        for one, other in zip(worn.batch(step), fresh.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_batches_are_full_and_continue_into_the_next_epoch() -> None:
    order = TrainingOrder(rows=10, views=2, batch=4, seed=0)
    assert all(len(part) == 4 for step in range(10) for part in order.batch(step))
    rows, _ = order.batch(2)  # the last two of the first epoch, the first two of the second
    whole, _ = drawn(order, 5)
    assert set(rows[:2]) == set(range(10)) - set(whole[:8])
    assert set(rows[2:]) == set(range(10)) - set(whole[12:20])


def test_a_batch_larger_than_the_data_takes_from_several_epochs() -> None:
    rows, views = TrainingOrder(rows=3, views=4, batch=8, seed=1).batch(0)
    assert np.bincount(rows, minlength=3).tolist().count(3) == 2
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert len(views) == 8


@given(**SIZES, step=st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_views_and_rows_are_in_range(rows: int, views: int, batch: int, step: int) -> None:
    picked, drawn_views = TrainingOrder(rows=rows, views=views, batch=batch, seed=0).batch(step)
    assert 0 <= picked.min() <= picked.max() < rows
    assert 0 <= drawn_views.min() <= drawn_views.max() < views


def test_every_view_of_a_row_comes_up_and_each_about_as_often() -> None:
    rows, views = drawn(TrainingOrder(rows=50, views=4, batch=50, seed=3), 40)
    counts = np.zeros((50, 4), int)
    np.add.at(counts, (rows, views), 1)
    assert (counts.sum(axis=1) == 40).all()
    assert (counts > 0).all()
    assert abs(counts.sum(axis=0) / 2000 - 0.25).max() < 0.04


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_all_processes_form_the_same_global_batch(processes: int) -> None:
    whole = TrainingOrder(rows=11, views=3, batch=8, seed=5)
    share = 8 // processes
    for step in range(6):
        parts = []
        for rank in range(processes):  # each process has its own order object
            mine = slice(rank * share, (rank + 1) * share)
            parts.append([part[mine] for part in TrainingOrder(rows=11, views=3, batch=8, seed=5).batch(step)])
        for i in range(2):
            np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole.batch(step)[i])


def test_epochs_and_seeds_give_different_orders() -> None:
    order = TrainingOrder(rows=100, views=20, batch=100, seed=0)
    first, second = order.batch(0), order.batch(1)
    assert (first[0] != second[0]).any()
    by_row = [views[np.argsort(rows)] for rows, views in (first, second)]
    assert (by_row[0] != by_row[1]).any()
    assert (first[0] != TrainingOrder(rows=100, views=20, batch=100, seed=1).batch(0)[0]).any()


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"views": 0}, {"batch": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TrainingOrder(**{"rows": 1, "views": 1, "batch": 1, "seed": 0, **wrong})


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_a_keyed_permutation_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permuted(np.arange(size), size, draw_keys(seed))) == list(range(size))


def test_a_keyed_permutation_does_not_depend_on_the_requested_part() -> None:
    keys = draw_keys(3, 1)
    whole = permuted(np.arange(1000), 1000, keys)
    few = np.array([999, 0, 5, 5])
    np.testing.assert_array_equal(permuted(few, 1000, keys), whole[few])


def test_a_large_permutation_is_computed_only_for_the_requested_part() -> None:
    size = 10**12
    found = permuted(np.arange(10_000), size, draw_keys(0))
    assert len(set(found.tolist())) == 10_000
    assert 0 <= found.min() < size // 100 < size - size // 100 < found.max() < size


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_of_a_few_come_up_equally_often(size: int) -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        drawn_order = tuple(permuted(np.arange(size), size, draw_keys(0, epoch)).tolist())
        counts[drawn_order] = counts.get(drawn_order, 0) + 1
    assert len(counts) == math.factorial(size)
    assert chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("size", [7, 30])
def test_over_many_epochs_a_row_comes_at_every_position_equally_often(size: int) -> None:
    counts = np.zeros((size, size), int)
    epochs = 60 * size
    for epoch in range(epochs):
        counts[np.arange(size), permuted(np.arange(size), size, draw_keys(5, epoch))] += 1
    expected = epochs / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 1e-4 < chi2.sf(statistic, (size - 1) ** 2) < 1 - 1e-4


def test_neighbours_in_an_epoch_are_independent() -> None:
    size = 100_003
    order = permuted(np.arange(size), size, draw_keys(11, 4)).astype(float)
    for lag in (1, 2, 64, 256, 317):  # 317: the network's base
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(size)
    steps = np.diff(order) % size
    assert chisquare(np.histogram(steps, bins=50, range=(0, size))[0]).pvalue > 1e-4


def test_successive_epochs_are_independent() -> None:
    size = 100_003
    one, other = (permuted(np.arange(size), size, draw_keys(11, epoch)).astype(float) for epoch in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(size)


def test_views_are_drawn_uniformly_and_again_each_epoch() -> None:
    order = TrainingOrder(rows=20_000, views=20, batch=1, seed=2)
    one, other = (order.views_of(epoch, np.arange(20_000)) for epoch in (0, 1))
    pairs = np.bincount(one * 20 + other, minlength=400)
    assert chisquare(pairs).pvalue > 1e-4
    assert chisquare(np.bincount(one[:-1] * 20 + one[1:], minlength=400)).pvalue > 1e-4


SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=3 * WINDOW).filter(any)


@given(shards=SHARDS, views=st.integers(1, 4), batch=st.integers(1, 50), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_streaming_has_every_row_once_per_epoch(shards: list[int], views: int, batch: int, seed: int) -> None:
    order = StreamingOrder(shard_rows=shards, views=views, batch=batch, seed=seed)
    total = sum(shards)
    seen, drawn_views = drawn(order, -(-2 * total // batch))
    for epoch in range(2):
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert 0 <= drawn_views.min() <= drawn_views.max() < views


@given(shards=SHARDS, batch=st.integers(1, 20), steps=st.lists(st.integers(0, 100), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_streamed_batch_depends_only_on_seed_and_step(shards: list[int], batch: int, steps: list[int]) -> None:
    worn = StreamingOrder(shard_rows=shards, views=3, batch=batch, seed=1)
    for step in steps:
        fresh = StreamingOrder(shard_rows=shards, views=3, batch=batch, seed=1)
        for one, other in zip(worn.batch(step), fresh.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_streaming_finishes_with_a_window_of_shards_before_it_begins_the_next() -> None:
    sizes = [5] * (3 * WINDOW)
    order = StreamingOrder(shard_rows=sizes, views=1, batch=5 * WINDOW, seed=0)
    shards = [set((order.batch(step)[0] // 5).tolist()) for step in range(6)]  # a batch is a window
    assert all(len(window) == WINDOW for window in shards)
    assert set.union(*shards[:3]) == set.union(*shards[3:]) == set(range(3 * WINDOW))
    assert shards[:3] != shards[3:]
    within = order.batch(0)[0] // 5
    assert (np.diff(within) == 0).mean() < 0.5  # rows of different shards are mixed

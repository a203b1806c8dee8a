import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import TrainingOrder

SIZES = {"rows": st.integers(1, 40), "views": st.integers(1, 20), "batch": st.integers(1, 50)}


def drawn(order: TrainingOrder, steps: int) -> tuple[np.ndarray, np.ndarray]:
    batches = [order.batch(step) for step in range(steps)]
    return np.concatenate([rows for rows, _ in batches]), np.concatenate([views for _, views in batches])


@given(**SIZES, seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_epoch_sees_every_row_once(rows: int, views: int, batch: int, seed: int) -> None:
    epochs = 3
    seen, _ = drawn(TrainingOrder(rows=rows, views=views, batch=batch, seed=seed), -(-epochs * rows // batch))
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(**SIZES, seed=st.integers(0, 100), steps=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=60)
def test_a_batch_is_a_function_of_seed_and_step_alone(
    rows: int, views: int, batch: int, seed: int, steps: list[int]
) -> None:
    worn = TrainingOrder(rows=rows, views=views, batch=batch, seed=seed)
    for step in steps:  # whatever was asked for before
        fresh = TrainingOrder(rows=rows, views=views, batch=batch, seed=seed)
        for one, other in zip(worn.batch(step), fresh.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_batches_are_full_and_run_on_across_the_ends_of_epochs() -> None:
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
@settings(max_examples=60)
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
def test_the_shares_of_all_processes_together_are_the_same_global_batch(processes: int) -> None:
    whole = TrainingOrder(rows=11, views=3, batch=8, seed=5)
    share = 8 // processes
    for step in range(6):
        parts = []
        for rank in range(processes):  # each process has an order of its own
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

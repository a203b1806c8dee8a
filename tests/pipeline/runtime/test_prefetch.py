import threading
from collections.abc import Generator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.prefetch import prefetch


@given(st.lists(st.integers()), st.integers(1, 5))
def test_items_come_in_order_and_at_most_the_limit_ahead(values: list[int], limit: int) -> None:
    made: list[int] = []

    def items() -> Generator[int, None, None]:
        for value in values:
            made.append(value)
            yield value

    taken: list[int] = []
    for value in prefetch(items(), limit):
        taken.append(value)
        assert len(made) <= len(taken) + limit + 1  # one more is in hand, waiting for room
    assert taken == values


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Generator[int, None, None]:
        yield from (1, 2)
        raise LookupError("the third")

    taken: list[int] = []
    with pytest.raises(LookupError, match="the third"):
        taken.extend(prefetch(items(), 8))
    assert taken == [1, 2]


@pytest.mark.parametrize("limit", [1, 100])
def test_a_consumer_that_stops_early_ends_the_iterator_in_its_thread(limit: int) -> None:
    ended_in: list[threading.Thread] = []

    def items() -> Generator[int, None, None]:
        try:
            yield from range(10**9)
        finally:
            ended_in.append(threading.current_thread())

    with closing(prefetch(items(), limit)) as stream:
        assert next(stream) == 0
    (thread,) = ended_in
    assert thread is not threading.current_thread()
    thread.join()

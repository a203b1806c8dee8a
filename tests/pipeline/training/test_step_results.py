"""Results of training steps are read one step late, unless the caller waits."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.step_results import StepResults


@given(waits=st.lists(st.booleans(), min_size=1, max_size=12))
def test_each_result_is_read_once_and_the_newest_only_by_those_who_wait(waits: list[bool]) -> None:
    results, read = StepResults(), list[int]()
    for done, wait in enumerate(waits, start=1):
        results.add(done, torch.tensor([0.0, 0.0, 0.0, done / 2, 1.0]))
        read += [result.done for result in results.read(wait=wait)]
        assert read == list(range(1, done + wait))


def test_a_result_has_the_numbers_of_its_step() -> None:
    results = StepResults()
    results.add(7, torch.tensor([1.0, 0.0, 143.0, 2.5, 0.25]))
    [result] = results.read(wait=True)
    assert (result.skipped, result.save_failed, result.status) == (True, False, 143)
    assert (result.loss, result.norm) == (2.5, 0.25)

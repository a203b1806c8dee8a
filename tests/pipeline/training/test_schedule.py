import pytest

from pipeline.training.schedule import learning_rate


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    rates = [learning_rate(step, 100, 1.0, 4, "constant") for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_constant_stays_at_the_peak_from_the_first_step_on_without_warm_up() -> None:
    assert {learning_rate(step, 50, 3e-4, 0, "constant") for step in range(50)} == {3e-4}


def test_cosine_falls_from_the_peak_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, 2.0, 10, "cosine") for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[45], rates[-1]) == pytest.approx((2.0, 1.1, 0.2))

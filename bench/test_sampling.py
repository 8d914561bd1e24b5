"""Text drawn from the model."""

from collections.abc import Callable

from bench.case import Case

GROUP = "sampling"


def test_sampling(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

"""The mean loss of the val split."""

from collections.abc import Callable

from bench.case import Case

GROUP = "evaluation"


def test_evaluation(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

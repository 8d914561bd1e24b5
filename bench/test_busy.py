"""A step of native beside other work."""

from collections.abc import Callable

from bench.case import Case

GROUP = "busy"


def test_busy(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

"""A corpus read into tokens."""

from collections.abc import Callable

from bench.case import Case

GROUP = "reading"


def test_reading(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

"""A training step on one thread."""

from collections.abc import Callable

from bench.case import Case

GROUP = "threads"


def test_threads(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

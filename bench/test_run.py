"""Whole training runs, process start to end, beside the reference's way of working."""

from collections.abc import Callable

from bench.case import Case

GROUP = "run"


def test_run(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

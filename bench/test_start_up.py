"""Processes: what an import, a help text and the first step cost."""

from collections.abc import Callable

from bench.case import Case

GROUP = "start-up"


def test_start_up(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

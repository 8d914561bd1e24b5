"""A training step of every backend, its rounds interleaved with eager's."""

from collections.abc import Callable

from bench.case import Case

GROUP = "step"


def test_step(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

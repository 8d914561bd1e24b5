"""Random numbers: the vectorised fill and the scalar generator."""

from collections.abc import Callable

from bench.case import Case

GROUP = "rng"


def test_rng(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

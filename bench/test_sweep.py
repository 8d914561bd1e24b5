"""A training step over batch and hidden sizes; --full: over all sizes, precisions and backends."""

from collections.abc import Callable

from bench.case import Case

GROUP = "sweep"


def test_sweep(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

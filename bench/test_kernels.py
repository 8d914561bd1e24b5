"""The fused operators, each beside the same function in plain torch."""

from collections.abc import Callable

from bench.case import Case

GROUP = "kernels"


def test_kernels(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

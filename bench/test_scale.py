"""Words, bytes, large vocabularies and several processes; see scale.py."""

from collections.abc import Callable

from bench.case import Case

GROUP = "scale"


def test_scale(case: Case, measured: Callable[[Case], None]) -> None:
    measured(case)

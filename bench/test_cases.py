"""Every case of the suite, timed by pytest-benchmark; --groups or -k choose some."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.case import Case, Skipped, Work
from bench.recording import Recording


def test_case(case: Case, benchmark: Any, recording: Recording) -> None:
    def timer(work: Work, before: Callable[[], None], rounds: int) -> list[float]:
        benchmark.pedantic(work, setup=before, rounds=rounds)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark is switched off: the case ran, and nothing was timed")
        return list(benchmark.stats.stats.data)

    benchmark.group = case.group
    try:
        benchmark.extra_info.update(recording.measure(case, timer))
    except Skipped as reason:
        pytest.skip(str(reason))

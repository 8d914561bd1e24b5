"""`pytest bench --benchmark-only`: every case of the suite, timed by pytest-benchmark; --groups or -k choose some."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.case import Case, Skipped, Timer
from bench.conftest import RECORDING, plan_of
from bench.recording import Recording
from bench.suite import GROUPS, cases, usual
from mlp_fast.measure.timing import rest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `case` runs once for every case."""
    if "case" not in metafunc.fixturenames:
        return
    plan, named = plan_of(metafunc.config), metafunc.config.getoption("--groups")
    groups = named.split(",") if named else GROUPS
    if unknown := [group for group in groups if group not in GROUPS]:
        raise pytest.UsageError(f"--groups: {unknown[0]!r} is unknown; choose some of {', '.join(GROUPS)}")
    long = pytest.mark.skip(reason="it takes long; --full or --groups measures it")
    chosen = []
    for group in groups:
        if named or group in usual(plan):
            chosen += [pytest.param(one, id=f"{group}-{one.id}".replace(" ", "-")) for one in cases(group, plan)]
        else:
            chosen.append(pytest.param(None, id=group, marks=long))
    metafunc.parametrize("case", chosen)


@pytest.fixture(scope="session")
def recording(pytestconfig: pytest.Config) -> Recording:
    """What this session measures; the machine's probes come first."""
    plan = plan_of(pytestconfig)
    pytestconfig.stash[RECORDING] = Recording.begin(torch.device(plan.device), dry=plan.dry)
    return pytestconfig.stash[RECORDING]


def timer_of(benchmark: Any) -> Timer:
    """pytest-benchmark as a Timer."""

    def timer(work: Callable[[], object], before: Callable[[], None], rounds: int) -> list[float]:
        def setup() -> None:
            before()
            rest()

        benchmark.pedantic(work, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark is switched off: the case ran, and nothing was timed")
        return list(benchmark.stats.stats.data)

    return timer


def test_case(case: Case, benchmark: Any, recording: Recording) -> None:
    benchmark.group = case.group
    try:
        benchmark.extra_info.update(recording.add(case, timer_of(benchmark)))
    except Skipped as reason:
        pytest.skip(str(reason))

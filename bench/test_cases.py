"""`pytest bench --benchmark-only`: every case of the suite, timed by pytest-benchmark; --groups or -k choose some."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.case import Case, Plan, Skipped, Work
from bench.conftest import RECORDING
from bench.recording import Recording
from bench.suite import GROUPS, cases, chosen
from mlp_fast.errors import UserError


def plan_of(config: pytest.Config) -> Plan:
    return Plan.here(full=config.getoption("--full"), dry=config.getoption("--dry-run"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `case` runs once for every case."""
    if "case" not in metafunc.fixturenames:
        return
    plan, named = plan_of(metafunc.config), metafunc.config.getoption("--groups")
    try:
        groups = chosen(named, plan)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    found = [pytest.param(case, id=f"{g}-{case.id}".replace(" ", "-")) for g in groups for case in cases(g, plan)]
    long = pytest.mark.skip(reason="it takes long; --full or --groups measures it")
    left_out = [pytest.param(None, id=group, marks=long) for group in GROUPS if not named and group not in groups]
    metafunc.parametrize("case", found + left_out)


@pytest.fixture(scope="session")
def recording(pytestconfig: pytest.Config) -> Recording:
    """What this session measures; the machine's probes come first."""
    plan = plan_of(pytestconfig)
    return pytestconfig.stash.setdefault(RECORDING, Recording.begin(torch.device(plan.device), dry=plan.dry))


def test_case(case: Case, benchmark: Any, recording: Recording) -> None:
    def timer(work: Work, before: Callable[[], None], rounds: int) -> list[float]:
        benchmark.pedantic(work, setup=before, rounds=rounds)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark is switched off: the case ran, and nothing was timed")
        return list(benchmark.stats.stats.data)

    benchmark.group = case.group
    try:
        entry = recording.measure(case.group, case.id, lambda: case.entry(timer, recording.probes))
        benchmark.extra_info.update(entry)
    except Skipped as reason:
        pytest.skip(str(reason))

"""`pytest bench --benchmark-only`: the suite's cases timed by pytest-benchmark, and the suite's own tables.

A benchmark here is a whole round (some steps and one synchronisation), so the table in ms/step is the one to read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tables
from bench.case import Case, Plan, Skipped, Timer
from bench.recording import Recording
from bench.suite import cases, usual
from mlp_fast.measure.timing import rest

RECORDING = pytest.StashKey[Recording]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlp_fast")
    group.addoption("--full", action="store_true", help="sweep B, H, T, V and precision over all backends")
    group.addoption("--dry-run", action="store_true", help="tiny sizes: only whether everything runs")
    group.addoption("--record", type=Path, metavar="FILE", help="write what was measured as a recording")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `case` runs once for every case of its module's GROUP."""
    if "case" in metafunc.fixturenames:
        plan, group = plan_of(metafunc.config), metafunc.module.GROUP
        if group not in usual(plan):
            reason = "it takes long; --full measures it"
            metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))], ids=[group])
            return
        chosen = cases(group, plan)
        metafunc.parametrize("case", chosen, ids=[case.id.replace(" ", "-") for case in chosen])


def plan_of(config: pytest.Config) -> Plan:
    """What the options ask for, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(config.getoption("--full"), config.getoption("--dry-run"), device)


@pytest.fixture(scope="session")
def recording(pytestconfig: pytest.Config) -> Recording:
    """What this session measures; the machine's probes come first."""
    plan = plan_of(pytestconfig)
    pytestconfig.stash[RECORDING] = Recording.begin(torch.device(plan.device), dry=plan.dry)
    return pytestconfig.stash[RECORDING]


@pytest.fixture
def measured(benchmark: Any, recording: Recording) -> Callable[[Case], None]:
    """Runs a case under pytest-benchmark; skips the test, with the reason, where it cannot run here."""

    def run(case: Case) -> None:
        benchmark.group = case.group
        try:
            entry = recording.add(case, _timer(benchmark))
        except Skipped as reason:
            pytest.skip(str(reason))
        benchmark.extra_info.update(entry)

    return run


def _timer(benchmark: Any) -> Timer:
    def timer(work: Callable[[], object], before: Callable[[], None], rounds: int) -> list[float]:
        def setup() -> None:
            before()
            rest()

        benchmark.pedantic(work, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            pytest.skip("pytest-benchmark is switched off: the case ran, and nothing was timed")
        return list(benchmark.stats.stats.data)

    return timer


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables, and the recording's file."""
    recording = config.stash.get(RECORDING, None)
    if recording is None:
        return
    terminalreporter.section("mlp_fast")
    terminalreporter.write_line(tables.whole(recording))
    path = config.getoption("--record")
    if path is not None:
        recording.save(path)
        terminalreporter.write_line(f"\nrecorded in {path}")

"""`pytest bench --benchmark-only`: the cases of the suite as tests, and the suite's tables after pytest-benchmark's.

A benchmark here is a whole round (some steps and one synchronisation), so the table in ms/step is the one to read.
"""

from typing import Any

import pytest
import torch

from bench import suite, tables
from bench.case import Plan
from bench.recording import Recording
from mlp_fast.errors import UserError

RECORDING = pytest.StashKey[Recording]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite, which `python -m bench.record` has too."""
    for name, attributes in suite.OPTIONS.items():
        parser.getgroup("mlp_fast").addoption(name, **attributes)


def plan_of(config: pytest.Config) -> Plan:
    """How much the options ask for."""
    return Plan.here(full=config.getoption("--full"), dry=config.getoption("--dry-run"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `case` runs once for every case; a group that takes long is one skipped test."""
    if "case" not in metafunc.fixturenames:
        return
    plan, named = plan_of(metafunc.config), metafunc.config.getoption("--groups")
    try:
        groups = suite.chosen(named, plan)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    found = [pytest.param(case, id=f"{g}-{case.id}".replace(" ", "-")) for g in groups for case in suite.cases(g, plan)]
    long = pytest.mark.skip(reason="it takes long; --full or --groups measures it")
    left_out = [pytest.param(None, id=group, marks=long) for group in suite.GROUPS if not named and group not in groups]
    metafunc.parametrize("case", found + left_out)


@pytest.fixture(scope="session")
def recording(pytestconfig: pytest.Config) -> Recording:
    """What this session measures; the machine's probes come first."""
    plan = plan_of(pytestconfig)
    return pytestconfig.stash.setdefault(RECORDING, Recording.begin(torch.device(plan.device), dry=plan.dry))


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the suite's tables."""
    if RECORDING in config.stash:
        terminalreporter.section("mlp_fast")
        terminalreporter.write_line(tables.whole(config.stash[RECORDING]))

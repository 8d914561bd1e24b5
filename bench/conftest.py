"""The options of `pytest bench --benchmark-only`, and the suite's own tables after those of pytest-benchmark.

A benchmark here is a whole round (some steps and one synchronisation), so the table in ms/step is the one to read.
"""

from pathlib import Path
from typing import Any

import pytest

from bench import tables
from bench.case import Plan
from bench.recording import Recording

RECORDING = pytest.StashKey[Recording]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlp_fast")
    group.addoption("--full", action="store_true", help="sweep B, H, T, V and precision over all backends")
    group.addoption("--dry-run", action="store_true", help="tiny sizes: only whether everything runs")
    group.addoption("--groups", metavar="A,B", help="only some groups of cases, long ones too")
    group.addoption("--record", type=Path, metavar="FILE", help="write what was measured as a recording")


def plan_of(config: pytest.Config) -> Plan:
    """What the options ask for."""
    return Plan.here(full=config.getoption("--full"), dry=config.getoption("--dry-run"))


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

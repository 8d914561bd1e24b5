"""The options of `pytest bench --benchmark-only`, and the suite's own tables after those of pytest-benchmark.

A benchmark here is a whole round (some steps and one synchronisation), so the table in ms/step is the one to read.
"""

from pathlib import Path
from typing import Any

import pytest

from bench import suite, tables
from bench.recording import Recording

RECORDING = pytest.StashKey[Recording]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlp_fast")
    for name, attributes in suite.OPTIONS.items():
        group.addoption(name, **attributes)
    group.addoption("--record", type=Path, metavar="FILE", help="write what was measured as a recording")


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    recording, path = config.stash.get(RECORDING, None), config.getoption("--record")
    if recording is None:
        return
    terminalreporter.section("mlp_fast")
    terminalreporter.write_line(tables.whole(recording))
    if path is not None:
        recording.save(path)
        terminalreporter.write_line(f"\nrecorded in {path}")

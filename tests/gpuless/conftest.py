"""Tests of the kernels as compiled, on a machine without a GPU."""

import sys
from pathlib import Path

import pytest

from mlp_fast.kernels._runtime import interpreting

# What these tests share with those of the interpreter: problems, their float64 runs, the rule of comparison.
sys.path.append(str(Path(__file__).parent.parent / "interpreted"))


@pytest.fixture(scope="session")
def engine() -> None:
    """The emulator's engine, compiled; tests that need it are skipped, with the reason, where it cannot be."""
    pytest.importorskip("triton")
    if interpreting():
        pytest.skip("Triton's interpreter is on, so nothing is compiled")
    from emulator.engine import NoCompiler, library

    try:
        library()
    except NoCompiler as error:
        pytest.skip(str(error))

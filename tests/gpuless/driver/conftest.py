"""The fixture `on_stub_gpu`: programs that believe in a GPU (stub_gpu.py)."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent


@pytest.fixture(scope="session")
def stub_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 made of libcuda.c; skipped where Triton's own launcher could not be built either."""
    triton = pytest.importorskip("triton")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        pytest.skip("Triton's launcher is compiled with Python.h, which is not here (Debian: python3-dev)")
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}"]
    subprocess.run([*compiler, HERE / "libcuda.c", "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.fixture(scope="session")
def on_stub_gpu(stub_driver: Path) -> Callable[..., dict[str, Any]]:
    """on_stub_gpu(program, capability=90, processors=132, **task) -> what the program answered.

    The program, a file of this folder, runs in a process of its own, since the driver is found through the environment
    that a process starts with. It takes a JSON object as its argument, and prints one.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LD_LIBRARY_PATH": str(stub_driver), "TRITON_LIBCUDA_PATH": str(stub_driver)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(program: str, **task: Any) -> dict[str, Any]:
        command = [sys.executable, str(HERE / program), json.dumps(task)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run

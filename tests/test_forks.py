"""After os.fork() the child computes what its parent would have, on every backend: no hang on threads left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlp_fast.backends import REGISTRY, unsupported
from mlp_fast.config import Config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# Sizes at which torch, too, works on several threads. A child that hangs is killed by SIGALRM.
PROGRAM = """
import os, signal, sys, warnings
import torch
from mlp_fast import backends
from mlp_fast.config import Config
from mlp_fast.model.mlp import Shape
from mlp_fast.ops import FusedMLP
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_windows

warnings.simplefilter("ignore")  # newer Pythons warn of forking with threads
seconds, *names = sys.argv[1:]
shape = Shape(V=60, T=3, E=48, H=512)
tape = Tape(torch.arange(100_000) * 7919 % 59, shape.T)
windows = evaluated_windows(tape, 128, 3)


def fused():
    torch.manual_seed(1)
    model = FusedMLP(shape)
    _, loss = model(torch.arange(3000).view(1000, 3) % 60, torch.arange(1000) % 60)
    loss.backward()
    return [loss.item(), *(p.grad.norm().item() for p in model.parameters())]


def train(name):
    backend = backends.create(Config(backend=name, num_steps=100), shape, tape, TrainState.initial(shape, 1337))
    backend.prepare()
    return [*backend.advance(2).tolist(), backend.mean_loss(windows), *map(float, backend.sample([1, 2, 3], 5, 1))]


def work(name):
    torch.zeros(1 << 20).sum()
    return fused() if name == "FusedMLP" else train(name)


assert torch.get_num_threads() > 1
for name in names:
    expected = work(name)
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))
        code = 9
        try:
            code = 0 if torch.allclose(torch.tensor(work(name)), torch.tensor(expected), atol=1e-5) else 8
        finally:
            os._exit(code)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert torch.get_num_threads() > 1  # the parent goes on as before
    assert torch.allclose(torch.tensor(work(name)), torch.tensor(expected), atol=1e-5)
"""

COMPILED = [name for name in REGISTRY if "compile" in name]


def check(names: list[str], seconds: int, **environment: str) -> None:
    names = [name for name in names if name not in REGISTRY or unsupported(name, Config(device="cpu")) is None]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seconds), *names],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=60 + 3 * seconds * len(names),
    )
    codes = dict(line.split() for line in process.stdout.splitlines())
    hanging = [name for name, code in codes.items() if code == str(-signal.SIGALRM)]
    assert not hanging, "forked children hang"
    assert codes == dict.fromkeys(names, "0"), process.stderr
    assert process.returncode == 0, process.stderr


def test_a_forked_child_computes_what_its_parent_would() -> None:
    check(["FusedMLP", *(name for name in REGISTRY if name not in COMPILED)], seconds=10)


@pytest.mark.long
def test_a_forked_child_compiles_and_computes_as_well(tmp_path: Path) -> None:
    check(COMPILED, seconds=300, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))

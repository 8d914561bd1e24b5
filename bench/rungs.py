"""`python -m bench.rungs NAME...`: what a training step of a backend asks for, counted, and its time on this machine.

    launches     kernels, operators of torch that compute, or calls into C, that a step begins
    bytes        what these read and write, each number once for every launch that uses it
    operations   of the function in the form that the rung computes (floor.step_cost)

Counted at the default sizes, and without a GPU: torch's operators on the CPU by a dispatch mode; what torch.compile
makes, in the schedule of its compiler; Triton kernels in Triton's interpreter, load by load, in the configuration that
a GPU gets. The first five programs of a step kernel stand for all: what comes after the fifth does the same as it.
The bytes of `native` are those of its parameters and moments alone: what else it needs stays in a core's cache.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.floor import form_of, step_cost
from bench.interpreter import prepare_once
from mlp_fast import backends
from mlp_fast.cli import run_main
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure.comparison import compare
from mlp_fast.measure.timing import subject
from mlp_fast.model.state import TrainState

NAMES = [name for name in backends.REGISTRY if not name.endswith("-raw")]
CONFIG = Config(device="cpu")
RUN = 200  # steps of a launch of triton-persistent: from one evaluation to the next
DISTINCT = 5  # programs of a step kernel


@dataclass
class Count:
    """Of one step."""

    launches: float = 0
    bytes: float = 0

    def add(self, bytes: float) -> None:
        """One more launch."""
        self.launches += 1
        self.bytes += bytes


class _Operators(TorchDispatchMode):
    """Counts the operators that compute; those with `out=` are calls of compiled code, which is counted elsewhere."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        idle = func.is_view or func.namespace in ("profiler", "mlp_fast") or "empty" in func.__name__
        if used and not idle and "out" not in func.__name__.split("."):
            self.count.add(sum(t.nbytes for t in used))
        return result


@contextlib.contextmanager
def _compiled(count: Count) -> Iterator[None]:
    """Counts the kernels of all that is compiled meanwhile."""
    import torch._functorch.config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler

    codegen = Scheduler.codegen

    def counted(scheduler: Any) -> Any:
        for node in scheduler.nodes:
            if not isinstance(node, NopKernelSchedulerNode):
                count.add(node.get_read_write_buffers_sizes())
        return codegen(scheduler)

    torch.compiler.reset()
    with (
        mock.patch.object(Scheduler, "codegen", counted),
        inductor.patch(fx_graph_cache=False),
        functorch.patch(enable_autograd_cache=False),
    ):
        yield


def count_torch(name: str) -> Count:
    """A step of a backend made of torch's operators, compiled or not."""
    count = Count()
    shape, tape = subject(CONFIG)
    with _compiled(count):
        backend: Any = backends.create(
            replace(CONFIG, backend=name), shape, tape, TrainState.initial(shape, CONFIG.seed)
        )
        backend.prepare()
    if name == "compile-step":
        return count
    if name.startswith("compile"):
        backend.loss = _unseen(backend.loss)
    with _Operators(count):
        backend.advance(1)
    return count


def _unseen(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled code does not run under a dispatch mode."""

    def call(*args: Tensor) -> Tensor:
        with _disable_current_modes():
            return compiled(*args)

    return call


# --- Triton kernels, in the interpreter -------------------------------------------------------------------------------


@contextlib.contextmanager
def _interpreted(count: Count, programs: int | None = None) -> Iterator[Counter[int]]:
    """Counts loads and stores of launches, of the first so many programs of each; yields the bytes by program."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    by_program: Counter[int] = Counter()

    def counting(name: str, pointer: int, mask: int) -> Any:
        access = getattr(InterpreterBuilder, name)

        def counted(self: Any, *args: Any) -> Any:
            size = args[pointer].get_element_ty().primitive_bitwidth // 8
            moved = size * int(np.broadcast_to(args[mask].data, args[pointer].data.shape).sum())
            count.bytes += moved
            by_program[self.grid_idx[0]] += moved
            return access(self, *args)

        return mock.patch.object(InterpreterBuilder, name, counted)

    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.launches += 1
        self.grid = self.grid if programs is None else (programs,)
        return launch(self, *args, **kwargs)

    with (
        counting("create_masked_load", 0, 1),
        counting("create_masked_store", 0, 2),
        counting("create_atomic_rmw", 1, 3),
        mock.patch.object(GridExecutor, "__call__", launched),
    ):
        yield by_program


def count_operators() -> Count:
    """A step of triton-op: its kernels, and torch's operators between them."""
    count = Count()
    shape, tape = subject(CONFIG)
    config = replace(CONFIG, backend="triton-op", interpret=True)
    backend: Any = backends.create(config, shape, tape, TrainState.initial(shape, config.seed))
    with _interpreted(count), _Operators(count):
        backend._step()
    return count


def count_step_kernels(name: str) -> Count:
    """A step of triton-step or triton-persistent, its launches shared out over RUN steps."""
    from mlp_fast.kernels import persistent_step, train_step

    module, launcher = {
        "triton-step": (train_step, train_step.TrainStep),
        "triton-persistent": (persistent_step, persistent_step.PersistentStep),
    }[name]
    shape, tape = subject(CONFIG)
    with contextlib.ExitStack() as stack:
        for each in (train_step, persistent_step):
            stack.enter_context(mock.patch.object(each, "interpreting", return_value=False))
        config = module.default_config(CONFIG.batch_size, shape.V, shape.T, shape.E, shape.H)

    def counted(steps: int) -> tuple[Count, int]:
        """Of the first DISTINCT programs; and the bytes of the last of these alone."""
        count = Count()
        # Program 0 has moved the clock by the time that the others begin: for them the steps after these are counted.
        kernels = launcher(config, tape.tokens.to(torch.int32), torch.ones(2 * steps, 3))
        for name, buffer in kernels.buffers._asdict().items():
            if name not in ("tape", "scalars"):
                buffer.zero_()  # what memory happens to hold may be NaN, and storing that it was seen counts too
        kernels.load([[torch.zeros_like(tensor) for tensor in plane] for plane in kernels.planes()], 0)
        # Programs run one after another and would wait for ever; what they compute does not matter here.
        without_barrier = mock.patch.object(persistent_step, "grid_barrier", return_value=None)
        with without_barrier, _interpreted(count, DISTINCT) as by_program:
            kernels.run(steps)
        return count, by_program[DISTINCT - 1]

    (once, last_once), (twice, last_twice) = counted(1), counted(2)
    each, rest = twice.launches - once.launches, (config.PROGRAMS - DISTINCT) * (last_twice - last_once)
    return Count(each + (once.launches - each) / RUN, twice.bytes - once.bytes + rest)


def count_native() -> Count:
    """A step of native: a call does many."""
    shape, _ = subject(CONFIG)
    return Count(1 / RUN, step_cost(shape, CONFIG.batch_size, "table").bytes)


COUNTED: dict[str, Callable[[], Count]] = {
    "triton-op": count_operators,
    "triton-step": lambda: count_step_kernels("triton-step"),
    "triton-persistent": lambda: count_step_kernels("triton-persistent"),
    "native": count_native,
}


@functools.cache
def count(name: str) -> Count:
    """Launches and bytes of a backend's step; of Triton kernels in a process of its own, for the interpreter."""
    if not name.startswith("triton"):
        return COUNTED[name]() if name in COUNTED else count_torch(name)
    command = [sys.executable, "-m", "bench.rungs", "--count", name]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"{name} could not be counted: {result.stderr.strip()}")
    return Count(**json.loads(result.stdout))


def row(name: str) -> list[str]:
    """A rung: its name, launches, megabytes, millions of operations."""
    found = count(name)
    shape, _ = subject(CONFIG)
    cost = step_cost(shape, CONFIG.batch_size, form_of(name, "auto", shape, CONFIG.batch_size))
    return [name, f"{found.launches:.3g}", f"{found.bytes / 1e6:.1f}", f"{cost.operations / 1e6:.1f}"]


def timed(name: str, num_steps: int) -> str:
    """Its time on this machine beside eager's, or why it has none."""
    config = Config(num_steps=num_steps)
    if reason := backends.unsupported(name, config):
        return f"{name}: no time here: {reason}"
    results = compare([name], config, *subject(config))
    if refused := [result.refused for result in results if result.refused]:
        raise UserError(refused[0])
    found = results[-1]
    assert found.ms_per_step is not None
    return f"{name}: {found.ms_per_step.median:.4f} ms a step here, {found.x_eager:.2f} times as fast as eager"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.rungs", description="What a step asks for, rung by rung.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(backends.REGISTRY)}")
    parser.add_argument("--num-steps", type=int, default=200, metavar="N", help="of the timing; 0: only count")
    parser.add_argument("--count", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.count:
        prepare_once()
        print(json.dumps(asdict(COUNTED[arguments.count]())))
        return 0
    if unknown := [name for name in arguments.names if name not in backends.REGISTRY]:
        raise UserError(f"{unknown[0]!r} is no rung; choose some of {', '.join(backends.REGISTRY)}")
    names = arguments.names or NAMES
    print("| rung | launches | MB | million operations |\n| --- | --: | --: | --: |")
    for name in names:
        print(f"| {' | '.join(row(name))} |")
    for name in names if arguments.num_steps else ():
        print(timed(name, arguments.num_steps))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

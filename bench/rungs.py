"""`python -m bench.rungs NAME...`: the launches and operations of a step of a backend, and its time on this machine.

    launches     kernels, operators of torch that compute, or calls into C, that a step begins
    operations   of the function in the form that the rung computes (lower_bound.step_cost)

Counted at the default sizes, and without a GPU: torch's operators on the CPU by a dispatch mode; the kernels that
torch.compile makes, by a pass in its scheduler; launches of Triton kernels as kernels/_aot.py records them.
"""

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.lower_bound import form_of, step_cost
from mlp_fast import backends
from mlp_fast.cli import run_main
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure.comparison import compare
from mlp_fast.measure.table import table
from mlp_fast.measure.timing import subject
from mlp_fast.model.state import TrainState

NAMES = [name for name in backends.REGISTRY if not name.endswith("-raw")]
CONFIG = Config(device="cpu")
RUN = 200  # steps of a launch of triton-persistent: from one evaluation to the next


class Operators(TorchDispatchMode):
    """Counts the operators that compute; those with `out=` are calls of compiled code, which is counted elsewhere."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, result)))
        idle = func.is_view or func.namespace in ("profiler", "mlp_fast") or "empty" in func.__name__
        self.count += used and not idle and "out" not in func.__name__.split(".")
        return result


@contextlib.contextmanager
def compiled() -> Iterator[list[Any]]:
    """Yields a list that receives the kernels of all that is compiled meanwhile."""
    from torch._inductor import config as inductor
    from torch._inductor.scheduler import NopKernelSchedulerNode

    kernels: list[Any] = []

    def keep(nodes: list[Any]) -> list[Any]:
        kernels.extend(node for node in nodes if not isinstance(node, NopKernelSchedulerNode))
        return nodes

    torch.compiler.reset()
    # With a pass that it cannot hash, Inductor does without its cache, so nothing comes out of that uncounted.
    with inductor.patch(_post_fusion_custom_pass=keep):
        yield kernels


def count_torch(name: str) -> float:
    """Launches of a step of a backend made of torch's operators, compiled or not."""
    shape, tape = subject(CONFIG)
    config = replace(CONFIG, backend=name)
    with compiled() as kernels:
        backend: Any = backends.create(config, shape, tape, TrainState.initial(shape, config.seed))
        backend.prepare()
    if name == "compile-step":
        return len(kernels)
    if name.startswith("compile"):  # compiled code does not run under a dispatch mode
        backend.loss = _disable_current_modes()(backend.loss)
    with Operators() as operators:
        backend.advance(1)
    return len(kernels) + operators.count


@contextlib.contextmanager
def on_kernels() -> Iterator[None]:
    """Within it the operators launch their kernels on tensors of the CPU too."""
    with (
        mock.patch("mlp_fast.ops._dispatch.interpreting", return_value=True),
        mock.patch("mlp_fast.ops._checks.interpreting", return_value=True),
    ):
        yield


def count_operators() -> float:
    """Launches of a step of triton-op: its kernels, and torch's operators between them."""
    from mlp_fast.kernels._aot import recorded

    shape, tape = subject(CONFIG)
    state = TrainState.initial(shape, CONFIG.seed)
    with on_kernels():
        backend: Any = backends.backend_class("triton-op")(CONFIG, shape, tape, state, torch.device("cpu"))
        with recorded() as launches, Operators() as operators:
            backend._step()
    return len(launches) + operators.count


def count_step_kernels(name: str) -> float:
    """Launches of a step of triton-step or triton-persistent, in a run of RUN steps."""
    from mlp_fast.kernels import persistent_step, train_step
    from mlp_fast.kernels._aot import recorded

    shape, tape = subject(CONFIG)
    persistent = name == "triton-persistent"
    default_config = (persistent_step if persistent else train_step).default_config
    launcher = persistent_step.PersistentStep if persistent else train_step.TrainStep
    sizes = default_config(CONFIG.batch_size, shape.V, shape.T, shape.E, shape.H)
    with recorded() as launches:
        launcher(sizes, tape.tokens.to("meta", torch.int32), torch.empty(RUN, 3, device="meta")).run(RUN)
    return len(launches) / RUN


def count(name: str) -> float:
    """Launches of a step of a backend."""
    if name == "native":
        return 1 / RUN  # a call does the steps from one evaluation to the next
    if not name.startswith("triton"):
        return count_torch(name)
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"{name} could not be counted: the package triton is not installed")
    return count_operators() if name == "triton-op" else count_step_kernels(name)


def timed(name: str, num_steps: int) -> str:
    """A line: the time of a step of a backend on this machine, beside eager's, or the reason that it has none."""
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
    parser = argparse.ArgumentParser(
        prog="python -m bench.rungs", description="Launches and operations of a step, rung by rung."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(backends.REGISTRY)}")
    parser.add_argument("--num-steps", type=int, default=200, metavar="N", help="of the timing; 0: only count")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in backends.REGISTRY]:
        raise UserError(f"{unknown[0]!r} is no rung; choose some of {', '.join(backends.REGISTRY)}")
    names, (shape, _), B = arguments.names or NAMES, subject(CONFIG), CONFIG.batch_size
    costs = {name: step_cost(shape, B, form_of(name, "auto", shape, B)) for name in names}
    rows = [(name, f"{count(name):.3g}", f"{costs[name].operations / 1e6:.1f}") for name in names]
    print(table(("rung", "launches", "million operations"), rows))
    for name in names if arguments.num_steps else ():
        print(timed(name, arguments.num_steps))
    return 0


if __name__ == "__main__":
    run_main(main)

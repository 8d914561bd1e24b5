"""The workloads that are counted: launches of the training step, of an evaluation and of operators, in the emulator.

The emulator stays in tests/gpuless: it is an instrument of the tests, in their terms (findings, schedules), and counts
are one column of its results. Both folders exist in a checkout only, so this module imports it by its path.
"""

import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine_code
from bench.execution import Launch, Row, add, phase_of
from bench.gpus import Gpu
from bench.lower_bound import Cost, evaluation_cost, operator_cost, step_cost
from bench.operators import FUSED, LARGE_BATCH, OPERATORS
from bench.rungs import on_kernels
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.model.mlp import PARAMETER_NAMES, Shape, initial_parameters
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows, evaluated_windows

EMULATOR = Path(__file__).resolve().parent.parent / "tests" / "gpuless"
SHAPE = Shape(V=27, T=3, E=48, H=512)
COUNTED = ("executions", "lanes", "wavefronts_low", "wavefronts_high", "sectors")  # of engine.Counts


def emulated(capability: int, run: Callable[[], object], programs: int = 0) -> list[Any]:
    """The results of the launches in `run`, program 0 counted. Only so many programs of a grid run; 0: all."""
    if str(EMULATOR) not in sys.path:
        sys.path.append(str(EMULATOR))
    emulator = importlib.import_module("emulator")
    schedule = emulator.Schedule(policy="rotation", quantum=1000, races=False, first_blocks=programs)

    def merged(shipped: Any) -> dict[int, int]:
        return machine_code.compiled(shipped, capability).merged

    with emulator.Emulator(capability, schedule, counted=0, merged=merged) as machine:
        run()
    return list(machine.results)


def launch_of(result: Any, capability: int, less: Any = None) -> Launch:
    """The counts of program 0 of an emulated launch, less its counts in another launch of the same kernel."""
    program, kernel = result.program, result.shipped.kernel.fn.__name__
    counts: defaultdict[int, Row] = defaultdict(dict)
    phases: dict[int, str] = {}
    warps, arrivals, looks, waiting = result.threads // 32, 0.0, 1.0, False
    for n, line in enumerate(program.ptx_lines):
        phases[line] = phase_of(program.lines[n], kernel)
        more = {
            name: getattr(result.counts[n], name) - (getattr(less.counts[n], name) if less else 0) for name in COUNTED
        }
        # How long a program spins at a barrier is not its own work: it is taken to look once. What runs at some looks
        # only, such as reading the clock, is a share of that. One warp looks, and all of them wait for it.
        if program.texts[n].startswith("red.release"):
            arrivals = more["executions"]
        elif program.texts[n].startswith("ld.acquire"):
            looks, waiting = max(more["executions"] / arrivals, 1.0), True
        elif program.texts[n].startswith("bar.sync"):
            looks, waiting = 1.0, False
        if waiting:
            more["executions"] *= warps
        add(counts[line], {name: count / looks for name, count in more.items()})
    made = machine_code.compiled(result.shipped, capability)
    return Launch(
        kernel, warps, result.blocks, result.footprint, made.code, made.registers, made.shared, counts, phases
    )


def _launches(gpu: Gpu, run: Callable[[], object]) -> list[Launch]:
    """All launches of `run`, of which one program each is emulated."""
    return [launch_of(result, gpu.sm) for result in emulated(gpu.sm, run, programs=1)]


def _step(gpu: Gpu, precision: str, module: str, B: int) -> list[Launch]:
    """A training step in the middle of a run."""
    kernels = importlib.import_module(f"mlp_fast.kernels.{module}")
    persistent = module == "persistent_step"
    options = {"capability": gpu.sm} if persistent else {}
    V, T, E, H = (getattr(SHAPE, size) for size in "VTEH")
    C = kernels.default_config(B, V, T, E, H, precision=precision, processors=gpu.processors, **options)
    tape = torch.randint(0, V, (20_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    state = TrainState.initial(SHAPE, 1337)
    planes = [[part[n] for n in PARAMETER_NAMES] for part in state.parts.values()]
    scalars = update_scalars(Config(context_length=T, embedding_size=E, hidden_size=H, batch_size=B, num_steps=10))

    def run(*launches: int) -> None:
        for steps in launches:
            step = (kernels.PersistentStep if persistent else kernels.TrainStep)(C, tape, scalars)
            step.load(planes, 0)
            step.run(steps)

    if persistent:  # its programs wait for each other, so all run; one step is the difference of two launches
        one, two = emulated(gpu.sm, lambda: run(1, 2))
        return [launch_of(two, gpu.sm, less=one)]
    results = emulated(gpu.sm, lambda: run(2), programs=1)
    each = len(results) // 2
    return [launch_of(result, gpu.sm) for result in results[each : 2 * each]]


def _evaluated(B: int) -> WeightedWindows:
    """The windows of the embedded corpus' val split."""
    return evaluated_windows(Tape(load("embedded").val, SHAPE.T), B)


def _evaluation(gpu: Gpu, precision: str, B: int) -> list[Launch]:
    """The mean loss of the embedded corpus' val split."""
    from mlp_fast.kernels import inference

    weights, windows = inference.Weights(*initial_parameters(SHAPE, seed=7).values()), _evaluated(B)
    finished = torch.zeros(1, dtype=torch.int32)
    return _launches(
        gpu, lambda: inference.mean_loss(weights, windows.rows, windows.counts, finished, precision=precision)
    )


def _operator(gpu: Gpu, precision: str, name: str, B: int) -> list[Launch]:
    """One of operators.OPERATORS, by its kernels."""
    config = Config(batch_size=B, precision=precision, device="cpu")
    with on_kernels():
        return _launches(gpu, OPERATORS[name](config, torch.device("cpu"), torch.float32, FUSED))


class Workload(NamedTuple):
    """The launches that are counted together.

    launches: of a GPU and a precision.
    cost: the least operations and bytes that compute the same.
    group, id: of its entries in recordings; {} in the id stands for the precision.
    """

    launches: Callable[[Gpu, str], list[Launch]]
    cost: Cost
    group: str
    id: str


def _operator_workload(name: str, B: int) -> Workload:
    id = f"{'large-' if B == LARGE_BATCH else ''}{name}-{B}-{{}}"
    return Workload(partial(_operator, name=name, B=B), operator_cost(name, SHAPE, B), "kernels", id)


_STEP, _WINDOWS = step_cost(SHAPE, 128, "table"), len(_evaluated(128).rows)
_WITH_BACKWARD = [name for name in OPERATORS if name.endswith("-and-backward")]
WORKLOADS = {
    "triton-persistent": Workload(
        partial(_step, module="persistent_step", B=128), _STEP, "step", "triton-persistent-128-{}"
    ),
    "triton-step": Workload(partial(_step, module="train_step", B=128), _STEP, "step", "triton-step-128-{}"),
    "triton-step-by-rows": Workload(
        partial(_step, module="train_step", B=1024), step_cost(SHAPE, 1024, "table"), "", ""
    ),
    "evaluation": Workload(
        partial(_evaluation, B=128), evaluation_cost(SHAPE, _WINDOWS), "evaluation", "triton-persistent"
    ),
    "adamw": _operator_workload("adamw", 128),
    **{name: _operator_workload(name, 128) for name in _WITH_BACKWARD},
    **{f"large-{name}": _operator_workload(name, LARGE_BATCH) for name in _WITH_BACKWARD},
}

"""What is counted: launches of the training step, of an evaluation and of the operators, run in the emulator.

The emulator stays in tests/gpuless: it is an instrument of the tests, in their language (findings, schedules), and what
is counted here is no more than a column of its results. Both folders exist in a checkout only, so this reaches for it.
"""

import dataclasses
import functools
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine_code
from bench.execution import Launch, phase_of
from bench.gpus import Gpu
from bench.lower_bound import Cost, evaluation_cost, operator_cost, step_cost
from bench.operators import FUSED, OPERATORS
from bench.rungs import on_kernels
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.model.mlp import PARAMETER_NAMES, Shape, initial_parameters
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows, evaluated_windows

EMULATOR = Path(__file__).resolve().parent.parent / "tests" / "gpuless"
SHAPE = Shape(V=27, T=3, E=48, H=512)
V, T, E, H = SHAPE.V, SHAPE.T, SHAPE.E, SHAPE.H
LARGE_B = 65536


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
    """What program 0 of an emulated launch executes, less what it does in another launch of the same kernel."""
    program, kernel = result.program, result.shipped.kernel.fn.__name__
    counts: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    phases: dict[int, str] = {}
    warps, arrivals, looks, waiting = result.threads // 32, 0.0, 1.0, False
    for n, line in enumerate(program.ptx_lines):
        phases[line] = phase_of(program.lines[n], kernel)
        more = {
            name: getattr(result.counts[n], name) - (getattr(less.counts[n], name) if less else 0)
            for name in ("executions", "lanes", "wavefronts_low", "wavefronts_high", "sectors")
        }
        # How long a program spins says nothing of its own work: it is taken to look once, and what runs at some looks
        # only, such as reading the clock, is a share of that. One warp looks, but all of them wait for it.
        if program.texts[n].startswith("red.release"):
            arrivals = more["executions"]
        elif program.texts[n].startswith("ld.acquire"):
            looks, waiting = max(more["executions"] / arrivals, 1.0), True
        elif program.texts[n].startswith("bar.sync"):
            looks, waiting = 1.0, False
        for name, count in more.items():
            counts[line][name] += count / looks * (warps if waiting and name == "executions" else 1)
    made = machine_code.compiled(result.shipped, capability)
    return Launch(
        kernel, warps, result.blocks, result.footprint, made.code, made.registers, made.shared, counts, phases
    )


def _launches(gpu: Gpu, run: Callable[[], object]) -> list[Launch]:
    """All launches of `run`, of which one program each is emulated."""
    return [launch_of(result, gpu.sm) for result in emulated(gpu.sm, run, programs=1)]


def _step(gpu: Gpu, precision: str, B: int, module: str, **changes: Any) -> list[Launch]:
    """A training step in the middle of a run."""
    kernels = importlib.import_module(f"mlp_fast.kernels.{module}")
    persistent = module == "persistent_step"
    options = {"capability": gpu.sm} if persistent else {}
    C = kernels.default_config(B, V, T, E, H, precision=precision, processors=gpu.processors, **options)
    C = dataclasses.replace(C, **changes)
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


def _evaluation(gpu: Gpu, precision: str, B: int) -> list[Launch]:
    """The mean loss of the embedded corpus' val split."""
    from mlp_fast.kernels import inference

    weights = inference.Weights(*initial_parameters(SHAPE, seed=7).values())
    windows = _evaluated(B)
    finished = torch.zeros(1, dtype=torch.int32)
    return _launches(
        gpu, lambda: inference.mean_loss(weights, windows.rows, windows.counts, finished, precision=precision)
    )


def _evaluated(B: int) -> WeightedWindows:
    return evaluated_windows(Tape(load("embedded").val, T), B)


def _operator(gpu: Gpu, precision: str, B: int, name: str) -> list[Launch]:
    """One of operators.OPERATORS, by its kernels."""
    config = Config(batch_size=B, precision=precision, device="cpu")
    with on_kernels():
        return _launches(gpu, OPERATORS[name](config, torch.device("cpu"), torch.float32, FUSED))


class Workload(NamedTuple):
    """What is counted together.

    cost: what it asks for at the least.
    group, id: of its entries in recordings; the id with the precision in it.
    """

    name: str
    B: int
    launches: Callable[[Gpu, str, int], list[Launch]]
    cost: Cost
    group: str
    id: str = "{name}-{B}-{precision}"

    def id_of(self, precision: str) -> str:
        """The id of the entry that recordings have of it in a precision."""
        return self.id.format(name=self.name, B=self.B, precision=precision)


def _of_operator(name: str, B: int, prefix: str = "") -> Workload:
    run = functools.partial(_operator, name=name)
    return Workload(prefix + name, B, run, operator_cost(name, SHAPE, B), "kernels")


_PERSISTENT = functools.partial(_step, module="persistent_step")
_BY_PHASES = functools.partial(_step, module="train_step")
_STEP = step_cost(SHAPE, 128, "table")
_EVALUATION = evaluation_cost(SHAPE, len(_evaluated(128).rows))
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("triton-persistent", 128, _PERSISTENT, _STEP, "step"),
        Workload("triton-step", 128, _BY_PHASES, _STEP, "step"),
        Workload("triton-step-by-rows", 1024, _BY_PHASES, step_cost(SHAPE, 1024, "table"), ""),
        Workload("evaluation", 128, _evaluation, _EVALUATION, "evaluation", "triton-persistent"),
        _of_operator("adamw", 128),
        *(
            _of_operator(name, B, prefix)
            for prefix, B in (("", 128), ("large-", LARGE_B))
            for name in OPERATORS
            if name.endswith("-and-backward")
        ),
    )
}

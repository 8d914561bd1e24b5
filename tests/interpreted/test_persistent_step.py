"""The persistent kernel: on a GPU where there is one; else in Triton's interpreter, one program, and several at the
same time, each in its process.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from programs import Experiment, Programs
from steps import DEVICE, Problem, Reference, problem
from torch import Tensor

from mlp_fast import backends
from mlp_fast.errors import UserError
from mlp_fast.kernels import _barrier, train_step
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.kernels.persistent_step import BarrierTimeout, PersistentStep, wrapped
from mlp_fast.kernels.train_step import StepConfig, TrainStep
from mlp_fast.model.schedule import update_scalars

SIZES = (16, 5, 2, 4, 48)  # B, V, T, E, H
GROUPED = (40, 5, 2, 40, 48)  # rows and columns for three programs of a tile
PROGRAMS = 3


interpreted = pytest.mark.skipif(not interpreting(), reason="it takes hold of Triton's interpreter")


def config(task: Problem, **changes: Any) -> StepConfig:
    shape = task.shape
    sizes = (task.config.batch_size, shape.V, shape.T, shape.E, shape.H)
    return replace(train_step.default_config(*sizes), **changes)


def loaded(cls: type[TrainStep], task: Problem, C: StepConfig) -> Any:
    """A launcher at the problem's state, the rest of its buffers filled with NaN or garbage."""
    kernels = cls(C, task.tape.tokens.to(DEVICE), update_scalars(task.config))
    for name, buffer in kernels.buffers._asdict().items():
        if name not in ("tape", "scalars"):
            buffer.fill_(float("nan") if buffer.is_floating_point() else -123456789)
    kernels.load(task.planes, task.state.step)
    return kernels


def results(kernels: TrainStep, steps: int) -> list[Tensor]:
    """Losses, parameters and moments, and every replica of wte."""
    tensors = [tensor for plane in kernels.planes() for tensor in plane]
    return [kernels.buffers.losses[:steps], kernels.buffers.replicas, kernels.buffers.clock[:1], *tensors]


def same_bits(a: TrainStep, b: TrainStep, steps: int) -> bool:
    return all(map(torch.equal, results(a, steps), results(b, steps)))


@pytest.mark.parametrize("rows", [False, True], ids=["redundant", "rows"])
def test_one_program_does_what_the_step_kernels_do_to_the_bit(rows: bool) -> None:
    task = problem(*SIZES, n=40)
    C = config(task, rows=rows)
    step, persistent = loaded(TrainStep, task, C), loaded(PersistentStep, task, C)
    step.run(5)
    persistent.run(2)
    persistent.run(0)
    persistent.run(3)
    persistent.wait()
    assert same_bits(step, persistent, 5)


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [((128, 27, 3, 48, 512), 2), ((19, 29, 2, 13, 37), 50), ((1, 1, 1, 1, 1), 3)],
)
def test_steps_follow_float64(sizes: tuple[int, int, int, int, int], steps: int) -> None:
    task = problem(*sizes, n=50)
    reference, kernels = Reference(task), loaded(PersistentStep, task, config(task))
    losses = reference.advance(steps)
    kernels.run(1)
    kernels.run(steps - 1)
    torch.testing.assert_close(kernels.buffers.losses[:steps].double().cpu(), losses, rtol=0, atol=2e-6)
    reference.check(kernels.planes())


@interpreted
def test_a_hundred_steps_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    executor = triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", counted)
    task = problem(2, 2, 1, 1, 2, n=9)
    kernels = loaded(PersistentStep, task, config(task))
    kernels.run(100)
    assert names == ["persistent_kernel"]
    assert kernels.launches == 1
    assert kernels.buffers.losses.isfinite().all()


# --- several programs at the same time -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    started = Programs(PROGRAMS)
    yield started
    started.close()


def concurrently(
    programs: Programs, experiment: Experiment, rows: bool, steps: int, arrivals: int = 0, groups: int = 1
) -> bool:
    """Whether the programs, run at the same time, end with the bits of the step kernels.

    `arrivals` is what the barrier's counter shows before; `groups` are those of rows, one program for each or one.
    """
    task = problem(*(SIZES if groups == 1 else GROUPED), n=40)
    G = PROGRAMS // groups
    C = config(task, rows=rows, G=G, R=groups, BLOCK_H=16 if G > 1 else 64, BLOCK_B=16)
    assert not rows or C.B > (PROGRAMS - 1) * C.BLOCK_R, "a program without rows would never be late"
    step, persistent = loaded(TrainStep, task, C), loaded(PersistentStep, task, C)
    persistent._arrivals = arrivals
    persistent.counter.fill_(arrivals)
    step.run(steps)
    programs.run(persistent, steps, experiment)
    return same_bits(step, persistent, steps)


@interpreted
@pytest.mark.parametrize(
    ("rows", "longest", "groups"),
    [
        (False, 0.0, 1),
        (False, 0.05, 1),
        (True, 0.05, 1),
        (False, 0.05, PROGRAMS),
        (True, 0.05, PROGRAMS),
    ],
)
def test_concurrent_programs_agree_with_the_step_kernels_to_the_bit(
    programs: Programs, rows: bool, longest: float, groups: int
) -> None:
    assert concurrently(programs, Experiment(late="all", longest=longest), rows, steps=4, groups=groups)


@interpreted
@pytest.mark.parametrize("change", ["removed", "moved"])
@pytest.mark.parametrize(
    ("rows", "phase", "groups"),
    [
        (False, "forward_phase", 1),
        (False, "update_phase", 1),
        (True, "forward_phase", 1),
        (True, "softmax_phase", 1),
        (True, "update_phase", 1),
        (False, "gradient_phase", PROGRAMS),
    ],
)
def test_a_barrier_taken_out_or_moved_is_noticed(
    programs: Programs, change: str, rows: bool, phase: str, groups: int
) -> None:
    experiment = Experiment(late=phase, longest=20.0, **{change: phase})
    assert not concurrently(programs, experiment, rows, steps=2, groups=groups)


# --- the barrier ------------------------------------------------------------------------------------------------------


@interpreted
def test_a_program_that_never_comes_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_barrier, "INTERPRETED_LOOKS", 20)
    task = problem(*SIZES, n=40)
    C = config(task, G=2, BLOCK_H=32)
    kernels = loaded(PersistentStep, task, C)
    kernels._launch(2, first_program=0, programs=1)
    with pytest.raises(BarrierTimeout, match="void"):
        kernels.wait()
    kernels.wait()  # the error is told once, and the words are fresh again
    assert kernels.counter.item() == kernels.error.item() == 0


@interpreted
def test_the_counter_may_wrap(programs: Programs) -> None:
    """Between two launches and within one, with programs that do wait for each other."""
    task = problem(*SIZES, n=40)
    kernels = loaded(PersistentStep, task, config(task, G=1, BLOCK_H=64))
    kernels._arrivals = 2**31 - 3
    kernels.counter.fill_(kernels._arrivals)
    kernels.run(3)
    kernels.wait()
    assert kernels.counter.item() == kernels._arrivals == wrapped(2**31 + 3) < 0
    late = Experiment(late="all", longest=0.05)
    assert concurrently(programs, late, rows=False, steps=2, arrivals=2**31 - 1 - 2 * PROGRAMS)


@pytest.mark.cuda
@pytest.mark.skipif(interpreting(), reason="no CUDA device was found")
def test_the_spin_on_the_gpu_ends_too() -> None:
    """One of two programs is launched: its inline PTX gives up after TIMEOUT_NS, and says so."""
    task = problem(*SIZES, n=40)
    kernels = loaded(PersistentStep, task, config(task, G=2, BLOCK_H=32))
    kernels._launch(1, first_program=0, programs=1)
    with pytest.raises(BarrierTimeout, match="void"):
        kernels.wait()


def test_a_time_out_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem(*SIZES, n=40)
    config = replace(task.config, backend="triton-persistent", interpret=interpreting())
    backend = backends.create(config, task.shape, task.tape, task.state)
    backend.kernels.error.fill_(1)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"--backend triton-persistent: .* void; go on from a checkpoint"):
        backend.synchronize()

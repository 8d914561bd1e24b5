"""Programs of the persistent kernel as processes: each interprets a grid of one over tensors in shared memory.

Triton's interpreter runs the programs of a grid one after another; here they run at the same time, so that what the
grid barrier is there for really happens. A test hook takes a barrier out or moves it, and makes the last program so
late that whoever should have waited for it has not.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from prepared_once import prepare_once
from torch import Tensor

from mlp_fast.kernels.persistent_step import PersistentStep

PHASES = ("forward_phase", "softmax_phase", "gradient_phase", "update_phase", "embedding_phase")


@dataclass(frozen=True)
class Experiment:
    """What the processes do to the kernel.

    Attributes:
        removed: the barrier after this phase is left out.
        moved: the barrier after this phase is passed before it instead.
        late: before this phase, or before each if it is "all", the last program waits until the others have ended that
            phase and the next one, or for `longest` seconds: with the barriers in place they cannot.
    """

    removed: str | None = None
    moved: str | None = None
    late: str | None = None
    longest: float = 0.0


class Programs:
    """Processes, kept over several experiments as they take seconds to start."""

    def __init__(self, count: int) -> None:
        context = mp.get_context("spawn")
        self.count = count
        self.ended = torch.zeros(count, dtype=torch.int64).share_memory_()  # phases, by program
        self.tasks = [context.Queue() for _ in range(count)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(rank, self.ended, self.tasks[rank], self.answers), daemon=True)
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def run(self, kernels: PersistentStep, steps: int, experiment: Experiment) -> None:
        """One launch, program by program; returns when all have ended."""
        self.ended.zero_()
        for tensor in (*kernels.buffers, kernels.counter, kernels.error):
            tensor.share_memory_()
        for tasks in self.tasks:
            tasks.put((kernels, steps, experiment))
        for _ in range(self.count):
            failure = self.answers.get(timeout=300)
            if failure is not None:
                raise AssertionError(f"a program failed:\n{failure}")

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _work(rank: int, ended: Tensor, tasks: Any, answers: Any) -> None:
    """A process: launches the program of its number, task by task."""
    torch.set_num_threads(1)
    prepare_once()
    from triton.runtime.interpreter import GridExecutor

    # The interpreter ends a launch by copying its arguments back, here onto themselves, under the others' hands.
    GridExecutor._restore_args_dev = lambda *_: None
    while (task := tasks.get()) is not None:
        kernels, steps, experiment = task
        try:
            with Sabotage(rank, ended, kernels, experiment) as watched:
                kernels._launch(steps, first_program=rank, programs=1)
            watched.check_rounds(steps)
            answers.put(None)
        except Exception:
            answers.put(traceback.format_exc())
        del task, kernels


class Sabotage:
    """Within it the kernel's phases are counted and delayed, and a barrier left out or moved, as an experiment says."""

    def __init__(self, rank: int, ended: Tensor, kernels: PersistentStep, experiment: Experiment) -> None:
        from mlp_fast.kernels import persistent_step

        self.module, self.experiment, self.kernels = persistent_step, experiment, kernels
        self.rank, self.ended = rank, ended
        self.rounds = 0

    def __enter__(self) -> "Sabotage":
        self.genuine: dict[str, Callable[..., Any]] = {name: getattr(self.module, name) for name in PHASES}
        self.pass_barrier = self.module.grid_barrier
        for name in PHASES:
            setattr(self.module, name, self._watched(name))
        self.module.grid_barrier = self._barrier
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self.genuine.items():
            setattr(self.module, name, function)
        self.module.grid_barrier = self.pass_barrier

    def _watched(self, name: str) -> Callable[..., Any]:
        def phase(*arguments: Any) -> Any:
            if name == self.experiment.moved:
                self._pass()
            if self.rank == len(self.ended) - 1 and self.experiment.late in (name, "all"):
                self._dawdle()
            result = self.genuine[name](*arguments)
            self.ended[self.rank] += 1
            self.last = name
            return result

        return phase

    def _dawdle(self) -> None:
        end = time.monotonic() + self.experiment.longest
        goal = self.ended[self.rank].item() + 2
        while time.monotonic() < end and self.ended[:-1].min().item() < goal:
            time.sleep(0.001)

    @property
    def _intact(self) -> bool:
        return self.experiment.removed is None and self.experiment.moved is None

    def _barrier(self, *arguments: Any) -> None:
        if self._intact:
            # The kernel counts for itself, and a barrier whose count lags behind would let everyone through.
            self.rounds += 1
            assert int(arguments[2].handle.data.item()) == self._arrivals(), "the kernel waits for another count"
            self.pass_barrier(*arguments)
        elif self.last not in (self.experiment.removed, self.experiment.moved):
            self._pass()

    def _pass(self) -> None:
        """The genuine barrier; rounds are counted here, as those that are left out do not count."""
        import triton.language as tl
        from triton.runtime.interpreter import _implicit_cvt

        self.rounds += 1
        words = (_implicit_cvt(self.kernels.counter), _implicit_cvt(self.kernels.error))
        self.pass_barrier(*words, tl.full((), self._arrivals(), tl.int32))

    def _arrivals(self) -> int:
        """What the counter shows once all programs have come to the barrier of this round."""
        return self.module.wrapped(self.kernels._arrivals + self.rounds * self.kernels.config.PROGRAMS)

    def check_rounds(self, steps: int) -> None:
        """After a launch whose barriers were left alone: there were as many as the step has."""
        expected = steps * self.kernels.config.exchanges
        assert not self._intact or self.rounds == expected, f"{self.rounds} barriers, not {expected}"

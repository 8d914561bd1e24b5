"""Many training steps in one launch: the phases of train_step.py with a grid barrier between them.

    for every step      h -> partial logits                                                   barrier
                        [softmax by rows                                                      barrier]
                        softmax -> dpre -> dW2, db1, dtable by groups of rows        [barrier if R > 1]
                        dW2, db2, db1, dW1 -> AdamW -> partial dwte                           barrier
                        wte update

A barrier takes the place of a kernel's end, so the data flow is that of train_step.py. The launch is cooperative: all
programs run at the same time, or it fails.

The kernel takes the number of its first program beside tl.program_id, and the number of programs from its
configuration. So N processes that each interpret a grid of one, over tensors in shared memory, run it as N programs do,
concurrently.
"""

from dataclasses import replace
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import train_step
from ._barrier import BarrierTimeout, grid_barrier
from ._runtime import MAX_REGISTERS, interpreting
from .train_step import (
    DEFAULT_PROGRAMS,
    StepConfig,
    TrainStep,
    embedding_phase,
    forward_phase,
    gradient_phase,
    softmax_phase,
    update_phase,
    window_of_step,
    window_starts,
)


@triton.jit(do_not_specialize=["num_windows", "arrivals", "first_program", "steps"])
def persistent_kernel(buf, counter_ptr, error_ptr, num_windows, arrivals, first_program, steps, C: tl.constexpr):
    """`steps` steps, at least 1. `arrivals` is what the barrier's counter shows before the launch."""
    p = first_program + tl.program_id(0)
    first = tl.load(buf.clock)
    window = window_of_step(first, num_windows, C)
    for i in range(steps):
        s = first + i
        forward_phase(p, s, buf, window, num_windows, C)
        arrivals += C.PROGRAMS
        grid_barrier(counter_ptr, error_ptr, arrivals)
        if C.rows:
            softmax_phase(p, s, buf, window, num_windows, C)
            arrivals += C.PROGRAMS
            grid_barrier(counter_ptr, error_ptr, arrivals)
        gradient_phase(p, s, buf, window, num_windows, C)
        if C.R > 1:
            arrivals += C.PROGRAMS
            grid_barrier(counter_ptr, error_ptr, arrivals)
        update_phase(p, s, buf, C)
        arrivals += C.PROGRAMS
        grid_barrier(counter_ptr, error_ptr, arrivals)
        embedding_phase(p, s, buf, C)
        window = window_starts(window, C.B, num_windows, C)
    if p == 0:
        # Every program has read the clock: it has passed a barrier since.
        tl.store(buf.clock, first + steps)


# --- launchers -----------------------------------------------------------------------------------------------------


def default_config(
    B: int, V: int, T: int, E: int, H: int, *, precision: str = "fp32", deterministic: bool = True,
    capability: int = 80, processors: int = DEFAULT_PROGRAMS,
) -> StepConfig:  # fmt: skip
    """train_step.default_config() for a device, with blocks that keep all phases, which are one kernel, in registers.

    Args:
        capability: the device's compute capability, 90 for sm_90.
        processors: its multiprocessors: each holds one program, and all have to run at the same time.
    """
    config = train_step.default_config(
        B, V, T, E, H, precision=precision, deterministic=deterministic, processors=processors
    )
    if interpreting():
        return config
    fp32 = config.precision == "ieee"
    config = replace(config, BLOCK_E=16)
    if capability >= 100:  # whose code takes more registers
        block_v = 16 if V <= 32 and not fp32 else config.BLOCK_V
        return replace(config, BLOCK_B=16, BLOCK_V=block_v, ahead=config.ahead and fp32)
    if config.BLOCK_B > 32:
        return replace(config, BLOCK_B=config.BLOCK_B if fp32 else 16, ahead=False)
    return config


class PersistentStep(TrainStep):
    """TrainStep in one launch per run(); see there."""

    def __init__(self, config: StepConfig, tape: Tensor, scalars: Tensor) -> None:
        super().__init__(config, tape, scalars)
        self.counter = tape.new_zeros(1, dtype=self.buffers.fault.dtype)
        self.error = tape.new_zeros(1, dtype=self.buffers.fault.dtype)
        self._arrivals = 0  # what the counter shows when no kernel runs, modulo 2^32

    def run(self, steps: int) -> None:
        """Enqueues one launch of so many steps; wait() tells whether it came through."""
        if steps < 1:
            return
        C = self.config
        self._launch(steps, first_program=0, programs=C.PROGRAMS)
        self._arrivals = wrapped(self._arrivals + steps * C.PROGRAMS * C.exchanges)
        self.launches += 1

    def _launch(self, steps: int, first_program: int, programs: int) -> None:
        persistent_kernel[(programs,)](
            self.buffers, self.counter, self.error, self.num_windows, self._arrivals, first_program, steps, self.config,
            num_warps=self.config.num_warps, maxnreg=MAX_REGISTERS, num_stages=1, launch_cooperative_grid=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Waits for the launches so far.

        Raises:
            BarrierTimeout: one of them gave up waiting; parameters, moments and losses are void until the next load().
        """
        if self.error.item():
            self.counter.zero_()
            self.error.zero_()
            self._arrivals = 0
            raise BarrierTimeout(
                "programs of the persistent kernel waited for each other too long; its results are void"
            )


def wrapped(count: int) -> int:
    """A count as the int32 that it wraps to."""
    return (count + 2**31) % 2**32 - 2**31


def shipped():
    """See _aot."""
    yield from train_step.shipped_launches(
        PersistentStep,
        lambda capability, processors: partial(default_config, capability=capability, processors=processors),
    )

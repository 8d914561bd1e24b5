"""Many training steps in one launch: the phases of train_step.py with a grid barrier between them.

    for every step      h -> partial logits                                                   barrier
                        [softmax by rows                                                      barrier]
                        softmax -> dpre -> dW2, db1, dtable by groups of rows        [barrier if R > 1]
                        dW2, db2, db1, dW1 -> AdamW -> partial dwte                           barrier
                        wte update

A barrier takes the place of a kernel's end, so the data flow is that of train_step.py. The launch is cooperative: all
programs run at the same time, or it fails.

Two forms:

    through L2   persistent_kernel    the phases of train_step.py as they are, to the bit
    resident     resident_kernel      one tile of units a program; its wte, W1, b1, W2 and their moments stay in
                                      registers from the first step to the last. The products still load weights from
                                      memory, in layouts of their own, so AdamW stores them; it loads nothing.

The kernel takes the number of its first program beside tl.program_id, and the number of programs from its
configuration. So N processes that each interpret a grid of one, over tensors in shared memory, run it as N programs do,
concurrently.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import train_step
from ._barrier import BarrierTimeout, grid_barrier
from ._runtime import MAX_REGISTERS, interpreting
from .train_step import (
    DEFAULT_PROGRAMS,
    MAX_GROUPS,
    StepConfig,
    TrainStep,
    adamw_of,
    add_dwte,
    clear_sum,
    embedding_phase,
    forward_phase,
    gradient_phase,
    hidden_bias_gradient,
    load_replica,
    load_three,
    load_w1,
    output_bias_phase,
    output_weight_gradient,
    softmax_phase,
    store_moments,
    store_replica_moments,
    store_w1_moments,
    update_phase,
    update_replica,
    update_w1,
    window_of_step,
    window_starts,
    zero_of_step,
)

RESIDENT_UNITS = 16  # hidden units of a program in the resident form


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


# --- the resident form: what AdamW needs of a program's share stays in registers from the first step to the last ---


class Share(NamedTuple):
    """Which parameters a program owns: the hidden units of one tile. Embedding and vocabulary are padded."""

    unit: tl.tensor  # (BLOCK_H,)
    in_b1: tl.tensor
    e: tl.tensor  # (SHARE_E,)
    v: tl.tensor  # (SHARE_VP,)
    w2: tl.tensor  # offsets (v, BLOCK_H)
    in_w2: tl.tensor


@triton.jit
def share_of(p, s, C: tl.constexpr):
    """The share of program p."""
    zero = zero_of_step(s)
    unit = p // C.R * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
    e, v = zero + tl.arange(0, C.SHARE_E), zero + tl.arange(0, C.SHARE_VP)
    in_v = (v < C.SHARE_V) & (p % C.R * C.SHARE_V + v < C.V)
    e, v = p % C.R * C.SHARE_E + e, p % C.R * C.SHARE_V + v
    return Share(
        unit,
        (unit < C.H) & (p % C.R == 0),
        e,
        v,
        v[:, None] * C.H + unit[None, :],
        in_v[:, None] & (unit[None, :] < C.H),
    )


@triton.jit
def resident_update(p, s, buf, w1, b1, w2, C: tl.constexpr):
    """update_phase with the program's weights and moments in registers; returns them."""
    if p == C.R - 1:
        output_bias_phase(s, buf, C)
    own, scalars = share_of(p, s, C), buf.scalars + 3 * s
    db1 = hidden_bias_gradient(own.unit, buf, C)
    b1 = adamw_of(b1, db1, buf.state + C.B1_OFFSET, own.unit, own.in_b1, scalars)
    dw2 = output_weight_gradient(own.v, own.unit, buf, C)
    w2 = adamw_of(w2, dw2, buf.state + C.W2_OFFSET, own.w2, own.in_w2, scalars)
    tl.store(buf.w2t + own.unit[None, :] * C.V + own.v[:, None], w2[0], mask=own.in_w2)
    dwte = tl.full((C.BLOCK_V, C.SHARE_E), 0.0, tl.float32)
    w1, dwte = update_w1(w1, dwte, 0, own.unit, own.e, p, s, buf, C, C.T)
    if p % C.R * C.SHARE_E < C.E:
        add_dwte(dwte, own.e, s, buf, C)
    clear_sum(p, buf.dwte + ((s + 1) % 2) * (C.V * C.E), C.V * C.E, C)
    return w1, b1, w2


@triton.jit
def resident_embedding(wte, p, s, buf, C: tl.constexpr):
    """embedding_phase with the program's replica of wte and its moments in registers; returns them."""
    wte = update_replica(wte, 0, p, s, buf, C, C.PIECES)
    tl.debug_barrier()  # the products read what other threads of the program wrote
    return wte


@triton.jit(do_not_specialize=["num_windows", "arrivals", "first_program", "steps"])
def resident_kernel(buf, counter_ptr, error_ptr, num_windows, arrivals, first_program, steps, C: tl.constexpr):
    """persistent_kernel for one tile per program, its weights and moments in registers."""
    p = first_program + tl.program_id(0)
    first = tl.load(buf.clock)
    own = share_of(p, first, C)
    w1 = load_w1(0, own.unit, own.e, buf, C, C.T)
    b1 = load_three(buf.state + C.B1_OFFSET, C.PLANE, own.unit, own.in_b1)
    w2 = load_three(buf.state + C.W2_OFFSET, C.PLANE, own.w2, own.in_w2)
    wte = load_replica(0, p, first, buf, C, C.PIECES)
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
        w1, b1, w2 = resident_update(p, s, buf, w1, b1, w2, C)
        arrivals += C.PROGRAMS
        grid_barrier(counter_ptr, error_ptr, arrivals)
        wte = resident_embedding(wte, p, s, buf, C)
        window = window_starts(window, C.B, num_windows, C)
    own = share_of(p, first + steps, C)
    store_w1_moments(w1, 0, own.unit, own.e, buf, C, C.T)
    store_moments(b1, buf.state + C.B1_OFFSET, C.PLANE, own.unit, own.in_b1)
    store_moments(w2, buf.state + C.W2_OFFSET, C.PLANE, own.w2, own.in_w2)
    store_replica_moments(wte, 0, p, first + steps, buf, C, C.PIECES)
    if p == 0:
        tl.store(buf.clock, first + steps)


# --- launchers -----------------------------------------------------------------------------------------------------


def default_config(
    B: int, V: int, T: int, E: int, H: int, *, precision: str = "fp32", deterministic: bool = True,
    capability: int = 80, processors: int = DEFAULT_PROGRAMS,
) -> StepConfig:  # fmt: skip
    """train_step.default_config() for a device, resident where that is quicker and its machine code spills no register.

    That is so for one tile per program in four groups of few rows, V to 32, T to 3 and E to 64, with deterministic sums
    and fp32, on sm_75 to sm_90. With fewer groups a program has more of W1; code for sm_100 and sm_120 takes more
    registers, as do operands of tensor cores. The interpreter, which runs programs one after another, gets one.

    Args:
        capability: the device's compute capability, 90 for sm_90.
        processors: its multiprocessors: each holds one program, and all have to run at the same time.
    """
    config = train_step.default_config(
        B, V, T, E, H, precision=precision, deterministic=deterministic, processors=processors
    )
    fits = config.VP <= 32 and T <= 3 and config.EP <= 64 and deterministic and H <= RESIDENT_UNITS * DEFAULT_PROGRAMS
    fits = fits and config.TILES == config.G and capability < 100
    if interpreting():
        return replace(config, resident=fits)
    fp32 = config.precision == "ieee"
    config = replace(config, resident=fits and config.one_pass and config.R == MAX_GROUPS and fp32, BLOCK_E=16)
    # What follows keeps within the registers: all phases are one kernel.
    if capability >= 100:
        config = replace(config, BLOCK_B=16, BLOCK_V=16 if V <= 32 and not fp32 else config.BLOCK_V, ahead=fp32)
    elif config.BLOCK_B > 32:
        config = replace(config, BLOCK_B=config.BLOCK_B if fp32 else 16, ahead=False)
    return config


class PersistentStep(TrainStep):
    """TrainStep in one launch per run(); see there.

    Raises:
        ValueError: as TrainStep, and for a resident form whose programs are not as many as its tiles, or whose blocks
            do not hold the vocabulary.
    """

    def __init__(self, config: StepConfig, tape: Tensor, scalars: Tensor) -> None:
        if config.resident and config.TILES != config.G:
            raise ValueError(
                f"the resident form takes one tile of hidden units a program (got {config.TILES} tiles and "
                f"{config.G} programs)"
            )
        if config.resident and not config.whole:
            raise ValueError(
                f"the resident form takes the vocabulary in one block (got blocks of {config.BLOCK_V} and a vocabulary "
                f"of {config.V})"
            )
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
        kernel = resident_kernel if self.config.resident else persistent_kernel
        kernel[(programs,)](
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

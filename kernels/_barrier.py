"""A barrier for all programs of a grid, for kernels whose programs are all resident at once.

Every program adds 1 to a counter in global memory and waits until the counter has reached G times the number of the
round. The counter only grows (it may wrap: the comparison is of the signed difference), so there is no second phase
that resets it and no race between a slow program of one round and a fast one of the next.

On the GPU one thread of each program does this in inline PTX, because Triton's own loads cannot: a spin on a plain
load may be hoisted out of its loop, and a volatile one does not acquire.

    every thread    writes its results                      plain stores and atomics
    bar.sync        (debug_barrier)                         orders them before thread 0's release
    thread 0        red.release.gpu  counter += 1           publishes them: a release is cumulative
                    ld.acquire.gpu   counter, in a loop     sees what the others published; drops stale L1 lines
    bar.sync        (debug_barrier)                         orders that before every thread's later loads

The clock is read at every 256th look only: most programs wait for less, and reading it takes time.

A program that waits longer than TIMEOUT_NS sets the error word and goes on; whoever still waits sees the word and goes
on too, and so does everybody at the barriers after it. So a hang becomes a kernel that ends soon, with garbage, and the
launcher raises an error (BarrierTimeout).

In Triton's interpreter, where inline assembly does not run, the same protocol is written with atomics. It runs the
programs of a grid one after another, so there a grid may have one program only; several processes that interpret one
program each over shared memory can use the barrier among them.
"""

import triton
import triton.language as tl

from ._math import INTERPRETED

TIMEOUT_NS: tl.constexpr = tl.constexpr(10_000_000_000)
INTERPRETED_LOOKS: tl.constexpr = tl.constexpr(300_000)  # the interpreter has no clock: looks at the counter, a minute

# $0 unused result; $1 counter, $2 error word, $3 the count to wait for, $4 time-out in ns
_ARRIVE_AND_WAIT: tl.constexpr = tl.constexpr(
    """{
    .reg .pred %done, %waited;
    .reg .b32 %thread, %count, %looks;
    .reg .b64 %start, %now;
    mov.u32 $0, 0;
    mov.u32 %thread, %tid.x;
    setp.ne.u32 %done, %thread, 0;
    @%done bra DONE;
    red.release.gpu.global.add.u32 [$1], 1;
    mov.u64 %start, 0;
    mov.u32 %looks, 0;
SPIN:
    ld.acquire.gpu.global.u32 %count, [$1];
    sub.s32 %count, %count, $3;
    setp.ge.s32 %done, %count, 0;
    @%done bra DONE;
    add.u32 %looks, %looks, 1;
    and.b32 %count, %looks, 255;
    setp.ne.u32 %waited, %count, 0;
    @%waited bra SPIN;
    ld.relaxed.gpu.global.u32 %count, [$2];
    setp.ne.u32 %done, %count, 0;
    @%done bra DONE;
    mov.u64 %now, %globaltimer;
    setp.eq.u64 %waited, %start, 0;
    @%waited mov.u64 %start, %now;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %waited, %now, $4;
    @%waited bra SPIN;
    st.relaxed.gpu.global.u32 [$2], 1;
DONE:
}"""
)


class BarrierTimeout(RuntimeError):
    """Programs waited for each other in vain; what the kernel computed is void."""


@triton.jit
def grid_barrier(counter_ptr, error_ptr, arrivals):
    """Waits until every program has come here.

    Args:
        counter_ptr, error_ptr: int32 words in global memory.
        arrivals: int32, what the counter shows once all have arrived: its value before the launch plus
            G * (number of this barrier within the launch, from 1).
    """
    if INTERPRETED:
        tl.atomic_add(counter_ptr, 1, sem="release")
        looks = 0
        waiting = tl.atomic_add(counter_ptr, 0, sem="acquire") - arrivals < 0
        while waiting:
            looks += 1
            if looks > INTERPRETED_LOOKS:
                tl.store(error_ptr, 1)
            missing = tl.atomic_add(counter_ptr, 0, sem="acquire") - arrivals < 0
            waiting = missing & (tl.atomic_add(error_ptr, 0, sem="acquire") == 0)
    else:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            _ARRIVE_AND_WAIT,
            "=r,l,l,r,l",
            [counter_ptr, error_ptr, arrivals, tl.full((), TIMEOUT_NS, tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()

"""`pytest bench/test_barrier.py`: a litmus test of the grid barrier, whose cost is a probe. Needs a GPU.

Litmus: in every round each program writes a block of numbers by plain stores, passes the barrier, and reads the blocks
of all others by plain loads. A store that was not published, or a load that hit a stale line, shows as a wrong number.
The same kernel without the barrier must show wrong numbers, or the test would prove nothing.

In Triton's interpreter (TRITON_INTERPRET=1) the litmus test runs with one program, as a check of the kernel itself.
"""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mlp_fast.kernels._barrier import grid_barrier  # noqa: E402
from mlp_fast.kernels._runtime import interpreting  # noqa: E402

LANES = 1024  # numbers that a program writes
ROUNDS = 20_000

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="no CUDA device was found")


@triton.jit(do_not_specialize=["rounds"])
def litmus_kernel(  # type: ignore[no-untyped-def]
    data_ptr, wrong_ptr, counter_ptr, error_ptr, rounds, G: tl.constexpr, LANES: tl.constexpr, BARRIER: tl.constexpr
):
    """Counts in wrong_ptr the numbers that were not those of the round."""
    p = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    # Counted in registers: an atomic in the loop would itself refresh the L1 cache.
    wrong = tl.zeros((LANES,), tl.int32)
    for i in range(rounds):
        tl.store(data_ptr + p * LANES + lanes, i * G + p + lanes)
        if BARRIER:
            grid_barrier(counter_ptr, error_ptr, (2 * i + 1) * G)
        for q in range(G):
            seen = tl.load(data_ptr + q * LANES + lanes)
            wrong += (seen != i * G + q + lanes).to(tl.int32)
        if BARRIER:  # no program writes the next round's numbers before all have read this round's
            grid_barrier(counter_ptr, error_ptr, (2 * i + 2) * G)
    tl.atomic_add(wrong_ptr, tl.sum(wrong, axis=0))


def wrong_numbers(programs: int, rounds: int, device: torch.device, barrier: bool = True) -> int:
    """How many numbers were read wrong."""
    data = torch.full((programs, LANES), -1, dtype=torch.int32, device=device)
    words = torch.zeros(96, dtype=torch.int32, device=device)  # wrong, counter, error: on lines of their own
    litmus_kernel[(programs,)](
        data, words, words[32:], words[64:], rounds, G=programs, LANES=LANES, BARRIER=barrier,
        num_warps=8, num_stages=1, launch_cooperative_grid=True,
    )  # fmt: skip
    wrong, _, error = words[::32].tolist()
    assert error == 0, "a wait at the barrier timed out"
    return wrong


def programs_of(device: torch.device) -> list[int]:
    return [2, 8, 16, 32, 64, torch.cuda.get_device_properties(device).multi_processor_count]


@pytest.mark.cuda
@needs_gpu
def test_every_program_sees_every_others_numbers() -> None:
    device = torch.device("cuda")
    wrong = {programs: wrong_numbers(programs, ROUNDS, device) for programs in programs_of(device)}
    assert wrong == dict.fromkeys(programs_of(device), 0)


@pytest.mark.cuda
@needs_gpu
def test_without_the_barrier_numbers_are_wrong() -> None:
    assert wrong_numbers(32, ROUNDS, torch.device("cuda"), barrier=False) > 0


@pytest.mark.skipif(not interpreting(), reason="only in Triton's interpreter")
def test_one_program_in_the_interpreter() -> None:
    assert wrong_numbers(1, 3, torch.device("cpu")) == 0

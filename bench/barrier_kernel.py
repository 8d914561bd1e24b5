"""A kernel of grid barriers alone: its time per round is that of a barrier. Needs Triton, and a CUDA device to run."""

import torch
import triton
import triton.language as tl

from mlp_fast.kernels._barrier import grid_barrier


@triton.jit(do_not_specialize=["rounds"])
def barriers_kernel(counter_ptr, error_ptr, rounds, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """`rounds` grid barriers among G programs."""
    for i in range(rounds):
        grid_barrier(counter_ptr, error_ptr, (i + 1) * G)


def run_barriers(programs: int, rounds: int, device: torch.device) -> None:
    """Enqueues `rounds` barriers among so many programs, all resident at once."""
    words = torch.zeros(64, dtype=torch.int32, device=device)  # counter and error word, on lines of their own
    barriers_kernel[(programs,)](words, words[32:], rounds, programs, num_warps=8, launch_cooperative_grid=True)

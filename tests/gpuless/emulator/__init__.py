"""Compiled Triton kernels on a CPU: an emulator of PTX for whole grids, with a detector of data races.

    ptx.py     decodes PTX into a program
    engine/    runs it: 32 lanes at a time, blocks and warps in the order that a Schedule draws (C++)
    launch.py  lets Triton's launches run there

What it models: divergence and reconvergence of a warp's lanes; block and warp barriers; global memory seen through a
block's own L1 cache and stores that arrive late; shared memory; atomics; releases and acquires of GPU scope;
asynchronous copies; products of matrices in fragments. What it does not: ptxas, the order of instructions within a
warp, the intermediate rounding of tensor cores, time. What one block asks of the hardware, instruction by instruction,
it counts on request (engine/count.h; bench/counts.py makes tables of it).
"""

from .engine import NoCompiler, Schedule
from .launch import Emulator, Finding, Result, run
from .ptx import Program, Unsupported, decode

__all__ = ["Emulator", "Finding", "NoCompiler", "Program", "Result", "Schedule", "Unsupported", "decode", "run"]

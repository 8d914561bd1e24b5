"""GPUs by their documented rates, and the time that they take for counted work. Nothing in here was fitted.

Sources, by column:

    processors, ghz, dram, l2  NVIDIA's data sheets and architecture whitepapers (T4, A100, H100, H200, Ada); the clock
                               is the boost clock. A slice of an A100 has the shares of NVIDIA's MIG User Guide: an
                               eighth of the memory and L2, and 14 multiprocessors
    fp32 .. shuffle            CUDA C++ Programming Guide, "Arithmetic Instructions": results a clock and multiprocessor
    tf32, half                 multiply-adds a clock and multiprocessor: dense rates of the data sheets at that clock
    .._latency                 microbenchmarks: Jia et al., arXiv:1903.07486 (T4); Luo et al., arXiv:2402.13499 (others)

Assumed, for want of a document:

    - A multiprocessor has four schedulers of one instruction a clock each (whitepapers). Instructions of one kind keep
      to the rates above. A wavefront of shared memory (128 bytes) takes a clock of the pipe that shuffles use as well.
    - Between two block barriers or branches the slowest of these sets the time: issue slots, a kind of instruction,
      wavefronts, bytes from L2 (64 a clock and multiprocessor), or one warp's chain of stalls and waits.
    - Low: plain loads hit L1, and shared memory merges all lanes of a warp. High: they come from L2, and it does not.
    - A block barrier takes threads / 16 clocks (Programming Guide, __syncthreads), without the wait for the slowest.
    - A grid barrier takes at least two round trips to L2: one until earlier stores have arrived, one until the arrivals
      are seen. The end of a kernel in a captured graph takes at least 0.5 us, the launch overhead of a kernel that
      NVIDIA's "Getting Started with CUDA Graphs" measures. Either takes at most 1.3 us, which is not measured.
    - The result of an instruction that is neither arithmetic of a known latency nor a load from global memory (shared
      memory, shuffles, special functions, conversions) is there after the latency of shared memory.
    - Conversions of 32 bits and less keep to the rate of special functions.
    - Bytes that do not fit L2 come from or go to device memory once.
    - Atomics count as stores: 32 bytes a sector, no wait for each other.
"""

import math
from typing import NamedTuple

from bench.lower_bound import Cost

WAIT_US = 1.3  # at most, of a grid barrier or the end of a kernel
NODE_US = 0.5  # at least, of the end of a kernel
SCHEDULERS = 4


class Gpu(NamedTuple):
    """A GPU, or a slice of one."""

    name: str
    sm: int
    processors: int  # multiprocessors
    ghz: float
    dram: float  # GB/s
    l2: float  # MiB
    fp32: int  # from here on: results a clock and multiprocessor
    fp64: int
    integer: int
    special: int
    wide: int  # conversions from and to 64 bits
    shuffle: int
    tf32: int  # multiply-adds; 0: it has none
    half: int  # multiply-adds of 16 bits
    l1_latency: float  # clocks
    shared_latency: float
    l2_latency: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1.410, 1555, 40, 64, 32, 64, 16, 16, 32, 512, 1024, 37.9, 29.0, 261.5),
        Gpu("A100 1g", 80, 14, 1.410, 1555 / 8, 40 / 8, 64, 32, 64, 16, 16, 32, 512, 1024, 37.9, 29.0, 261.5),
        Gpu("H100", 90, 132, 1.980, 3350, 50, 128, 64, 64, 16, 16, 32, 1024, 2048, 40.7, 29.0, 263.0),
        Gpu("H200", 90, 132, 1.980, 4800, 50, 128, 64, 64, 16, 16, 32, 1024, 2048, 40.7, 29.0, 263.0),
        Gpu("T4", 75, 40, 1.590, 320, 4, 64, 2, 64, 16, 2, 32, 0, 512, 32.0, 19.0, 188.0),
        Gpu("RTX 4090", 89, 128, 2.520, 1008, 72, 128, 2, 64, 16, 2, 32, 128, 256, 43.4, 30.1, 273.0),
    )
}


class Demand(NamedTuple):
    """What a warp needs of its multiprocessor to run a segment, which has no barrier but at its end, once."""

    instructions: int
    units: dict[str, float]  # by the rate of Gpu that limits them: results or multiply-adds
    low: float  # wavefronts of shared memory, at least
    high: float  # and at most
    shuffles: int
    read: float  # bytes of loads, in whole sectors
    written: float  # bytes of stores and atomics
    ends_in_barrier: bool


def clocks(gpu: Gpu, demand: Demand, alone: float, warps: int, high: bool) -> float:
    """The clocks that a multiprocessor takes for so many warps of a demand; `alone`: those of one warp alone."""
    of_a_scheduler = math.ceil(warps / SCHEDULERS)
    units = (of_a_scheduler * SCHEDULERS * amount / getattr(gpu, unit) for unit, amount in demand.units.items())
    shared = warps * ((demand.high if high else demand.low) + 32 * demand.shuffles / gpu.shuffle)
    from_l2 = demand.written + (demand.read if high else 0)
    memory = warps * max(from_l2 / 64, (demand.written + demand.read) / 128)
    barrier = warps * 32 / 16 if demand.ends_in_barrier else 0
    return max(alone, of_a_scheduler * demand.instructions, shared, memory, *units) + barrier


def wait_us(gpu: Gpu, what: str, high: bool) -> float:
    """The time of a grid barrier ("barrier"), or of the end of a kernel in a captured graph ("node")."""
    if high:
        return WAIT_US
    return NODE_US if what == "node" else 2 * gpu.l2_latency / gpu.ghz / 1000


def memory_us(gpu: Gpu, footprint: float) -> float:
    """The time of moving so many bytes to or from device memory once; 0 where they stay in L2."""
    return footprint / gpu.dram / 1000 if footprint > gpu.l2 * 2**20 else 0.0


def bound_us(gpu: Gpu, cost: Cost, precision: str) -> float:
    """The lower bound: operations at the documented rate, bytes through L2, or device memory where they do not fit."""
    products = {"fp32": gpu.fp32, "tf32": gpu.tf32, "tf32x3": max(gpu.tf32 / 3, gpu.fp32)}[precision]
    clocks_a_us = 1000 * gpu.ghz * gpu.processors
    through_l2 = cost.bytes / 64 / clocks_a_us
    return max(cost.operations / 2 / products / clocks_a_us, through_l2, memory_us(gpu, cost.bytes))


def is_measured_on(gpu: Gpu, device: str) -> bool:
    """Whether a device, as its driver calls it, is this GPU: the name of a slice has MIG in it."""
    return gpu.name.removesuffix(" 1g") in device and ("MIG 1g" in device) == gpu.name.endswith("1g")

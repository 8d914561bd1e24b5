"""The resources that every shipped kernel needs on every architecture; needs no GPU.

    python -m bench.resources [--json FILE]

compiles every configuration that the launchers use (kernels/_aot.py) for every architecture that they use it on. The
assembler reports registers and spills, the bytes of stack that a thread spills registers to; Triton reports shared
memory; FMA, tensor-core and atomic instructions are counted in the PTX. The table adds the occupancy that these allow.
Exits 1 where a kernel spills, uses a tensor core under fp32, or takes more shared memory than a thread block can have:
64 KiB on sm_75, 99 KiB on every GPU since.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, is_dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from mlp_fast.cli import run_main
from mlp_fast.errors import UserError
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.measure import table as markdown

KERNELS = ("embed_linear_tanh", "linear_cross_entropy", "adamw", "train_step", "persistent_step", "inference")
# In PTX.
FMA = re.compile(r"\bfma\.rn\.(?:ftz\.)?f32")
ATOMIC = re.compile(r"\b(?:atom|red)\.")
TENSOR_CORE = re.compile(r"\b(?:mma\.(?:sync|sp)|wgmma\.mma_async|tcgen05\.mma)\b")

REGISTERS = 65536  # of a multiprocessor of every architecture


class Architecture(NamedTuple):
    """The limits of a multiprocessor, by the CUDA C++ Programming Guide, compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes of the multiprocessor
    block_shared: int  # bytes that a thread block can have
    reserved: int  # bytes that the system takes of each block


# Code is compiled for the least shared memory that a GPU since sm_80 gives a block.
KIB = 1024
ARCHITECTURES = {
    75: Architecture(32, 16, 64 * KIB, 64 * KIB, 0),
    80: Architecture(64, 32, 164 * KIB, 99 * KIB, KIB),
    86: Architecture(48, 16, 100 * KIB, 99 * KIB, KIB),
    89: Architecture(48, 24, 100 * KIB, 99 * KIB, KIB),
    90: Architecture(64, 32, 228 * KIB, 99 * KIB, KIB),
    100: Architecture(64, 32, 228 * KIB, 99 * KIB, KIB),
    120: Architecture(48, 24, 100 * KIB, 99 * KIB, KIB),
}


class Resources(NamedTuple):
    """The resources of one kernel in one configuration on one architecture."""

    module: str  # the file in kernels/
    kernel: str
    precision: str
    constants: str
    sm: int
    num_warps: int
    registers: int
    spills: int  # bytes of stack a thread, which is where the assembler spills registers to
    shared: int  # bytes a thread block
    fma: int  # from here on: instructions of the PTX, not executed ones
    tensor_core: int
    atomics: int

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that can be resident."""
        return occupancy(self.sm, self.num_warps, self.registers, self.shared)

    def faults(self) -> list[str]:
        """Why the kernel must not be shipped."""
        faults = []
        if self.spills:
            faults.append(f"spill instructions, {self.spills} bytes of stack")
        if self.precision == "fp32" and self.tensor_core:
            faults.append(f"{self.tensor_core} tensor-core instructions under fp32")
        if self.shared > ARCHITECTURES[self.sm].block_shared:
            faults.append(f"{self.shared} bytes of shared memory")
        return faults


def occupancy(sm: int, num_warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that blocks of these needs can fill."""
    has = ARCHITECTURES[sm]
    registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256  # handed out 256 at a time
    warps_by_registers = REGISTERS // registers_per_warp // 4 * 4  # in four partitions
    by_shared = has.shared // max(shared + has.reserved, 1)
    blocks = min(has.blocks, has.warps // num_warps, warps_by_registers // num_warps, by_shared)
    return blocks * num_warps / has.warps


def measure(configurations: Sequence[Any], sm: int) -> list[Resources]:
    """The resources of kernels._aot.Shipped, compiled for an architecture."""
    found = []
    for shipped in configurations:
        compiled = shipped.compile(sm)
        usage, ptx = resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
        found.append(
            Resources(
                module=shipped.kernel.fn.__module__.rpartition(".")[2],
                kernel=shipped.kernel.fn.__name__,
                precision=shipped.precision,
                constants=_constants(shipped.constexprs),
                sm=sm,
                num_warps=compiled.metadata.num_warps,
                registers=usage["REG"],
                spills=usage["STACK"] + usage["LOCAL"],
                shared=compiled.metadata.shared,
                fma=len(FMA.findall(ptx)),
                tensor_core=len(TENSOR_CORE.findall(ptx)),
                atomics=len(ATOMIC.findall(ptx)),
            )
        )
    return found


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and other resources of a thread of the one kernel in a cubin."""
    usage = binary_tool("cuobjdump", cubin, "-res-usage")
    return {name: int(amount) for name, amount in re.findall(r"(\w+):(\d+)", usage)}


def binary_tool(name: str, cubin: bytes, *options: str) -> str:
    """The output of one of Triton's binary tools, "cuobjdump" or "nvdisasm", for a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _constants(constexprs: dict[str, Any]) -> str:
    """The compile-time constants that are numbers or names, shortened to fit a table."""
    flat: dict[str, Any] = {}
    for name, value in constexprs.items():
        flat |= asdict(value) if is_dataclass(value) and not isinstance(value, type) else {name: value}
    return " ".join(
        f"{name.removeprefix('BLOCK_')}={value}"
        for name, value in flat.items()
        if isinstance(value, (int, str)) and name != "INPUT_PRECISION"
    )


def module_of(name: str) -> str:
    """The module to import for a name on the command line: of a file in kernels/, or of any other module.

    Raises:
        UserError: there is none, or it has no shipped().
    """
    reason = "there is no such module"
    for module in (f"mlp_fast.kernels.{name}", name):
        try:
            if hasattr(importlib.import_module(module), "shipped"):
                return module
            reason = "it has no shipped()"
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                reason = f"it needs {error.name}, which is not installed"
        except ValueError:  # an empty name
            pass
    raise UserError(f"--modules {name}: {reason}; choose from {', '.join(KERNELS)}")


def configurations(modules: Sequence[str]) -> list[Any]:
    """The different kernels._aot.Shipped of the modules."""
    unique: dict[str, Any] = {}
    for name in modules:
        for shipped in importlib.import_module(name).shipped():
            # The strictest precision comes first and stays: what does not depend on the precision is compiled once.
            unique.setdefault(shipped.key, shipped)
    return list(unique.values())


def _measure_share(modules: Sequence[str], capabilities: Sequence[int], shares: int, share: int) -> list[Resources]:
    """Every `shares`-th configuration, from number `share` on."""
    mine = configurations(modules)[share::shares]
    return [r for sm in capabilities for r in measure([s for s in mine if sm in s.capabilities], sm)]


def measure_all(modules: Sequence[str], capabilities: Sequence[int]) -> list[Resources]:
    """Resources of every configuration, compiled by one process per core, in the order of the modules."""
    shares = os.cpu_count() or 1
    with ProcessPoolExecutor(shares, mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(_measure_share, modules, capabilities, shares), range(shares))
        found = [resources for result in results for resources in result]
    return sorted(found, key=lambda r: (r.kernel, r.precision, r.constants, r.sm))


def table(resources: Sequence[Resources]) -> str:
    """The printed table."""
    header = ("kernel", "precision", "sm", "constants", "regs", "spills", "shared", "fma", "tensor", "atomic", "occ")
    rows = [
        (r.kernel, r.precision, f"sm_{r.sm}", r.constants, *map(str, r[6:12]), f"{r.occupancy:.0%}") for r in resources
    ]
    return markdown.table(header, rows, text_columns=4)


def require_compiler() -> None:
    """UserError where kernels cannot be compiled."""
    if interpreting():
        raise UserError("TRITON_INTERPRET is set, so kernels would not be compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed, so kernels cannot be compiled; pip install triton")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a kernel must not be shipped as it is."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    parser.add_argument("--modules", nargs="+", default=KERNELS, metavar="M", help="files of kernels/ (default: all)")
    parser.add_argument("--sm", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    args = parser.parse_args(argv)
    require_compiler()
    resources = measure_all([module_of(name) for name in args.modules], list(args.sm))
    print(table(resources))
    faults = [f"{r.kernel} {r.precision} sm_{r.sm} ({r.constants}): {f}" for r in resources for f in r.faults()]
    if args.json:
        kernels = [{**r._asdict(), "occupancy": r.occupancy} for r in resources]
        Path(args.json).write_text(json.dumps({"ok": not faults, "kernels": kernels}, indent=1))
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    print(f"{len(resources)} configurations, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)

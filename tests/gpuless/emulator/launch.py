"""Runs programs in the engine, and lets Triton's launches run there."""

import bisect
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from mlp_fast.kernels import _aot

from .engine import (
    KINDS,
    MAX_FINDINGS,
    REACHES,
    SPACES,
    Counts,
    Instruction,
    Launch,
    RawFinding,
    Schedule,
    Statistics,
    library,
)
from .ptx import LANES, WIDTHS, Program, decode

POISON = 0x7FC0DEAD  # a NaN: what a word of memory holds that nobody has written
BASE, GAP = 0x7F0000000000, 1024  # address of the first byte of global memory; bytes between two buffers
ALLOCATED, WRITTEN = 1, 2  # MemoryState in engine/interface.h


@dataclass
class Finding:
    """What the engine objects to, at one pair of instructions."""

    kind: str
    reach: str  # of a race: within a warp, between warps, between programs
    space: str
    first: str  # source line and instruction, if there are two
    second: str
    where: str
    same_value: bool  # of two writes: they wrote the same bits, every time
    count: int

    @property
    def may_be_harmless(self) -> bool:
        """Whether it is a race whose outcome can be defined all the same.

        That is so where both sides write the same value, and where what the racing load returns changes nothing: run it
        with poison_racing and compare the bits.
        """
        return self.kind in KINDS[:2] or (self.kind == KINDS[2] and self.same_value)

    def __str__(self) -> str:
        head = ", ".join(filter(None, (self.kind, self.reach, "same value" if self.same_value else "", self.space)))
        return "\n".join([f"{head}, {self.count} times, {self.where}", *filter(None, (self.first, self.second))])


@dataclass
class Result:
    """A launch that has run."""

    kernel: str
    findings: list[Finding]
    statistics: Statistics
    program: Program
    counts: Sequence[Counts] = ()  # of every instruction of the program, of the block asked for
    shipped: _aot.Shipped | None = None
    threads: int = 0  # of a block
    blocks: int = 0
    footprint: int = 0  # bytes of global memory that it was given


def run(
    program: Program, grid: Sequence[int], threads: int, shared: int, buffers: dict[str, np.ndarray],
    values: Sequence[Any], schedule: Schedule, counted: int | None = None,
    merged: dict[int, int] | None = None,
) -> Result:  # fmt: skip
    """Runs a grid to its end.

    Args:
        grid: blocks, up to three numbers.
        threads: of a block, a multiple of 32.
        shared: bytes of shared memory.
        buffers: name -> uint8 array, changed in place: all that may be accessed in global memory.
        values: of the parameters, in order: a number, or a buffer's name and an offset in bytes.
        counted: the block whose work is counted, instruction by instruction.
        merged: line of PTX -> bytes of a lane's access there, where the assembler has made one of several.
    """
    begins, size = {}, GAP
    for name, data in buffers.items():
        begins[name] = size
        size = -(-(size + len(data) + GAP) // 512) * 512
    memory, state = np.full(size, 0xEE, np.uint8), np.zeros(size, np.uint8)
    for name, data in buffers.items():
        own = slice(begins[name], begins[name] + len(data))
        memory[own], state[own] = data, ALLOCATED | WRITTEN
        whole = len(data) // 4 * 4
        unwritten = np.repeat(data[:whole].view(np.uint32) == POISON, 4)
        state[own][:whole][unwritten] = ALLOCATED
    parameters = bytearray()
    given = [Counts(bytes=(merged or {}).get(line, 0)) for line in program.ptx_lines]
    counts = (Counts * len(given))(*given) if counted is not None else ()
    for (offset, kind), value in zip(program.parameters, values, strict=True):
        if isinstance(value, tuple):
            value = BASE + begins[value[0]] + value[1]
        width = WIDTHS[kind]
        raw = np.float32(value).tobytes() if kind == "f32" else int(value % 256**width).to_bytes(width, "little")
        parameters[offset:] = raw.rjust(len(raw) + offset - len(parameters), b"\0")
    launch = Launch(
        program=(Instruction * len(program.instructions))(*program.instructions), length=len(program.instructions),
        registers=program.registers, register_bytes=len(program.registers),
        predicates=(ctypes.c_uint32 * len(program.predicates))(*program.predicates),
        predicate_count=len(program.predicates),
        specials=(ctypes.c_int32 * len(program.specials))(*program.specials), special_count=len(program.specials) // 2,
        base=BASE, size=size, memory=memory.ctypes.data, state=state.ctypes.data,
        parameters=bytes(parameters), parameter_bytes=len(parameters),
        grid=(ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))), threads=threads, shared_bytes=shared,
        local_bytes=program.local_bytes, global_grain=program.grains["global"], shared_grain=program.grains["shared"],
        counted=counted or 0, counts=counts or None,
    )  # fmt: skip
    found, statistics = (RawFinding * MAX_FINDINGS)(), Statistics()
    count = library().run_launch(
        ctypes.byref(launch), ctypes.byref(schedule.raw()), found, MAX_FINDINGS, ctypes.byref(statistics)
    )
    for name, data in buffers.items():
        data[:] = memory[begins[name] : begins[name] + len(data)]
    findings = [_told(f, program, begins) for f in found[: min(count, MAX_FINDINGS)]]
    footprint = sum(len(data) for data in buffers.values())
    return Result(program.name, findings, statistics, program, counts, None, threads, math.prod(grid), footprint)


def _told(raw: RawFinding, program: Program, begins: dict[str, int]) -> Finding:
    def at(i: int) -> str:
        return f"    {program.lines[i]}: {program.texts[i]}" if i >= 0 else ""

    def who(block: int, thread: int) -> str:
        return f"program {block}" + (f" thread {thread}" if thread >= 0 else "")

    where = f"at {raw.address:#x}"
    if raw.space == 0 and begins:
        offset = raw.address - BASE
        names = list(begins)
        name = names[max(0, bisect.bisect(list(begins.values()), offset) - 1)]
        where = f"at {name} + {offset - begins[name]}"
    actors = [who(raw.first_block, raw.first_thread)] if raw.first_block >= 0 else []
    actors.append(who(raw.second_block, raw.second_thread))
    return Finding(
        KINDS[raw.kind], REACHES[raw.reach], SPACES[raw.space] if raw.space >= 0 else "", at(raw.first), at(raw.second),
        f"{where}: {' and '.join(actors)}", bool(raw.same_value), raw.count,
    )  # fmt: skip


# --- Triton's launches


def _without_machine_code(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook on the stages of a compilation: the emulator reads PTX, and assembling it takes long."""
    if stages is None:
        return "PTX only", "PTX only"  # part of the key of Triton's cache
    stages["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def ptx_only() -> Iterator[None]:
    """Within it, Triton's compiler stops at PTX."""
    before = triton.knobs.runtime.add_stages_inspection_hook
    triton.knobs.runtime.add_stages_inspection_hook = _without_machine_code
    try:
        yield
    finally:
        triton.knobs.runtime.add_stages_inspection_hook = before


@dataclass
class Compiled:
    """A kernel as Triton compiled it."""

    ptx: str
    threads: int
    shared: int


_compiled: dict[tuple[str, int], Compiled] = {}
_decoded: dict[str, Program] = {}


def compile_ptx(shipped: _aot.Shipped, capability: int) -> Compiled:
    """The PTX of a kernel for a compute capability."""
    key = (shipped.key, capability)
    if key not in _compiled:
        with ptx_only():
            kernel = shipped.compile(capability)
        assert not getattr(kernel.metadata, "global_scratch_size", 0), "the emulator has no scratch memory"
        _compiled[key] = Compiled(kernel.asm["ptx"], LANES * kernel.metadata.num_warps, kernel.metadata.shared)
    return _compiled[key]


@dataclass
class Emulator:
    """Within `with Emulator(90) as emulator:` every launch of a Triton kernel on CPU tensors runs in the engine.

    What torch.empty makes there counts as unwritten.

    Attributes:
        capability: the compute capability that kernels are compiled for.
        schedule: of the launches.
        mutate: changes the PTX of a kernel, given its name, before it is decoded.
        counted: the program whose work is counted, instruction by instruction; None: no counts.
        merged: tells for a kernel what run() takes under this name.
        results: of the launches so far.
    """

    capability: int = 90
    schedule: Schedule = field(default_factory=Schedule)
    mutate: Callable[[str, str], str] | None = None
    counted: int | None = None
    merged: Callable[[_aot.Shipped], dict[int, int]] | None = None
    results: list[Result] = field(default_factory=list)

    def __enter__(self) -> "Emulator":
        emulator = self

        def launched(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            emulator._launch(kernel, args, grid, kwargs)

        self._saved = JITFunction.run, torch.empty, torch.empty_like
        JITFunction.run = launched
        torch.empty, torch.empty_like = _unwritten(torch.empty), _unwritten(torch.empty_like)
        return self

    def __exit__(self, *exception: object) -> None:
        JITFunction.run, torch.empty, torch.empty_like = self._saved

    @property
    def findings(self) -> list[Finding]:
        """Of all launches."""
        return [finding for result in self.results for finding in result.findings]

    def _launch(self, kernel: JITFunction, args: Sequence[Any], grid: Any, kwargs: dict[str, Any]) -> None:
        options = {name: kwargs.pop(name) for name in _aot._OPTIONS if name in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        # A number that is neither 1 nor divisible by 16 is not specialised either.
        examples = {n: 3 if n in plain and isinstance(v, int) else v for n, v in arguments.items()}
        shipped = _aot.Shipped(kernel, examples, options)
        compiled = compile_ptx(shipped, self.capability)
        ptx = self.mutate(compiled.ptx, kernel.fn.__name__) if self.mutate else compiled.ptx
        if ptx not in _decoded:
            _decoded[ptx] = decode(ptx)
        program = _decoded[ptx]
        buffers: dict[str, np.ndarray] = {}
        values: list[Any] = []
        owners: dict[int, str] = {}
        for name in kernel.arg_names:
            if name not in shipped.constexprs:
                _flatten(name, arguments[name], name in plain, buffers, values, owners)
        scratch = len(program.parameters) - len(values)  # Triton's own pointers, at the end, which none of these uses
        assert scratch in (0, 1, 2), f"{len(values)} arguments for {len(program.parameters)} parameters"
        blocks = tuple(grid(arguments) if callable(grid) else grid)
        result = run(
            program, blocks, compiled.threads, compiled.shared, buffers, [*values, *[0] * scratch], self.schedule,
            self.counted, self.merged(shipped) if self.merged else None,
        )  # fmt: skip
        result.shipped = shipped
        self.results.append(result)


def _flatten(
    name: str, value: Any, plain: bool, buffers: dict[str, np.ndarray], values: list[Any], owners: dict[int, str]
) -> None:
    """Appends what an argument becomes of parameters, and the storages of its tensors to the buffers."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            label = value._fields[i] if hasattr(value, "_fields") else i
            _flatten(f"{name}.{label}", item, plain, buffers, values, owners)
    elif isinstance(value, Tensor):
        assert value.device.type == "cpu", "the emulator's global memory is the CPU's"
        storage = value.untyped_storage()
        owner = owners.setdefault(storage.data_ptr(), name)
        if owner == name:
            buffers[name] = _bytes(value)
        values.append((owner, value.data_ptr() - storage.data_ptr()))
    elif value is None or (isinstance(value, int) and value == 1 and not plain):
        pass  # a constant of the compiled kernel
    else:
        values.append(value)


def _bytes(tensor: Tensor) -> np.ndarray:
    """The storage of a tensor, shared."""
    storage = tensor.untyped_storage()
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


def _unwritten(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty or torch.empty_like, its memory marked."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.numel():
            data = _bytes(tensor)
            data[: len(data) // 4 * 4].view(np.uint32)[:] = POISON
        return tensor

    return made

"""What the machine executes in a step: counted without a GPU, by phase, and the time that follows.

    python -m bench.counts [KERNELS ...] [--gpu NAME ...] [--precision P ...] [--json FILE]

runs kernels, as compiled, in the emulator of PTX (tests/gpuless/emulator), which counts for one program how often each
instruction runs and what it takes of shared and global memory. The machine code (SASS) says by its line table which PTX
each of its instructions comes from, so the counts carry over to what really runs; and the stalls and waits that the
assembler wrote into it give the time of a warp that is alone. bench/gpus.py makes times of it, from documented rates.

The emulator stays among the tests, whose instrument it is; the benchmarks take it from there. Both live in a checkout.

Columns: instructions a warp, by kind; `issue`, clocks of a scheduler that issues one a clock; `wavefronts` of shared
memory of the block, from the least to the most (engine/count.h); `sectors` of 32 bytes of global memory; `exposed`, how
many latencies of a load from L2 a warp that is alone waits out; barriers of the block and the grid; `atomics`, lanes.
All of program 0, the busiest. Where a launch has more programs than run at once, the others are taken to do the same.
"""

import argparse
import ast
import functools
import importlib.util
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import gpus, resources
from bench.gpus import GPUS, Demand, Gpu
from mlp_fast.command import run_main
from mlp_fast.errors import UserError
from mlp_fast.kernels._runtime import LEAST_CAPABILITY, interpreting

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("executions", "lanes", "wavefronts_low", "wavefronts_high", "sectors")

# --- machine code ----------------------------------------------------------------------------------------------------

LISTED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);\s+/\* 0x([0-9a-f]{16}) \*/")
SECOND_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
LINE = re.compile(r'//## File ".nv_debug_ptx_txt", line (\d+)')
LABEL = re.compile(r"^(\.L_x_\d+|\$[\w$]+):")

# By the first part of an opcode: which unit is kept busy (a column of gpus.Gpu), and what the table calls it.
KINDS = {
    **dict.fromkeys(("FFMA", "FFMA2", "FADD", "FADD2", "FMUL", "FMUL2"), "fp32"),
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), "fp64"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"), "special"),
    **dict.fromkeys(("LDS", "STS", "LDSM", "STSM", "LDGSTS"), "shared"),
    **dict.fromkeys(("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG"), "global"),
    **dict.fromkeys(("HMMA", "IMMA"), "tensor"),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "WARPSYNC", "MEMBAR", "ERRBAR", "CCTL"), "control"),
    "SHFL": "shuffle",
}
LOADS = ("LDG", "LD", "ATOM", "ATOMG", "LDGSTS")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
# What is neither merged, split nor moved out of a loop on the way from PTX: it tells how often its surroundings run.
ANCHORS = ("shared", "global", "tensor", "shuffle")
COLUMNS = ("fp32", "tensor", "integer", "special", "shuffle", "shared", "global", "control")


class Instruction(NamedTuple):
    """Of machine code. What it waits for, and which of six scoreboards it sets, are numbered as the assembler does."""

    opcode: str
    operands: str
    line: int  # of the PTX
    stall: int  # clocks until the warp may issue its next one
    sets: int  # 7: none
    waits: int  # a mask

    @property
    def root(self) -> str:
        """FFMA of FFMA.FTZ."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """A column of the table."""
        return KINDS.get(self.root, "integer")

    @property
    def unit(self) -> tuple[str, float]:
        """The column of gpus.Gpu whose rate it keeps to ("" for issue slots alone), and its share of that rate."""
        if self.kind == "tensor":
            k = int(re.sub(r"\D", "", self.opcode.split(".")[1])[3:] or 8)
            return ("tf32" if "TF32" in self.opcode else "half"), 16 * 8 * k
        if self.kind == "special":
            return ("wide" if re.search(r"[FSUI]64", self.opcode) else "special"), 1
        if self.root == "DSETP" or self.kind == "fp64":
            return "fp64", 1
        if self.kind == "fp32":
            return "fp32", 1
        plain = self.kind == "integer" and not self.root.startswith(("U", "R2UR", "S2", "CS2R", "LDC", "DEPBAR"))
        return ("integer", 1) if plain else ("", 0)

    @property
    def bytes(self) -> int:
        """Of an access to memory, a lane's."""
        return {"128": 16, "64": 8}.get(next((p for p in self.opcode.split(".") if p in ("128", "64")), ""), 4)


@dataclass
class Segment:
    """A piece of machine code with one way in and out, that no barrier cuts."""

    labels: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    in_subroutine: bool = False
    visits: float = 0.0  # a warp and step

    @property
    def ends_in(self) -> str:
        """The root of its last instruction."""
        return self.code[-1].root if self.code else ""


def segments(listing: str) -> list[Segment]:
    """Of `nvdisasm -hex -gp`. The bits that schedule an instruction are those of Volta and later: Jia et al.,
    arXiv:1804.06826, chapter 2."""
    found, line, subroutine = [Segment()], 0, False
    first: re.Match[str] | None = None
    for text in listing.splitlines():
        if match := LINE.search(text):
            line = int(match[1])
        elif match := LABEL.match(text):
            subroutine |= match[1].startswith("$")
            if found[-1].code:
                found.append(Segment())
            found[-1].labels.append(match[1])
            found[-1].in_subroutine = subroutine
        elif match := LISTED.search(text):
            first = match
        elif first and (match := SECOND_HALF.match(text)):
            control = int(match[1], 16) >> 41
            found[-1].code.append(
                Instruction(first[2], first[3], line, control & 15, control >> 5 & 7, control >> 11 & 63)
            )
            if first[2].partition(".")[0] in ("BRA", "BRX", "EXIT", "RET", "CALL", "BAR"):
                found.append(Segment(in_subroutine=subroutine))
            first = None
    return [segment for segment in found if segment.code]


class Compiled(NamedTuple):
    """A kernel on an architecture."""

    listing: str
    registers: int  # a thread
    shared: int  # bytes

    @property
    def merged(self) -> dict[int, int]:
        """Line of PTX -> bytes that a lane accesses there: the assembler makes one access of neighbours."""
        found: dict[int, int] = {}
        for segment in segments(self.listing):
            for i in segment.code:
                if i.kind in ("shared", "global") and i.root not in (*ATOMICS, "LDSM", "STSM", "LDGSTS"):
                    found[i.line] = max(i.bytes, found.get(i.line, 0))
        return found


_compiled: dict[tuple[str, int], Compiled] = {}


def compiled(shipped: Any, capability: int) -> Compiled:
    """A kernels._aot.Shipped as an architecture runs it."""
    key = (shipped.key_on(capability), capability)
    if key not in _compiled:
        kernel = shipped.compile(capability)
        cubin = kernel.asm["cubin"]
        listing = resources._tool(cubin, "nvdisasm", "-hex", "-gp", "-c")
        _compiled[key] = Compiled(listing, resources._registers(cubin), kernel.metadata.shared)
    return _compiled[key]


# --- what has been counted -------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel, and what one of its programs has executed of it in one step."""

    kernel: str
    warps: int
    blocks: int
    footprint: int  # bytes of global memory that it was given
    code: list[Segment]
    lines: dict[int, dict[str, float]]  # counts by line of PTX
    phases: dict[int, str]  # by line of PTX
    registers: int
    shared: int

    def __post_init__(self) -> None:
        self._visit()

    def _visit(self) -> None:
        """How often a warp comes through each segment: as often as through the PTX of its instructions.

        A loop that the assembler unrolls has several copies of an instruction, which share the executions. Its
        subroutines are for operands at the edge of the range, which no step has.
        """
        copies = Counter((i.line, i.root) for segment in self.code for i in segment.code)
        previous = Segment()
        for segment in self.code:
            at = [i for i in segment.code if i.line in self.lines]
            anchors = [i for i in at if i.kind in ANCHORS] or at
            ratios = [
                self.lines[i.line]["executions"] / self.warps / (copies[i.line, i.root] if i.kind in ANCHORS else 1)
                for i in anchors
            ]
            segment.visits = statistics.median(ratios) if ratios else previous.visits
            if (
                segment.in_subroutine
                or segment.ends_in == "CALL"
                or (previous.ends_in == "CALL" and not segment.labels)
            ):
                segment.visits = 0.0
            previous = segment

    def shares(self, segment: Segment) -> Iterator[tuple[Instruction, dict[str, float]]]:
        """Instructions that access memory, with their share of the counts of their line in PTX."""
        copies = self._copies
        for i in segment.code:
            if i.kind in ("shared", "global") and i.line in self.lines:
                yield i, {name: count / copies[i.line, i.root] for name, count in self.lines[i.line].items()}

    @functools.cached_property
    def _copies(self) -> Counter[tuple[int, str]]:
        return Counter((i.line, i.root) for segment in self.code for i in segment.code)

    def demand(self, segment: Segment) -> Demand:
        """Of one warp and visit, on average."""
        kinds: dict[str, float] = defaultdict(float)
        for i in segment.code:
            unit, share = i.unit
            if unit:
                kinds[unit] += share
        low = high = read = written = 0.0
        for i, counts in self.shares(segment):
            low, high = low + counts["wavefronts_low"], high + counts["wavefronts_high"]
            if i.root in LOADS and i.root not in ATOMICS:
                read += 32 * counts["sectors"]
            else:
                written += 32 * counts["sectors"]
        visits = max(self.warps * segment.visits, 1e-9)
        return Demand(
            len(segment.code), kinds, low / visits, high / visits, sum(i.kind == "shuffle" for i in segment.code),
            read / visits, written / visits, segment.ends_in == "BAR",
        )  # fmt: skip


class Chain(NamedTuple):
    """How a warp that is alone gets through a segment."""

    clocks: float
    exposed: float  # of these, waiting for global memory
    by_phase: dict[str, float]
    exposed_by_phase: dict[str, float]


def chains(launch: Launch, gpu: Gpu, high: bool) -> list[Chain]:
    """Every segment's, in order. The second way through an innermost loop counts: loads of the first are under way."""
    load = gpu.l2_latency if high else gpu.l1_latency
    ready, owner, now = [0.0] * 6, [""] * 6, 0.0

    def walk(segment: Segment) -> Chain:
        nonlocal now
        began, exposed = now, 0.0
        by_phase: dict[str, float] = defaultdict(float)
        exposed_by_phase: dict[str, float] = defaultdict(float)
        for i in segment.code:
            before, phase = now, launch.phases.get(i.line, launch.kernel)
            for board in range(6):
                if i.waits >> board & 1 and ready[board] > now:
                    if owner[board] in LOADS:
                        exposed += ready[board] - now
                        exposed_by_phase[phase] += ready[board] - now
                    now = ready[board]
            if i.sets < 6:
                latency = load if i.root in LOADS else gpu.shared_latency
                ready[i.sets], owner[i.sets] = max(ready[i.sets], now + latency), i.root
            now += max(i.stall, 1)
            by_phase[phase] += now - before
        return Chain(now - began, exposed, by_phase, exposed_by_phase)

    found: list[Chain] = []
    places = {label: number for number, segment in enumerate(launch.code) for label in segment.labels}
    looped = 0  # before it loops are done: only the innermost is gone through again
    for number, segment in enumerate(launch.code):
        found.append(walk(segment))
        target = re.search(r"`\((\S+)\)", segment.code[-1].operands)
        if segment.ends_in == "BRA" and target and looped <= places.get(target[1], number + 1) <= number:
            first, looped = places[target[1]], number
            found[first:] = [walk(again) for again in launch.code[first : number + 1]]
    return found


# --- phases ----------------------------------------------------------------------------------------------------------


@functools.cache
def _functions(file: str) -> list[tuple[int, int, str, bool]]:
    """First and last line, name, and whether it is made of phases, of the functions in a file of kernels/."""
    path = ROOT / "kernels" / file
    if not path.exists():
        return []
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            called = {c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
            composed = any(name.endswith("_phase") for name in called)
            found.append((node.lineno, node.end_lineno or node.lineno, node.name, composed))
    return found


@functools.cache
def phase_of(location: str, kernel: str) -> str:
    """The phase that a line of PTX belongs to: of the calls that led there, the outermost that is not made of phases.

    location: as Triton writes it, the innermost call first: a.py:3:1 @[ b.py:9:4 @[ c.py:7:2 ] ].
    """
    name = kernel
    for file, line in reversed(re.findall(r"([\w.]+\.py):(\d+):\d+", location)):
        inside = [f for f in _functions(file) if f[0] <= int(line) <= f[1]]
        if not inside:
            break
        _, _, name, composed = inside[-1]
        if not composed:
            break
    return name.removesuffix("_phase")


# --- running kernels in the emulator ---------------------------------------------------------------------------------


def _emulator() -> Any:
    """The emulator's package."""
    folder = str(ROOT / "tests" / "gpuless")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("emulator")


def emulated(capability: int, run: Callable[[], None], programs: int = 0) -> list[Any]:
    """The results of the launches of `run`, program 0 counted; only so many programs of a grid run, 0: all."""
    emulator = _emulator()
    schedule = emulator.Schedule(policy="rotation", quantum=1000, races=False, first_blocks=programs)
    merged = lambda shipped: compiled(shipped, capability).merged  # noqa: E731
    with emulator.Emulator(capability, schedule, counted=0, merged=merged) as machine:
        run()
    return list(machine.results)


def launch_of(result: Any, capability: int, less: Any = None) -> Launch:
    """What program 0 of an emulated launch has executed, less what it has in another launch of the same kernel."""
    code = compiled(result.shipped, capability)
    program = result.program
    kernel = result.shipped.kernel.fn.__name__
    lines: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(FIELDS, 0.0))
    phases: dict[int, str] = {}
    for n, line in enumerate(program.ptx_lines):
        phases[line] = phase_of(program.lines[n], kernel)
        for name in FIELDS:
            lines[line][name] += getattr(result.counts[n], name) - (getattr(less.counts[n], name) if less else 0)
    # A spin ends when the others have arrived, which is no work of this program: it looks once.
    arrivals = sum(
        lines[line]["executions"]
        for n, line in enumerate(program.ptx_lines)
        if phases[line] == "grid_barrier" and program.texts[n].startswith("red.release")
    )
    warps = result.threads // 32
    for line, phase in phases.items():
        if phase == "grid_barrier":
            lines[line]["executions"] = min(lines[line]["executions"], warps * arrivals)
            lines[line]["sectors"] = min(lines[line]["sectors"], arrivals)
    return Launch(
        kernel, warps, result.blocks, result.footprint, segments(code.listing), dict(lines), phases,
        code.registers, code.shared,
    )  # fmt: skip


# --- what is counted -------------------------------------------------------------------------------------------------

DEFAULT = (128, 27, 3, 48, 512)  # B, V, T, E, H
LARGE_B = 65536


@dataclass(frozen=True)
class Workload:
    """What is counted together: the launches of a step, of an evaluation or of an operator.

    `measured`: where a recording has it, the group and the start of the id of its entries.
    """

    name: str
    launches: Callable[[Gpu, str], list[Launch]]
    measured: tuple[str, str] = ("", "")


def _step(gpu: Gpu, precision: str, module: str, B: int, **changes: Any) -> list[Launch]:
    """The launches of a training step in the middle of a run."""
    import dataclasses

    import torch

    from mlp_fast.config import Config
    from mlp_fast.models import PARAMETER_NAMES, Shape
    from mlp_fast.optim import update_scalars
    from mlp_fast.state import TrainState

    kernels = importlib.import_module(f"mlp_fast.kernels.{module}")
    persistent = module == "persistent_step"
    _, V, T, E, H = DEFAULT
    options = {"capability": gpu.sm} if persistent else {}
    C = kernels.default_config(B, V, T, E, H, precision=precision, processors=gpu.processors, **options)
    C = dataclasses.replace(C, **changes)
    tape = torch.randint(0, V, (20_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    state = TrainState.initial(Shape(V, T, E, H), 1337)
    planes = [[part[n] for n in PARAMETER_NAMES] for part in (state.parameters, state.exp_avg, state.exp_avg_sq)]
    scalars = update_scalars(Config(context_length=T, embedding_size=E, hidden_size=H, batch_size=B, num_steps=10))

    def run(steps: int) -> None:
        step = (kernels.PersistentStep if persistent else kernels.TrainStep)(C, tape, scalars)
        step.load(planes, 0)
        step.run(steps)

    if persistent:

        def both() -> None:
            run(1)
            run(2)

        one, two = emulated(gpu.sm, both)
        return [launch_of(two, gpu.sm, less=one)]
    results = emulated(gpu.sm, lambda: run(2), programs=1)
    each = len(results) // 2
    return [launch_of(result, gpu.sm) for result in results[each : 2 * each]]


def _evaluation(gpu: Gpu, precision: str) -> list[Launch]:
    import torch

    from mlp_fast.kernels import evaluation
    from mlp_fast.models import Shape, initial_parameters

    _, V, T, E, H = DEFAULT
    weights = evaluation.Weights(*initial_parameters(Shape(V, T, E, H), seed=7).values())
    windows = torch.randint(0, V, (7168, T + 1), generator=torch.Generator().manual_seed(1))
    counts, finished = torch.ones(7168, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    run = lambda: evaluation.mean_loss(weights, windows, counts, finished, precision=precision)  # noqa: E731
    return [launch_of(result, gpu.sm) for result in emulated(gpu.sm, run, programs=1)]


def _operator(gpu: Gpu, precision: str, which: str, B: int, form: str = "") -> list[Launch]:
    """All launches of one direction of an operator; of each one program runs."""
    import torch

    from mlp_fast.kernels import adamw, embed_linear_tanh, linear_cross_entropy

    _, V, T, E, H = DEFAULT
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Any:
        return torch.rand(shape, generator=generator)

    def tokens(*shape: int) -> Any:
        return torch.randint(0, V, shape, generator=generator)

    def run() -> None:
        if which == "adamw":
            shapes = [(V, E), (H, T * E), (H,), (V, H), (V,)]
            lists = [[numbers(*shape) for shape in shapes] for _ in range(4)]
            lr = torch.tensor(1e-3, dtype=torch.float64)
            adamw.adamw(*lists, torch.tensor(3.0), lr, 0.9, 0.999, 1e-8, 1e-4)
        elif which.startswith("embed"):
            idx, wte, weight, h = tokens(B, T), numbers(V, E), numbers(H, T * E), numbers(B, H)
            if which.endswith("forward"):
                embed_linear_tanh.embed_linear_tanh_fwd(idx, wte, weight, numbers(H), form, precision)
            else:
                embed_linear_tanh.embed_linear_tanh_bwd(h, h, idx, wte, weight, form, precision, True, True)
        else:
            h, weight, bias, targets = numbers(B, H), numbers(V, H), numbers(V), tokens(B)
            if which.endswith("forward"):
                linear_cross_entropy.linear_cross_entropy_fwd(h, weight, bias, targets, precision)
            else:
                linear_cross_entropy.linear_cross_entropy_bwd(
                    torch.ones(()), numbers(2, B), h, weight, bias, targets, precision, True, True
                )

    return [launch_of(result, gpu.sm) for result in emulated(gpu.sm, run, programs=1)]


def _workloads() -> Iterator[Workload]:
    def step(name: str, *arguments: Any, **changes: Any) -> Workload:
        return Workload(name, lambda gpu, precision: _step(gpu, precision, *arguments, **changes), ("step", name))

    yield step("triton-persistent", "persistent_step", 128)
    yield step("triton-persistent-l2", "persistent_step", 128, resident=False)
    yield step("triton-step", "train_step", 128)
    yield step("triton-step-1024", "train_step", 1024)
    yield Workload("evaluation", _evaluation)
    yield Workload("adamw", lambda gpu, precision: _operator(gpu, precision, "adamw", 0), ("kernels", "adamw-128"))
    for B in (128, LARGE_B):
        for which, forms in (("embed_linear_tanh", ("table", "gather")), ("linear_cross_entropy", ("",))):
            for form in forms:
                for direction in ("forward", "backward"):
                    name = "-".join(filter(None, (which, form, direction, str(B))))
                    yield Workload(
                        name,
                        functools.partial(_operator, which=f"{which} {direction}", B=B, form=form),
                        ("kernels", name),
                    )


WORKLOADS = {workload.name: workload for workload in _workloads()}

# --- results ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A phase of a workload, or all of it; of program 0 and one step."""

    phase: str
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0.0))  # instructions a warp
    issue: float = 0.0
    wavefronts: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the block
    sectors: float = 0.0
    exposed: float = 0.0
    barriers: float = 0.0
    grid_barriers: float = 0.0
    atomics: float = 0.0
    us: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def instructions(self) -> float:
        """A warp's, of all kinds."""
        return sum(self.kinds.values())

    def add(self, other: "Row") -> None:
        """Another row's figures on top of these."""
        for kind, count in other.kinds.items():
            self.kinds[kind] += count
        for i in (0, 1):
            self.wavefronts[i] += other.wavefronts[i]
            self.us[i] += other.us[i]
        for name in ("issue", "sectors", "exposed", "barriers", "grid_barriers", "atomics"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Counted:
    """A workload on a GPU: its phases in the order of the code, and their sum."""

    workload: str
    gpu: str
    precision: str
    programs: list[int]
    rows: list[Row]
    measured_us: float | None = None

    @property
    def total(self) -> Row:
        """All phases together."""
        total = Row("sum")
        for row in self.rows:
            total.add(row)
        return total


def _shape(launch: Launch, gpu: Gpu) -> tuple[int, int]:
    """Programs that a multiprocessor has at a time, and how many times it gets some."""
    most = round(resources.occupancy(gpu.sm, launch.warps, launch.registers, launch.shared)
                 * resources.ARCHITECTURES[gpu.sm].warps / launch.warps)  # fmt: skip
    together = max(1, min(most, math.ceil(launch.blocks / gpu.processors)))
    return together, math.ceil(launch.blocks / (gpu.processors * together))


def rows_of(launch: Launch, gpu: Gpu) -> list[Row]:
    """The phases of a launch."""
    rows: dict[str, Row] = {}

    def row(line: int) -> Row:
        phase = launch.phases.get(line, launch.kernel)
        return rows.setdefault(phase, Row(phase))

    together, turns = _shape(launch, gpu)
    for segment in launch.code:
        for i in segment.code:
            at = row(i.line)
            at.kinds[i.kind if i.kind in at.kinds else "special"] += segment.visits
            at.issue += segment.visits * launch.warps / gpus.SCHEDULERS
            at.barriers += segment.visits * (i.root == "BAR")
        for i, counts in launch.shares(segment):
            at = row(i.line)
            at.wavefronts[0] += counts["wavefronts_low"]
            at.wavefronts[1] += counts["wavefronts_high"]
            at.sectors += counts["sectors"]
            if i.root in ATOMICS:
                at.grid_barriers += counts["executions"] if at.phase == "grid_barrier" else 0
                at.atomics += counts["lanes"]
    for high in (False, True):
        for segment, chain in zip(launch.code, chains(launch, gpu, high), strict=True):
            clocks = gpus.cycles(gpu, launch.demand(segment), chain.clocks, launch.warps * together, high)
            for phase, share in chain.by_phase.items():
                at = rows[phase]
                at.us[high] += turns * segment.visits * clocks * share / chain.clocks / gpu.ghz / 1000
                if high:
                    at.exposed += segment.visits * chain.exposed_by_phase[phase] / gpu.l2_latency
        for at in rows.values():
            at.us[high] += at.grid_barriers * gpus.grid_barrier_us(gpu, high)
        least = gpus.memory_us(gpu, launch.footprint)
        if rows and (spent := sum(at.us[high] for at in rows.values())) < least:
            for at in rows.values():
                at.us[high] *= least / spent
    return list(rows.values())


def count(workload: Workload, gpu: Gpu, precision: str) -> Counted:
    """Compiles, emulates and counts a workload as it is launched on a GPU."""
    launches = workload.launches(gpu, precision)
    merged: dict[str, Row] = {}
    for launch in launches:
        for row in rows_of(launch, gpu):
            if row.instructions or row.us[1]:
                merged.setdefault(row.phase, Row(row.phase)).add(row)
    rows = list(merged.values())
    if workload.name.startswith("triton-step"):
        rows.append(Row("ends of kernels", us=[len(launches) * gpus.NODE_US, len(launches) * gpus.WAIT_US]))
    return Counted(workload.name, gpu.name, precision, [launch.blocks for launch in launches], rows)


def table(counted: Counted) -> Iterator[str]:
    """Lines of Markdown."""
    head = ("phase", "instructions", *COLUMNS, "issue", "wavefronts", "sectors", "exposed", "barriers", "atomics", "us")
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " --: |" * (len(head) - 1)
    for row in [*counted.rows, counted.total]:
        cells = [
            row.phase, f"{row.instructions:,.0f}", *(f"{row.kinds[kind]:,.0f}" for kind in COLUMNS),
            f"{row.issue:,.0f}", f"{row.wavefronts[0]:,.0f}-{row.wavefronts[1]:,.0f}", f"{row.sectors:,.0f}",
            f"{row.exposed:.1f}",
            f"{row.barriers:,.0f}" + (f" + {row.grid_barriers:,.0f} grid" if row.grid_barriers else ""),
            f"{row.atomics:,.0f}", f"{row.us[0]:.2f}-{row.us[1]:.2f}",
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNELS", help=f"default: all of {', '.join(WORKLOADS)}")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["H100"], metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32x3", "tf32"), default=["fp32"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    for name in arguments.kernels:
        if name not in WORKLOADS:
            raise UserError(f"{name}: no kernels of that name; choose from {', '.join(WORKLOADS)}")
    if interpreting():
        raise UserError("TRITON_INTERPRET is set, so kernels would not be compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed, so kernels cannot be compiled; pip install triton")
    results = []
    for name in arguments.kernels or WORKLOADS:
        for gpu in (GPUS[g] for g in arguments.gpu):
            for precision in arguments.precision:
                if gpu.sm < LEAST_CAPABILITY[precision]:
                    continue
                counted = count(WORKLOADS[name], gpu, precision)
                results.append(counted)
                print(f"\n{name}, {precision}, {gpu.name}, {counted.programs} programs\n")
                print("\n".join(table(counted)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) | {"total": asdict(r.total)} for r in results], indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)

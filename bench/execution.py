"""The work of one program of a launch, phase by phase: counts of its PTX carried over to its machine code."""

import ast
import functools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench import gpus, resources
from bench.gpus import Demand, Gpu
from bench.machine_code import ATOMICS, LOADS, Instruction, Segment

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
KINDS = ("fp32", "tensor", "integer", "special", "shuffle", "shared", "global", "control")
# Instructions that PTX has one by one as well: their counts say how often the code around them runs.
ANCHORS = ("shared", "global", "tensor", "shuffle")


@functools.cache
def _functions(file: str) -> list[tuple[range, str, bool]]:
    """The functions in a file of kernels/: their lines, their names, and whether they are made of phases."""
    path = KERNELS / file
    nodes = ast.walk(ast.parse(path.read_text() if path.exists() else ""))
    return [
        (range(node.lineno, (node.end_lineno or 0) + 1), node.name, any("_phase(" in ast.unparse(s) for s in node.body))
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    ]


@functools.cache
def phase_of(location: str, kernel: str) -> str:
    """The phase of a place in PTX: of the functions that led there, the outermost that is not made of phases itself.

    location: as Triton writes it, the innermost call first: a.py:3:1 @[ b.py:9:4 @[ c.py:7:2 ] ].
    """
    name = kernel
    for file, line in reversed(re.findall(r"([\w.]+\.py):(\d+):\d+", location)):
        around = [(found, composed) for lines, found, composed in _functions(file) if int(line) in lines]
        if not around:
            break
        name, composed = around[-1]
        if not composed:
            break
    return name.removesuffix("_phase").removesuffix("_kernel")


@dataclass
class Launch:
    """A kernel, and the counts of one of its programs."""

    kernel: str
    warps: int  # of a program
    programs: int
    footprint: int  # bytes of global memory that it was given
    code: list[Segment]
    registers: int
    shared: int
    counts: dict[int, dict[str, float]]  # by line of PTX: those of engine.Counts, of all warps
    phases: dict[int, str]  # by line of PTX

    def phase(self, i: Instruction) -> str:
        """The phase of an instruction."""
        return self.phases.get(i.line, phase_of("", self.kernel))

    @functools.cached_property
    def _copies(self) -> Counter[tuple[int, str]]:
        """How many instructions come from a line of PTX: several where the assembler unrolls a loop."""
        return Counter((i.line, i.root) for segment in self.code for i in segment.code)

    def counts_of(self, i: Instruction) -> dict[str, float]:
        """The counts of an instruction: its line's, shared out over the copies of an unrolled loop."""
        return {name: count / self._copies[i.line, i.root] for name, count in self.counts[i.line].items()}

    @functools.cached_property
    def visits(self) -> list[float]:
        """How often a warp runs each segment: as often as the PTX of its instructions.

        The assembler's subroutines are for operands at the edge of the range, which no step has: they never run.
        """
        found: list[float] = []
        after_call = False
        for segment in self.code:
            known = [i for i in segment.code if i.line in self.counts]
            times = [self.counts_of(i)["executions"] for i in known if i.kind in ANCHORS]
            times = times or [self.counts[i.line]["executions"] for i in known]
            # A CALL of a label is a jump, out of a loop.
            call = segment.ends_in == "CALL" and not segment.target.startswith(".L")
            aside = segment.in_subroutine or call or (after_call and not segment.labels)
            after_call = call
            found.append(0.0 if aside else statistics.median(times) / self.warps if times else 1.0)
        return found

    def accesses(self, segment: Segment) -> list[tuple[Instruction, dict[str, float]]]:
        """The accesses to memory of a segment, with the counts of all visits of all warps."""
        found = (i for i in segment.code if i.kind in ("shared", "global") and i.line in self.counts)
        return [(i, self.counts_of(i)) for i in found]

    def demand(self, number: int) -> Demand:
        """What a warp needs to run segment `number` once."""
        code, memory, units = self.code[number].code, dict[str, float](), dict[str, float]()
        for i, counts in self.accesses(self.code[number]):
            moved = {"read" if i.root in LOADS else "written": 32 * counts["sectors"]}
            add(memory, {"low": counts["wavefronts_low"], "high": counts["wavefronts_high"], **moved})
        for unit, amount in (i.unit for i in code if i.unit[0]):
            add(units, {unit: amount})
        runs = max(self.warps * self.visits[number], 1e-9)
        low, high, read, written = (memory.get(name, 0.0) / runs for name in ("low", "high", "read", "written"))
        shuffles = sum(i.kind == "shuffle" for i in code)
        return Demand(len(code), units, low, high, shuffles, read, written, self.code[number].ends_in == "BAR")


class Chain(NamedTuple):
    """The clocks that a warp alone takes for a segment, by phase."""

    spent: dict[str, float]
    exposed: dict[str, float]  # of these, waiting for loads from global memory


class _Warp:
    """A warp alone on its multiprocessor: its clock, and when the results that it may wait for are there."""

    def __init__(self, launch: Launch, gpu: Gpu, high: bool) -> None:
        self.launch = launch
        self.latency = gpu.l2_latency if high else gpu.l1_latency  # of a load from global memory
        self.shared_latency = gpu.shared_latency
        self.now = 0.0
        self.boards = [(0.0, "")] * 6  # of each scoreboard: when it is free, and the root of the instruction it is for
        self.copied = 0.0  # when the asynchronous copies begun so far are there
        self.groups: list[float] = []  # likewise, of every group of them

    def run(self, segment: Segment) -> Chain:
        """Runs a segment once."""
        chain = Chain(defaultdict(float), defaultdict(float))
        for i in segment.code:
            began, phase = self.now, self.launch.phase(i)
            waits = [board for n, board in enumerate(self.boards) if i.waits >> n & 1]
            if left := re.search(r"\.LE.*, 0x([0-9a-f]+)", i.opcode + i.operands) if i.root == "DEPBAR" else None:
                waits += [(then, "LDGSTS") for then in self.groups[: len(self.groups) - int(left[1], 16)]]
            for then, root in sorted(waits):
                if then > self.now:
                    chain.exposed[phase] += (then - self.now) * (root in LOADS)
                    self.now = then
            if i.root == "LDGSTS":
                self.copied = self.now + self.latency
            elif i.root == "LDGDEPBAR":
                self.groups.append(self.copied)
            if i.sets < 6:
                then = self.now + (self.latency if i.root in LOADS else self.shared_latency)
                self.boards[i.sets] = max(self.boards[i.sets][0], then), i.root
            self.now += max(i.stall, 1)
            chain.spent[phase] += self.now - began
        return chain


def chains(launch: Launch, gpu: Gpu, high: bool) -> list[Chain]:
    """The chain of every segment.

    Of an innermost loop the second round counts, when the loads that the first has begun are under way.
    """
    warp = _Warp(launch, gpu, high)
    found: list[Chain] = []
    places = {label: number for number, segment in enumerate(launch.code) for label in segment.labels}
    inner = 0  # the first segment that may begin an innermost loop
    for number, segment in enumerate(launch.code):
        found.append(warp.run(segment))
        first = places.get(segment.target, number + 1)
        if inner <= first <= number:
            found[first:] = [warp.run(again) for again in launch.code[first : number + 1]]
            inner = number
    return found


# The figures of a phase, by name: what program 0 executes of it, and its time. Instructions are under their KINDS, the
# ends of a pair under its name with _low and _high; bench/counts.py lists them.
Row = dict[str, float]


def add(row: Row, other: Mapping[str, float]) -> None:
    """Adds the figures of another row to a row."""
    for name, figure in other.items():
        row[name] = row.get(name, 0.0) + figure


def rows_of(launch: Launch, gpu: Gpu) -> dict[str, Row]:
    """The phases of a launch on a GPU, in the order of the code. All programs are taken to be like the one that is
    counted, and a multiprocessor to have as many at a time as fit."""
    rows: defaultdict[str, Row] = defaultdict(dict)
    for segment, visits in zip(launch.code, launch.visits, strict=True):
        issue = visits * math.ceil(launch.warps / gpus.SCHEDULERS)
        for i in segment.code:
            add(rows[launch.phase(i)], {i.kind: visits, "issue": issue, "barriers": visits * (i.root == "BAR")})
        for i, counts in launch.accesses(segment):
            row = rows[launch.phase(i)]
            add(row, {name: counts[name] for name in ("wavefronts_low", "wavefronts_high", "sectors")})
            if i.root in ATOMICS:
                waits = counts["executions"] * (launch.phase(i) == "grid_barrier")
                add(row, {"atomics": counts["lanes"], "grid_barriers": waits})

    occupancy = resources.occupancy(gpu.sm, launch.warps, launch.registers, launch.shared)
    fit = max(1, round(occupancy * resources.ARCHITECTURES[gpu.sm].warps / launch.warps))
    together = min(fit, math.ceil(launch.programs / gpu.processors))  # programs on a multiprocessor at a time
    turns = math.ceil(launch.programs / (gpu.processors * together))
    for high, us in ((False, "us_low"), (True, "us_high")):
        for number, chain in enumerate(chains(launch, gpu, high)):
            visits, alone = launch.visits[number], sum(chain.spent.values())
            clocks = gpus.clocks(gpu, launch.demand(number), alone, launch.warps * together, high)
            for phase, spent in chain.spent.items():
                exposed = visits * chain.exposed[phase] / gpu.l2_latency * high
                add(rows[phase], {us: turns * visits * clocks * spent / alone / gpu.ghz / 1000, "exposed": exposed})
        total = sum(row[us] for row in rows.values())
        slower = max(1.0, gpus.memory_us(gpu, launch.footprint) / total)
        for row in rows.values():
            row[us] = row[us] * slower + row.get("grid_barriers", 0) * gpus.wait_us(gpu, "barrier", high)
    return dict(rows)

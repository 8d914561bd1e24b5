"""What one program of a launch executes: counts of its PTX carried over to its machine code, phase by phase."""

import ast
import functools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench import gpus, resources
from bench.gpus import Demand, Gpu
from bench.machine_code import ATOMICS, LOADS, Instruction, Segment

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
KINDS = ("fp32", "tensor", "integer", "special", "shuffle", "shared", "global", "control")
# Instructions that PTX has one by one as well: they tell how often their surroundings run.
ANCHORS = ("shared", "global", "tensor", "shuffle")


@functools.cache
def _functions(file: str) -> list[tuple[range, str, bool]]:
    """Lines and name of the functions in a file of kernels/, and whether they are made of phases."""
    path = KERNELS / file
    found = []
    for node in ast.walk(ast.parse(path.read_text())) if path.exists() else ():
        if isinstance(node, ast.FunctionDef):
            called = {c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found.append((lines, node.name, any(name.endswith("_phase") for name in called)))
    return found


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
    """A kernel, and what one of its programs has executed of it."""

    kernel: str
    warps: int  # of a program
    programs: int
    footprint: int  # bytes of global memory that it was given
    code: list[Segment]
    registers: int
    shared: int
    counts: dict[int, dict[str, float]]  # by line of PTX: those of engine.Counts
    phases: dict[int, str]  # by line of PTX

    def phase(self, i: Instruction) -> str:
        """Of an instruction."""
        return self.phases.get(i.line, phase_of("", self.kernel))

    @functools.cached_property
    def copies(self) -> Counter[tuple[int, str]]:
        """How many instructions come from a line: where the assembler unrolls a loop, they share its executions."""
        return Counter((i.line, i.root) for segment in self.code for i in segment.code)

    @functools.cached_property
    def visits(self) -> list[float]:
        """How often a warp comes through each segment: as often as through the PTX of its instructions.

        The assembler's subroutines are for operands at the edge of the range, which no step has.
        """
        found: list[float] = []
        after_call = False
        for segment in self.code:
            known = [i for i in segment.code if i.line in self.counts]
            anchors = [i for i in known if i.kind in ANCHORS]
            times = [self.counts[i.line]["executions"] / self.copies[i.line, i.root] for i in anchors]
            times = times or [self.counts[i.line]["executions"] for i in known]
            # A CALL of a label is a jump, out of a loop.
            call = segment.ends_in == "CALL" and not segment.target.startswith(".L")
            aside = segment.in_subroutine or call or (after_call and not segment.labels)
            after_call = call
            usual = statistics.median(times) / self.warps if times else found[-1] if found else 1.0
            found.append(0.0 if aside else usual)
        return found

    def accesses(self, segment: Segment) -> Iterator[tuple[Instruction, dict[str, float]]]:
        """Its accesses to memory, with the counts of all visits of all warps."""
        for i in segment.code:
            if i.kind in ("shared", "global") and i.line in self.counts:
                yield i, {name: count / self.copies[i.line, i.root] for name, count in self.counts[i.line].items()}

    def demand(self, number: int) -> Demand:
        """What a warp asks for on one way through segment `number`."""
        segment, kinds = self.code[number], dict[str, float]()
        for unit, share in (i.unit for i in segment.code):
            kinds[unit] = kinds.get(unit, 0.0) + share
        kinds.pop("", None)
        low = high = read = written = 0.0
        for i, counts in self.accesses(segment):
            low, high = low + counts["wavefronts_low"], high + counts["wavefronts_high"]
            moved = 32 * counts["sectors"]
            read, written = (read + moved, written) if i.root in LOADS else (read, written + moved)
        ways = max(self.warps * self.visits[number], 1e-9)
        shuffles = sum(i.kind == "shuffle" for i in segment.code)
        return Demand(
            len(segment.code), kinds, low / ways, high / ways, shuffles, read / ways, written / ways,
            segment.ends_in == "BAR",
        )  # fmt: skip


class Chain(NamedTuple):
    """How a warp that is alone gets through a segment, in clocks by phase."""

    spent: dict[str, float]
    exposed: dict[str, float]  # of these, waiting for loads from global memory


def chains(launch: Launch, gpu: Gpu, high: bool) -> list[Chain]:
    """Every segment's. Of a loop without another one in it the second way through counts, when the loads that the first
    has begun are under way."""
    latency = gpu.l2_latency if high else gpu.l1_latency
    now = copied = 0.0  # when the asynchronous copies so far will be there
    ready, owner, groups = [0.0] * 6, [""] * 6, list[float]()

    def walk(segment: Segment) -> Chain:
        nonlocal now, copied
        chain = Chain(defaultdict(float), defaultdict(float))
        for i in segment.code:
            began, phase = now, launch.phase(i)
            waits = [(ready[board], owner[board]) for board in range(6) if i.waits >> board & 1]
            if group := re.search(r"\.LE.*, 0x([0-9a-f]+)", i.opcode + i.operands) if i.root == "DEPBAR" else None:
                waits += [(then, "LDGSTS") for then in groups[: len(groups) - int(group[1], 16)]]
            for then, root in sorted(waits):
                if then > now:
                    chain.exposed[phase] += (then - now) * (root in LOADS)
                    now = then
            if i.root == "LDGSTS":
                copied = now + latency
            elif i.root == "LDGDEPBAR":
                groups.append(copied)
            if i.sets < 6 and i.root != "LDGDEPBAR":
                then = now + (latency if i.root in LOADS and i.root != "LDGSTS" else gpu.shared_latency)
                ready[i.sets], owner[i.sets] = max(ready[i.sets], then), i.root
            now += max(i.stall, 1)
            chain.spent[phase] += now - began
        return chain

    found: list[Chain] = []
    places = {label: number for number, segment in enumerate(launch.code) for label in segment.labels}
    inner = 0  # where a loop may begin that has none in it
    for number, segment in enumerate(launch.code):
        found.append(walk(segment))
        first = places.get(segment.target, number + 1)
        if inner <= first <= number and segment.ends_in == "BRA":
            found[first:] = [walk(again) for again in launch.code[first : number + 1]]
            inner = number
    return found


# A phase: what program 0 executes of it, and its time; the figures that bench/counts.py lists, by name. Instructions
# are under their KINDS, the ends of a pair under its name with _low and _high.
Row = dict[str, float]


def add(row: Row, other: Mapping[str, float]) -> None:
    """Another's figures on top of a row's."""
    for name, figure in other.items():
        row[name] = row.get(name, 0.0) + figure


def rows_of(launch: Launch, gpu: Gpu) -> dict[str, Row]:
    """The phases of a launch on a GPU, in the order of the code. Programs are taken to be like the one that is counted,
    and a multiprocessor to have as many at a time as fit."""
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

    most = resources.occupancy(gpu.sm, launch.warps, launch.registers, launch.shared)
    fit = max(1, round(most * resources.ARCHITECTURES[gpu.sm].warps / launch.warps))
    together = min(fit, math.ceil(launch.programs / gpu.processors))
    turns = math.ceil(launch.programs / (gpu.processors * together))
    for high, us in ((False, "us_low"), (True, "us_high")):
        for number, chain in enumerate(chains(launch, gpu, high)):
            visits, alone = launch.visits[number], sum(chain.spent.values())
            clocks = gpus.clocks(gpu, launch.demand(number), alone, launch.warps * together, high)
            for phase, spent in chain.spent.items():
                exposed = visits * chain.exposed[phase] / gpu.l2_latency * high
                add(rows[phase], {us: turns * visits * clocks * spent / alone / gpu.ghz / 1000, "exposed": exposed})
        total = sum(row[us] for row in rows.values())
        slower = max(1.0, gpus.memory_us(gpu, launch.footprint) / total) if total else 1.0
        for row in rows.values():
            row[us] = row[us] * slower + row.get("grid_barriers", 0) * gpus.wait_us(gpu, "barrier", high)
    return dict(rows)

"""Kernels with a barrier taken out or weakened, as changes of their PTX."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What it is, its PTX, and what that becomes.
Change = tuple[str, re.Pattern[str], str]
# Each half of the grid barrier.
ORDERS: Sequence[Change] = (
    ("arrival does not release", re.compile(r"red\.release\.gpu"), "red.relaxed.gpu"),
    ("look does not acquire", re.compile(r"ld\.acquire\.gpu"), "ld.relaxed.gpu"),
    ("nobody waits", re.compile(r"setp\.ge\.s32 %done, %count, 0;"), "setp.ge.s32 %done, %count, -2147483647;"),
    ("one fewer is waited for", re.compile(r"setp\.ge\.s32 %done, %count, 0;"), "setp.ge.s32 %done, %count, -1;"),
)
BLOCK_BARRIER = re.compile(r"^(\s*)bar\.sync(\s+0;)", re.MULTILINE)
COPY_WAIT = re.compile(r"^(\s*)cp\.async\.wait_group(\s+\d+;)", re.MULTILINE)
BARRIERS: Sequence[Change] = (
    ("block barrier", BLOCK_BARRIER, r"\1// \2"),
    ("wait for copies", COPY_WAIT, r"\1// \2"),
)
# Of the atomic that counts the programs of an evaluation.
COUNTS: Sequence[Change] = (
    ("count does not release", re.compile(r"acq_rel"), "acquire"),
    ("count does not acquire", re.compile(r"acq_rel"), "release"),
)
ACCESS = re.compile(r"^\s*(?:@!?%\w+\s+)?(ld|st|atom|red|ldmatrix|stmatrix|cp)\.(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One change of one kernel: the number-th match of a pattern becomes something else."""

    kernel: str
    what: str
    number: int
    line: str  # of the source
    pattern: re.Pattern[str]
    becomes: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.what} {self.number}, at {self.line}"

    def __call__(self, ptx: str, kernel: str) -> str:
        matches = list(self.pattern.finditer(ptx))
        # A kernel may be launched in several configurations; those with fewer matches stay as they are.
        if kernel != self.kernel or self.number >= len(matches):
            return ptx
        match = matches[self.number]
        return ptx[: match.start()] + match.expand(self.becomes) + ptx[match.end() :]


def mutants_of(texts: dict[str, str], changes: Sequence[Change] = ORDERS) -> list[Mutant]:
    """All of these kernels, given their PTX by name."""
    return [
        Mutant(kernel, what, number, line_before(ptx, match.start()), pattern, becomes)
        for kernel, ptx in texts.items()
        for what, pattern, becomes in changes
        for number, match in enumerate(pattern.finditer(ptx))
    ]


def line_before(ptx: str, position: int) -> str:
    """The source line that a place in PTX belongs to."""
    lines = re.findall(r"\.loc\s[^\n]*//\s*([^\n]*)", ptx[:position])
    return lines[-1] if lines else "?"


def recorder(texts: dict[str, str]) -> Callable[[str, str], str]:
    """A change that changes nothing, and keeps the PTX of every kernel by name."""

    def record(ptx: str, kernel: str) -> str:
        texts[kernel] = ptx
        return ptx

    return record


def why_redundant(mutant: Mutant, ptx: str) -> str | None:
    """Why a block barrier, or a wait for copies, may be missing from compiled code without anybody noticing, or None
    where it may not.

    The emulator has compared the addresses of all accesses and found that the barrier orders none that conflict. This
    says how that can be, by what stands in PTX between it and its neighbours.
    """
    if mutant.what == "wait for copies":
        waits = list(COPY_WAIT.finditer(ptx))
        own = waits[mutant.number]
        loop = ptx[waits[mutant.number - 1].end() : own.start()] if mutant.number else ""
        if mutant.number + 1 == len(waits) and re.search(r"\bbra\b", loop) and "bra" not in ptx[own.end() :]:
            return "it stands behind the kernel's loop, in whose last round nothing is copied"
        return None
    if mutant.what != "block barrier":
        return None
    barriers = list(BLOCK_BARRIER.finditer(ptx))
    own = barriers[mutant.number]
    if mutant.number + 1 == len(barriers):
        return "it is the last one: what other threads have stored, nobody reads behind it"
    start = barriers[mutant.number - 1].end() if mutant.number else 0
    before, after = ptx[start : own.start()], ptx[own.end() : barriers[mutant.number + 1].start()]
    if "cp.async.wait_group" in before and not {("shared", "st"), ("shared", "stmatrix")} & accesses(before):
        return "it stands behind a wait for copies, and each thread reads what it has copied itself"
    if not any(in_conflict(accesses(before), accesses(after), space) for space in ("shared", "global")):
        return "a neighbour does its work: on one side of it nothing is stored that the other side could touch"
    return None


def in_conflict(before: set[tuple[str, str]], after: set[tuple[str, str]], space: str) -> bool:
    """Whether the two sides of a barrier could conflict in a space.

    Of shared memory one has to store, and the other to access it. In global memory both have to store: loads on one
    side of what the other stores are of the thread's own share, or the emulator would have found that they race.
    """
    storing = [any(s == space and how not in ("ld", "ldmatrix") for s, how in side) for side in (before, after)]
    if space == "global":
        return all(storing)
    return any(storing) and all(any(s == space for s, _ in side) for side in (before, after))


def accesses(ptx: str) -> set[tuple[str, str]]:
    """The memory that a piece of PTX accesses, and how."""
    found = set()
    for name, rest in ACCESS.findall(ptx):
        if "param" not in rest and "_group" not in rest:
            found.add(("shared" if "shared" in rest or "matrix" in name else "global", name))
    return found

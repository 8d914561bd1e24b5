"""Kernels with a grid barrier taken out or weakened, as changes of their PTX."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# What it is, its PTX, and what that becomes.
ORDERS = (
    ("arrival does not release", re.compile(r"red\.release\.gpu"), "red.relaxed.gpu"),
    ("look does not acquire", re.compile(r"ld\.acquire\.gpu"), "ld.relaxed.gpu"),
    ("nobody waits", re.compile(r"setp\.ge\.s32 %done, %count, 0;"), "setp.ge.s32 %done, %count, -2147483647;"),
    ("one fewer is waited for", re.compile(r"setp\.ge\.s32 %done, %count, 0;"), "setp.ge.s32 %done, %count, -1;"),
)


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
        if kernel != self.kernel:
            return ptx
        match = list(self.pattern.finditer(ptx))[self.number]
        return ptx[: match.start()] + match.expand(self.becomes) + ptx[match.end() :]


def mutants_of(texts: dict[str, str]) -> list[Mutant]:
    """All of these kernels, given their PTX by name."""
    return [
        Mutant(kernel, what, number, line_before(ptx, match.start()), pattern, becomes)
        for kernel, ptx in texts.items()
        for what, pattern, becomes in ORDERS
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

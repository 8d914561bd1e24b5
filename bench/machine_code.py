"""The machine code (SASS) of a kernel: its instructions, the PTX that each comes from, and what each waits for."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench import resources

# What is read from a listing of `nvdisasm -hex -gp`: a line of the PTX, a label, or an instruction of 128 bits, whose
# upper half says how it is scheduled.
LISTED = re.compile(
    r"""//\#\#\ File\ "\.nv_debug_ptx_txt",\ line\ (?P<line>\d+)
      | ^(?P<label>\.L_x_\d+|\$[\w$]+):
      | /\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>\S+)(?P<operands>.*?);\s+/\*\ 0x[0-9a-f]{16}\ \*/
        \s+/\*\ 0x(?P<upper>[0-9a-f]{16})\ \*/""",
    re.MULTILINE | re.VERBOSE,
)
ENDS = ("BRA", "BRX", "EXIT", "RET", "CALL", "BAR")  # the last instruction of a segment

# By the root of an opcode; all others are "integer": addresses, comparisons, moves, selections.
KINDS = {
    **dict.fromkeys(("FFMA", "FFMA2", "FADD", "FADD2", "FMUL", "FMUL2"), "fp32"),
    **dict.fromkeys(("HMMA", "IMMA"), "tensor"),
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), "special"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"), "special"),
    "SHFL": "shuffle",
    **dict.fromkeys(("LDS", "STS", "LDSM", "STSM", "LDGSTS"), "shared"),
    **dict.fromkeys(("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG"), "global"),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "WARPSYNC", "MEMBAR", "ERRBAR", "CCTL"), "control"),
}
LOADS = ("LDG", "LD", "LDGSTS", "ATOM", "ATOMG")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
MATRICES = ("LDSM", "STSM")
ON_ONE_LANE = ("R2UR", "S2R", "S2UR", "CS2R", "LDC", "LDGDEPBAR", "DEPBAR")  # and every root that begins with U


class Instruction(NamedTuple):
    """An instruction of the machine code."""

    opcode: str
    operands: str
    line: int  # of the PTX
    stall: int  # clocks until its warp may issue the next
    sets: int  # the scoreboard, of six, that is taken until its result is there; 7: none
    waits: int  # mask of the scoreboards that it waits for

    @property
    def root(self) -> str:
        """FFMA of FFMA.FTZ."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of KINDS, or integer."""
        return KINDS.get(self.root, "integer")

    @property
    def unit(self) -> tuple[str, float]:
        """The rate of gpus.Gpu that limits it, and the results or multiply-adds that a warp needs of that unit.

        "" where an issue slot is its only cost.
        """
        if self.kind == "tensor":  # HMMA.1688: 16 x 8 by 8
            depth = int(re.sub(r"\D", "", self.opcode.split(".")[1])[3:] or 8)
            return ("tf32" if "TF32" in self.opcode else "half"), 16 * 8 * depth
        if self.kind == "special":
            fp64 = self.root.startswith("D")
            return "fp64" if fp64 else "wide" if re.search(r"[FSU]64", self.opcode) else "special", 32
        on_one_lane = self.root.startswith("U") or self.root in ON_ONE_LANE
        if self.kind == "fp32" or (self.kind == "integer" and not on_one_lane):
            return self.kind, 32
        return "", 0

    @property
    def bytes(self) -> int:
        """The bytes that a lane accesses in memory."""
        parts = self.opcode.split(".")
        return 16 if "128" in parts else 8 if "64" in parts else 4


@dataclass
class Segment:
    """Machine code with one way in, one way out, and no block barrier before its end."""

    labels: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    in_subroutine: bool = False

    @property
    def ends_in(self) -> str:
        """The root of its last instruction."""
        return self.code[-1].root

    @property
    def target(self) -> str:
        """The label that its last instruction jumps to, or ""."""
        found = re.search(r"`\((\S+)\)", self.code[-1].operands)
        return found[1] if found else ""


def segments(listing: str) -> list[Segment]:
    """The segments in a listing of `nvdisasm -hex -gp`.

    The fields of the encoding that schedule an instruction: Jia et al., arXiv:1804.06826, for Volta and all since.
    """
    found, line, subroutine = [Segment()], 0, False
    for match in LISTED.finditer(listing):
        if match["line"]:
            line = int(match["line"])
        elif label := match["label"]:
            subroutine |= label.startswith("$")
            if found[-1].code:
                found.append(Segment())
            found[-1].labels.append(label)
            found[-1].in_subroutine = subroutine
        else:
            control = int(match["upper"], 16) >> 41
            stall, sets, waits = control & 15, control >> 5 & 7, control >> 11 & 63
            found[-1].code.append(Instruction(match["opcode"], match["operands"], line, stall, sets, waits))
            if found[-1].ends_in in ENDS:
                found.append(Segment(in_subroutine=subroutine))
    return [segment for segment in found if segment.code]


class Compiled(NamedTuple):
    """A kernel compiled for an architecture."""

    code: list[Segment]
    registers: int  # a thread
    shared: int  # bytes

    @property
    def merged(self) -> dict[int, int]:
        """Line of PTX -> bytes that a lane accesses there: the assembler merges accesses to neighbours into one."""
        found: dict[int, int] = {}
        for i in (i for segment in self.code for i in segment.code):
            if i.kind in ("shared", "global") and i.root not in (*ATOMICS, *MATRICES, "LDGSTS"):
                found[i.line] = max(i.bytes, found.get(i.line, 0))
        return found


_compiled: dict[tuple[str, int], Compiled] = {}


def compiled(shipped: Any, capability: int) -> Compiled:
    """A kernels._aot.Shipped, compiled and disassembled."""
    key = (shipped.key_on(capability), capability)
    if key not in _compiled:
        kernel = shipped.compile(capability)
        cubin = kernel.asm["cubin"]
        listing = resources.binary_tool("nvdisasm", cubin, "-hex", "-gp", "-c")
        _compiled[key] = Compiled(segments(listing), resources.resource_usage(cubin)["REG"], kernel.metadata.shared)
    return _compiled[key]

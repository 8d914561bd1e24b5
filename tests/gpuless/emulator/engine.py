"""The engine in engine/, compiled when it is first needed, and its structures as ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "engine"
# Without contraction: a multiply-add is one only where PTX says so.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno")

MAX_FINDINGS = 10_000
SHARED_BASE = 0x400  # SharedMemory::BASE
STRONG, ACQUIRE, RELEASE = 1, 2, 4  # Order
KINDS = (
    "race: write, then read",
    "race: read, then write",
    "race: two writes",
    "race: atomic and plain access",
    "out of bounds",
    "read of what nobody wrote",
    "misaligned address",
    "block barrier in divergent lanes",
    "warps at different block barriers",
    "block barrier after warps have ended",
    "deadlock",
    "lanes named that do not take part",
    "access while a copy is under way",
    "division by zero",
    "too many instructions",
)
REACHES = ("", "within a warp", "between warps", "between programs")
SPACES = ("global", "shared", "parameters", "local")
ATOMICS = (
    "add",
    "add.f32",
    "add.f64",
    "exch",
    "cas",
    "min.s",
    "max.s",
    "min.u",
    "max.u",
    "min.f",
    "max.f",
    "and",
    "or",
    "xor",
)
SHUFFLES = ("idx", "up", "down", "bfly")
POLICIES = ("rotation", "random", "skewed", "ahead", "behind")


class NoCompiler(Exception):
    """There is no C++ compiler, or it cannot build the engine; the message says which."""


class Instruction(ctypes.Structure):
    """See engine/interface.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("operation", "guard", "negated", "to_count", "from_count")),
        ("to", ctypes.c_int32 * 8),
        ("source", ctypes.c_int32 * 16),
        *(
            (name, ctypes.c_int32)
            for name in (
                "target", "reconvergence", "bytes", "count", "order", "register_bytes", "is_signed", "variant"
            )
        ),
        ("displacement", ctypes.c_int64),
    )  # fmt: skip


class RawSchedule(ctypes.Structure):
    """See Schedule, and engine/interface.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "policy", "quantum", "resident", "first_blocks", "favoured", "races", "stale_l1", "late_stores",
                "poison_racing", "approximation",
            )
        ),
        ("most_instructions", ctypes.c_uint64),
    )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """In what order blocks and warps run, and how adverse their memory is.

    Attributes:
        seed: of all that is drawn.
        policy: rotation (warps by turns), random, skewed (some far faster than others), ahead and behind (one block
            runs whenever it can, or only while all others wait for it).
        quantum: instructions a turn; with all policies but rotation between 1 and twice as many.
        resident: blocks that run at the same time; 0: all.
        first_blocks: run so many blocks of the grid and leave the others out; 0: all.
        favoured: the block that ahead and behind are about.
        races: detect them.
        stale_l1: plain loads come from an L1 cache that keeps its lines until an acquire.
        late_stores: plain stores are held back until a release.
        poison_racing: a plain load that races returns NaN.
        approximation: results of approximate instructions are off by up to so many ulp.
        most_instructions: of all warps together; more are a finding.
    """

    seed: int = 1
    policy: str = "random"
    quantum: int = 64
    resident: int = 0
    first_blocks: int = 0
    favoured: int = 0
    races: bool = True
    stale_l1: bool = False
    late_stores: bool = False
    poison_racing: bool = False
    approximation: int = 0
    most_instructions: int = 2_000_000_000

    def raw(self) -> RawSchedule:
        """As the engine takes it."""
        return RawSchedule(**asdict(self) | {"policy": POLICIES.index(self.policy)})


class Counts(ctypes.Structure):
    """See engine/interface.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("executions", "lanes", "wavefronts_low", "wavefronts_high", "sectors", "bytes")
    )


class Launch(ctypes.Structure):
    """See engine/interface.h."""

    _fields_ = (
        ("program", ctypes.POINTER(Instruction)),
        ("length", ctypes.c_int32),
        ("registers", ctypes.c_char_p),
        ("register_bytes", ctypes.c_int32),
        ("predicates", ctypes.POINTER(ctypes.c_uint32)),
        ("predicate_count", ctypes.c_int32),
        ("specials", ctypes.POINTER(ctypes.c_int32)),
        ("special_count", ctypes.c_int32),
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("memory", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("threads", "shared_bytes", "local_bytes")),
        ("global_grain", ctypes.c_int32),
        ("shared_grain", ctypes.c_int32),
        ("counted", ctypes.c_int32),
        ("counts", ctypes.POINTER(Counts)),
    )


class RawFinding(ctypes.Structure):
    """See engine/interface.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "kind", "reach", "space", "first", "second", "first_block", "first_thread", "second_block",
                "second_thread", "same_value",
            )
        ),
        ("address", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )  # fmt: skip


class Statistics(ctypes.Structure):
    """See engine/interface.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("instructions", "accesses", "barriers", "stale_reads", "poisoned_reads")
    )


class Operation(NamedTuple):
    """A row of the engine's table: its number, and the types of result and operands where these are registers."""

    number: int
    result: str | None
    operands: tuple[str, ...]


@cache
def library() -> ctypes.CDLL:
    """The compiled engine, kept in the user's cache by what it was made of.

    Raises:
        NoCompiler: it cannot be built here.
    """
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        raise NoCompiler("no C++ compiler was found (CXX, c++, g++ or clang++)")
    made_of = [compiler, *FLAGS, _processor(), *(path.read_text() for path in sorted(SOURCES.iterdir()))]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlp_fast"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="mlp_fast-"))
    built = folder / f"emulator-{name}.so"
    if not built.exists():
        unfinished = built.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, "-shared", "-fPIC", SOURCES / "engine.cpp", "-o", unfinished]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise NoCompiler(f"{compiler} cannot build the emulator's engine: {made.stderr.strip()[:500]}")
        unfinished.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.operation_name.restype = loaded.operation_signature.restype = ctypes.c_char_p
    return loaded


def _processor() -> str:
    """What -march=native depends on: code for another processor must not be found in a shared cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


@cache
def operations() -> dict[str, Operation]:
    """The engine's table by name."""
    table: dict[str, Operation] = {}
    while name := library().operation_name(len(table)):
        result, _, operands = library().operation_signature(len(table)).decode().partition("=")
        key = name.decode()
        assert key not in table, f"{key} stands twice in the engine's table"
        table[key] = Operation(len(table), result or None, tuple(operands.split(",")))
    return table

"""Decodes PTX, as Triton emits it, into a program for the engine.

A register of n bytes is an array of 32 lanes in the register file of a warp; so are constants and special registers,
which are filled in beforehand. A predicate is a mask of 32 bits with a number. What an instruction computes lane by
lane stands in engine/lanewise.def, with the types of its operands, so this file knows nothing about it; here is how the
operands of all others are written: memory, branches, barriers, exchanges between lanes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx

from .engine import ACQUIRE, ATOMICS, RELEASE, SHARED_BASE, SHUFFLES, STRONG, Instruction, operations

LANES = 32
PARAMETER_BASE = 0x1000  # address of the first parameter, in a space of their own
LOCAL_BASE = 0x500000000000  # address of a thread's local memory
WIDTHS = {f"{letter}{8 * n}": n for n in (1, 2, 4, 8) for letter in "bus"} | {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
SPECIALS = {
    f"%{name}.{axis}": 3 * i + j
    for i, name in enumerate(("tid", "ctaid", "nctaid", "ntid"))
    for j, axis in enumerate("xyz")
} | {"%laneid": 12}
ORDERS = {
    "relaxed": STRONG, "volatile": STRONG, "acquire": STRONG | ACQUIRE, "release": STRONG | RELEASE,
    "acq_rel": STRONG | ACQUIRE | RELEASE,
}  # fmt: skip
# What changes neither the meaning of an access nor what the memory model says of it here.
HINTS = re.compile(r"L1::\w+|L2::\w+|ca|cg|cs|lu|wb|wt|gpu|sys")


class Unsupported(Exception):
    """PTX that the emulator does not know; the message is the instruction."""


class Register(NamedTuple):
    """Where a register lies in the register file, or which predicate it is."""

    width: int | None  # bytes; None: a predicate
    place: int


@dataclass
class Program:
    """A kernel, decoded."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of the instructions
    lines: list[str] = field(
        default_factory=list
    )  # of the source: file.py:line:column, with the chain of inlined calls
    ptx_lines: list[int] = field(default_factory=list)  # of the instructions, from 1
    parameters: list[tuple[int, str]] = field(default_factory=list)  # offset, type
    registers: bytes = b""
    predicates: list[int] = field(default_factory=list)
    specials: list[int] = field(default_factory=list)
    local_bytes: int = 0
    grains: dict[str, int] = field(default_factory=lambda: {"global": 4, "shared": 4})  # smallest access, in bytes


def decode(ptx: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        Unsupported: it has an instruction that the emulator does not know.
    """
    return _Decoder(ptx).program


class _Decoder:
    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{(.*)", ptx, re.DOTALL)
        if entry is None:
            raise Unsupported("a module without a kernel")
        self.program = Program(entry[1])
        self.scopes: list[dict[str, Register]] = [{}]  # registers by name, of the blocks in braces around
        self.label_scopes: list[dict[str, int]] = [{}]
        self.branches: list[tuple[Instruction, str, list[dict[str, int]]]] = []
        self.symbols = {"global_smem": SHARED_BASE}
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_predicates: dict[bool, int] = {}
        self.special_places: dict[str, int] = {}
        self.size, self.predicate_count = 0, 0
        self._parameters(entry[2])
        self._body(entry[3], ptx[: entry.start(3)].count("\n") + 1)
        for instruction, label, scopes in self.branches:
            instruction.target = next(scope[label] for scope in reversed(scopes) if label in scope)
        _find_reconvergence(self.program.instructions)
        self._fill_registers()

    # --- declarations

    def _parameters(self, text: str) -> None:
        offset = 0
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?\s(\w+)\s*(?:,|$)", text):
            offset = -(-offset // WIDTHS[kind]) * WIDTHS[kind]
            self.symbols[name] = PARAMETER_BASE + offset
            self.program.parameters.append((offset, kind))
            offset += WIDTHS[kind]

    def _declare(self, kind: str, names: str) -> None:
        for name in names.split(","):
            base, _, count = name.strip().rstrip(">").partition("<")
            for declared in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                self.scopes[-1][declared] = self._new(None if kind == "pred" else WIDTHS[kind])

    def _new(self, width: int | None) -> Register:
        if width is None:
            self.predicate_count += 1
            return Register(None, self.predicate_count - 1)
        place = -(-self.size // 64) * 64
        self.size = place + LANES * width
        return Register(width, place)

    def _fill_registers(self) -> None:
        data = bytearray(b"\xff" * self.size)
        for (value, width), place in self.constants.items():
            data[place : place + LANES * width] = value.to_bytes(width, "little") * LANES
        self.program.registers = bytes(data)
        self.program.predicates = [0] * self.predicate_count
        for value, number in self.constant_predicates.items():
            self.program.predicates[number] = 2**LANES - 1 if value else 0
        self.program.specials = [x for name, place in self.special_places.items() for x in (place, SPECIALS[name])]

    # --- statements

    def _body(self, text: str, first_line: int) -> None:
        source_line, used = "?", 0
        for number, raw in enumerate(text.split("\n"), first_line):
            line, _, comment = (part.strip() for part in raw.partition("//"))
            if re.match(r"\.loc\s", line):
                source_line = comment or source_line
            elif line.startswith(".pragma"):
                mask = re.search(r"used_bytes_mask (0x[0-9a-fA-F]+)", line)
                used = int(mask[1], 16) if mask else 0
            elif local := re.match(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", line):
                self.symbols[local[1]] = LOCAL_BASE
                self.program.local_bytes = int(local[2])
            elif registers := re.match(r"\.reg\s+\.(\w+)\s+(.*);", line):
                self._declare(registers[1], registers[2])
            elif label := re.fullmatch(r"([$\w]+):", line):
                self.label_scopes[-1][label[1]] = len(self.program.instructions)
            elif line == "{":
                self.scopes.append({})
                self.label_scopes.append({})
            elif line == "}":
                self.scopes.pop()
                self.label_scopes.pop()
                if not self.scopes:
                    return
            elif line.startswith("."):
                raise Unsupported(line)
            else:
                for statement in filter(None, map(str.strip, line.split(";"))):
                    self.program.instructions.append(self._instruction(statement, used))
                    self.program.texts.append(statement)
                    self.program.lines.append(source_line)
                    self.program.ptx_lines.append(number)
                    used = 0

    def _instruction(self, text: str, used: int) -> Instruction:
        instruction = Instruction(guard=-1, reconvergence=-1)
        guarded = re.match(r"@(!?)(%\w+)\s+(.*)", text, re.DOTALL)
        if guarded:
            instruction.negated, instruction.guard = guarded[1] == "!", self._predicate(guarded[2])
            text = guarded[3]
        name, _, rest = text.replace("\t", " ").partition(" ")
        operands = _split(rest)
        if name in ("min.f32", "max.f32") and len(operands) == 4:
            name = name.replace(".", "3.")  # as the table calls those of three operands
        known = operations().get(name)
        plain = not any("{" in o or o == "%globaltimer" for o in operands)
        if known is not None and known.result is not None and plain:
            if len(operands) != 1 + len(known.operands):
                raise Unsupported(text)
            source = [self._operand(o, kind) for o, kind in zip(operands[1:], known.operands, strict=True)]
            self._set(instruction, name, [self._operand(operands[0], known.result, to=True)], source)
        else:
            parts = name.split(".")
            encode = _ENCODERS.get(parts[0])
            if encode is None:
                raise Unsupported(name)
            instruction.variant = used
            encode(self, instruction, parts, operands)
        return instruction

    @staticmethod
    def _set(instruction: Instruction, operation: str, to: Sequence[int], source: Sequence[int]) -> None:
        if operation not in operations():
            raise Unsupported(operation)
        instruction.operation = operations()[operation].number
        instruction.to_count, instruction.from_count = len(to), len(source)
        instruction.to[: len(to)], instruction.source[: len(source)] = to, source

    # --- operands

    def _lookup(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"register {name}")

    def _operand(self, text: str, kind: str, to: bool = False) -> int:
        if kind == "pred":
            return self._predicate(text)
        return self._place(text, WIDTHS[kind], to)

    def _place(self, text: str, width: int, to: bool = False) -> int:
        """Where an operand of so many bytes lies; a narrower type may lie in a wider register."""
        if text == "_" and to:
            return -1
        if text in SPECIALS:
            if text not in self.special_places:
                self.special_places[text] = self._new(4).place
            return self.special_places[text]
        if text.startswith("%"):
            register = self._lookup(text)
            if register.width != width:
                raise Unsupported(f"operand {text} of {register.width} bytes where {width} are due")
            return register.place
        value = self.symbols[text] if text in self.symbols else _number(text)
        key = (value & ((1 << 8 * width) - 1), width)
        if key not in self.constants:
            self.constants[key] = self._new(width).place
        return self.constants[key]

    def _predicate(self, text: str) -> int:
        if text.startswith("%"):
            register = self._lookup(text)
            if register.width is not None:
                raise Unsupported(f"{text} where a predicate is due")
            return register.place
        value = _number(text) != 0
        if value not in self.constant_predicates:
            self.constant_predicates[value] = self._new(None).place
        return self.constant_predicates[value]

    def _width(self, operands: list[str], otherwise: int) -> int:
        """Bytes of the registers that hold the elements of an access."""
        named = next((o for o in operands if o.startswith("%")), None)
        return otherwise if named is None else self._lookup(named).width or 0

    def _address(self, text: str, width: int) -> tuple[int, int]:
        """Register and displacement of [register + displacement]."""
        address = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if address is None:
            raise Unsupported(f"address {text}")
        return self._place(address[1], width), int(address[2] or "0", 0)

    # --- instructions that are not lane by lane

    def _branch(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        self._set(instruction, "bra", [], [])
        self.branches.append((instruction, operands[0], list(self.label_scopes)))

    def _return(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        self._set(instruction, "ret", [], [])

    def _barrier(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        if parts[1:] == ["warp", "sync"]:
            return self._set(instruction, "bar.warp.sync", [], [])
        if parts[1:] not in (["sync"], ["sync", "aligned"], ["cta", "sync", "aligned"]) or operands != ["0"]:
            raise Unsupported(".".join(parts) + " " + ", ".join(operands))
        return self._set(instruction, "bar.sync", [], [])

    def _policy(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        self._set(instruction, "createpolicy", [], [])

    def _move(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        to, source = operands
        width = WIDTHS[parts[1]]
        if source == "%globaltimer":
            return self._set(instruction, "mov.globaltimer", [self._place(to, 8, to=True)], [])
        pieces = _braced(source if source.startswith("{") else to)
        instruction.count, instruction.bytes = len(pieces), width // len(pieces)
        places = [self._place(piece, instruction.bytes, to=to.startswith("{")) for piece in pieces]
        if source.startswith("{"):
            return self._set(instruction, "mov.pack", [self._place(to, width, to=True)], places)
        return self._set(instruction, "mov.unpack", places, [self._place(source, width)])

    def _access(self, instruction: Instruction, parts: list[str]) -> tuple[str, str]:
        """Fills in what the parts of a memory access's name say; its space and the type of its elements."""
        space, kind, count = "", "", 1
        for part in parts:
            if part in ("global", "shared", "param", "local"):
                space = part
            elif part in WIDTHS:
                kind = part
            elif part in ("v2", "v4", "v8"):
                count = int(part[1])
            elif part in ORDERS:
                instruction.order |= ORDERS[part]
            elif not HINTS.fullmatch(part):
                raise Unsupported(".".join(parts))
        if not kind:
            raise Unsupported(".".join(parts))
        instruction.bytes, instruction.count, instruction.is_signed = WIDTHS[kind], count, kind.startswith("s")
        if space in self.program.grains:
            self.program.grains[space] = min(self.program.grains[space], WIDTHS[kind] * count)
        # An address without a space is one of local memory: Triton makes no others.
        return space or "local", kind

    def _load(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        used = instruction.variant
        space, kind = self._access(instruction, parts[1:])
        to = _braced(operands[0])
        instruction.register_bytes = self._width(to, WIDTHS[kind])
        places = [self._place(o, instruction.register_bytes, to=True) for o in to]
        if used and space != "shared":
            raise Unsupported(f"a mask of used bytes at {'.'.join(parts)}")
        return self._memory(instruction, f"ld.{space}", places, operands[1], [])

    def _store(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        space, kind = self._access(instruction, parts[1:])
        data = _braced(operands[1])
        instruction.register_bytes = self._width(data, WIDTHS[kind])
        places = [self._place(o, instruction.register_bytes) for o in data]
        self._memory(instruction, f"st.{space}", [], operands[0], places)

    def _memory(
        self, instruction: Instruction, operation: str, to: Sequence[int], address: str, data: Sequence[int]
    ) -> None:
        place, displacement = self._address(address, 4 if "shared" in operation or "matrix" in operation else 8)
        bases = {"ld.param": PARAMETER_BASE, "ld.local": LOCAL_BASE, "st.local": LOCAL_BASE}
        instruction.displacement = displacement - bases.get(operation, 0)
        self._set(instruction, operation, to, [place, *data])

    def _atomic(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        what = next((p for p in parts if p in {a.partition(".")[0] for a in ATOMICS}), "")
        space, kind = self._access(instruction, [p for p in parts[1:] if p != what])
        if space != "global" or not what:
            raise Unsupported(".".join(parts))
        instruction.variant = _update(what, kind)
        instruction.order |= STRONG
        instruction.register_bytes = WIDTHS[kind]
        to = [] if parts[0] == "red" else _braced(operands.pop(0))
        data = [*_braced(operands[1]), *operands[2:]]
        places = [self._place(o, WIDTHS[kind], to=True) for o in to]
        self._memory(instruction, "atom.global", places, operands[0], [self._place(o, WIDTHS[kind]) for o in data])

    def _matrix(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        name = ".".join(parts)
        form = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", name)
        if form is None:
            raise Unsupported(name)
        instruction.count, instruction.variant = int(form[1]), bool(form[2])
        if parts[0] == "ldmatrix":
            to = [self._place(o, 4, to=True) for o in _braced(operands[0])]
            return self._memory(instruction, "ldmatrix", to, operands[1], [])
        return self._memory(instruction, "stmatrix", [], operands[0], [self._place(o, 4) for o in _braced(operands[1])])

    def _copy(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        name = ".".join(parts)
        if name == "cp.async.commit_group":
            return self._set(instruction, name, [], [])
        if name == "cp.async.wait_group":
            instruction.variant = _number(operands[0])
            return self._set(instruction, name, [], [])
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)*", name):
            raise Unsupported(name)
        to, instruction.displacement = self._address(operands[0], 4)
        source, instruction.target = self._address(operands[1], 8)
        instruction.bytes = _number(operands[2])
        given = [self._place(operands[3], 4)] if len(operands) > 3 else []
        return self._set(instruction, "cp.async", [], [to, source, *given])

    def _shuffle(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        if parts[1] != "sync" or parts[2] not in SHUFFLES or parts[3:] != ["b32"]:
            raise Unsupported(".".join(parts))
        instruction.variant = SHUFFLES.index(parts[2])
        value, _, valid = operands[0].partition("|")
        to = [self._place(value, 4, to=True)] + ([self._predicate(valid)] if valid else [])
        self._set(instruction, "shfl.sync", to, [self._place(o, 4) for o in operands[1:]])

    def _reduce(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        if parts[1] != "sync" or parts[3:] not in (["s32"], ["u32"], ["b32"], ["f32"]):
            raise Unsupported(".".join(parts))
        instruction.variant = _update(parts[2], parts[3])
        self._set(
            instruction, "redux.sync", [self._place(operands[0], 4, to=True)], [self._place(o, 4) for o in operands[1:]]
        )

    def _product(self, instruction: Instruction, parts: list[str], operands: list[str]) -> None:
        name = ".".join(parts)
        form = re.fullmatch(r"mma\.sync\.aligned\.(m16n8k(?:8|16))\.row\.col\.f32\.(tf32|bf16|f16)\.\2\.f32", name)
        if form is None or f"mma.{form[1]}.{form[2]}" not in operations():
            raise Unsupported(name)
        to = [self._place(o, 4, to=True) for o in _braced(operands[0])]
        source = [self._place(o, 4) for group in operands[1:] for o in _braced(group)]
        self._set(instruction, f"mma.{form[1]}.{form[2]}", to, source)


_ENCODERS: dict[str, Callable[[_Decoder, Instruction, list[str], list[str]], None]] = {
    "bra": _Decoder._branch,
    "ret": _Decoder._return,
    "bar": _Decoder._barrier,
    "barrier": _Decoder._barrier,
    "createpolicy": _Decoder._policy,
    "mov": _Decoder._move,
    "ld": _Decoder._load,
    "st": _Decoder._store,
    "atom": _Decoder._atomic,
    "red": _Decoder._atomic,
    "ldmatrix": _Decoder._matrix,
    "stmatrix": _Decoder._matrix,
    "cp": _Decoder._copy,
    "shfl": _Decoder._shuffle,
    "redux": _Decoder._reduce,
    "mma": _Decoder._product,
}


def _update(what: str, kind: str) -> int:
    """What an atomic or a reduction does with two numbers of a type."""
    named = {"min": f"min.{kind[0]}", "max": f"max.{kind[0]}"}.get(what, f"{what}.{kind}")
    if named in ATOMICS:
        return ATOMICS.index(named)
    if what not in ATOMICS or kind.startswith("f"):
        raise Unsupported(f"{what} of {kind}")
    return ATOMICS.index(what)


def _split(text: str) -> list[str]:
    """Operands, a group in braces or brackets as one."""
    return [match.strip() for match in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if match.strip()]


def _braced(text: str) -> list[str]:
    """The members of a group in braces, or the one operand."""
    return [member.strip() for member in text.strip("{} ").split(",")]


def _number(text: str) -> int:
    """An integer, or the bits of a float."""
    if re.match(r"0[fFdD]", text):
        return int(text[2:], 16)
    digits = text.rstrip("U")
    return int(digits, 8) if re.fullmatch(r"-?0\d+", digits) else int(digits, 0)


def _find_reconvergence(instructions: list[Instruction]) -> None:
    """Where the lanes of a conditional branch meet again: the first instruction that all ways from it come to."""
    jump, end = (operations()[name].number for name in ("bra", "ret"))
    length = len(instructions)
    starts = {0} | {i + 1 for i, x in enumerate(instructions) if x.operation in (jump, end)}
    starts |= {x.target for x in instructions if x.operation == jump}
    ordered = sorted(s for s in starts if s < length)
    backwards = networkx.DiGraph()
    backwards.add_node(length)  # the exit
    for start, following in zip(ordered, [*ordered[1:], length], strict=True):
        last = instructions[following - 1]
        if last.operation == jump:
            backwards.add_edge(last.target, start)
        if last.operation == end:
            backwards.add_edge(length, start)
        if last.operation not in (jump, end) or last.guard >= 0:
            backwards.add_edge(following, start)
    dominators = networkx.immediate_dominators(backwards, length)
    for start, following in zip(ordered, [*ordered[1:], length], strict=True):
        last = instructions[following - 1]
        if last.operation == jump:
            meeting = dominators.get(start, length)
            last.reconvergence = meeting if meeting < length else -1

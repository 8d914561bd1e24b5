"""The emulator's instructions, each family against numpy or the formulas of the PTX manual."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from emulator import Unsupported
from emulator.engine import operations
from emulator.ptx import WIDTHS
from handwritten import STORE, THREADS, launch

pytestmark = pytest.mark.usefixtures("engine")
Array = Any

LANES = 32
NUMPY = {f"{a}{n}": f"{b}{n}" for n in (16, 32, 64) for a, b in (("b", "uint"), ("u", "uint"), ("s", "int"))} | {
    "f32": "float32",
    "f64": "float64",
    "pred": "bool",
}
REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}


def computed(opcode: str, *operands: Array) -> Array:
    """What a lanewise instruction makes of these operands, a thread a number."""
    operation = operations()[opcode]
    assert operation.result is not None
    out = np.zeros(THREADS, NUMPY[operation.result] if operation.result != "pred" else "uint32")
    buffers = [np.ascontiguousarray(o.astype("uint32") if o.dtype == bool else o) for o in operands]
    lines = []

    def address(i: int, width: int) -> None:
        lines.append(f"mul.wide.u32 %rd{20 + i}, %r0, {width};\nadd.s64 %rd{20 + i}, %rd{20 + i}, %rd{i};")

    names = []
    for i, kind in enumerate(operation.operands, 1):
        width = WIDTHS.get(kind, 4)
        address(i, width)
        register = f"{REGISTERS[width]}{30 + i}"
        lines.append(f"ld.global.b{8 * width} {{ {register} }}, [ %rd{20 + i} + 0 ];")
        if kind == "pred":
            lines.append(f"setp.ne.b32 %p{i}, {register}, 0;")
        names.append(f"%p{i}" if kind == "pred" else register)
    width = WIDTHS.get(operation.result, 4)
    address(0, width)
    result = "%p0" if operation.result == "pred" else f"{REGISTERS[width]}30"
    lines.append(f"{opcode.replace('min3', 'min').replace('max3', 'max')} {result}, {', '.join(names)};")
    if operation.result == "pred":
        lines.append("selp.b32 %r30, 1, 0, %p0;")
    lines.append(f"st.global.b{8 * width} [ %rd20 + 0 ], {{ {REGISTERS[width]}30 }};")
    assert launch("\n".join(lines), out, *buffers) == []
    return out.astype(bool) if operation.result == "pred" else out


def inputs(kind: str, seed: int) -> Array:
    """Numbers of a type: random ones of all sizes, and the special ones in all pairings with another seed's."""
    generator = np.random.default_rng(seed)
    if kind == "pred":
        return generator.random(THREADS) < 0.5
    dtype = np.dtype(NUMPY[kind])
    if dtype.kind == "f":
        special = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 3e-39]
        numbers = generator.standard_normal(THREADS) * np.exp(generator.uniform(-20, 20, THREADS))
    else:
        info = np.iinfo(dtype)
        special = [0, 1, info.max, info.min, info.max - 1, 2, info.max // 2, 3]
        numbers = generator.integers(info.min, info.max, THREADS, dtype, endpoint=True)
        numbers >>= generator.integers(0, dtype.itemsize * 8 - 1, THREADS).astype(dtype)
    numbers = numbers.astype(dtype)
    pairs = list(itertools.product(range(8), repeat=2))
    numbers[:64] = np.array(special, dtype)[[p[seed % 2] for p in pairs]]
    return numbers


def wide(x: Array) -> Array:
    """Python's integers, which do not overflow."""
    return x.astype(object)


def whole(f: Callable[..., int], bits: int) -> Callable[..., Array]:
    """A function of Python integers, by element, wrapped to so many bits."""
    return lambda *a: np.array([f(*map(int, x)) % 2**bits for x in zip(*a, strict=True)], f"uint{bits}")


def shifted(x: Array, y: Array, left: bool) -> Array:
    bits = x.dtype.itemsize * 8
    shift = np.minimum(y, bits - 1).astype(x.dtype)
    moved = x << shift if left else x >> shift
    return moved if x.dtype.kind == "i" else np.where(y < bits, moved, 0).astype(x.dtype)


def bit_field(x: int, first: int, length: int, signed: bool) -> int:
    first, length = first & 255, length & 255
    sign = x >> min(first + length - 1, 31) & 1 if signed and length else 0
    digits = [x >> (first + i) & 1 if i < length and first + i <= 31 else sign for i in range(32)]
    return sum(d << i for i, d in enumerate(digits))


def permuted(x: int, y: int, selectors: int) -> int:
    held = (y << 32 | x).to_bytes(8, "little")
    chosen = [(held[s & 7], s & 8) for s in (selectors >> 4 * i & 15 for i in range(4))]
    return int.from_bytes(bytes(((255 if b & 128 else 0) if sign else b) for b, sign in chosen), "little")


def divided(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def saturated(kind: str, of_nan: int) -> Callable[[Array], Array]:
    info = np.iinfo(NUMPY[kind])
    return lambda x: np.array(
        [of_nan if np.isnan(v) else int(max(min(np.trunc(np.float64(v)), 2.0**70), -(2.0**70))) for v in x], object
    ).clip(info.min, info.max)


def smallest(x: Array, y: Array, sign: int) -> Array:
    chosen = np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.minimum(x, y) if sign else np.maximum(x, y)))
    zeros = (x == 0) & (y == 0)
    either = np.signbit(x) | np.signbit(y) if sign else np.signbit(x) & np.signbit(y)
    return np.where(zeros, np.where(either, -0.0, 0.0), chosen)


def rounded_to_tf32(x: Array) -> Array:
    _, exponent = np.frexp(x.astype("float64"))
    unit = np.exp2(np.maximum(exponent, -125) - 11.0)  # of the last of 11 bits; subnormals have fewer
    tf32 = np.copysign(np.floor(np.abs(x.astype("float64")) / unit + 0.5) * unit, x)
    return np.where(np.isfinite(x), tf32, x).astype("float32").view("uint32")


def as_16_bits(x: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(x.astype("float32")).to(dtype).view(torch.int16).numpy().view("uint16")


def from_16_bits(x: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(x.view("int16")).view(dtype).float().numpy()


def halves(f: Callable[..., Array]) -> Callable[..., Array]:
    """A function of float32, on both halves of 64 bits."""
    return lambda *a: np.ascontiguousarray(f(*(x.view("float32") for x in a)).astype("float32")).view("uint64")


def references() -> dict[str, Callable[..., Array]]:
    """Opcode -> the same by numpy."""
    table: dict[str, Callable[..., Array]] = {"cvta.local.u64": lambda x: x}
    for kind in ("b16", "u16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred"):
        table[f"mov.{kind}"] = lambda x: x
        if kind != "pred":
            table[f"selp.{kind}"] = lambda x, y, z: np.where(z, x, y)
    table["selp.s16"] = table["selp.b16"]
    for bits in (16, 32, 64):
        for kind in (f"s{bits}", f"u{bits}"):
            table |= {
                f"add.{kind}": whole(lambda x, y: x + y, bits),
                f"sub.{kind}": whole(lambda x, y: x - y, bits),
                f"mul.lo.{kind}": whole(lambda x, y: x * y, bits),
                f"mad.lo.{kind}": whole(lambda x, y, z: x * y + z, bits),
                f"neg.{kind}": whole(lambda x: -x, bits),
                f"min.{kind}": np.minimum,
                f"max.{kind}": np.maximum,
            }
            if bits > 16:
                table[f"mul.hi.{kind}"] = whole(lambda x, y, bits=bits: x * y >> bits, bits)
                table[f"div.{kind}"] = whole(divided, bits)
                table[f"rem.{kind}"] = whole(lambda x, y: x - y * divided(x, y), bits)
            if bits < 64:
                table[f"mul.wide.{kind}"] = whole(lambda x, y: x * y, 2 * bits)
        table["mad.wide.s32"] = table["mad.wide.u32"] = whole(lambda x, y, z: x * y + z, 64)
        table |= {
            f"and.b{bits}": np.bitwise_and, f"or.b{bits}": np.bitwise_or, f"xor.b{bits}": np.bitwise_xor,
            f"not.b{bits}": np.invert, f"shl.b{bits}": lambda x, y: shifted(x, y, True),
        }  # fmt: skip
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}"):
            table[f"shr.{kind}"] = lambda x, y: shifted(x, y, False)
    table |= {"and.pred": np.logical_and, "or.pred": np.logical_or, "xor.pred": np.logical_xor}
    table |= {"not.pred": np.logical_not}
    table |= {
        "bfe.u32": whole(lambda x, y, z: bit_field(x, y, z, False), 32),
        "bfe.s32": whole(lambda x, y, z: bit_field(x, y, z, True), 32),
        "prmt.b32": whole(permuted, 32),
        "popc.b32": whole(lambda x: x.bit_count(), 32),
        "clz.b32": whole(lambda x: 32 - x.bit_length(), 32),
        "brev.b32": whole(lambda x: int(f"{x:032b}"[::-1], 2), 32),
    }
    for source in (8, 16, 32, 64):
        for target in {8: (16, 32, 64), 16: (32, 64), 32: (16, 64), 64: (16, 32)}[source]:
            table[f"cvt.u{target}.u{source}"] = whole(lambda x, n=source: x % 2**n, target)
            signed = whole(lambda x, n=source: (x + 2 ** (n - 1)) % 2**n - 2 ** (n - 1), target)
            if target > source or (source, target) == (64, 32):
                table[f"cvt.s{target}.s{source}"] = signed
    for kind in ("s32", "u32", "s64", "u64"):
        table[f"cvt.rn.f32.{kind}"] = lambda x: x.astype("float32")
        table[f"cvt.rn.f64.{kind}"] = lambda x: x.astype("float64")
    table |= {
        "cvt.f64.f32": lambda x: x.astype("float64"),
        "cvt.rn.f32.f64": lambda x: x.astype("float32"),
        "cvt.rzi.s32.f32": saturated("s32", 0),
        "cvt.rzi.s64.f32": saturated("s64", -(2**63)),
        "cvt.rna.tf32.f32": rounded_to_tf32,
        "cvt.rn.bf16.f32": lambda x: as_16_bits(x, torch.bfloat16),
        "cvt.rn.f16.f32": lambda x: as_16_bits(x, torch.float16),
        "cvt.f32.bf16": lambda x: from_16_bits(x, torch.bfloat16),
        "cvt.f32.f16": lambda x: from_16_bits(x, torch.float16),
    }
    for name, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        table[f"cvt.rn.{name}.f32"] = lambda x, y, dtype=dtype: (
            as_16_bits(x, dtype).astype("uint32") << 16 | as_16_bits(y, dtype)
        )
    arithmetic = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for kind in ("f32", "f64"):
        table |= {
            f"{name}{rounding}.{kind}": f for name, f in arithmetic.items() for rounding in ("", ".rn")
        } | {
            f"div.rn.{kind}": np.divide, f"sqrt.rn.{kind}": np.sqrt, f"neg.{kind}": np.negative,
            f"abs.{kind}": np.abs, f"min.{kind}": lambda x, y: smallest(x, y, 1),
            f"max.{kind}": lambda x, y: smallest(x, y, 0),
        }  # fmt: skip
        for name, f in {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}.items():
            table[f"setp.{name}.{kind}"] = f
            table[f"setp.{name}u.{kind}"] = lambda x, y, f=f: f(x, y) | np.isnan(x) | np.isnan(y)
        table |= {
            f"setp.eq.{kind}": np.equal,
            f"setp.ne.{kind}": lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y),
            f"setp.equ.{kind}": lambda x, y: (x == y) | np.isnan(x) | np.isnan(y),
            f"setp.neu.{kind}": np.not_equal,
            f"setp.num.{kind}": lambda x, y: ~np.isnan(x) & ~np.isnan(y),
            f"setp.nan.{kind}": lambda x, y: np.isnan(x) | np.isnan(y),
        }
    for kind in (f"{a}{n}" for n in (16, 32, 64) for a in "bsu"):
        table |= {
            f"setp.eq.{kind}": np.equal, f"setp.ne.{kind}": np.not_equal, f"setp.lt.{kind}": np.less,
            f"setp.le.{kind}": np.less_equal, f"setp.gt.{kind}": np.greater, f"setp.ge.{kind}": np.greater_equal,
        }  # fmt: skip
    table["add.rn.f32.bf16"] = lambda x, y: from_16_bits(x, torch.bfloat16) + y
    table["add.rn.f32.f16"] = lambda x, y: from_16_bits(x, torch.float16) + y
    table["min3.f32"] = lambda x, y, z: smallest(smallest(x, y, 1), z, 1)
    table["max3.f32"] = lambda x, y, z: smallest(smallest(x, y, 0), z, 0)
    table["rcp.rn.f32"] = lambda x: np.float32(1) / x
    for rounding in ("", ".rn"):
        table |= {f"{name}{rounding}.f32x2": halves(f) for name, f in arithmetic.items()}
    return table


REFERENCES = references()
FUSED = {
    "fma.rn.f32": 24,
    "fma.rn.f64": 53,
    "fma.rn.ftz.f32": 24,
    "fma.rn.f32x2": 24,
}  # opcode -> bits of a significand
APPROXIMATE: dict[str, Callable[..., Array]] = {
    "ex2.approx.f32": np.exp2, "ex2.approx.ftz.f32": np.exp2, "lg2.approx.f32": np.log2, "lg2.approx.ftz.f32": np.log2,
    "rcp.approx.ftz.f32": np.reciprocal, "div.full.f32": np.divide,
}  # fmt: skip


def test_every_instruction_of_the_table_has_a_reference() -> None:
    lanewise = {name for name, operation in operations().items() if operation.result is not None}
    assert lanewise == {*REFERENCES, *FUSED, *APPROXIMATE}


def equal(a: Array, b: Array) -> bool:
    """The same bits, but that a NaN is a NaN."""
    if a.dtype.kind == "f":
        return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a[a == 0]), np.signbit(b[b == 0]))
    return np.array_equal(a, b)


@pytest.mark.parametrize("opcode", sorted(REFERENCES))
def test_lanewise(opcode: str) -> None:
    operands = [inputs(kind, seed) for seed, kind in enumerate(operations()[opcode].operands, 1)]
    parts = opcode.split(".")
    if parts[0] in ("shl", "shr"):
        operands[1] %= 80
    if parts[0] == "bfe":
        operands[1] %= 40
        operands[2] %= 40
    if parts[0] in ("div", "rem") and operands[1].dtype.kind != "f":
        operands[1][operands[1] == 0] = 1
    got = computed(opcode, *operands)
    with np.errstate(all="ignore"):
        expected = REFERENCES[opcode](*operands)
    if got.dtype.kind in "ui" and expected.dtype != got.dtype:
        expected = expected.astype(got.dtype)
    if "f32x2" in opcode:
        got, expected = got.view("float32"), expected.view("float32")
    if parts[-1] == "f32" and parts[-2] in ("bf16", "f16", "bf16x2", "f16x2", "tf32"):
        # What is not a number has many forms: whichever comes out is one.
        numbers = ~np.isnan(operands[0]) & ~np.isnan(operands[-1])
        got, expected = got[numbers], expected[numbers]
    assert equal(got, expected.astype(got.dtype) if got.dtype.kind == "f" else expected)


@pytest.mark.parametrize("opcode", sorted(FUSED))
def test_multiply_add_rounds_once(opcode: str) -> None:
    bits, generator = FUSED[opcode], np.random.default_rng(5)
    count = 2 * THREADS if "x2" in opcode else THREADS
    x, y = (generator.integers(2 ** (bits - 1), 2**bits, count) for _ in range(2))
    z = [-(int(a) * int(b)) + int(c) for a, b, c in zip(x, y, generator.integers(1, 2**20, count), strict=True)]
    dtype = "float64" if bits == 53 else "float32"
    operands = [np.array([float(v) for v in n], dtype) for n in (x, y, z)]
    exact = [int(a) * int(b) + int(c) for a, b, c in zip(*operands, strict=True)]
    expected = np.array([float(v) for v in exact], dtype)
    if "x2" in opcode:
        operands = [o.view("uint64") for o in operands]
    got = computed(opcode, *operands).view(dtype)
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, operands[0].view(dtype) * operands[1].view(dtype) + operands[2].view(dtype))


@pytest.mark.parametrize("opcode", sorted(APPROXIMATE))
def test_approximations_are_within_an_ulp(opcode: str) -> None:
    generator = np.random.default_rng(2)
    operands = [generator.uniform(0.1, 20, THREADS).astype("float32") for _ in operations()[opcode].operands]
    exact = APPROXIMATE[opcode](*(o.astype("float64") for o in operands))
    assert np.all(np.abs(computed(opcode, *operands) - exact) <= np.abs(exact) * 2.0**-23)


def test_flushed_multiply_add_makes_zeros_of_subnormals() -> None:
    x = np.full(THREADS, 3e-39, "float32")
    one, zero = np.ones(THREADS, "float32"), np.zeros(THREADS, "float32")
    assert computed("fma.rn.ftz.f32", x, one, zero).tolist() == [0.0] * THREADS
    assert computed("fma.rn.f32", x, one, zero).tolist() == x.tolist()


# --- control ---------------------------------------------------------------------------------------------------------


def test_special_registers() -> None:
    out = np.zeros((6, 64, 4), "uint32")
    names = ["%tid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%ntid.x", "%laneid"]
    body = """
mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.s32 %r3, %r2, 3, %r1; mad.lo.s32 %r3, %r3, 64, %r0;
mad.wide.u32 %rd1, %r3, 16, %rd0;
mov.u32 %r4, NAME1; mov.u32 %r5, NAME2;
st.global.v2.b32 [ %rd1 + 0 ], { %r4, %r5 };
"""
    for first, second in zip(names[::2], names[1::2], strict=True):
        assert launch(body.replace("NAME1", first).replace("NAME2", second), out, grid=(3, 2), threads=64) == []
        block, thread = np.mgrid[:6, :64]
        values = {
            "%tid.x": thread, "%ctaid.x": block % 3, "%ctaid.y": block // 3, "%nctaid.x": np.full_like(block, 3),
            "%ntid.x": np.full_like(block, 64), "%laneid": thread % 32,
        }  # fmt: skip
        assert np.array_equal(out[..., 0], values[first])
        assert np.array_equal(out[..., 1], values[second])


def test_parameters_are_read_at_an_address_in_a_register() -> None:
    """As where a program chooses one of many pointers by its number."""
    first, second = np.zeros(THREADS, "uint32"), np.zeros(THREADS, "uint32")
    body = """
mov.b64 %rd30, kernel_param_0; mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd31, %r1, 8; add.s64 %rd30, %rd30, %rd31;
ld.param.b64 %rd32, [%rd30]; mad.wide.u32 %rd32, %r0, 4, %rd32; st.global.b32 [ %rd32 + 0 ], { %r1 };
"""
    assert launch(body, first, second, grid=(2,)) == []
    assert not first.any()
    assert second.all()
    outside = launch(body, first, second, grid=(3,))
    assert "parameters" in {finding.space for finding in outside if finding.kind == "out of bounds"}


@pytest.mark.parametrize("seed", range(4))
def test_lanes_diverge_and_meet_again(seed: int) -> None:
    """A loop of as many rounds as the lane's number, a branch in it, and a shuffle of all lanes behind it."""
    out = np.zeros(THREADS, "uint32")
    body = f"""
mov.b32 %r9, 0; mov.b32 %r1, 0; and.b32 %r2, %r0, 31;
LOOP: setp.ge.s32 %p1, %r1, %r2;
@%p1 bra DONE;
and.b32 %r3, %r1, 1; setp.eq.b32 %p2, %r3, 0;
@%p2 bra EVEN;
add.s32 %r9, %r9, 100;
bra NEXT;
EVEN: add.s32 %r9, %r9, 1;
NEXT: add.s32 %r1, %r1, 1;
bra LOOP;
DONE: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
{STORE}
""".replace(": ", ":\n")
    assert launch(body, out, seed=seed) == []
    rounds = np.arange(THREADS) % 32 ^ 1
    assert np.array_equal(out, (rounds + 1) // 2 + 100 * (rounds // 2))


def test_guards_and_early_exits() -> None:
    out = np.zeros(THREADS, "uint32")
    body = f"""
mov.b32 %r9, 7; setp.lt.u32 %p1, %r0, 50;
@%p1 mov.b32 %r9, 1;
@!%p1 add.s32 %r9, %r9, 2;
setp.gt.u32 %p2, %r0, 99;
@%p2 ret;
{STORE}
"""
    assert launch(body, out) == []
    thread = np.arange(THREADS)
    assert np.array_equal(out, np.where(thread < 50, 1, np.where(thread > 99, 0, 9)))


def test_words_are_packed_and_unpacked() -> None:
    out = np.zeros((THREADS, 2), "uint32")
    body = """
mov.b32 %r1, 0x12345678; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};
mov.b64 %rd1, {%r2, %r1}; mov.b64 {%r3, _}, %rd1; mov.b64 {_, %r4}, %rd1;
mad.wide.u32 %rd2, %r0, 8, %rd0; st.global.v2.b32 [ %rd2 + 0 ], { %r3, %r4 };
"""
    assert launch(body, out) == []
    assert (out == [0x56781234, 0x12345678]).all()


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(Unsupported, match=r"wgmma\.fence"):
        launch("wgmma.fence.sync.aligned;")
    with pytest.raises(Unsupported, match=r"mma\.sync\.aligned\.m8n8k4"):
        launch("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1}, {%rd2}, {%rd3}, {%rd4};")
    with pytest.raises(Unsupported, match=r"%r1 of 4 bytes where 8 are due"):
        launch("add.s64 %rd1, %rd2, %r1;")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize(("width", "count"), [(w, c) for w in (1, 2, 4, 8) for c in (1, 2, 4) if w * c <= 16])
def test_vectors_are_loaded_and_stored(space: str, width: int, count: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, (THREADS, count * width), dtype="uint8")
    out = np.zeros_like(data)
    registers = ", ".join(f"{REGISTERS[max(width, 2)]}{30 + k}" for k in range(count))
    vector = f"v{count}." if count > 1 else ""
    size = width * count
    body = f"mad.wide.u32 %rd10, %r0, {size}, %rd0; mad.wide.u32 %rd11, %r0, {size}, %rd1;"
    body += f"ld.global.{vector}b{8 * width} {{ {registers} }}, [ %rd11 + 0 ];\n"
    if space == "shared":
        body += f"mad.lo.s32 %r10, %r0, {size}, global_smem;"
        body += f"st.shared.{vector}b{8 * width} [ %r10 + 0 ], {{ {registers} }};"
        body += f"ld.shared.{vector}b{8 * width} {{{registers}}}, [%r10];\n"
    if space == "local":
        body = f".local .align 16 .b8 __local_depot0[32];\n{body}\nmov.b64 %rd12, __local_depot0;"
        body += f"st.local.{vector}b{8 * width} [%rd12+16], {{ {registers} }};"
        body += f"ld.local.{vector}b{8 * width} {{{registers}}}, [%rd12+16];\n"
    body += f"st.global.{vector}b{8 * width} [ %rd10 + 0 ], {{ {registers} }};"
    assert launch(body, out, data, shared=THREADS * size) == []
    assert np.array_equal(out, data)


def test_narrow_loads_extend_by_sign() -> None:
    data = np.arange(-64, 64, dtype="int8")
    out = np.zeros((THREADS, 2), "int32")
    body = """
mad.wide.u32 %rd10, %r0, 8, %rd0; cvt.u64.u32 %rd11, %r0; add.s64 %rd11, %rd11, %rd1;
ld.global.s8 { %r1 }, [ %rd11 + 0 ]; ld.global.u8 { %r2 }, [ %rd11 + 0 ];
st.global.v2.b32 [ %rd10 + 0 ], { %r1, %r2 };
"""
    assert launch(body, out, data) == []
    assert np.array_equal(out[:, 0], data)
    assert np.array_equal(out[:, 1], data.view("uint8"))


def test_asynchronous_copies_arrive_when_they_are_waited_for() -> None:
    data = np.random.default_rng(1).integers(0, 2**32, (2, THREADS, 4), dtype="uint32")
    out = np.zeros((THREADS, 4), "uint32")
    body = f"""
mad.wide.u32 %rd10, %r0, 16, %rd0; mad.wide.u32 %rd11, %r0, 16, %rd1;
mad.lo.s32 %r10, %r0, 16, global_smem; mov.b32 %r11, 8;
cp.async.cg.shared.global [ %r10 + 0 ], [ %rd11 + 0 ], 0x10, %r11;
cp.async.commit_group;
cp.async.cg.shared.global [ %r10 + {THREADS * 16} ], [ %rd11 + {THREADS * 16} ], 0x10;
cp.async.commit_group;
cp.async.wait_group WAIT;
ld.shared.v2.b32 {{%r1, %r2}}, [%r10+8]; ld.shared.v2.b32 {{%r3, %r4}}, [%r10+{THREADS * 16}];
st.global.v4.b32 [ %rd10 + 0 ], {{ %r1, %r2, %r3, %r4 }};
"""
    assert launch(body.replace("WAIT", "0"), out, data, shared=2 * 16 * THREADS) == []
    assert np.array_equal(out[:, :2], np.zeros((THREADS, 2)))
    assert np.array_equal(out[:, 2:], data[1, :, :2])
    early = launch(body.replace("WAIT", "1"), out, data, shared=2 * 16 * THREADS)
    assert {f.kind for f in early} == {"access while a copy is under way", "read of what nobody wrote"}


ATOMICS: list[tuple[str, str, Callable[[Array], Any]]] = [
    ("add.u32", "uint32", np.sum),
    ("add.u64", "uint64", np.sum),
    ("add.f32", "float32", np.sum),
    ("add.f64", "float64", np.sum),
    ("min.s32", "int32", np.min),
    ("max.s32", "int32", np.max),
    ("min.u32", "uint32", np.min),
    ("max.u64", "uint64", np.max),
    ("and.b32", "uint32", np.bitwise_and.reduce),
    ("or.b32", "uint32", np.bitwise_or.reduce),
    ("xor.b32", "uint32", np.bitwise_xor.reduce),
]


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize(("operation", "dtype", "reference"), ATOMICS)
def test_atomics(operation: str, dtype: str, reference: Callable[[Array], Any], reduction: bool) -> None:
    data = np.random.default_rng(3).integers(0, 200, 2 * THREADS).astype(dtype)
    width = data.dtype.itemsize
    total = np.array([100], dtype)
    name = REGISTERS[width]
    body = f"mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, {THREADS}, %r0; mad.wide.u32 %rd11, %r1, {width}, %rd1;"
    body += f"ld.global.b{8 * width} {{ {name}2 }}, [ %rd11 + 0 ];"
    if reduction:
        body += f"red.global.gpu.relaxed.{operation} [ %rd0 + 0 ], {name}2;"
    else:
        body += f"atom.global.gpu.relaxed.{operation} {name}3, [ %rd0 + 0 ], {name}2;"
    assert launch(body, total, data, grid=(2,)) == []
    assert total[0] == reference(np.append(data, np.array([100], dtype)))


def test_atomics_return_what_was_there() -> None:
    tickets, counter = np.zeros(THREADS, "uint32"), np.zeros(1, "uint32")
    body = f"atom.global.gpu.relaxed.add.u32 %r9, [ %rd1 + 0 ], 1; {STORE}"
    assert launch(body, tickets, counter) == []
    assert sorted(tickets) == list(range(THREADS))
    body = f"atom.global.gpu.relaxed.exch.b32 %r9, [ %rd1 + 0 ], %r0; {STORE}"
    assert launch(body, tickets, counter) == []
    assert sorted([*tickets, counter[0]]) == sorted([*range(THREADS), THREADS])
    counter[:] = 0
    body = f"add.s32 %r1, %r0, 1; atom.global.gpu.relaxed.cas.b32 %r9, [ %rd1 + 0 ], 0, %r1; {STORE}"
    assert launch(body, tickets, counter) == []
    assert (tickets == 0).sum() == 1
    assert np.flatnonzero(tickets == 0)[0] + 1 == counter[0]


def test_atomics_of_four_numbers() -> None:
    sums, data = np.zeros(4, "float32"), np.arange(4 * THREADS, dtype="float32").reshape(THREADS, 4)
    body = """
mad.wide.u32 %rd11, %r0, 16, %rd1; ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd11 + 0 ];
atom.global.gpu.relaxed.add.v4.f32 { %r5, %r6, %r7, %r8 }, [ %rd0 + 0 ], { %r1, %r2, %r3, %r4 };
"""
    assert launch(body, sums, data) == []
    assert np.array_equal(sums, data.sum(0))


# --- between lanes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [32, 8])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffles(mode: str, segment: int) -> None:
    data = np.random.default_rng(4).integers(0, 2**32, LANES, dtype="uint32")
    for b in (0, 1, 3, 5):
        out = np.zeros(LANES, "uint32")
        clamp = (32 - segment) << 8 | (0 if mode == "up" else 31)
        body = "mad.wide.u32 %rd11, %r0, 4, %rd1; ld.global.b32 { %r1 }, [ %rd11 + 0 ];"
        body += f"shfl.sync.{mode}.b32 %r9, %r1, {b}, {clamp}, -1; {STORE}"
        assert launch(body, out, data, threads=LANES) == []
        lane = np.arange(LANES)
        first = lane // segment * segment
        source = {"idx": first + b % segment, "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
        inside = (source >= first) & (source < first + segment)
        assert np.array_equal(out, data[np.where(inside, source, lane)])


@pytest.mark.parametrize(
    ("operation", "dtype", "reference"),
    [("add.s32", "int32", np.sum), ("min.s32", "int32", np.min), ("max.u32", "uint32", np.max),
     ("max.f32", "float32", np.max), ("min.f32", "float32", np.min), ("xor.b32", "uint32", np.bitwise_xor.reduce)],
)  # fmt: skip
def test_reductions(operation: str, dtype: str, reference: Callable[[Array], Any]) -> None:
    data = (np.random.default_rng(6).standard_normal(THREADS) * 1e6).astype("int32").astype(dtype)
    out = np.zeros(THREADS, dtype)
    body = "mad.wide.u32 %rd11, %r0, 4, %rd1; ld.global.b32 { %r1 }, [ %rd11 + 0 ];"
    assert launch(f"{body} redux.sync.{operation} %r9, %r1, -1; {STORE}", out, data) == []
    assert np.array_equal(out.reshape(-1, LANES), np.repeat(reference(data.reshape(-1, LANES), 1)[:, None], LANES, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_16_bits(count: int, transposed: bool) -> None:
    """ldmatrix gives lane l numbers 2 (l % 4) and the next of row l / 4; stmatrix puts them back."""
    data = np.random.default_rng(7).integers(0, 2**16, (count, 8, 8), dtype="uint16")
    loaded, stored = np.zeros((LANES, count, 2), "uint16"), np.zeros_like(data)
    size = data.nbytes
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    trans = ".trans" if transposed else ""
    body = f"""
setp.lt.u32 %p1, %r0, {8 * count};
mad.wide.u32 %rd11, %r0, 16, %rd1; mad.wide.u32 %rd12, %r0, 16, %rd2; mad.lo.s32 %r10, %r0, 16, global_smem;
rem.u32 %r11, %r0, {8 * count}; mad.lo.s32 %r11, %r11, 16, global_smem;
@%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd11 + 0 ];
@%p1 st.shared.v4.b32 [ %r10 + 0 ], {{ %r1, %r2, %r3, %r4 }};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
mad.wide.u32 %rd10, %r0, {4 * count}, %rd0;
""" + "".join(f"st.global.b32 [ %rd10 + {4 * k} ], {{ %r{20 + k} }};\n" for k in range(count))
    body += f"""
add.s32 %r11, %r11, {size}; add.s32 %r10, %r10, {size};
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r11], {{{registers}}};
bar.sync 0;
@%p1 ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r10];
@%p1 st.global.v4.b32 [ %rd12 + 0 ], {{ %r1, %r2, %r3, %r4 }};
"""
    assert launch(body, loaded, data, stored, threads=LANES, shared=2 * size) == []
    matrices = data.transpose(0, 2, 1) if transposed else data
    assert np.array_equal(loaded, matrices.reshape(count, LANES, 2).transpose(1, 0, 2))
    assert np.array_equal(stored, data)


@pytest.mark.parametrize(("kind", "k"), [("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16)])
def test_products_of_matrices(kind: str, k: int) -> None:
    """Fragments as the PTX manual lays them out, against a product in float64."""
    generator = np.random.default_rng(8)
    a, b, c = (generator.standard_normal(size).astype("float32") for size in ((16, k), (k, 8), (16, 8)))
    per_register = 1 if kind == "tf32" else 2
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind)
    if dtype is None:  # the lower 13 bits of an operand are not looked at
        a, b = ((x.view("uint32") & 0xFFFFE000).view("float32") for x in (a, b))
        bits = [x.view("uint32") for x in (a, b)]
    else:
        bits = [as_16_bits(x, dtype) for x in (a, b)]
        a, b = (from_16_bits(x, dtype).reshape(x.shape) for x in bits)
    step = 4 * per_register
    lane = np.arange(LANES)
    group, member = lane // 4, lane % 4

    def registers(values: Array) -> Array:
        """(lane, numbers in a register) -> the register."""
        return values.astype("uint32") if per_register == 1 else values[:, 0] | values[:, 1].astype("uint32") << 16

    def own(columns: int) -> Array:
        return columns + member[:, None] * per_register + np.arange(per_register)

    words = []
    for first in range(0, k, step):
        for row in (group, group + 8):
            values = bits[0][row[:, None], own(first)]
            words.append(registers(values if per_register == 2 else values[:, 0]))
    for first in range(0, k, step):
        values = bits[1][own(first), group[:, None]]
        words.append(registers(values if per_register == 2 else values[:, 0]))
    held = [c[group, 2 * member], c[group, 2 * member + 1], c[group + 8, 2 * member], c[group + 8, 2 * member + 1]]
    words += [x.copy().view("uint32") for x in held]
    data, out = np.ascontiguousarray(np.stack(words, 1)), np.zeros((LANES, 4), "float32")
    count = len(words)
    names = [f"%r{20 + i}" for i in range(count)]
    n_a, n_b = 2 * k // step, k // step
    groups = [names[:n_a], names[n_a : n_a + n_b], names[n_a + n_b :]]
    body = f"mad.wide.u32 %rd11, %r0, {4 * count}, %rd1; mad.wide.u32 %rd10, %r0, 16, %rd0;"
    body += "".join(f"ld.global.b32 {{ {n} }}, [ %rd11 + {4 * i} ];" for i, n in enumerate(names))
    sources = ", ".join("{" + ", ".join(g) + "}" for g in groups)
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{ %r1, %r2, %r3, %r4 }}, {sources};"
    body += "st.global.v4.b32 [ %rd10 + 0 ], { %r1, %r2, %r3, %r4 };"
    assert launch(body, out, data, threads=LANES) == []
    exact = a.astype("float64") @ b.astype("float64") + c
    got = np.zeros((16, 8))
    for i, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        got[group + row, 2 * member + column] = out[:, i]
    assert np.array_equal(got, exact.astype("float32"))

"""bench.counts: what is counted, what it is made of, and that it gets no worse than the budgets in budgets.json."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from emulator import Schedule, decode, run
from handwritten import kernel_of

from bench import counts, execution, gpus, workloads
from bench.execution import Launch, chains, phase_of
from bench.gpus import GPUS, Demand
from bench.machine_code import Instruction, Segment, segments
from bench.recording import recorded

H100 = GPUS["H100"]

# --- what an access costs --------------------------------------------------------------------------------------------


def counted(body: str, threads: int = 32, merged: dict[int, int] | None = None, grid: int = 1) -> dict[str, Any]:
    """The counts of the program's one access whose text begins with `//counted`, of block 0."""
    program = decode(kernel_of(body, buffers=1))
    memory = {"b0": np.zeros(1 << 14, np.uint8)}
    schedule = Schedule(policy="rotation")
    result = run(program, (grid,), threads, 1 << 14, memory, [("b0", 0)], schedule, counted=0, merged=merged)
    at = next(n for n, text in enumerate(program.texts) if text.split(".")[0] in ("ld", "st", "ldmatrix", "red") and
              not text.startswith("ld.param"))  # fmt: skip
    found = result.counts[at]
    return {name: getattr(found, name) for name, _ in found._fields_} | {"line": program.ptx_lines[at]}


def shared_load(kind: str, registers: str, stride: int, **options: Any) -> tuple[int, int]:
    """Wavefronts, least and most, of a load by 32 lanes that are `stride` bytes apart."""
    found = counted(
        f"mul.lo.u32 %r1, %r0, {stride}; add.u32 %r1, %r1, 1024; ld.shared.{kind} {registers}, [%r1];", **options
    )
    return found["wavefronts_low"], found["wavefronts_high"]


@pytest.mark.usefixtures("engine")
def test_wavefronts_are_the_words_that_the_busiest_bank_gives() -> None:
    assert shared_load("b32", "%r2", 4) == (1, 1)
    assert shared_load("b32", "%r2", 0) == (1, 1)  # one word for all
    assert shared_load("b32", "%r2", 8) == (2, 2)
    assert shared_load("b32", "%r2", 128) == (32, 32)
    assert shared_load("v2.b32", "{%r2, %r3}", 8) == (2, 2)
    assert shared_load("v2.b32", "{%r2, %r3}", 0) == (1, 2)  # by half warps, if the hardware does not merge them
    assert shared_load("v4.b32", "{%r2, %r3, %r4, %r5}", 16) == (4, 4)
    assert shared_load("v4.b32", "{%r2, %r3, %r4, %r5}", 0) == (1, 4)
    assert shared_load("v4.b32", "{%r2, %r3, %r4, %r5}", 128) == (32, 32)


@pytest.mark.usefixtures("engine")
def test_matrices_take_a_wavefront_each_unless_their_rows_conflict() -> None:
    for stride, wavefronts in ((16, 4), (128, 32), (144, 4)):
        body = f"mul.lo.u32 %r1, %r0, {stride}; add.u32 %r1, %r1, 1024;"
        found = counted(f"{body} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];")
        assert (found["wavefronts_low"], found["wavefronts_high"]) == (wavefronts, wavefronts)


@pytest.mark.usefixtures("engine")
def test_sectors_are_the_32_bytes_that_lanes_touch() -> None:
    for stride, sectors in ((4, 4), (0, 1), (32, 32), (8, 8)):
        found = counted(f"mad.wide.u32 %rd1, %r0, {stride}, %rd0; ld.global.b32 %r2, [%rd1];")
        assert found["sectors"] == sectors
    assert counted("mad.wide.u32 %rd1, %r0, 4, %rd0; ld.global.b32 %r2, [%rd1];", threads=96)["sectors"] == 12


@pytest.mark.usefixtures("engine")
def test_only_lanes_and_the_block_that_are_asked_for_count() -> None:
    body = "setp.lt.u32 %p1, %r0, 5; mad.wide.u32 %rd1, %r0, 4, %rd0; @%p1 red.relaxed.gpu.global.add.u32 [%rd1], %r0;"
    program = decode(kernel_of(body, buffers=1))
    memory = {"b0": np.zeros(1 << 12, np.uint8)}
    result = run(program, (3,), 64, 0, memory, [("b0", 0)], Schedule(), counted=1)
    at = next(n for n, text in enumerate(program.texts) if "red.relaxed" in text)
    assert (result.counts[at].executions, result.counts[at].lanes, result.counts[at].sectors) == (2, 5, 1)
    only = run(program, (3,), 64, 0, memory, [("b0", 0)], Schedule(first_blocks=1), counted=1)
    assert only.counts[at].executions == 0


@pytest.mark.usefixtures("engine")
def test_an_access_that_the_assembler_merged_counts_with_its_width() -> None:
    """Two loads of 4 bytes with a stride of 8 take 2 wavefronts each; as one of 8 bytes, 2."""
    body = "mul.lo.u32 %r1, %r0, 8; add.u32 %r1, %r1, 1024; ld.shared.b32 %r2, [%r1+4];"
    line = counted(body)["line"]
    assert counted(body)["wavefronts_high"] == 2
    assert counted(body, merged={line: 8})["wavefronts_high"] == 2
    wide = "mul.lo.u32 %r1, %r0, 128; add.u32 %r1, %r1, 1024; ld.shared.b32 %r2, [%r1+4];"
    assert counted(wide, merged={counted(wide)["line"]: 16})["wavefronts_high"] == 32


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """C = A B of 32 x 32; B's rows and columns are so many numbers apart."""
    i = tl.arange(0, 32)
    a = tl.load(a_ptr + i[:, None] * 32 + i[None, :])
    b = tl.load(b_ptr + i[:, None] * ROW + i[None, :] * COLUMN)
    tl.store(c_ptr + i[:, None] * 32 + i[None, :], tl.dot(a, b, input_precision="ieee"))


@pytest.mark.usefixtures("engine", "one_thread")
def test_an_operand_that_lies_along_the_summed_axis_conflicts() -> None:
    """What the step's products in fp32 have suffered from; the arithmetic is the same."""
    a, b, c = (torch.ones(32, 32) for _ in range(3))
    phases = []
    for row, column in ((32, 1), (1, 32)):
        (result,) = workloads.emulated(90, lambda r=row, c_=column: product_kernel[(1,)](a, b, c, ROW=r, COLUMN=c_))
        phases.append(execution.rows_of(workloads.launch_of(result, 90), H100)["product"])
    assert c.eq(32).all()
    along_n, along_k = phases
    assert along_k["fp32"] == along_n["fp32"] >= 32 * 32 * 32 / 32 / 4
    assert along_k["wavefronts_high"] > 2 * along_n["wavefronts_high"]


# --- machine code ----------------------------------------------------------------------------------------------------

LISTING = """
kernel:
	//## File ".nv_debug_ptx_txt", line 7
        /*0000*/                   LDG.E.64 R2, [R4.64] ;     /* 0x0000000004027981 */
                                                              /* 0x000ea2000c1e1b00 */
.L_x_1:
	//## File ".nv_debug_ptx_txt", line 9
        /*0010*/              @!P0 FFMA.FTZ R0, R2, R3, R0 ;  /* 0x0000000302007223 */
                                                              /* 0x004fc80000010000 */
        /*0020*/               @P0 BRA `(.L_x_1) ;            /* 0xfffffffc00000947 */
                                                              /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                     /* 0x000000000000794d */
                                                              /* 0x000fea0003800000 */
$__internal_0_$sqrt:
        /*0040*/                   MUFU.RSQ R1, R1 ;          /* 0x0000000100017308 */
                                                              /* 0x000e640000001400 */
"""


def test_machine_code_is_cut_where_it_branches_and_knows_its_schedule() -> None:
    found = segments(LISTING)
    assert [[i.opcode for i in segment.code] for segment in found] == [
        ["LDG.E.64"], ["FFMA.FTZ", "BRA"], ["EXIT"], ["MUFU.RSQ"],
    ]  # fmt: skip
    assert [segment.in_subroutine for segment in found] == [False, False, False, True]
    load, product = found[0].code[0], found[1].code[0]
    assert (load.line, load.sets, load.waits, load.stall, load.bytes) == (7, 2, 0, 1, 8)
    assert (product.line, product.sets, product.waits, product.kind) == (9, 7, 0b100, "fp32")
    assert (found[1].labels, found[1].target) == ([".L_x_1"], ".L_x_1")


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("FFMA.FTZ", ("fp32", 32)),
        ("IADD3.X", ("integer", 32)),
        ("UIADD3", ("", 0)),
        ("LDS.128", ("", 0)),
        ("MUFU.EX2", ("special", 32)),
        ("I2F.S64", ("wide", 32)),
        ("DFMA", ("fp64", 32)),
        ("HMMA.1688.F32.TF32", ("tf32", 1024)),
        ("HMMA.16816.F32.BF16", ("half", 2048)),
    ],
)
def test_every_instruction_keeps_to_a_rate(opcode: str, unit: tuple[str, float]) -> None:
    assert Instruction(opcode, "", 1, 1, 7, 0).unit == unit


def launch(*segments: Segment, executions: float = 4.0) -> Launch:
    """Of 4 warps, all of whose PTX ran so often."""
    lines = {i.line for segment in segments for i in segment.code}
    per_line = dict.fromkeys(("executions", "lanes", "wavefronts_low", "wavefronts_high", "sectors"), executions)
    return Launch("k", 4, 1, 0, list(segments), 32, 0, {n: dict(per_line) for n in lines}, dict.fromkeys(lines, "p"))


def i(opcode: str, line: int, sets: int = 7, waits: int = 0, operands: str = "", stall: int = 1) -> Instruction:
    return Instruction(opcode, operands, line, stall, sets, waits)


def test_a_load_is_exposed_from_where_it_begins_to_where_it_is_waited_for() -> None:
    (chain,) = chains(
        launch(Segment([], [i("LDG.E", 1, sets=0), i("FADD", 2, stall=60), i("FMUL", 3, waits=1)])), H100, True
    )
    assert chain.exposed["p"] == H100.l2_latency - 61
    assert chain.spent["p"] == H100.l2_latency + 1
    (chain,) = chains(launch(Segment([], [i("LDS", 1, sets=0), i("FMUL", 3, waits=1)])), H100, True)
    assert (chain.exposed["p"], chain.spent["p"]) == (0, H100.shared_latency + 1)


def test_a_loop_that_loads_ahead_waits_for_what_is_left() -> None:
    back = i("BRA", 4, operands=" `(.L_x_1)", stall=100)
    loop = Segment([".L_x_1"], [i("FMUL", 3, waits=1), i("LDG.E", 1, sets=0), back])
    (chain,) = chains(launch(loop), H100, True)
    assert chain.exposed["p"] == H100.l2_latency - 101


def test_asynchronous_copies_are_waited_for_by_groups() -> None:
    begin = [i("LDGSTS.E", 1), i("LDGDEPBAR", 1, sets=0)]
    one, two = ([*begin, *begin, i("DEPBAR.LE", 2, operands=f" SB0, {n}")] for n in ("0x1", "0x0"))
    exposed = [chains(launch(Segment([], code)), H100, True)[0].exposed["p"] for code in (one, two)]
    assert exposed == [H100.l2_latency - 4, H100.l2_latency - 2]


def test_copies_of_an_unrolled_loop_share_its_executions() -> None:
    twice = launch(Segment([], [i("LDS", 1), i("FADD", 2), i("LDS", 1)]), executions=40.0)
    assert twice.visits == [5.0]  # 10 a warp
    call = Segment([], [i("CALL.REL", 3)])
    assert launch(call, Segment([], [i("BRA", 3)]), Segment([".L"], [i("FADD", 2)])).visits == [0, 0, 1]
    jump = Segment([], [i("FADD", 1), i("CALL.REL.NOINC", 3, operands=" `(.L_x_3)")])
    assert launch(jump, Segment([], [i("BRA", 4)])).visits == [1, 1]


def test_phases_are_functions_that_are_not_made_of_phases() -> None:
    source = (execution.KERNELS / "train_step.py").read_text().splitlines()

    def line(text: str) -> int:
        return next(n for n, line in enumerate(source, 1) if text in line)

    called = f"train_step.py:{line('    table_phase(p, s, buf, C)')}:4"
    outermost = f"train_step.py:{line('    forward_phase(p, s, buf')}:4"
    within = f"train_step.py:{line('for t in range(C.T):')}:8 @[ {called} @[ {outermost} ] ]"
    assert phase_of(within, "forward_kernel") == "table"
    assert phase_of(f"train_step.py:{line('    if UPDATE:')}:4", "forward_kernel") == "forward"
    assert phase_of("standard.py:3:1 @[ elsewhere.py:9:9 ]", "sum_parts_kernel") == "sum_parts"


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "fp32", "tf32", "half"),  # TFLOP/s of the data sheets, dense
    [
        ("A100", 19.5, 156, 312),
        ("H100", 67, 494.5, 989),
        ("H200", 67, 494.5, 989),
        ("T4", 8.1, 0, 65),
        ("RTX 4090", 82.6, 82.6, 165.2),
    ],
)
def test_rates_come_to_those_of_the_data_sheets(gpu: str, fp32: float, tf32: float, half: float) -> None:
    has = GPUS[gpu]
    tera = 2 * has.processors * has.ghz / 1000
    assert has.fp32 * tera == pytest.approx(fp32, rel=0.01)
    assert has.half * tera == pytest.approx(half, rel=0.09)  # tensor cores have a lower boost clock
    assert not tf32 or has.tf32 * tera == pytest.approx(tf32, rel=0.09)


def test_the_slowest_resource_sets_the_time() -> None:
    nothing = Demand(10, {}, 0, 0, 0, 0, 0, False)
    assert gpus.clocks(H100, nothing, 5, 8, True) == 20  # two warps a scheduler
    assert gpus.clocks(H100, nothing, 50, 8, True) == 50
    assert gpus.clocks(H100, nothing._replace(low=3, high=7), 5, 8, False) == 24
    assert gpus.clocks(H100, nothing._replace(low=3, high=7), 5, 8, True) == 56
    assert gpus.clocks(H100, nothing._replace(read=640), 5, 8, True) == 80
    assert gpus.clocks(H100, nothing._replace(read=640), 5, 8, False) == 40  # from L1
    assert gpus.clocks(GPUS["A100"], nothing._replace(units={"fp32": 320}), 5, 8, True) == 40  # half a warp a clock
    assert gpus.clocks(H100, nothing._replace(units={"tf32": 10_240}), 5, 8, True) == 80
    assert gpus.clocks(H100, nothing._replace(ends_in_barrier=True), 5, 8, True) == 36


# --- budgets ---------------------------------------------------------------------------------------------------------

HELD = {(c["name"], c["gpu"], c["precision"]): c for c in counts.kept()["workloads"]}
# The compiled step of the default model, and an operator whose tiles lie in shared memory.
QUICK = [("triton-persistent", "H100", "fp32"), ("linear_cross_entropy-and-backward", "H100", "fp32")]


def test_there_is_a_budget_for_all_that_is_counted() -> None:
    assert set(HELD) == {(name, gpu.name, precision) for name, gpu, precision in counts.usual()}


@pytest.mark.usefixtures("engine", "one_thread")
@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k in QUICK else pytest.mark.long) for k in HELD], ids="-".join
)
def test_no_count_is_worse_than_its_budget(key: tuple[str, str, str]) -> None:
    made_by = counts.kept()["triton"]
    if (present := version("triton")) != made_by:
        pytest.skip(f"the budgets are of triton {made_by}; this is {present}")
    name, gpu, precision = key
    found = counts.count(name, GPUS[gpu], precision)
    assert counts.worse(found, HELD[key]) == [], "if that is meant: python -m bench.counts --write"


@pytest.mark.usefixtures("engine", "one_thread")
def test_machine_code_runs_as_often_as_the_ptx_that_it_comes_from() -> None:
    """Loads, stores, products and shuffles of the persistent step, line by line."""
    (launch,) = workloads.WORKLOADS["triton-persistent"].launches(H100, "fp32")
    runs: dict[int, float] = {}
    for segment, visits in zip(launch.code, launch.visits, strict=True):
        for instruction in segment.code:
            if instruction.kind in execution.ANCHORS and instruction.line in launch.counts:
                runs[instruction.line] = runs.get(instruction.line, 0) + visits
    assert len(runs) > 500
    differing = {
        n for n, times in runs.items() if abs(times - launch.counts[n]["executions"] / launch.warps) > 0.01 * times
    }
    assert len(differing) <= 0.01 * len(runs), differing


def test_what_gets_worse_is_named() -> None:
    def one(wavefronts: float, sectors: float = 3) -> dict[str, Any]:
        row = {"wavefronts_low": 1, "wavefronts_high": wavefronts, "sectors": sectors}
        return counts.counted("w", "H100", "fp32", [1], {"table": row})

    assert counts.worse(one(100), one(100)) == []
    assert counts.worse(one(90, 2), one(100)) == []
    found = counts.worse(one(101), one(100))
    assert len(found) == 2  # the phase and the sum
    assert "w, fp32, table: wavefronts 100 -> 101" in found


def test_a_measurement_stands_beside_the_counts(tmp_path: Path) -> None:
    """A synthetic recording, of a whole GPU and of a slice of one."""
    kept = HELD["triton-persistent", "H100", "fp32"]
    assert counts.measured_us(kept, []) is None
    for folder, device, median in (
        ("a", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0.2),
        ("h", "NVIDIA H100 80GB HBM3", 0.0345),
    ):
        (tmp_path / folder).mkdir()
        facts = dict.fromkeys(("device_type", "driver", "cuda", "threads", "versions", "system", "commit"), "")
        entry = {"group": "step", "id": "triton-persistent-128-fp32", "ms": {"median": median}}
        content = {"schema": 1, "device": device, "date": "2030-01-01", "dry": False, "probes": {}, "entries": [entry]}
        (tmp_path / folder / "1.json").write_text(json.dumps(facts | content | {"skipped": [], "refused": []}))
    records = [record for recordings in recorded(tmp_path) for record in recordings]
    assert counts.measured_us(kept, records) == pytest.approx(34.5)
    assert counts.measured_us(HELD["triton-persistent", "A100 1g", "fp32"], records) == pytest.approx(200)
    assert counts.measured_us(HELD["triton-persistent", "A100", "fp32"], records) is None
    assert counts.measured_us(HELD["triton-persistent", "H100", "tf32x3"], records) is None
    assert "measured 34.5" in counts.times_table([kept], records)

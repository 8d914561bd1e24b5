"""What the emulator objects to, and what it must not: races by happens-before, adverse memory, misuse."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from handwritten import STORE, launch

pytestmark = pytest.mark.usefixtures("engine")

ADVERSE = {"stale_l1": True, "late_stores": True, "quantum": 3}


def kinds(findings: list[Any]) -> set[tuple[str, str, str]]:
    return {(f.kind, f.reach, f.space) for f in findings}


# --- within a block --------------------------------------------------------------------------------------------------

EXCHANGE = """
mad.lo.s32 %r10, %r0, 4, global_smem; xor.b32 %r11, %r0, DISTANCE; mad.lo.s32 %r11, %r11, 4, global_smem;
.loc 1 7 0 // kernel.py:7:0
st.shared.b32 [ %r10 + 0 ], %r0;
BARRIER
.loc 1 9 0 // kernel.py:9:0
ld.shared.b32 %r9, [%r11];
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("distance", "barrier", "reach"),
    [(1, "", "within a warp"), (32, "", "between warps"), (32, "bar.warp.sync -1;", "between warps"),
     (1, "bar.warp.sync -1;", None), (1, "bar.sync 0;", None), (32, "bar.sync 0;", None)],
)  # fmt: skip
def test_shared_memory_is_handed_over_at_a_barrier(distance: int, barrier: str, reach: str | None, seed: int) -> None:
    out = np.zeros(128, "uint32")
    body = EXCHANGE.replace("DISTANCE", str(distance)).replace("BARRIER", barrier) + STORE
    findings = launch(body, out, shared=512, seed=seed)
    races = [f for f in findings if f.kind.startswith("race")]
    assert {f.reach for f in races} == ({reach} if reach else set())
    for race in races:
        assert {"kernel.py:7:0", "kernel.py:9:0"} == {line.strip().split(": ")[0] for line in (race.first, race.second)}
    if reach is None:
        assert findings == []
        assert np.array_equal(out, np.arange(128) ^ distance)


def test_a_write_after_a_read_races_too() -> None:
    out = np.zeros(128, "uint32")
    body = EXCHANGE.replace("DISTANCE", "32").replace("BARRIER", "bar.sync 0;")
    body += "st.shared.b32 [ %r10 + 0 ], 0;" + STORE
    assert ("race: read, then write", "between warps", "shared") in kinds(
        launch(body, out, shared=512, policy="rotation", quantum=1)
    )


@pytest.mark.parametrize("value", ["5", "%r0"])
def test_writes_of_the_same_value_are_told_from_others(value: str) -> None:
    word = np.zeros(1, "uint32")
    findings = launch(f"mov.b32 %r1, {value}; st.global.b32 [ %rd0 + 0 ], {{ %r1 }};", word)
    assert {f.kind for f in findings} == {"race: two writes"}
    assert {f.reach for f in findings} == {"within a warp", "between warps"}
    assert all(f.same_value == (value == "5") for f in findings)
    assert all(f.may_be_harmless == (value == "5") for f in findings)


def test_a_racing_load_can_be_poisoned() -> None:
    """One thread stores what all have loaded: a late one gets NaN, which shows if it is used."""
    out, word = np.zeros(128, "uint32"), np.array([7], "uint32")
    body = f"""
setp.eq.b32 %p1, %r0, 0;
ld.global.b32 {{ %r9 }}, [ %rd1 + 0 ];
@%p1 st.global.b32 [ %rd1 + 0 ], {{ 9 }};
{STORE}
"""
    clean = launch(body, out, word, policy="rotation", quantum=1)
    assert kinds(clean) >= {("race: read, then write", "between warps", "global")}
    assert set(out) == {7}
    word[0] = 7
    findings = launch(body, out, word, policy="rotation", quantum=50, poison_racing=True)
    assert kinds(findings) >= {("race: write, then read", "between warps", "global")}
    assert all(f.may_be_harmless for f in findings)
    assert set(out) == {7, 0xFFFFFFFF}


# --- across blocks ---------------------------------------------------------------------------------------------------

HAND_OVER = """
mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 64, %r0; mad.wide.u32 %rd10, %r2, 4, %rd0;
add.s32 %r5, %r2, 64; rem.u32 %r5, %r5, 192; mad.wide.u32 %rd11, %r5, 4, %rd0;
EARLIER
add.s32 %r3, %r2, 1000; st.global.b32 [ %rd10 + 0 ], { %r3 };
FIRST
setp.ne.u32 %p1, %r0, 0;
@%p1 bra PASSED;
ARRIVE
SPIN:
LOOK
setp.lt.u32 %p2, %r4, 3;
@%p2 bra SPIN;
PASSED:
SECOND
ld.global.b32 { %r9 }, [ %rd11 + 0 ];
mad.wide.u32 %rd12, %r2, 4, %rd2; st.global.b32 [ %rd12 + 0 ], { %r9 };
"""
RIGHT = {
    "EARLIER": "",
    "FIRST": "bar.sync 0;",
    "ARRIVE": "red.release.gpu.global.add.u32 [%rd1], 1;",
    "LOOK": "ld.acquire.gpu.global.u32 %r4, [%rd1];",
    "SECOND": "bar.sync 0;",
}


def handed_over(changes: dict[str, str], **schedule: Any) -> tuple[list[Any], bool]:
    """Three blocks of 64 threads store, meet at a grid barrier, and read what the next one stored: findings, right?"""
    data, counter, out = np.zeros(192, "uint32"), np.zeros(1, "uint32"), np.zeros(192, "uint32")
    body = HAND_OVER
    for name, text in (RIGHT | changes).items():
        body = body.replace(name, text)
    findings = launch(body, data, counter, out, grid=(3,), threads=64, most_instructions=1_000_000, **schedule)
    return findings, np.array_equal(out, (np.arange(192) + 64) % 192 + 1000)


@pytest.mark.parametrize("policy", ["rotation", "random", "skewed", "ahead", "behind"])
def test_a_grid_barrier_hands_over_under_adverse_memory(policy: str) -> None:
    for seed in range(5):
        assert handed_over({}, policy=policy, seed=seed, **ADVERSE) == ([], True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "change",
    [
        {"ARRIVE": "red.relaxed.gpu.global.add.u32 [%rd1], 1;"},
        {"LOOK": "ld.relaxed.gpu.global.u32 %r4, [%rd1];"},
        {"FIRST": ""},
        {"SECOND": ""},
        {"LOOK": "mov.b32 %r4, 3;"},
    ],
    ids=["no release", "no acquire", "no first barrier", "no second barrier", "no waiting"],
)
def test_every_part_of_a_grid_barrier_is_missed(change: dict[str, str], seed: int) -> None:
    findings, _ = handed_over(change, seed=seed)
    assert ("race: write, then read", "between programs", "global") in kinds(findings) or (
        "race: read, then write", "between programs", "global"
    ) in kinds(findings)  # fmt: skip


@pytest.mark.parametrize(("change", "memory"), [("ARRIVE", "late_stores"), ("LOOK", "stale_l1")])
def test_adverse_memory_makes_a_weak_barrier_wrong(change: str, memory: str) -> None:
    weak = {change: RIGHT[change].replace("release", "relaxed").replace("acquire", "relaxed")}
    weak["EARLIER"] = "ld.global.b32 { %r9 }, [ %rd11 + 0 ];"  # so that the line is in L1
    assert all(handed_over(weak, seed=seed)[1] for seed in range(5))
    assert not any(handed_over(weak, seed=seed, **{memory: True})[1] for seed in range(5))


def test_an_atomic_passes_on_what_a_release_has_told() -> None:
    """Block 2 acquires from the relaxed addition of block 1, which came behind the release of block 0."""
    data, flag, out = np.zeros(1, "uint32"), np.zeros(1, "uint32"), np.zeros(1, "uint32")
    body = """
mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0; @%p1 ret;
setp.eq.b32 %p2, %r1, 1; @%p2 bra MIDDLE;
setp.eq.b32 %p2, %r1, 2; @%p2 bra LAST;
st.global.b32 [ %rd0 + 0 ], { 42 };
st.release.gpu.global.u32 [%rd1], 1;
ret;
MIDDLE:
ld.relaxed.gpu.global.u32 %r2, [%rd1];
setp.ne.u32 %p3, %r2, 1; @%p3 bra MIDDLE;
atom.global.gpu.relaxed.add.u32 %r3, [ %rd1 + 0 ], 1;
ret;
LAST:
ld.relaxed.gpu.global.u32 %r2, [%rd1];
setp.ne.u32 %p3, %r2, 2; @%p3 bra LAST;
ld.acquire.gpu.global.u32 %r2, [%rd1];
ld.global.b32 { %r4 }, [ %rd0 + 0 ];
st.global.b32 [ %rd2 + 0 ], { %r4 };
"""
    for seed in range(5):
        flag[:] = data[:] = 0
        assert launch(body, data, flag, out, grid=(3,), threads=32, seed=seed, **ADVERSE) == []
        assert out[0] == 42
    body = body.replace("atom.global.gpu.relaxed.add.u32 %r3, [ %rd1 + 0 ], 1", "st.relaxed.gpu.global.u32 [%rd1], 2")
    flag[:] = 0
    findings = launch(body, data, flag, out, grid=(3,), threads=32)
    assert kinds(findings) == {("race: write, then read", "between programs", "global")}


def test_plain_and_atomic_accesses_race() -> None:
    word = np.zeros(1, "uint32")
    body = """
mov.u32 %r1, %ctaid.x; setp.eq.b32 %p1, %r1, 0; setp.ne.u32 %p2, %r0, 0; @%p2 ret;
@%p1 st.global.b32 [ %rd0 + 0 ], { 1 };
@!%p1 red.global.gpu.relaxed.add.u32 [ %rd0 + 0 ], 1;
"""
    for seed in range(4):
        findings = launch(body, word, grid=(2,), threads=32, seed=seed)
        assert {f.reach for f in findings} == {"between programs"}
        assert not any(f.may_be_harmless for f in findings if f.kind == "race: atomic and plain access")
        assert findings


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 { %r1 }, [ %rd10 + 4 ];", "out of bounds"),
        ("st.global.b32 [ %rd0 + -4 ], { %r0 };", "out of bounds"),
        ("mov.b32 %r1, 0; ld.shared.b32 %r2, [%r1];", "out of bounds"),
        ("ld.global.b64 { %rd1 }, [ %rd0 + 4 ];", "misaligned address"),
        ("ld.shared.b32 %r2, [global_smem];", "read of what nobody wrote"),
        ("ld.global.b32 { %r1 }, [ %rd1 + 4 ];", "read of what nobody wrote"),
        ("rem.u32 %r1, %r0, 0;", "division by zero"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra ON; bar.sync 0; ON:\n", "block barrier in divergent lanes"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra ON; bar.sync 0; ON:\nbar.sync 0;", "warps at different block barriers"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", "block barrier after warps have ended"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "lanes named that do not take part"),
        ("SPIN:\nbra SPIN;", "too many instructions"),
    ],
)
def test_misuse_is_found(body: str, kind: str) -> None:
    data, partly = np.zeros(128, "uint32"), np.array([0, 0x7FC0DEAD], "uint32")
    body = body.replace("; ON:", ";\nON:")
    findings = launch(body, data, partly, shared=64, most_instructions=10_000)
    assert kind in {f.kind for f in findings}, findings
    assert not any(f.may_be_harmless for f in findings if f.kind == kind)


def test_what_is_right_is_not_objected_to() -> None:
    """The same accesses within bounds, aligned, written before."""
    data = np.zeros(129, "uint32")
    body = """
mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 { %r1 }, [ %rd10 + 4 ];
mad.lo.s32 %r10, %r0, 4, global_smem; st.shared.b32 [ %r10 + 0 ], %r0; bar.sync 0; ld.shared.b32 %r2, [%r10];
"""
    assert launch(body, data, shared=512) == []

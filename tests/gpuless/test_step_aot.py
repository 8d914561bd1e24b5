"""The machine code of the persistent kernel: what the grid barrier became, and under what the code is kept on disk.

Spills are bench.resources' subject.
"""

import re
from functools import cache
from types import ModuleType
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from bench import resources
from mlp_fast.kernels import inference, persistent_step
from mlp_fast.kernels._aot import Shipped
from mlp_fast.kernels._runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter is on, so nothing is compiled")
CAPABILITIES = (80, 90, 100)
BARRIERS = 3  # of a default step


class Instruction(NamedTuple):
    address: int
    text: str


@cache
def compiled(capability: int) -> tuple[str, list[Instruction]]:
    """PTX and SASS of the default model's kernel under tf32x3, the configuration that the claims are about."""
    shipped: list[Shipped] = list(persistent_step.shipped())
    (launch,) = (
        s for s in shipped if s.precision == "tf32x3" and capability in s.capabilities and s.arguments["C"].B == 128
    )
    kernel = launch.compile(capability)
    disassembly = resources.binary_tool("cuobjdump", kernel.asm["cubin"], "-sass")
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", disassembly, re.MULTILINE)
    return kernel.asm["ptx"], [Instruction(int(address, 16), text) for address, text in found]


@pytest.mark.parametrize("module", [persistent_step, inference])
def test_code_is_not_found_again_where_a_property_computes_something_else(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = next(iter(module.shipped()))

    def name() -> str:
        return launch._specialized(GPUTarget("cuda", 90, 32))[0].hash()

    before = name()
    assert before == name()
    monkeypatch.setattr(type(launch.arguments["C"]), "VP", property(lambda config: 128))
    assert before != name()


def positions(sass: list[Instruction], pattern: str) -> list[int]:
    return [i for i, instruction in enumerate(sass) if re.search(pattern, instruction.text)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_one_thread_releases_and_acquires_between_two_block_barriers(capability: int) -> None:
    ptx, _ = compiled(capability)
    arrivals = [m.start() for m in re.finditer(r"red\.release\.gpu\.global\.add\.u32", ptx)]
    looks = [m.start() for m in re.finditer(r"ld\.acquire\.gpu\.global\.u32", ptx)]
    assert len(arrivals) == len(looks) == BARRIERS
    for arrival, look in zip(arrivals, looks, strict=True):
        before, after = ptx[:arrival], ptx[look:]
        block = r"bar(?:rier)?(?:\.cta)?\.sync\S*\s+0"
        first = [m.end() for m in re.finditer(block, before)][-1]
        assert not re.search(r"\b(?:st|atom|red|ld)\.\S*global", before[first:]), "memory is touched after the barrier"
        assert re.search(r"%tid\.x", before[first:])
        last = re.search(block, after)
        assert last is not None
        touched = re.findall(
            r"\b(?:st|atom|red|ld)\.(\S*global\S*)", after[len("ld.acquire.gpu.global") : last.start()]
        )
        assert set(touched) == {"relaxed.gpu.global.u32"}, "only the error word lies between"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_spin_is_a_loop_around_the_acquiring_load(capability: int) -> None:
    _, sass = compiled(capability)
    loads = positions(sass, r"LDG\.E\S*\.STRONG\.GPU")
    branches = [
        (i, int(m.group(1), 16))
        for i, instruction in enumerate(sass)
        if (m := re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", instruction.text))
    ]
    arrivals = positions(sass, r"(?:RED|ATOM)G?\.E\.ADD\.STRONG\.GPU")
    assert len(arrivals) == BARRIERS
    for arrival in arrivals:
        look = next(i for i in loads if i > arrival)
        # A branch behind the load goes back to it, or to between the arrival and it.
        assert any(
            branch > look and sass[arrival].address < target <= sass[look].address for branch, target in branches
        ), f"no loop around the load at {sass[look].address:#x}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_arrival_is_fenced_and_the_acquire_drops_stale_lines(capability: int) -> None:
    _, sass = compiled(capability)
    for arrival in positions(sass, r"(?:RED|ATOM)G?\.E\.ADD\.STRONG\.GPU"):
        fences = [i for i in positions(sass, r"MEMBAR\.\w+\.GPU") if i < arrival]
        blocks = [i for i in positions(sass, r"BAR\.SYNC") if i < arrival]
        assert fences
        assert blocks
        assert fences[-1] > blocks[-1], "the fence covers what the block barrier has gathered"
        stores = [i for i in positions(sass, r"\b(?:STG|REDG?|ATOMG?)\.") if i < arrival]
        assert stores[-1] < blocks[-1], "a store lies behind the barrier that it should lie before"
        invalidation = next(i for i in positions(sass, r"CCTL\.IVALL") if i > arrival)
        following = next(i for i in positions(sass, r"\bLDG\.E(?!\S*STRONG)") if i > arrival)
        assert invalidation < following, "an ordinary load could hit a line from before the barrier"

"""AdamW in the code that runs on a GPU: no fused multiply-add takes the weight decay as a factor.

See tests/test_adamw.py for why. Triton's interpreter never fuses; so what is read here is PTX and machine code.
"""

import importlib
import re
from typing import Any, NoReturn

import pytest
import torch

triton = pytest.importorskip("triton")

import torch._inductor.config as inductor  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._inductor.runtime import triton_heuristics  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench import resources  # noqa: E402
from mlp_fast.backends.compiled import step_options  # noqa: E402
from mlp_fast.kernels._aot import Shipped  # noqa: E402
from mlp_fast.kernels._math import mul_rn  # noqa: E402
from mlp_fast.kernels._runtime import interpreting  # noqa: E402
from mlp_fast.model import manual_step as step  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter is on, so nothing is compiled")
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
UPDATING = {
    "adamw": ("adamw_kernel",),
    "train_step": ("forward_kernel", "backward_kernel", "update_kernel", "embedding_kernel"),
    "persistent_step": ("persistent_kernel",),
}


def products(ptx: str) -> set[str]:
    """The registers that mul_rn() multiplies with, but for beta2: those of the decay factor."""
    constants = set(re.findall(r"mov\.b32\s+(%\w+), 0f3F7FBE77;", ptx))
    found = re.findall(r"// begin inline asm\s+mul\.rn\.f32 %\w+, %\w+, (%\w+);", ptx)
    return set(found) - constants


def fused(ptx: str) -> list[tuple[str, str]]:
    """The factors of every fused multiply-add of float32."""
    return re.findall(r"fma\.rn(?:\.ftz)?\.f32\s+%\w+, (\S+), (\S+), \S+;", ptx)


def launches() -> list[Any]:
    """Every kernel that updates parameters, in every configuration; the first of a kernel without --long."""
    parameters = []
    for module, names in UPDATING.items():
        seen = set()
        for i, shipped in enumerate(importlib.import_module(f"mlp_fast.kernels.{module}").shipped()):
            name, C = shipped.kernel.__name__, shipped.arguments.get("C")
            updates = name != "backward_kernel" or C.R == 1  # else update_kernel does
            if name in names and updates and shipped.arguments.get("UPDATE", True):
                marks = [pytest.mark.long] if name in seen else []
                parameters.append(pytest.param(shipped, marks=marks, id=f"{name}-{shipped.precision}-{i}"))
                seen.add(name)
        assert seen == set(names)
    return parameters


@pytest.mark.parametrize("shipped", launches() if not interpreting() else ())
def test_no_fused_multiply_add_takes_the_decay(shipped: Shipped, pytestconfig: pytest.Config) -> None:
    capabilities = shipped.capabilities if pytestconfig.getoption("--long") else shipped.capabilities[-1:]
    for capability in capabilities:
        ptx = shipped.compile(capability).asm["ptx"]
        assert products(ptx), "there is no product of its own"
        assert fused(ptx)
        assert not [pair for pair in fused(ptx) if products(ptx) & {*pair}]


@triton.jit
def decay_kernel(p_ptr, decay_ptr, update_ptr, APART: tl.constexpr):
    """p decay - update, the product by itself or not."""
    i = tl.arange(0, 128)
    p, decay = tl.load(p_ptr + i), tl.load(decay_ptr)
    if APART:
        product = mul_rn(p, decay)
    else:
        product = p * decay
    tl.store(p_ptr + i, product - tl.load(update_ptr + i))


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[] if c in (75, 90, 120) else pytest.mark.long) for c in CAPABILITIES]
)
def test_the_assembler_leaves_the_product_apart(capability: int) -> None:
    for apart in (True, False):
        tensors = dict.fromkeys(("p_ptr", "decay_ptr", "update_ptr"), torch.empty(128))
        cubin = Shipped(decay_kernel, tensors | {"APART": apart}).compile(capability).asm["cubin"]
        sass = resources.binary_tool("cuobjdump", cubin, "-sass")
        assert ("FMUL" in sass, "FFMA" in sass) == (apart, not apart)


class _Stop(Exception):
    pass


class _Driver:
    """As much of a Triton driver as Inductor asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.filterwarnings("ignore:Could not find an active CPU backend")
@pytest.mark.parametrize("options", [step_options("default"), {}], ids=["compile-step", "without its options"])
def test_what_torch_compile_writes_for_cuda(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's Triton code of the step's AdamW, as PTX. There may be no GPU, so Inductor is told to write Triton for
    the CPU. Without compile-step's options the decay is fused away."""
    ptx = []

    def compile_for_cuda(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> NoReturn:
        known = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        ptx.append(original(source, target=GPUTarget("cuda", 90, 32), options=known).asm["ptx"])
        raise _Stop

    original, active = triton.compile, triton.runtime.driver._active
    monkeypatch.setattr(triton_heuristics.triton, "compile", compile_for_cuda)
    triton.runtime.driver.set_active(_Driver())
    try:
        tensors = [{"p": torch.rand(512, 144)} for _ in range(4)]
        with (
            inductor.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False),
            pytest.raises(Exception, match="_Stop"),
        ):
            torch.compile(step.adamw_, dynamic=False, options=options)(*tensors, torch.rand(3))
    finally:
        triton.runtime.driver._active = active
        torch._dynamo.reset()
    (code,) = ptx
    # p decay - m / denominator, fused, adds the quotient, negated, in the same operation.
    quotients = set(re.findall(r"div\.\S+\.f32\s+(%\w+),", code))
    negated = {to for to, of in re.findall(r"neg\.f32\s+(%\w+), (%\w+);", code) if of in quotients}
    addends = set(re.findall(r"fma\.rn(?:\.ftz)?\.f32\s+%\w+, \S+, \S+, (%\w+);", code))
    assert quotients
    assert bool(addends & (quotients | negated)) == (not options)

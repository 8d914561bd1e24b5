"""What the kernels look like when they are compiled: recorded launches, compiled ahead of time without a GPU.

A kernel module offers `shipped()`, which yields every `Shipped` configuration: a kernel with the arguments and the
compile-time constants that its launcher really passes. The simplest way to write one is to call the launchers
on meta tensors inside `recorded()`, so that no configuration is written down twice:

    def shipped():
        for precision in INPUT_PRECISION:
            with recorded(precision) as launches:
                my_launcher(torch.empty(128, 512, device="meta"), precision=precision)
            yield from launches

`python -m bench.resources` compiles all of them and reads the machine code. Needs Triton, imported to compile.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, mangle_type

from ._runtime import INPUT_PRECISION

WARP_SIZE = 32
# Of the inputs of an operator, by the precision that a configuration is listed under. fp16 is bf16 but for the type.
DTYPES = dict.fromkeys(INPUT_PRECISION, torch.float32) | {"bf16": torch.bfloat16}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_cooperative_grid")
_ALIGNMENT = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration.

    Attributes:
        kernel: the jitted function.
        arguments: name -> example value of every argument, as a launch passes it: a tensor (any device), an int, a
            float, a tuple of these, or the value of a constexpr. As at a launch, an int of 1 becomes a constant and
            a pointer or int divisible by 16 is known to be.
        options: num_warps, num_stages and the like; Triton's defaults otherwise.
        precision: fp32 (no tensor-core instruction may appear), tf32x3, tf32, bf16 or fp16.
        capabilities: what a launcher chooses this configuration on.
    """

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    capabilities: tuple[int, ...] = (80, 90, 100)

    @property
    def constexprs(self) -> dict[str, Any]:
        """The declared compile-time constants, by name."""
        names = [self.kernel.arg_names[i] for i in self.kernel.constexprs]
        return {name: self.arguments[name] for name in names}

    @property
    def key(self) -> str:
        """Equal for configurations that compile to the same code."""
        source = self._source()
        return repr(
            (source.fn.__name__, source.signature, source.constants, source.attrs, sorted(self.options.items()))
        )

    def compile(self, capability: int) -> CompiledKernel:
        """Compiles for a compute capability such as 90; the result's `asm` has "ptx" and "cubin"."""
        target = GPUTarget("cuda", capability, WARP_SIZE)
        return triton.compile(self._source(), target=target, options=dict(self.options))

    def _source(self) -> ASTSource:
        """The kernel specialised for the arguments, as a launch would."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        declared = self.constexprs

        def describe(value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                items = [describe(item, (*path, i)) for i, item in enumerate(value)]
                # A named tuple stays one: kernels use the names.
                return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            if value is None or (isinstance(value, int) and value == 1):
                constants[path] = value
                return "constexpr"
            aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(aligned, int) and not isinstance(aligned, bool) and aligned % 16 == 0:
                attributes[path] = _ALIGNMENT
            return mangle_type(value)

        for i, name in enumerate(self.kernel.arg_names):
            if name in declared:
                signature[name] = "constexpr"
                constants[(i,)] = declared[name]
            else:
                signature[name] = describe(self.arguments[name], (i,))
        return ASTSource(self.kernel, signature, constants, attributes)


@contextlib.contextmanager
def recorded(precision: str = "fp32") -> Iterator[list[Shipped]]:
    """Within it launches are recorded, not run. Yields the list that they are added to."""
    launches: list[Shipped] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Shipped(self, arguments, options, precision))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run

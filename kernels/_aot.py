"""What the kernels look like when they are compiled: recorded launches, compiled ahead of time without a GPU.

A kernel module offers `shipped()`, which yields every `Shipped` configuration: a kernel with the arguments and the
compile-time constants that its launcher really passes. The simplest way to write one is to call the launchers
on meta tensors inside `recorded()`, so that no configuration is written down twice:

    def shipped():
        for precision in INPUT_PRECISION:
            with recorded(precision) as launches:
                my_launcher(torch.empty(128, 512, device="meta"), precision=precision)
            yield from launches

`python -m bench.resources` compiles all of them and reports what they need. Needs Triton, imported to compile.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ._runtime import INPUT_PRECISION, LEAST_CAPABILITY

WARP_SIZE = 32
# Of the inputs of an operator, by the precision that a configuration is listed under. fp16 is bf16 but for the type.
DTYPES = dict.fromkeys(INPUT_PRECISION, torch.float32) | {"bf16": torch.bfloat16}
# The compute capabilities of the GPUs that people have.
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
# Multiprocessors of a T4, an A100, an RTX 3090, an RTX 4090, an H100, a B200 and an RTX 5090.
PROCESSORS = dict(zip(CAPABILITIES, (40, 108, 82, 128, 132, 148, 170), strict=True))
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_cooperative_grid")


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration.

    Attributes:
        kernel: the jitted function.
        arguments: name -> example value of every argument, as a launch passes it: a tensor (any device), an int, a
            float, a tuple of these, or the value of a constexpr.
        options: num_warps, num_stages and the like; Triton's defaults otherwise.
        precision: fp32 (no tensor-core instruction may appear), tf32x3, tf32, bf16 or fp16.
        capabilities: what a launcher chooses this configuration on.
    """

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    capabilities: tuple[int, ...] = CAPABILITIES

    @property
    def constexprs(self) -> dict[str, Any]:
        """The declared compile-time constants, by name."""
        names = [self.kernel.arg_names[i] for i in self.kernel.constexprs]
        return {name: self.arguments[name] for name in names}

    @property
    def key(self) -> str:
        """Equal for configurations that compile to the same code."""
        return self.key_on(CAPABILITIES[-1])

    def key_on(self, capability: int) -> str:
        """key_of() what a launch on this compute capability gives to the compiler."""
        return key_of(*self._specialized(GPUTarget("cuda", capability, WARP_SIZE)))

    def compile(self, capability: int) -> CompiledKernel:
        """Compiles for a compute capability such as 90; the result's `asm` has "ptx" and "cubin"."""
        target = GPUTarget("cuda", capability, WARP_SIZE)
        source, options = self._specialized(target)
        return triton.compile(source, target=target, options=options)

    def _specialized(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """The kernel specialised for the arguments, and all options, by the very functions that a launch calls."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, given = bind(**self.arguments, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(backend, given, bound, specialization, given)
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__


def key_of(source: ASTSource, options: dict[str, Any]) -> str:
    """What the compiler is given, as text."""
    return repr((source.fn.__name__, source.signature, source.constants, source.attrs, sorted(options.items())))


@contextlib.contextmanager
def recorded(precision: str = "fp32") -> Iterator[list[Shipped]]:
    """Within it launches are recorded, not run. Yields the list that they are added to."""
    launches: list[Shipped] = []
    capabilities = tuple(c for c in CAPABILITIES if c >= LEAST_CAPABILITY[precision])

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Shipped(self, arguments, options, precision, capabilities))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run

"""A GPU that is not there: kernels are bound, compiled and launched by Triton as on a GPU, and do nothing.

Triton's JIT, binder, compiler and C launcher are the real ones; below them stands a driver that does nothing and tells
of each launch (libcuda.c). Above them, what the project asks of torch.cuda is answered here, and tensors that ought to
lie on the GPU lie on the CPU. So everything about a launch can be seen, and nothing about its results: what a kernel
ought to write stays zero.

    gpu = StubGPU(capability=90, processors=132)
    with gpu.installed():
        ...
    gpu.launches, gpu.loads

The process must have been started in the environment of conftest.py's fixture, which builds the driver.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlp_fast.kernels._aot import key_of
from mlp_fast.ops import _dispatch

# Bytes of shared memory that a thread block may take, by compute capability (CUDA C++ Programming Guide).
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
STREAM, CAPTURING_STREAM = 0xA, 0xB
# Types of the arguments of a kernel in PTX; Triton's integers are signed.
TYPES = {"u64": ctypes.c_int64, "u32": ctypes.c_int32, "u16": ctypes.c_int16, "u8": ctypes.c_int8}
TYPES |= {"f32": ctypes.c_float, "f64": ctypes.c_double}
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
READS = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__bool__)


@dataclass(frozen=True)
class Launch:
    """A launch as the driver saw it.

    `load` is the kernel's place in StubGPU.loads: variants of a kernel have one name and several places. `arguments`
    are the values in the order of the kernel's signature, tuples flattened and constants left out.
    """

    kernel: str
    load: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool
    stream: int
    arguments: tuple[float, ...]


class StubGPU:
    """The GPU that a process is made to believe in.

    Args:
        capability: the compute capability, 90 for sm_90.
        processors: its multiprocessors.

    Attributes:
        launches: of every kernel that would have run, in order; a replayed graph's are those that were captured.
        loads: names of the kernels whose code was loaded, in order; what is compiled, or found compiled on the disk, is
            loaded at its first launch.
        ptx: the code of these.
        keys: _aot.key_of() what the compiler was given, or would have been if the disk had not held the result.
    """

    def __init__(self, capability: int, processors: int) -> None:
        self.capability, self.processors = capability, processors
        self.launches: list[Launch] = []
        self.loads: list[str] = []
        self.keys: set[str] = set()
        self.ptx: set[str] = set()
        self._kernels: dict[int, tuple[str, int, list[Any]]] = {}  # function -> name, place in loads, argument types
        self._captured: list[Launch] | None = None
        self._callback = CALLBACK(self._launched)
        library = ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"))
        library.stub_device(processors, 1024 * SHARED[capability], self._callback)

    def _launched(
        self, function: int, grid: Any, threads: int, shared: int, cooperative: int, stream: int, params: Any
    ) -> None:
        name, load, types = self._kernels[function]
        values = tuple(ctypes.cast(params[i], ctypes.POINTER(kind))[0] for i, kind in enumerate(types))
        launch = Launch(name, load, tuple(grid[:3]), threads, shared, bool(cooperative), stream or 0, values)
        (self.launches if self._captured is None else self._captured).append(launch)

    def _loaded(self, module: int, function: int, name: str, files: dict[str, str], hash: str) -> None:
        ptx = Path(files[f"{name}.ptx"]).read_text()
        (declared,) = re.findall(rf"\.entry {name}\((.*?)\)", ptx, re.DOTALL)
        # The last two are Triton's own, of its scratch memory.
        types = [TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", declared)][:-2]
        self._kernels[function] = name, len(self.loads), types
        self.loads.append(name)
        self.ptx.add(ptx)

    def _noting_keys(self, compile: Any) -> Any:
        def noted(kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any) -> Any:
            self.keys.add(key_of(ASTSource(kernel, signature, constants, rest[0]), options.__dict__))
            return compile(kernel, key, signature, device, constants, options, *rest)

        return noted

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it this process has the GPU: torch.cuda says so, and Triton launches on it."""
        major, minor = capability = divmod(self.capability, 10)
        properties = SimpleNamespace(
            name="stub", major=major, minor=minor, multi_processor_count=self.processors, total_memory=2**33
        )
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device=None: properties,
            "synchronize": lambda device=None: self._refuse_in_capture("torch.cuda.synchronize"),
            "CUDAGraph": lambda: _Graph(self),
            "graph": lambda graph: graph.capture(),
        }
        with contextlib.ExitStack() as stack:
            for name, answer in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            current = mock.Mock(side_effect=lambda device: self._stream)
            stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", current, create=True))
            driver.set_active(CudaDriver())
            stack.callback(driver.reset_active)
            stack.enter_context(mock.patch.object(knobs.runtime, "kernel_load_end_hook", self._loaded))
            stack.enter_context(
                mock.patch.object(JITFunction, "_do_compile", self._noting_keys(JITFunction._do_compile))
            )
            stack.enter_context(mock.patch.object(_dispatch, "interpreting", return_value=True))  # kernels on the CPU
            stack.enter_context(mock.patch.object(torch, "empty", torch.zeros))
            stack.enter_context(_OnHost(self))
            yield

    @property
    def _stream(self) -> int:
        return STREAM if self._captured is None else CAPTURING_STREAM

    def _refuse_in_capture(self, what: str) -> None:
        if self._captured is not None:
            raise RuntimeError(f"{what} while a graph is captured")


class _Graph:
    """torch.cuda.CUDAGraph of a StubGPU's launches. What torch itself computes runs at the capture, not in replays."""

    def __init__(self, gpu: StubGPU) -> None:
        self.gpu, self.launches = gpu, []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.gpu._captured = self.launches
        try:
            yield
        finally:
            self.gpu._captured = None

    def replay(self) -> None:
        self.gpu.launches += self.launches


class _OnHost(TorchFunctionMode):
    """Puts tensors on the CPU that are asked for on the GPU."""

    def __init__(self, gpu: StubGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.gpu._refuse_in_capture(f"Tensor.{func.__name__}")
        return func(*map(_on_host, args), **{name: _on_host(value) for name, value in (kwargs or {}).items()})


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

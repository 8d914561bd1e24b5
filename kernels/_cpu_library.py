"""The C library of csrc/train_step.c: found, checked against its sources, its functions declared for ctypes.

setup.py builds it where a C compiler is at hand. It uses the best instruction set that both it and the processor have;
MLP_FAST_ISA=avx2 or baseline forces a lesser one.
"""

import ctypes
import functools
import importlib.machinery
import os
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor


class Model(ctypes.Structure):
    """The C struct mlp_model; the addresses are those of packed arrays."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("V", "T", "E", "H", "isa", "form")),
        *((name, ctypes.c_void_p) for name in ("parameters", "exp_avg", "exp_avg_sq")),
    ]


class Windows(ctypes.Structure):
    """The C struct mlp_windows: `stride` tokens from one window to the next."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("token_bytes", "stride", "count", "has_target")),
    ]

    @classmethod
    def of(cls, tokens: Tensor, stride: int, count: int, has_target: bool) -> "Windows":
        return cls(tokens.data_ptr(), tokens.element_size(), stride, count, has_target)


class _Pointer:
    """The type of arguments that C takes an address of: tensors, structs and numbers of ctypes; or an address."""

    @classmethod
    def from_param(cls, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.data_ptr()
        return ctypes.c_void_p(value) if isinstance(value, int) else ctypes.byref(value)


# The types of arguments and results, by a letter each; "-" is none.
_TYPES: dict[str, Any] = {"i": ctypes.c_int64, "d": ctypes.c_double, "s": ctypes.c_char_p, "p": _Pointer, "-": None}

# name -> result, then arguments, of what train_step.c and packing.h export
_SIGNATURES = {
    "mlp_source_crc": "i",
    "mlp_isa_count": "i",
    "mlp_isa_name": "si",
    "mlp_isa_supported": "ii",
    "mlp_packed_floats": "ip",
    "mlp_workspace_bytes": "ipii",
    "mlp_forward_bytes": "ipii",
    "mlp_transfer": "-pipppppp",
    "mlp_train": "-pppipiiddip",
    "mlp_logits": "-pppip",
    "mlp_losses": "-pppipppp",
    "mlp_sample": "-ppppipp",
    "mlp_tanh": "-ippi",
    "mlp_exp": "-ippi",
    "mlp_adamw": "-idddppppi",
}


def source_crc(folder: Path) -> int:
    """Checksum of the C sources in a folder, which setup.py compiles into the library."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]"))))


@functools.cache
def _load() -> ctypes.CDLL | str:
    return load_from(Path(__file__).parent)


def load_from(folder: Path) -> ctypes.CDLL | str:
    """The library in a folder, or why there is none."""
    names = ["_train_step" + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return "its C library was not built; install a C compiler (gcc 11 or later, or clang), then this package again"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = _TYPES[result], [_TYPES[letter] for letter in arguments]
    except (OSError, AttributeError) as error:
        return f"its C library cannot be loaded ({error}); install this package again"
    if (folder / "csrc").exists() and library.mlp_source_crc() != source_crc(folder / "csrc"):
        return "its C library was built from another source; install this package again"
    return library


def unavailable() -> str | None:
    """Why the kernel cannot be used here, in one line, or None where it can."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    forced = os.environ.get("MLP_FAST_ISA")
    if forced and forced not in instruction_sets():
        return f"MLP_FAST_ISA={forced} is not available here; choose one of {', '.join(instruction_sets())}"
    return None


def library() -> ctypes.CDLL:
    """The library; RuntimeError where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"native: {loaded}")
    return loaded


def _numbers() -> dict[str, int]:
    """Instruction set -> its number, of those that the library was compiled for and the processor has, best first."""
    c = library()
    return {c.mlp_isa_name(i).decode(): i for i in range(c.mlp_isa_count()) if c.mlp_isa_supported(i)}


def instruction_sets() -> list[str]:
    """Those that the library was compiled for and the processor has, the best first."""
    return list(_numbers())


def isa_number(name: str | None) -> int:
    """The library's number of an instruction set; of the best, or the one in MLP_FAST_ISA, if None."""
    numbers = _numbers()
    name = name or os.environ.get("MLP_FAST_ISA") or next(iter(numbers))
    if name not in numbers:
        raise ValueError(f"unknown instruction set {name!r}: choose one of {', '.join(numbers)}")
    return numbers[name]

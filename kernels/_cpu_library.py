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

from torch import Tensor

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class Shape(ctypes.Structure):
    """The C struct of a model's sizes."""

    _fields_ = [(name, _int) for name in ("V", "T", "E", "H")]


class Windows(ctypes.Structure):
    """The C struct of windows in memory: `stride` tokens from one to the next."""

    _fields_ = [
        ("tokens", _pointer),
        ("token_bytes", _int),
        ("stride", _int),
        ("count", _int),
        ("has_target", _int),
    ]

    @classmethod
    def of(cls, tokens: Tensor, stride: int, count: int, has_target: bool) -> "Windows":
        return cls(tokens.data_ptr(), tokens.element_size(), stride, count, has_target)


# name -> (result, arguments) of what train_step.c exports
_SIGNATURES = {
    "mlp_source_crc": (_int, ()),
    "mlp_isa_count": (_int, ()),
    "mlp_isa_name": (ctypes.c_char_p, (_int,)),
    "mlp_isa_supported": (_int, (_int,)),
    "mlp_packed_floats": (_int, (_pointer,)),
    "mlp_workspace_bytes": (_int, (_pointer, _int, _int)),
    "mlp_forward_bytes": (_int, (_pointer, _int, _int)),
    "mlp_pack": (None, (*[_pointer] * 7, ctypes.c_float)),
    "mlp_unpack": (None, (_pointer,) * 7),
    "mlp_train": (
        None,
        (_int, *[_pointer] * 6, _int, _pointer, _int, _int, ctypes.c_double, ctypes.c_double, _int, _int, _pointer),
    ),
    "mlp_logits": (None, (_int, *[_pointer] * 4, _int, _int, _pointer)),
    "mlp_losses": (None, (_int, *[_pointer] * 7, _int, _int, _pointer)),
    "mlp_sample": (None, (_int, *[_pointer] * 5, _int, *[_pointer] * 2)),
    "mlp_tanh": (None, (_int, _pointer, _pointer, _int)),
    "mlp_exp": (None, (_int, _pointer, _pointer, _int)),
    "mlp_adamw": (None, (_int, *[ctypes.c_double] * 3, *[_pointer] * 4, _int)),
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
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
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


def instruction_sets() -> list[str]:
    """Those that the library was compiled for and the processor has, the best first."""
    c = library()
    return [c.mlp_isa_name(i).decode() for i in range(c.mlp_isa_count()) if c.mlp_isa_supported(i)]


def isa_number(name: str | None) -> int:
    """The library's number of an instruction set; of the best, or the one in MLP_FAST_ISA, if None."""
    c, available = library(), instruction_sets()
    name = name or os.environ.get("MLP_FAST_ISA") or available[0]
    if name not in available:
        raise ValueError(f"unknown instruction set {name!r}: choose one of {', '.join(available)}")
    return [c.mlp_isa_name(i).decode() for i in range(c.mlp_isa_count())].index(name)

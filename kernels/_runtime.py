"""How kernels run: compiled on CUDA, or in Triton's interpreter on the CPU. Imports neither Triton nor CUDA."""

import os
import sys

# What a kernel's tl.dot does with fp32 operands, by the name that users type.
#   fp32    plain FMA, the reference
#   tf32x3  three TF32 tensor-core products, about fp32 accuracy
#   tf32    one TF32 tensor-core product, 10 bits of mantissa
INPUT_PRECISION = {"fp32": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}

# The compute capability from which on GPUs have it in hardware: TF32 and bf16 came with sm_80.
LEAST_CAPABILITY = {"fp32": 75, "tf32x3": 80, "tf32": 80, "bf16": 80, "fp16": 75}

# Left to itself, ptxas gives some kernels half the registers, and spills, to fit a second program on an SM.
MAX_REGISTERS = 255


class CompileTimeConfig:
    """Base of a kernel's compile-time argument: a frozen dataclass, whose properties the kernel reads as well."""

    @property
    def cache_key(self) -> str:
        """Under what Triton keeps compiled code on disk; without it, under str(), which lacks the properties: after a
        change of what one of them computes, code of before would be found."""
        properties = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        return repr((self, [(name, getattr(self, name)) for name in properties]))


def input_precision(precision: str) -> str:
    """Returns tl.dot's `input_precision` for a precision's name.

    Raises:
        ValueError: the name is not one of fp32, tf32x3, tf32.
    """
    try:
        return INPUT_PRECISION[precision]
    except KeyError:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(INPUT_PRECISION)}") from None


# As Triton reads it, once: a look at the environment takes longer than all checks of a small operator's arguments.
_interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), where CPU tensors may enter them."""
    return _interpreting


def enable_interpreter() -> None:
    """Makes kernels run in Triton's interpreter. Triton reads the switch when it is imported, so call this first.

    Raises:
        RuntimeError: Triton was already imported to compile; a process can do one or the other.
    """
    triton = sys.modules.get("triton")
    if triton is not None and type(triton.language.zeros).__name__ != "InterpretedFunction":
        raise RuntimeError(
            "Triton was already imported to compile: set TRITON_INTERPRET=1 before the process starts instead"
        )
    global _interpreting
    os.environ["TRITON_INTERPRET"] = "1"
    _interpreting = True

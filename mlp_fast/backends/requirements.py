"""--precision, and what backends need of a machine: what is missing, in one line, or None."""

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

from mlp_fast.errors import one_line
from mlp_fast.files import no_place_for_code, shown
from mlp_fast.kernels._runtime import LEAST_CAPABILITY, interpreting

# torch's own settings; it has none that splits a product into three TF32 ones, so tf32x3 takes full float32.
MATMUL_PRECISION = {"fp32": "highest", "tf32x3": "highest", "tf32": "high"}


def use_precision(precision: str) -> None:
    """Sets the precision of torch's own matrix products, for the whole process."""
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])


def unsupported_by_torch(precision: str, device: torch.device) -> str | None:
    """Why torch's own matrix products do not have this precision on the device, or None where they do."""
    if device.type == "cpu" and precision != "fp32":
        return f"--precision {precision} is arithmetic of NVIDIA GPUs; on the CPU choose fp32"
    return None


def unsupported_by_triton(precision: str, device: torch.device) -> str | None:
    """Why the device cannot run Triton kernels of this precision, or None where it can."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    least = LEAST_CAPABILITY["fp32"]
    if 10 * major + minor < least:
        return f"its kernels are made for GPUs from sm_{least} on, and this one is sm_{major}{minor}"
    if 10 * major + minor < LEAST_CAPABILITY[precision]:
        return f"--precision {precision} needs a GPU from sm_80 on, and this one is sm_{major}{minor}; choose fp32"
    return None


def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the device here, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    if device.type == "cpu":
        needed = "it needs a CUDA device; --interpret runs the same kernels in Triton's interpreter, slowly"
        return None if interpreting() else needed
    if interpreting():
        return "--interpret runs on the CPU; add --device cpu"
    from triton import knobs

    if reason := no_place_for_code(Path(knobs.cache.dir)):
        return f"Triton has no place for its code: {reason}; set TRITON_CACHE_DIR to a folder to execute from"
    return None


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None where it can: Inductor makes C++ for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs the package triton for CUDA; install it"
        return code_folder_unusable()
    from torch._inductor import config as inductor

    compilers = [name for name in inductor.cpp.cxx if name]
    if sys.platform == "linux" and not any(shutil.which(name) for name in compilers):
        return f"torch.compile needs a C++ compiler on the CPU; install g++ (looked for {', '.join(compilers)})"
    if not _is_one_word(home := os.path.dirname(torch.__file__)):
        return f"torch.compile cannot build against torch in {shown(home)}; install it below a folder without blanks"
    return code_folder_unusable()


def code_folder_unusable() -> str | None:
    """Why Inductor cannot keep its code where it would, or None where it can."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    failure = "torch.compile has no place for its code"
    remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written and executed from, without blanks in its name"
    try:
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()
    except OSError as error:  # there is no temporary folder at all
        return f"{failure} ({one_line(error)}); {remedy}"
    reason = no_place_for_code(folder)
    if reason is None and not _is_one_word(str(folder)):
        reason = f"the compiler takes {shown(folder)} for several names"
    return reason and f"{failure}: {reason}; {remedy}"


def _is_one_word(path: str) -> bool:
    """Whether a path survives the command line that Inductor makes of it."""
    try:
        return os.name != "posix" or shlex.split(path) == [path]
    except ValueError:  # a quote without its other half
        return False

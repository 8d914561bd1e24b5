"""--precision: what torch's own products and Triton's kernels make of it, and where they lack it."""

import torch

from mlp_fast.kernels._runtime import LEAST_CAPABILITY

# torch's own settings; it has none that splits a product into three TF32 ones, so tf32x3 takes full float32.
MATMUL_PRECISION = {"fp32": "highest", "tf32x3": "highest", "tf32": "high"}


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

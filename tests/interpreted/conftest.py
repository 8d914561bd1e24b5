"""Tests of the Triton kernels: compiled where there is a CUDA device, in Triton's interpreter elsewhere.

The switch holds for a whole process and is read when Triton is imported, so these tests run in a process of their own:
pytest tests/interpreted.
"""

import torch

from mlp_fast.kernels._runtime import enable_interpreter

if not torch.cuda.is_available():
    enable_interpreter()

"""Tests of the Triton kernels: compiled where there is a CUDA device, in Triton's interpreter elsewhere.

The switch holds for a whole process and is read when Triton is imported, so these tests run in a process of their own:
pytest tests/interpreted.
"""

from importlib.util import find_spec

import torch
from prepared_once import prepare_once

from mlp_fast.kernels._runtime import enable_interpreter

if not torch.cuda.is_available():
    enable_interpreter()
    if find_spec("triton"):
        prepare_once()

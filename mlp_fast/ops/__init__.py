"""The fused operators, for anyone's nn.Module: embed_linear_tanh, linear_cross_entropy, adamw_; and FusedMLP.

Each is an operator of torch.library (torch.ops.mlp_fast.*) with autograd, autocast and a fake implementation, so that
torch.compile, torch.export and CUDA graphs take it as it is. On CUDA tensors it runs the Triton kernels of kernels/,
under TRITON_INTERPRET=1 also on CPU tensors; everywhere else, and for float64, it is computed by plain torch, and so is
what the kernels lack: forward-mode AD, gradients of gradients and the transforms of torch.func. To a compiler the
operators are opaque on purpose: they have no neighbours worth fusing with, and so compiled and eager code run the very
same kernels.

Importing this module needs neither Triton nor CUDA.
"""

from mlp_fast.ops._adamw import adamw_
from mlp_fast.ops._embed_linear_tanh import embed_linear_tanh
from mlp_fast.ops._linear_cross_entropy import linear_cross_entropy
from mlp_fast.ops.fused_mlp import FusedMLP

__all__ = ["FusedMLP", "adamw_", "embed_linear_tanh", "linear_cross_entropy"]

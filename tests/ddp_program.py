"""What test_models.py runs as one of two ranks: DistributedDataParallel around FusedMLP; saves its gradients.

python tests/ddp_program.py RANK STORE FILE
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mlp_fast.model.mlp import Shape, initial_parameters
from mlp_fast.ops import FusedMLP

SHAPE = Shape(V=11, T=3, E=4, H=6)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows, of which each rank takes four."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(11, (8, 3), generator=g), torch.randint(11, (8,), generator=g)


def main(rank: int, store: str, file: str) -> None:
    """Writes the gradients by name after one backward pass."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = FusedMLP(SHAPE, initial_parameters(SHAPE, 1)).double()
    part = slice(4 * rank, 4 * rank + 4)
    idx, targets = batch()
    parallel = DistributedDataParallel(model)  # kept: it exchanges gradients for as long as it lives
    _, loss = parallel(idx[part], targets[part])
    loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

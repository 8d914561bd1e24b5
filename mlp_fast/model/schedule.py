"""AdamW's constants and the cosine schedule of the learning rate."""

import math

import torch
from torch import Tensor

from mlp_fast.config import Config
from mlp_fast.kernels import _model

BETA1, BETA2, EPS = _model.BETA1, _model.BETA2, _model.EPS
_PIECE = 1 << 20  # steps whose scalars are computed at a time


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of a step: a half cosine from config.learning_rate at step 0 towards 0 at num_steps."""
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def learning_rates(config: Config, first: int, end: int) -> Tensor:
    """The learning rates of steps first .. end-1: (end - first,), float64, on the CPU; in place, as it may be long."""
    angle = torch.arange(first, end, dtype=torch.float64).mul_(math.pi).div_(config.num_steps)
    return angle.cos_().add_(1).mul_(config.learning_rate * 0.5)


def update_scalars(config: Config) -> Tensor:
    """What AdamW needs of every step's number, for backends that keep the step counter on the device.

    Row s of the result, shape (num_steps, 3), float32 on the CPU, holds for step s, whose update is number s + 1:
    the decay factor 1 - lr*weight_decay, the step size lr / (1 - beta1^(s+1)), and sqrt(1 - beta2^(s+1)).
    Computed in float64 and rounded once, as torch.optim.AdamW's own scalars are.
    """
    scalars = torch.empty(config.num_steps, 3)
    first = 0
    for rows in scalars.split(_PIECE):
        lr = learning_rates(config, first, first + len(rows))
        update = torch.arange(first + 1, first + len(rows) + 1, dtype=torch.float64)
        rows[:, 0] = 1 - lr * config.weight_decay
        rows[:, 1] = lr / (1 - BETA1**update)
        rows[:, 2] = (1 - BETA2**update).sqrt()
        first += len(rows)
    return scalars

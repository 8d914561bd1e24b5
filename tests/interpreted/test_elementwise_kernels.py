"""What the Triton kernels compute element by element, on a million elements of a real run; see tests/test_adamw.py."""

import pytest
import torch
import triton
import triton.language as tl
from steps import DEVICE
from updates import CONFIG, Difference, check, check_backend, differences, flat, pre_activations, updates

from mlp_fast import ops
from mlp_fast.kernels import adamw
from mlp_fast.kernels._math import tanh
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.model.schedule import learning_rate


def test_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreting():
        monkeypatch.setattr(adamw, "BLOCK", 1 << 17)  # one program
    results = []
    for update in updates():
        before = {kind: tensor.to(DEVICE) for kind, tensor in flat(update.before).items()}
        count = torch.tensor(update.step + 1, device=DEVICE)
        lr = torch.tensor(learning_rate(update.step, CONFIG), dtype=torch.float64, device=DEVICE)
        tensors = ([before["p"]], [update.grad.to(DEVICE)], [before["m"]], [before["v"]])
        ops.adamw_(*tensors, count, lr, weight_decay=CONFIG.weight_decay)
        results.append({kind: tensor.cpu() for kind, tensor in before.items()})
    check(differences(results, updates()))


@pytest.mark.parametrize("name", ["triton-op", "triton-step", "triton-persistent"])
def test_the_parameters_after_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreting():
        monkeypatch.setattr(adamw, "BLOCK", 1 << 17)
    check_backend(name, updates()[5:6] if interpreting() else updates(), interpret=interpreting())


@triton.jit
def tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = tanh x, BLOCK numbers a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


def test_tanh() -> None:
    x = pre_activations().to(DEVICE)
    y = torch.empty_like(x)
    block = len(x) if interpreting() else 1024
    tanh_kernel[(len(x) // block,)](x, y, BLOCK=block)
    exact = x.double().tanh().cpu()
    Difference.of(y.cpu(), exact, exact.float()).check("tanh", largest=3, equal=0)

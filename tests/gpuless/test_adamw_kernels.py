"""AdamW as compiled, in the emulator: torch.optim.AdamW's bits on random states, no drift where they differ."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from emulator import Emulator, Schedule
from kernels_under_test import ADVERSE, Case, run_case, undefined
from steps import Problem
from updates import Difference

from mlp_fast.kernels.adamw import adamw, adamw_1
from mlp_fast.model.mlp import PARAMETER_NAMES
from mlp_fast.model.schedule import update_scalars

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

SMALL = (("BLOCK_B", 16), ("BLOCK_V", 16), ("BLOCK_E", 16))
LR, DECAY = 7e-4, 1e-4


def random_state(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """p, g, m and v, float32, of the sizes that they have in a run."""
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    return [0.3 * p, 1e-2 * g, 1e-3 * m, (1e-5 * v).abs()]


@pytest.mark.parametrize("capability", [90, *(pytest.param(c, marks=pytest.mark.long) for c in (75, 80, 100))])
@pytest.mark.parametrize("step", [1, 7, 30_000])
@pytest.mark.parametrize("launcher", [adamw_1, adamw])
def test_the_operator_has_the_bits_of_torch(launcher: Callable[..., None], step: int, capability: int) -> None:
    shapes = [(27, 48), (700, 144), (512,), (27,)]
    states = [random_state(shape, seed) for seed, shape in enumerate(shapes)]
    leaves = [torch.nn.Parameter(p.clone()) for p, *_ in states]
    optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=DECAY)
    for leaf, (_, g, m, v) in zip(leaves, states, strict=True):
        optimizer.state[leaf] = {"step": torch.tensor(step - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        leaf.grad = g.clone()
    before = torch.cat([p.flatten() for p, *_ in states])
    optimizer.step()
    with Emulator(capability, ADVERSE) as emulator:
        p, g, m, v = (list(x) for x in zip(*states, strict=True))
        lr = torch.tensor(LR, dtype=torch.float64)
        launcher(p, g, m, v, torch.tensor(float(step)), lr, 0.9, 0.999, 1e-8, DECAY)
    assert emulator.findings == []

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    Difference.of(flat(p), flat(list(leaves)), before).check("p", largest=16, equal=0.99)
    for name, held, equal in (("exp_avg", m, 0.66), ("exp_avg_sq", v, 0.66)):
        expected = flat([optimizer.state[leaf][name] for leaf in leaves])
        Difference.of(flat(held), expected, expected).check(name, largest=2, equal=equal)


@pytest.mark.parametrize("form", ["step", "persistent"])
def test_the_step_kernels_have_the_bits_that_torch_makes_of_their_moments(form: str) -> None:
    """One step each from 16 random states of a small model: 12,000 parameters."""
    case = Case((20, 5, 1, 16, 32), form, tiles=SMALL, steps=1)
    decay, step_size, root = update_scalars(case.task.config)[0].double().tolist()
    before, got, expected = [], [], []
    for seed in range(16):
        outcome = run_case(case, Schedule(seed, races=seed == 0), prepare=drawn(seed))
        assert undefined(outcome.findings) == []
        task = case.task
        drawn(seed)(task)
        for start, p, m, v in zip(task.planes[0], *outcome.planes, strict=True):
            before.append(start.flatten())
            got.append(p.flatten())
            # torch.optim.AdamW's own operations on the moments that the kernel has computed.
            denominator = (v.sqrt() / root).add_(1e-8)
            expected.append((start * decay).addcdiv_(m, denominator, value=-step_size).flatten())
    difference = Difference.of(torch.cat(got), torch.cat(expected), torch.cat(before))
    difference.check("p", largest=16, equal=0.99)


def drawn(seed: int) -> Callable[[Problem], None]:
    """What makes a random state of a problem's."""

    def draw(task: Problem) -> None:
        for i, name in enumerate(PARAMETER_NAMES):
            state, (p, _, m, v) = task.state, random_state(task.state.parameters[name].shape, 10 * seed + i)
            state.parameters[name].copy_(p)
            state.exp_avg[name].copy_(m)
            state.exp_avg_sq[name].copy_(v)

    return draw

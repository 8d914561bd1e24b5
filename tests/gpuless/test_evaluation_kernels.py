"""Logits, mean loss and sampling as compiled, in the emulator: against float64 and the plain loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from emulator import Emulator, Finding, Schedule
from kernels_under_test import ADVERSE, undefined

from mlp_fast.kernels import inference as evaluation
from mlp_fast.kernels.inference import Weights
from mlp_fast.model.mlp import MLP, Shape, initial_parameters
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import sample

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

Sizes = tuple[int, int, int, int]  # V, T, E, H
SCHEDULES = (Schedule(), ADVERSE)


def model(sizes: Sizes) -> tuple[Weights, MLP]:
    """The kernels' weights and the same model in float64."""
    parameters = initial_parameters(Shape(*sizes), seed=7)
    return Weights(*parameters.values()), MLP(Shape(*sizes), parameters).double()


def windows(sizes: Sizes, rows: int) -> Tensor:
    V, T = sizes[:2]
    return torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(rows))


def check_logits(sizes: Sizes, rows: int, capability: int = 90, precision: str = "fp32") -> None:
    weights, truth = model(sizes)
    contexts = windows(sizes, rows)[:, :-1]
    with torch.no_grad():
        expected = truth(contexts)[0]
        plain = MLP(Shape(*sizes), initial_parameters(Shape(*sizes), seed=7))(contexts)[0].double()
    outcomes = []
    for schedule in SCHEDULES:
        with Emulator(capability, schedule) as emulator:
            outcomes.append(evaluation.logits(weights, contexts, precision=precision))
        assert undefined(emulator.findings) == []
    allowed = 4e-3 if precision == "tf32" else 2 * (plain - expected).abs().max() + 1e-6
    assert (outcomes[0].double() - expected).abs().max() <= allowed
    assert torch.equal(*outcomes)


def check_mean_loss(sizes: Sizes, rows: int, capability: int = 90, precision: str = "fp32") -> list[Finding]:
    weights, truth = model(sizes)
    drawn = windows(sizes, rows)
    counts = torch.randint(1, 9, (rows,), generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        losses = F.cross_entropy(truth(drawn[:, :-1])[0], drawn[:, -1], reduction="none")
    finished, means, findings = torch.zeros(1, dtype=torch.int32), [], []
    for schedule in SCHEDULES:
        with Emulator(capability, schedule) as emulator:
            means.append(evaluation.mean_loss(weights, drawn, counts, finished, precision=precision))
        findings += emulator.findings
        assert finished.item() == 0
    assert undefined(findings) == []
    atol = 1e-3 if precision == "tf32" else 1e-6
    torch.testing.assert_close(means[0][0], (losses * counts).sum() / counts.sum(), rtol=0, atol=atol)
    assert torch.equal(*means)
    return findings


def check_sample(sizes: Sizes, seed: int, capability: int = 90) -> None:
    weights, truth = model(sizes)
    V, T = sizes[:2]
    context = [i % V for i in range(T)]

    def logits_of(tokens: object) -> Tensor:
        with torch.no_grad():
            return truth(torch.tensor([tokens]))[0][0]

    expected = sample(logits_of, context, 8, RNG(seed), T)
    for schedule in SCHEDULES:
        with Emulator(capability, schedule) as emulator:
            assert evaluation.sample(weights, context, 8, seed).tolist() == expected
        assert undefined(emulator.findings) == []


def test_logits_and_mean_loss_at_odd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_PROGRAMS", 3)  # each takes several blocks of rows
    check_logits((29, 2, 13, 40), 70)
    check_mean_loss((29, 2, 13, 40), 133)


@pytest.mark.parametrize("sizes", [(5, 1, 3, 7), (65, 9, 17, 40)], ids=str)
def test_every_thread_has_the_same_sums_when_a_token_is_drawn(sizes: Sizes) -> None:
    """Threads that hold a number together store it to one address: different bits would be a race."""
    check_sample(sizes, seed=42)


@pytest.mark.long
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("sizes", [(27, 3, 48, 512), (1, 1, 1, 1), (256, 2, 5, 33), (2, 16, 3, 17)], ids=str)
def test_evaluation_of_all_sizes(sizes: Sizes, capability: int) -> None:
    for precision in ("fp32",) if capability == 75 else ("fp32", "tf32x3", "tf32"):
        check_logits(sizes, 133, capability, precision)
        check_mean_loss(sizes, 133, capability, precision)
    check_logits(sizes, 1, capability)


@pytest.mark.long
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("sizes", [(27, 3, 48, 512), (27, 3, 48, 64), (1, 1, 1, 1), (256, 2, 33, 40)], ids=str)
def test_samples_of_all_sizes(sizes: Sizes, capability: int) -> None:
    check_sample(sizes, 1, capability)
    check_sample(sizes, 2**64 - 1, capability)

"""Logits, mean losses and samples from the kernels, against float64 and the plain loop; on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from steps import DEVICE
from torch import Tensor

from mlp_fast.kernels import inference as evaluation
from mlp_fast.kernels.inference import ModelConfig, Weights
from mlp_fast.model.mlp import MLP, Shape, initial_parameters
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import sample

SIZES = [(27, 3, 48, 512), (1, 1, 1, 1), (256, 2, 5, 33), (29, 8, 13, 70), (2, 16, 3, 17)]  # V, T, E, H


def model(V: int, T: int, E: int, H: int) -> tuple[Weights, MLP]:
    """The kernels' weights and the same model in float64."""
    shape = Shape(V, T, E, H)
    parameters = initial_parameters(shape, seed=7)
    return Weights(*(tensor.to(DEVICE) for tensor in parameters.values())), MLP(shape, parameters).double()


def drawn_windows(V: int, T: int, rows: int) -> Tensor:
    return torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop runs more than once."""
    chosen = evaluation.default_config

    def small(*sizes: int, precision: str) -> ModelConfig:
        return replace(chosen(*sizes, precision=precision), BLOCK_R=16, BLOCK_E=16, BLOCK_H=16)

    monkeypatch.setattr(evaluation, "default_config", small)


@pytest.mark.parametrize("rows", [0, 1, 17, 600])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_follow_float64(sizes: tuple[int, int, int, int], rows: int) -> None:
    weights, truth = model(*sizes)
    contexts = drawn_windows(*sizes[:2], rows)[:, :-1]
    expected = truth(contexts)[0]
    got = evaluation.logits(weights, contexts.to(DEVICE)).cpu()
    assert got.shape == expected.shape
    if rows:
        plain = (truth.float()(contexts)[0].double() - expected).abs().max()
        assert (got.double() - expected).abs().max() <= 2 * plain + 1e-6


@pytest.mark.usefixtures("small_tiles")
def test_small_tiles_give_the_same_logits_and_losses() -> None:
    weights, truth = model(29, 2, 37, 40)
    rows = drawn_windows(29, 2, 50)
    logits = evaluation.logits(weights, rows[:, :-1].to(DEVICE)).cpu()
    torch.testing.assert_close(logits.double(), truth(rows[:, :-1])[0], rtol=0, atol=2e-6)
    check_mean_loss(weights, truth, rows)


@pytest.mark.parametrize("programs", [1, 3, 4096])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_mean_loss_follows_float64(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int], programs: int
) -> None:
    monkeypatch.setattr(evaluation, "MAX_PROGRAMS", programs)
    check_mean_loss(*model(*sizes), drawn_windows(*sizes[:2], 1300))


def check_mean_loss(weights: Weights, truth: MLP, rows: Tensor) -> None:
    counts = torch.randint(1, 9, (len(rows),), generator=torch.Generator().manual_seed(3)).double()
    losses = F.cross_entropy(truth(rows[:, :-1])[0], rows[:, -1], reduction="none")
    finished = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    means = [evaluation.mean_loss(weights, rows.to(DEVICE), counts.to(DEVICE), finished).cpu() for _ in range(2)]
    torch.testing.assert_close(means[0][0], (losses * counts).sum() / counts.sum(), rtol=0, atol=1e-6)
    assert torch.equal(*means), "the second launch finds everything as the first did"
    assert finished.item() == 0


def test_an_unknown_token_is_masked_not_read() -> None:
    weights, truth = model(5, 2, 4, 8)
    contexts = torch.tensor([[1, -1], [7, 2]])
    with torch.no_grad():
        emb = truth.wte.weight[contexts.clamp(0, 4)] * ((contexts >= 0) & (contexts < 5))[..., None]
        expected = truth.mlp(emb.flatten(1))
    torch.testing.assert_close(
        evaluation.logits(weights, contexts.to(DEVICE)).double().cpu(), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("seed", [1, 42, 2**64 - 1])
@pytest.mark.parametrize("sizes", [(27, 3, 48, 64), (5, 1, 3, 7), (65, 9, 17, 40)], ids=str)
def test_the_sample_is_that_of_the_plain_loop(sizes: tuple[int, int, int, int], seed: int) -> None:
    weights, truth = model(*sizes)
    V, T = sizes[:2]
    context = [i % V for i in range(T)]

    def logits_of(tokens: object) -> Tensor:
        with torch.no_grad():
            return truth(torch.tensor([tokens]))[0][0]

    expected = sample(logits_of, context, 12, RNG(seed), T)
    assert evaluation.sample(weights, context, 12, seed).tolist() == expected
    assert len(set(expected)) > 1


def test_weights_that_do_not_fit_the_contexts_are_refused() -> None:
    weights, _ = model(5, 2, 4, 8)
    with pytest.raises(ValueError, match="W1 has 8 columns"):
        evaluation.logits(weights, torch.zeros(1, 3, dtype=torch.int64, device=DEVICE))

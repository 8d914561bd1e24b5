"""The two eager models: golden initial values and gradients, and float64 gradients of the hand-written step."""

from pathlib import Path
from typing import Any

import ddp_program
import pytest
import torch
from processes import Python

from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.kernels._model import choose_form
from mlp_fast.model.manual_step import adamw_, loss_and_gradients
from mlp_fast.model.mlp import MLP, PARAMETER_NAMES, MLPRaw, Shape, initial_parameters
from mlp_fast.model.rng import RNG
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate, update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

DEFAULT = Shape(V=27, T=3, E=48, H=512)


def test_default_model_has_the_references_size() -> None:
    assert DEFAULT.num_parameters == 89_387


@pytest.mark.parametrize("name", ["MLPRaw", "MLP"])
def test_initial_values_and_gradients_are_the_references(
    name: str, golden: dict[str, Any], names_corpus: Corpus
) -> None:
    expected = golden[name]
    values = initial_parameters(DEFAULT, 1337)
    model: Any = MLPRaw(values) if name == "MLPRaw" else MLP(DEFAULT, values)
    parameters = model.parameters() if name == "MLPRaw" else dict(model.named_parameters())
    assert list(parameters) == list(PARAMETER_NAMES)
    assert [list(p.shape) for p in parameters.values()] == expected["param_shapes"]
    for parameter, total, norm in zip(
        parameters.values(), expected["param_sum_float64"], expected["param_l2"], strict=True
    ):
        assert parameter.detach().double().sum().item() == pytest.approx(total, abs=2e-6)
        assert parameter.detach().double().norm().item() == pytest.approx(norm, abs=2e-6)
    model(*Tape(names_corpus.train, 3).batch(0, 128))[1].backward()
    for parameter, norm in zip(parameters.values(), expected["grad_l2_step0"], strict=True):
        assert parameter.grad is not None
        assert parameter.grad.double().norm().item() == pytest.approx(norm, abs=2e-6)


def test_the_generator_ends_where_the_references_does(golden: dict[str, Any]) -> None:
    rng = RNG(1337)
    shapes = list(DEFAULT.parameters.values())
    rng.normal(shapes[0])
    for shape in shapes[1:]:
        rng.uniform(shape, -1.0, 1.0)
    assert str(rng.state) == golden["MLP"]["rng_state_after_init"]


@pytest.mark.parametrize(
    ("V", "B", "expected"), [(27, 128, "table"), (128, 128, "gather"), (300, 128, "gather"), (127, 128, "table")]
)
def test_auto_takes_the_table_form_while_it_has_fewer_rows(V: int, B: int, expected: str) -> None:
    assert choose_form("auto", B, V) == expected
    assert choose_form("gather", B, V) == "gather"


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize(("V", "T", "E", "H", "B"), [(27, 3, 48, 64, 128), (1, 1, 1, 1, 1), (300, 8, 5, 7, 3)])
def test_hand_written_gradients_are_autograds(form: str, V: int, T: int, E: int, H: int, B: int) -> None:
    shape = Shape(V, T, E, H)
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(V, (B, T), generator=generator)
    targets = torch.randint(V, (B,), generator=generator)
    model = MLP(shape, initial_parameters(shape, 5)).double()
    _, expected = model(idx, targets)
    expected.backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss, gradients = loss_and_gradients(parameters, idx, targets, form)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_hand_written_adamw_is_torchs() -> None:
    config = Config(num_steps=30, weight_decay=0.1, learning_rate=1e-2)
    shape = Shape(5, 2, 3, 4)
    state = TrainState.initial(shape, 3)
    tensors = [p.clone().requires_grad_() for p in state.parameters.values()]
    optimizer = torch.optim.AdamW(tensors, betas=(BETA1, BETA2), eps=EPS, weight_decay=config.weight_decay)
    scalars = update_scalars(config)
    generator = torch.Generator().manual_seed(2)
    for step in range(config.num_steps):
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in state.parameters.items()}
        for tensor, gradient in zip(tensors, gradients.values(), strict=True):
            tensor.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.step()
        adamw_(state.parameters, gradients, state.exp_avg, state.exp_avg_sq, scalars[step])
    for tensor, ours in zip(tensors, state.parameters.values(), strict=True):
        torch.testing.assert_close(ours, tensor.detach(), rtol=3e-6, atol=3e-7)


def test_the_schedule_is_half_a_cosine() -> None:
    config = Config(num_steps=1000)
    assert learning_rate(0, config) == 7e-4
    assert learning_rate(500, config) == pytest.approx(3.5e-4)
    assert learning_rate(1000, config) == pytest.approx(0, abs=1e-18)


def test_ranks_of_distributed_data_parallel_have_the_gradients_of_plain_torch(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    program = str(Path(__file__).parent / "ddp_program.py")
    ranks = [Python(program, str(rank), str(tmp_path / "store"), files[rank]) for rank in range(2)]
    told = [process.communicate(120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    model = MLP(ddp_program.SHAPE, initial_parameters(ddp_program.SHAPE, 1)).double()
    model(*ddp_program.batch())[1].backward()
    for file in files:
        gradients = torch.load(file)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)

"""Direct connections from the embeddings to the logits: both models, the hand-written step, the presets."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlp_fast import backends
from mlp_fast.backends.compiled import forward
from mlp_fast.cli import Parser, add_config_arguments, config_from
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.model.manual_step import loss_and_gradients
from mlp_fast.model.mlp import B1, B2, DIRECT, MLP, W1, W2, WTE, MLPRaw, Shape, initial_parameters
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape
from mlp_fast.ops import FusedMLP

SHAPE = Shape(V=13, T=3, E=5, H=7, direct=True)


def windows(B: int, shape: Shape = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.V, (B, shape.T), generator=generator), torch.randint(shape.V, (B,), generator=generator)


def test_the_direct_matrix_is_drawn_last_and_leaves_the_others_alone() -> None:
    plain = initial_parameters(Shape(13, 3, 5, 7), 5)
    drawn = initial_parameters(SHAPE, 5)
    assert list(drawn) == [*plain, DIRECT]
    assert all(torch.equal(drawn[name], plain[name]) for name in plain)
    assert drawn[DIRECT].shape == (13, 15)
    assert 0.9 / 15**0.5 < drawn[DIRECT].abs().max() <= 1 / 15**0.5
    assert SHAPE.num_parameters == Shape(13, 3, 5, 7).num_parameters + 13 * 15


@pytest.mark.parametrize("model_class", [MLPRaw, MLP])
def test_both_models_add_the_direct_product_to_the_logits(model_class: Any) -> None:
    p = initial_parameters(SHAPE, 5)
    model = model_class(p) if model_class is MLPRaw else MLP(SHAPE, p)
    idx, _ = windows(6)
    logits = model(idx)[0].detach()
    wide = {name: tensor.double() for name, tensor in p.items()}
    emb = wide[WTE][idx].flatten(1)
    truth = torch.tanh(emb @ wide[W1].t() + wide[B1]) @ wide[W2].t() + wide[B2] + emb @ wide[DIRECT].t()
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward(wide, idx), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPE, Shape(200, 4, 3, 5, True)])
def test_the_fused_operators_compute_the_same_loss_and_gradients(shape: Shape) -> None:
    values = initial_parameters(shape, 5)
    plain, fused = MLP(shape, values).double(), FusedMLP(shape, values).double()
    idx, targets = windows(9, shape)
    (_, expected), (_, loss) = plain(idx, targets), fused(idx, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused(idx)[0], plain(idx)[0], rtol=1e-12, atol=1e-12)
    expected.backward()
    loss.backward()
    for (name, left), right in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert left.grad is not None, name
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize(("shape", "B"), [(SHAPE, 9), (Shape(1, 1, 1, 1, True), 1), (Shape(200, 4, 3, 5, True), 8)])
def test_hand_written_gradients_are_autograds(form: str, shape: Shape, B: int) -> None:
    model = MLP(shape, initial_parameters(shape, 5)).double()
    idx, targets = windows(B, shape)
    expected = F.cross_entropy(model(idx)[0], targets)
    expected.backward()
    loss, gradients = loss_and_gradients({k: p.detach() for k, p in model.named_parameters()}, idx, targets, form)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    assert gradients.keys() == shape.parameters.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_every_backend_trains_with_them_or_says_that_it_does_not(name: str) -> None:
    sizes: dict[str, Any] = {"context_length": 3, "embedding_size": 5, "hidden_size": 7, "batch_size": 16}
    config = Config(backend=name, num_steps=40, direct=True, **sizes)
    if not backends.backend_class(name).direct:
        with pytest.raises(UserError, match="direct connections"):
            backends.resolve(config, SHAPE)
        return
    if backends.unsupported(name, config, SHAPE):
        pytest.skip(str(backends.unsupported(name, config, SHAPE)))
    tokens = torch.randint(13, (100,), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    baseline = MLPRaw({k: v.double() for k, v in initial_parameters(SHAPE, 1).items()})
    optimizer = torch.optim.AdamW(baseline.parameters().values(), lr=7e-4, weight_decay=1e-4)
    backend = backends.create(config, SHAPE, Tape(tokens, 3), TrainState.initial(SHAPE, 1))
    losses = backend.advance(3).tolist()
    for step in range(3):
        _, loss = baseline(*Tape(tokens, 3).batch(step, 16))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 7e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 40)).item())
        optimizer.step()
        optimizer.zero_grad()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)
    state = backend.state()
    for key, parameter in baseline.parameters().items():
        truth = parameter.detach().t() if key in (W1, W2, DIRECT) else parameter.detach()
        torch.testing.assert_close(state.parameters[key].double(), truth, rtol=0, atol=2e-6)


def parsed(*arguments: str) -> Config:
    parser = Parser()
    add_config_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_a_preset_sets_options_and_explicit_ones_win() -> None:
    config = parsed("--hidden-size", "9", "--preset", "bengio2003", "--no-direct")
    assert (config.tokens, config.context_length, config.embedding_size) == ("word", 5, 60)
    assert (config.hidden_size, config.direct) == (9, False)
    assert parsed("--preset", "default") == parsed() == Config()
    large = parsed("--preset", "large")
    assert (large.tokens, large.context_length, large.embedding_size, large.hidden_size) == ("byte", 8, 64, 4096)
    assert parsed("--preset", "large", "--hidden-size", "512").hidden_size == 512


def test_an_unknown_preset_and_a_min_count_without_words_are_refused() -> None:
    with pytest.raises(UserError, match="bengio2003"):
        parsed("--preset", "huge")
    with pytest.raises(UserError, match="--tokens word"):
        parsed("--min-count", "3")

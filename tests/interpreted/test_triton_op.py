"""Backend triton-op: the golden trace, checkpoints, and what it says where it cannot run."""

import importlib
from typing import Any

import pytest
import torch

from mlp_fast import backends
from mlp_fast.backends.eager import Eager
from mlp_fast.backends.triton_op import TritonOp
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

INTERPRET = not torch.cuda.is_available()


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs with large tiles, where the interpreter runs them; the shipped tiles have tests of their own."""
    if INTERPRET:
        tiles = {
            "embed_linear_tanh": {
                "BLOCK_M": 128, "BLOCK_N": 512, "BLOCK_K": 128, "LOOKUP_ROWS": 128, "LOOKUP_COLUMNS": 512,
            },
            "_sum_by_token": {"ONE_HOT_N": 512},
            "linear_cross_entropy": {"MANY_ROWS": 128, "BLOCK_K": 512, "BLOCK_H": 512},
            "adamw": {"BLOCK": 65536},
        }  # fmt: skip
        for name, sizes in tiles.items():
            for constant, size in sizes.items():
                monkeypatch.setattr(importlib.import_module(f"mlp_fast.kernels.{name}"), constant, size)


@pytest.mark.usefixtures("large_tiles")
def test_the_first_batch_losses_are_the_references(golden: dict[str, Any], names_corpus: Corpus) -> None:
    config = Config(backend="triton-op", interpret=INTERPRET, num_steps=1000)
    shape = Shape(V=27, T=3, E=48, H=512)
    backend = backends.create(config, shape, Tape(names_corpus.train, 3), TrainState.initial(shape, 1337))
    assert isinstance(backend, TritonOp)
    expected = golden["MLP"]["batch_loss_first_50_steps"][:20]
    assert torch.cat([backend.advance(7), backend.advance(13)]).tolist() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("form", ["table", "gather"])
def test_states_go_to_eager_and_back(form: str) -> None:
    shape = Shape(V=11, T=2, E=6, H=20)
    settings: dict[str, Any] = {"context_length": 2, "embedding_size": 6, "hidden_size": 20, "batch_size": 16}
    config = Config(backend="triton-op", interpret=INTERPRET, num_steps=60, form=form, **settings)
    tape = Tape(torch.randint(11, (100,), generator=torch.Generator().manual_seed(4)).to(torch.uint8), 2)
    device = torch.device("cpu" if INTERPRET else "cuda")
    state = TrainState.initial(shape, 1)
    whole = Eager(config, shape, tape, state, device)
    expected = whole.advance(9).cpu()

    ours = TritonOp(config, shape, tape, state, device)
    losses = [ours.advance(3)]
    between = Eager(config, shape, tape, ours.state(), device)
    losses.append(between.advance(3))
    ours.load(between.state())
    losses.append(ours.advance(3))
    assert torch.cat(losses).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    left, right = ours.state(), whole.state()
    assert left.step == right.step == 9
    for name, tensor in left.parameters.items():
        torch.testing.assert_close(tensor, right.parameters[name], rtol=0, atol=2e-5)
    contexts = tape.rows[:30, :-1].long().to(device)
    torch.testing.assert_close(ours.logits(contexts), whole.logits(contexts), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRET, reason="no CUDA device was found")
def test_a_captured_run_has_the_losses_of_an_eager_one(golden: dict[str, Any], names_corpus: Corpus) -> None:
    config = Config(backend="triton-op", num_steps=1000)
    shape = Shape(V=27, T=3, E=48, H=512)
    backend = backends.create(config, shape, Tape(names_corpus.train, 3), TrainState.initial(shape, 1337))
    backend.prepare()
    expected = golden["MLP"]["batch_loss_first_50_steps"]
    assert backend.advance(50).tolist() == pytest.approx(expected, abs=5e-7)

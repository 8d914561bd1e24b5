"""The first thousand of 50,000 steps in Triton's interpreter, or on a GPU, against the reference's evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest
from steps import DEVICE

from mlp_fast import backends
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.kernels import _sum_by_token, adamw, embed_linear_tanh, linear_cross_entropy
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_windows

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "upstream_embedded_50000.json").read_text())
LARGE_TILES: list[tuple[Any, dict[str, int]]] = [
    (embed_linear_tanh, dict.fromkeys(("BLOCK_M", "BLOCK_K", "LOOKUP_ROWS"), 128)),
    (embed_linear_tanh, dict.fromkeys(("BLOCK_N", "LOOKUP_COLUMNS"), 512)),
    (_sum_by_token, {"ONE_HOT_N": 512}),
    (linear_cross_entropy, {"MANY_ROWS": 128, "BLOCK_K": 512, "BLOCK_H": 512}),
    (adamw, {"BLOCK": 65536}),
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["triton-op", "triton-step", "triton-persistent"])
def test_a_thousand_steps_follow_the_reference(
    name: str, embedded_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpreting():  # few programs
        for module, sizes in LARGE_TILES:
            for constant, size in sizes.items():
                monkeypatch.setattr(module, constant, size)
    config, shape = Config(backend=name, interpret=interpreting()), Shape(V=27, T=3, E=48, H=512)
    tape, state = Tape(embedded_corpus.train, shape.T), TrainState.initial(shape, config.seed)
    backend = backends.create(config, shape, tape, state)
    windows = evaluated_windows(Tape(embedded_corpus.val, shape.T), config.batch_size).to(DEVICE)
    for step, _, val_loss in GOLDEN["MLP"]["eval_step_trainloss_valloss"][:6]:
        if step:
            backend.advance(200)
        assert backend.mean_loss(windows) == pytest.approx(val_loss, abs=5e-7), step

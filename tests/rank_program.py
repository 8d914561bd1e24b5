"""What test_scale_ranks.py runs in several processes: training steps whose losses and state rank 0 writes as JSON.

torchrun --nproc-per-node N tests/rank_program.py FILE BACKEND...
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlp_fast import backends, distributed
from mlp_fast.backends.triton_op import TritonOp
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.corpus.tokenizer import Characters
from mlp_fast.run.log import RunLog
from mlp_fast.run.trainer import Plan, Trainer

STEPS = 200
V = 30


def corpus() -> Corpus:
    """Tokens that mostly follow from the one before."""
    tokens = torch.randint(V, (700,), generator=torch.Generator().manual_seed(3))
    for i in range(1, len(tokens)):
        if i % 5:
            tokens[i] = (tokens[i - 1] + 7) % V
    characters = Characters("".join(map(chr, range(97, 97 + V))))
    tape = tokens.to(torch.uint8)
    return Corpus("learnable", characters, tape[:500], tape[500:600], tape[600:], fingerprint="")


def outcome(name: str) -> dict[str, Any]:
    """A run of STEPS steps: the loss of every batch, the evaluations, the test loss and the parameters' sums.

    13 rows do not divide evenly among 2 or 4, nor do the windows that an evaluation visits.
    """
    sizes: dict[str, Any] = {"context_length": 2, "embedding_size": 6, "hidden_size": 20, "batch_size": 13}
    config = Config(
        backend=name,
        num_steps=STEPS,
        eval_every=50,
        learning_rate=1e-2,
        direct=name != "eager-raw",
        quiet=True,
        **sizes,
    )
    trainer = Trainer(Plan.of(config, corpus()), RunLog(config))
    losses: list[float] = []
    advance = trainer.backend.advance

    def recorded(steps: int) -> torch.Tensor:
        batch = advance(steps)
        losses.extend(batch.tolist())
        return batch

    trainer.backend.prepare()
    trainer.backend.advance = recorded  # type: ignore[method-assign]
    trainer.backend.prepare = lambda: None  # type: ignore[method-assign]
    result = trainer.run()
    return {
        "losses": losses,
        "evaluations": [[e.train_loss, e.val_loss] for e in result.evaluations],
        "test": result.test_loss,
        "sums": [p.double().sum().item() for p in result.state.parameters.values()],
    }


def main(file: str, names: Sequence[str]) -> None:
    """Rank 0 writes {backend: outcome} to the file.

    triton-op runs on the CPU too: there its operators are computed by plain torch.
    """
    TritonOp.missing = staticmethod(lambda device: None)  # type: ignore[method-assign, assignment]
    with distributed.joined() as world:
        outcomes = {name: outcome(name) for name in names if backends.unsupported(name, Config(backend=name)) is None}
        if world.rank == 0:
            Path(file).write_text(json.dumps({"size": world.size, "outcomes": outcomes}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""The reference loop, which benchmarks compare with: the reference program's way of working, rewritten.

MLPRaw under autograd with torch.optim.AdamW. Every batch is gathered into Python lists and made a tensor, and every
batch of an evaluation is computed by itself. The backend `eager-raw` is the same without the lists.

    python -m bench.reference_loop --num-steps N     the whole run as a process, for its time from start to end
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from mlp_fast.backends.eager import EagerRaw
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.corpus.load import load
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import TRAIN_EVAL_BATCHES, Tape


def batches(tokens: Sequence[int], context_length: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a split, from Python lists, without end."""
    position = 0
    while True:
        contexts, targets = [], []
        for _ in range(batch_size):
            contexts.append(tokens[position : position + context_length])
            targets.append(tokens[position + context_length])
            position += 1
            if position + context_length >= len(tokens):
                position = 0
        yield torch.tensor(contexts), torch.tensor(targets)


class ReferenceLoop(EagerRaw):
    """Training on batches from Python lists, from the initial state."""

    name = "reference-loop"
    devices = ("cpu",)

    @cached_property
    def tokens(self) -> list[int]:
        """The training split."""
        return self.tape.tokens.tolist()

    def load(self, state: TrainState) -> None:
        super().load(state)
        self.batches = batches(self.tokens, self.shape.T, self.config.batch_size)

    def _gradients(self, step: int) -> torch.Tensor:
        loss = self._loss(*next(self.batches))
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def split_loss(self, tokens: Sequence[int], max_batches: int | None = None) -> float:
        """The mean of the batch losses of a split, batch by batch."""
        B = self.config.batch_size
        count = len(tokens) // B if max_batches is None else min(len(tokens) // B, max_batches)
        source = batches(tokens, self.shape.T, B)
        return sum(self._loss(*next(source)).item() for _ in range(count)) / count


def main(argv: Sequence[str] | None = None) -> int:
    """The command: trains, evaluates, and measures the test loss at the end; returns its exit code."""
    parser = Parser(prog="python -m bench.reference_loop", description=__doc__)
    add_config_arguments(parser, leave_out=("backend", "device", "precision", "out", "log_json", "plot", "stop_after"))
    config = config_from(parser.parse_args(argv))
    corpus = load(config.data)
    train, val, test = (corpus.tapes[split].tolist() for split in ("train", "val", "test"))
    shape = Shape.of(config, len(corpus.vocabulary))
    tape, state = Tape(corpus.train, shape.T), TrainState.initial(shape, config.seed)
    loop = ReferenceLoop(config, shape, tape, state, torch.device("cpu"))
    for step in range(config.num_steps):
        if step % config.eval_every == 0 or step == config.num_steps - 1:
            train_loss, val_loss = loop.split_loss(train, TRAIN_EVAL_BATCHES), loop.split_loss(val)
            if not config.quiet:
                print(f"step {step:6d} | train_loss {train_loss:.6f} | val_loss {val_loss:.6f}")
        loop.advance(1)
    print(f"test_loss {loop.split_loss(test):.6f}")
    return 0


if __name__ == "__main__":
    run_main(main)

"""The loop that the project measures itself against: the reference program's way of working, in our own words.

MLPRaw under autograd with torch.optim.AdamW, every batch gathered into Python lists and made a tensor, every batch
of an evaluation computed by itself. Used by benchmarks only; the backend `eager-raw` is the same model without the
lists.

    python -m bench.reference_loop --num-steps N     the whole run as a process, for its time from start to end
"""

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.model.mlp import MLPRaw, Shape, initial_parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate
from mlp_fast.model.windows import TRAIN_EVAL_BATCHES


def batches(tokens: Sequence[int], context_length: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a split without end, from Python lists."""
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


class ReferenceLoop:
    """The training loop on Python-list batches.

    Args:
        config: sizes and the schedule.
        splits: the tokens of "train" and "val" (others are not used).
        vocab_size: V.
    """

    def __init__(self, config: Config, splits: Mapping[str, Sequence[int]], vocab_size: int) -> None:
        self.config, self.splits = config, splits
        shape = Shape.of(config, vocab_size)
        self.model = MLPRaw(initial_parameters(shape, config.seed))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters().values(),
            lr=config.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=config.weight_decay,
        )
        self.batches = self._batches("train")
        self.step = 0

    def advance(self, steps: int) -> float:
        """Does so many steps; returns the last batch loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.config)
            contexts, targets = next(self.batches)
            loss = self._loss(contexts, targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return loss.item()

    @torch.no_grad()
    def mean_loss(self, split: str, max_batches: int | None = None) -> float:
        """The mean of the batch losses of a split, batch by batch."""
        count = len(self.splits[split]) // self.config.batch_size
        if max_batches is not None:
            count = min(count, max_batches)
        source = self._batches(split)
        total = 0.0
        for _ in range(count):
            contexts, targets = next(source)
            total += self._loss(contexts, targets).item()
        return total / count

    def run(self) -> list[tuple[int, float, float]]:
        """The whole run: (step, train loss, val loss) of every evaluation."""
        evaluations = []
        for step in range(self.config.num_steps):
            if step % self.config.eval_every == 0 or step == self.config.num_steps - 1:
                evaluations.append((step, self.mean_loss("train", TRAIN_EVAL_BATCHES), self.mean_loss("val")))
            self.advance(1)
        return evaluations

    def _loss(self, contexts: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.model(contexts, targets)[1]
        assert loss is not None
        return loss

    def _batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return batches(self.splits[split], self.config.context_length, self.config.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: trains, evaluates, and measures the test loss at the end; returns its exit code."""
    parser = Parser(prog="python -m bench.reference_loop", description=__doc__)
    add_config_arguments(parser, leave_out=("backend", "device", "precision", "out", "log_json", "plot", "stop_after"))
    config = config_from(parser.parse_args(argv))
    corpus = load(config.data)
    splits = {"train": corpus.train.tolist(), "val": corpus.val.tolist(), "test": corpus.test.tolist()}
    loop = ReferenceLoop(config, splits, len(corpus.vocabulary))
    for step, train_loss, val_loss in loop.run():
        if not config.quiet:
            print(f"step {step:6d} | train_loss {train_loss:.6f} | val_loss {val_loss:.6f}")
    print(f"test_loss {loop.mean_loss('test'):.6f}")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

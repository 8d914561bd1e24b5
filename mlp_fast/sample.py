"""`python -m mlp_fast.sample RUN`: text from a saved model."""

import argparse
from collections.abc import Iterator, Sequence

import torch

from mlp_fast.cli import Parser, number, run_main, unescape
from mlp_fast.config import MAX_SEED
from mlp_fast.corpus.prompt import PROMPT, continuation, default_prompt, padded
from mlp_fast.errors import UserError, for_terminal
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED, sample, shaped
from mlp_fast.run import checkpoint
from mlp_fast.run.checkpoint import Checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that --out wrote, or one of its checkpoint files")
    default = PROMPT.replace("\n", "\\n")
    parser.add_argument(
        "--prompt",
        type=unescape,
        metavar="TEXT",
        help=f"what to continue; \\n is a newline (default: {default}, or how the corpus begins)",
    )
    count = number(int, 1)
    parser.add_argument("--length", type=number(int, 0), default=SAMPLE_LENGTH, metavar="N", help="tokens to draw")
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="texts to draw")
    parser.add_argument(
        "--stop", type=unescape, metavar="TOKEN", help="end a text at this token, \\n for a newline, and leave it out"
    )
    parser.add_argument(
        "--temperature", type=number(float, 0), default=1.0, help="divides the logits; 0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=count, metavar="K", help="draw among the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=number(int, 1, MAX_SEED), default=SAMPLE_SEED, help="seed of the draws")
    arguments = parser.parse_args(argv)
    for text in texts(checkpoint.load(arguments.run), arguments):
        print(for_terminal(text))
    return 0


def texts(saved: Checkpoint, asked: argparse.Namespace) -> Iterator[str]:
    """Texts drawn from a model, each with its prompt, one after another from one stream of random numbers.

    Without a prompt they begin as a training run's sample does; a short one is padded as in prompt.padded, and printed
    without the padding. UserError where the prompt or the stop is not of the model's vocabulary.
    """
    vocabulary, T = saved.vocabulary, saved.config.context_length
    if asked.prompt is None:
        tokens = default_prompt(vocabulary, T, saved.beginning)
        shown = vocabulary.decode(tokens)
    else:
        tokens = padded(vocabulary.encode(asked.prompt), vocabulary, T, saved.beginning)
        shown = asked.prompt
    stop = None
    if asked.stop is not None:
        ends = vocabulary.encode(asked.stop) if vocabulary.knows(asked.stop) else []
        if len(ends) != 1:
            raise UserError(f"--stop {asked.stop!r} is not one token of the model's {len(vocabulary)}; give one")
        stop = ends[0]
    model, rng = saved.model(), RNG(asked.seed)

    def logits_of(context: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return shaped(model(torch.tensor([context]))[0][0], asked.temperature, asked.top_k)

    for _ in range(asked.samples):
        yield shown + continuation(vocabulary, tokens, sample(logits_of, tokens, asked.length, rng, T, stop))


if __name__ == "__main__":
    run_main(main)

"""`python -m mlp_fast.sample RUN`: text from a saved model."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mlp_fast.cli import Parser, run_main
from mlp_fast.config import MAX_SEED
from mlp_fast.errors import UserError, for_terminal
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import (
    PROMPT,
    SAMPLE_LENGTH,
    SAMPLE_SEED,
    continuation,
    default_prompt,
    padded,
    sample,
    shaped,
)
from mlp_fast.run import checkpoint


def texts(
    saved: checkpoint.Checkpoint,
    prompt: str | None = None,
    length: int = SAMPLE_LENGTH,
    seed: int = SAMPLE_SEED,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: str | None = None,
) -> Iterator[str]:
    """Texts that a model draws, each with its prompt, one after another from one stream of random numbers.

    Args:
        saved: the model.
        prompt: what they begin with; None for that of a training run's sample. A prompt shorter than the context is
            padded, unseen, as sampling.padded says.
        length: tokens to draw for each.
        seed: of the draws.
        samples: how many texts.
        temperature, top_k: see sampling.shaped.
        stop: a token that ends a text, and is left out of it.

    Raises:
        UserError: the prompt or `stop` is not of the model's vocabulary.
    """
    vocabulary, T = saved.vocabulary, saved.config.context_length
    if prompt is None:
        tokens = default_prompt(vocabulary, T, saved.beginning)
        shown = vocabulary.decode(tokens)
    else:
        tokens = padded(vocabulary.encode(prompt), vocabulary, T, saved.beginning)
        shown = prompt
    end = None if stop is None else _one_token(saved, stop)
    model, rng = saved.model(), RNG(seed)

    def logits_of(context: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return shaped(model(torch.tensor([context]))[0][0], temperature, top_k)

    for _ in range(samples):
        yield shown + continuation(vocabulary, tokens, sample(logits_of, tokens, length, rng, T, end))


def _one_token(saved: checkpoint.Checkpoint, text: str) -> int:
    tokens = saved.vocabulary.encode(text) if saved.vocabulary.knows(text) else []
    if len(tokens) != 1:
        raise UserError(f"--stop {text!r} is not one token of the model's {len(saved.vocabulary)}; give one")
    return tokens[0]


def unescape(text: str) -> str:
    r"""A prompt as typed in a shell: \n and \t stand for the characters, \\ for a backslash."""
    placeholder = "\0"
    return text.replace("\\\\", placeholder).replace("\\n", "\n").replace("\\t", "\t").replace(placeholder, "\\")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that --out wrote, or one of its checkpoint files")
    default = PROMPT.replace("\n", "\\n")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f"what to continue; \\n is a newline (default: {default}, or how the corpus begins)",
    )
    parser.add_argument("--length", type=int, default=SAMPLE_LENGTH, metavar="N", help="tokens to draw")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts to draw")
    parser.add_argument("--stop", metavar="TOKEN", help="end a text at this token, \\n for a newline, and leave it out")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits; 0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=SAMPLE_SEED, help="seed of the draws")
    arguments = parser.parse_args(argv)
    for option, least in (("length", 0), ("samples", 1), ("top_k", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise UserError(f"--{option.replace('_', '-')} must be at least {least} (got {value})")
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise UserError(f"--temperature must be a finite number, at least 0 (got {arguments.temperature:g})")
    if not 0 < arguments.seed <= MAX_SEED:
        raise UserError(f"--seed must lie in 1..2^64-1 (got {arguments.seed})")
    drawn = texts(
        checkpoint.load(Path(arguments.run)),
        None if arguments.prompt is None else unescape(arguments.prompt),
        arguments.length,
        arguments.seed,
        arguments.samples,
        arguments.temperature,
        arguments.top_k,
        None if arguments.stop is None else unescape(arguments.stop),
    )
    for text in drawn:
        print(for_terminal(text))
    return 0


if __name__ == "__main__":
    run_main(main)

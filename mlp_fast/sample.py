"""`python -m mlp_fast.sample RUN`: text from a saved model."""

import math
from collections.abc import Sequence
from pathlib import Path

from mlp_fast.cli import Parser, run_main, unescape
from mlp_fast.config import MAX_SEED
from mlp_fast.corpus.prompt import PROMPT
from mlp_fast.errors import UserError, for_terminal
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED
from mlp_fast.run import checkpoint
from mlp_fast.run.sampling import texts


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

"""`python -m mlp_fast.sample RUN`: text from a saved model."""

from collections.abc import Sequence
from pathlib import Path

from mlp_fast.cli import Parser, number, run_main, unescape
from mlp_fast.config import MAX_SEED
from mlp_fast.corpus.prompt import PROMPT
from mlp_fast.errors import for_terminal
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
    options = vars(parser.parse_args(argv))
    for text in texts(checkpoint.load(Path(options.pop("run"))), **options):
        print(for_terminal(text))
    return 0


if __name__ == "__main__":
    run_main(main)

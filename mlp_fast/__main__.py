"""`python -m mlp_fast`: lists the commands."""

from collections.abc import Sequence

from mlp_fast import __version__
from mlp_fast.cli import Parser, run_main

COMMANDS = {
    "train": "trains the model, saves it, goes on with a saved run",
    "evaluate": "the losses of a saved model on a corpus",
    "sample": "text from a saved model",
    "compare": "backends side by side: times, and whether they agree",
    "profile": "where the time of a step goes",
    "visualize": "a saved model in pictures and a table",
    "corpus": "downloads the names corpus",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(argv)
    for name, what in COMMANDS.items():
        print(f"python -m mlp_fast.{name:10} {what}")
    print("Each lists its options by --help.")
    return 0


if __name__ == "__main__":
    run_main(main)

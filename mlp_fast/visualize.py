"""`python -m mlp_fast.visualize RUN`: a saved model in pictures and a table.

    embeddings      the token embeddings in two dimensions: their first two principal components
    probabilities   what the model expects after a context
    graph           the computation graph, as torch.fx traces it
    summary.txt     layers, output shapes and parameter counts

The pictures need matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path

from mlp_fast.cli import Parser, run_main, unescape
from mlp_fast.corpus.prompt import padded
from mlp_fast.errors import UserError, one_line
from mlp_fast.run import checkpoint
from mlp_fast.run.pictures import FORMATS, PICTURES, visualize
from mlp_fast.run.plot import require_matplotlib


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.visualize", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that --out wrote, or one of its checkpoint files")
    parser.add_argument(
        "--context",
        metavar="TEXT",
        help="what the next token is predicted from, \\n a newline; a short one is padded as a prompt of sample is "
        "(default: token 0, T times)",
    )
    parser.add_argument("--out", default="pictures", metavar="DIR", help="folder for the pictures, made if missing")
    parser.add_argument("--format", default="png", choices=FORMATS, help="of the pictures")
    arguments = parser.parse_args(argv)
    require_matplotlib("the pictures need")
    saved = checkpoint.load(arguments.run)
    context = _context(arguments.context, saved)
    folder = Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {folder}: cannot make this folder ({one_line(error)})") from None
    print(visualize(saved, context, folder, arguments.format))
    print(f"pictures: {', '.join(str(folder / f'{name}.{arguments.format}') for name in PICTURES)}")
    return 0


def _context(text: str | None, saved: checkpoint.Checkpoint) -> list[int]:
    """The last T tokens of a text as typed in a shell, padded as a prompt; without one, token 0 T times: for
    characters, the newline."""
    T = saved.config.context_length
    if text is None:
        return [0] * T
    return padded(saved.vocabulary.encode(unescape(text)), saved.vocabulary, T, saved.beginning)[-T:]


if __name__ == "__main__":
    run_main(main)

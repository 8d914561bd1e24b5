"""`python -m mlp_fast.corpus fetch`: downloads the names corpus, checked, into the user's cache."""

from collections.abc import Sequence
from pathlib import Path

from mlp_fast.cli import Parser, number, run_main
from mlp_fast.corpus import names
from mlp_fast.files import shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = Parser(prog="python -m mlp_fast.corpus", description="The names corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download names.txt, check it, keep it in the cache")
    fetch.add_argument("--url", default=names.URL, help="where from")
    fetch.add_argument("--timeout", type=number(float, 0.001, 3600), default=30.0, metavar="S", help="seconds to wait")
    fetch.add_argument("--to", type=Path, metavar="FILE", help="where to (names.txt in the user's cache)")
    options = parser.parse_args(arguments)
    path = options.to or names.cached()
    names.fetch(options.url, options.timeout, path)
    use = "--data names" if options.to is None else f"{names.VARIABLE}={shown(path)} and --data names"
    print(f"{shown(path)}: {names.BYTES:,} bytes, checked; use it by {use}")
    return 0


if __name__ == "__main__":
    run_main(main)

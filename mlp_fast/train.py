"""`python -m mlp_fast.train`: trains the model and prints what the reference prints."""

from collections.abc import Sequence

from mlp_fast import backends, distributed
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.errors import EXIT_NOT_SAVED, Interrupted, report
from mlp_fast.run.interrupt import Interrupt
from mlp_fast.run.resume import initialised_config, resumed_config
from mlp_fast.run.training import train


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.train", description=__doc__)
    parser.add_argument("--list-backends", action="store_true", help="show every backend, available or why not")
    add_config_arguments(parser)
    try:
        with Interrupt() as interrupt, distributed.joined() as world:
            with world.agreed():
                arguments = parser.parse_args(argv)
                if arguments.resume is not None:
                    config = resumed_config(arguments.given)
                elif arguments.init_from is not None:
                    config = initialised_config(arguments.given)
                else:
                    config = config_from(arguments)
            if arguments.list_backends:
                if world.rank == 0:
                    print(backends.listing(config))
                return 0
            unsaved = train(config, interrupt).unsaved
    except Interrupted as stop:
        if distributed.launched_rank() == 0:
            report(stop.report)
        return stop.exit_code
    if unsaved:
        report(
            f"finished, but could not save {unsaved[-1]}" + (f", nor {len(unsaved) - 1} more" if unsaved[1:] else "")
        )
        return EXIT_NOT_SAVED
    return 0


if __name__ == "__main__":
    run_main(main)

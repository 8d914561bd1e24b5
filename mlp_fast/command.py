"""The beginning and the end of a command's process."""

import gc
import signal
import sys
from collections.abc import Callable

from mlp_fast.errors import EXIT_NOT_SAVED, UserError, discard_stdout, report


def begin() -> None:
    """For a command's first line, before imports that take a second.

    Ctrl-C ends them without a traceback. No garbage is collected meanwhile: the million objects that they make stay,
    and looking through them again and again would take a fifth of that second.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its code, or that of a UserError or failed write, with one line on stderr."""
    gc.freeze()  # what was imported, also for the collections at exit
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal's encoding
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        report(str(error))
        code = error.exit_code
    except OSError as error:
        report(f"the output could not be written ({error.strerror or error})")
        discard_stdout()
        code = EXIT_NOT_SAVED
    sys.exit(code)

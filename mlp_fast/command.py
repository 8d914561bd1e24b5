"""The beginning and the end of a command's process."""

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable

from mlp_fast import threads
from mlp_fast.errors import EXIT_NOT_SAVED, UserError, discard_stdout, report

_exit_code: int | None = None  # of a command that has come to its end


def begin() -> None:
    """For a command's first line, before imports that take a second.

    Ctrl-C ends them without a traceback. No garbage is collected meanwhile: the million objects that they make stay,
    and looking through them again and again would take a fifth of that second.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    atexit.register(_end)  # the first of all, hence called after all others


def _end() -> None:
    """Ends a process whose work is done: taking Python and torch apart would take another tenth of a second."""
    if _exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_exit_code)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its code, or that of a UserError or failed write, with one line on stderr."""
    gc.freeze()  # what was imported, also for the collections at exit
    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal's encoding
    threads.use_available()
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
    global _exit_code
    _exit_code = code
    sys.exit(code)

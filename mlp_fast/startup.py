"""What happens in a command's process before its imports. This module imports Python's own modules alone."""

import contextlib
import gc
import importlib
import os
import signal
import sys

from mlp_fast.errors import EXIT_USER_ERROR, report

PROBE_SECONDS = 10  # of a processor: many times what the imports take
PROBE_NUMBERS = 2**24  # 64 MiB: less is of no use to any run


def begin() -> None:
    """Prepares the process for a command's imports, which take a second: Ctrl-C ends them without a traceback.

    No garbage is collected from here to run_main: the imports make a million objects, all of which stay, and to look
    through them takes a quarter of the processor time of a run of one step.
    """
    open_missing_streams()
    _probe_memory()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()


def open_missing_streams() -> None:
    """Opens stdout and stderr where they are missing (>&-, pythonw): the next file opened would take their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _probe_memory() -> None:
    """Where address space is limited, makes the imports in a child first; ends with one line if that fails.

    Where its libraries find no memory, torch aborts or never returns, without an exception that could be caught.
    """
    try:
        import resource
    except ImportError:  # no POSIX system
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    child = os.fork()
    if child == 0:
        with contextlib.suppress(ValueError):  # the limit is lower already
            resource.setrlimit(resource.RLIMIT_CPU, (PROBE_SECONDS, PROBE_SECONDS))
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
        try:
            importlib.import_module("mlp_fast.train")  # and with it all that any command imports
            # A fill of this size starts threads, which end the process where there is no room for them.
            importlib.import_module("torch").ones(PROBE_NUMBERS)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        report("not enough memory to start, under the limit of this process (ulimit -v); raise it")
        os._exit(EXIT_USER_ERROR)

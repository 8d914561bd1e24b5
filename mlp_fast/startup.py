"""What happens in a command's process before its imports. This module imports Python's own modules alone."""

import gc
import os
import signal
import sys

from mlp_fast.errors import EXIT_USER_ERROR, report

# Imports all that any command does, in 10 seconds of a processor, many times what that takes. A fill of 64 MiB, without
# which no run does, then starts torch's threads, which end the process where there is no room for them.
PROBE = """
import contextlib, resource
with contextlib.suppress(ValueError):  # the limit is lower already
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
import mlp_fast.train, torch
torch.ones(2**24)
"""


def begin() -> None:
    """Prepares the process for a command's imports, which take a second: Ctrl-C ends them without a traceback.

    No garbage is collected from here to run_main: the imports make a million objects, all of which stay, and to look
    through them takes a quarter of the processor time of a run of one step.
    """
    open_missing_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _probe_memory()
    gc.disable()


def open_missing_streams() -> None:
    """Opens stdout and stderr where they are missing (>&-, pythonw): the next file opened would take their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _probe_memory() -> None:
    """Where address space is limited, makes the imports in another process first; ends with one line if that fails.

    Where its libraries find no memory, torch aborts or never returns, without an exception that could be caught.
    """
    try:
        import resource
    except ImportError:  # no POSIX system
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    import subprocess

    if subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=False).returncode:
        report("not enough memory to start, under the limit of this process (ulimit -v); raise it")
        os._exit(EXIT_USER_ERROR)

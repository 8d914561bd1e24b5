"""The beginning and the end of a command's process."""

import atexit
import contextlib
import gc
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable

from mlp_fast import threads
from mlp_fast.errors import EXIT_NOT_SAVED, EXIT_USER_ERROR, UserError, discard_stdout, out_of_memory, report

PROBE_SECONDS = 10  # of a processor: many times what the imports take
PROBE_NUMBERS = 2**24  # 64 MiB: less is of no use to any run

_exit_code: int | None = None  # of a command that has come to its end


def begin() -> None:
    """For a command's first line, before imports that take a second.

    Ctrl-C ends them without a traceback. No garbage is collected meanwhile: the million objects that they make stay,
    and looking through them again and again would take a fifth of that second.
    """
    _open_missing_streams()
    _probe_memory()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    atexit.register(_end)  # the first of all, hence called after all others


def _open_missing_streams() -> None:
    """Opens stdout and stderr where there are none (>&-, pythonw): the next file opened would take their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _probe_memory() -> None:
    """Where address space is limited, lets a child make the command's imports first; ends with one line if it fails.

    In a process whose libraries find no memory torch aborts, or never returns: no exception of Python's tells of it.
    """
    try:
        import resource
    except ImportError:  # no POSIX system
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    spec = sys.modules["__main__"].__spec__
    child = os.fork()
    if child == 0:
        with contextlib.suppress(ValueError):  # less is allowed already
            resource.setrlimit(resource.RLIMIT_CPU, (PROBE_SECONDS, PROBE_SECONDS))
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
        try:
            importlib.import_module(spec.name if spec else "torch")
            # The threads that a fill of this size starts end the process themselves where they find no room.
            importlib.import_module("torch").ones(PROBE_NUMBERS)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        report("not enough memory to start, under the limit of this process (ulimit -v); raise it")
        os._exit(EXIT_USER_ERROR)


def _end() -> None:
    """Ends a process whose work is done: taking Python and torch apart would take another tenth of a second."""
    if _exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_exit_code)


def _reason(error: Exception) -> str:
    """The sentence of an error that tells of memory, without the place in torch's source."""
    text = " ".join(str(error).split())
    told = re.search(r"DefaultCPUAllocator: (.*?)(?: Error code|$)", text)
    return told[1] if told else text.partition(". ")[0] or type(error).__name__


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its code, or that of a UserError or failed write, with one line on stderr."""
    gc.freeze()  # what was imported, also for the collections at exit
    gc.enable()
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal's encoding
    threads.use_available()
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        report(str(error))
        code = error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            report(f"not enough memory ({_reason(error)}); choose smaller sizes, or raise the limit (ulimit -v)")
            code = EXIT_USER_ERROR
        elif isinstance(error, OSError):
            report(f"the output could not be written ({error.strerror or error})")
            discard_stdout()
            code = EXIT_NOT_SAVED
        else:
            raise
    global _exit_code
    _exit_code = code
    sys.exit(code)

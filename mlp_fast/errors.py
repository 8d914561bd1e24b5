"""Errors meant for people, and the exit codes of the commands."""

import errno
import os
import re
import signal
import sys

EXIT_USER_ERROR = 2  # what was asked for cannot be done
EXIT_NOT_SAVED = 3  # the work was done, but not all of its output could be written
EXIT_NON_FINITE = 4  # training stopped at a loss that is not a finite number
EXIT_SIGNAL = 128  # plus the signal's number: 130 for SIGINT, 143 for SIGTERM

# Messages of torch, Python and the C++ library where memory, or room for a thread's stack, is refused.
_NO_MEMORY = re.compile("not enough memory|allocate memory|out of memory|bad_alloc|start new thread", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for the tab and the newline


class UserError(Exception):
    """What the user asked for cannot be done; the message is one line: what was wrong, what to do."""

    exit_code = EXIT_USER_ERROR


class Interrupted(BaseException):
    """The run was asked to end. No Exception, so that no library's handler of errors swallows it.

    Attributes:
        exit_code: 128 + the signal's number.
        report: in one line, what was done and how to go on, as far as it is known where this is caught.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = EXIT_SIGNAL + signum
        self.report = f"stopped by {signal.Signals(signum).name}"


def one_line(error: object) -> str:
    """The message of an error in one line; of a system error without the file's name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory was refused; torch's own are RuntimeErrors with such a message."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def report(text: str) -> None:
    """One line on stderr; characters that would break the line or the terminal are escaped."""
    if sys.stderr is None:
        return
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    print(f"mlp_fast: {line}", file=sys.stderr)


def for_terminal(text: str) -> str:
    """A text for stdout: where that is a terminal, its control characters but tab and newline are escaped.

    They could clear the screen or change its colours. A file or a pipe gets the text itself.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def discard_stdout() -> None:
    """Discards what stdout still holds, and all that follows: it has failed, and would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

"""Errors meant for people, and the exit codes of the commands."""

import os
import sys

EXIT_USER_ERROR = 2  # what was asked for cannot be done
EXIT_NOT_SAVED = 3  # the work was done, but not all of its output could be written
EXIT_NON_FINITE = 4  # training stopped at a loss that is not a finite number
EXIT_SIGNAL = 128  # plus the signal's number: 130 for SIGINT, 143 for SIGTERM


class UserError(Exception):
    """What the user asked for cannot be done; the message is one line: what was wrong, what to do."""

    exit_code = EXIT_USER_ERROR


def report(text: str) -> None:
    """One line on stderr; characters that would break the line or the terminal are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    print(f"mlp_fast: {line}", file=sys.stderr)


def discard_stdout() -> None:
    """Sends what stdout still holds, and all that follows, nowhere: it has failed, and would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

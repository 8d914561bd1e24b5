"""SIGINT and SIGTERM: the first asks a run to end tidily, the second ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mlp_fast.errors import EXIT_SIGNAL, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nmlp_fast: stopping; once more stops at once\n"


class Interrupt:
    """Listens for SIGINT and SIGTERM inside its `with` block; without one it never interrupts.

    A signal raises Interrupted at once, except inside `deferred()`, where it only sets `signum` (0 before), which the
    run reads between two pieces of work; inside of that, `at_once()` lets it raise where that does no harm. A second
    signal ends the process on the spot; files are safe, since they are written under another name and renamed. Ignored
    signals (nohup) stay ignored. Outside of the main thread Python delivers no signals, and none are listened for.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._deferred = self._at_once = False
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds a signal back until the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signum:
            raise Interrupted(self.signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside of deferred(): a signal that came before or comes in the block raises Interrupted."""
        self._at_once = True
        try:
            if self.signum:
                raise Interrupted(self.signum)
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(EXIT_SIGNAL + signum)
        self.signum = signum
        if self._deferred:  # something remains to be done, if only to save
            with contextlib.suppress(OSError):
                os.write(2, NOTICE)  # print() could be what was interrupted, and is not reentrant
        if self._at_once or not self._deferred:
            raise Interrupted(signum)

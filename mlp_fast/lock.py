"""One run at a time in a folder: an advisory lock that ends with the process that holds it, however it ends."""

import fcntl
import os
from pathlib import Path

from mlp_fast.errors import UserError

LOCK = ".lock"


class FolderLock:
    """Holds the lock of a folder until close() or the end of the process.

    The file stays when the lock is given back: removing it would let two processes lock two files of the same name.

    Args:
        folder: exists, and can be written.

    Raises:
        UserError: where another run holds the lock; it names that process.
        OSError: where the lock file cannot be made or locked.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._handle, 20, 0).decode("ascii", "replace") or "number unknown"
            self.close()
            raise UserError(
                f"{folder} is in use by another run (process {holder}); wait for its end, or choose another folder"
            ) from None
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._handle)

"""One run at a time in a folder: an advisory lock that ends with the process that holds it, however it ends."""

import contextlib
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
        self._path = folder / LOCK
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
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

    @property
    def held(self) -> bool:
        """Whether the folder has the locked file still: both may have been removed, and made anew by another run."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), os.stat(self._path))
        return False

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._handle)

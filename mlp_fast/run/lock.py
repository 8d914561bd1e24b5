"""One run at a time in a folder: a lock of the operating system's that ends with its process, however it ends."""

import contextlib
import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout

from mlp_fast.errors import UserError

LOCK, HOLDER = ".lock", ".holder"


class FolderLock:
    """Holds the lock of a folder until close() or the end of the process.

    The files stay when the lock is given back: removing them would let two processes lock two files of the same name.

    Args:
        folder: exists, and can be written.

    Raises:
        UserError: where another run holds the lock; it names that process.
        OSError: where the lock file cannot be made or locked.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._lock = FileLock(self._path, timeout=0, thread_local=False)
        holder = folder / HOLDER  # beside the lock: what is locked cannot be read on every system
        try:
            self._lock.acquire()
        except Timeout:
            process = holder.read_text("ascii", "replace") if holder.exists() else "number unknown"
            raise UserError(
                f"{folder} is in use by another run (process {process}); wait for its end, or choose another folder"
            ) from None
        except NotImplementedError as error:  # a file system without locks
            raise OSError(errno.ENOSYS, str(error)) from None
        try:
            self._status = self._path.stat()
            holder.write_text(str(os.getpid()), "ascii")
        except OSError:
            self.close()
            raise

    @property
    def held(self) -> bool:
        """Whether the folder has the locked file still: both may have been removed, and made anew by another run."""
        with contextlib.suppress(OSError):
            return os.path.samestat(self._status, os.stat(self._path))
        return False

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.release()

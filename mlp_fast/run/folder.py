"""The folder of a run (--out): its checkpoints, which of them are kept, and the index `run.json`.

The index names the kept checkpoints with their losses, and which one is the best. All of that but the test loss is read
from the checkpoints again: a folder whose index is lost or behind is still a whole run.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlp_fast.errors import UserError, one_line
from mlp_fast.files import UNFINISHED, sync_folder, write_atomically
from mlp_fast.run import checkpoint
from mlp_fast.run.checkpoint import Checkpoint

INDEX = "run.json"
INDEX_VERSION = 1
LOCK, HOLDER = ".lock", ".holder"  # the file that a run locks, and the one with the number of its process


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """A folder that this process alone saves into, from the constructor to close().

    One run at a time: the operating system's lock ends with its process, however that ends.

    Args:
        path: made if it is missing.
        keep: how many of the newest checkpoints are kept, beside the best.

    Raises:
        UserError: the folder cannot be written, or another run has it.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.entries: dict[str, dict[str, Any]] = {}  # file name -> step and losses, the newest last
        self._lock = FileLock(path / LOCK, timeout=0, thread_local=False)
        holder = path / HOLDER  # not the lock itself: not every system lets a locked file be read
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._locked = os.stat(path / LOCK)
            with tempfile.TemporaryFile(dir=path, buffering=0) as probe:  # a new file: the holder may be there already
                probe.write(b"\0")
            holder.write_text(str(os.getpid()), "ascii")
            sync_folder(path)
            with contextlib.suppress(PermissionError):  # may be passed through, but not opened
                sync_folder(path.absolute().parent)  # the folder itself may be new
        except Timeout:
            process = "number unknown"
            with contextlib.suppress(OSError):
                process = holder.read_text("ascii", "replace")
            raise UserError(
                f"{path} is in use by another run (process {process}); wait for its end, or choose another folder"
            ) from None
        except (OSError, ValueError, NotImplementedError) as error:  # the last where the file system has no locks
            self.close()
            reason = "not a possible file name" if isinstance(error, ValueError) else one_line(error)
            raise UserError(f"--out {path}: cannot write there ({reason}); choose another folder") from None

    def begin(self, start: Path | None) -> list[Path]:
        """Indexes the checkpoints that are there, and removes what an earlier process left half written.

        Args:
            start: the file that the run goes on from, here or in another folder; None for a run that starts anew.

        Returns:
            Damaged files, now set aside under another name, each its own.

        Raises:
            UserError: the folder holds another run, or newer checkpoints than `start`.
        """
        files, index, damaged = checkpoint.files_in(self.path), self._read_index(), []
        if files and (start is None or not os.path.samefile(self.path, start.parent)):
            raise UserError(
                f"--out {self.path} holds a run already ({files[-1].name}); "
                f"go on with it by --resume {self.path}, or choose another folder"
            )
        for file in files:
            try:
                found = checkpoint.read(file)
            except checkpoint.Damaged:
                damaged.append(file)
                continue
            self.entries[file.name] = index.get(file.name, {}) | {"step": found.state.step, **found.losses}
        if start is not None and self.newest is not None and self.newest.name != start.name:
            raise UserError(
                f"{self.path} holds newer checkpoints than {start.name}, up to {self.newest.name}; "
                f"go on from there by --resume {self.path}, or give --out another folder"
            )
        self._remove_unfinished()
        return [_set_aside(file) for file in damaged]

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is still there."""
        with contextlib.suppress(FileNotFoundError):
            self._check_held()
            files = (self.path / name for name in reversed(self.entries))
            return next((file for file in files if os.path.exists(file)), None)
        return None

    def known(self, step: int) -> dict[str, Any] | None:
        """The index entry of a step's checkpoint, where that is the newest."""
        newest = self.newest
        return self.entries[newest.name] if newest and newest.name == checkpoint.file_name(step) else None

    @property
    def best(self) -> str | None:
        """The name of the file with the smallest val_loss, the earliest of equals.

        A file that was saved between two evaluations carries the loss of an earlier step and is left out.
        """
        judged = {
            name: entry["val_loss"]
            for name, entry in self.entries.items()
            if entry.get("evaluated_at") == entry["step"] and math.isfinite(entry.get("val_loss", math.nan))
        }
        return min(judged, key=lambda name: judged[name]) if judged else None

    def save(self, saved: Checkpoint) -> Path:
        """Writes a checkpoint, then the index, then removes what is no longer kept, each on the disk before the next.

        OSError where that fails; what was there before then stays.
        """
        self._check_held()
        path = self.path / checkpoint.file_name(saved.state.step)
        checkpoint.save(path, saved)
        self.entries.pop(path.name, None)
        self.entries[path.name] = {"step": saved.state.step, **saved.losses}
        kept = {*list(self.entries)[-self.keep :], self.best}
        self._write_index({name: entry for name, entry in self.entries.items() if name in kept})
        for name in [name for name in self.entries if name not in kept]:
            (self.path / name).unlink(missing_ok=True)
            del self.entries[name]  # not before: where the index or this fails, the next save tries again
        return path

    def note(self, step: int, **facts: float) -> None:
        """Adds facts of a step's checkpoint to the index. OSError where that fails."""
        entry = self.entries.get(checkpoint.file_name(step))
        if entry is not None:
            self._check_held()
            entry |= facts
            self._write_index(self.entries)

    def close(self) -> None:
        """Lets other runs have the folder.

        The lock's file stays: removing it would let two processes lock two files of the same name.
        """
        self._lock.release()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _remove_unfinished(self) -> None:
        """Removes exactly what write_atomically may have left here, and nothing of another program."""
        for entry in os.scandir(self.path):
            name = UNFINISHED.fullmatch(entry.name)
            ours = name and (name[1] == INDEX or checkpoint.FILE_NAME.fullmatch(name[1]))
            if ours and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):  # in the way of nothing
                    os.unlink(entry)

    def _check_held(self) -> None:
        """FileNotFoundError where the folder lacks the locked file: another run may have made both anew by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._locked, os.stat(self.path / LOCK)):
                return
        raise FileNotFoundError(errno.ENOENT, "the folder was removed")

    def _write_index(self, entries: dict[str, dict[str, Any]]) -> None:
        index = {"index_version": INDEX_VERSION, "best": self.best, "checkpoints": entries}
        write_atomically(self.path / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _read_index(self) -> dict[str, dict[str, Any]]:
        """The entries of the index; none where it is missing or damaged."""
        with contextlib.suppress(Exception):  # whatever may be wrong with it
            entries = json.loads((self.path / INDEX).read_bytes())["checkpoints"]
            return {name: {str(key): float(value) for key, value in entry.items()} for name, entry in entries.items()}
        return {}


def _set_aside(file: Path) -> Path:
    """Renames a damaged file to a name that no other has, and returns it."""
    names = (file.with_name(f"{file.name}.damaged-{number}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not os.path.lexists(name)))

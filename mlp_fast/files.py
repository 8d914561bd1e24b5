"""Files: their names in messages, what stands at a path, and writing that is whole or not at all."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlp_fast.errors import UserError, one_line

UNFINISHED = re.compile(r"\.(.+)\.\d+\.tmp")  # the temporary name that write_atomically gives a file; group 1: its own


def shown(path: Path | str) -> str:
    """A name for a message of one line: as it is, or quoted and escaped."""
    return str(path) if str(path).isprintable() and str(path) else ascii(str(path))


def file_mode(path: Path) -> int:
    """st_mode of what stands at a path, as the module stat reads it; UserError where nothing does."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file or folder") from None
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {one_line(error)}") from None
    except ValueError:  # a NUL character, or one the file system's encoding cannot carry
        raise UserError(f"{shown(path)}: not a possible file name") from None


def no_place_for_code(folder: Path) -> str | None:
    """Why compiled code cannot be kept in a folder and run from there, or None; it may be yet to be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{shown(folder)} cannot be written"
    try:
        flags = os.statvfs(folder).f_flag
    except (AttributeError, OSError):  # a system that does not report it
        return None
    return f"{shown(folder)} is mounted noexec" if flags & getattr(os, "ST_NOEXEC", 0) else None


def check_writable(path: Path, option: str) -> None:
    """UserError, naming the option, where a file cannot be written; none is left behind that was not there."""
    with writing(option, shown(path)):
        existed = path.exists()
        os.close(open_to_append(path))
        if not existed:
            path.unlink()


def write_json(path: str, record: dict[str, Any]) -> None:
    """Writes the file of --json; UserError where that fails."""
    with writing("--json", path):
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@contextmanager
def writing(option: str, path: str) -> Iterator[None]:
    """Around the writing of a file that an option names: UserError where it fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: cannot write it ({one_line(error)})") from None


def open_to_append(path: Path) -> int:
    """A handle that writes at the end of a file, made if it is missing; OSError for a FIFO without a reader."""
    no_wait = getattr(os, "O_NONBLOCK", 0)  # else opening a FIFO waits for a reader; Windows has neither
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_wait, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from it") from None
        raise
    if no_wait:
        os.set_blocking(handle, True)  # writing waits for a slow reader
    return handle


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a temporary file beside it, flushed to the disk, then renamed; OSError if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the rename itself must reach the disk


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk; does nothing on Windows, which opens no folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

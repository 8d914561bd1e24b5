"""Tapes of large corpora: made once, kept as files in the user's cache, and mapped into memory.

A mapped tape takes no memory of its own: the system reads the pages that batches touch and drops them when it needs
the room. An entry is a folder of the three tapes and a description. It is made under a lock: where several processes
need it, as under torchrun, one makes it and the others wait. It appears whole or not at all, and can be deleted at any
time.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from mlp_fast.errors import UserError, one_line

DESCRIPTION = "corpus.json"


def cache_folder() -> Path:
    """mlp_fast under $XDG_CACHE_HOME, or under ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "mlp_fast"


def entry(key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder and the description of an entry of the cache.

    Args:
        key: its name; equal keys mean equal contents.
        build: makes the entry's files in an empty folder and returns the description. Called where the entry is
            missing or its files have other sizes.

    Raises:
        UserError: where the cache cannot be written; and whatever `build` raises.
    """
    tapes = cache_folder() / "tapes"
    folder = tapes / key
    try:
        tapes.mkdir(parents=True, exist_ok=True)
        with FileLock(tapes / f"{key}.lock", poll_interval=0.1):  # ends with the process, however it ends
            description = _described(folder) or _built(folder, build)
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise UserError(
            f"the token cache {folder} cannot be written ({one_line(error)}); make room, or set XDG_CACHE_HOME"
        ) from None
    return folder, description


def write_tape(path: Path, pieces: Iterable[bytes | memoryview], dtype: npt.DTypeLike) -> torch.Tensor:
    """Writes the tokens of a new file, piece by piece, and maps it."""
    with path.open("xb") as file:
        file.writelines(pieces)
    return map_tape(path, dtype)


def map_tape(path: Path, dtype: npt.DTypeLike) -> torch.Tensor:
    """The tokens of a file, 1-D, to be read only: writing to them ends the process.

    Pages are read when touched. A mapping that could be written, even one whose changes stay private, would count as
    memory that the system must have: it refuses one that is larger.

    Raises:
        UserError: where the file cannot be mapped.
    """
    try:
        if not path.stat().st_size:
            return torch.from_numpy(np.empty(0, dtype))  # an empty file cannot be mapped
        tokens = np.memmap(path, dtype, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokens {path} cannot be mapped into memory ({one_line(error)}); "
            "delete that folder to have them made again, or set XDG_CACHE_HOME to a folder on another disk"
        ) from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(tokens)


def _described(folder: Path) -> dict[str, Any] | None:
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in description["bytes"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    return description if whole else None


def _built(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for left_over in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # no other user may read it
    try:
        description = build(temporary)
        description["bytes"] = {file.name: file.stat().st_size for file in temporary.iterdir()}
        (temporary / DESCRIPTION).write_text(json.dumps(description))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description

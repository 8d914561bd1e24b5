"""How many threads compute on the CPU: as many as this process may use, or --threads; in a forked child one."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mlp_fast.errors import UserError

_forked = False  # whether this process is a forked child


def after_fork() -> None:
    """Makes torch compute and compile on one thread: it would wait for ever for threads that a forked child lacks."""
    global _forked
    _forked = True
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "torch._inductor.config" in sys.modules:
        sys.modules["torch._inductor.config"].compile_threads = 1  # type: ignore[attr-defined]


def use(count: int | None) -> None:
    """Lets torch, and `native` with it, compute on `count` threads; None changes nothing.

    Raises:
        UserError: more than one in a forked child.
    """
    if count is None:
        return
    if _forked and count > 1:
        raise UserError(
            f"--threads {count}: this process was forked, where torch can use one thread only; leave it out"
        )
    import torch

    torch.set_num_threads(count)


def use_available() -> None:
    """Limits torch's threads to the processors that this process may use, unless OMP_NUM_THREADS is set.

    Does nothing in a command that has not imported torch.
    """
    torch = sys.modules.get("torch")
    if torch is not None and not os.environ.get("OMP_NUM_THREADS"):
        use(min(torch.get_num_threads(), available()))


def available(root: Path = Path("/")) -> int:
    """Processors that this process may use: of its affinity, and of the quotas of its control groups, rounded.

    Args:
        root: of the file system with proc/self/{cgroup,mountinfo}, for tests.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([count, *(quota + 0.5 for quota in _quotas(root))])))


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group above this process grants (versions 1 and 2)."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        if kind.startswith("cgroup2 "):
            controller, names = "", ["cpu.max"]
        elif re.match(r"cgroup \S+ (\S*,)?cpu(,|$)", kind):
            controller, names = "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        top, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field) for field in fields.split()[3:5])
        for group in (PurePosixPath(path) for _, controllers, path in groups if controller in controllers.split(",")):
            folder = root / point.lstrip("/")
            # Of a group outside of what is mounted only the top can be seen.
            for part in ("", *(group.relative_to(top).parts if group.is_relative_to(top) else ())):
                folder /= part
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
                    quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                    if quota > 0:
                        yield quota / period

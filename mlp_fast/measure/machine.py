"""What a figure was measured on: device, driver, versions, commit, date. And how much memory a piece of work takes."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy")
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]


def device_name(device: torch.device) -> str:
    """The hardware in words: the GPU's name, or the processor's with its vectors and the threads that torch uses.

    The vectors, because a virtual machine's processor may have the name of a whole family.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} {vectors}, {threads} {'thread' if threads == 1 else 'threads'}"


def folder_name(name: str) -> str:
    """A device's name as a folder: lower case, letters and digits joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def facts(device: torch.device) -> dict[str, Any]:
    """All that must stand beside a figure; what cannot be found out is None."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _output(DRIVER) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" where files that git follows were changed.

    Outside a checkout it is what MLP_FAST_COMMIT says, or None.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("MLP_FAST_COMMIT")
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "")


class PeakMemory:
    """How far memory rose inside a `with` block, in bytes, above what was held at its start.

    On CUDA it is what torch's allocator handed out. On the CPU it is the process's resident memory at its highest:
    memory that the process held already and uses again is not counted twice. Linux lets the high-water mark be reset;
    elsewhere a block that stays below an earlier peak reads 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _reset_resident_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, resident_peak() - self._before)


def _reset_resident_peak() -> int:
    """Makes the resident peak equal to what is resident now, where the system allows it; returns the peak then."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what was freed, so that its next use counts
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def resident_peak() -> int:
    """The most memory that this process has had resident, in bytes, or 0 where the system does not say.

    What it was forked from does not count on Linux.
    """
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # no POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> int | None:
    """Bytes of memory that this process may have: this machine's, or less under a limit; None where nothing says."""
    sizes = [address_space_limit()]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((size for size in sizes if size is not None), default=None)


def address_space_limit() -> int | None:
    """Bytes of address space that this process may have (ulimit -v), or None without a limit."""
    try:
        import resource
    except ImportError:  # no POSIX system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _output(command: list[str]) -> str | None:
    """What a command prints, or None where it does not run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()

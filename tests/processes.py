"""Programs in processes of their own that start in milliseconds, to be killed, interrupted and watched.

They are forked from a server that has imported the package and computed nothing: a fork of a process with running
threads could hang, and importing torch anew for each of hundreds of runs would take seconds.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from mlp_fast import train
from mlp_fast.cli import run_main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mlp_fast.train", "mlp_fast.backends.eager", "torch._dynamo", "processes"])

# A run of 50 steps with checkpoints and evaluations at odd places, and a corpus to go with it.
SPLITS = {"train": "anna\nbob\nnora\n" * 20, "val": "anna\nbo\n" * 10, "test": "bob\nno\n" * 10}
SIZES = ("--backend=eager", "--context-length=2", "--embedding-size=3", "--hidden-size=5", "--batch-size=8")


def make_corpus(folder: Path) -> str:
    """A small corpus, as --data takes it."""
    folder.mkdir(exist_ok=True)
    for split, text in SPLITS.items():
        (folder / f"{split}.txt").write_text(text)
    return str(folder)


def start(argv: Sequence[str], output: Path, before: Callable[[], Any] | None = None) -> BaseProcess:
    """Starts `python -m mlp_fast.train argv` as if; stdout and stderr are appended to a file.

    Args:
        before: called in the process first; a function of a module, since it is sent there by name.
    """
    process = _context.Process(target=_run, args=(list(argv), output, before))
    process.start()
    return process


def finish(argv: Sequence[str], output: Path, before: Callable[[], Any] | None = None) -> tuple[int | None, str]:
    """Runs to the end: exit code and what was printed."""
    output.write_text("")
    process = start(argv, output, before)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, output.read_text()


def wait_for(text: str, output: Path, seconds: float = 60) -> None:
    """Waits until a run has printed a text."""
    end = time.monotonic() + seconds
    while not (output.exists() and text in output.read_text()):
        assert time.monotonic() < end, f"{text!r} does not come; printed was {output.read_text()!r}"
        time.sleep(0.002)


class Python:
    """`python *arguments`, of -m MODULE, -c CODE or a file; used as a subprocess.Popen whose output is piped as text.

    For what does not concern the start of the interpreter or its end, where no exit handlers run.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._outputs = [self._folder / name for name in ("stdout", "stderr")]
        self._process = _context.Process(target=_python, args=(arguments, self._outputs, dict(environment or {})))
        self._process.start()
        self.send_signal = lambda number: os.kill(self._process.pid or 0, number)
        self.kill = self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        stdout, stderr = (output.read_text() for output in self._outputs)
        shutil.rmtree(self._folder)
        return stdout, stderr


def _python(arguments: Sequence[str], outputs: Sequence[Path], environment: Mapping[str, str]) -> None:
    _become(*outputs)
    os.environ.update(environment)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package")  # of modules run by runpy
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


def _run(argv: list[str], output: Path, before: Callable[[], Any] | None) -> None:
    _become(output, output, before)
    run_main(lambda: train.main(argv))


def _become(stdout: str | Path, stderr: str | Path, before: Callable[[], Any] | None = None) -> None:
    """Makes a fork of the server like a process of its own, which appends what it prints to two files."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for number, path in enumerate((stdout, stderr), start=1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    if before is not None:
        before()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)

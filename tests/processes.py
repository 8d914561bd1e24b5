"""Training runs in processes of their own that start in milliseconds, to be killed, interrupted and watched.

They are forked from a server that has imported the package and computed nothing: a fork of a process with running
threads could hang, and importing torch anew for each of hundreds of runs would take seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
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


def _run(argv: list[str], output: Path, before: Callable[[], Any] | None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if before is not None:
        before()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    run_main(lambda: train.main(argv))

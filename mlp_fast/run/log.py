"""Where a run reports: lines on stdout, a progress bar on stderr, JSON Lines in a file."""

import contextlib
import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from tqdm import tqdm

from mlp_fast.config import Config
from mlp_fast.errors import discard_stdout, for_terminal, one_line, report
from mlp_fast.files import open_to_append, writing


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, before the update of `step`.

    Losses are mean cross-entropies in nats; lr is the step's learning rate; ms_per_step covers the steps since the
    last evaluation, without evaluations and compilation, and is None before the first step.
    """

    step: int
    train_loss: float
    val_loss: float
    lr: float
    ms_per_step: float | None

    def line(self) -> str:
        """The reference program's line; 0.0000ms stands before the first step."""
        return (
            f"step {self.step:6d} | train_loss {self.train_loss:.6f} | val_loss {self.val_loss:.6f} | "
            f"lr {self.lr:e} | time/step {self.ms_per_step or 0.0:.4f}ms"
        )


class RunLog:
    """Writes what happens in a run to where config asks for it; a write that fails is reported and the run goes on.

    Args:
        config: quiet and log_json decide what is written. A resumed run's JSON log is appended to.
        first_step: where the progress bar starts.

    Attributes:
        evaluations: those reported so far.
        unsaved: what could not be written, in words.
    """

    def __init__(self, config: Config, first_step: int = 0) -> None:
        self.evaluations: list[Evaluation] = []
        self.unsaved: list[str] = []
        self._config = config
        self._json: IO[str] | None = None
        if config.log_json is not None:
            with writing("--log-json", config.log_json):
                self._json = _opened(Path(config.log_json), append=config.resume is not None)
        self._bar = tqdm(
            total=config.last_step,
            initial=first_step,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=True if config.quiet or sys.stderr is None else None,  # None: shown on a terminal only
        )

    def message(self, text: str) -> None:
        """A line for people, on stdout."""
        if self._config.quiet or sys.stdout is None:
            return
        try:
            tqdm.write(for_terminal(text), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:  # a full disk, or a reader that has gone
            discard_stdout()
            self.unsaved_because(f"what follows on stdout ({one_line(error)})")

    def warning(self, text: str) -> None:
        """A line for people, on stderr."""
        with tqdm.external_write_mode(file=sys.stderr):
            report(text)

    def unsaved_because(self, what: str) -> None:
        """Reports what could not be written, and why, at once; `unsaved` keeps it for the end."""
        self.unsaved.append(what)
        self.warning(f"could not save {what}; going on")

    @contextlib.contextmanager
    def noting_failure(self, what: str) -> Iterator[None]:
        """Turns a failed write inside the block into a report."""
        try:
            yield
        except OSError as error:
            self.unsaved_because(f"{what} ({one_line(error)})")

    def evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation's line and event."""
        self.evaluations.append(evaluation)
        self.message(evaluation.line())
        self.event("eval", **dataclasses.asdict(evaluation))

    def progress(self, step: int, loss: Tensor, ms_per_step: float) -> None:
        """Moves the progress bar to `step`, where it is shown: reading the loss waits for the device."""
        if not self._bar.disable:
            self._bar.n = step
            self._bar.set_postfix_str(f"loss {loss.item():.4f}, {ms_per_step:.3f} ms/step", refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        """Ends the progress bar and the file."""
        self._bar.close()
        if self._json is not None:
            with contextlib.suppress(OSError):  # what it holds could not be written, as was reported
                self._json.close()

    def event(self, event: str, **values: Any) -> None:
        """A line of the JSON log; non-finite numbers become null, as JSON has none."""
        if self._json is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            try:
                self._json.write(json.dumps({"event": event, **finite}, ensure_ascii=False) + "\n")
                self._json.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._json.close()
                self._json = None
                self.unsaved_because(f"the rest of --log-json {self._config.log_json} ({one_line(error)})")


def _opened(path: Path, *, append: bool) -> IO[str]:
    """The file of the JSON log; a regular one is emptied, or rid of the half line that a killed run left at its end."""
    # A file name may hold bytes that are not UTF-8; Python's escape of them is JSON's own.
    log = open(open_to_append(path), "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    try:
        if stat.S_ISREG(os.fstat(log.fileno()).st_mode):
            os.ftruncate(log.fileno(), path.read_bytes().rfind(b"\n") + 1 if append else 0)
    except OSError:
        log.close()
        raise
    return log

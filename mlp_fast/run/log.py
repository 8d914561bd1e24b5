"""What a run tells: the reference's lines on stdout, a progress bar on stderr, JSON Lines in a file."""

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
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlp_fast.config import Config
from mlp_fast.corpus.tokenizer import Words
from mlp_fast.errors import discard_stdout, for_terminal, one_line, report
from mlp_fast.files import open_to_append, writing
from mlp_fast.run.resume import resume_command

if TYPE_CHECKING:
    from mlp_fast.run.trainer import Result, Trainer


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
    """Sends what happens in a run to wherever config asks for; a write that fails is reported and the run goes on.

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
        self._quiet = config.quiet
        self._json: IO[str] | None = None
        self._json_name = f"--log-json {config.log_json}"
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

    def begin(self, run: "Trainer") -> None:
        """The settings as an event; the title, and what the user should know before the first step."""
        config, vocabulary = run.config, run.corpus.vocabulary
        self.event(
            "config",
            **dataclasses.asdict(config),
            chosen_backend=run.backend.name,
            chosen_device=run.backend.device.type,
            parameters=run.shape.num_parameters,
            floor=run.entropy["val"],
        )
        if config.interpret:
            products = "" if config.precision == "fp32" else f"; its products are fp32, not {config.precision}"
            self.warning(
                f"--interpret: Triton's interpreter runs the kernels on the CPU, to check them, not for speed{products}"
            )
        self.message(title(run, run.choice.note))
        if isinstance(vocabulary, Words) and vocabulary.unspaced:
            self.warning(
                "--tokens word takes a run of letters as one word, and most of this text has no spaces between words; "
                "--tokens char suits it better"
            )
        if config.resume is not None:
            self.message(f"going on after {run.first_step} of {config.last_step} steps, from {config.resume}")
            self.event("resume", step=run.first_step)
        elif config.init_from is not None:
            self.message(f"starting from the model in {config.init_from}")

    def message(self, text: str) -> None:
        """A line for people, on stdout."""
        if self._quiet or sys.stdout is None:
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
        """Moves the progress bar to `step`, if anyone sees it: reading the loss waits for the device."""
        if not self._bar.disable:
            self._bar.n = step
            self._bar.set_postfix_str(f"loss {loss.item():.4f}, {ms_per_step:.3f} ms/step", refresh=False)
            self._bar.refresh()

    def sample(self, prompt: str, text: str) -> None:
        """The sampled text; the event carries it without the prompt."""
        self.message(prompt + text)
        self.event("sample", text=text)

    def test(self, loss: float) -> None:
        """The test loss."""
        self.message(f"test_loss {loss:.6f}")
        self.event("test", loss=loss)

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
                self.unsaved_because(f"the rest of {self._json_name} ({one_line(error)})")


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


def title(run: "Trainer", note: str = "") -> str:
    """A run in one line; `note` says why other backends were passed over."""
    cuda = run.backend.device.type == "cuda"
    device = torch.cuda.get_device_name(run.backend.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    processes = f", in {run.world.size} processes" if run.world.size > 1 else ""
    entropy = run.entropy["val"]
    return (
        f"backend {run.backend.name}{note} on {device}{processes} | "
        f"{run.corpus.name} corpus, {len(run.corpus.train)} training tokens | {run.shape.num_parameters} parameters"
    ) + ("" if entropy is None else f" | floor of val_loss {entropy:.6f}")


def summary(run: "Trainer", result: "Result") -> str:
    """A finished run in two lines: time, then losses."""
    steps, training = run.step - run.first_step, result.training_seconds
    seconds = training + result.evaluation_seconds + result.prepare_seconds
    time_line = (
        f"{steps} steps in {seconds:.2f} s: training {training:.2f} s "
        f"({1e3 * training / max(steps, 1):.4f} ms/step), "
        f"evaluation {result.evaluation_seconds:.2f} s, set-up and compilation {result.prepare_seconds:.2f} s"
    )
    losses = f"test_loss {result.test_loss:.6f}"
    if "val_loss" in run.losses:
        losses = f"val_loss {run.losses['val_loss']:.6f} | {losses}"
    if run.corpus.cost is not None:
        losses += f" | floor val {run.entropy['val']:.6f}, test {run.entropy['test']:.6f}"
    return f"{time_line}\n{losses}"


def stopped(run: "Trainer") -> str:
    """What became of a run that was asked to end, in words."""
    done = f"after {run.step} of {run.config.last_step} steps"
    if run.folder is None:
        return f"{done}; nothing is saved, for want of --out"
    newest = run.folder.newest
    if newest is None:
        return f"{done}; " + ("what was saved is gone" if run.folder.entries else "nothing is saved yet")
    return f"{done}; saved: {newest}; go on with: {resume_command(run.config, str(run.folder.path))}"

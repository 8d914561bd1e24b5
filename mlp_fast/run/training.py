"""From settings to a finished run: the corpus, what the run starts from, its folder, its log, its trainer."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from mlp_fast import backends, distributed
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus, load_for
from mlp_fast.errors import Interrupted, UserError, report
from mlp_fast.run.checkpoint import Checkpoint
from mlp_fast.run.folder import RunFolder
from mlp_fast.run.interrupt import Interrupt
from mlp_fast.run.log import RunLog
from mlp_fast.run.messages import announce, stopped, summary, title
from mlp_fast.run.plot import check_plot, draw_losses, drawable, figure
from mlp_fast.run.resume import beginning
from mlp_fast.run.trainer import Plan, Result, Trainer


def train(config: Config, interrupt: Interrupt | None = None) -> Result:
    """Runs a training run as the command does, files and output included; within distributed.joined(), rank 0's.

    Args:
        config: the settings; with `resume` they must fit the checkpoint (see resume.resumed_config).
        interrupt: what may end the run early, by Interrupted.

    Raises:
        UserError: what is asked for cannot be done. NonFiniteLoss: see --on-nan.
    """
    if config.checkpoint_every is not None and config.out is None:
        raise UserError("--checkpoint-every needs a folder to save into; add --out DIR")
    world = distributed.world()
    if world.rank:
        config = dataclasses.replace(config, out=None, plot=None, log_json=None, quiet=True)
    # Whatever the caller is in: training needs gradients.
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        with world.agreed():
            trainer = stack.enter_context(_opened(config, interrupt or Interrupt()))
        try:
            announce(trainer)
            result = trainer.run()
            trainer.log.message(summary(trainer, result))
            if config.plot is not None:
                with trainer.log.noting_failure(f"--plot {config.plot}"):
                    _plot(config.plot, trainer)
        except Interrupted as stop:
            stop.report += f" {stopped(trainer)}"
            raise
    return result


@contextlib.contextmanager
def _opened(config: Config, interrupt: Interrupt) -> Iterator[Trainer]:
    """A run before its first step, with its folder locked and its log open for as long as the block runs.

    Whatever may forbid the run is looked at before a folder is made or a file is opened.
    """
    backends.check(config)
    if config.plot is not None:
        check_plot(config.plot)
    start = beginning(config)
    corpus = _corpus(config, start)
    plan = Plan.of(config, corpus)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(Path(config.out), config.keep)) if config.out is not None else None
        if config.resume is not None:  # again: another run may have gone on with it while the corpus was read
            start = beginning(config)
            _check_corpus(config, corpus, start)
        if folder is not None:
            for damaged in folder.begin(start.path if start else None):
                report(f"a damaged checkpoint was set aside: {damaged}")
        log = stack.enter_context(contextlib.closing(RunLog(config, start.state.step if start else 0)))
        yield Trainer(plan, log, folder, start, interrupt)


def _corpus(config: Config, start: Checkpoint | None) -> Corpus:
    """The run's corpus. UserError where it cannot be read, or is not the one of a resumed run."""
    try:
        corpus = load_for(config, start.given_vocabulary if start else None)
    except UserError as error:
        if config.resume is None:
            raise
        raise UserError(f"{error}; if the corpus of {config.resume} lies elsewhere, say where by --data") from None
    _check_corpus(config, corpus, start)
    return corpus


def _check_corpus(config: Config, corpus: Corpus, start: Checkpoint | None) -> None:
    """UserError where a resumed run was trained on another corpus."""
    if config.resume is not None and start is not None and corpus.fingerprint != start.fingerprint:
        raise UserError(
            f"--data {config.data} is not the corpus that the run in {config.resume} was trained on; "
            "give --data the name or place of that one"
        )


def _plot(path: str, trainer: Trainer) -> None:
    run = trainer.log.evaluations
    with figure(Path(path)) as axes:
        losses = {"train": [e.train_loss for e in run], "val": [e.val_loss for e in run]}
        draw_losses(axes, [e.step for e in run], losses, trainer.entropy.get("val"))
        axes.set_title(textwrap.fill(drawable(title(trainer)), 60), parse_math=False)

"""The messages of a run: before its first step, at its end, and where it was stopped."""

import dataclasses

import torch

from mlp_fast.corpus.tokenizer import Words
from mlp_fast.run.resume import resume_command
from mlp_fast.run.trainer import Result, Trainer


def announce(run: Trainer) -> None:
    """Logs the settings, the title, and what the user should know before the first step."""
    config, vocabulary, log = run.config, run.corpus.vocabulary, run.log
    log.event(
        "config",
        **dataclasses.asdict(config),
        chosen_backend=run.backend.name,
        chosen_device=run.backend.device.type,
        parameters=run.shape.num_parameters,
        floor=run.entropy.get("val"),
    )
    if config.interpret:
        products = "" if config.precision == "fp32" else f"; its products are fp32, not {config.precision}"
        log.warning(
            f"--interpret: Triton's interpreter runs the kernels on the CPU, to check them, not for speed{products}"
        )
    log.message(title(run, run.choice.note))
    if isinstance(vocabulary, Words) and vocabulary.unspaced:
        log.warning(
            "--tokens word takes a run of letters as one word, and most of this text has no spaces between words; "
            "--tokens char suits it better"
        )
    if config.resume is not None:
        log.message(f"going on after {run.first_step} of {config.last_step} steps, from {config.resume}")
        log.event("resume", step=run.first_step)
    elif config.init_from is not None:
        log.message(f"starting from the model in {config.init_from}")


def title(run: Trainer, note: str = "") -> str:
    """A run in one line; `note`: why no better backend was chosen."""
    cuda = run.backend.device.type == "cuda"
    device = torch.cuda.get_device_name(run.backend.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    processes = f", in {run.world.size} processes" if run.world.size > 1 else ""
    floor = f" | floor of val_loss {run.entropy['val']:.6f}" if run.entropy else ""
    return (
        f"backend {run.backend.name}{note} on {device}{processes} | {run.corpus.name} corpus, "
        f"{len(run.corpus.train)} training tokens | {run.shape.num_parameters} parameters{floor}"
    )


def summary(run: Trainer, result: Result) -> str:
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
    if run.entropy:
        losses += f" | floor val {run.entropy['val']:.6f}, test {run.entropy['test']:.6f}"
    return f"{time_line}\n{losses}"


def stopped(run: Trainer) -> str:
    """How far a run came that was interrupted, what it saved, and how to go on."""
    done = f"after {run.step} of {run.config.last_step} steps"
    if run.folder is None:
        return f"{done}; nothing is saved, for want of --out"
    newest = run.folder.newest
    if newest is None:
        return f"{done}; " + ("what was saved is gone" if run.folder.entries else "nothing is saved yet")
    return f"{done}; saved: {newest}; go on with: {resume_command(run.config, str(run.folder.path))}"

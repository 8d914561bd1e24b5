"""From a saved run: going on with it, or starting a new one from its model."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlp_fast.config import MAY_CHANGE, OF_THE_CORPUS, OF_THE_MODEL, Config, flag
from mlp_fast.errors import UserError
from mlp_fast.model.state import TrainState
from mlp_fast.run import checkpoint
from mlp_fast.run.checkpoint import Checkpoint


def resumed_config(given: Mapping[str, Any]) -> Config:
    """The settings of a command with --resume: the checkpoint's, changed by what the command line itself gives.

    Without --out the run is saved where it came from.

    Args:
        given: the settings that the command line names; "resume" among them.
    """
    Config(resume=given["resume"])  # an empty name would be the current folder
    path = checkpoint.locate(Path(given["resume"]))
    saved = checkpoint.load(path).config
    _check_same_run(given, saved, given["resume"])  # before the settings are checked against each other
    return dataclasses.replace(saved, **{"out": str(path.parent), **given})


def initialised_config(given: Mapping[str, Any]) -> Config:
    """The settings of a command with --init-from: the model's sizes and tokens, and what the command line gives.

    Without --data it goes on with the corpus of the model's run.

    Args:
        given: the settings that the command line names; "init_from" among them.
    """
    Config(init_from=given["init_from"])  # an empty name would be the current folder
    saved = checkpoint.load(Path(given["init_from"])).config
    taken = OF_THE_MODEL if "data" in given else (*OF_THE_MODEL, *OF_THE_CORPUS)
    return Config(**{name: getattr(saved, name) for name in taken} | {**given})


def beginning(config: Config) -> tuple[Path | None, Checkpoint | None]:
    """What a run starts from: the checkpoint of --resume and its file, or that of --init-from with its model at step 0.

    Raises:
        UserError: there is no good checkpoint, or a setting contradicts its run or model.
    """
    if config.resume is not None:
        path = checkpoint.locate(Path(config.resume))
        saved = checkpoint.load(path)
        _check_same_run(dataclasses.asdict(config), saved.config, config.resume)
        if config.last_step < saved.state.step:
            raise UserError(
                f"--stop-after {config.last_step}: {config.resume} has done {saved.state.step} steps already"
            )
        return path, saved
    if config.init_from is not None:
        saved = checkpoint.load(Path(config.init_from))
        model, otherwise = f"the model in {config.init_from}", "start a new model without --init-from"
        _check_same({name: getattr(config, name) for name in OF_THE_MODEL}, saved.config, model, otherwise)
        state = TrainState.of(saved.state.parameters)
        return None, dataclasses.replace(saved, state=state, config=config, losses={})
    return None, None


def _check_same_run(settings: Mapping[str, Any], saved: Config, run: str) -> None:
    """UserError where one of these settings contradicts what defines the run."""
    fixed = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    _check_same(fixed, saved, f"the run in {run}", "start a new run without --resume")


def _check_same(settings: Mapping[str, Any], saved: Config, what: str, otherwise: str) -> None:
    """UserError where one of these settings contradicts what was saved."""
    for name, ours in settings.items():
        theirs = getattr(saved, name)
        if ours != theirs:
            raise UserError(f"{flag(name)} {ours}: {what} has {theirs}; leave the option out, or {otherwise}")


def resume_command(config: Config, run: str) -> str:
    """The command that goes on with a saved run as `config` would have."""
    words = ["python", "-m", "mlp_fast.train", "--resume", run]
    for name in ("stop_after", "log_json", "plot"):
        if getattr(config, name) is not None:
            words += [flag(name), str(getattr(config, name))]
    return shlex.join([*words, "--quiet"] if config.quiet else words)

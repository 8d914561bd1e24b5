"""From a saved run: going on with it, or starting a new one from its model."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlp_fast.config import OF_THE_CORPUS, OF_THE_MODEL, OF_THE_RUN, Config, flag
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
    _check_same("resume", given, saved)  # before the settings are checked against each other
    return dataclasses.replace(saved, **{"out": str(path.parent), **given})


def initialised_config(given: Mapping[str, Any]) -> Config:
    """The settings of a command with --init-from: the model's sizes and tokens, and what the command line gives.

    Without --data it goes on with the corpus of the model's run.

    Args:
        given: the settings that the command line names; "init_from" among them.
    """
    Config(init_from=given["init_from"])  # an empty name would be the current folder
    saved = checkpoint.load(given["init_from"]).config
    taken = OF_THE_MODEL if "data" in given else (*OF_THE_MODEL, *OF_THE_CORPUS)
    return Config(**{name: getattr(saved, name) for name in taken} | {**given})


def beginning(config: Config) -> Checkpoint | None:
    """What a run starts from: the checkpoint of --resume, or that of --init-from with its model at step 0, or nothing.

    Raises:
        UserError: there is no good checkpoint, or a setting contradicts its run or model.
    """
    if config.resume is not None:
        saved = checkpoint.load(config.resume)
        _check_same("resume", vars(config), saved.config)
        if config.last_step < saved.state.step:
            raise UserError(
                f"--stop-after {config.last_step}: {config.resume} has done {saved.state.step} steps already"
            )
        return saved
    if config.init_from is not None:
        saved = checkpoint.load(config.init_from)
        _check_same("init_from", vars(config), saved.config)
        state = TrainState.of(saved.state.parameters)
        return dataclasses.replace(saved, state=state, config=config, losses={}, path=None)
    return None


def _check_same(option: str, settings: Mapping[str, Any], saved: Config) -> None:
    """UserError where a setting contradicts what `option` takes over: of a run, resume; of its model, init_from."""
    names, what = {"resume": (OF_THE_RUN, "run"), "init_from": (OF_THE_MODEL, "model")}[option]
    for name in names:
        theirs = getattr(saved, name)
        ours = settings.get(name, theirs)
        if ours != theirs:
            raise UserError(
                f"{flag(name)} {ours}: the {what} in {settings[option]} has {theirs}; leave the option out, "
                f"or start a new {what} without {flag(option)}"
            )


def resume_command(config: Config, run: str) -> str:
    """The command that goes on with a saved run as `config` would have."""
    words = ["python", "-m", "mlp_fast.train", "--resume", run]
    for name in ("stop_after", "log_json", "plot"):
        if getattr(config, name) is not None:
            words += [flag(name), str(getattr(config, name))]
    return shlex.join([*words, "--quiet"] if config.quiet else words)

"""From a saved run: going on with it, or starting a new one from its model."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlp_fast.config import MAY_CHANGE, OF_THE_CORPUS, OF_THE_MODEL, PER_COMMAND, Config, flag
from mlp_fast.errors import UserError
from mlp_fast.run import checkpoint

FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def resumed_config(given: Mapping[str, Any]) -> Config:
    """The settings of a command with --resume: the checkpoint's, changed by what the command line itself gives.

    Without --out the run is saved where it came from.

    Args:
        given: the options that the command line names; "resume" among them.

    Raises:
        UserError: there is no good checkpoint, or an option contradicts what defines its run.
    """
    Config(resume=given["resume"])  # an empty name would be the current folder
    path = checkpoint.locate(Path(given["resume"]))
    settings = {"out": str(path.parent)} | {name: value for name, value in given.items() if name in FIELDS}
    saved = checkpoint.load(path).config
    check_same_run(settings, saved, given["resume"])
    return dataclasses.replace(saved, **settings)


def initialised_config(given: Mapping[str, Any]) -> Config:
    """The settings of a command with --init-from: the model's sizes and tokens, and what the command line gives.

    Without --data it goes on with the corpus of the model's run.

    Args:
        given: the options that the command line names; "init_from" among them.

    Raises:
        UserError: there is no good checkpoint, or an option contradicts its model.
    """
    Config(init_from=given["init_from"])  # an empty name would be the current folder
    saved = checkpoint.load(Path(given["init_from"])).config
    settings = {name: value for name, value in given.items() if name in FIELDS}
    taken = OF_THE_MODEL if "data" in settings else (*OF_THE_MODEL, *OF_THE_CORPUS)
    config = Config(**({name: getattr(saved, name) for name in taken} | settings))
    check_same_model(config, saved)
    return config


def check_same_model(config: Config, saved: Config) -> None:
    """Raises UserError where a setting contradicts the model that --init-from names."""
    for name in OF_THE_MODEL:
        ours, theirs = getattr(config, name), getattr(saved, name)
        if ours != theirs:
            raise UserError(
                f"{flag(name)} {ours}: the model in {config.init_from} has {theirs}; "
                "leave the option out, or start a new model without --init-from"
            )


def check_same_run(settings: Mapping[str, Any], saved: Config, run: str) -> None:
    """Raises UserError where a setting contradicts what defines the saved run."""
    for name, value in settings.items():
        if name not in (*PER_COMMAND, *MAY_CHANGE) and value != getattr(saved, name):
            raise UserError(
                f"{flag(name)} {value}: the run in {run} has {getattr(saved, name)}; "
                "leave the option out, or start a new run without --resume"
            )


def resume_command(config: Config, run: str) -> str:
    """The command that goes on with a saved run as `config` would have."""
    words = ["python", "-m", "mlp_fast.train", "--resume", run]
    for name in ("stop_after", "log_json", "plot"):
        if getattr(config, name) is not None:
            words += [flag(name), str(getattr(config, name))]
    return shlex.join([*words, "--quiet"] if config.quiet else words)

"""Going on with a saved run: what defines it stays, the rest may be given anew."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlp_fast import checkpoint
from mlp_fast.config import MAY_CHANGE, PER_COMMAND, Config, flag
from mlp_fast.errors import UserError

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

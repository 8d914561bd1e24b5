"""The command line: its parser, with an option for every setting of a run, and how a command ends."""

import argparse
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mlp_fast import threads
from mlp_fast.config import PRESETS, Config, flag, out_of_bounds, plain_type
from mlp_fast.errors import EXIT_NOT_SAVED, EXIT_USER_ERROR, UserError, discard_stdout, one_line, out_of_memory, report
from mlp_fast.startup import open_missing_streams


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's; what --preset sets are defaults, so that options given explicitly win over them.

        The attribute `given` of the result has the settings that the command line itself names, or its --preset.
        """
        absent = object()
        found = vars(super().parse_args(args, argparse.Namespace(**{action.dest: absent for action in self._actions})))
        given = {name: value for name, value in found.items() if value is not absent}
        given = PRESETS.get(given.get("preset", ""), {}) | given
        defaults = {action.dest: action.default for action in self._actions}
        return argparse.Namespace(**(defaults | given), given=_settings(given))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's; `--option=--` is an error, where Python before 3.13 makes an empty list of it."""
        arguments, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.nargs is None and getattr(arguments, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings) or action.dest}: expected one argument")
        return arguments, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help".replace("\n", " "))


def add_config_arguments(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """Adds --preset and one option per Config field, in the order of the dataclass."""
    parser.add_argument("--preset", choices=PRESETS, help="sets several options at once; others given here win")
    for field in dataclasses.fields(Config):
        if field.name in leave_out:
            continue
        kind, choices = plain_type(field.type), field.metadata["choices"]
        metavar = field.metadata["metavar"] or (None if choices else kind.__name__.upper())
        how = {"type": kind, "choices": choices, "metavar": metavar}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(field.name), default=field.default, help=field.metadata["help"], **how)


def config_from(arguments: argparse.Namespace) -> Config:
    """The Config that parsed arguments describe; fields without an argument keep their default."""
    return Config(**_settings(vars(arguments)))


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are a Config's fields."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: value for name, value in options.items() if name in names}


def number(kind: type[int] | type[float], least: float, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """The type of an option whose value must lie between two bounds."""

    def parsed(text: str) -> Any:
        value = kind(text)
        if reason := out_of_bounds(value, least, most):
            raise argparse.ArgumentTypeError(f"{reason} (got {text})")
        return value

    parsed.__name__ = kind.__name__  # for argparse's message where a text is not of the type
    return parsed


def unescape(text: str) -> str:
    r"""A prompt as typed in a shell: \n and \t stand for the characters, \\ for a backslash."""
    placeholder = "\0"
    return text.replace("\\\\", placeholder).replace("\\n", "\n").replace("\\t", "\t").replace(placeholder, "\\")


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: its code, or that of a UserError or failed write, with one line on stderr."""
    gc.freeze()  # what was imported, also for the collections at exit
    gc.enable()
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for any encoding of the terminal
    threads.use_available()
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        report(str(error))
        code = error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            report(f"not enough memory ({_memory_reason(error)}); choose smaller sizes, or raise the limit (ulimit -v)")
            code = EXIT_USER_ERROR
        elif isinstance(error, OSError):
            report(f"the output could not be written ({one_line(error)})")
            discard_stdout()
            code = EXIT_NOT_SAVED
        else:
            raise
    sys.exit(code)


def _memory_reason(error: Exception) -> str:
    """The sentence about memory in an error's message, without the place in torch's source."""
    found = re.search(r"DefaultCPUAllocator: (.*?)(?: Error code|$)", one_line(error))
    return found[1] if found else one_line(error).partition(". ")[0]

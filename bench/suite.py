"""The groups of cases. Two commands run them: `python -m bench.record`, and by pytest-benchmark `pytest bench`."""

from collections.abc import Callable, Iterator
from typing import Any

from bench.case import Case, Plan
from bench.operators import kernel_cases
from bench.other_work import evaluation_cases, reading_cases, rng_cases, sampling_cases
from bench.processes import busy_cases, run_cases, scale_cases, start_up_cases
from bench.steps import step_cases, sweep_cases, thread_cases
from mlp_fast.errors import UserError

GROUPS: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "step": step_cases,  # a training step of every backend, beside eager's and others'
    "threads": thread_cases,  # the same on one thread, where the CPU backends differ most
    "sweep": sweep_cases,  # a step over batch and hidden sizes; --full: of every backend, over T, V, precisions too
    "kernels": kernel_cases,  # the fused operators beside plain torch
    "evaluation": evaluation_cases,  # the mean loss of the val split
    "sampling": sampling_cases,  # 200 characters
    "rng": rng_cases,  # random numbers, vectorised and one by one
    "reading": reading_cases,  # text into tokens, beside the plain way of Python
    "start-up": start_up_cases,  # processes that import, print their help, train one step
    "run": run_cases,  # whole training processes, from start to end, beside the reference's way of working
    "scale": scale_cases,  # words, bytes, large vocabularies, several processes
    "busy": busy_cases,  # a step of native beside other work
}
# Groups that take long: only --full, or --groups with their names, measures them.
LONG = ("scale", "busy")

# Options of both commands, as add_argument() of argparse and addoption() of pytest take them.
OPTIONS: dict[str, dict[str, Any]] = {
    "--full": {"action": "store_true", "help": "sweep B, H, T, V and precision over all backends"},
    "--dry-run": {"action": "store_true", "help": "tiny sizes: only whether everything runs"},
    "--groups": {"metavar": "A,B", "help": f"only some of {', '.join(GROUPS)}; long ones too"},
}


def chosen(named: str | None, plan: Plan) -> list[str]:
    """The groups that --groups names; without it all that the plan measures.

    Raises:
        UserError: one is unknown.
    """
    groups = named.split(",") if named else [group for group in GROUPS if plan.full or group not in LONG]
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"--groups: {unknown[0]!r} is unknown; choose some of {', '.join(GROUPS)}")
    return groups


def cases(group: str, plan: Plan) -> list[Case]:
    """The cases of a group."""
    return list(GROUPS[group](plan))

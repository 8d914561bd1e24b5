"""What is measured, as data: cases in groups, each of which prepares itself, is timed in rounds, and makes an entry.

    step         a training step of every backend, in rounds beside eager's and others'
    threads      the same on one thread, where the CPU backends differ most
    sweep        a step over batch and hidden sizes; --full: of every backend, over T, V and precisions too
    kernels      the fused operators beside plain torch
    evaluation   the mean loss of the val split
    sampling     200 characters
    rng          random numbers, vectorised and one by one
    reading      text into tokens, beside the plain way of Python
    start-up     processes that import, print their help, train one step
    run          whole training processes, from start to end, beside the reference's way of working
    scale        words, bytes, large vocabularies, several processes
    busy         a step of native on a machine that is not its own

`pytest bench --benchmark-only` times them by pytest-benchmark, `python -m bench.record` by itself: the same cases.
Where two sides are compared, a round of each other comes before every round of the case, off its clock.
"""

from collections.abc import Callable, Iterator

from bench.case import Case, Plan
from bench.host import reading_cases, rng_cases
from bench.inference import evaluation_cases, sampling_cases
from bench.operators import kernel_cases
from bench.processes import busy_cases, run_cases, start_up_cases
from bench.scale import scale_cases
from bench.steps import step_cases, sweep_cases, thread_cases

GROUPS: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "step": step_cases,
    "threads": thread_cases,
    "sweep": sweep_cases,
    "kernels": kernel_cases,
    "evaluation": evaluation_cases,
    "sampling": sampling_cases,
    "rng": rng_cases,
    "reading": reading_cases,
    "start-up": start_up_cases,
    "run": run_cases,
    "scale": scale_cases,
    "busy": busy_cases,
}


# Groups that take long: measured by --full, or by naming them.
LONG = ("scale", "busy")


def usual(plan: Plan) -> list[str]:
    """The groups that are measured where none are named."""
    return [group for group in GROUPS if plan.full or group not in LONG]


def cases(group: str, plan: Plan) -> list[Case]:
    """The cases of a group."""
    return list(GROUPS[group](plan))

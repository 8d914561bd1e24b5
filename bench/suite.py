"""What is measured, as data: cases in groups, each of which prepares itself, is timed in rounds, and makes an entry.

    step         a training step of every backend, in rounds beside eager's and other rivals'
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
Where two sides are compared, a round of each rival comes before every round of the case, off its clock.
"""

from collections.abc import Callable, Iterator

from bench import floor
from bench.busy import busy_cases
from bench.case import Case, Entry, Plan, Timer, spread_ms
from bench.inference import evaluation_cases, sampling_cases
from bench.operators import kernel_cases
from bench.processes import run_cases, start_up_cases
from bench.reading import reading_cases
from bench.scale import scale_cases
from bench.steps import step_cases, sweep_cases, thread_cases
from mlp_fast.measure.equivalence import NotEquivalent
from mlp_fast.model.rng import RNG


def rng_cases(plan: Plan) -> Iterator[Case]:
    """Filling an array with random numbers, beside drawing them one by one."""
    many, few = (10_000, 100) if plan.dry else (10_000_000, 100_000)

    def filled(timer: Timer, probes: floor.Probes) -> Entry:
        first = RNG(1337)
        if not (RNG(1337).fill_uniform(1000) == [first.random() for _ in range(1000)]).all():
            raise NotEquivalent("the fill's numbers are not those of the scalar generator")
        times = timer(lambda: RNG(1337).fill_uniform(many), lambda: None, min(plan.rounds, 5))
        return {"per": f"{many:,} uniforms", "ms": spread_ms(times), "uniforms_per_second": many / min(times)}

    def drawn(timer: Timer, probes: floor.Probes) -> Entry:
        def draws() -> None:
            rng = RNG(1337)
            for _ in range(few):
                rng.random()

        times = timer(draws, lambda: None, min(plan.rounds, 5))
        return {"per": f"{few:,} uniforms", "ms": spread_ms(times), "uniforms_per_second": few / min(times)}

    yield Case("rng", f"fill {many:,}", filled)
    yield Case("rng", f"scalar {few:,}", drawn)


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

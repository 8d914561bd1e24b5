"""Backends side by side: same seed, same batches, their rounds interleaved.

Every backend trains the same N steps twice, each pass cut into rounds; timing.py says how these are taken in turns, and
equivalence.py which backends get a number. Eager is always among them, as the baseline.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure import machine
from mlp_fast.measure import table as markdown
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, Verifier
from mlp_fast.measure.timing import Spread, measure
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

ROUNDS = 10  # per pass


@dataclass
class Result:
    """One line of the comparison. A backend that was refused has no numbers but those of its first steps."""

    backend: str
    compile_seconds: float  # building the backend and its first step, compilation included
    peak_bytes: int  # the rise of memory meanwhile, compiler included (machine.PeakMemory says what is counted)
    refused: str | None = None  # why there are no numbers
    ms_per_step: Spread | None = None  # over all rounds
    repeatable: bool | None = None  # whether both passes gave the same bits in every loss and in the state at the end
    x_eager: float | None = None  # eager's median over this one's
    loss_difference: float | None = None  # the largest of a batch loss from eager's over the N steps, in nats


def compare(names: Sequence[str], config: Config, shape: Shape, tape: Tape) -> list[Result]:
    """Compares backends over config.num_steps steps.

    Args:
        names: backends, not aliases; eager is added in front where it is missing.
        config: the settings that all of them share; its `backend` is not looked at.
        shape: the model's sizes.
        tape: the training split, on the CPU.
    """
    names = list(names) if BASELINE in names else [BASELINE, *names]
    verifier = Verifier(config, shape, tape)
    built: dict[str, Backend] = {}
    results: dict[str, Result] = {}
    for name in names:
        start, own = time.perf_counter(), dataclasses.replace(config, backend=name)
        choice = backends.resolve(own, shape, tape)
        with machine.PeakMemory(choice.device) as memory:
            built[name] = choice.create(own, shape, tape, verifier.initial)
            built[name].prepare()
        results[name] = Result(name, time.perf_counter() - start, memory.bytes)
    for name, result in results.items():
        try:
            verifier.check(built[name])
        except NotEquivalent as refusal:
            result.refused = str(refusal)
            del built[name]
    (times, first), (more_times, second) = (_one_pass(built, verifier.initial, config.num_steps) for _ in range(2))
    spreads = {name: Spread.of(times[name] + more_times[name]) for name in built}
    for name, spread in spreads.items():
        result = results[name]
        result.ms_per_step = spread
        result.repeatable = all(map(torch.equal, first[name], second[name]))
        if BASELINE in spreads:
            result.x_eager = spreads[BASELINE].median / spread.median
            losses, eager = first[name][0].double(), first[BASELINE][0].double()
            result.loss_difference = (losses - eager).abs().max().item()
    return list(results.values())


def _one_pass(
    built: Mapping[str, Backend], initial: TrainState, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """Trains all backends from the initial state, their rounds in turns.

    Returns:
        By name the milliseconds per step of every round; and the losses, (steps,), and the tensors of the state at the
        end.
    """
    losses: dict[str, list[Tensor]] = {name: [] for name in built}
    for backend in built.values():
        backend.load(initial)

    def run(backend: Backend, count: int) -> Tensor:
        part = backend.advance(count)
        backend.synchronize()
        return part

    candidates = {name: partial(run, backend) for name, backend in built.items()}
    rounds = cut(steps, ROUNDS)
    times = measure(candidates, rounds, lambda name, part: losses[name].append(part.cpu().clone()))
    states = {name: backend.state().parts.values() for name, backend in built.items()}
    tensors = {name: [tensor for part in parts for tensor in part.values()] for name, parts in states.items()}
    return times, {name: [torch.cat(losses[name]), *tensors[name]] for name in built}


def cut(steps: int, rounds: int) -> list[int]:
    """Steps cut into at most so many rounds, as equal as can be."""
    rounds = min(rounds, steps)
    return [steps // rounds + (i < steps % rounds) for i in range(rounds)]


def table(results: Sequence[Result]) -> str:
    """The comparison as a Markdown table, and under it why a backend has no number."""

    def or_dash(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for result in results:
        ms = result.ms_per_step
        times = ("not equivalent", "-") if ms is None else (f"{ms.median:.4f}", f"{ms.min:.4f}..{ms.max:.4f}")
        ratio, difference = or_dash(result.x_eager, ".2f"), or_dash(result.loss_difference, ".1e")
        costs = f"{result.compile_seconds:.2f}", f"{result.peak_bytes / 1e6:.1f}"
        repeatable = {None: "-", True: "bit for bit", False: "no"}[result.repeatable]
        rows.append((result.backend, *times, ratio, *costs, difference, repeatable))
    header = ("backend", "ms/step, median", "fastest..slowest round", "x eager", "first step, s", "peak memory, MB")
    shown = markdown.table((*header, "largest loss difference", "repeatable"), rows)
    return "\n".join([shown, *(f"no number: {result.refused}" for result in results if result.refused)])


def named(text: str) -> list[str]:
    """--backends as names; UserError where there are none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--backends names none; give some of " + ", ".join(backends.names()))
    return names


def chosen(names: Sequence[str] | None, config: Config, shape: Shape) -> list[str]:
    """The backends of these names: aliases resolved, none twice; for None all that this machine has.

    Raises:
        UserError: a name is unknown, or a backend that was asked for is unavailable.
    """
    if names is None:
        return backends.available(config, shape)
    resolved = [backends.resolve(dataclasses.replace(config, backend=name), shape).cls.name for name in names]
    return list(dict.fromkeys(resolved))

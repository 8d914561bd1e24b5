"""Honest times: candidates measured in turns.

A round is some steps and one synchronisation. The rounds of all candidates are interleaved, in an order that rotates by
one each time, so that a machine that warms up, throttles or is shared does so to all of them; a short rest comes before
each, so that none runs beside threads that another has left spinning. What is reported is the median over rounds, with
the fastest and the slowest beside it. equivalence.py says whose time counts at all.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.corpus.load import check_sizes, load_for
from mlp_fast.model.mlp import Shape
from mlp_fast.model.windows import Tape

# OpenMP's threads go on spinning after their work (libgomp's were seen to for 8 ms), on cores that the next one needs.
REST = 0.02


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some samples."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """The spread of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))


def subject(config: Config) -> tuple[Shape, Tape]:
    """The model's sizes and the training tape, on the CPU, of a run with these settings; UserError as in training."""
    corpus = load_for(config)
    check_sizes(corpus, config.context_length, config.batch_size)
    return Shape.of(config, len(corpus.vocabulary)), Tape(corpus.train, config.context_length)


def seconds(work: Callable[[], Any]) -> float:
    """The wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rest() -> None:
    """Between two candidates: waits until the threads of the last one sleep."""
    time.sleep(REST)


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Attributes:
        name: unique among the candidates.
        run: does so many steps and returns when they are done.
        finish: gets run()'s result, outside the timed region.
    """

    name: str
    run: Callable[[int], Any]
    finish: Callable[[Any], None] = lambda result: None

    @classmethod
    def of(cls, backend: Backend, finish: Callable[[Any], None] = lambda result: None) -> "Candidate":
        """A backend; `finish` gets its losses."""

        def run(steps: int) -> Tensor:
            losses = backend.advance(steps)
            backend.synchronize()
            return losses

        return cls(backend.name, run, finish)


def measure(candidates: Sequence[Candidate], rounds: Sequence[int]) -> dict[str, list[float]]:
    """Times candidates in turns.

    Args:
        candidates: ready to run: compiled, warmed up, their device idle.
        rounds: the number of steps of each round.

    Returns:
        By name, milliseconds per step of every round.
    """
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn, steps in enumerate(rounds):
        first = turn % len(candidates)
        for candidate in (*candidates[first:], *candidates[:first]):
            rest()
            start = time.perf_counter()
            result = candidate.run(steps)
            elapsed = time.perf_counter() - start
            samples[candidate.name].append(1e3 * elapsed / steps)
            candidate.finish(result)
    return samples

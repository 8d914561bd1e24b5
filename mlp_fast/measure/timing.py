"""Times of candidates, measured in turns.

A round is some steps and one synchronisation. The rounds of all candidates are interleaved, in an order that rotates by
one each time, so that a machine that warms up, throttles or is shared does so to all of them. A short rest comes before
each round, so that none runs beside threads that another has left spinning. Reported are the median over rounds, the
fastest and the slowest. equivalence.py decides which candidates are timed at all.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def measure(
    candidates: Mapping[str, Callable[[int], Any]],
    rounds: Sequence[int],
    finish: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, list[float]]:
    """Times candidates in turns.

    Args:
        candidates: by name, what does so many steps and returns when they are done; compiled and warmed up.
        rounds: the number of steps of each round.
        finish: gets the name and the result of every round, outside the timed region.

    Returns:
        By name, milliseconds per step of every round.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    turn = deque(candidates.items())
    for steps in rounds:
        for name, run in turn:
            rest()
            start = time.perf_counter()
            result = run(steps)
            samples[name].append(1e3 * (time.perf_counter() - start) / steps)
            finish(name, result)
        turn.rotate(-1)
    return samples

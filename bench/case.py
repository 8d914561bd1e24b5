"""A benchmark: a case prepares its work, has it timed in rounds by a Timer, and returns an entry of a recording."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import lower_bound
from mlp_fast.config import Config
from mlp_fast.measure.timing import Spread, rest, seconds

SCHEDULE = 100_000  # steps of the schedule: more than any case does
# Of losses in nats and of probabilities in float32: the reference's own forms differ by 1e-6 in a run of 50,000 steps.
TOLERANCE = 1e-5

Entry = dict[str, Any]
# Times rounds: (work, what comes before each round off the clock, number of rounds) -> seconds of every round.
Timer = Callable[[Callable[[], object], Callable[[], None], int], list[float]]


class Skipped(Exception):
    """A case cannot run here; the message says why."""


def failure(error: Exception) -> str:
    """An error as the reason why something was not measured: its kind and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"failed: {type(error).__name__}" + (f": {message}" if message else "")


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where.

    Attributes:
        full: everything, sweeps included.
        dry: tiny sizes, two rounds: whether everything runs. Its times mean nothing.
        device: "cpu" or "cuda".
    """

    full: bool = False
    dry: bool = False
    device: str = "cpu"

    @classmethod
    def here(cls, *, full: bool, dry: bool, device: str | None = None) -> "Plan":
        """On a device, or else on the GPU where there is one."""
        return cls(full, dry, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def rounds(self) -> int:
        """How often a case is timed."""
        return 2 if self.dry else 10

    @property
    def round_seconds(self) -> float:
        """How long a round of steps should take."""
        return 0.005 if self.dry else 0.05

    @property
    def precisions(self) -> tuple[str, ...]:
        """The arithmetics that the device has: TF32 is NVIDIA's."""
        return ("fp32", "tf32x3", "tf32") if self.device == "cuda" else ("fp32",)

    def config(self, **settings: Any) -> Config:
        """A run's settings: the defaults, or tiny ones."""
        tiny = {"embedding_size": 8, "hidden_size": 32, "batch_size": 16} if self.dry else {}
        return Config(**{"device": self.device, "num_steps": SCHEDULE, "quiet": True, **tiny, **settings})


def plain_timer(work: Callable[[], object], before: Callable[[], None], rounds: int) -> list[float]:
    """The Timer that needs no pytest-benchmark."""
    times = []
    for _ in range(rounds):
        before()
        rest()
        times.append(seconds(work))
    return times


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        group: one of GROUPS.
        id: unique in its group.
        run: does it with a timer and the machine's probes; raises Skipped or NotEquivalent.
        slow: it takes minutes to prepare, so it is measured after all others.
    """

    group: str
    id: str
    run: Callable[[Timer, lower_bound.Probes], Entry] = field(repr=False, compare=False)
    slow: bool = False

    def entry(self, timer: Timer, probes: lower_bound.Probes) -> Entry:
        """The result: group and id; `per`, the unit; `ms`, its Spread; and what else the group has to say."""
        return {"group": self.group, "id": self.id, **self.run(timer, probes)}


def timed_beside(
    timer: Timer,
    work: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    calls_of: Mapping[str, int] | None = None,
) -> Entry:
    """Times some work, and before each of its rounds everything else that it is compared with, each after a rest.

    Args:
        others: by name; they do the same as `work`, in another way.
        calls: how often `work`, and each of the others, does what is measured.
        calls_of: of others that do it more or less often, by name.

    Returns:
        compared(), of the milliseconds of a call.
    """
    samples: dict[str, list[float]] = {name: [] for name in others}

    def before() -> None:
        for name, other in others.items():
            rest()
            samples[name].append(1e3 * seconds(other) / (calls_of or {}).get(name, calls))

    return compared([1e3 * t / calls for t in timer(work, before, rounds)], samples)


def compared(times: Sequence[float], others: Mapping[str, Sequence[float]]) -> Entry:
    """Of milliseconds: `ms`, their Spread; and `rivals`, by name `ms` and `ratio`, how many times as long they take."""
    spread = Spread.of(times)
    beside = {name: Spread.of(theirs) for name, theirs in others.items() if theirs}
    return {
        "ms": asdict(spread),
        "rivals": {name: {"ms": asdict(its), "ratio": its.median / spread.median} for name, its in beside.items()},
    }

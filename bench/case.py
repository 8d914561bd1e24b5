"""Case: a benchmark. It prepares some work, has a Timer time it in rounds, and returns an entry of a recording.

Where two ways of the same work are compared, a round of the other comes before every round of the case, off its clock.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.lower_bound import Probes
from mlp_fast import backends
from mlp_fast.backends.device_loop import captured
from mlp_fast.config import Config
from mlp_fast.measure.equivalence import NotEquivalent
from mlp_fast.measure.timing import Spread, rest, seconds
from mlp_fast.model.mlp import Shape

SCHEDULE = 100_000  # steps of the learning rate's schedule: more than any case does
# Of losses in nats and of probabilities, in float32: forms of the reference itself differ by 1e-6 after 50,000 steps.
TOLERANCE = 1e-5

Entry = dict[str, Any]
Work = Callable[[], Any]
# (work, what runs before each round, off the clock, number of rounds) -> seconds of every round.
Timer = Callable[[Work, Callable[[], None], int], list[float]]


class Skipped(Exception):
    """A case cannot run here; the message says why."""


def reason(error: Exception) -> str:
    """Why a case has no number: the message of an expected error; the kind and first line of an unexpected one."""
    if isinstance(error, Skipped | NotEquivalent):
        return str(error)
    message = str(error).strip().partition("\n")[0]
    return f"failed: {type(error).__name__}" + (f": {message}" if message else "")


def require_supported(name: str, config: Config, shape: Shape) -> None:
    """Raises Skipped where a backend cannot do such a run here."""
    if unsupported := backends.unsupported(name, config, shape):
        raise Skipped(unsupported)


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where."""

    full: bool = False  # everything, sweeps included
    dry: bool = False  # tiny sizes, two rounds: whether everything runs; the times mean nothing
    device: str = "cpu"  # or "cuda"

    @classmethod
    def here(cls, *, full: bool, dry: bool, device: str | None = None) -> "Plan":
        """A plan for a device; by default the GPU where there is one."""
        return cls(full, dry, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def rounds(self) -> int:
        """Rounds of a case."""
        return 2 if self.dry else 10

    @property
    def round_seconds(self) -> float:
        """The length of a round of steps."""
        return 0.005 if self.dry else 0.05

    @property
    def precisions(self) -> tuple[str, ...]:
        """The arithmetics that the device has: TF32 is NVIDIA's."""
        return ("fp32", "tf32x3", "tf32") if self.device == "cuda" else ("fp32",)

    def config(self, **settings: Any) -> Config:
        """A run's settings: the defaults, or tiny ones."""
        tiny = {"embedding_size": 8, "hidden_size": 32, "batch_size": 16} if self.dry else {}
        return Config(**{"device": self.device, "num_steps": SCHEDULE, "quiet": True, **tiny, **settings})


@dataclass(frozen=True)
class Case:
    """One benchmark."""

    group: str  # one of suite.GROUPS
    id: str  # unique in its group
    run: Callable[[Timer, Probes], Entry]  # with a timer and the machine's probes; raises Skipped or NotEquivalent
    slow: bool = False  # it takes minutes to prepare, so it is measured after all others

    def entry(self, timer: Timer, probes: Probes) -> Entry:
        """The result: group and id; `per`, the unit; `ms`, the Spread of its times; and what else the group records."""
        return {"group": self.group, "id": self.id, **self.run(timer, probes)}


def plain_timer(work: Work, before: Callable[[], None], rounds: int) -> list[float]:
    """The Timer without pytest-benchmark."""
    times = []
    for _ in range(rounds):
        before()
        times.append(seconds(work))
    return times


def timed_beside(
    timer: Timer, work: Work, others: Mapping[str, Work], rounds: int, calls: int = 1, calls_of: Mapping[str, int] = {}
) -> Entry:
    """Times some work, and before each of its rounds everything else that it is compared with, each after a rest.

    Args:
        others: by name; they do the same as `work`, in another way.
        calls: how often a round does what is measured.
        calls_of: the same of each of `others` whose round does it more or less often.

    Returns:
        compared(), of the milliseconds of a call.
    """
    samples: dict[str, list[float]] = {name: [] for name in others}

    def before() -> None:
        for name, other in others.items():
            rest()
            samples[name].append(1e3 * seconds(other) / calls_of.get(name, calls))
        rest()

    return compared([1e3 * t / calls for t in timer(work, before, rounds)], samples)


def compared(times: Sequence[float], others: Mapping[str, Sequence[float]]) -> Entry:
    """The Spread of the times as `ms`; in `rivals`, by name, `ms` and `ratio` to it of the others. All milliseconds."""
    spread = Spread.of(times)
    beside = {name: Spread.of(samples) for name, samples in others.items() if samples}
    rivals = {name: {"ms": asdict(other), "ratio": other.median / spread.median} for name, other in beside.items()}
    return {"ms": asdict(spread), "rivals": rivals}


def waited(work: Work, device: torch.device) -> Work:
    """The work, and then a wait until the device has done it."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def repeated(work: Work, device: torch.device, calls: int) -> Work:
    """The work so many times, as a captured graph on CUDA, without a wait for it; the work is done before."""

    def repeat() -> None:
        for _ in range(calls):
            work()

    if device.type == "cpu":
        work()
        return repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd must have run where it is captured
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    replay = captured(repeat).replay
    waited(replay, device)()
    return replay


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets the precision of torch's float32 products, as set_float32_matmul_precision() does, for a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

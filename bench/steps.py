"""Cases of training steps: every candidate is checked against float64, then timed in rounds beside others."""

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import lower_bound
from bench.case import TOLERANCE, Case, Entry, Plan, Skipped, Timer, timed_beside
from bench.reference_loop import ReferenceLoop
from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.measure.equivalence import BASELINE, Verifier, require
from mlp_fast.measure.profiling import profile_steps
from mlp_fast.measure.timing import Candidate, seconds
from mlp_fast.model.mlp import Shape
from mlp_fast.model.windows import Tape

REFERENCE = "reference-loop"  # eager-raw on batches from Python lists, bench/reference_loop.py
SWEPT_SIZES = (128, 256, 512, 1024, 2048, 4096)
LARGEST_BATCH = 8192  # that the step kernels take


@dataclass(frozen=True)
class Setting:
    """What all candidates of a step case share.

    Attributes:
        config: without its backend.
        vocab_size: of a random tape; None for the embedded corpus.
        threads: that torch may use.
    """

    config: Config
    vocab_size: int | None = None
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass
class Ready:
    """A candidate, checked and warm.

    Attributes:
        candidate: its steps.
        restart: back to the initial state.
        steps: of a round.
        facts: for the entry.
    """

    candidate: Candidate
    restart: Callable[[], None]
    steps: int
    facts: Entry


class Candidates:
    """The candidates of one setting, compiled and checked once: compiling is slow, and memory is finite."""

    def __init__(self) -> None:
        self._setting: Setting | None = None
        self._ready: dict[str, Ready] = {}

    def ready(self, name: str, setting: Setting, round_seconds: float, probes: lower_bound.Probes) -> Ready:
        """The candidate of that name; Skipped or NotEquivalent where there is none."""
        if setting != self._setting:
            self._enter(setting)
        torch.set_num_threads(setting.threads)
        if name not in self._ready:
            make = self._reference if name == REFERENCE else self._backend
            self._ready[name] = make(name, setting, round_seconds, probes)
        return self._ready[name]

    def _enter(self, setting: Setting) -> None:
        self._setting, self._ready = None, {}
        gc.collect()
        torch._dynamo.reset()  # its limit of compilations counts over the whole process
        torch.set_num_threads(setting.threads)
        config = setting.config
        T, E, H = config.context_length, config.embedding_size, config.hidden_size
        if setting.vocab_size is None:
            corpus = load("embedded")
            V, tokens = len(corpus.vocabulary), corpus.train
        else:
            V = setting.vocab_size
            tokens = torch.randint(V, (100_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        self.shape, self.tape = Shape(V, T, E, H), Tape(tokens, T)
        self.verifier = Verifier(config, self.shape, self.tape)
        self._setting = setting

    def _backend(self, name: str, setting: Setting, round_seconds: float, probes: lower_bound.Probes) -> Ready:
        config = dataclasses.replace(setting.config, backend=name)
        reason = backends.unsupported(name, config, self.shape)
        if reason is not None:
            raise Skipped(reason)
        start = time.perf_counter()
        backend = backends.create(config, self.shape, self.tape, self.verifier.initial)
        backend.prepare()
        facts: Entry = {"first_step_seconds": time.perf_counter() - start, "loss_error": self.verifier.check(backend)}
        candidate = Candidate.of(backend)
        steps = self._steps_per_round(candidate, backend, round_seconds)
        sync = None
        if backend.device.type == "cuda":
            sync = self._look_at_device(backend, steps, facts)
        facts |= self._lower_bound(name, setting, probes, sync)
        return Ready(candidate, lambda: backend.load(self.verifier.initial), steps, facts)

    def _reference(self, name: str, setting: Setting, round_seconds: float, probes: lower_bound.Probes) -> Ready:
        config = setting.config
        if config.device != "cpu" or config.precision != "fp32":
            raise Skipped("it is the reference on the CPU")
        loop = ReferenceLoop(config, {"train": self.tape.tokens.tolist()}, self.shape.V)
        start = time.perf_counter()
        loop.advance(1)
        first = time.perf_counter() - start
        error = abs(loop.advance(self.verifier.steps - 1) - self.verifier.losses[-1].item())
        require(name, "a loss", error, TOLERANCE)
        candidate = Candidate(name, loop.advance)
        facts: Entry = {"first_step_seconds": first, "loss_error": error, **self._lower_bound(name, setting, probes)}
        return Ready(candidate, lambda: None, self._steps_per_round(candidate, None, round_seconds), facts)

    def _lower_bound(
        self, name: str, setting: Setting, probes: lower_bound.Probes, sync: lower_bound.Synchronisation | None = None
    ) -> Entry:
        """What a step costs at the least, and by the probes the lower bound of its time."""
        config = setting.config
        form = lower_bound.form_of(name, config.form, self.shape, config.batch_size)
        cost = lower_bound.step_cost(self.shape, config.batch_size, form)
        facts: Entry = {"form": form, "operations": cost.operations, "bytes": cost.bytes}
        bound = lower_bound.step_bound(cost, probes, config.precision, setting.threads, sync)
        return facts | ({} if bound is None else {"floor_ms": bound.total, "floor_parts_ms": dataclasses.asdict(bound)})

    def _steps_per_round(self, candidate: Candidate, backend: Backend | None, round_seconds: float) -> int:
        """As many as fill a round; on CUDA whole evaluation intervals, as training asks for them."""
        trial = 2 if backend is None or backend.device.type == "cpu" else 200
        candidate.run(trial)
        steps = round(round_seconds / (seconds(lambda: candidate.run(trial)) / trial))
        if trial == 200:
            steps = 200 * round(steps / 200)
        return min(max(steps, trial), 4000)

    def _look_at_device(self, backend: Backend, steps: int, facts: Entry) -> lower_bound.Synchronisation:
        """Device time and launches of a step by torch.profiler, off every clock."""
        # Enough for a whole captured graph; of autograd's hundreds of operators a step, fewer.
        looked_at = min(steps, 20 if backend.name in lower_bound.GATHER_BACKENDS else 200)
        with tempfile.TemporaryDirectory() as folder:
            summary = profile_steps(backend, looked_at, Path(folder) / "trace.json")
        if summary.device:
            facts |= {"device_ms": summary.busy / 1e3, "launches": summary.launches}
        launches = summary.launches if summary.device else 0.0
        kernels = getattr(getattr(backend, "kernels", None), "config", None)
        if backend.name == "triton-persistent" and kernels is not None:
            facts["programs"] = kernels.PROGRAMS
            return lower_bound.Synchronisation(barriers=kernels.exchanges, programs=kernels.PROGRAMS)
        return lower_bound.Synchronisation(launches=launches, captured=summary.host_launches < 0.5 * launches)


CANDIDATES = Candidates()


def step_case(
    group: str, id: str, name: str, setting: Setting, others: Sequence[str], plan: Plan, rounds: int | None = None
) -> Case:
    """A step of one candidate, with rounds of the others beside it in between."""

    def run(timer: Timer, probes: lower_bound.Probes) -> Entry:
        threads = torch.get_num_threads()
        try:
            return measured(timer, probes)
        finally:
            torch.set_num_threads(threads)

    def measured(timer: Timer, probes: lower_bound.Probes) -> Entry:
        ready = CANDIDATES.ready(name, setting, plan.round_seconds, probes)
        beside_it = {}
        for other in others:
            with contextlib.suppress(Skipped):  # it has a case of its own, which says why
                beside_it[other] = CANDIDATES.ready(other, setting, plan.round_seconds, probes)
        for one in (ready, *beside_it.values()):
            one.restart()
        works = {other: partial(one.candidate.run, one.steps) for other, one in beside_it.items()}
        work, steps = partial(ready.candidate.run, ready.steps), {other: one.steps for other, one in beside_it.items()}
        entry = timed_beside(timer, work, works, rounds or plan.rounds, ready.steps, steps)
        config = setting.config
        entry |= {
            "backend": name,
            **{"B": config.batch_size, "T": config.context_length, "E": config.embedding_size},
            **{"H": config.hidden_size, "V": CANDIDATES.shape.V, "precision": config.precision},
            "compile_mode": config.compile_mode,
            "threads": setting.threads,
            "per": "step",
            "steps_per_round": ready.steps,
            "samples_per_second": 1e3 * config.batch_size / entry["ms"]["median"],
            **ready.facts,
        }
        if "floor_ms" in entry:
            entry["x_floor"] = entry["ms"]["median"] / entry["floor_ms"]
        return entry

    return Case(group, id, run)


def beside(name: str, plan: Plan) -> tuple[str, ...]:
    """With whom a step is compared: eager always, and whoever the project claims a ratio over."""
    if plan.device == "cpu":
        claimed = {"native": (BASELINE, REFERENCE, "compile-step"), BASELINE: (REFERENCE,), REFERENCE: (BASELINE,)}
    else:
        # The honest peer of the persistent kernel is the captured graph of the same phases.
        claimed = {"triton-persistent": (BASELINE, "triton-step"), BASELINE: ()}
    return claimed.get(name, (BASELINE,))


def candidates(plan: Plan) -> list[str]:
    """Every backend, and on the CPU the reference's way of working."""
    slow = ("compile-raw", "compile") if plan.dry else ()  # to compile
    names = [name for name in backends.REGISTRY if name not in slow]
    if plan.device == "cpu":
        return [REFERENCE, *names]
    # What a GPU is asked for first, in case the time does not suffice for all.
    return sorted(names, key=lambda name: not name.startswith("triton"))


def step_cases(plan: Plan) -> Iterator[Case]:
    """A training step of every backend at the default sizes, in every precision; on CUDA Inductor's come last."""

    def case(name: str, **settings: Any) -> Case:
        config = plan.config(**settings)
        mode = [config.compile_mode] if "compile_mode" in settings else []
        id = "-".join([name, str(config.batch_size), config.precision, *mode])
        return step_case("step", id, name, Setting(config), beside(name, plan), plan)

    def is_slow(name: str) -> bool:
        return plan.device == "cuda" and name.startswith("compile")

    names = candidates(plan)
    for precision in plan.precisions:
        yield from (case(name, precision=precision) for name in names if not is_slow(name))
    slow = [name for name in names if is_slow(name)]
    for precision in plan.precisions if plan.full else plan.precisions[:1]:
        yield from (replace(case(name, precision=precision), slow=True) for name in slow)
    if plan.device == "cuda":
        # torch.compile at its best, whichever of its modes that is.
        for mode in ("reduce-overhead", "max-autotune"):
            yield replace(case("compile", compile_mode=mode), slow=True)


def thread_cases(plan: Plan) -> Iterator[Case]:
    """A training step on one thread of the CPU."""
    if plan.device != "cpu":
        return
    setting = Setting(plan.config(), threads=1)
    for name in (BASELINE, "compile-step", "native"):
        id = f"{name}-{setting.config.batch_size}-fp32-1-thread"
        yield step_case("threads", id, name, setting, beside(name, plan), plan)


def sweep_cases(plan: Plan) -> Iterator[Case]:
    """A training step over swept sizes: B, H, T and V one at a time."""
    fastest = ["triton-persistent", "triton-step"] if plan.device == "cuda" else ["native"]
    names = [name for name in backends.REGISTRY if name != BASELINE] if plan.full else fastest
    sizes = (16, 32) if plan.dry else SWEPT_SIZES
    batches = (*sizes, LARGEST_BATCH) if plan.device == "cuda" and not plan.dry else sizes
    swept: list[tuple[str, list[Setting]]] = [
        ("B", [Setting(plan.config(batch_size=size)) for size in batches]),
        ("H", [Setting(plan.config(hidden_size=size)) for size in sizes]),
    ]
    if plan.full:
        lengths, vocabularies = ((2, 3), (11, 27)) if plan.dry else ((1, 2, 4, 8, 16), (27, 64, 128, 256, 1024, 4096))
        swept += [
            ("T", [Setting(plan.config(context_length=length)) for length in lengths]),
            ("V", [Setting(plan.config(), vocab_size=size) for size in vocabularies]),
        ]
    for letter, settings in swept:
        for setting in settings:
            size = {
                "B": setting.config.batch_size,
                "H": setting.config.hidden_size,
                "T": setting.config.context_length,
                "V": setting.vocab_size,
            }[letter]
            for name in names:
                yield step_case("sweep", f"{name}-{letter}{size}", name, setting, (BASELINE,), plan, rounds=5)

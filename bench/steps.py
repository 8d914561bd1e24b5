"""Cases of training steps. A candidate is a backend, or the reference loop; it is checked against float64 first."""

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import lower_bound
from bench.case import Case, Entry, Plan, Skipped, Timer, Work, require_supported, timed_beside, waited
from bench.lower_bound import Probes, Synchronisation
from bench.reference_loop import ReferenceLoop
from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.measure.equivalence import BASELINE, Verifier
from mlp_fast.measure.profiling import profile_steps
from mlp_fast.measure.timing import seconds
from mlp_fast.model.mlp import Shape
from mlp_fast.model.windows import Tape

REFERENCE = ReferenceLoop.name
SWEPT_SIZES = (128, 256, 512, 1024, 2048, 4096)
LARGEST_BATCH = 8192  # that the step kernels take


@dataclass(frozen=True)
class Setting:
    """What the candidates of a step case share."""

    config: Config  # without its backend
    vocab_size: int | None = None  # of a random tape; None for the embedded corpus
    threads: int = field(default_factory=torch.get_num_threads)  # torch's


class Candidates:
    """The candidates of one setting, each compiled and checked once."""

    def __init__(self, setting: Setting) -> None:
        gc.collect()
        torch._dynamo.reset()  # its limit on compilations holds for the whole process
        torch.set_num_threads(setting.threads)
        self.setting, config = setting, setting.config
        if setting.vocab_size is None:
            self.corpus = load("embedded")
            V, tokens = len(self.corpus.vocabulary), self.corpus.train
        else:
            V = setting.vocab_size
            tokens = torch.randint(V, (100_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        self.shape = Shape.of(config, V)
        self.tape = Tape(tokens, self.shape.T)
        self.verifier = Verifier(config, self.shape, self.tape)
        self._ready: dict[str, tuple[Backend, int, Entry]] = {}

    def backend(self, name: str) -> tuple[Backend, Entry]:
        """The candidate of that name, prepared and checked, at the initial state; the time and the error of that.

        Raises:
            Skipped: it cannot run here.
            NotEquivalent: it computes something else.
        """
        config, initial, start = self.setting.config, self.verifier.initial, time.perf_counter()
        if name == REFERENCE:
            if config.device != "cpu" or config.precision != "fp32":
                raise Skipped("it is the reference on the CPU")
            backend: Backend = ReferenceLoop(config, self.shape, self.tape, initial, torch.device("cpu"))
        else:
            config = replace(config, backend=name)
            require_supported(name, config, self.shape)
            backend = backends.create(config, self.shape, self.tape, initial)
        backend.prepare()
        first = time.perf_counter() - start
        return backend, {"first_step_seconds": first, "loss_error": self.verifier.check(backend)}

    def ready(self, name: str, round_seconds: float, probes: Probes) -> tuple[Work, int, Entry]:
        """A round of the candidate of that name, set to the initial state; the steps of a round; facts for its entry.

        Raises as backend().
        """
        torch.set_num_threads(self.setting.threads)
        if name not in self._ready:
            backend, facts = self.backend(name)
            steps = self._steps_per_round(backend, round_seconds)
            on_device, sync = self._on_device(backend, steps) if backend.device.type == "cuda" else ({}, None)
            self._ready[name] = backend, steps, facts | on_device | self._least(name, probes, sync)
        backend, steps, facts = self._ready[name]
        backend.load(self.verifier.initial)
        return waited(partial(backend.advance, steps), backend.device), steps, facts

    def _least(self, name: str, probes: Probes, sync: Synchronisation | None) -> Entry:
        """The operations and bytes of a step, and, where the probes suffice, the lower bound of its time."""
        config = self.setting.config
        form = lower_bound.form_of(name, config.form, self.shape, config.batch_size)
        cost = lower_bound.step_cost(self.shape, config.batch_size, form)
        facts = {"form": form, **cost._asdict()}
        bound = lower_bound.step_bound(cost, probes, config.precision, self.setting.threads, sync)
        return facts | ({} if bound is None else {"floor_ms": bound.total, "floor_parts_ms": bound._asdict()})

    def _steps_per_round(self, backend: Backend, round_seconds: float) -> int:
        """The steps that fill a round; on CUDA whole evaluation intervals, as in training."""
        trial = 2 if backend.device.type == "cpu" else 200
        run = waited(partial(backend.advance, trial), backend.device)
        run()
        steps = round(round_seconds / (seconds(run) / trial))
        if trial == 200:
            steps = 200 * round(steps / 200)
        return min(max(steps, trial), 4000)

    def _on_device(self, backend: Backend, steps: int) -> tuple[Entry, Synchronisation]:
        """Device time and launches of a step by torch.profiler, and the launches or barriers of its lower bound."""
        # 200 steps are a whole captured graph; autograd has hundreds of operators a step, so 20 suffice.
        steps = min(steps, 20 if backend.name in lower_bound.GATHER_BACKENDS else 200)
        with tempfile.TemporaryDirectory() as folder:
            summary = profile_steps(backend, steps, Path(folder) / "trace.json")
        facts = {"device_ms": summary.busy / 1e3, "launches": summary.launches} if summary.device else {}
        kernels = getattr(getattr(backend, "kernels", None), "config", None)
        if backend.name == "triton-persistent" and kernels is not None:
            sync = Synchronisation(barriers=kernels.exchanges, programs=kernels.PROGRAMS)
            return facts | {"programs": kernels.PROGRAMS}, sync
        launches = facts.get("launches", 0.0)
        return facts, Synchronisation(launches=launches, captured=summary.host_launches < 0.5 * launches)


_HELD: list[Candidates] = []


def candidates(setting: Setting) -> Candidates:
    """The candidates of a setting. Only the latest setting's are kept: compiling is slow, and memory is finite."""
    if not _HELD or _HELD[0].setting != setting:
        _HELD.clear()
        _HELD.append(Candidates(setting))
    return _HELD[0]


def step_entry(backend: str, config: Config, shape: Shape, times: Entry, **facts: Any) -> Entry:
    """The entry of a training step: the backend, all sizes, compared() of its times, and more facts."""
    return {
        "backend": backend,
        "B": config.batch_size,
        **{letter: getattr(shape, letter) for letter in "TEHV"},
        "per": "step",
        "samples_per_second": 1e3 * config.batch_size / times["ms"]["median"],
        **times,
        **facts,
    }


def step_case(
    group: str, id: str, name: str, setting: Setting, others: Sequence[str], plan: Plan, rounds: int | None = None
) -> Case:
    """A step of one candidate, beside the same step of others."""

    def run(timer: Timer, probes: Probes) -> Entry:
        threads, config = torch.get_num_threads(), setting.config
        works, counts = {}, {}
        try:
            found = candidates(setting)
            work, steps, facts = found.ready(name, plan.round_seconds, probes)
            for other in others:
                with contextlib.suppress(Skipped):  # it has a case of its own, which says why
                    works[other], counts[other], _ = found.ready(other, plan.round_seconds, probes)
            times = timed_beside(timer, work, works, rounds or plan.rounds, steps, counts)
        finally:
            torch.set_num_threads(threads)
        if "floor_ms" in facts:
            facts = facts | {"x_floor": times["ms"]["median"] / facts["floor_ms"]}
        settings = {"precision": config.precision, "compile_mode": config.compile_mode, "threads": setting.threads}
        return step_entry(name, config, found.shape, times, steps_per_round=steps, **settings, **facts)

    return Case(group, id, run)


def beside(name: str, plan: Plan) -> tuple[str, ...]:
    """What a step is compared with: eager always, and all that the project promises a ratio over."""
    if plan.device == "cpu":
        promised = {"native": (BASELINE, REFERENCE, "compile-step"), BASELINE: (REFERENCE,)}
    else:
        # triton-step is the captured graph of the same phases.
        promised = {"triton-persistent": (BASELINE, "triton-step"), BASELINE: ()}
    return promised.get(name, (BASELINE,))


def step_cases(plan: Plan) -> Iterator[Case]:
    """A training step of every backend at the default sizes, in every precision; on CUDA Inductor's come last."""
    cuda = plan.device == "cuda"

    def case(name: str, precision: str = "fp32", slow: bool = False, **mode: str) -> Case:
        config = plan.config(precision=precision, **mode)
        id = "-".join([name, str(config.batch_size), precision, *mode.values()])
        return replace(step_case("step", id, name, Setting(config), beside(name, plan), plan), slow=slow)

    names = [name for name in backends.REGISTRY if not (plan.dry and name in ("compile-raw", "compile"))]  # so slow
    # On a GPU Triton's come first, in case the time does not suffice for all.
    names = sorted(names, key=lambda name: not name.startswith("triton")) if cuda else [REFERENCE, *names]
    slow = [name for name in names if cuda and name.startswith("compile")]
    for precision in plan.precisions:
        yield from (case(name, precision) for name in names if name not in slow)
    for precision in plan.precisions if plan.full else plan.precisions[:1]:
        yield from (case(name, precision, slow=True) for name in slow)
    if cuda:  # the other modes of torch.compile
        yield from (case("compile", slow=True, compile_mode=mode) for mode in ("reduce-overhead", "max-autotune"))


def thread_cases(plan: Plan) -> Iterator[Case]:
    """A training step on one thread of the CPU."""
    setting = Setting(plan.config(), threads=1)
    for name in (BASELINE, "compile-step", "native") if plan.device == "cpu" else ():
        id = f"{name}-{setting.config.batch_size}-fp32-1-thread"
        yield step_case("threads", id, name, setting, beside(name, plan), plan)


def sweep_cases(plan: Plan) -> Iterator[Case]:
    """A training step over swept sizes, one of B, H, T and V at a time."""
    fastest = ["triton-persistent", "triton-step"] if plan.device == "cuda" else ["native"]
    names = [name for name in backends.REGISTRY if name != BASELINE] if plan.full else fastest
    sizes = (16, 32) if plan.dry else SWEPT_SIZES
    batches = (*sizes, LARGEST_BATCH) if plan.device == "cuda" and not plan.dry else sizes
    lengths, vocabularies = ((2, 3), (11, 27)) if plan.dry else ((1, 2, 4, 8, 16), (27, 64, 128, 256, 1024, 4096))
    swept = {f"B{size}": Setting(plan.config(batch_size=size)) for size in batches}
    swept |= {f"H{size}": Setting(plan.config(hidden_size=size)) for size in sizes}
    if plan.full:
        swept |= {f"T{length}": Setting(plan.config(context_length=length)) for length in lengths}
        swept |= {f"V{size}": Setting(plan.config(), vocab_size=size) for size in vocabularies}
    for size, setting in swept.items():
        for name in names:
            yield step_case("sweep", f"{name}-{size}", name, setting, (BASELINE,), plan, rounds=5)

"""The step kernels in the emulator: a run of steps, and the rules that its outcome is held to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from emulator import Emulator, Finding, Schedule
from steps import Problem, Reference, problem
from torch import Tensor

from mlp_fast.kernels import persistent_step, train_step
from mlp_fast.kernels._aot import PROCESSORS
from mlp_fast.kernels.persistent_step import PersistentStep
from mlp_fast.kernels.train_step import StepConfig, TrainStep
from mlp_fast.model.schedule import update_scalars

Sizes = tuple[int, int, int, int, int]  # B, V, T, E, H
DEFAULT: Sizes = (128, 27, 3, 48, 512)
# What a GPU may do at its worst, one thing with the other; racing loads return NaN.
ADVERSE = Schedule(seed=11, policy="skewed", quantum=200, stale_l1=True, late_stores=True, poison_racing=True)
AHEAD, BEHIND = (replace(ADVERSE, policy=policy, favoured=1, seed=12) for policy in ("ahead", "behind"))


@dataclass
class Outcome:
    """What a run in the emulator left."""

    losses: Tensor
    planes: list[list[Tensor]]
    replicas: Tensor
    findings: list[Finding]
    kernels: Any = None

    @property
    def bits(self) -> list[Tensor]:
        """All results, as integers: NaN is equal to itself."""
        tensors = [self.losses, self.replicas, *(tensor for plane in self.planes for tensor in plane)]
        return [tensor.contiguous().view(torch.int32) for tensor in tensors]


@dataclass(frozen=True)
class Case:
    """A configuration of the step kernels, and the problem that they run on."""

    sizes: Sizes = DEFAULT
    form: str = "step"  # step or persistent
    capability: int = 90
    precision: str = "fp32"
    deterministic: bool = True
    rows: bool | None = None  # None: as the launcher chooses
    tiles: tuple[tuple[str, int], ...] = ()
    steps: int = 2
    tokens: int = 300

    @property
    def config(self) -> StepConfig:
        """As the launchers choose it, but for what the case fixes."""
        options: dict[str, Any] = {"precision": self.precision, "deterministic": self.deterministic}
        options["processors"] = PROCESSORS[self.capability]
        changes: dict[str, Any] = dict(self.tiles) | {} if self.rows is None else dict(self.tiles) | {"rows": self.rows}
        if self.form == "step":
            return replace(train_step.default_config(*self.sizes, **options), **changes)
        C = persistent_step.default_config(*self.sizes, **options, capability=self.capability)
        return replace(C, **changes)

    @property
    def task(self) -> Problem:
        """The problem."""
        return problem(*self.sizes, n=self.tokens, reduction="deterministic" if self.deterministic else "fast")

    def __str__(self) -> str:
        parts = [self.form, "x".join(map(str, self.sizes)), f"sm{self.capability}", self.precision]
        parts += ["fast"] if not self.deterministic else []
        parts += ["rows"] if self.rows else []
        return "-".join(parts)


@cache
def reference(sizes: Sizes, tokens: int, steps: int) -> tuple[Reference, Tensor]:
    """The float64 run beside eager's, and its losses."""
    made = Reference(problem(*sizes, n=tokens))
    return made, made.advance(steps)


def run_case(
    case: Case, schedule: Schedule, mutate: Callable[[str, str], str] | None = None,
    prepare: Callable[[Problem], None] | None = None,
) -> Outcome:  # fmt: skip
    """So many steps of a case; `prepare` changes the problem's state before."""
    task = case.task
    if prepare:
        prepare(task)
    with Emulator(case.capability, schedule, mutate) as emulator:
        cls = TrainStep if case.form == "step" else PersistentStep
        kernels = cls(case.config, task.tape.tokens, update_scalars(task.config))
        kernels.load(task.planes, task.state.step)
        kernels.run(case.steps)
    if isinstance(kernels, PersistentStep):
        kernels.wait()
    return Outcome(
        kernels.buffers.losses[: case.steps], kernels.planes(), kernels.buffers.replicas, emulator.findings, kernels
    )


def check_against_float64(case: Case, outcome: Outcome) -> None:
    """Every tensor is at most twice as far from float64 as eager in fp32 is, and 1e-6; the replicas of wte are equal.

    TF32 rounds operands to 10 bits, so a run in it is held to that: 2^-11 of the numbers that it adds up.
    """
    true, losses = reference(case.sizes, case.tokens, case.steps)
    first = outcome.replicas[:1]
    assert torch.equal(first.expand_as(outcome.replicas), outcome.replicas), "the replicas of wte differ"
    if case.precision == "tf32":
        torch.testing.assert_close(outcome.losses.double(), losses, rtol=0, atol=2e-3)
        for ours, exact in zip(outcome.planes, true.truth.planes(), strict=True):
            for a, b in zip(ours, exact, strict=True):
                assert (a.double() - b).norm() <= 4e-3 * b.norm() + 1e-6
        return
    torch.testing.assert_close(outcome.losses.double(), losses, rtol=0, atol=2e-6)
    true.check(outcome.planes)


def undefined(findings: Iterable[Finding]) -> list[str]:
    """Findings that no comparison of bits can excuse."""
    return [str(finding) for finding in findings if not finding.may_be_harmless]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two runs have left the same."""
    return all(map(torch.equal, a, b))

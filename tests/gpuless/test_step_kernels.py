"""The step kernels as compiled, in the emulator: against float64, under schedules that are out to break them.

The rule of races is one of behaviour: a finding is an error unless both sides write the same value, or replacing what
the racing load returns by NaN changes no bit (`poison_racing`; the runs compared below).
"""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from emulator import Schedule
from kernels_under_test import (
    ADVERSE,
    AHEAD,
    BEHIND,
    Case,
    check_against_float64,
    run_case,
    same_bits,
    undefined,
)
from steps import Problem

from mlp_fast.model.mlp import W1, WTE

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

SMALL = (("BLOCK_B", 16), ("BLOCK_V", 16), ("BLOCK_E", 16))
GROUPED = (*SMALL, ("R", 2))
TWO_TILES = (20, 5, 1, 16, 32)  # B, V, T, E, H
FORMS = [
    Case(TWO_TILES, "step", tiles=SMALL),
    Case(TWO_TILES, "persistent", tiles=SMALL),
    Case(TWO_TILES, "persistent", rows=True, tiles=SMALL),
    Case(TWO_TILES, "persistent", tiles=GROUPED),
    pytest.param(Case(TWO_TILES, "step", tiles=GROUPED), marks=pytest.mark.long),
    pytest.param(Case(TWO_TILES, "step", rows=True, tiles=SMALL), marks=pytest.mark.long),
]
ODD, LARGE, WIDE = (19, 29, 2, 13, 37), (320, 27, 3, 48, 512), (33, 65, 2, 20, 130)


def check(case: Case, *schedules: Schedule) -> None:
    """Under all schedules: the figures of float64, no finding but harmless ones, and the same bits."""
    outcomes = [run_case(case, schedule) for schedule in schedules]
    for outcome in outcomes:
        assert undefined(outcome.findings) == []
        check_against_float64(case, outcome)
        if case.deterministic:
            assert same_bits(outcomes[0].bits, outcome.bits)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "steps"), [("fp32", 2), *(pytest.param(p, 3, marks=pytest.mark.long) for p in ("fp32", "tf32x3"))]
)
def test_the_default_steps_follow_float64(precision: str, steps: int) -> None:
    """128 programs. One run: no load may race here, so there is nothing to replace by NaN and compare."""
    case = Case(form="persistent", precision=precision, steps=steps, tokens=2000)
    assert (case.config.G, case.config.R) == (32, 4)
    outcome = run_case(case, ADVERSE)
    assert [str(finding) for finding in outcome.findings if not finding.same_value] == []
    check_against_float64(case, outcome)


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_every_form_follows_float64_under_every_schedule(case: Case) -> None:
    check(replace(case, steps=3), Schedule(), Schedule(policy="rotation", quantum=5), ADVERSE, AHEAD, BEHIND)


CASES = [
    *(
        Case(form=form, capability=capability, precision=precision)
        for form in ("step", "persistent")
        for capability, precisions in (
            (75, ("fp32",)),
            (80, ("fp32", "tf32x3", "tf32")),
            (90, ("fp32", "tf32x3", "tf32")),
        )
        for precision in precisions
    ),
    *(
        Case(form=form, capability=100, precision=p)
        for form in ("step", "persistent")
        for p in ("fp32", "tf32x3", "tf32")
    ),
    *(Case(form=form, deterministic=False, capability=c) for form in ("step", "persistent") for c in (75, 80, 90, 100)),
    *(Case(LARGE, form, tokens=1000) for form in ("step", "persistent")),
    *(Case(ODD, form, tiles=(*SMALL, ("BLOCK_H", 16), ("G", 2)), steps=3) for form in ("step", "persistent")),
    *(Case(ODD, form, precision="tf32x3", rows=True, steps=3) for form in ("step", "persistent")),
    *(Case(WIDE, form, precision="tf32x3", capability=80) for form in ("step", "persistent")),
    Case((5, 200, 1, 100, 70), "step"),
    Case((50, 5, 2, 4, 8), "persistent", tokens=9, steps=3),  # the windows wrap round the tape more than once
    *(Case((1, 1, 1, 1, 1), form, steps=3) for form in ("step", "persistent")),
    *(Case((1, 2, 16, 3, 5), form, steps=3) for form in ("step", "persistent")),
]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_follow_float64(case: Case) -> None:
    check(case, Schedule(), ADVERSE)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "tf32x3"])
def test_errors_of_approximate_instructions_do_not_add_up(precision: str) -> None:
    """Exponentials and quotients off by up to 2 ulp, which is what PTX allows."""
    check(Case(form="persistent", precision=precision), Schedule(approximation=2))


# --- what diverges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_a_gradient_that_does_not_fit_ends_in_one_way(case: Case) -> None:
    """Finite logits, and partial sums of dwte past 2^11: the step's own loss is finite, from the next on all is NaN."""

    def huge(task: Problem) -> None:
        task.state.parameters[WTE].mul_(1e-7)
        task.state.parameters[W1].mul_(1e7)

    outcomes = []
    for seed in range(24):
        policy = ("random", "skewed", "ahead", "behind")[seed % 4]
        schedule = Schedule(seed, policy, quantum=(20, 100, 400)[seed % 3], favoured=seed % 3, races=False)
        outcomes.append(run_case(case, schedule, prepare=huge))
    first = outcomes[0]
    assert first.losses.isfinite().tolist() == [True, False]
    assert all(same_bits(first.bits, other.bits) for other in outcomes[1:])
    assert all(tensor.isnan().all() for tensor in first.planes[0])

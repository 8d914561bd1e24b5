"""The step kernels as compiled, in the emulator: against float64, under schedules that are out to break them.

The rule of races is one of behaviour: a finding is an error unless both sides write the same value, or replacing what
the racing load returns by NaN changes no bit (`poison_racing`; the runs compared below).
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from emulator import Schedule
from kernels_under_test import (
    ADVERSE,
    AHEAD,
    BEHIND,
    DEFAULT,
    Case,
    check_against_float64,
    run_case,
    same_bits,
    undefined,
)
from steps import Problem

from mlp_fast.models import W1, WTE

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

SMALL = (("BLOCK_B", 16), ("BLOCK_V", 16), ("BLOCK_E", 16))
ONE_TILE = (20, 5, 1, 16, 32)
FORMS = (
    Case(ONE_TILE, "step", tiles=SMALL),
    Case(ONE_TILE, "persistent", tiles=SMALL),
    Case(ONE_TILE, "resident", tiles=SMALL),
    Case(ONE_TILE, "step", rows=True, tiles=SMALL),
    Case(ONE_TILE, "persistent", rows=True, tiles=SMALL),
    Case(ONE_TILE, "resident", rows=True, tiles=SMALL),
)


# --- what diverges -----------------------------------------------------------------------------------------------------


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

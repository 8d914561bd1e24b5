"""Each half of the grid barrier matters: with any of them taken out or weakened, the emulator says so.

The arrival's release, the look's acquire, the waiting and its count are changed one by one in the PTX. A mutant is
noticed by a finding, by other bits, or by a barrier that times out.
"""

import pytest

pytest.importorskip("triton")

from kernels_under_test import ADVERSE, AHEAD, BEHIND, Case, Outcome, run_case, same_bits, undefined
from mutants import Mutant, mutants_of, recorder

from mlp_fast.kernels.persistent_step import BarrierTimeout

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

SMALL = (("BLOCK_B", 16), ("BLOCK_V", 16), ("BLOCK_E", 16))
TWO_TILES = (20, 5, 1, 16, 32)  # B, V, T, E, H


def noticed(case: Case, plain: Outcome, mutant: Mutant) -> bool:
    for schedule in (ADVERSE, AHEAD, BEHIND):
        try:
            outcome = run_case(case, schedule, mutant)
        except BarrierTimeout:
            return True
        if undefined(outcome.findings) or not same_bits(outcome.bits, plain.bits):
            return True
    return False


@pytest.mark.parametrize(
    ("form", "rows"),
    [("persistent", True), *(pytest.param(form, None, marks=pytest.mark.long) for form in ("persistent", "resident"))],
)
def test_every_half_of_a_grid_barrier_is_missed(form: str, rows: bool | None) -> None:
    case = Case(TWO_TILES, form, rows=rows, tiles=SMALL)
    texts: dict[str, str] = {}
    plain = run_case(case, ADVERSE, recorder(texts))
    assert undefined(plain.findings) == []
    mutants = mutants_of(texts)
    assert len(mutants) == 4 * (3 if rows else 2)
    assert [str(mutant) for mutant in mutants if not noticed(case, plain, mutant)] == []

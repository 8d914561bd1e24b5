"""Barriers matter: with any of them taken out or weakened, the emulator says so.

The arrival's release, the look's acquire, the waiting and its count, and every block barrier are changed one by one in
the PTX. A mutant is noticed by a finding, by other bits, or by a barrier that times out. What is not noticed must be
redundant in compiled code, where Triton puts barriers of its own beside those of the source; why_redundant() says how.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from emulator import Emulator, Finding, Schedule
from kernels_under_test import ADVERSE, AHEAD, BEHIND, Case, run_case, same_bits
from mutants import BARRIERS, COUNTS, ORDERS, Mutant, mutants_of, recorder, why_redundant
from test_evaluation_kernels import model, windows
from test_operator_kernels import randint, randn

from mlp_fast.kernels import embed_linear_tanh, linear_cross_entropy
from mlp_fast.kernels import inference as evaluation
from mlp_fast.kernels.persistent_step import BarrierTimeout

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

SMALL = (("BLOCK_B", 16), ("BLOCK_V", 16), ("BLOCK_E", 16))
GROUPED = (*SMALL, ("R", 2))
TWO_TILES = (20, 5, 1, 16, 32)  # B, V, T, E, H
Change = Callable[[str, str], str]
# Runs kernels under a schedule, with a change of their PTX: what was found, and the results.
Run = Callable[[Schedule, Change], tuple[list[Finding], list[Tensor]]]


def of_steps(case: Case) -> Run:
    def run(schedule: Schedule, change: Change) -> tuple[list[Finding], list[Tensor]]:
        outcome = run_case(case, schedule, change)
        return outcome.findings, outcome.bits

    return run


def of(kernels: Callable[[], Sequence[Tensor | None]]) -> Run:
    def run(schedule: Schedule, change: Change) -> tuple[list[Finding], list[Tensor]]:
        with Emulator(90, schedule, change) as emulator:
            results = kernels()
        return emulator.findings, [
            tensor.clone().reshape(-1).view(torch.uint8) for tensor in results if tensor is not None
        ]

    return run


def noticed(run: Run, plain: list[Tensor], mutant: Mutant) -> bool:
    for schedule in (ADVERSE, AHEAD, BEHIND):
        try:
            findings, results = run(replace(schedule, most_instructions=20_000_000), mutant)
        except BarrierTimeout:
            return True
        # The kernels as they are have no racing load, so here one is enough.
        if any(not finding.same_value for finding in findings) or not same_bits(results, plain):
            return True
    return False


def plain_run(run: Run) -> tuple[dict[str, str], list[Tensor]]:
    """PTX by kernel, and the results of the kernels as they are."""
    texts: dict[str, str] = {}
    findings, results = run(ADVERSE, recorder(texts))
    assert [str(finding) for finding in findings if not finding.same_value] == []
    return texts, results


def check_barriers(run: Run, part: slice = slice(None)) -> None:
    """Every mutant, or a part of them, is noticed or redundant; and most are not redundant."""
    texts, plain = plain_run(run)
    mutants = mutants_of(texts, (*BARRIERS, *COUNTS))[part]
    missed = [mutant for mutant in mutants if not noticed(run, plain, mutant)]
    unexplained = [str(mutant) for mutant in missed if why_redundant(mutant, texts[mutant.kernel]) is None]
    assert unexplained == []
    assert len(missed) < len(mutants) / 2


@pytest.mark.parametrize(
    ("form", "rows", "tiles"),
    [
        ("persistent", True, SMALL),
        *(pytest.param("persistent", None, tiles, marks=pytest.mark.long) for tiles in (SMALL, GROUPED)),
    ],
)
def test_every_half_of_a_grid_barrier_is_missed(
    form: str, rows: bool | None, tiles: tuple[tuple[str, int], ...]
) -> None:
    case = Case(TWO_TILES, form, rows=rows, tiles=tiles)
    run = of_steps(case)
    texts, plain = plain_run(run)
    mutants = mutants_of(texts)
    assert len(mutants) == 4 * case.config.exchanges
    assert [str(mutant) for mutant in mutants if not noticed(run, plain, mutant)] == []


def test_a_part_of_the_block_barriers_is_missed() -> None:
    """The quick form of the next test: every sixth barrier of one kernel."""
    check_barriers(of_steps(Case(TWO_TILES, "persistent", tiles=SMALL)), slice(1, None, 6))


@pytest.mark.long
@pytest.mark.parametrize("rows", [None, True], ids=["redundant", "rows"])
@pytest.mark.parametrize("form", ["step", "persistent"])
def test_every_block_barrier_is_missed_or_redundant(form: str, rows: bool | None) -> None:
    check_barriers(of_steps(Case(TWO_TILES, form, rows=rows, tiles=SMALL, steps=3)))


@pytest.mark.parametrize("rows", [None, True], ids=["redundant", "rows"])
def test_what_release_and_acquire_protect(rows: bool | None) -> None:
    """docs/kernels.md tells it. No detector here, only numbers: L1 keeps its lines, stores come late, 8 schedules."""
    run = of_steps(Case(TWO_TILES, "persistent", rows=rows, tiles=SMALL, steps=3))

    def right(what: str | None) -> list[bool]:
        def change(ptx: str, kernel: str) -> str:
            for name, pattern, becomes in ORDERS:
                ptx = pattern.sub(becomes, ptx) if name == what else ptx
            return ptx

        schedules = [
            Schedule(seed, "skewed", quantum=200, races=False, stale_l1=True, late_stores=True) for seed in range(8)
        ]
        return [same_bits(run(schedule, change)[1], plain) for schedule in schedules]

    _, plain = plain_run(run)
    assert right(None) == [True] * 8
    # Late are dlogits by rows, and the zeros that clear a sum: the latter harm only who comes late with them.
    unreleased = right("arrival does not release")
    assert not any(unreleased) if rows else not all(unreleased)
    # Sums are refreshed by the program's own atomic additions; what plain loads share, dlogits by rows, is not.
    assert right("look does not acquire") == [not rows] * 8


# --- evaluation and operators ----------------------------------------------------------------------------------------


def evaluated() -> list[Tensor | None]:
    weights, _ = model((29, 3, 13, 70))
    rows = windows((29, 3, 13, 70), 133)
    finished, counts = torch.zeros(1, dtype=torch.int32), torch.ones(133, dtype=torch.float64)
    return [evaluation.logits(weights, rows[:, :3]), evaluation.mean_loss(weights, rows, counts, finished)]


def sampled() -> list[Tensor | None]:
    return [evaluation.sample(model((29, 3, 13, 70))[0], [1, 2, 3], 4, 42)]


def embedded(form: str, V: int) -> Callable[[], list[Tensor | None]]:
    def run() -> list[Tensor | None]:
        idx, wte, bias, dh = randint(V, 70, 3), randn(V, 20), randn(40, seed=2), randn(70, 40, seed=4)
        weight = randn(40, 60, seed=1, scale=0.1)
        h = embed_linear_tanh.embed_linear_tanh_fwd(idx, wte, weight, bias, form, "fp32")
        return [h, *embed_linear_tanh.embed_linear_tanh_bwd(dh, h, idx, wte, weight, form, "fp32", True, True)]

    return run


def cross_entropy() -> list[Tensor | None]:
    h, weight, bias, targets = randn(70, 100), randn(80, 100, seed=1, scale=0.1), randn(80, seed=2), randint(80, 70)
    loss, lse = linear_cross_entropy.linear_cross_entropy_fwd(h, weight, bias, targets, "fp32")
    one = torch.ones(())
    grads = linear_cross_entropy.linear_cross_entropy_bwd(one, lse, h, weight, bias, targets, "fp32", True, True)
    return [loss, *grads]


@pytest.mark.long
@pytest.mark.parametrize(
    "kernels",
    [evaluated, sampled, embedded("table", 27), embedded("table", 80), embedded("gather", 27), cross_entropy],
    ids=["evaluation", "sample", "table", "large table", "gather", "cross entropy"],
)
def test_every_barrier_of_the_other_kernels_is_missed_or_redundant(
    kernels: Callable[[], Sequence[Tensor | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "MIN_PROGRAMS", 1)  # each goes through all blocks
    check_barriers(of(kernels))

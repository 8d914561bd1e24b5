"""What a step asks for, as the ladder shows it: the counters count, and the model of docs/kernels.md adds up."""

import re
from pathlib import Path

import pytest
import torch

from bench import rungs
from mlp_fast.errors import UserError

KERNELS = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def test_operators_that_compute_are_counted() -> None:
    a, b = torch.ones(10, 10), torch.ones(10, 10)
    with rungs.Operators() as operators:
        c = a + b
        c.t().view(10, 10).add_(1)
        torch.empty(1000)
    assert operators.count == 2


def test_kernels_of_compiled_code_are_counted() -> None:
    with rungs.compiled() as kernels:
        torch.compile(lambda x: ((x + 1).sin() * 2).relu())(torch.ones(1000))
    assert len(kernels) == 1


def test_a_step_of_the_operators_launches_their_kernels_and_what_is_torchs() -> None:
    pytest.importorskip("triton")
    assert rungs.count("triton-op") == 25


def test_a_step_of_the_step_kernels_is_three_launches_and_a_run_of_the_persistent_one_is_one() -> None:
    pytest.importorskip("triton")
    assert rungs.count("triton-step") == 3 + 1 / rungs.RUN
    assert rungs.count("triton-persistent") == 1 / rungs.RUN


def test_an_unknown_rung_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="'auto' is no rung; choose some of eager-raw"):
        rungs.main(["auto"])


def rows_below(heading: str) -> list[list[str]]:
    """The table of a section of docs/kernels.md: the first three cells of its rows."""
    text = KERNELS.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0].split("<!-- bench")[0]
    found = re.findall(r"^\|.*\|$", text, re.MULTILINE)[2:]
    return [[cell.strip() for cell in row.split("|")[1:4]] for row in found]


def test_the_model_of_the_step_kernels_adds_up() -> None:
    sizes = {"B": 128, "V": 27, "T": 3, "E": 48, "H": 512, "G": 32}
    rows = rows_below("Operations and bytes")
    phases = {name: (work, float(kib.replace(",", ""))) for name, work, kib in rows}
    total_work, total_kib = phases.pop("sum")
    products = 0.0
    for name, (work, _) in phases.items():
        if " = " in work:
            formula, figure = work.split(" = ")
            operations = eval(formula.replace("·", "*"), sizes.copy())
            assert f"{operations / 1e6:.2f}" == figure.split()[0], name
            products += operations if figure.endswith(" M") else 0
    assert f"{products / 1e6:.1f} M" == total_work
    assert sum(kib for _, kib in phases.values()) == total_kib


@pytest.mark.parametrize(("column", "fma", "tf32", "clock"), [(1, 64, 512, 1.41e3), (2, 128, 1024, 1.75e3)])
def test_the_model_of_a_step_s_time_follows_from_its_assumptions(
    column: int, fma: int, tf32: int, clock: float
) -> None:
    G, padded, kib, kept = 32, 22e6, 11_585 * 1024, 1.7e6
    expected = {
        "multiply-adds, fp32": padded / (G * fma * clock),
        "multiply-adds, tf32x3": 3 * padded / (G * tf32 * clock),
        "bytes, through L2": kib / (G * 64 * clock),
        "bytes, resident": (kib - kept) / (G * 64 * clock),
        "two waits": 2 * 1.3,
    }
    shown = {row[0]: float(row[column]) for row in rows_below("What a model from operations and bytes says")}
    for name, microseconds in expected.items():
        assert shown[name] == pytest.approx(microseconds, abs=0.051), name
    for precision in ("fp32", "tf32x3"):
        parts = (f"multiply-adds, {precision}", "bytes, resident", "two waits")
        assert shown[f"sum, {precision}, resident"] == pytest.approx(sum(shown[part] for part in parts), abs=0.01)

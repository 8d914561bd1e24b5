"""What a step asks for, as the ladder shows it: the counters count, and the model of docs/kernels.md adds up."""

import re
from pathlib import Path

import pytest
import torch

from bench import rungs
from mlp_fast.errors import UserError

KERNELS = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def test_operators_that_compute_are_counted_with_what_they_read_and_write() -> None:
    count = rungs.Count()
    a, b = torch.ones(10, 10), torch.ones(10, 10)
    with rungs._Operators(count):
        c = a + b
        c.t().view(10, 10).add_(1)
        torch.empty(1000)
    assert count == rungs.Count(launches=2, bytes=400 * (3 + 2))


def test_kernels_of_compiled_code_are_counted_with_what_they_read_and_write() -> None:
    count = rungs.Count()
    with rungs._compiled(count):
        torch.compile(lambda x: ((x + 1).sin() * 2).relu())(torch.ones(1000))
    assert count == rungs.Count(launches=1, bytes=4000 * 2)


def test_a_step_of_the_step_kernels_is_two_launches_and_a_run_of_the_persistent_one_is_one() -> None:
    step, run = rungs.count("triton-step"), rungs.count("triton-persistent")
    assert step.launches == 2 + 1 / rungs.RUN
    assert run.launches == 1 / rungs.RUN
    assert run.bytes < step.bytes  # it keeps moments in registers


def test_an_unknown_rung_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="'auto' is no rung; choose some of eager-raw"):
        rungs.main(["auto"])


def test_the_model_of_the_step_kernels_adds_up() -> None:
    sizes = {"B": 128, "V": 27, "T": 3, "E": 48, "H": 512, "G": 32}
    text = KERNELS.read_text(encoding="utf-8").split("## Operations and bytes")[1].split("## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    phases = {name: (work, float(kib.replace(",", ""))) for name, work, kib in rows[2:]}
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
    # Every load and store, counted; the model leaves out tokens, and rows of wte that a program reads again.
    assert total_kib * 1024 < rungs.count("triton-step").bytes < 1.15 * total_kib * 1024

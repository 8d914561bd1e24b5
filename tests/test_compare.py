"""compare: its numbers, its refusals, its files, its errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backends import Slow, Unsteady, Wrong, register

from mlp_fast import compare
from mlp_fast.errors import UserError
from mlp_fast.measure.comparison import cut
from mlp_fast.measure.timing import Spread

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--embedding-size", "4", "--hidden-size", "8", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture
def extra_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Slow, Wrong, Unsteady)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "results.json"
    code = compare.main([*SMALL, "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


def by_name(record: dict[str, Any]) -> dict[str, Any]:
    return {result["backend"]: result for result in record["results"]}


@pytest.mark.usefixtures("extra_backends")
def test_a_known_time_is_reported_and_the_ratio_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, "--backends", "slow", "--num-steps", "40")
    assert code == 0
    results = by_name(record)
    assert list(results) == ["eager", "slow"]  # the baseline comes along unasked
    slow, eager = results["slow"], results["eager"]
    truth = Spread.of(Slow.rounds[-20:])
    assert slow["ms_per_step"] == pytest.approx(dataclasses.asdict(truth), rel=0.05)
    assert (truth.min >= 4, truth.median >= 5, truth.max >= 7) == (True, True, True)
    assert slow["x_eager"] == pytest.approx(eager["ms_per_step"]["median"] / slow["ms_per_step"]["median"])
    assert eager["x_eager"] == 1
    assert slow["loss_difference"] == 0
    assert slow["repeatable"] is True
    assert slow["compile_seconds"] > 0.004
    assert record["versions"]["torch"] == torch.__version__
    assert {"device", "driver", "commit", "date"} <= set(record)
    assert f"| slow | {slow['ms_per_step']['median']:.4f} |" in capsys.readouterr().out


@pytest.mark.usefixtures("extra_backends")
def test_a_wrong_backend_gets_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = run(tmp_path, "--backends", "eager,wrong", "--num-steps", "20")
    assert code == 1
    wrong = by_name(record)["wrong"]
    assert wrong["ms_per_step"] is None
    assert wrong["x_eager"] is None
    assert "exp_avg of mlp.2.bias" in wrong["refused"]
    out = capsys.readouterr().out
    assert "| wrong | not equivalent | - | - |" in out
    assert "no number: wrong is not equivalent" in out


@pytest.mark.usefixtures("extra_backends")
def test_what_does_not_repeat_its_bits_is_told(tmp_path: Path) -> None:
    _, record = run(tmp_path, "--backends", "eager,unsteady", "--num-steps", "20")
    results = by_name(record)
    assert results["unsteady"]["repeatable"] is False
    assert results["unsteady"]["loss_difference"] > 0
    assert results["eager"]["repeatable"] is True


def test_aliases_are_resolved_and_none_is_run_twice(tmp_path: Path) -> None:
    _, record = run(tmp_path, "--backends", "eager-raw,eager,eager-raw", "--num-steps", "3")
    assert [result["backend"] for result in record["results"]] == ["eager-raw", "eager"]
    assert record["config"]["hidden_size"] == 8


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    run(tmp_path, "--backends", "eager-raw", "--num-steps", "2", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "eager,quick"], "'quick' is unknown"),
        (["--backends", " , "], "--backends names none"),
        (["--backends", "eager", "--precision", "tf32"], "choose fp32"),
        (["--backends", "eager", "--num-steps", "0"], "--num-steps must be at least 1"),
        (["--backends", "eager", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: cannot write it"),
        (["--backends", "eager", "--plot", "times.txt"], "must end in"),
        (["--backends", "eager", "--data", "/nowhere"], "/nowhere"),
        (["--surprise"], "--surprise"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        compare.main([*SMALL, *arguments])
    assert "\n" not in str(error.value)


def test_steps_are_cut_evenly() -> None:
    assert cut(23, 10) == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert cut(3, 10) == [1, 1, 1]

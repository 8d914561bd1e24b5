"""profile: what it reads out of a trace, and the command on the CPU."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mlp_fast import profile
from mlp_fast.errors import UserError
from mlp_fast.measure import profiling

SMALL = ["--embedding-size", "4", "--hidden-size", "8", "--batch-size", "16", "--device", "cpu"]


def event(name: str, cat: str, start: float, duration: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": duration, "pid": 1, "tid": tid}


def test_kernels_launches_and_gaps_of_a_gpu_trace() -> None:
    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            event("steps", "user_annotation", 100, 100),
            event("steps", "gpu_user_annotation", 105, 90, tid=7),
            event("aten::mm", "cpu_op", 100, 20),
            event("cudaLaunchKernel", "cuda_runtime", 102, 1),
            event("cudaGraphLaunch", "cuda_runtime", 130, 2),
            event("cudaDeviceSynchronize", "cuda_runtime", 140, 60),
            event("before", "kernel", 50, 20, tid=7),
            event("step", "kernel", 110, 20, tid=7),
            event("step", "kernel", 125, 10, tid=8),  # overlaps the first by 5
            event("clear", "gpu_memset", 155, 5, tid=7),
        ]
    }
    summary = profiling.summarise(trace, steps=2)
    assert summary.device
    assert summary.wall == 50
    assert summary.launches == 1.5
    assert summary.host_launches == 1
    assert summary.busy == (25 + 5) / 2
    assert summary.largest_gap == 40  # 160..200, after the last kernel
    assert summary.idle_share == pytest.approx(0.7)
    assert summary.rows == [profiling.Row("step", 1, 15, 0.3), profiling.Row("clear", 0.5, 2.5, 0.05)]
    assert "| step | 1.00 | 15.00 | 30.0% |" in summary.table()
    assert "1.50 launches from 1.00 calls of the host" in summary.table()


def test_operators_of_a_cpu_trace_have_their_own_time() -> None:
    trace = {
        "traceEvents": [
            event("steps", "user_annotation", 0, 100),
            event("native, outside operators", "user_annotation", 1, 90),
            event("outer", "cpu_op", 10, 40),
            event("inner", "cpu_op", 15, 10),
            event("inner", "cpu_op", 30, 5),
            event("elsewhere", "cpu_op", 40, 20, tid=2),
        ]
    }
    summary = profiling.summarise(trace, steps=1)
    assert not summary.device
    times = {row.name: (row.calls, row.microseconds) for row in summary.rows}
    assert times == {
        "native, outside operators": (1, 50),
        "outer": (1, 25),
        "inner": (2, 15),
        "elsewhere": (1, 20),
    }
    assert summary.busy == 50
    assert summary.largest_gap == 40
    assert summary.launches == 4


def test_more_rows_than_asked_for_are_summed() -> None:
    rows = [profiling.Row(f"k{i}", 1, 10 - i, 0.1) for i in range(5)]
    table = profiling.Summary(True, 100, 50, 3, 5, 5, rows).table(top=2)
    assert "| k1 |" in table
    assert "| k2 |" not in table
    assert "| 3 others | 3.00 | 21.00 | 30.0% |" in table


def test_the_command_profiles_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, record = tmp_path / "trace.json", tmp_path / "profile.json"
    files = ["--trace", str(trace), "--json", str(record)]
    assert profile.main([*SMALL, "--backend", "eager", "--steps", "4", "--warmup", "1", *files]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::tanh" for e in events) == 4
    summary = json.loads(record.read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["aten::tanh"]["calls"] == 1
    assert rows["aten::addmm"]["calls"] == 2
    assert 0 < summary["busy"] < summary["wall"]
    assert sum(row["share"] for row in summary["rows"]) == pytest.approx(1, abs=0.1)
    out = capsys.readouterr().out
    assert "aten::addmm" in out
    assert "4 warm steps" in out


def test_the_printed_commands_are_ours_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--backend", "eager", "--trace", str(tmp_path / "t.json"), "--steps=6", "--warmup", "2"]
    profile.main(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  n")]
    assert [line.split()[0] for line in lines] == ["ncu", "nsys"]
    capsys.readouterr()
    for line, steps in zip(lines, ("1", "6"), strict=True):
        words = shlex.split(line)
        own = words[words.index("mlp_fast.profile") + 1 :]
        assert own == ["--backend", "eager", *SMALL, "--warmup", "2", "--no-profiler", "--steps", steps]
        assert profile.main(own) == 0
    assert capsys.readouterr().out == ""  # nothing but the steps runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "quick"], "'quick' is unknown"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "40", "--num-steps", "60"], "exceed --num-steps, 60"),
        (["--trace", "/nowhere/at/all.json"], "--trace /nowhere/at/all.json: cannot write it"),
        (["--proton", "x"], "--proton: .*Proton"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        profile.main([*SMALL, "--backend", "eager", *arguments])

"""bench.resources: every shipped kernel is clean, and each kind of fault is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import resources
from bench.resources import Resources

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """bench.resources in a process that compiles."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_shipped_kernel_is_clean(tmp_path: Path) -> None:
    result = run("--json", str(tmp_path / "resources.json"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "resources.json").read_text())
    assert report["ok"]
    kernels = report["kernels"]
    assert {k["sm"] for k in kernels} == {80, 90, 100}
    assert all(k["registers"] > 0 and 0 < k["occupancy"] <= 1 for k in kernels)
    # The machine code was read: products do appear, on tensor cores where they are meant to be and only there.
    products = [k for k in kernels if k["kernel"] == "embed_table_kernel"]
    assert {k["precision"] for k in products} == {"fp32", "tf32x3", "tf32", "bf16"}
    assert all((k["tensor_core"] > 0) == (k["precision"] != "fp32") for k in products)
    assert all(k["fma"] >= 128 for k in products if k["precision"] == "fp32")
    # What the operators promise: sums in a fixed order. The grid barrier shows that an atomic would be seen.
    operators = [k for k in kernels if k["module"] in ("embed_linear_tanh", "linear_cross_entropy", "adamw", "_sum")]
    assert len({k["kernel"] for k in operators}) >= 14
    assert not any(k["atomics"] for k in operators)
    assert all(k["atomics"] for k in kernels if k["module"] == "persistent_step")


def test_each_fault_is_found() -> None:
    result = run("--modules", "faulty_kernels", "--sm", "90")
    assert result.returncode == 1
    faults = result.stderr.splitlines()
    assert len(faults) >= 3
    for constants, fault in (
        ("M=64 N=64 K=64", "spill instructions"),
        ("M=32 N=32 K=32", "tensor-core instructions under fp32"),
        ("M=128 N=128 K=128", "bytes of shared memory"),
    ):
        assert any(constants in line and fault in line for line in faults), result.stderr
    assert not any("M=32 N=32 K=16" in line for line in faults)


def test_modules_are_named_shortly() -> None:
    result = run("--modules", "adamw", "--sm", "80")
    assert result.returncode == 0, result.stderr
    assert "adamw_kernel" in result.stdout
    for name, reason in (("adam", "there is no such module"), ("no.such", "no such module"), ("_math", "no shipped()")):
        result = run("--modules", name)
        assert result.returncode == 2
        assert f"--modules {name}: " in result.stderr
        assert reason in result.stderr
        assert "Traceback" not in result.stderr


def test_it_needs_a_compiling_process() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.resources"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4", True),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", True),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", True),
        ("FFMA R4, R8, R10, R4", False),
        ("MMAIOFOO R4", False),
    ],
)
def test_tensor_core_instructions_are_told_apart(instruction: str, expected: bool) -> None:
    assert bool(resources.TENSOR_CORE.search(instruction)) == expected


def test_occupancy_follows_the_limits() -> None:
    assert resources.occupancy(80, 4, 32, 0) == 1.0  # 16 blocks of 4 warps
    assert resources.occupancy(80, 4, 128, 0) == 0.25  # 65,536 / (128 * 32) = 16 warps
    assert resources.occupancy(80, 4, 32, 80 * 1024) == 2 * 4 / 64  # two blocks' shared memory fit 164 KiB
    assert resources.occupancy(90, 1, 32, 0) == 0.5  # 32 blocks of one warp
    assert resources.occupancy(100, 8, 255, 99 * 1024) == 8 / 64


def test_shared_memory_up_to_the_limit_is_allowed() -> None:
    fine = Resources("m", "k", "fp32", "", 90, 4, 32, 0, resources.MAX_SHARED, 1, 0, 0, 1.0)
    assert fine.faults() == []
    assert Resources("m", "k", "tf32", "", 90, 4, 32, 0, resources.MAX_SHARED + 1, 1, 9, 0, 1.0).faults() != []

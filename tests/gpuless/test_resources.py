"""bench.resources: every shipped kernel is clean, and each kind of fault is found."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import resources
from bench.resources import Resources
from mlp_fast.errors import UserError

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """bench.resources in a process that compiles."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.resources", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_every_shipped_kernel_is_clean(tmp_path: Path) -> None:
    result = run("--json", str(tmp_path / "resources.json"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "resources.json").read_text())
    assert report["ok"]
    kernels = report["kernels"]
    assert {k["sm"] for k in kernels} == {75, 80, 86, 89, 90, 100, 120} == set(resources.ARCHITECTURES)
    assert {k["precision"] for k in kernels if k["sm"] == 75} == {"fp32"}
    assert all(k["registers"] > 0 and 0 < k["occupancy"] <= 1 for k in kernels)
    # The instructions were counted: products do appear, on tensor cores where they are meant to be and only there.
    products = [k for k in kernels if k["kernel"] == "embed_table_kernel"]
    assert {k["precision"] for k in products} == {"fp32", "tf32x3", "tf32", "bf16"}
    assert all((k["tensor_core"] > 0) == (k["precision"] != "fp32") for k in products)
    assert all(k["fma"] >= 128 for k in products if k["precision"] == "fp32")
    # What the operators promise: sums in a fixed order. The grid barrier shows that an atomic would be seen.
    operators = [k for k in kernels if k["module"] in ("embed_linear_tanh", "linear_cross_entropy", "adamw", "_sum")]
    assert len({k["kernel"] for k in operators}) >= 14
    assert not any(k["atomics"] for k in operators)
    assert all(k["atomics"] for k in kernels if k["module"] == "persistent_step")


DEFAULT = {"B": 128, "V": 27, "T": 3, "E": 48, "H": 512}


def shipped(name: str, kernel: str, sm: int, precision: str, **sizes: int) -> list[Any]:
    """The configurations of a kernel for an architecture, with fixed-order sums, at these sizes where given."""
    found = []
    for one in importlib.import_module(resources.module_of(name)).shipped():
        if (one.kernel.fn.__name__, one.precision) == (kernel, precision) and sm in one.capabilities:
            config = one.arguments.get("C")
            if not sizes or (getattr(config, "deterministic", True) and sizes.items() <= vars(config).items()):
                found.append(one)
    return found


# What has spilled on one of them, or only just does not, with the tiles of another.
@pytest.mark.parametrize(
    ("name", "kernel", "sm", "precision", "sizes"),
    [
        ("persistent_step", "persistent_kernel", 75, "fp32", DEFAULT),
        ("persistent_step", "persistent_kernel", 80, "fp32", DEFAULT),
        ("persistent_step", "persistent_kernel", 120, "tf32x3", DEFAULT),
        ("embed_linear_tanh", "embed_lookup_tanh_kernel", 86, "bf16", {}),
        ("inference", "mean_loss_kernel", 120, "fp32", {"V": 256}),
    ],
)
def test_the_configurations_that_matter_are_clean(
    name: str, kernel: str, sm: int, precision: str, sizes: dict[str, int]
) -> None:
    chosen = shipped(name, kernel, sm, precision, **sizes)
    assert chosen
    for measured in resources.measure(list({one.key: one for one in chosen}.values()), sm):
        assert measured.faults() == [], measured


def test_a_launch_accepts_the_arguments_of_every_shipped_kernel() -> None:
    # Triton's launcher refuses some names of arguments, which neither the interpreter nor the compiler minds.
    found = resources.configurations([resources.module_of(name) for name in resources.KERNELS])
    assert {one.kernel.fn.__name__ for one in found} >= {"adamw_kernel", "forward_kernel", "persistent_kernel"}
    assert len({one.key_on(90) for one in found}) == len(found)


def test_a_vocabulary_of_one_token_compiles() -> None:
    # At a launch an argument of 1 is a constant, of which not everything can be asked that can be of a number.
    from mlp_fast.kernels import embed_linear_tanh
    from mlp_fast.kernels._aot import recorded

    B, V, T, E, H = 64, 1, 2, 16, 32
    h, wte, weight = (torch.empty(shape, device="meta") for shape in ((B, H), (V, E), (H, T * E)))
    idx = torch.empty((B, T), dtype=torch.int64, device="meta")
    with recorded() as launches:
        embed_linear_tanh.embed_linear_tanh_bwd(h, h, idx, wte, weight, "table", "fp32", True, True)
    kernels = {launch.kernel.fn.__name__: launch.compile(80) for launch in launches}
    assert {"dweight_table_kernel", "dwte_table_kernel"} <= set(kernels)


def test_slices_of_a_device_get_a_program_for_each_multiprocessor() -> None:
    from mlp_fast.kernels import persistent_step, train_step

    for module in (train_step, persistent_step):
        assert module.default_config(*DEFAULT.values(), processors=14).G == 14
        assert module.default_config(*DEFAULT.values(), processors=132).G == 32


@pytest.mark.parametrize("module", ["train_step", "persistent_step"])
def test_operands_loaded_ahead_fit_in_shared_memory(module: str) -> None:
    kernels = importlib.import_module(f"mlp_fast.kernels.{module}")
    sizes = itertools.product(
        (32, 96, 128, 256), (27, 100, 256), (1, 3, 6, 10), (16, 48, 64, 128, 256), (256, 512, 1024)
    )
    for (B, V, T, E, H), processors in itertools.product(sizes, (14, 40, 82, 108, 132, 170)):
        C = kernels.default_config(B, V, T, E, H, processors=processors)
        if C.gather:
            assert C.operand_bytes(T if C.ahead else 1) <= 64 * 1024, C


# What asked for more than there is: 124,928 bytes on sm_86, and 69,632 on sm_75.
@pytest.mark.parametrize(
    ("sm", "processors", "sizes"), [(86, 82, (128, 27, 6, 64, 512)), (75, 40, (128, 100, 3, 64, 256))]
)
def test_the_forward_kernel_of_a_wider_model_fits(sm: int, processors: int, sizes: tuple[int, ...]) -> None:
    from mlp_fast.kernels import train_step
    from mlp_fast.kernels._aot import recorded

    tape, scalars = torch.empty(10_007, dtype=torch.int32, device="meta"), torch.empty(1000, 3, device="meta")
    with recorded() as launches:
        train_step.TrainStep(train_step.default_config(*sizes, processors=processors), tape, scalars).run(2)
    forward = next(launch for launch in launches if launch.kernel.fn.__name__ == "forward_kernel")
    (measured,) = resources.measure([forward], sm)
    assert measured.faults() == [], measured


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


def test_modules_are_named_shortly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Compiled here: the processes for it are started by the test above.
    monkeypatch.setattr(resources, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1))
    assert resources.main(["--modules", "adamw", "--sm", "80"]) == 0
    assert "adamw_kernel" in capsys.readouterr().out
    for name, reason in (("adam", "there is no such module"), ("no.such", "no such module"), ("_math", "no shipped()")):
        with pytest.raises(UserError, match=f"--modules {re.escape(name)}: .*{re.escape(reason)}"):
            resources.main(["--modules", name])


def test_it_needs_a_compiling_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "interpreting", lambda: True)
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        resources.main([])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2}, {%r3}, {%r4}, {%r1, %r2};", True),
        ("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, %p1, 1, 1;", True),
        ("@%p1 tcgen05.mma.cta_group::1.kind::tf32 [%r1 + 0], %rd1, %rd2, %r2, %p2;", True),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", False),
        ("mmaiofoo.sync %r1;", False),
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
    assert resources.occupancy(75, 8, 32, 0) == 1.0  # four blocks of 8 warps, of 32 warps in all
    assert resources.occupancy(86, 8, 255, 99 * 1024) == 8 / 48
    assert resources.occupancy(89, 1, 32, 0) == 24 / 48  # 24 blocks of one warp


@pytest.mark.parametrize(("sm", "limit"), [(75, 64 * 1024), (86, 99 * 1024), (90, 99 * 1024), (120, 99 * 1024)])
def test_shared_memory_up_to_the_limit_is_allowed(sm: int, limit: int) -> None:
    fine = Resources("m", "k", "fp32", "", sm, 4, 32, 0, limit, 1, 0, 0)
    assert fine.faults() == []
    assert Resources("m", "k", "tf32", "", sm, 4, 32, 0, limit + 1, 1, 9, 0).faults() != []

"""AdamW of every backend against torch.optim.AdamW, element by element, on a million elements of a real run.

In fp32 the weight decay is the rounding of p * decay (docs/numerics.md). Compiled code that fuses this product into the
subtraction leaves the rounding out, and no loss shows that for a thousand steps. So here every element is compared, and
the mean signed difference is looked at, not only the largest.
"""

import platform
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from updates import CONFIG, Difference, check, check_backend, differences, flat, updates

from mlp_fast import backends, ops
from mlp_fast.config import Config
from mlp_fast.kernels import _cpu_library, cpu_step
from mlp_fast.model import manual_step
from mlp_fast.model.schedule import learning_rate, update_scalars

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "kernels" / "csrc" / "train_step.c"
pytestmark = pytest.mark.usefixtures("one_thread")


# --- the arithmetic of a backend, on the gradients of the run -----------------------------------------------------


@pytest.mark.skipif(cpu_step.unavailable() is not None, reason="native is unavailable")
@pytest.mark.parametrize("isa", cpu_step.instruction_sets() if cpu_step.unavailable() is None else ())
def test_native(isa: str) -> None:
    check(native_differences(isa))


def native_differences(isa: str) -> dict[str, Difference]:
    results = []
    for update in updates():
        got = flat(update.before)
        cpu_step.adamw_(got["p"], update.grad, got["m"], got["v"], *update.scalars, isa)
        results.append(got)
    return differences(results, updates())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_step_by_hand(compiled: bool) -> None:
    if compiled and (reason := backends.unsupported("compile-step", Config(device="cpu"))):
        pytest.skip(reason)
    check(step_differences(torch.compile(manual_step.adamw_) if compiled else manual_step.adamw_))


def step_differences(adamw_: Any) -> dict[str, Difference]:
    scalars, results = update_scalars(CONFIG), []
    for update in updates():
        got = {kind: {"all": tensor} for kind, tensor in flat(update.before).items()}
        adamw_(got["p"], {"all": update.grad}, got["m"], got["v"], scalars[update.step])
        results.append({kind: tensors["all"] for kind, tensors in got.items()})
    return differences(results, updates())


def test_the_operator_on_a_cpu() -> None:
    results = []
    for update in updates():
        got, count = flat(update.before), torch.tensor(update.step + 1)
        lr = torch.tensor(learning_rate(update.step, CONFIG), dtype=torch.float64)
        tensors = ([got["p"]], [update.grad], [got["m"]], [got["v"]])
        ops.adamw_(*tensors, count, lr, weight_decay=CONFIG.weight_decay)
        results.append(got)
    check(differences(results, updates()))


# --- whole backends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    # These two compile the loss only; their optimizer is eager's.
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("compile", "compile-raw") else [])
        for name in backends.REGISTRY
    ],
)
def test_the_parameters_after_a_step(name: str) -> None:
    reason = backends.unsupported(name, replace(CONFIG, backend=name))
    if reason:
        pytest.skip(f"{name}: {reason}")
    check_backend(name, updates())


# --- the C kernel's machine code ----------------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it reads x86-64 machine code")
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_machine_code_of_c(cc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A division of AdamW's has just the fused operations that are meant: two moments and the denominator, and two of
    AVX-512's square root. One more would be the decay's. What this processor can run is run."""
    if shutil.which(cc) is None or shutil.which("objdump") is None:
        pytest.skip(f"{cc} or objdump is not installed")
    library = tmp_path / "_train_step.so"
    command = [cc, *native_flags(), "-shared", "-fPIC", "-w", SOURCE, "-o", library, "-lm"]
    subprocess.run(command, check=True)
    code = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
    for name, fused in (("adamw_v3", 3), ("adamw_v4", 5)):
        body = re.search(rf"<{name}>:(.*?)\n\n", code, re.DOTALL)
        assert body, name
        divisions = len(re.findall("vdivps", body[1]))
        assert divisions
        assert len(re.findall(r"vfn?m(?:add|sub)\d+ps", body[1])) == fused * divisions, name
    loaded = _cpu_library.load_from(tmp_path)
    assert not isinstance(loaded, str), loaded
    monkeypatch.setattr(_cpu_library, "library", lambda: loaded)
    for isa in cpu_step.instruction_sets():
        check(native_differences(isa))


def native_flags() -> list[str]:
    """The flags that setup.py gives to the compiler."""
    flags = re.search(r"extra_compile_args=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert flags
    return re.findall(r'"(.*?)"', flags[1])

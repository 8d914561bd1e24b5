"""Building the C kernel: without warnings, under the sanitizers, and without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlp_fast.kernels import _cpu_library

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "kernels" / "csrc" / "train_step.c"
DRIVER = Path(__file__).parent / "native" / "driver.c"


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def compiler(name: str) -> str:
    """A compiler's path; the test is skipped where it is missing."""
    names = [name, *(f"{name}-{version}" for version in range(21, 10, -1))]
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_compiles_without_a_warning(cc: str, tmp_path: Path) -> None:
    flags = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    built = run(compiler(cc), *flags, SOURCE, "-o", tmp_path / "library.so", "-lm")
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize(
    ("cc", "sanitizers"),
    [
        ("gcc", "address,undefined"),
        ("gcc", "thread"),
        pytest.param("clang", "thread", marks=pytest.mark.long),
        pytest.param("clang", "address,undefined", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_sanitizers_find_nothing(cc: str, sanitizers: str, tmp_path: Path) -> None:
    """Every entry point on exactly sized buffers, poisoned in between: odd sizes, both forms, several threads."""
    program = tmp_path / "driver"
    flags = ["-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    path = compiler(cc)
    if run(path, *flags, empty, "-o", program).returncode != 0 or run(program).returncode != 0:
        pytest.skip(f"{cc} cannot build or run programs with -fsanitize={sanitizers} here")
    built = run(path, *flags, "-Wall", "-Wextra", "-Werror", DRIVER, "-o", program, "-lm")
    assert built.returncode == 0, built.stderr
    checked = run(program, *(["races"] if sanitizers == "thread" else []))
    assert checked.returncode == 0, checked.stderr
    assert int(checked.stdout.split()[0]) >= 48


@pytest.mark.parametrize(
    ("cc", "cases"),
    [
        ("aarch64-linux-gnu-gcc", 2),
        pytest.param("aarch64-linux-gnu-gcc", 100, marks=pytest.mark.long),
        pytest.param("clang", 100, marks=pytest.mark.long),
    ],
)
def test_the_kernel_runs_on_aarch64(cc: str, cases: int, tmp_path: Path) -> None:
    """NEON under an emulator: the driver compares losses with float64, and the bits on one to three threads."""
    emulator, path, program = compiler("qemu-aarch64"), compiler(cc), tmp_path / "driver"
    flags = [*(["--target=aarch64-linux-gnu"] if cc == "clang" else []), "-static", "-pthread"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if run(path, *flags, empty, "-o", program).returncode != 0:
        pytest.skip(f"{cc} cannot build programs for aarch64 here")
    optimised = ["-std=gnu11", "-O1" if cases < 100 else "-O3", "-ffp-contract=fast"]
    built = run(path, *flags, *optimised, "-Wall", "-Wextra", "-Werror", DRIVER, "-o", program, "-lm")
    assert built.returncode == 0, built.stderr
    checked = run(emulator, program, cases)
    assert checked.returncode == 0, checked.stderr
    assert int(checked.stdout.split()[0]) >= 9 * min(cases, 10)


def install(tmp_path: Path, cc: str) -> Path:
    """The folder of the kernels as `setup.py build` makes it with this compiler."""
    built = run(
        sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path,
        "build", "--build-base", tmp_path / "build", "--build-lib", tmp_path / "lib",
        cwd=ROOT, env=os.environ | {"CC": cc},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return tmp_path / "lib" / "mlp_fast" / "kernels"


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    folder = install(tmp_path, cc=str(tmp_path / "nonexistent"))
    assert (folder / "cpu_step.py").exists()
    assert not list(folder.glob("*.so"))
    assert "install a C compiler" in str(_cpu_library.load_from(folder))


def test_with_a_compiler_the_library_is_installed(tmp_path: Path) -> None:
    folder = install(tmp_path, cc=compiler("gcc"))
    assert not isinstance(_cpu_library.load_from(folder), str)
    (folder / "csrc" / "train_step_simd.h").write_text("/* another source */")
    assert "another source" in str(_cpu_library.load_from(folder))
    library = next(folder.glob("_train_step*.so"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / library.name).write_bytes(b"no library")
    assert "cannot be loaded" in str(_cpu_library.load_from(broken))

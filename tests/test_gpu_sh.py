"""bench/gpu.sh as on a machine with a GPU, by an interpreter that only plays its part: order, budget, log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent.parent / "bench" / "gpu.sh"

# Notes its arguments, and answers as Python would there; what HANGS matches prints a line and stays.
PYTHON = f"""#!/bin/sh
arguments=$(printf '%s ' "$@" | tr '\\n' ' ')
printf '%s\\n' "$arguments" >> "$CALLS"
case $arguments in
*setup.py*) exit 1 ;;
*REGISTRY*) echo triton-op triton-step triton-persistent ;;
*fastest*) echo triton-step ;;
esac
if printf '%s' "$arguments" | grep -qE "$HANGS"; then
    exec {sys.executable} -c "
import os, signal, time
if os.environ['DEAF']: signal.signal(signal.SIGINT, signal.SIG_IGN)
print('it has begun', flush=True)
try: time.sleep(600)
except KeyboardInterrupt: print('it was interrupted')"
fi
"""
SANITIZER = """#!/bin/sh
printf 'sanitizer:%s %s\\n' "${PYTORCH_NO_CUDA_MEMORY_CACHING:-}" "$*" >> "$CALLS"
"""


def run(folder: Path, hangs: str, deaf: bool = False) -> tuple[str, list[str]]:
    """The log, and the calls in their order."""
    tools, calls, out = folder / "bin", folder / "calls", folder / "out"
    tools.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER), ("nvidia-smi", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    environment |= {"CALLS": str(calls), "HANGS": hangs, "DEAF": "yes" if deaf else "", "OUT": str(out)}
    result = subprocess.run([GPU, "--seconds", "27"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    return (out / "log.txt").read_text(), calls.read_text().splitlines()


@pytest.fixture(scope="module")
def without_litmus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A run whose litmus test hangs."""
    return run(tmp_path_factory.mktemp("gpu"), hangs="test_barrier")


def test_a_stage_that_hangs_is_interrupted_and_the_others_follow(without_litmus: tuple[str, list[str]]) -> None:
    log, calls = without_litmus
    name = "litmus test of the grid barrier"
    assert re.search(
        rf"== {name}\nit has begun\nit was interrupted\n{name}: ended by its limit of 3 s\n== {name}: exit code", log
    )
    assert re.search(rf"== all: \d+ s; failed: '{name}'\n", log)
    tests = [call for call in calls if call.startswith("-m pytest")]
    assert "test_barrier" in tests[0]
    assert [" -n " in call for call in tests] == [False, True, True, True]  # the barrier has the GPU for itself
    record = next(i for i, call in enumerate(calls) if call.startswith("-m bench.record"))
    assert all(calls.index(test) < record for test in tests)
    assert [call.split(" --precision ")[1].split()[0] for call in calls if "mlp_fast.train --backend" in call] == [
        "fp32",
        "tf32x3",
    ]


def test_the_sanitizer_sees_each_allocation_where_none_is_made_under_capture(
    without_litmus: tuple[str, list[str]],
) -> None:
    _, calls = without_litmus
    sanitized = [call.split() for call in calls if call.startswith("sanitizer:")]
    found = [(call[0], call[2], call[call.index("--backend") + 1]) for call in sanitized]
    assert found == [
        (caching, tool, backend)
        for backend, of_memcheck in (
            ("triton-op", "sanitizer:"),
            ("triton-step", "sanitizer:1"),
            ("triton-persistent", "sanitizer:1"),
        )
        for tool, caching in (("memcheck", of_memcheck), ("racecheck", "sanitizer:"))
    ]


@pytest.mark.long
def test_all_ends_in_time_when_everything_hangs_and_hears_nothing(tmp_path: Path) -> None:
    log, _ = run(tmp_path, hangs="^-m", deaf=True)
    (took,) = re.findall(r"== all: (\d+) s", log)
    assert int(took) <= 27
    assert "== racecheck triton-persistent: skipped: the 27 s are nearly used up" in log
    for name in ("record", "train fp32"):
        assert re.search(rf"== {name}\nit has begun\n", log), f"nothing was left for {name}"


def test_what_is_no_number_of_seconds_is_refused() -> None:
    for options in (["--seconds"], ["--seconds", "ten"], ["--quick"]):
        result = subprocess.run([GPU, *options], capture_output=True, text=True)
        assert (result.returncode, result.stderr[:6]) == (2, "usage:")

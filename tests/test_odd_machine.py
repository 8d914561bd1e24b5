"""Machines that are not as one expects: odd folders, little memory, missing modules, no terminal."""

import ast
import functools
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlp_fast import __main__ as commands
from mlp_fast import backends, errors, files, train
from mlp_fast import cli as command
from mlp_fast.backends import requirements
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure import machine
from mlp_fast.model.mlp import Shape
from mlp_fast.run import checkpoint, plot

COMPILING = ("compile-raw", "compile", "compile-step")

# --- where compiled code is kept --------------------------------------------------------------------------------------


@pytest.fixture(params=["noexec", "ro"])
def odd_mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file system mounted so, and what is said of it; skipped where this user may not mount one."""
    path = tmp_path / "mounted"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,{request.param}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path, {"noexec": "is mounted noexec", "ro": "cannot be written"}[request.param]
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", COMPILING)
def test_a_folder_that_no_code_can_be_kept_in_is_named(
    name: str, odd_mount: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = odd_mount
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path / "not" / "yet"))
    with pytest.raises(UserError, match=rf"mounted\S* {told}; set TORCHINDUCTOR_CACHE_DIR") as error:
        train.main(["--device=cpu", f"--backend={name}", "--num-steps=1", "--out", str(tmp_path / "run")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert "set TORCHINDUCTOR_CACHE_DIR" in backends.listing(Config(device="cpu"))


def test_tritons_kernels_name_it_too(odd_mount: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    path, told = odd_mount
    monkeypatch.setattr(requirements, "interpreting", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path))
    reason = requirements.triton_missing(torch.device("cuda"))
    assert reason is not None
    assert f"{told}; set TRITON_CACHE_DIR" in reason
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path.parent))
    assert requirements.triton_missing(torch.device("cuda")) is None


@pytest.mark.parametrize("folder", ["with blank", "it's", 'a"b', "a\\b", "tab\tbed"])
def test_a_name_that_a_command_line_would_take_apart_is_named(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder))
    with pytest.raises(UserError, match="set TORCHINDUCTOR_CACHE_DIR") as error:
        train.main(["--backend=compile-step", "--device=cpu", "--num-steps=1"])
    assert "\n" not in str(error.value)


def test_a_blank_in_the_way_to_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.torch, "__file__", "/home/me/my checkout/.venv/lib/torch/__init__.py")
    reason = requirements.compiler_missing(torch.device("cpu"))
    assert reason is not None
    assert "/home/me/my checkout/.venv/lib/torch; install it below a folder without blanks" in reason


def test_no_temporary_folder_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    reason = requirements.code_folder_unusable()
    assert reason is not None
    assert "(No usable temporary directory" in reason


def test_auto_passes_such_a_backend_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "with blank"))
    monkeypatch.setitem(backends.ALIASES, "auto", ("compile-step", "eager"))
    assert backends.resolve(Config(device="cpu"), Shape(27, 3, 4, 8)).cls.name == "eager"


@pytest.mark.parametrize("name", COMPILING)
@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RuntimeError("C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nld: no room\nmore"), "(ld: no room)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    name: str, failure: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(graph: object, inputs: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    sizes = ["--device=cpu", "--embedding-size=2", "--hidden-size=2", "--num-steps=1", "--quiet"]
    with pytest.raises(UserError, match=f"--backend {name}: torch.compile failed") as error:
        train.main([f"--backend={name}", *sizes])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plot_that_matplotlib_has_no_folder_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder(*args: object, **kwargs: object) -> None:
        raise OSError("Matplotlib requires access to a writable cache directory,\nbut there is none")

    monkeypatch.setattr("builtins.__import__", no_folder)
    with pytest.raises(UserError, match="--plot: Matplotlib requires access to a writable cache directory, but"):
        plot.check_plot(str(tmp_path / "curve.png"))


# --- little memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3 GiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)\nand\n26 more lines"
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_refused_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run_main(main)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("mlp_fast: not enough memory (")
    assert told.count("\n") == 1
    assert "[enforce" not in told


def test_other_errors_keep_their_traceback() -> None:
    def main() -> int:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        command.run_main(main)


def limited(megabytes: int, *command: str) -> "subprocess.CompletedProcess[str]":
    """A command of the package under a limit of its address space."""
    limit = (megabytes * 10**6,) * 2
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_too_little_memory_to_start_is_one_line(name: str) -> None:
    done = limited(200, f"mlp_fast.{name}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mlp_fast: not enough memory to start, under the limit of this process (ulimit -v); raise it\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA takes address space by the hundred gigabytes")
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.long), "native"])
def test_a_model_that_a_limit_forbids_is_refused_in_one_line(tmp_path: Path, backend: str) -> None:
    """It holds torch and the parameters, but not their gradients and moments as well."""
    out = tmp_path / "run"
    sizes = ["--hidden-size=250000", "--batch-size=8", "--num-steps=2"]
    done = limited(1300, "mlp_fast.train", "--device=cpu", f"--backend={backend}", *sizes, "--quiet", f"--out={out}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("mlp_fast: ")
    assert "memory" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path.name for path in out.rglob("*") if not path.name.startswith(".")] if out.exists() else True


def test_the_limit_of_a_process_counts_as_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.memory()
    assert whole is not None
    monkeypatch.setattr(machine, "address_space_limit", lambda: 10**6)
    assert machine.memory() == 10**6
    monkeypatch.setattr(machine, "address_space_limit", lambda: whole + 1)
    assert machine.memory() == whole


# --- other systems ----------------------------------------------------------------------------------------------------

# What Windows lacks of the standard library; and of macOS's, which has most, it lacks more.
ABSENT = """
import os, sys, warnings
import filelock, matplotlib.pyplot, numpy, safetensors.torch, torch, torch._dynamo, torch.distributed, tqdm
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog"):
    sys.modules[name] = None
for name in ("O_NONBLOCK", "fork", "fchmod", "geteuid", "getuid", "pread", "pwrite", "register_at_fork", "set_blocking",
             "sched_getaffinity", "sched_setaffinity", "sched_yield", "statvfs", "sysconf", "uname", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
"""

EVERYTHING = """
import importlib, pathlib, pkgutil
import mlp_fast
for module in pkgutil.walk_packages(mlp_fast.__path__, "mlp_fast."):
    if not module.name.startswith("mlp_fast.kernels") and module.name != "mlp_fast.__main__":
        importlib.import_module(module.name)
from mlp_fast import backends, evaluate, sample, train
from mlp_fast.corpus import load as corpus
from mlp_fast.measure import machine
from mlp_fast.config import Config

folder = sys.argv[1]
options = ["--backend=eager", "--hidden-size=8", "--embedding-size=4", "--num-steps=6", "--quiet"]
assert train.main([*options, f"--out={folder}/run", "--stop-after=3", f"--log-json={folder}/log.jsonl",
                   f"--plot={folder}/curve.png"]) == 0
assert train.main([f"--resume={folder}/run", "--quiet", f"--log-json={folder}/log.jsonl"]) == 0
assert evaluate.main([f"{folder}/run"]) == 0
assert sample.main([f"{folder}/run", "--length=5"]) == 0
corpus.STREAMED_ABOVE = dict.fromkeys(corpus.STREAMED_ABOVE, -1)
pathlib.Path(f"{folder}/text.txt").write_text("anna\\nbob\\n" * 50)
assert train.main([*options, f"--data={folder}/text.txt", "--batch-size=4"]) == 0
backends.listing(Config())
with machine.PeakMemory(torch.device("cpu")):
    pass
print(machine.facts(torch.device("cpu"))["threads"])
"""


def test_all_but_the_kernels_works_without_what_windows_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ABSENT + EVERYTHING, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_no_module_imports_what_windows_lacks_at_its_top() -> None:
    posix = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog", "crypt"}
    for folder in ("mlp_fast", "kernels", "data"):
        for path in (Path(__file__).parent.parent / folder).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not posix & set(names), path


def test_a_system_that_opens_no_folders_is_left_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    files.sync_folder(tmp_path)


# --- what surrounds a run ---------------------------------------------------------------------------------------------

SMALL = ("--backend=eager", "--hidden-size=8", "--embedding-size=4", "--num-steps=3")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["eager", "eager-raw", "native"])
def test_training_makes_its_own_gradients(mode: Callable[[], Any], backend: str) -> None:
    config = Config(backend=backend, device="cpu", hidden_size=8, embedding_size=4, num_steps=3, quiet=True)
    expected = train.train(config)
    with mode():
        result = train.train(config)
        assert not torch.is_grad_enabled()
    for name, tensor in expected.state.parameters.items():
        torch.testing.assert_close(result.state.parameters[name], tensor)


@pytest.mark.parametrize("name", ["语料", "a$b$c$", "tab\there", "\N{GRINNING FACE}"])
def test_a_title_that_the_font_cannot_draw_is_drawn_without_a_warning(tmp_path: Path, name: str) -> None:
    """Warnings are errors here. What lies between dollars is no formula."""
    (tmp_path / name).write_text("anna\nbob\n" * 100)
    picture = tmp_path / "curve.svg"
    data = f"--data={tmp_path / name}"
    assert train.main([*SMALL, data, "--batch-size=4", "--quiet", f"--plot={picture}"]) == 0
    assert picture.stat().st_size > 1000
    assert plot.drawable("ab 语$\t") == "ab U+8BED$U+0009"


@pytest.mark.parametrize("closed", [pytest.param("1", marks=pytest.mark.long), "0 1 2"])
def test_a_command_without_stdout_or_stderr_trains(closed: str, tmp_path: Path) -> None:
    script = f"exec {shlex.join([sys.executable, '-m', 'mlp_fast.train', *SMALL])} --out run"
    closing = " ".join(f"{stream}>&-" for stream in closed.split())
    done = subprocess.run(
        ["sh", "-c", f"{script} {closing}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ("test_loss" in done.stdout) is ("1" not in closed)
    assert checkpoint.load(tmp_path / "run").state.step == 3


def test_the_library_trains_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    errors.report("nobody hears it")
    result = train.train(Config(backend="eager", hidden_size=8, embedding_size=4, num_steps=3))
    assert len(result.evaluations) == 2


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([]) == 0
    listed = re.findall(r"python -m mlp_fast\.(\w+)", capsys.readouterr().out)
    folder = Path(commands.__file__).parent
    there = {path.stem for path in folder.glob("*.py") if "\n    run_main(" in path.read_text()} - {"__main__"}
    there |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert sorted(listed) == sorted(there)
    with pytest.raises(UserError, match="unrecognized arguments: train"):
        commands.main(["train"])

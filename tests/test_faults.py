"""Kills, full disks, vanished folders and bad numbers: what was saved stays, and what could not be is told."""

import contextlib
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import reliability
import torch
from processes import SIZES, Python, finish, start

from mlp_fast import train
from mlp_fast.backends.eager import Eager
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.model.state import TrainState
from mlp_fast.run import checkpoint
from mlp_fast.run import trainer as trainer_module
from mlp_fast.run.folder import INDEX
from mlp_fast.run.log import RunLog

pytestmark = pytest.mark.usefixtures("one_thread")


def options(corpus_folder: str, *more: str) -> list[str]:
    return [*SIZES, f"--data={corpus_folder}", "--num-steps=30", "--eval-every=7", *more]


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def newest_step(out: Path) -> int:
    """The step of the newest checkpoint, all of which must be whole; 0 where there is none."""
    files = checkpoint.files_in(out) if out.exists() else []
    for path in files:
        checkpoint.read(path)
    return int(files[-1].name[5:13]) if files else 0


def kill_and_resume(cycles: int, tmp_path: Path, corpus_folder: str) -> None:
    """Runs of 400 steps that are killed at random times and resumed until they finish, until so many kills are done."""
    rng = random.Random(cycles)
    settings = [*SIZES, f"--data={corpus_folder}", "--num-steps=400", "--eval-every=30", "--checkpoint-every=8"]
    output, whole = tmp_path / "output", tmp_path / "whole"
    finish([*settings, "--stop-after=1"], output)  # starts the server of processes, so that the next one can be timed
    begun = time.monotonic()
    code, printed = finish([*settings, f"--out={whole}"], output)
    duration = time.monotonic() - begun
    assert code == 0, printed
    expected = checkpoint.load(whole).state
    killed = runs = 0
    while killed < cycles:
        out = tmp_path / f"run-{runs}"
        runs += 1
        done = 0
        while True:
            argv = [f"--resume={out}"] if done else [*settings, f"--out={out}"]
            output.write_text("")
            process = start(argv, output)
            process.join(rng.uniform(0.05, 0.6) * duration if killed < cycles else 120)
            if process.exitcode is None:
                process.kill()
                process.join()
                killed += 1
            else:
                assert process.exitcode in (0, -9), output.read_text()
            step = newest_step(out)
            assert step >= done, "a completed checkpoint is lost"
            done = step
            if process.exitcode == 0:
                break
        assert list(json.loads((out / INDEX).read_text())["checkpoints"]) == [p.name for p in checkpoint.files_in(out)]
        resumed = checkpoint.load(out).state
        assert resumed.step == 400
        for kind in ("parameters", "exp_avg", "exp_avg_sq"):
            for name, tensor in getattr(expected, kind).items():
                assert torch.equal(tensor, getattr(resumed, kind)[name]), f"{kind} {name}"
        shutil.rmtree(out)


def test_runs_killed_at_random_times_lose_nothing(tmp_path: Path, corpus_folder: str, counts: dict[str, int]) -> None:
    kill_and_resume(6, tmp_path, corpus_folder)
    counts["kill -9 and resume"] += 6


@pytest.mark.long
def test_200_runs_killed_at_random_times_lose_nothing(
    tmp_path: Path, corpus_folder: str, counts: dict[str, int]
) -> None:
    kill_and_resume(200, tmp_path, corpus_folder)
    counts["kill -9 and resume"] += 200


# --- what cannot be written -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(
    tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train.main([*options(corpus_folder, "--quiet"), f"--out={out}", "--stop-after=5"])
    before = sorted(path.name for path in out.iterdir())
    with no_file_larger_than(1000):
        assert train.main([f"--resume={out}", "--checkpoint-every=10"]) == 3
    printed = capsys.readouterr()
    assert "test_loss" in printed.out
    told = printed.err.splitlines()
    steps = [
        re.search(r"could not save the checkpoint of step (\d+) \(File too large\); going on", line) for line in told
    ]
    assert [match[1] for match in steps if match] == ["10", "20", "30"]
    assert told[-1].startswith("mlp_fast: finished, but could not save the checkpoint of step 30")
    assert sorted(path.name for path in out.iterdir()) == before, "neither lost nor littered"
    assert train.main([f"--resume={out}", "--quiet"]) == 0
    assert checkpoint.load(out).state.step == 30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_survives_a_full_disk(small_disk: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "run"
    log = small_disk / "log.jsonl"
    settings = options(corpus_folder, "--quiet", f"--out={out}", f"--log-json={log}", "--checkpoint-every=1")
    assert train.main([*settings, "--keep=100"]) == 3
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert told.splitlines()[-1].startswith("mlp_fast: finished, but could not save")
    kept = checkpoint.files_in(out)
    assert kept
    for path in kept:
        checkpoint.read(path)
    for path in (log, *kept[:3]):  # a page for the next checkpoint, one for the index, and some to spare
        path.unlink()
    assert train.main([f"--resume={out}", "--quiet", "--keep=1", "--checkpoint-every=1000"]) == 0
    assert [path.name for path in checkpoint.files_in(out)][-1] == "step-00000030.safetensors"


def test_a_full_disk_is_noticed_before_a_run_goes_on(small_disk: Path, corpus_folder: str) -> None:
    out = small_disk / "run"
    train.main([*options(corpus_folder, "--quiet", f"--out={out}"), "--stop-after=5"])
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        for _ in range(1000):  # until there is no space left
            filler.write(bytes(4096))
    with pytest.raises(UserError, match=r"cannot write there \(No space left on device\)"):
        train.main([f"--resume={out}", "--quiet"])


def test_a_run_survives_the_loss_of_its_folder(
    tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    advance = Eager.advance

    def vanishing(self: Eager, steps: int) -> torch.Tensor:
        if self.held.step == 15:
            shutil.rmtree(out)
        return advance(self, steps)

    monkeypatch.setattr(Eager, "advance", vanishing)
    monkeypatch.setattr(trainer_module, "RESPONSE_TIME", {"cpu": 0.0})  # one step at a time
    settings = options(corpus_folder, f"--out={out}", "--checkpoint-every=10")
    assert train.main(settings) == 3
    printed = capsys.readouterr()
    assert "test_loss" in printed.out
    assert "could not save the checkpoint of step 20 (the folder was removed)" in printed.err
    assert "finished, but could not save" in printed.err
    assert not out.exists(), "it may have been a mount point: it is not made anew"


@pytest.mark.parametrize("end", ["signal", "nan"])
def test_a_run_that_ends_after_its_folder_offers_nothing_of_it(
    end: str, tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    advance = Eager.advance

    def vanishing(self: Eager, steps: int) -> torch.Tensor:
        losses = advance(self, steps)
        if self.held.step == 15:
            shutil.rmtree(out)
            if end == "nan":
                losses[-1] = torch.nan
            else:
                os.kill(os.getpid(), signal.SIGINT)
        return losses

    monkeypatch.setattr(Eager, "advance", vanishing)
    monkeypatch.setattr(trainer_module, "RESPONSE_TIME", {"cpu": 0.0})
    settings = options(corpus_folder, f"--out={out}", "--checkpoint-every=10")
    if end == "nan":
        with pytest.raises(trainer_module.NonFiniteLoss, match="seen at step 21; there is no checkpoint;"):
            train.main(settings)
    else:
        assert train.main(settings) == 130
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "mlp_fast: stopped by SIGINT after 15 of 30 steps; what was saved is gone"


def test_a_log_that_cannot_be_written_ends_no_run(
    corpus_folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train.main(options(corpus_folder, "--log-json=/dev/full", f"--out={tmp_path / 'run'}")) == 3
    printed = capsys.readouterr()
    assert "test_loss" in printed.out
    assert "could not save the rest of --log-json /dev/full (No space left on device)" in printed.err
    assert checkpoint.load(tmp_path / "run").state.step == 30


def test_a_log_may_be_a_pipe_that_somebody_reads(tmp_path: Path, corpus_folder: str) -> None:
    fifo, out, output = tmp_path / "fifo", tmp_path / "run", tmp_path / "output"
    os.mkfifo(fifo)
    new, resumed = options(corpus_folder, f"--out={out}", "--stop-after=9"), [f"--resume={out}"]
    code, printed = finish([*new, f"--log-json={fifo}"], output)
    assert (code, printed) == (2, f"mlp_fast: --log-json {fifo}: cannot write it (nobody reads from it)\n")
    for settings, steps in ((new, [0, 7]), (resumed, [14, 21, 28, 29])):
        with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as reader:  # the pipe holds what the run writes
            code, printed = finish([*settings, f"--log-json={fifo}"], output)
            assert code == 0, printed
            events = [json.loads(line) for line in reader]
        assert [event["step"] for event in events if event["event"] == "eval"] == steps
        assert events[-1]["event"] == "test"


def test_a_plot_that_cannot_be_written_ends_no_run(
    corpus_folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with no_file_larger_than(4000):
        assert train.main(options(corpus_folder, f"--plot={tmp_path / 'plot.png'}", "--quiet")) == 3
    assert "could not save --plot" in capsys.readouterr().err


def full_stdout() -> None:
    """As `> /dev/full`."""
    handle = os.open("/dev/full", os.O_WRONLY)
    os.dup2(handle, 1)


def closed_pipe() -> None:
    """As `| head` that has read enough."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize(("before", "named"), [(full_stdout, "No space left"), (closed_pipe, "Broken pipe")])
def test_a_run_outlives_its_reader(before: object, named: str, tmp_path: Path, corpus_folder: str) -> None:
    out = tmp_path / "run"
    code, printed = finish(options(corpus_folder, f"--out={out}"), tmp_path / "output", before)  # type: ignore[arg-type]
    assert code == 3
    assert f"could not save what follows on stdout ({named}" in printed
    assert "Traceback" not in printed
    assert "Exception ignored" not in printed
    assert checkpoint.load(out).state.step == 30


@pytest.mark.parametrize("module", ["train", "sample", "evaluate"])
def test_no_command_fails_at_exit_over_its_lost_output(module: str, tmp_path: Path, corpus_folder: str) -> None:
    """What a full disk has left in stdout's buffer would fail a second time when the interpreter ends."""
    run = tmp_path / "run"
    train.main(options(corpus_folder, f"--out={run}", "--quiet"))
    more = {"train": ["--resume"], "sample": ["--prompt=anna"], "evaluate": []}[module]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", f"mlp_fast.{module}", *more, str(run)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=buffered,
        )
    assert done.returncode == 3
    reason = "(No space left on device)"
    told = [f"mlp_fast: the output could not be written {reason}"]
    if module == "train":
        lost = f"could not save what follows on stdout {reason}"
        told = [f"mlp_fast: {lost}; going on", f"mlp_fast: finished, but {lost}"]
    assert done.stderr.splitlines() == told


# --- bad numbers ------------------------------------------------------------------------------------------------------

DIVERGING = ("--learning-rate=1e6", "--weight-decay=1e6")


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 16 goes wrong; it is seen at the evaluation of step 21, and step 20 is not saved."""
    out, log = tmp_path / "run", tmp_path / "log.jsonl"
    poison_at(16, monkeypatch)
    settings = options(corpus_folder, f"--out={out}", "--checkpoint-every=5", f"--log-json={log}")
    with pytest.raises(trainer_module.NonFiniteLoss) as caught:
        train.main(settings)
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"the loss is not finite from step 16 on, seen at step 21; the last good checkpoint is "
        f"{out / 'step-00000015.safetensors'}; try a smaller --learning-rate than 0.0007, or --on-nan continue"
    )
    assert "could not save the checkpoint of step 20 (it is not finite" in capsys.readouterr().err
    assert [path.name[5:13] for path in checkpoint.files_in(out)] == ["00000005", "00000010", "00000015"]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[-1] == {"event": "non_finite", "step": 16}


def poison_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the batch loss of a step, and the state after it, NaN."""
    advance = Eager.advance

    def poisoned(self: Eager, steps: int) -> torch.Tensor:
        first = self.held.step
        losses = advance(self, steps)
        if first <= step < first + steps:
            losses[step - first] = torch.nan
            with torch.no_grad():
                for tensor in self.model.parameters():
                    tensor.fill_(torch.nan)
        return losses

    monkeypatch.setattr(Eager, "advance", poisoned)


@pytest.mark.parametrize("kind", ["parameters", "exp_avg", "exp_avg_sq"])
def test_a_state_with_any_number_not_finite_is_not_saved(
    kind: str, tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Eager.state

    def poisoned(self: Eager) -> TrainState:
        result = state(self)
        if self.held.step == 30:
            next(iter(getattr(result, kind).values())).flatten()[-1] = torch.inf
        return result

    monkeypatch.setattr(Eager, "state", poisoned)
    with pytest.raises(trainer_module.NonFiniteLoss, match="seen at step 30; there is no checkpoint"):
        train.main(options(corpus_folder, f"--out={tmp_path / 'run'}", "--quiet"))
    assert "could not save the checkpoint of step 30 (it is not finite" in capsys.readouterr().err
    assert checkpoint.files_in(tmp_path / "run") == []


def test_a_good_state_is_saved_without_its_bad_loss(
    tmp_path: Path, corpus_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Eager, "mean_loss", lambda self, windows: torch.nan)
    out = tmp_path / "run"
    assert train.main(options(corpus_folder, f"--out={out}", "--quiet", "--on-nan=continue")) == 0
    assert checkpoint.load(out).losses == {}


@pytest.mark.parametrize("backend", ["eager-raw", "eager", "native"])
def test_a_diverging_run_stops_with_code_4(backend: str, tmp_path: Path, corpus_folder: str) -> None:
    from test_checkpoint import available

    argv = [*options(corpus_folder, *DIVERGING, f"--out={tmp_path / 'run'}", "--checkpoint-every=1", "--quiet")]
    code, printed = finish([*argv, f"--backend={available(backend)}"], tmp_path / "output")
    assert code == 4
    assert re.search(r"the loss is not finite from step \d+ on, seen at step \d+;", printed)
    for path in checkpoint.files_in(tmp_path / "run"):
        state = checkpoint.read(path).state
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.parameters.values())


def test_a_bad_last_step_is_seen_too(tmp_path: Path, corpus_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_at(29, monkeypatch)
    with pytest.raises(trainer_module.NonFiniteLoss, match="from step 29 on, seen at step 30"):
        train.main(options(corpus_folder, "--quiet"))


def test_on_nan_continue_goes_on_but_saves_nothing_bad(
    tmp_path: Path, corpus_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = options(corpus_folder, *DIVERGING, "--on-nan=continue", f"--log-json={tmp_path / 'log'}")
    assert train.main(settings) == 0
    assert "test_loss nan" in capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "eval"] == [0, 7, 14, 21, 28, 29]
    assert events[-1] == {"event": "test", "loss": None}
    assert train.main([*settings, f"--out={out}"]) == 3
    assert checkpoint.files_in(out) == []


# --- memory, and the document -----------------------------------------------------------------------------------------


def test_a_model_larger_than_memory_is_refused(corpus_folder: str) -> None:
    with pytest.raises(UserError, match=r"parameters .* GiB of memory"):
        train.main(options(corpus_folder, "--hidden-size=16777216", "--embedding-size=4096"))


def test_the_counts_are_written_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"before\n{reliability.BEGIN}\nold\n{reliability.END}\nafter\n")
    reliability.record({"kills": 1200, "cuts": 3}, document)
    table = "| tried | times |\n| --- | ---: |\n| cuts | 3 |\n| kills | 1,200 |"
    assert document.read_text() == f"before\n{reliability.BEGIN}\n{table}\n{reliability.END}\nafter\n"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        reliability.record({"kills": 1}, document)
    assert document.read_text() == "no marks"


@pytest.mark.parametrize("part", [[], ["--long", "-k", "bytes"], ["--long", "-m", "not long"]])
def test_counts_of_a_part_are_not_recorded(part: list[str]) -> None:
    suite = Python("-m", "pytest", "--record", "--collect-only", str(Path(__file__)), *part)
    _, told = suite.communicate(timeout=100)
    assert suite.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--record is of the whole" in told


def test_every_test_that_the_document_names_exists() -> None:
    text = reliability.DOCUMENT.read_text()
    named = re.findall(r"`(test_\w+)(?:\.py)?`", text)
    sources = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert len(named) > 25
    for name in named:
        assert f"def {name}(" in sources or list(Path(__file__).parent.rglob(f"{name}.py")), f"{name} is not there"
    promises = [line for line in text.partition(reliability.BEGIN)[0].splitlines() if line.startswith("| ")]
    bare = [line for line in promises if "`test_" not in line and not line.startswith(("| promise", "| code", "| ---"))]
    assert not bare, "promises without a test"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_a_log_that_cannot_be_read_for_going_on_is_refused_and_closed() -> None:
    """A handle left open would be a ResourceWarning, and so an error here."""
    with pytest.raises(UserError, match="--log-json /proc/self/mem: cannot write it"):
        RunLog(Config(log_json="/proc/self/mem", resume="a run"))
    gc.collect()

"""SIGINT and SIGTERM: the first ends a run tidily and saves it, the second at once; neither leaves a broken file."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_backends import Clocked, register
from processes import SIZES, finish, start, wait_for

from mlp_fast import train
from mlp_fast.backends.eager import Eager
from mlp_fast.cli import Parser, add_config_arguments
from mlp_fast.config import Config
from mlp_fast.model.windows import WeightedWindows
from mlp_fast.run import checkpoint
from mlp_fast.run import folder as run_folder
from mlp_fast.run import trainer as trainer_module
from mlp_fast.run.interrupt import Interrupt, Interrupted
from mlp_fast.run.resume import resume_command

pytestmark = pytest.mark.usefixtures("one_thread")

# Long enough that it never ends by itself in a test.
ENDLESS = (*SIZES, "--num-steps=1000000", "--eval-every=1000", "--checkpoint-every=1000")
BOTH = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])


def kill(pid: int | None, signum: int) -> None:
    assert pid is not None
    os.kill(pid, signum)


@BOTH
def test_a_signal_ends_a_run_saved_and_resumable(signum: signal.Signals, tmp_path: Path, corpus_folder: str) -> None:
    out, output = tmp_path / "run with a space", tmp_path / "output"
    run = start([*ENDLESS, f"--data={corpus_folder}", f"--out={out}"], output)
    wait_for("step      0", output)
    time.sleep(0.1)
    kill(run.pid, signum)
    run.join(60)
    assert run.exitcode == 128 + signum
    printed = output.read_text()
    assert "Traceback" not in printed
    saved = checkpoint.load(out)
    step = saved.state.step
    assert step > 0
    stopped = re.search(
        r"mlp_fast: stopped by (\w+) after (\d+) of 1000000 steps; saved: (.*); go on with: (.*)\n", printed
    )
    assert stopped is not None, printed
    assert stopped[1] == signum.name
    assert int(stopped[2]) == step
    assert stopped[3] == str(out / checkpoint.file_name(step))

    # The command it prints goes on, to the bits of a run that never stopped.
    words = shlex.split(stopped[4])
    assert words[:3] == ["python", "-m", "mlp_fast.train"]
    train.main([*words[3:], "--quiet", f"--stop-after={step + 7}"])
    whole = train.train(
        Config(**{**vars(saved.config), "stop_after": step + 7, "quiet": True, "checkpoint_every": None})
    ).state
    resumed = checkpoint.load(out).state
    assert resumed.step == whole.step
    for name, tensor in whole.parameters.items():
        assert torch.equal(tensor, resumed.parameters[name])


def test_the_command_that_goes_on_asks_for_the_same() -> None:
    config = Config(stop_after=9, log_json="a log", plot="curve.png", quiet=True, out="elsewhere", seed=7, keep=4)
    command = shlex.split(resume_command(config, "a run"))
    assert command[:3] == ["python", "-m", "mlp_fast.train"]
    parser = Parser()
    add_config_arguments(parser)
    asked = {"resume": "a run", "stop_after": 9, "log_json": "a log", "plot": "curve.png", "quiet": True}
    assert parser.parse_args(command[3:]).given == asked
    assert shlex.split(resume_command(Config(seed=7), "run"))[3:] == ["--resume", "run"]


def test_a_signal_waits_for_50_milliseconds_of_steps(corpus_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []

    class Noting(Clocked):
        step_time = 0.002

        def advance(self, steps: int) -> torch.Tensor:
            pieces.append(steps)
            return super().advance(steps)

    register(monkeypatch, Noting)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: Clocked.now))
    options = ("--backend=clocked", "--num-steps=300", "--eval-every=300", "--hidden-size=2", "--batch-size=8")
    train.main([*options, "--quiet", f"--data={corpus_folder}"])
    assert sum(pieces) == 300
    assert 0.03 < max(pieces) * Noting.step_time <= 0.05 + 1e-9


@pytest.mark.parametrize("step", [0, 10, 29])
def test_a_signal_breaks_off_an_evaluation(
    step: int,
    tmp_path: Path,
    corpus_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The steps so far are saved, and the run that goes on evaluates as one that never stopped."""
    settings = [*SIZES, "--num-steps=30", "--eval-every=10", f"--data={corpus_folder}", "--quiet"]
    settings += ["--checkpoint-every=10", "--keep=9"]
    whole, stopped, resumed = (tmp_path / f"{name}.jsonl" for name in ("whole", "stopped", "resumed"))
    assert train.main([*settings, f"--log-json={whole}", f"--out={tmp_path / 'never stopped'}"]) == 0
    mean_loss, finished = Eager.mean_loss, []

    def interrupted(self: Eager, windows: WeightedWindows) -> float:
        if self.held.step == step and not finished:  # a second one would end the process
            kill(os.getpid(), signal.SIGINT)
            finished.append(windows)
        return mean_loss(self, windows)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Eager, "mean_loss", interrupted)
        assert train.main([*settings, f"--log-json={stopped}", f"--out={out}"]) == 130
    assert "once more stops at once" in capfd.readouterr().err
    assert not finished
    assert checkpoint.load(out).state.step == step
    assert train.main([f"--resume={out}", f"--log-json={resumed}", "--quiet"]) == 0
    logged = []
    for path in (whole, stopped, resumed):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        evaluations = [event for event in events if event["event"] == "eval"]
        logged.append([(event["step"], event["train_loss"], event["val_loss"]) for event in evaluations])
    assert [evaluated[0] for evaluated in logged[0]] == [0, 10, 20, 29]
    assert logged[0] == logged[1] + logged[2]
    if step % 10 == 0:  # the checkpoint has its own losses all the same, and may be the best
        losses = {"evaluated_at": step, "train_loss": pytest.approx(logged[2][0][1]), "val_loss": logged[2][0][2]}
        assert checkpoint.read(out / checkpoint.file_name(step)).losses == losses


def test_a_signal_that_came_before_is_raised_at_once() -> None:
    begun = []
    with Interrupt() as interrupt:
        with contextlib.suppress(Interrupted), interrupt.deferred():
            kill(os.getpid(), signal.SIGTERM)
            begun.append("deferred")
            with interrupt.at_once():
                begun.append("at once")
        assert interrupt.signum == signal.SIGTERM
    assert begun == ["deferred"]


def test_without_a_folder_it_says_that_nothing_is_saved(tmp_path: Path, corpus_folder: str) -> None:
    output = tmp_path / "output"
    run = start([*SIZES, "--num-steps=1000000", f"--data={corpus_folder}"], output)
    wait_for("step      0", output)
    kill(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode == 130
    assert "nothing is saved, for want of --out" in output.read_text()


def saving_takes_long() -> None:
    """Between the temporary file and its name there is time for a second signal."""
    replace = os.replace

    def slow(source: str, target: str) -> None:
        print("SAVING", flush=True)
        time.sleep(60)
        replace(source, target)

    os.replace = slow  # type: ignore[assignment]


@BOTH
def test_a_second_signal_ends_it_at_once(signum: signal.Signals, tmp_path: Path, corpus_folder: str) -> None:
    out, output = tmp_path / "run", tmp_path / "output"
    settings = [f"--data={corpus_folder}", f"--out={out}"]
    assert finish([*ENDLESS, *settings, "--stop-after=20"], output)[0] == 0
    output.write_text("")
    run = start([f"--resume={out}"], output, saving_takes_long)
    wait_for("going on", output)
    time.sleep(0.05)
    kill(run.pid, signum)
    wait_for("SAVING", output)
    kill(run.pid, signum)
    run.join(10)
    assert run.exitcode == 128 + signum
    assert [path.name for path in checkpoint.files_in(out)] == ["step-00000020.safetensors"]
    assert finish([f"--resume={out}", "--stop-after=30"], output)[0] == 0
    assert checkpoint.load(out).state.step == 30
    assert not list(out.glob(".*.tmp"))


def preparing_takes_long() -> None:
    """As where torch.compile works for minutes."""

    def prepare(self: Eager) -> None:
        print("PREPARING", flush=True)
        time.sleep(60)

    Eager.prepare = prepare  # type: ignore[method-assign]


@BOTH
def test_a_signal_during_preparation_ends_it_at_once(
    signum: signal.Signals, tmp_path: Path, corpus_folder: str
) -> None:
    output = tmp_path / "output"
    run = start([*ENDLESS, f"--data={corpus_folder}", f"--out={tmp_path / 'run'}"], output, preparing_takes_long)
    wait_for("PREPARING", output)
    kill(run.pid, signum)
    run.join(10)
    assert run.exitcode == 128 + signum
    assert f"stopped by {signum.name} after 0 of 1000000 steps; nothing is saved yet" in output.read_text()
    assert "Traceback" not in output.read_text()


def ignore_sigint() -> None:
    """As nohup and `command &` in a script do for their signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("module", ["train", "sample", "evaluate"])
def test_a_signal_during_the_imports_leaves_no_traceback(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"mlp_fast.{module}", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        before = []
        for line in run.stderr:
            before.append(line)
            if "torch._" in line:
                break
        kill(run.pid, signal.SIGINT)
        printed = "".join([*before, run.stderr.read()])
    assert run.returncode == -signal.SIGINT  # what a shell calls 130
    assert "Traceback" not in printed
    assert "mlp_fast:" not in printed


def test_an_ignored_signal_stays_ignored(tmp_path: Path, corpus_folder: str) -> None:
    output = tmp_path / "output"
    run = start([*ENDLESS, f"--data={corpus_folder}", f"--out={tmp_path / 'run'}"], output, ignore_sigint)
    wait_for("step      0", output)
    kill(run.pid, signal.SIGINT)
    wait_for("step   1000", output)
    kill(run.pid, signal.SIGTERM)
    run.join(60)
    assert run.exitcode == 143


def test_the_library_leaves_signals_alone(corpus_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    advance = Eager.advance

    def watched(self: Eager, steps: int) -> torch.Tensor:
        seen.append(signal.getsignal(signal.SIGINT))
        return advance(self, steps)

    monkeypatch.setattr(Eager, "advance", watched)
    before = signal.getsignal(signal.SIGINT)
    options = [*SIZES, "--quiet", f"--data={corpus_folder}", "--num-steps=2"]
    train.train(Config(backend="eager", batch_size=8, hidden_size=2, num_steps=2, data=corpus_folder, quiet=True))
    assert set(seen) == {before}
    train.main(options)
    assert seen[-1] != before
    assert signal.getsignal(signal.SIGINT) == before


def test_the_command_also_runs_outside_of_the_main_thread(corpus_folder: str) -> None:
    codes = []
    options = [*SIZES, "--quiet", f"--data={corpus_folder}", "--num-steps=2"]
    thread = threading.Thread(target=lambda: codes.append(train.main(options)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_signal_is_held_back_only_while_deferred() -> None:
    reached = []

    def signal_and_look(signum: signal.Signals) -> None:
        os.kill(os.getpid(), signum)
        reached.append(interrupt.signum)

    def deferred() -> None:
        with interrupt.deferred():
            signal_and_look(signal.SIGTERM)

    with Interrupt() as interrupt:
        with pytest.raises(Interrupted) as caught:
            deferred()
        assert caught.value.exit_code == 143
        interrupt.signum = 0
        with pytest.raises(Interrupted):
            signal_and_look(signal.SIGINT)
    assert reached == [signal.SIGTERM]


def test_a_lock_ends_with_its_process(tmp_path: Path, corpus_folder: str) -> None:
    out, output = tmp_path / "run", tmp_path / "output"
    run = start([*ENDLESS, f"--data={corpus_folder}", f"--out={out}"], output)
    wait_for("step      0", output)
    code, printed = finish([*ENDLESS, f"--data={corpus_folder}", f"--out={out}"], tmp_path / "second")
    assert code == 2
    assert printed == (
        f"mlp_fast: {out} is in use by another run (process {run.pid}); wait for its end, or choose another folder\n"
    )
    kill(run.pid, signal.SIGKILL)
    run.join()
    run_folder.RunFolder(out, keep=3).close()


def test_a_command_ends_with_its_code_and_all_of_its_output() -> None:
    """What is registered for the end happens, too."""
    program = """
import atexit
from mlp_fast.cli import run_main

atexit.register(lambda: print("last"))
run_main(lambda: print("x" * 100_000) or 3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "x" * 100_000 + "\nlast\n")

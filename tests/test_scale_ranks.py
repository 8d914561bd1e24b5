"""Several processes compute the steps of one, and end together: on this machine, over gloo."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_program
import torch
from processes import Python

from mlp_fast import backends, distributed, evaluate, train
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.corpus import load as corpus
from mlp_fast.corpus.load import Corpus
from mlp_fast.distributed import World
from mlp_fast.errors import UserError
from mlp_fast.model.mlp import Shape
from mlp_fast.run import checkpoint
from mlp_fast.run import trainer as trainer_module
from mlp_fast.run.log import RunLog

PROGRAM = str(Path(rank_program.__file__))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def started(size: int, *arguments: str) -> list[Python]:
    """The processes of a run, given their places as torchrun gives them, without its own start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        Python(*arguments, environment={**places, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
    ]


def wait_for(happened: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.05)


of_one = functools.cache(rank_program.outcome)


def assert_equal_outcomes(several: dict[str, Any], one: dict[str, Any]) -> None:
    assert len(several["losses"]) == rank_program.STEPS
    assert several["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][-1] < one["losses"][0] - 0.5, "nothing was learnt: the comparison would say little"
    for left, right in zip(several["evaluations"], one["evaluations"], strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert several["test"] == pytest.approx(one["test"], abs=1e-5)
    assert several["sums"] == pytest.approx(one["sums"], abs=1e-3)


@pytest.mark.parametrize(
    "names", [("eager", "eager-raw", "triton-op"), pytest.param(("compile",), marks=pytest.mark.long)], ids="-".join
)
def test_two_processes_of_torchrun_compute_the_steps_of_one(names: tuple[str, ...], tmp_path: Path) -> None:
    subprocess.run(
        [*TORCHRUN, "2", PROGRAM, str(tmp_path / "out"), *names],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    written = json.loads((tmp_path / "out").read_text())
    assert written["size"] == 2
    if names == ("compile",) and not written["outcomes"]:
        pytest.skip("torch.compile lacks a compiler here")
    assert set(names) <= written["outcomes"].keys()
    # The single process is always eager: the others must compute the same.
    for name, several in written["outcomes"].items():
        assert_equal_outcomes(several, of_one("eager-raw" if name == "eager-raw" else "eager"))


def test_four_processes_compute_the_steps_of_one(tmp_path: Path) -> None:
    processes = started(4, PROGRAM, str(tmp_path / "out"), "eager")
    for process in processes:
        process.communicate(timeout=200)
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    written = json.loads((tmp_path / "out").read_text())
    assert written["size"] == 4
    assert_equal_outcomes(written["outcomes"]["eager"], of_one("eager"))


TRAIN = ["--backend", "eager", "--preset", "tiny", "--eval-every", "1000"]


def test_a_signal_to_one_process_ends_all_saved_and_other_numbers_of_processes_go_on(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    settings = [*TRAIN, "--num-steps", "30000", "--out", str(out)]
    processes = started(2, "-m", "mlp_fast.train", *settings, "--log-json", str(log))
    wait_for(lambda: log.exists() and '"eval"' in log.read_text())
    processes[1].send_signal(signal.SIGTERM)
    (output, told), (silence, others) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [143, 143]
    assert re.match(r"backend eager on .*, in 2 processes \| ", output)
    assert silence == ""
    assert re.search(r"stopped by SIGTERM after (\d+) of 30000 steps; saved: ", told)
    assert "stopped by" not in others
    (saved,) = out.glob("step-*.safetensors")
    steps = int(saved.stem.removeprefix("step-"))
    assert steps > 0
    # One process goes on for a while, then two again, who end where a run of one process alone ends.
    train.train(resumed_config(out, steps + 25))
    end = ["--stop-after", str(steps + 50)]
    processes = started(2, "-m", "mlp_fast.train", "--resume", str(out), *end)
    (output, _), (silence, _) = (process.communicate(timeout=100) for process in processes)
    assert silence == ""
    straight = train.train(parsed([*TRAIN, "--num-steps", "30000", *end, "--quiet"]))
    (test_loss,) = re.findall(r"^test_loss (\S+)$", output, re.MULTILINE)
    assert float(test_loss) == pytest.approx(straight.test_loss, abs=1e-5)
    # An evaluation is split over the processes too.
    processes = started(2, "-m", "mlp_fast.evaluate", str(out))
    (output, _), (silence, _) = (process.communicate(timeout=100) for process in processes)
    assert silence == ""
    losses = evaluate.losses_of(checkpoint.load(out), corpus.load("embedded"))
    assert {split: float(loss) for split, loss in re.findall(r"(\w+)_loss (\S+)", output)} == pytest.approx(
        losses, abs=2e-6
    )


def parsed(arguments: list[str]) -> Config:
    from mlp_fast.cli import Parser, add_config_arguments, config_from

    parser = Parser()
    add_config_arguments(parser)
    return config_from(parser.parse_args(arguments))


def resumed_config(run: Path, stop_after: int) -> Config:
    from mlp_fast.run.resume import resumed_config

    return resumed_config({"resume": str(run), "stop_after": stop_after, "quiet": True})


def test_a_process_that_dies_ends_the_others_within_30_seconds(tmp_path: Path) -> None:
    """A step waits for TIMEOUT at most; how quickly a busy machine then ends a process is its own affair."""
    assert distributed.TIMEOUT.total_seconds() < 30
    log = tmp_path / "log"
    processes = started(2, "-m", "mlp_fast.train", *TRAIN, "--num-steps", "1000000", "--log-json", str(log))
    try:
        wait_for(lambda: log.exists() and '"eval"' in log.read_text())
        processes[1].kill()
        _, told = processes[0].communicate(timeout=120)  # were it to wait with PATIENCE, an hour
    finally:
        for process in processes:
            process.kill()
        processes[1].communicate(timeout=60)
    assert processes[0].returncode == 2
    line = r"mlp_fast: rank 0 stops: another process has ended or does not answer \(.*\); see what it said; --resume .*"
    assert re.fullmatch(line, told.rstrip())
    assert len(told) < 240
    assert not re.search(r"\.cc:|\. [A-Z]", told), "where in gloo it happened, and its advice, help nobody here"


def test_torchrun_ends_when_a_process_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*TORCHRUN, "2", "-m", "mlp_fast.train", *TRAIN, "--num-steps", "1000000", "--log-json", str(log)]
    torchrun = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: log.exists() and '"eval"' in log.read_text())
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        last = next(pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(last), signal.SIGKILL)
        _, told = torchrun.communicate(timeout=120)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 1
    # torchrun looks ten times a second: it may end rank 0 before that one has missed the other.
    assert len(re.findall(r"^mlp_fast: (?:rank 0 stops: .*|stopped by SIGTERM.*)$", told, re.MULTILINE)) == 1
    assert "mlp_fast/distributed.py" not in told, "a traceback is no message"


def test_an_error_of_all_processes_is_told_once() -> None:
    processes = started(2, "-m", "mlp_fast.train", "--backend", "native", "--data", "embedded")
    told = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert re.fullmatch(r"mlp_fast: --backend native.*one process.*eager.*\n", told[0])
    assert told[1] == ""


SLOW = """
import datetime, sys, time
from torch.distributed import distributed_c10d
from mlp_fast import distributed, train
from mlp_fast.backends.eager import Eager
from mlp_fast.run.folder import RunFolder
from mlp_fast.run.trainer import Trainer

def slow_once(cls, name, rank):
    method, pauses = getattr(cls, name), [4]
    def slow(*arguments):
        if distributed.world().rank == rank and pauses:
            time.sleep(pauses.pop())
        return method(*arguments)
    setattr(cls, name, slow)

def run(trainer, method=Trainer.run):
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))  # once the processes have found each other
    return method(trainer)

Trainer.run = run
slow_once(Eager, "mean_loss", 1)
slow_once(RunFolder, "save", 0)
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_others_wait_for_a_slow_evaluation_and_a_slow_save(tmp_path: Path) -> None:
    """Longer than a step waits for an answer."""
    settings = [*TRAIN, "--num-steps", "3", "--checkpoint-every", "2", "--out", str(tmp_path), "--quiet"]
    processes = started(2, "-c", SLOW, *settings)
    told = [process.communicate(timeout=100)[1] for process in processes]
    assert [(process.returncode, errors) for process, errors in zip(processes, told, strict=True)] == [(0, "")] * 2
    assert len(list(tmp_path.glob("step-*.safetensors"))) == 2


SPOILT = """
import sys
from mlp_fast import train
from mlp_fast.backends.eager import Eager
from mlp_fast.cli import run_main

def state(backend, method=Eager.state):
    state = method(backend)
    if state.step == 3:
        state.parameters["mlp.0.bias"].fill_(float("inf"))
    return state

Eager.state = state
run_main(lambda: train.main(sys.argv[1:]))
"""


def test_a_last_state_that_cannot_be_saved_ends_all_and_is_told_once(tmp_path: Path) -> None:
    """Rank 0 alone sees it, after losses that were finite."""
    processes = started(2, "-c", SPOILT, *TRAIN, "--num-steps", "3", "--out", str(tmp_path), "--quiet")
    told = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [4, 2]
    assert re.search(r"^mlp_fast: the loss is not finite from step 3 on", told[0], re.MULTILINE)
    assert told[1] == ""


PLACES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is not a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment is not a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 in the environment is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 in the environment is not below WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "1.5", **PLACES}, "RANK=1.5 in the environment is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2", **PLACES}, "RANK=2 in the environment is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", **PLACES}, "did not find each other .*RANK expected, but not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "did not find each other .*MASTER_ADDR expected, but not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "did not find each other"),
    ],
)
def test_places_that_torchrun_would_not_give_are_one_clear_line(
    places: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        train.main([*TRAIN, "--num-steps", "1"])
    assert re.fullmatch(rf".*{message}.*; start the processes by torchrun, .*", str(error.value))


LEAVING = """
import os, sys, torch
from mlp_fast import distributed
from mlp_fast.errors import UserError

def threads():
    return sorted(os.listdir("/proc/self/task"))

torch.ones(3).sum()
before = threads()
try:
    with distributed.joined() as world, world.agreed():
        world.barrier()
        assert threads() != before
        if sys.argv[1] == "failing":
            raise UserError("on purpose")
except (UserError, SystemExit):
    assert sys.argv[1] == "failing"
assert threads() == before
"""


@pytest.mark.parametrize("end", ["well", "failing"])
def test_no_thread_of_the_group_outlives_it(end: str) -> None:
    """A thread that lets go of a tensor while the interpreter shuts down would abort the process, now and then."""
    processes = started(2, "-c", LEAVING, end)
    told = [process.communicate(timeout=100)[1] for process in processes]
    assert [(process.returncode, errors) for process, errors in zip(processes, told, strict=True)] == [(0, "")] * 2


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_current", World(0, 2))


SHAPE = Shape(V=27, T=3, E=48, H=512)


@pytest.mark.usefixtures("two_processes")
def test_backends_say_whether_they_split_a_batch_and_auto_takes_one_that_does() -> None:
    for name in backends.REGISTRY:
        reason = backends.unsupported(name, Config(backend=name), SHAPE)
        if not backends.backend_class(name).distributed:
            assert reason is not None
    can = {name for name in backends.REGISTRY if backends.backend_class(name).distributed}
    assert {"eager-raw", "eager", "compile-raw", "compile"} <= can
    assert not can & {"native", "compile-step", "triton-step", "triton-persistent"}
    assert backends.resolve(Config(), SHAPE).cls.name in can


@pytest.mark.usefixtures("two_processes")
def test_a_batch_smaller_than_the_processes_is_refused(embedded_corpus: Corpus) -> None:
    config = Config(backend="eager", batch_size=1, quiet=True)
    with pytest.raises(UserError, match="--batch-size 1 is less than the 2 processes"):
        trainer_module.Trainer(trainer_module.Plan.of(config, embedded_corpus), RunLog(config))


@pytest.mark.parametrize("count", [1, 2, 7, 128, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_shares_are_whole_disjoint_and_even(count: int, size: int) -> None:
    shards = [World(rank, size).shard(count) for rank in range(size)]
    assert [row for share in shards for row in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shards]
    assert max(lengths) - min(lengths) <= 1
    assert count < size or min(lengths) > 0


def test_one_process_has_nothing_to_agree_on() -> None:
    world = World()
    gradient = torch.arange(3.0)
    world.all_reduce_gradients([gradient])
    world.barrier()
    assert gradient.tolist() == [0, 1, 2]
    assert world.mean(3.5, 2) == 3.5
    assert world.max(2.5) == 2.5
    with pytest.raises(UserError, match="as it is"), world.agreed():
        raise UserError("as it is")
    assert Backend.distributed is False

"""The training command: what it prints, logs, saves and draws, and how it refuses bad input."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fake_backends import Clocked, register

from mlp_fast import evaluate, sample, train
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.errors import UserError
from mlp_fast.model.mlp import MLP, PARAMETER_NAMES, Shape
from mlp_fast.run import trainer as trainer_module
from mlp_fast.run.log import RunLog

SMALL = [
    "--backend",
    "eager",
    "--hidden-size",
    "16",
    "--embedding-size",
    "8",
    "--num-steps",
    "25",
    "--eval-every",
    "10",
]
LINE = re.compile(
    r"step [ \d]{6} \| train_loss \d\.\d{6} \| val_loss \d\.\d{6} \| lr \d\.\d{6}e[-+]\d\d \| time/step \d+\.\d{4}ms"
)


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_prints_the_references_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if LINE.fullmatch(line)]
    assert [int(line[5:11]) for line in steps] == [0, 10, 20, 24]
    assert any(line.startswith("test_loss ") for line in lines)
    assert "25 steps in" in lines[-2]
    assert "floor val" in lines[-1]


def test_the_json_log_tells_the_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    train.main([*SMALL, "--quiet", "--log-json", str(path)])
    events = events_of(path)
    assert [e["event"] for e in events] == ["config", "eval", "eval", "eval", "eval", "sample", "test"]
    assert events[0]["hidden_size"] == 16
    assert events[0]["chosen_backend"] == "eager"
    assert [e["step"] for e in events[1:5]] == [0, 10, 20, 24]
    assert events[1]["lr"] == 7e-4
    assert events[1]["ms_per_step"] is None
    assert events[2]["ms_per_step"] > 0
    assert len(events[5]["text"]) == 200
    assert 2 < events[6]["loss"] < 4


def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train.main([*SMALL, "--quiet"])
    assert capfd.readouterr() == ("", "")


def test_stop_after_leaves_the_schedule_unchanged(tmp_path: Path) -> None:
    full, part = tmp_path / "full.jsonl", tmp_path / "part.jsonl"
    train.main([*SMALL, "--quiet", "--log-json", str(full)])
    train.main([*SMALL, "--quiet", "--log-json", str(part), "--stop-after", "15"])

    def evaluations(path: Path) -> list[tuple[Any, ...]]:
        return [(e["step"], e["lr"], e["val_loss"]) for e in events_of(path) if e["event"] == "eval"]

    assert evaluations(part) == evaluations(full)[:2]


def test_a_run_is_saved_evaluated_and_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "run", tmp_path / "log.jsonl"
    train.main([*SMALL, "--quiet", "--out", str(out), "--log-json", str(log)])
    saved = out / "step-00000025.safetensors"
    tensors = safetensors.torch.load_file(saved)
    model = MLP(Shape(27, 3, 8, 16))
    model.load_state_dict({name: tensors[name] for name in PARAMETER_NAMES})
    evaluate.main([str(out)])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["test_loss"]) == pytest.approx(events_of(log)[-1]["loss"], abs=1e-6)
    sample.main([str(saved)])
    text = capsys.readouterr().out
    assert text == "\nrichard" + events_of(log)[-2]["text"] + "\n"
    sample.main([str(out), "--prompt", r"\nann", "--length", "5", "--seed", "7"])
    assert re.fullmatch(r"\nann[a-z\n]{5}\n", capsys.readouterr().out)


def test_ms_per_step_is_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Clocked)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: Clocked.now))
    config = Config(backend="clocked", num_steps=20, eval_every=10, quiet=True, hidden_size=16, embedding_size=8)
    result = train.train(config)
    assert [evaluation.ms_per_step for evaluation in result.evaluations] == [None, 1000.0, 1000.0]
    assert result.prepare_seconds == Clocked.preparation
    assert result.training_seconds == 20 * Clocked.step_time
    assert result.evaluation_seconds == 7 * Clocked.evaluation  # train and val at steps 0, 10 and 19, and test


def test_the_floor_is_the_mean_cost_of_the_targets_of_an_evaluation(embedded_corpus: Corpus) -> None:
    config = Config(batch_size=128, context_length=5, quiet=True)
    trainer = trainer_module.Trainer(trainer_module.Plan.of(config, embedded_corpus), RunLog(config))
    assert embedded_corpus.cost is not None
    cost, windows = embedded_corpus.cost["val"], len(embedded_corpus.val) - 5
    visited = [i % windows + 5 for i in range(len(embedded_corpus.val) // 128 * 128)]
    assert trainer.entropy["val"] == pytest.approx(sum(cost[i] for i in visited) / len(visited), rel=1e-12)


def test_the_progress_bar_shows_loss_and_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlp_fast.train", *SMALL]
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # new ones have no columns
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, cwd=tmp_path) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:  # EIO: the other end is closed
            while part := terminal.read(4096):
                shown += part
    assert process.returncode == 0
    assert re.search(rb"loss \d\.\d{4}, \d+\.\d{3} ms/step", shown)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve.{suffix}"
    train.main([*SMALL, "--quiet", "--plot", str(path)])
    head = path.read_bytes()[:100]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in head


def test_training_comes_near_the_floor_of_the_embedded_corpus(tmp_path: Path) -> None:
    """The source of the embedded corpus is known, and with it the smallest loss that any model can have on it."""
    log = tmp_path / "log.jsonl"
    result = train.train(Config(num_steps=8000, eval_every=8000, quiet=True, log_json=str(log)))
    config_event = events_of(log)[0]
    floor = config_event["floor"]
    val_loss = result.evaluations[-1].val_loss
    assert 1.8 < floor < 2.6
    assert floor - 0.005 < val_loss < floor + 0.065


def corpus_folder(tmp_path: Path, **splits: bytes) -> str:
    content = {"train": b"anna\nbob\n" * 50, "val": b"anna\n" * 40, "test": b"bob\n" * 40, **splits}
    for split, text in content.items():
        (tmp_path / f"{split}.txt").write_bytes(text)
    return str(tmp_path)


def make_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


BAD_INPUT: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("missing file", lambda p: ["--data", str(p / "none")], "none"),
    ("empty folder", lambda p: ["--data", str(p)], "train.txt"),
    ("bytes that are not UTF-8", lambda p: ["--data", corpus_folder(p, val=b"a\xff")], "UTF-8"),
    ("unknown character", lambda p: ["--data", corpus_folder(p, test=b"bob\nzoe\n" * 40)], "'z'"),
    ("split below a context", lambda p: ["--data", corpus_folder(p, val=b"an")], "val"),
    ("split below a batch", lambda p: ["--data", corpus_folder(p), "--batch-size", "190"], "batch"),
    ("context beyond the corpus", lambda p: ["--data", corpus_folder(p), "--context-length", "200"], "context"),
    ("zero size", lambda p: ["--hidden-size", "0"], "--hidden-size"),
    ("negative size", lambda p: ["--batch-size", "-3"], "--batch-size"),
    ("not a number", lambda p: ["--num-steps", "many"], "--num-steps"),
    ("not finite", lambda p: ["--learning-rate", "nan"], "--learning-rate"),
    ("seed 0", lambda p: ["--seed", "0"], "--seed"),
    ("stop beyond the end", lambda p: ["--num-steps", "5", "--stop-after", "6"], "--stop-after"),
    ("unknown backend", lambda p: ["--backend", "quantum"], "eager-raw, eager"),
    ("unknown choice", lambda p: ["--precision", "fp8"], "--precision"),
    ("unknown option", lambda p: ["--hidden", "3"], "--hidden"),
    ("tf32 on the CPU", lambda p: ["--backend", "eager", "--device", "cpu", "--precision", "tf32"], "fp32"),
    ("unwritable --out", lambda p: ["--out", "/dev/null/run"], "--out"),
    ("unwritable --log-json", lambda p: ["--log-json", str(p / "no" / "log")], "--log-json"),
    ("unwritable --plot", lambda p: ["--plot", str(p / "no" / "curve.png")], "--plot"),
    ("--plot where a folder stands", lambda p: ["--plot", make_folder(p / "curve.png")], "--plot"),
    ("too many steps", lambda p: ["--num-steps", str(10**9)], "--num-steps"),
    ("--plot of an unknown kind", lambda p: ["--plot", str(p / "curve.txt")], "--plot"),
]


@pytest.mark.parametrize(("arguments", "named"), [c[1:] for c in BAD_INPUT], ids=[c[0] for c in BAD_INPUT])
def test_bad_input_is_one_line_that_names_it(
    tmp_path: Path, arguments: Callable[[Path], list[str]], named: str
) -> None:
    given = arguments(tmp_path)
    backend = [] if "--backend" in given else ["--backend", "eager"]
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        train.main([*given, *backend])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reason", [["--batch-size", "100000"], ["--data", "nothing"], ["--hidden-size", "16777216"]])
def test_a_refused_run_leaves_files_as_they_were(tmp_path: Path, reason: list[str]) -> None:
    log, out = tmp_path / "old.jsonl", tmp_path / "new"
    log.write_text("of an earlier run\n")
    plot = ["--plot", str(tmp_path / "curve.png")]
    with pytest.raises(UserError):
        train.main([*SMALL, *reason, "--log-json", str(log), "--out", str(out), *plot])
    assert log.read_text() == "of an earlier run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="no CUDA device was found"):
        train.main(["--device", "cuda"])


def test_a_prompt_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    train.main([*SMALL, "--quiet", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="'é'"):
        sample.main([str(tmp_path), "--prompt", "rené"])


def test_the_process_ends_with_code_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlp_fast.train", "--batch-size", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mlp_fast: --batch-size must be at least 1 (got 0)\n"


def test_importing_needs_neither_triton_nor_cuda_nor_a_compiler() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import mlp_fast, mlp_fast.train, mlp_fast.evaluate, mlp_fast.sample, mlp_fast.backends as b\n"
        "from mlp_fast.config import Config; print(b.listing(Config()))"
    )
    environment = {**os.environ, "PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"compile-step .* unavailable: .*C\+\+ compiler", done.stdout)


def test_infinite_settings_never_reach_a_run() -> None:
    with pytest.raises(UserError):
        Config(weight_decay=math.inf)


def test_config_takes_numpys_numbers_and_paths(tmp_path: Path) -> None:
    config = Config(
        hidden_size=np.int64(16), batch_size=np.uint8(8), learning_rate=np.float32(0.5), direct=np.bool_(True),
        data=tmp_path, out=tmp_path / "run", stop_after=np.int32(5),
    )  # fmt: skip
    plain = Config(
        hidden_size=16, batch_size=8, learning_rate=0.5, direct=True, data=str(tmp_path), out=f"{tmp_path}/run",
        stop_after=5,
    )  # fmt: skip
    assert config == plain
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(plain)
    for wrong in (np.float64(16.0), np.bool_(True), "16"):
        with pytest.raises(UserError, match="--hidden-size"):
            Config(hidden_size=wrong)  # type: ignore[arg-type]

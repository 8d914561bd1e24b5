"""`--interpret` on the command line: a whole run of each Triton backend without a GPU, with a notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlp_fast import train

TEXTS = {"train": "abc\nba\ncab\n" * 12, "val": "ab\ncab\n" * 6, "test": "ba\nabc\n" * 6}
SIZES = {"--embedding-size": 4, "--hidden-size": 8, "--batch-size": 8, "--num-steps": 4, "--eval-every": 2}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a short run on a small corpus."""
    corpus = tmp_path_factory.mktemp("corpus")
    for split, text in TEXTS.items():
        (corpus / f"{split}.txt").write_text(text)
    return ["--data", str(corpus), *(str(x) for pair in SIZES.items() for x in pair)]


def losses(log: Path) -> list[tuple[float, float]]:
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [(e["train_loss"], e["val_loss"]) for e in events if e["event"] == "eval"]


@pytest.fixture(scope="module")
def expected(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """The losses of eager."""
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    assert train.main([*options, "--backend", "eager", "--log-json", str(log)]) == 0
    return losses(log)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels are compiled")
@pytest.mark.parametrize(
    ("backend", "precision", "apart"),
    [("triton-op", "tf32", False), ("triton-step", "fp32", True), ("triton-persistent", "tf32x3", False)],
)
def test_a_whole_run_in_the_interpreter(
    backend: str, precision: str, apart: bool, options: list[str], expected: list[tuple[float, float]],
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process, or apart in one where nothing has switched the interpreter on."""
    log = tmp_path / "log.jsonl"
    command = [*options, "--log-json", str(log), "--backend", backend, "--precision", precision, "--interpret"]
    if apart:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        assert subprocess.run([sys.executable, "-m", "mlp_fast.train", *command], env=environment).returncode == 0
    else:
        assert train.main(command) == 0
    ours, notice = losses(log), capfd.readouterr().err
    assert len(ours) == 3
    assert "--interpret: Triton's interpreter runs the kernels on the CPU" in notice
    assert (f"its products are fp32, not {precision}" in notice) == (precision != "fp32")
    assert ours == [pytest.approx(pair, abs=1e-5) for pair in expected]

"""`--interpret` on the command line: a whole run of each Triton backend without a GPU, with a notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TEXTS = {"train": "abc\nba\ncab\n" * 12, "val": "ab\ncab\n" * 6, "test": "ba\nabc\n" * 6}
SIZES = {"--embedding-size": 4, "--hidden-size": 8, "--batch-size": 8, "--num-steps": 4, "--eval-every": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels are compiled")
@pytest.mark.parametrize(
    ("backend", "precision"), [("triton-op", "tf32"), ("triton-step", "fp32"), ("triton-persistent", "tf32x3")]
)
def test_a_whole_run_in_the_interpreter(backend: str, precision: str, tmp_path: Path) -> None:
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(text)
    command = [sys.executable, "-m", "mlp_fast.train", "--data", str(tmp_path)]
    command += [str(x) for pair in SIZES.items() for x in pair]

    def losses(*options: str) -> tuple[list[tuple[float, float]], str]:
        log = tmp_path / "log.jsonl"
        result = subprocess.run([*command, "--log-json", str(log), *options], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        events = [json.loads(line) for line in log.read_text().splitlines()]
        return [(e["train_loss"], e["val_loss"]) for e in events if e["event"] == "eval"], result.stderr

    ours, notice = losses("--backend", backend, "--precision", precision, "--interpret")
    assert len(ours) == 3
    assert "--interpret: Triton's interpreter runs the kernels on the CPU" in notice
    assert (f"its products are fp32, not {precision}" in notice) == (precision != "fp32")
    assert ours == [pytest.approx(expected, abs=1e-5) for expected in losses("--backend", "eager")[0]]

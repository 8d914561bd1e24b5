"""The report: documents filled from recordings, plots that know their data, what got slower; and bench/gpu.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, tables
from bench.recording import RESULTS, Recording, load
from mlp_fast.errors import UserError

FACTS = {
    "device": "Test CPU, 2 threads",
    "device_type": "cpu",
    "driver": None,
    "cuda": None,
    "threads": 2,
    "versions": {"python": "3.11", "torch": "2.13", "triton": None},
    "system": "Linux",
    "commit": "abc123",
    "date": "2030-01-02T03:04:05+00:00",
}
ROOT = Path(__file__).resolve().parent.parent
GPU = ROOT / "bench" / "gpu.sh"


def spread(median: float, half: float = 0.1) -> dict[str, float]:
    return {"median": median, "min": median * (1 - half), "max": median * (1 + half)}


def step(backend: str, median: float, group: str = "step", id: str | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"B": 128, "T": 3, "E": 48, "H": 512, "V": 27, "precision": "fp32", "threads": 2}
    return {
        "group": group,
        "id": id or f"{backend}-128-fp32",
        "backend": backend,
        **sizes,
        "per": "step",
        "ms": spread(median),
        "rivals": {"eager": {"ms": spread(1.0), "ratio": 1.0 / median}},
        "samples_per_second": 128e3 / median,
        "first_step_seconds": 0.5,
        "loss_error": 1e-7,
        "floor_ms": 0.1,
        "x_floor": median / 0.1,
        **more,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a README, a page of docs, and one recording."""
    (tmp_path / "README.md").write_text("# Title\n\n<!-- bench:steps -->\nold\n<!-- /bench:steps -->\n\nend\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("<!-- bench:sweep -->\n<!-- /bench:sweep -->\n")
    record = Recording(FACTS, entries=[step("eager", 1.0), step("native", 0.25)])
    for size in (128, 256):
        record.entries.append(step("native", size / 512, "sweep", f"native-B{size}", B=size))
    record.save(tmp_path / "results" / "test-cpu-2-threads" / "2030-01-02.json")
    return tmp_path


def update(project: Path, *, check: bool = False) -> list[str]:
    return [Path(name).name for name in report.update(project, project / "results", check=check)]


def test_documents_and_plots_are_made_from_the_recording(project: Path) -> None:
    assert update(project) == ["README.md", "page.md", "ladder.png", "steps.png", "sweep.png"]
    text = (project / "README.md").read_text()
    assert "old" not in text
    assert text.startswith("# Title\n\n<!-- bench:steps -->\n")
    assert text.endswith("<!-- /bench:steps -->\n\nend\n")
    assert "Measured on: Test CPU, 2 threads; python 3.11, torch 2.13; Linux; commit abc123; 2030-01-02." in text
    assert "Absolute times are that machine's" in text
    assert (
        "| native | 0.2500 | 0.2250..0.2750 | 4.00 | 512,000 |\n\n"
        "| backend | lower bound, ms | x lower bound | first step, s | loss error |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| eager | 0.1000 | 10.0 | 0.50 | 1.0e-07 |\n"
        "| native | 0.1000 | 2.5 | 0.50 | 1.0e-07 |\n\n" in text
    )
    assert "](bench/results/test-cpu-2-threads/steps.png)" in text
    assert "](../bench/results/test-cpu-2-threads/sweep.png)" in (project / "docs" / "page.md").read_text()
    for name in ("ladder", "steps", "sweep"):
        assert (project / "results" / "test-cpu-2-threads" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_run_is_told_and_drawn(project: Path) -> None:
    (project / "README.md").write_text("<!-- bench:losses -->\n<!-- /bench:losses -->\n")
    file = project / "results" / "test-cpu-2-threads" / "2030-01-02.json"
    evaluations = [{"step": 200 * i, "train_loss": 3.0 - i, "val_loss": 3.5 - i} for i in range(3)]
    run = {"backend": "native", "num_steps": 401, "floor": 1.25, "test_loss": 1.5, "evaluations": evaluations}
    file.write_text(json.dumps({**json.loads(file.read_text()), "losses": run}))
    assert "losses.png" in update(project)
    text = (project / "README.md").read_text()
    assert "401 steps by native" in text
    assert "validation loss 1.500000 (entropy of its source 1.250000), test loss 1.500000 nats" in text
    assert "](bench/results/test-cpu-2-threads/losses.png)" in text


def test_every_swept_size_has_a_table_of_its_own(project: Path) -> None:
    record = Recording(FACTS)
    for letter, size in (("B", 128), ("B", 256), ("V", 27)):
        record.entries.append(step("native", size / 512, "sweep", f"native-{letter}{size}", **{letter: size}))
    first, second = tables.shown("sweep", record).split("\n\n")
    header = "| backend | ms/step | eager, ms/step | x eager | x lower bound |"
    assert first.splitlines()[0] == f"| B, windows a batch {header}"
    assert first.splitlines()[2:] == [
        "| 128 | native | 0.2500 | 1 | 4.00 | 2.5 |",
        "| 256 | native | 0.5000 | 1 | 2.00 | 5.0 |",
    ]
    assert second.splitlines()[0] == f"| V, distinct tokens {header}"
    assert len(second.splitlines()) == 3


def test_a_column_that_says_nothing_of_any_entry_is_left_out() -> None:
    record = Recording(FACTS, entries=[step("native", 0.25), step("triton-step", 0.5, device_ms=0.125)])
    header, _, *rows = tables.shown("steps", record).split("\n\n")[1].splitlines()
    assert "| samples/s | device ms/step | lower bound, ms |" in header  # and no launches/step
    assert ["| - |" in row for row in rows] == [True, False]


@pytest.mark.parametrize(("columns", "widths"), [(6, [6]), (7, [4, 4]), (9, [5, 5]), (12, [5, 5, 4]), (1, [1])])
def test_wide_tables_are_cut_and_keep_their_first_column(columns: int, widths: list[int]) -> None:
    rows = [[f"{row}{column}" for column in range(columns)] for row in "abc"]
    text = "before\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\nafter | all"
    before, *parts, after = tables.narrow(text).split("\n\n")
    assert (before, after.strip()) == ("before", "after | all")
    cut = [[line.strip("| ").split(" | ") for line in part.splitlines()] for part in parts]
    assert [len(part[0]) for part in cut] == widths
    for i, row in enumerate(rows):
        assert all(part[i][0] == row[0] for part in cut)
        assert [cell for part in cut for cell in part[i][1:]] == row[1:]


def test_chinese_pages_are_filled_in_chinese(project: Path) -> None:
    for name in ("README.md", "README.zh-CN.md"):
        (project / name).write_text("<!-- bench:ladder -->\n<!-- /bench:ladder -->\n", encoding="utf-8")
    update(project)
    english, page = ((project / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert "测量环境：Test CPU, 2 threads；python 3.11，torch 2.13；Linux；提交 abc123；2030-01-02。" in page
    assert "| 后端 | 毫秒/步 | 相对 eager 的加速比 | 下界（毫秒） | 与下界之比 |" in page
    assert "![条形图：" in page
    assert english.splitlines()[5:8] == page.splitlines()[5:8]
    assert "| native | 0.2500 | 4.00 |" in page.splitlines()[7]


def test_a_page_says_once_what_its_figures_were_measured_on(project: Path) -> None:
    blocks = "<!-- bench:ladder -->\n<!-- /bench:ladder -->\n<!-- bench:sweep -->\n<!-- /bench:sweep -->\n"
    for name in ("README.md", "README.zh-CN.md"):
        (project / name).write_text(blocks, encoding="utf-8")
    update(project)
    assert (project / "README.md").read_text().count("Test CPU") == 1
    newer = Recording({**FACTS, "date": "2030-01-03T03:04:05+00:00"}, entries=[step("native", 0.125)])
    newer.save(project / "results" / "test-cpu-2-threads" / "another.json")
    update(project)
    english, page = ((project / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert [english.count(words) for words in ("Measured on:", "Absolute times", "\n- Test CPU, 2 threads; ")] == [
        1,
        1,
        2,
    ]
    assert [page.count(words) for words in ("测量环境：", "绝对时间", "\n- Test CPU, 2 threads；")] == [1, 1, 2]
    ladder, sweep = english.split("<!-- /bench:ladder -->")
    assert "On Test CPU, 2 threads, 2030-01-03:\n\n| backend |" in ladder
    assert "On Test CPU, 2 threads, 2030-01-02:\n\n| B, windows a batch |" in sweep


def test_the_result_is_a_range_over_recordings_to_the_digits_that_agree(project: Path) -> None:
    def result() -> tuple[str, str]:
        update(project)
        return tuple((project / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))  # type: ignore[return-value]

    def recorded(device: str, ratio: float, test_loss: float, **facts: Any) -> None:
        others = {"eager": {"ratio": ratio}, "reference-loop": {"ratio": 2 * ratio}}
        record = Recording({**FACTS, "device": device, **facts}, entries=[step("native", 0.1, rivals=others)])
        record.extra["losses"] = {"num_steps": 50_000, "test_loss": test_loss, "evaluations": []}
        record.save(project / "results" / device.lower() / "new.json")

    for name in ("README.md", "README.zh-CN.md"):
        (project / name).write_text("<!-- bench:result -->\n<!-- /bench:result -->\n", encoding="utf-8")
    assert "times as fast" not in result()[0]  # nothing is said where nothing was measured
    recorded("A", 4.0, 2.3887021)
    assert "MLP of LLM101n 4.00 times as fast as eager" in result()[0]
    recorded("B", 9.0, 2.3887024)
    english, page = result()
    assert "4.00..9.00 times as fast as eager PyTorch and 8.00..18.00 times" in english
    assert "recordings: 2, machines: 2" in english
    assert "2.388702, equal in 6 decimals. No GPU has been recorded" in english
    assert "4.00..9.00 倍" in page
    assert "2.388702，6 位小数全部相同。还没有录制任何 GPU" in page
    recorded("B", 9.0, 2.38873)
    assert "equal in 4 decimals" in result()[0]
    recorded("C", 5.0, 2.388702, device_type="cuda")
    assert "GPU" not in result()[0]


def test_a_second_run_changes_nothing(project: Path) -> None:
    update(project)
    assert update(project) == []
    assert update(project, check=True) == []


def test_the_check_finds_every_kind_of_staleness_and_writes_nothing(project: Path) -> None:
    before = (project / "README.md").read_text()
    assert update(project, check=True) == ["README.md", "page.md", "ladder.png", "steps.png", "sweep.png"]
    assert (project / "README.md").read_text() == before
    update(project)
    # A figure typed by hand.
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace("4.00", "8.00"))
    assert update(project, check=True) == ["README.md"]
    update(project)
    # A newer recording.
    file = project / "results" / "test-cpu-2-threads" / "2030-01-02.json"
    content = json.loads(file.read_text())
    content["entries"][1]["ms"]["median"] = 0.2
    file.write_text(json.dumps(content))
    assert update(project, check=True) == ["README.md", "ladder.png", "steps.png"]


def test_a_block_is_filled_from_the_latest_recording_that_has_figures_for_it(project: Path) -> None:
    newer = Recording({**FACTS, "date": "2030-01-03T03:04:05+00:00"}, entries=[step("native", 0.125)])
    newer.save(project / "results" / "test-cpu-2-threads" / "another.json")
    update(project)
    readme, page = (project / "README.md").read_text(), (project / "docs" / "page.md").read_text()
    assert "2030-01-03" in readme
    assert "| 0.1250 |" in readme
    assert "2030-01-02" in page
    assert "| 256 | native |" in page
    assert update(project, check=True) == []


def test_a_dry_run_is_never_shown(project: Path) -> None:
    file = project / "results" / "test-cpu-2-threads" / "2030-01-02.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "dry": True}))
    update(project)
    assert "Measured on" not in (project / "README.md").read_text()
    assert not list(project.rglob("*.png"))


def test_an_unknown_block_is_one_clear_line(project: Path) -> None:
    (project / "README.md").write_text("<!-- bench:speed -->\n<!-- /bench:speed -->\n")
    with pytest.raises(UserError, match=r"README\.md: no block is called 'speed'"):
        update(project)


def test_every_block_is_empty_or_text_for_an_empty_recording() -> None:
    text = "\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->" for name in report.BLOCKS)
    assert report.filled(text, [[Recording(FACTS)]]).count("<!--") == 2 * len(report.BLOCKS)
    assert report.filled(text, []).count("<!--") == 2 * len(report.BLOCKS)


def test_the_projects_own_documents_show_what_is_recorded() -> None:
    assert report.update(ROOT, RESULTS, check=True) == [], "run: python -m bench.report"


# --- two recordings ---------------------------------------------------------------------------------------------------


def recorded(project: Path, name: str, device: str = "Test CPU, 2 threads", **medians: float) -> Path:
    record = Recording({**FACTS, "device": device}, entries=[step(backend, ms) for backend, ms in medians.items()])
    file = project / f"{name}.json"
    record.save(file)
    return file


def test_what_got_slower_beyond_its_spread_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = recorded(tmp_path, "old", eager=1.0, native=0.2, compile=0.8, gone=1.0)
    new = recorded(tmp_path, "new", eager=1.05, native=0.3, compile=0.5)
    assert report.main(["--against", str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["slower", "faster", "no longer measured"]
    assert "native-128-fp32: 0.2 -> 0.3 ms per step (1.50x)" in lines[0]
    assert "compile-128-fp32" in lines[1]
    assert "gone-128-fp32" in lines[2]
    # Within the spread, or the other way round, nothing got slower.
    assert report.main(["--against", str(old), str(recorded(tmp_path, "same", eager=1.05, native=0.21))]) == 0
    assert "nothing got slower beyond its spread" in capsys.readouterr().out


def test_a_single_round_and_a_dry_run_are_not_compared(tmp_path: Path) -> None:
    files = []
    for ms, dry in ((1.0, False), (2.0, False), (2.0, True)):
        record = Recording(FACTS, dry, entries=[step("native", ms, ms=spread(ms, half=0))])
        files.append(tmp_path / f"{len(files)}.json")
        record.save(files[-1])
    assert report.main(["--against", str(files[0]), str(files[1])]) == 0
    with pytest.raises(UserError, match="dry run"):
        report.main(["--against", str(files[0]), str(files[2])])


def test_different_devices_are_not_compared(tmp_path: Path) -> None:
    old, new = recorded(tmp_path, "a", eager=1.0), recorded(tmp_path, "b", device="Other", eager=1.0)
    with pytest.raises(UserError, match="of different devices"):
        report.main(["--against", str(old), str(new)])
    with pytest.raises(UserError, match="name the newer file"):
        report.main(["--against", str(old)])
    with pytest.raises(UserError, match="--against OLD NEW"):
        report.main([str(old)])


# --- bench/gpu.sh -----------------------------------------------------------------------------------------------------


def run_gpu_sh(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([GPU, *arguments], capture_output=True, text=True, env=environment, timeout=1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which a test must not occupy for ten minutes")
def test_gpu_sh_without_a_gpu_says_so(tmp_path: Path) -> None:
    assert subprocess.run(["sh", "-n", GPU]).returncode == 0
    result = run_gpu_sh(str(tmp_path))
    assert result.returncode == 2
    assert "no CUDA device was found" in result.stdout


@pytest.mark.long
def test_gpu_sh_walks_every_stage_in_a_dry_run(tmp_path: Path) -> None:
    result = run_gpu_sh("--dry-run", "--seconds", "900", str(tmp_path))
    assert result.returncode == 0, result.stdout[-4000:]
    stages = ("environment", "tests of the kernels", "tests of the backends", "record", "train")
    triton = ("triton-op", "triton-step", "triton-persistent")
    for name in (*stages, "litmus", *(f"one step of {backend}" for backend in triton)):
        assert f"== {name}" in result.stdout
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.txt", "recording.json", "trace.json.gz", "train-fp32.jsonl", "train.png"]
    record = load(tmp_path / "recording.json")
    assert record.dry
    assert record.refused == []
    backends = {entry["backend"] for entry in record.group("step")}
    assert {"eager", "triton-step", "triton-persistent"} <= backends
    assert {"compare", "profile"} <= set(record.extra)

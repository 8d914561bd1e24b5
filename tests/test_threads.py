"""How many threads compute: affinity, quotas of control groups, --threads; on trees of files like the kernel's."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlp_fast import threads
from mlp_fast.errors import UserError

V2 = "25 20 0:22 {top} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
V1 = "26 20 0:23 {top} {point} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "27 20 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def tree(root: Path, cgroup: str, mounts: list[str], **quotas: str) -> Path:
    """A file system with what the kernel says of control groups: folder -> cpu.max, or quota and period."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("\n".join(mounts))
    for folder, text in quotas.items():
        path = root / folder
        path.mkdir(parents=True, exist_ok=True)
        if "cpu,cpuacct" in folder:
            quota, period = text.split()
            (path / "cpu.cfs_quota_us").write_text(quota + "\n")
            (path / "cpu.cfs_period_us").write_text(period + "\n")
        else:
            (path / "cpu.max").write_text(text + "\n")
    return root


ONE, TWO = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup"
AT_ONE, AT_TWO = V1.format(top="/", point=f"/{ONE}"), V2.format(top="/", point=f"/{TWO}")
# name -> (processors, cgroup, mounts, quotas)
TREES = {
    "version 2": (3, "0::/a/b", [AT_TWO], {f"{TWO}/a/b": "300000 100000"}),
    "no limit": (8, "0::/a/b", [AT_TWO], {f"{TWO}/a/b": "max 100000"}),
    "above": (2, "0::/a/b", [AT_TWO], {f"{TWO}/a": "200000 100000", f"{TWO}/a/b": "max 100000"}),
    "the least": (1, "0::/a/b", [AT_TWO], {f"{TWO}/a": "200000 100000", f"{TWO}/a/b": "50000 50000"}),
    "a container's own root": (4, "0::/", [AT_TWO], {TWO: "400000 100000"}),
    "outside of what is mounted": (4, "0::/../x", [V2.format(top="/y", point=f"/{TWO}")], {TWO: "400000 100000"}),
    "another group": (8, "0::/a", [AT_TWO], {f"{TWO}/b": "100000 100000"}),
    "less than one": (1, "0::/a", [AT_TWO], {f"{TWO}/a": "20000 100000"}),
    "rounded down": (2, "0::/a", [AT_TWO], {f"{TWO}/a": "240000 100000"}),
    "rounded up": (3, "0::/a", [AT_TWO], {f"{TWO}/a": "250000 100000"}),
    "version 1": (2, "4:cpu,cpuacct:/a\n3:memory:/b", [MEMORY, AT_ONE], {f"{ONE}/a": "150000 100000"}),
    "version 1, no limit": (8, "4:cpu,cpuacct:/a", [AT_ONE], {f"{ONE}/a": "-1 100000"}),
    "version 1 in a container": (
        1,
        "4:cpu,cpuacct:/docker/12",
        [V1.format(top="/docker/12", point=f"/{ONE}")],
        {ONE: "100000 100000"},
    ),
    "both versions": (2, "4:cpu,cpuacct:/a\n0::/c", [AT_TWO, AT_ONE], {f"{ONE}/a": "200000 100000"}),
    "a blank in the path": (
        5,
        "0::/a",
        [V2.format(top="/", point="/sys/control\\040groups")],
        {"sys/control groups/a": "500000 100000"},
    ),
    "nonsense": (8, "0::/a", [AT_TWO, "", "x - cgroup"], {f"{TWO}/a": "many"}),
}


@pytest.mark.parametrize("name", TREES)
def test_quotas_of_control_groups_are_counted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, cgroup, mounts, quotas = TREES[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert threads.available(tree(tmp_path, cgroup, mounts, **quotas)) == expected


def test_without_control_groups_processors_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert threads.available(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.available(tmp_path) == 1


@pytest.mark.parametrize(("environment", "asked", "left"), [("", 2, 2), ("", 8, 4), ("8", 8, 8)])
def test_no_more_threads_than_processors_unless_asked_for(
    environment: str, asked: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = SimpleNamespace(count=asked, get_num_threads=lambda: torch.count)
    torch.set_num_threads = lambda count: setattr(torch, "count", count)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(threads, "available", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    threads.use_available()
    assert torch.count == left


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_number_of_threads_is_an_option(backend: str) -> None:
    command = [sys.executable, "-m", "mlp_fast.train", "--backend", backend, "--num-steps", "2", "--threads", "3"]
    if backend == "native":
        pytest.importorskip("mlp_fast.kernels.cpu_step").unavailable() and pytest.skip("native is not built")
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"backend {backend} on cpu, 3 threads" in run.stdout, run.stderr


def test_a_forked_child_refuses_more_than_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_forked", True)
    with pytest.raises(UserError, match="--threads 2: this process was forked"):
        threads.use(2)

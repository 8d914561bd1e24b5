"""Windows and batches: order, wrapping, and weighted evaluation against a loop."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.reference_loop import batches
from mlp_fast import backends
from mlp_fast.config import Config
from mlp_fast.model import windows as tape_module
from mlp_fast.model.windows import Tape, evaluated_positions, evaluated_windows


@given(n=st.integers(2, 60), T=st.integers(1, 8), B=st.integers(1, 70), V=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_batches_are_those_of_a_sliding_list(n: int, T: int, B: int, V: int) -> None:
    if n <= T:
        n += T
    dtype = torch.uint8 if V <= 256 else torch.int32
    tokens = torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)
    tape = Tape(tokens, T)
    expected = batches(tokens.tolist(), T, B)
    for k in range(3):
        contexts, targets = tape.batch(k, B)
        on_device = tape.batch(torch.tensor(k), B)
        wanted = next(expected)
        for got in ((contexts, targets), on_device):
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


def test_positions_wrap_after_the_last_window() -> None:
    tape = Tape(torch.arange(10), 3)  # 7 windows
    assert tape.num_windows == 7
    assert tape.positions(5, 4).tolist() == [5, 6, 0, 1]


@given(n=st.integers(20, 200), B=st.integers(1, 20), limit=st.none() | st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_weighted_windows_have_the_mean_of_the_batches(n: int, B: int, limit: int | None) -> None:
    tokens = torch.randint(4, (n,), generator=torch.Generator().manual_seed(n))
    tape = Tape(tokens, 2)
    value = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count = n // B if limit is None else min(limit, n // B)
    means = []
    for k in range(count):
        contexts, targets = tape.batch(k, B)
        means.append(value[contexts[:, 0], contexts[:, 1], targets].mean())
    windows = evaluated_windows(tape, B, limit)
    rows = windows.rows
    assert len(rows) == len({tuple(row) for row in rows.tolist()})
    assert windows.counts.sum().item() == count * B == len(evaluated_positions(tape, B, limit))
    got = windows.mean(value[rows[:, 0], rows[:, 1], rows[:, 2]])
    assert got == pytest.approx(torch.stack(means).mean().item(), abs=1e-12)


@given(
    n=st.integers(2, 120),
    T=st.integers(1, 8),
    B=st.integers(1, 70),
    V=st.sampled_from([2, 3, 256, 300, 40_000]),
    limit=st.none() | st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_distinct_windows_are_those_of_the_list_of_all_in_order(
    n: int, T: int, B: int, V: int, limit: int | None
) -> None:
    n = max(n, T + 1)
    dtype = torch.uint8 if V <= 256 else torch.int16 if V <= 32_768 else torch.int32
    tape = Tape(torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).to(dtype), T)
    visited = [tuple(row.tolist()) for row in tape.rows[evaluated_positions(tape, B, limit)]]
    expected = sorted(Counter(visited).items())
    windows = evaluated_windows(tape, B, limit)
    assert windows.rows.shape == (len(expected), T + 1)
    assert (windows.rows.dtype, windows.counts.dtype) == (torch.int64, torch.float64)
    assert list(zip(map(tuple, windows.rows.tolist()), windows.counts.tolist(), strict=True)) == expected


def test_distinct_windows_take_little_memory_beside_themselves() -> None:
    """In a process of its own, whose memory at its highest is known."""
    program = """
import torch
from mlp_fast.measure.machine import resident_peak
from mlp_fast.model.windows import Tape, evaluated_windows

tape = Tape(torch.randint(2**15, (1_000_000,)).to(torch.int16), 5)
evaluated_windows(tape, 128, 8)
before = resident_peak()
windows = evaluated_windows(tape, 128)
assert len(windows.rows) > 990_000
print((resident_peak() - before - windows.rows.nbytes - windows.counts.nbytes) / len(windows.rows))
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=100)
    assert float(told.stdout) < 80  # bytes a window


def test_a_tape_too_large_for_the_gpu_stays_and_its_batches_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for a GPU."""
    device = torch.device("meta")
    plain = Tape(torch.arange(20), 3)
    assert plain.to(device).tokens.device == device
    monkeypatch.setattr(tape_module, "DEVICE_TAPE_BYTES", plain.tokens.nbytes - 1)
    tape = plain.to(device)
    assert tape.tokens.device == torch.device("cpu")
    contexts, targets = tape.batch(2, 4)
    assert contexts.device == targets.device == device
    assert contexts.shape == (4, 3)
    assert plain.to(torch.device("cpu")).stays_on_host(torch.device("cpu")) is False
    for name in backends.REGISTRY:
        cls = backends.backend_class(name)
        monkeypatch.setattr(backends, "device_of", lambda cls, requested: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        if "cuda" in cls.devices and not cls.host_tape:
            assert "tape on the GPU" in str(backends.unsupported(name, Config(), tape=plain))

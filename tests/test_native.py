"""The C kernel against torch in float64, on every instruction set, form and number of threads."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mlp_fast import backends
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.corpus.prompt import PROMPT
from mlp_fast.kernels import _cpu_library, _model, cpu_step
from mlp_fast.model.mlp import PARAMETER_NAMES, Shape
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import TRAIN_EVAL_BATCHES, Tape, evaluated_windows

pytestmark = pytest.mark.skipif(cpu_step.unavailable() is not None, reason=f"native: {cpu_step.unavailable()}")

FORMS = ("table", "gather")
ISAS = cpu_step.instruction_sets() if cpu_step.unavailable() is None else []
LEARNING_RATE, WEIGHT_DECAY, NUM_STEPS = 1e-3, 1e-2, 60


@dataclass(frozen=True)
class Case:
    """Sizes of a test: model, batch, and the tokens of its tape."""

    V: int
    T: int
    E: int
    H: int
    B: int
    n: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.V, self.T, self.E, self.H

    def tape(self) -> torch.Tensor:
        return torch.randint(0, self.V, (self.n,), generator=torch.Generator().manual_seed(self.n))

    def state(self) -> TrainState:
        return TrainState.initial(Shape(*self.sizes), seed=1337)

    def model(self, **options: Any) -> cpu_step.NativeModel:
        model = cpu_step.NativeModel(*self.sizes, **options)
        model.set_tape(self.tape())
        load(model, self.state())
        return model

    def train(self, model: cpu_step.NativeModel, steps: int) -> list[float]:
        return model.train(self.B, steps, NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY).tolist()


CASES = [
    Case(V=27, T=3, E=48, H=512, B=128, n=5000),
    Case(V=1, T=1, E=1, H=1, B=1, n=2),
    Case(V=2, T=2, E=3, H=7, B=127, n=40),  # a batch wraps round the tape several times
    Case(V=33, T=4, E=31, H=65, B=2, n=9),
    Case(V=300, T=8, E=17, H=33, B=129, n=500),
    Case(V=65, T=1, E=16, H=100, B=1, n=100),
    Case(V=17, T=5, E=50, H=96, B=31, n=6),  # one window, over and over
    Case(V=600, T=1, E=8, H=40, B=2000, n=3000),  # logits in chunks, split by vocabulary
]


def load(model: cpu_step.NativeModel, state: TrainState) -> None:
    parts = (state.parameters, state.exp_avg, state.exp_avg_sq)
    model.load(*([part[name] for name in PARAMETER_NAMES] for part in parts), state.step)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


Run = tuple[list[float], dict[int, list[list[torch.Tensor]]]]  # losses; steps done -> parameters and moments


@threads(1)  # tensors this small gain nothing from more, and waiting threads slow down whatever else runs
def reference(case: Case, steps: list[int], dtype: torch.dtype, rounded: int | None = None) -> Run:
    """The same training by autograd and torch.optim.AdamW.

    With a seed `rounded` the initial parameters are off, at random, by up to three ulp of float32, the accuracy of
    exp and tanh in C. So much a sum in float32 is off whose terms cancel, as all do at some sizes.
    """
    state = case.state()
    tensors = [state.parameters[name].to(dtype).clone() for name in PARAMETER_NAMES]
    if rounded is not None:
        generator = torch.Generator().manual_seed(rounded)
        for t in tensors:
            t *= 1 + 3 * 2**-23 * (2 * torch.rand(t.shape, dtype=dtype, generator=generator) - 1)
    for t in tensors:
        t.requires_grad_()
    wte, w1, b1, w2, b2 = tensors
    optimizer = torch.optim.AdamW(tensors, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    rows = case.tape().unfold(0, case.T + 1, 1)
    losses, states = [], {}
    for step in range(max(steps)):
        batch = rows[(step * case.B + torch.arange(case.B)) % len(rows)]
        hidden = torch.tanh(wte[batch[:, :-1]].flatten(1) @ w1.t() + b1)
        loss = F.cross_entropy(hidden @ w2.t() + b2, batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        optimizer.step()
        losses.append(loss.item())
        if step + 1 in steps:
            moments = [[optimizer.state[t][key].clone() for t in tensors] for key in ("exp_avg", "exp_avg_sq")]
            states[step + 1] = [[t.detach().clone() for t in tensors], *moments]
    return losses, states


def assert_no_farther(
    got: list[list[torch.Tensor]], others: list[list[list[torch.Tensor]]], truth: list[list[torch.Tensor]]
) -> None:
    """Every tensor is no farther from float64 than twice the farthest of others' plus 1e-6, relative, by norm."""
    for kind, a, *b, c in zip(("parameter", "exp_avg", "exp_avg_sq"), got, *others, truth, strict=True):
        for name, mine, *theirs, exact in zip(PARAMETER_NAMES, a, *b, c, strict=True):
            scale = exact.norm().clamp_min(1e-20)
            distance = (mine - exact).norm() / scale
            allowed = 2 * max((other - exact).norm() for other in theirs) / scale + 1e-6
            assert distance <= allowed, f"{kind} {name}: {distance:.2e} > {allowed:.2e}"


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"V{c.V}-T{c.T}-E{c.E}-H{c.H}-B{c.B}")
def trained(request: pytest.FixtureRequest) -> tuple[Case, Run, Run]:
    """A case, and what torch makes of it in float32 and float64 after 1, 2 and 50 steps."""
    steps = [1, 2, 50] if request.param.B < 1000 else [1, 2]
    return (
        request.param,
        reference(request.param, steps, torch.float32),
        reference(request.param, steps, torch.float64),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_training_is_as_near_to_float64_as_torch(
    trained: tuple[Case, Run, Run], form: str, isa: str, count: int
) -> None:
    case, (eager_losses, eager), (exact_losses, exact) = trained
    model = case.model(form=form, isa=isa)
    losses: list[float] = []
    for before, step in pairwise([0, *exact]):
        with threads(count):
            losses += case.train(model, step - before)
        got = model.store()
        assert_no_farther(list(got), [eager[step]], exact[step])
        if step == 1:  # exp_avg is a tenth of the gradient: compare element by element
            for mine, torchs, truth in zip(got[1], eager[1][1], exact[1][1], strict=True):
                allowed = 2 * (torchs - truth).abs().max() + 1e-6 * truth.abs().max()
                assert (mine - truth).abs().max() <= allowed
    for mine, torchs, truth in zip(losses, eager_losses, exact_losses, strict=True):
        assert abs(mine - truth) <= 2 * abs(torchs - truth) + 1e-6
    assert model.step == max(exact)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        V=st.integers(1, 300),
        T=st.integers(1, 8),
        E=st.integers(1, 70),
        H=st.integers(1, 130),
        B=st.sampled_from([1, 2, 3, 31, 127, 128, 129]),
        n=st.integers(9, 400),
    ),
    form=st.sampled_from(_model.FORMS),
    isa=st.sampled_from(ISAS or [None]),
    count=st.integers(1, 4),
)
def test_any_sizes(case: Case, form: str, isa: str, count: int) -> None:
    model = case.model(form=form, isa=isa)
    with threads(count):
        losses = case.train(model, 2)
    exact_losses, exact = reference(case, [2], torch.float64)
    assert losses == pytest.approx(exact_losses, abs=1e-5)
    others = [reference(case, [2], torch.float32), *(reference(case, [2], torch.float64, seed) for seed in range(4))]
    assert_no_farther(list(model.store()), [states[2] for _, states in others], exact[2])


def exact_logits(case: Case, contexts: torch.Tensor) -> torch.Tensor:
    """The untrained model's logits in float64."""
    wte, w1, b1, w2, b2 = (case.state().parameters[name].double() for name in PARAMETER_NAMES)
    return torch.tanh(wte[contexts].flatten(1) @ w1.t() + b1) @ w2.t() + b2


@pytest.mark.parametrize("isa", ISAS)
@threads(1)
def test_logits_and_loss_of_windows(isa: str) -> None:
    for case in CASES:
        model = case.model(isa=isa)
        rows, counts = torch.unique(case.tape().unfold(0, case.T + 1, 1), dim=0, return_counts=True)
        logits = exact_logits(case, rows[:, :-1])
        torch.testing.assert_close(model.logits(rows[:, :-1]).double(), logits, rtol=1e-5, atol=1e-5)
        exact = (F.cross_entropy(logits, rows[:, -1], reduction="none") * counts).sum().item()
        assert model.loss_sum(model.pairs(rows, counts.double())) == pytest.approx(exact, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("V", [50, 3000])  # threads with windows of their own, and with tokens of their own
def test_many_contexts_take_several_passes(V: int, count: int) -> None:
    case = Case(V=V, T=2, E=8, H=40, B=1, n=5000)
    model = case.model()
    rows = case.tape().unfold(0, 3, 1)  # more than a pass takes, unsorted
    exact = exact_logits(case, rows[:, :-1])
    with threads(count):
        torch.testing.assert_close(model.logits(rows[:, :-1]).double(), exact, rtol=1e-5, atol=1e-5)
        loss = model.loss_sum(model.pairs(rows, torch.ones(len(rows), dtype=torch.float64)))
        assert loss == pytest.approx(F.cross_entropy(exact, rows[:, -1], reduction="sum").item(), rel=1e-7)
        assert model.loss_sum(model.pairs(rows[:0], torch.ones(0, dtype=torch.float64))) == 0.0
        assert model.logits(rows[:0, :-1]).shape == (0, V)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    # threads with windows, units and tokens of their own
    ("V", "H", "n"), [(40, 300, 600), (40, 2080, 300), (3000, 300, 300)]
)  # fmt: skip
@pytest.mark.parametrize("isa", ISAS)
def test_an_evaluation_has_the_same_bits_in_any_form_and_however_it_is_cut(
    isa: str, V: int, H: int, n: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(V=V, T=5, E=40, H=H, B=1, n=n)
    rows = case.tape().unfold(0, 6, 1)
    results, calls = [], []
    with threads(count):
        for form in _model.FORMS:
            for response_time, pace in ((1e9, 10**6), (0.0, 1)):  # one call; as many as there can be
                monkeypatch.setattr(cpu_step, "RESPONSE_TIME", response_time)
                model = case.model(form=form, isa=isa)
                model._pace = {("contexts", count): pace, ("draws",): pace}
                pairs = model.pairs(rows, torch.ones(len(rows), dtype=torch.float64))
                results.append((model.logits(rows[:, :-1]), model.loss_sum(pairs), model.sample([1] * 5, 50, 7)))
                calls.append(len(list(model._calls(("contexts", count), len(rows), cpu_step.LEAST_CONTEXTS))))
    assert calls == [1, len(rows) // cpu_step.LEAST_CONTEXTS + 1] * 3
    for logits, loss, drawn in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert (loss, drawn) == results[0][1:]


@pytest.mark.parametrize(
    ("pieces", "per_call", "per_piece"),
    [(2_000_000, 0.0, 1e-6), (10_000, 0.01, 1e-4), (200, 0.0, 0.03), (200, 1.0, 0.0)],
)
def test_a_call_is_as_long_as_the_time_allows(
    pieces: int, per_call: float, per_piece: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, least = cpu_step.NativeModel(1, 1, 1, 1), 16
    for stall in (0.0, 50.0):
        calls, lasted = [], []
        for first, count in model._calls(("work", 1), pieces, least):
            calls.append((first, count))
            lasted.append(per_call + per_piece * count + (stall if len(calls) == 3 else 0))
            clock[0] += lasted[-1]
        assert [first for first, _ in calls] == [sum(count for _, count in calls[:i]) for i in range(len(calls))]
        assert sum(count for _, count in calls) == pieces
        for (_, count), seconds in list(zip(calls, lasted, strict=True))[-5:-1]:
            if count == least:
                assert seconds >= cpu_step.RESPONSE_TIME
            else:
                assert cpu_step.RESPONSE_TIME / 2 < seconds <= cpu_step.RESPONSE_TIME * 1.01


class Watched:
    """The library; notes how long each of its calls keeps the calling thread, which does a share of all work."""

    def __init__(self, library: Any) -> None:
        self.library, self.seconds = library, [0.0]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = getattr(self.library, name)(*arguments)
            self.seconds.append(time.thread_time() - start)
            return result

        return call


@pytest.mark.parametrize(
    "sizes", [(27, 3, 48, 512), (64, 256, 64, 512), (27, 1000, 1, 1), (2000, 4, 64, 1024)], ids=str
)
@pytest.mark.parametrize("isa", ISAS)
@threads(1)
def test_no_call_of_c_is_long(isa: str, sizes: tuple[int, int, int, int]) -> None:
    """Between calls signals are answered, so none may last a tenth of a second."""
    case = Case(*sizes, B=4, n=2000)
    model = case.model(isa=isa)
    model._library = watched = Watched(model._library)
    rows, deadline = torch.randint(0, case.V, (100_000, case.T + 1), dtype=torch.int16), time.perf_counter() + 0.6
    count = 2
    while count < len(rows) and time.perf_counter() < deadline:
        count *= 2
        model.loss_sum(model.pairs(rows[:count], torch.ones(len(rows[:count]), dtype=torch.float64)))
        model.logits(rows[:count, :-1])
        model.sample([0] * case.T, count // 2, 7)
        case.train(model, count // 2)
    assert len(watched.seconds) > 10
    assert max(watched.seconds) < 0.1


LARGE = [
    Case(V=27, T=3, E=16, H=1100, B=50, n=400),  # 17 groups, of two blocks or three
    Case(V=200, T=2, E=8, H=300, B=33, n=400),  # logits split by vocabulary
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7], *LARGE], ids=["default", "odd", "chunks", "H", "V"])
def test_the_bits_do_not_depend_on_the_number_of_threads(case: Case, isa: str) -> None:
    """Nor on how the steps are cut; so a run may change the number as it goes."""
    runs = []
    for counts, pieces in (([1], [6]), ([2], [6]), ([3], [1, 3, 2]), ([4], [6]), ([64], [6]), ([5, 1, 2], [1, 3, 2])):
        model, losses = case.model(isa=isa), []
        for i, piece in enumerate(pieces):
            with threads(counts[i % len(counts)]):
                losses += case.train(model, piece)
        runs.append((losses, model.store()))
    for losses, parts in runs[1:]:
        assert losses == runs[0][0]
        for mine, first in zip(parts, runs[0][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of processors on this system")
def test_threads_without_processors_become_fewer() -> None:
    """Two threads on one processor: C breaks off, one thread goes on, with the bits that two have elsewhere."""
    code = """
copy = cpu_step.NativeModel(27, 3, 48, 512)
copy.set_tape(torch.arange(5000) % 27)
copy.load(*model.store(), model.step)
losses = []
torch.set_num_threads(1)
losses.append(copy.train(128, 400, 10**9, 1e-3, 1e-4))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(2)
threads = model._backoff.threads
model._backoff.threads = lambda: (used.append(threads()), used[-1])[1]
used = []
losses.append(model.train(128, 400, 10**9, 1e-3, 1e-4))
print(*used)
print(torch.equal(*losses), model.step, copy.step)
"""
    process = python(SETUP + code)
    out, err = process.communicate(timeout=120)
    used, same = out.splitlines()
    assert used.split()[0] == "2", err
    assert "1" in used.split(), "two threads went on for 400 steps"
    assert same == "True 450 450"


def test_fewer_threads_work_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, backoff = [100.0], cpu_step._Backoff()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert backoff.threads() == 8
    for fewer in (4, 2, 1):
        backoff.worked(backoff.threads(), oversubscribed=True)
        assert backoff.threads() == fewer
    clock[0] += 8 * cpu_step.PAUSE  # twice as long each time
    assert backoff.threads() == 8
    for _ in range(9):
        backoff.worked(8, oversubscribed=True)
    clock[0] += cpu_step.LONGEST_PAUSE - 0.01
    assert backoff.threads() == 4
    clock[0] += 0.02
    backoff.worked(backoff.threads(), oversubscribed=False)
    backoff.worked(8, oversubscribed=True)
    clock[0] += cpu_step.PAUSE + 0.01
    assert backoff.threads() == 8


def test_state_goes_in_and_out_unchanged() -> None:
    case = Case(V=19, T=3, E=21, H=45, B=16, n=200)
    first, second = case.model(), case.model()
    losses = case.train(first, 7)
    case.train(second, 3)
    third = cpu_step.NativeModel(*case.sizes)
    third.set_tape(case.tape().to(torch.uint8))
    third.load(*second.store(), second.step)
    assert case.train(third, 4) == losses[3:]
    for mine, wanted in zip(third.store(), first.store(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("dtype", cpu_step.TOKEN_TYPES)
def test_every_type_of_token_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(V=100, T=3, E=5, H=33, B=16, n=200)
    expected = case.train(case.model(), 3)
    model = case.model()
    model.set_tape(case.tape().to(dtype), copy=False)
    assert case.train(model, 3) == expected


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_and_exp(isa: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-44, 1, 5000), -torch.logspace(-44, 1, 5000)])
    exact = torch.tanh(x.double())
    got = cpu_step.tanh(x, isa).double()
    normal = exact.abs() > 1e-37
    assert ((got - exact) / exact)[normal].abs().max() < 3.6e-7  # three units in the last place
    torch.testing.assert_close(got[~normal], exact[~normal], rtol=0, atol=1e-44)
    assert got.abs().max() <= 1
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    assert cpu_step.tanh(special, isa).tolist()[:2] == [1.0, -1.0]
    assert cpu_step.tanh(special, isa)[2].isnan()
    assert cpu_step.tanh(special, isa)[3:].view(torch.int32).tolist() == special[3:].view(torch.int32).tolist()
    x = torch.linspace(-86.9, 80, 200_001)
    exact = x.double().exp()
    assert ((cpu_step.exp(x, isa).double() - exact) / exact).abs().max() < 3e-7
    assert cpu_step.exp(torch.tensor([-87.1, -1e30, -math.inf, 0.0]), isa).tolist() == [0, 0, 0, 1]
    assert cpu_step.exp(torch.tensor([math.nan]), isa).isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_updates_of_any_size_of_moment(isa: str) -> None:
    """AdamW on embeddings that the batch lacks, whose second moments are anything a float can be."""
    moments = torch.cat((torch.logspace(-45, 38.4, 600, dtype=torch.float64), torch.tensor([0.0, math.inf, math.nan])))
    case = Case(V=len(moments) + 1, T=1, E=1, H=1, B=1, n=2)
    tape = torch.tensor([case.V - 1, case.V - 1])
    state, wte = case.state(), PARAMETER_NAMES[0]
    state.parameters[wte].zero_()
    state.exp_avg[wte].fill_(1e-4)
    state.exp_avg_sq[wte][:-1, 0] = moments
    v = 0.999 * state.exp_avg_sq[wte][:-1, 0].double()
    update = -LEARNING_RATE * (0.9e-4 / 0.1) / ((v / 0.001).sqrt() + 1e-8)
    model = case.model(isa=isa)
    model.set_tape(tape)
    load(model, state)
    case.train(model, 1)
    parameters, _, exp_avg_sq = model.store()
    torch.testing.assert_close(exp_avg_sq[0][:-1, 0].double(), v, rtol=3e-7, atol=2e-45, equal_nan=True)
    torch.testing.assert_close(parameters[0][:-1, 0].double(), update, rtol=6e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rate", "decay"), [(1e-2, 100.0), (1e-2, 200.0), (1.0, 1.0)])
def test_decay_factors_of_zero_and_less(rate: float, decay: float) -> None:
    """Absurd, but finite in eager mode: what is padding must stay so."""
    case = Case(V=27, T=2, E=5, H=20, B=8, n=60)
    model, parameters = case.model(), [torch.nn.Parameter(t) for t in case.state().parameters.values()]
    wte, w1, b1, w2, b2 = parameters
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    rows, expected = case.tape().unfold(0, 3, 1), []
    for step in range(3):
        batch = rows[(8 * step + torch.arange(8)) % len(rows)]
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 10**6))
        loss = F.cross_entropy(torch.tanh(wte[batch[:, :-1]].flatten(1) @ w1.t() + b1) @ w2.t() + b2, batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert model.train(8, 3, 10**6, rate, decay).tolist() == pytest.approx(expected, rel=1e-5)
    assert model.logits(rows[:, :-1]).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_spread_and_do_not_hang(bad: float) -> None:
    for case in (CASES[0], CASES[4]):
        model = case.model()
        parameters, exp_avg, exp_avg_sq = model.store()
        parameters[3][:, 0] = bad
        model.load(parameters, exp_avg, exp_avg_sq, 0)
        losses = case.train(model, 3)
        assert not any(map(math.isfinite, losses))
        assert len(model.sample([0] * case.T, 5, 1)) == 5


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_follows_the_golden_run(
    names_corpus: Corpus, golden: dict[str, Any], isa: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 steps on the names corpus: batch losses, evaluations, the sample, and the sizes of the parameters."""
    monkeypatch.setenv("MLP_FAST_ISA", isa)
    config = Config(backend="native", data="names", num_steps=1000)
    shape = Shape.of(config, len(names_corpus.vocabulary))
    train, val, test = (Tape(tokens, shape.T) for tokens in (names_corpus.train, names_corpus.val, names_corpus.test))
    backend = backends.create(config, shape, train, TrainState.initial(shape, config.seed))
    windows = [evaluated_windows(train, 128, TRAIN_EVAL_BATCHES), evaluated_windows(val, 128)]
    wanted = golden["MLPRaw"]
    losses: list[float] = []
    for step, *evaluation in wanted["eval_step_trainloss_valloss"]:
        with threads(count):
            losses += backend.advance(step - len(losses)).tolist()
        assert [backend.mean_loss(split) for split in windows] == pytest.approx(evaluation, abs=5e-7)
    backend.advance(1)
    assert losses[:50] == pytest.approx(wanted["batch_loss_first_50_steps"], abs=5e-7)
    assert backend.mean_loss(evaluated_windows(test, 128)) == pytest.approx(wanted["test_loss"], abs=5e-7)
    prompt = names_corpus.vocabulary.encode(PROMPT)
    text = names_corpus.vocabulary.decode(backend.sample(prompt, SAMPLE_LENGTH, SAMPLE_SEED))
    assert text == wanted["sample_200"]
    norms = [backend.state().parameters[name].double().norm().item() for name in PARAMETER_NAMES]
    assert norms == pytest.approx(wanted["param_l2_final"], rel=1e-6)


def test_memory_is_linear_in_parameters_and_hidden_values() -> None:
    library = _cpu_library.library()
    for V, T, E, H, B in [
        (27, 3, 48, 512, 4096),
        (65536, 3, 48, 512, 128),
        (65536, 8, 64, 64, 4096),
        (27, 8, 64, 4096, 128),
        (65536, 3, 512, 512, 32768),
        (27, 1024, 8, 64, 4096),
    ]:
        shape = _cpu_library.Model(V, T, E, H)
        for count in (1, 2, 16):
            numbers = V * (count * E + H + 1) + H * (T * E + 1) + B * (H + 2 * T)
            floats = library.mlp_workspace_bytes(shape, B, count) / 4
            assert floats < 4 * numbers + 4e6, (V, T, E, H, B, count)


def test_memory_of_an_evaluation() -> None:
    """No more than training on batches of 512 takes, or a constant for every thread."""
    library = _cpu_library.library()
    for V, T, E, H in [
        (27, 3, 48, 512),
        (65536, 3, 48, 512),
        (2048, 3, 100_000, 64),  # an embedding as long as a batch
        (27, 3, 48, 2048),
        (27, 3, 48, 65536),
        (30, 100_000, 1, 30),
    ]:
        shape = _cpu_library.Model(V, T, E, H)
        numbers = V * (E + H + 1) + H * (T * E + 1) + 512 * (H + 2 * T)
        for count in (1, 2, 16, 64):
            floats = library.mlp_forward_bytes(shape, 10**6, count) / 4
            assert floats < 3 * numbers + count * 4e6, (V, T, E, H, count)


def bad_calls() -> dict[str, tuple[type[Exception], str, Any]]:
    """Name -> (exception, part of its message, the call, given a good model)."""
    rows, weights = torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, dtype=torch.float64)

    def pairs_of(T: int, V: int) -> cpu_step.Pairs:
        return cpu_step.NativeModel(V, T, 3, 7).pairs(torch.zeros(4, T + 1, dtype=torch.int64), weights)

    def changed(model: cpu_step.NativeModel, **parts: torch.Tensor) -> None:
        model.loss_sum(dataclasses.replace(model.pairs(rows * 0, weights), **parts))

    def loaded(index: int, tensor: Any, part: int = 0, step: Any = 1) -> Any:
        def call(model: cpu_step.NativeModel) -> None:
            parts = model.store()
            parts[part][index] = tensor
            model.load(*parts, step)

        return call

    return {
        "V of 0": (ValueError, "V must", lambda m: cpu_step.NativeModel(0, 1, 1, 1)),
        "H negative": (ValueError, "H must", lambda m: cpu_step.NativeModel(1, 1, 1, -5)),
        "E a float": (TypeError, "E must", lambda m: cpu_step.NativeModel(1, 1, 1.5, 1)),
        "T a bool": (TypeError, "T must", lambda m: cpu_step.NativeModel(1, True, 1, 1)),
        "huge": (ValueError, "memory", lambda m: cpu_step.NativeModel(2**30, 2**20, 2**20, 2**30)),
        "form": (ValueError, "form", lambda m: cpu_step.NativeModel(1, 1, 1, 1, form="fast")),
        "isa": (ValueError, "instruction set", lambda m: cpu_step.NativeModel(1, 1, 1, 1, isa="mmx")),
        "tape a list": (TypeError, "tape", lambda m: m.set_tape([0, 1, 2, 3])),
        "tape of floats": (TypeError, "tape", lambda m: m.set_tape(torch.zeros(9))),
        "tape 2-d": (ValueError, "tape", lambda m: m.set_tape(torch.zeros(9, 2, dtype=torch.int64))),
        "tape short": (ValueError, "more than T", lambda m: m.set_tape(torch.zeros(2, dtype=torch.int64))),
        "tape token": (ValueError, "0..4", lambda m: m.set_tape(torch.tensor([0, 1, 5, 2]))),
        "tape negative": (ValueError, "got -1", lambda m: m.set_tape(torch.tensor([0, 1, -1, 2]))),
        "no tape": (RuntimeError, "set_tape", lambda m: cpu_step.NativeModel(1, 1, 1, 1).train(1, 1, 1, 0.1, 0.1)),
        "batch of 0": (ValueError, "batch_size", lambda m: m.train(0, 1, 1, 0.1, 0.1)),
        "batch a tensor": (TypeError, "batch_size", lambda m: m.train(torch.tensor(3), 1, 1, 0.1, 0.1)),
        "steps negative": (ValueError, "steps", lambda m: m.train(1, -1, 1, 0.1, 0.1)),
        "no schedule": (ValueError, "num_steps", lambda m: m.train(1, 1, 0, 0.1, 0.1)),
        "learning rate": (TypeError, "learning_rate", lambda m: m.train(1, 1, 1, "fast", 0.1)),
        "weight decay": (TypeError, "weight_decay", lambda m: m.train(1, 1, 1, 0.1, None)),
        "batch past any memory": (ValueError, "memory", lambda m: m._workspace("mlp_workspace_bytes", 2**57, 1)),
        "too many steps": (ValueError, "too large", lambda m: m.train(2**31 - 1, 2**40, 1, 0.1, 0.1)),
        "four tensors": (ValueError, "five", lambda m: m.load(*(part[:4] for part in m.store()), 0)),
        "shape": (ValueError, "W1", loaded(1, torch.zeros(7, 5))),
        "transposed": (ValueError, "W2", loaded(3, torch.zeros(7, 5), part=2)),
        "dtype": (TypeError, "float32", loaded(2, torch.zeros(7, dtype=torch.float64), part=1)),
        "not a tensor": (TypeError, "b2", loaded(4, [0.0] * 5)),
        "meta tensor": (ValueError, "CPU", loaded(4, torch.zeros(5, device="meta"))),
        "step": (ValueError, "step", loaded(4, torch.zeros(5), step=-1)),
        "contexts": (ValueError, "contexts", lambda m: m.logits(rows)),
        "context token": (ValueError, "0..4", lambda m: m.logits(torch.full((3, 2), 5))),
        "rows": (ValueError, "rows", lambda m: m.loss_sum(m.pairs(rows[:, :2], weights))),
        "row token": (ValueError, "0..4", lambda m: m.loss_sum(m.pairs(rows - 1, weights))),
        "weights": (ValueError, "weights", lambda m: m.loss_sum(m.pairs(rows, weights[:3]))),
        "weights dtype": (TypeError, "weights", lambda m: m.loss_sum(m.pairs(rows, weights.float()))),
        "pairs of another length": (ValueError, "T=2", lambda m: m.loss_sum(pairs_of(3, 5))),
        "pairs of another vocabulary": (ValueError, "V=5", lambda m: m.loss_sum(pairs_of(2, 6))),
        "targets": (ValueError, "targets", lambda m: changed(m, targets=torch.full((4,), 2**30, dtype=torch.int32))),
        "targets dtype": (TypeError, "targets", lambda m: changed(m, targets=torch.zeros(4, dtype=torch.int64))),
        "pair contexts": (ValueError, "contexts", lambda m: changed(m, contexts=torch.full((1, 2), 2**40))),
        "pair contexts cut": (ValueError, "contig", lambda m: changed(m, contexts=torch.zeros(2, 2, dtype=int).t())),
        "too few contexts": (ValueError, "begins", lambda m: changed(m, contexts=torch.zeros(0, 2, dtype=int))),
        "begins": (ValueError, "rise from 0 to 4", lambda m: changed(m, begins=torch.tensor([0, 5]))),
        "begins that fall": (
            ValueError,
            "rise",
            lambda m: changed(m, contexts=torch.zeros(3, 2, dtype=int), begins=torch.tensor([0, 3, 2, 4])),
        ),
        "pair weights": (ValueError, "weights", lambda m: changed(m, weights=weights[:2])),
        "sample context": (ValueError, "context", lambda m: m.sample([1], 3, 1)),
        "sample token": (ValueError, "0..4", lambda m: m.sample([1, 7], 3, 1)),
        "sample token past int64": (ValueError, "0..4", lambda m: m.sample([1, 2**70], 3, 1)),
        "sample token a float": (TypeError, "token", lambda m: m.sample([1, 0.5], 3, 1)),
        "sample count": (ValueError, "count", lambda m: m.sample([1, 2], -3, 1)),
        "sample seed": (ValueError, "seed", lambda m: m.sample([1, 2], 3, 0)),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_never_reach_c(name: str) -> None:
    error, message, call = bad_calls()[name]
    model = Case(V=5, T=2, E=3, H=7, B=4, n=30).model()
    with pytest.raises(error, match=message):
        call(model)
    assert model.step == 0


def test_tensors_of_any_strides() -> None:
    case = Case(V=5, T=2, E=3, H=7, B=4, n=30)
    model, wanted = case.model(), case.model()
    parts = [[torch.cat([t, t], dim=-1)[..., : t.shape[-1]] for t in part] for part in model.store()]
    model.load(*parts, 0)
    model.set_tape(torch.stack([case.tape()] * 2, dim=1)[:, 0])
    assert case.train(model, 3) == case.train(wanted, 3)


def test_the_tape_is_the_models_own() -> None:
    case = Case(V=5, T=2, E=3, H=7, B=4, n=30)
    model, tape = case.model(), case.tape()
    model.set_tape(tape)
    tape.fill_(10**6)
    assert case.train(model, 3) == case.train(case.model(), 3)


def test_other_threads_run_meanwhile() -> None:
    """The GIL is released: Python goes on counting while the kernel computes."""
    case = Case(V=27, T=3, E=48, H=512, B=512, n=5000)
    model = case.model()
    case.train(model, 20)
    counted = [0]
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    before = counted[0]
    start = time.perf_counter()
    _cpu_library.library()  # the calls below are long ones: a held GIL would stop the counter for their whole length
    model._pace = {("steps", case.B, torch.get_num_threads()): 10**6}
    case.train(model, 300)
    seconds, ticks = time.perf_counter() - start, counted[0] - before
    done.set()
    counter.join()
    assert ticks >= 5, f"{ticks} ticks in {seconds:.3f} s"


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


SETUP = """
import os, sys, time, torch
from mlp_fast.kernels import cpu_step
model = cpu_step.NativeModel(27, 3, 48, 512)
parts = [[torch.full(shape, 0.01) for shape in model.shapes] for _ in range(3)]
model.load(*parts, 0)
model.set_tape(torch.arange(5000) % 27)
model.train(128, 50, 10**9, 1e-3, 1e-4)
"""


ENDLESS = {
    "train": "model.train(128, 10**8, 10**9, 1e-3, 1e-4)",
    "logits": "[model.logits(contexts) for _ in range(10**6)]",
    "loss_sum": "[model.loss_sum(pairs) for _ in range(10**6)]",
    "sample": "model.sample([0, 0, 0], 10**8, 1)",
}


@pytest.mark.parametrize("work", ENDLESS)
def test_interrupt_is_answered_at_once(work: str) -> None:
    code = f"""
rows = torch.randint(0, 27, (10**6, 4), dtype=torch.uint8)
contexts, pairs = rows[:, :3].contiguous(), model.pairs(rows, torch.ones(10**6, dtype=torch.float64))
print("ready", flush=True)
try:
    {ENDLESS[work]}
except KeyboardInterrupt:
    print(time.time(), model.step, flush=True)
"""
    process = python(SETUP + code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    sent = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    answered, step = out.split()
    assert float(answered) - sent < 0.1, err
    assert int(step) > 50 if work == "train" else int(step) == 50


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_refused_memory_is_a_memory_error_and_the_model_stays() -> None:
    code = """
import re, resource
large = cpu_step.NativeModel(27, 3, 48, 200_000)
tape, narrow = torch.zeros(10**8, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8)
rows, weights = narrow.expand(2 * 10**7, 4), torch.zeros(1, dtype=torch.float64).expand(2 * 10**7)
small = [[torch.zeros(1).expand(shape) for shape in large.shapes] for _ in range(3)]
held = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_AS, (held + 6 * 10**7,) * 2)
calls = {
    "init": lambda: cpu_step.NativeModel(27, 3, 48, 10**6),
    "load": lambda: large.load(*small, 0),
    "store": lambda: large.store(),
    "set_tape": lambda: model.set_tape(tape),
    "train": lambda: model.train(10**6, 1, 10, 1e-3, 1e-4),
    "losses": lambda: model.train(1, 10**8, 10**8, 1e-3, 1e-4),
    "logits": lambda: model.logits(rows[:, :3]),
    "pairs": lambda: model.pairs(rows, weights),
    "sample": lambda: model.sample([0, 0, 0], 10**8, 1),
}
for name, call in calls.items():
    try:
        call()
        print(name, "was done")
    except MemoryError as error:
        print(name, error)
print(model.step, model.train(128, 3, 10**9, 1e-3, 1e-4).isfinite().all().item(), model.step)
"""
    out, err = python(SETUP + code).communicate(timeout=60)
    *lines, last = out.splitlines()
    assert len(lines) == 9, err
    assert all(
        re.fullmatch(r"\w+ native: the memory was refused \(you tried to allocate \d+ bytes\)", x) for x in lines
    )
    assert last == "50 True 53"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_train() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forking with threads
child = os.fork()
losses = model.train(128, 20, 10**9, 1e-3, 1e-4)
if child == 0:
    os._exit(0 if losses.isfinite().all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = python(SETUP + code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[3]
    for isa in ISAS:
        monkeypatch.setenv("MLP_FAST_ISA", isa)
        chosen = case.train(case.model(), 2)
        monkeypatch.delenv("MLP_FAST_ISA")
        assert chosen == case.train(case.model(isa=isa), 2)
    monkeypatch.setenv("MLP_FAST_ISA", "mmx")
    assert "MLP_FAST_ISA=mmx" in str(cpu_step.unavailable())

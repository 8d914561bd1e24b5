"""Timing: a known time is reported, a wrong backend gets no number, memory is seen."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlp_fast.backends.eager import Eager
from mlp_fast.config import Config
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, Verifier, float64_run
from mlp_fast.measure.timing import Spread, measure
from mlp_fast.model.mlp import PARAMETER_NAMES, W1, W2, Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

SHAPE = Shape(V=11, T=2, E=6, H=20)
CONFIG = Config(context_length=2, embedding_size=6, hidden_size=20, batch_size=16, num_steps=60, device="cpu")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tape() -> Tape:
    return Tape(torch.randint(11, (200,), generator=torch.Generator().manual_seed(4)).to(torch.uint8), 2)


@pytest.fixture(scope="module")
def verifier(tape: Tape) -> Verifier:
    return Verifier(CONFIG, SHAPE, tape)


def test_a_backend_that_sleeps_5_ms_a_step_takes_5_ms() -> None:
    def sleeper(steps: int) -> None:
        for _ in range(steps):
            time.sleep(0.005)

    for _ in range(5):  # a busy machine only ever adds
        samples = measure({"sleeper": sleeper, "other": lambda steps: None}, [2] * 15)
        if Spread.of(samples["sleeper"]).median < 5.25:
            break
    assert Spread.of(samples["sleeper"]).median == pytest.approx(5, rel=0.05)
    assert Spread.of(samples["other"]).median < 0.5


def test_rounds_are_interleaved_in_turning_order_and_finished_off_the_clock() -> None:
    calls: list[str] = []

    def finish(name: str, result: int) -> None:
        calls.append(f"{name}{result}")
        time.sleep(0.01)

    samples = measure(dict.fromkeys("abc", lambda steps: steps), [3, 2, 2, 1], finish)
    assert calls == ["a3", "b3", "c3", "b2", "c2", "a2", "c2", "a2", "b2", "a1", "b1", "c1"]
    assert all(len(times) == 4 and max(times) < 5 for times in samples.values())


def test_threads_that_one_leaves_spinning_for_a_while_do_not_run_beside_the_next() -> None:
    spinning_until = [0.0]
    overtaken = []

    def spinner(steps: int) -> None:
        spinning_until[0] = time.perf_counter() + 0.01

    def next_one(steps: int) -> None:
        overtaken.append(time.perf_counter() < spinning_until[0])

    measure({"spinner": spinner, "next": next_one}, [1] * 4)
    assert overtaken == [False] * 4


def test_times_are_per_step_of_their_own_round() -> None:
    samples = measure({"fixed": lambda steps: time.sleep(0.02)}, [1, 4])["fixed"]
    assert samples[0] == pytest.approx(20, rel=0.2)
    assert samples[1] == pytest.approx(5, rel=0.2)


def test_spread_is_the_median_with_its_extremes() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 9.0]) == Spread(median=3.5, min=1.0, max=9.0)


class Tampered(Eager):
    """Eager with something changed about its gradients."""

    name = "tampered"
    tamper: Callable[[dict[str, Tensor]], object] = staticmethod(lambda gradients: None)

    _hook: Any = None

    def _loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        def before_step(*_: object) -> None:
            type(self).tamper({name: p.grad for name, p in self.model.named_parameters()})

        if self._hook is None:
            self._hook = self.optimizer.register_step_pre_hook(before_step)
        return super()._loss(contexts, targets)


def tampered(tape: Tape, tamper: Callable[[dict[str, Tensor]], object]) -> Tampered:
    cls = type("TamperedSo", (Tampered,), {"tamper": staticmethod(tamper)})
    return cls(CONFIG, SHAPE, tape, TrainState.initial(SHAPE, CONFIG.seed), CPU)


def test_the_verifier_passes_the_right_backend_and_leaves_it_at_the_start(verifier: Verifier, tape: Tape) -> None:
    backend = tampered(tape, lambda gradients: None)
    assert verifier.check(backend) < 1e-6
    assert backend.state().step == 0
    assert all(torch.equal(tensor, verifier.initial.parameters[n]) for n, tensor in backend.state().parameters.items())


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_a_gradient_off_by_a_thousandth_gets_no_number(verifier: Verifier, tape: Tape, name: str) -> None:
    # AdamW takes the scale of a gradient out again: the losses stay what they were, the moments do not.
    with pytest.raises(NotEquivalent, match=f"exp_avg of {name}"):
        verifier.check(tampered(tape, lambda gradients: gradients[name].mul_(1.001)))


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_one_number_of_a_gradient_off_by_a_thousandth_gets_no_number(verifier: Verifier, tape: Tape, name: str) -> None:
    with pytest.raises(NotEquivalent, match="is not equivalent"):
        verifier.check(tampered(tape, lambda gradients: gradients[name].view(-1)[3].add_(1e-3)))


def test_a_wrong_loss_and_a_loss_that_is_not_a_number_get_no_number(verifier: Verifier, tape: Tape) -> None:
    class Liar(Eager):
        name = "liar"
        extra = 1e-4

        def advance(self, steps: int) -> Tensor:
            return super().advance(steps) + self.extra

    backend = Liar(CONFIG, SHAPE, tape, verifier.initial, CPU)
    with pytest.raises(NotEquivalent, match=r"a loss is off by 1\.0e-04"):
        verifier.check(backend)
    backend.extra = float("nan")
    with pytest.raises(NotEquivalent, match="a loss is off by nan"):
        verifier.check(backend)


def test_eager_itself_is_held_to_float64(verifier: Verifier, tape: Tape) -> None:
    class WrongEager(Eager):
        name = BASELINE

        def advance(self, steps: int) -> Tensor:
            self.config = dataclasses.replace(self.config, learning_rate=8e-4)
            return super().advance(steps)

    with pytest.raises(NotEquivalent, match="eager is not equivalent"):
        verifier.check(WrongEager(CONFIG, SHAPE, tape, verifier.initial, CPU))


def test_the_float64_run_agrees_with_the_gradients_of_the_written_out_step(tape: Tape) -> None:
    """Its first moments after one step are a tenth of the gradients, which finite differences confirm."""
    losses, state = float64_run(CONFIG, SHAPE, tape, 1)
    initial = TrainState.initial(SHAPE, CONFIG.seed).parameters

    def loss(parameters: dict[str, Tensor]) -> float:
        contexts, targets = tape.batch(0, CONFIG.batch_size)
        wte, w1, b1, w2, b2 = (parameters[name].double() for name in PARAMETER_NAMES)
        logits = torch.tanh(wte[contexts].flatten(1) @ w1.t() + b1) @ w2.t() + b2
        return torch.nn.functional.cross_entropy(logits, targets).item()

    assert losses.item() == pytest.approx(loss(initial), abs=1e-12)
    for name, place in ((W1, (3, 2)), (W2, (5, 7))):
        shifted = []
        for shift in (1e-5, -1e-5):
            moved = {key: tensor.double() for key, tensor in initial.items()}
            moved[name][place] += shift
            shifted.append(loss(moved))
        slope = (shifted[0] - shifted[1]) / 2e-5
        assert state.exp_avg[name][place].item() == pytest.approx(0.1 * slope, rel=1e-5)


def test_peak_memory_sees_what_was_freed_again() -> None:
    with machine.PeakMemory(CPU) as memory:
        torch.ones(20_000_000)
    assert memory.bytes == pytest.approx(80e6, rel=0.05)
    with machine.PeakMemory(CPU) as memory:
        torch.ones(10)
    assert memory.bytes < 4e6


def test_the_facts_beside_a_figure() -> None:
    facts = machine.facts(CPU)
    assert facts["versions"]["torch"] == torch.__version__
    threads = torch.get_num_threads()
    assert facts["device"].endswith(", 1 thread" if threads == 1 else f", {threads} threads")
    assert facts["driver"] is None
    assert machine.folder_name("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"

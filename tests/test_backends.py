"""Every backend against the golden trace of the reference, and against each other's checkpoints."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.backends.compiled import CompileStep
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.kernels import cpu_step
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_windows
from mlp_fast.run.log import RunLog
from mlp_fast.run.trainer import Plan, Trainer

DEFAULT = Shape(V=27, T=3, E=48, H=512)
EAGER = ("eager-raw", "eager")
# Who computes as the reference did, which ran on a CPU: on a GPU eager's products and sums are added in another order.
REFERENCE = () if torch.cuda.is_available() else EAGER


# The worked example of docs/add-a-backend.md. In float64 the weight decay is what the formula says, not a whole unit in
# the last place (docs/numerics.md), so it leaves the reference, which is in float32.
DOUBLE = "double"


def available(name: str, **settings: Any) -> Config:
    """The settings of a quiet run of a backend; the test is skipped, with the reason, where it is unavailable."""
    config = Config(backend=name, quiet=True, **settings)
    reason = backends.unsupported(name, config)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return config


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_a_thousand_steps_follow_the_golden_trace(name: str, golden: dict[str, Any], names_corpus: Corpus) -> None:
    config = available(name, num_steps=1000)
    expected = golden["MLPRaw" if name.endswith("raw") else "MLP"]
    tolerance = 1e-5 if name == DOUBLE else 5e-7
    counters.clear()
    result = Trainer(Plan.of(config, names_corpus), RunLog(config)).run()
    assert counters["stats"]["unique_graphs"] == name.startswith("compile")  # one compilation serves the whole run
    assert [e.step for e in result.evaluations] == [row[0] for row in expected["eval_step_trainloss_valloss"]]
    for evaluation, (_, train_loss, val_loss) in zip(
        result.evaluations, expected["eval_step_trainloss_valloss"], strict=True
    ):
        assert evaluation.train_loss == pytest.approx(train_loss, abs=tolerance)
        assert evaluation.val_loss == pytest.approx(val_loss, abs=tolerance)
    assert result.test_loss == pytest.approx(expected["test_loss"], abs=tolerance)
    norms = [p.double().norm().item() for p in result.state.parameters.values()]
    # The reference itself ends 5.3e-4 from a float64 run (in wte); a backend may be nearer to float64 than to it.
    assert norms == pytest.approx(expected["param_l2_final"], abs=2e-5 if name in REFERENCE else 1e-3)
    if name in REFERENCE:
        assert result.sample == expected["sample_200"]


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_the_first_batch_losses_are_the_references(name: str, golden: dict[str, Any], names_corpus: Corpus) -> None:
    config = available(name, num_steps=1000)
    expected = golden["MLPRaw" if name.endswith("raw") else "MLP"]["batch_loss_first_50_steps"]
    tolerance = 2e-6  # a batch loss is one float32 of about 3, whose unit in the last place is 2.4e-7
    backend = backends.create(config, DEFAULT, Tape(names_corpus.train, 3), TrainState.initial(DEFAULT, 1337))
    assert torch.cat([backend.advance(7), backend.advance(43)]).tolist() == pytest.approx(expected, abs=tolerance)


SMALL = Shape(V=11, T=2, E=6, H=20)


def small_backend(name: str, state: TrainState, **settings: Any) -> Backend:
    config = available(
        name, num_steps=60, context_length=2, embedding_size=6, hidden_size=20, batch_size=16, **settings
    )
    tokens = torch.randint(11, (100,), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    return backends.create(config, SMALL, Tape(tokens, 2), state)


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_state_goes_out_and_in_bit_for_bit(name: str) -> None:
    straight = small_backend(name, TrainState.initial(SMALL, 1))
    straight.prepare()
    expected = torch.cat([straight.advance(13), straight.advance(12)])
    halfway = small_backend(name, TrainState.initial(SMALL, 1))
    first = halfway.advance(13).clone()
    state = halfway.state()
    assert state.step == 13
    halfway.advance(3)  # what follows must not touch the copy
    resumed = small_backend(name, state)
    assert torch.equal(torch.cat([first, resumed.advance(12)]), expected)
    left, right = resumed.state(), straight.state()
    assert left.step == right.step == 25
    for part in ("parameters", "exp_avg", "exp_avg_sq"):
        for key, tensor in getattr(left, part).items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, getattr(right, part)[key])


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_a_state_of_the_baseline_goes_on_elsewhere(name: str) -> None:
    baseline = small_backend("eager", TrainState.initial(SMALL, 1))
    baseline.advance(10)
    other = small_backend(name, baseline.state())
    assert other.advance(20).tolist() == pytest.approx(baseline.advance(20).tolist(), abs=1e-5)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("name", [name for name in backends.REGISTRY if name not in EAGER])
def test_both_forms_compute_the_same_losses(name: str, form: str) -> None:
    baseline = small_backend("eager", TrainState.initial(SMALL, 1))
    config = available(name, form=form)
    refused = backends.unsupported(name, config, DEFAULT)
    if refused:  # by those that have the table form only, and by no other
        assert (name, form) in {("triton-step", "gather"), ("triton-persistent", "gather")}
        assert "--form gather is for triton-op and compile-step" in refused
        return
    other = small_backend(name, TrainState.initial(SMALL, 1), form=form)
    assert other.advance(20).tolist() == pytest.approx(baseline.advance(20).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["triton-op", "triton-step", "triton-persistent"])
def test_precisions_that_a_gpu_lacks_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refused(precision: str, capability: tuple[int, int]) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return backends.unsupported(name, Config(device="cuda", precision=precision), DEFAULT)

    for precision in ("tf32", "tf32x3"):
        expected = f"--precision {precision} needs a GPU from sm_80 on, and this one is sm_75; choose fp32"
        assert refused(precision, (7, 5)) == expected
        assert all(refused(precision, found) is None for found in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))
    assert refused("fp32", (7, 5)) is None
    assert refused("fp32", (7, 0)) == "its kernels are made for GPUs from sm_75 on, and this one is sm_70"


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_losses_and_logits_of_given_windows_are_the_baselines(name: str) -> None:
    state = TrainState.initial(SMALL, 1)
    baseline, other = small_backend("eager", state), small_backend(name, state)
    windows = evaluated_windows(baseline.tape, 16)
    assert other.mean_loss(windows.to(other.device)) == pytest.approx(baseline.mean_loss(windows), abs=1e-6)
    logits, expected = (b.logits(windows.contexts.to(b.device)).detach().cpu() for b in (other, baseline))
    torch.testing.assert_close(logits, expected)
    assert other.sample([0, 1], 30, 42) == baseline.sample([0, 1], 30, 42)


@pytest.mark.parametrize(
    ("settings", "native_missing", "told"),
    [
        ({}, None, ""),
        ({}, "its C library was not built", " (not native: its C library was not built)"),
        ({"direct": True}, None, " (not native: it computes no direct connections; leave out --direct)"),
        ({"backend": "eager"}, "its C library was not built", ""),
    ],
)
def test_auto_says_why_not_the_better_backend(
    settings: dict[str, Any], native_missing: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_step, "unavailable", lambda: native_missing)
    monkeypatch.setattr(CompileStep, "missing", staticmethod(lambda device: None))
    config = Config(device="cpu", **settings)
    tape = Tape(torch.arange(50) % 11, 2)
    choice = backends.resolve(config, SMALL, tape)
    assert choice.note == told
    assert bool(told) == (choice.cls.name == "compile-step")


def test_auto_on_a_cpu_is_the_fastest_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(device="cpu")
    monkeypatch.setattr(cpu_step, "unavailable", lambda: None)
    monkeypatch.setattr(CompileStep, "missing", staticmethod(lambda device: None))
    assert backends.resolve(config, DEFAULT).cls.name == "native"
    monkeypatch.setattr(cpu_step, "unavailable", lambda: "no C compiler was found")
    assert backends.resolve(config, DEFAULT).cls.name == "compile-step"
    monkeypatch.setattr(CompileStep, "missing", staticmethod(lambda device: "no C++ compiler was found"))
    assert backends.resolve(config, DEFAULT).cls.name == "eager"


def test_the_listing_names_every_backend_with_its_state() -> None:
    lines = backends.listing(Config()).splitlines()
    assert [line.split()[0] for line in lines] == backends.names()
    assert all("available" in line for line in lines[: len(backends.REGISTRY)])
    refusing = {line.split()[0] for line in lines if line.endswith("no --direct")}
    assert refusing == {name for name in backends.REGISTRY if not backends.backend_class(name).direct} > {"native"}

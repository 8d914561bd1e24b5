"""The benchmarks' own rules: bounds, probes, cases, recordings; and that a wrong backend stays without a number."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_backends import Slow, Wrong, register
from torch import Tensor

from bench import (
    lower_bound,
    operators,
    other_work,
    probes,
    processes,
    record,
    recording,
    reference_loop,
    steps,
    suite,
    tables,
)
from bench.case import Case, Entry, Plan, Skipped, plain_timer, timed_beside
from bench.recording import Recording
from mlp_fast.backends.eager import Eager
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure.equivalence import NotEquivalent
from mlp_fast.measure.timing import Spread
from mlp_fast.model.mlp import MLP, Shape, initial_parameters
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import SAMPLE_SEED, sample
from mlp_fast.model.windows import WeightedWindows

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = Shape(V=27, T=3, E=48, H=512)
CPU = torch.device("cpu")
DRY = Plan(dry=True)
FACTS = {
    "device": "test cpu, 2 threads",
    "device_type": "cpu",
    "driver": None,
    "cuda": None,
    "threads": 2,
    "versions": {"python": "3", "torch": "2"},
    "system": "Linux",
    "commit": "abc",
    "date": "2030-01-02T03:04:05+00:00",
}
PROBES = {
    "fma_rate": {"1": 1e11, "2": 2e11},
    "matmul_rate": 1e11,
    "copy_bandwidth": {"1048576": 4e11, "16777216": 2e11, "536870912": 1e10},
}


# --- lower bounds -----------------------------------------------------------------------------------------------------


def test_a_step_costs_what_the_design_says() -> None:
    table = lower_bound.step_cost(DEFAULT, 128, "table")
    gather = lower_bound.step_cost(DEFAULT, 128, "gather")
    assert table.operations / 1e6 == pytest.approx(24, abs=0.5)
    assert gather.operations / 1e6 == pytest.approx(68, abs=1)
    assert table.bytes == gather.bytes == 24 * 89_387


def test_the_gather_forms_products_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = MLP(DEFAULT, initial_parameters(DEFAULT, 1))
    with FlopCounterMode(display=False) as counter:
        _, loss = model(torch.zeros(128, 3, dtype=torch.int64), torch.zeros(128, dtype=torch.int64))
        loss.backward()
    products = (
        lower_bound.step_cost(DEFAULT, 128, "gather").operations - lower_bound.ADAMW_OPERATIONS * DEFAULT.num_parameters
    )
    assert counter.get_total_flops() == products


def test_the_lower_bound_takes_the_slower_of_compute_and_memory_and_adds_the_waiting() -> None:
    cost = lower_bound.Cost(operations=4e8, bytes=1e6)
    assert lower_bound.step_bound(cost, PROBES, "fp32", threads=2).total == pytest.approx(2.0)  # type: ignore[union-attr]
    assert lower_bound.step_bound(cost, PROBES, "fp32", threads=1).total == pytest.approx(4.0)  # type: ignore[union-attr]
    heavy = lower_bound.step_bound(lower_bound.Cost(operations=1, bytes=2**27), PROBES, "fp32", 2)
    assert heavy is not None
    assert heavy.total == heavy.memory == pytest.approx(1e3 * 2**27 / 1e10)
    cuda = {
        "fp32_rate": 5e13,
        "tf32_rate": 3e14,
        "copy_bandwidth": {"16777216": 4e12},
        "graph_node": 1e-6,
        "empty_launch": 3e-6,
        "grid_barrier": {"8": 1e-6, "64": 1.5e-6, "132": 2e-6},
    }
    small = lower_bound.Cost(operations=3e8, bytes=0)
    totals = {p: lower_bound.step_bound(small, cuda, p, 1).total for p in ("fp32", "tf32x3", "tf32")}  # type: ignore[union-attr]
    assert totals == pytest.approx({"fp32": 6e-3, "tf32x3": 3e-3, "tf32": 1e-3})
    waits = {
        "launched": (lower_bound.Synchronisation(launches=2), 6e-3),
        "captured": (lower_bound.Synchronisation(launches=2, captured=True), 2e-3),
        "barriers": (lower_bound.Synchronisation(barriers=2, programs=60), 3e-3),
    }
    for sync, expected in waits.values():
        parts = lower_bound.step_bound(small, cuda, "tf32", 1, sync)
        assert parts is not None
        assert parts.synchronisation == pytest.approx(expected)
        assert parts.total == pytest.approx(1e-3 + expected)


def test_without_a_measured_rate_there_is_no_lower_bound() -> None:
    assert (
        lower_bound.step_bound(lower_bound.Cost(1, 1), {**PROBES, "fma_rate": "no C compiler was found"}, "fp32", 1)
        is None
    )


def test_the_form_that_counts_is_the_backends() -> None:
    assert lower_bound.form_of("eager", "auto", DEFAULT, 128) == "gather"
    assert lower_bound.form_of("native", "auto", DEFAULT, 128) == "table"
    assert lower_bound.form_of("native", "auto", DEFAULT, 16) == "gather"


# --- probes -----------------------------------------------------------------------------------------------------------


def test_the_probes_measure_this_machine() -> None:
    for _ in range(5):  # a busy machine may slow one probe down and not the other
        measured = probes.measure_all(CPU, quick=True)
        assert 1e9 < measured["matmul_rate"] < 1e14
        assert all(1e8 < bandwidth < 1e13 for bandwidth in measured["copy_bandwidth"].values())
        if isinstance(measured["fma_rate"], str):
            pytest.skip(measured["fma_rate"])
        if measured["fma_rate"]["1"] > 0.5 * measured["matmul_rate"]:
            break
    # A product of matrices cannot beat the multiply-adds it is made of; both are noisy.
    assert measured["fma_rate"]["1"] > 0.5 * measured["matmul_rate"]
    text = probes.table(measured)
    assert "fp32 multiply-adds, 1 thread |" in text
    assert "working set of 1,048,576 bytes" in text


def test_a_probe_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.shutil, "which", lambda name: None)
    measured = probes.measure_all(CPU, quick=True)
    assert measured["fma_rate"] == "no C compiler was found"
    assert "| not measured: no C compiler was found |" in probes.table(measured)


def test_a_probe_that_breaks_off_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(probes, "probes_of", lambda device, quick: {"fma_rate": broken, "matmul_rate": lambda: 1e11})
    assert probes.measure_all(CPU) == {"fma_rate": "failed: RuntimeError: out of luck", "matmul_rate": 1e11}


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Slow, Wrong)
    monkeypatch.setattr(steps, "_HELD", [])


def step_case(name: str, *others: str) -> Case:
    return steps.step_case("step", name, name, steps.Setting(DRY.config(), threads=1), others, DRY, rounds=6)


@pytest.mark.usefixtures("candidates")
def test_a_backend_of_5_ms_a_step_is_recorded_at_5_ms() -> None:
    entry = step_case("slow", "eager", "reference-loop").entry(plain_timer, PROBES)
    truth = Spread.of(Slow.rounds[-6:])
    assert entry["ms"] == pytest.approx(dataclasses.asdict(truth), rel=0.05)
    assert (truth.min >= 4, truth.median >= 5, truth.max >= 7) == (True, True, True)
    assert entry["samples_per_second"] == pytest.approx(1e3 * 16 / entry["ms"]["median"])
    assert set(entry["rivals"]) == {"eager", "reference-loop"}
    eager = entry["rivals"]["eager"]
    assert eager["ratio"] == pytest.approx(eager["ms"]["median"] / entry["ms"]["median"])
    assert entry["x_floor"] == pytest.approx(entry["ms"]["median"] / entry["floor_ms"])
    assert entry["loss_error"] < 1e-6


@pytest.mark.usefixtures("candidates")
def test_a_wrong_backend_is_recorded_without_a_number() -> None:
    record_ = Recording(FACTS, probes=PROBES)
    with pytest.raises(NotEquivalent):
        record_.measure(step_case("wrong"), plain_timer)
    assert record_.entries == []
    assert record_.refused[0][:2] == ("step", "wrong")
    assert "no number: wrong is not equivalent" in tables.skipped(record_)


@pytest.mark.usefixtures("candidates")
def test_an_unavailable_backend_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "missing", staticmethod(lambda device: "it is asleep"))
    with pytest.raises(Skipped, match="it is asleep"):
        step_case("slow").entry(plain_timer, PROBES)
    # Beside another it is left out; it has a case of its own.
    assert step_case("eager", "slow").entry(plain_timer, PROBES)["rivals"] == {}


@pytest.mark.usefixtures("candidates")
def test_the_others_take_turns_with_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for cls in (Slow, Eager):
        advance = cls.advance

        def noted(self: Any, count: int, advance: Any = advance, name: str = cls.__name__) -> Tensor:
            if type(self).__name__ == name:
                calls.append(name)
            return advance(self, count)

        monkeypatch.setattr(cls, "advance", noted)
    case = step_case("slow", "eager")
    case.entry(plain_timer, PROBES)
    assert calls[-12:] == ["Eager", "Slow"] * 6


def test_the_work_and_all_it_is_compared_with_are_timed_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs first after a rest waits for sleeping threads: it must do so to all or to none."""
    done: list[str] = []
    monkeypatch.setattr("bench.case.rest", lambda: done.append("rest"))
    others = {name: partial(done.append, name) for name in ("first", "second")}
    entry = timed_beside(plain_timer, partial(done.append, "work"), others, rounds=3)
    assert done == ["rest", "first", "rest", "second", "rest", "work"] * 3
    assert list(entry["rivals"]) == ["first", "second"]


@pytest.mark.parametrize("group", suite.GROUPS)
@pytest.mark.parametrize("plan", [Plan(), Plan(full=True), DRY, Plan(device="cuda")], ids=str)
def test_every_group_has_cases_with_names_of_their_own(group: str, plan: Plan) -> None:
    ids = [case.id for case in suite.cases(group, plan)]
    assert len(ids) == len(set(ids))
    assert ids or (group in ("threads", "busy") and plan.device == "cuda")
    if group == "step":
        assert "eager-16-fp32" in ids if plan.dry else "eager-128-fp32" in ids


def test_steps_on_cuda_are_measured_in_every_precision() -> None:
    ids = [case.id for case in suite.cases("step", Plan(device="cuda"))]
    assert {"triton-step-128-fp32", "triton-step-128-tf32x3", "triton-step-128-tf32"} <= set(ids)


@pytest.mark.parametrize("full", [False, True])
def test_on_cuda_what_inductor_compiles_comes_after_all_else(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(full, device="cuda")
    measured: list[str] = []

    def without_a_gpu(group: str, plan: Plan) -> list[Case]:
        def run(case: Case) -> Callable[..., Entry]:
            return lambda *_: {"per": measured.append(case.id) or "step", "ms": {"median": 1.0}}

        return [dataclasses.replace(case, run=run(case)) for case in suite.cases(group, plan)]

    monkeypatch.setattr(record, "cases", without_a_gpu)
    monkeypatch.setattr(recording.Recording, "begin", lambda device, dry: recording.Recording(FACTS, dry))
    record.record(plan, ["step", "rng"], [], tmp_path / "recording.json")
    slow = [id.startswith("compile") for id in measured]
    assert slow == sorted(slow)
    assert any(slow)
    assert len(measured) == len(suite.cases("step", plan)) + 2
    done = measured[: slow.index(True)]
    assert {f"{name}-128-{p}" for name in ("eager", "triton-step") for p in ("fp32", "tf32x3", "tf32")} <= set(done)


def test_random_numbers_are_measured() -> None:
    fill, scalar = (case.entry(plain_timer, {}) for case in suite.cases("rng", DRY))
    assert fill["per"] == "10,000 uniforms"
    assert fill["uniforms_per_second"] == pytest.approx(1e7 / fill["ms"]["min"])
    assert scalar["ms"]["min"] > 0


class OtherWork(Eager):
    """Eager that evaluates and samples in ways of its own, rightly."""

    name = "other-work"

    def mean_loss(self, windows: WeightedWindows) -> float:
        return super().mean_loss(windows)

    def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
        return super().sample(prompt, count, seed)


def work_case(monkeypatch: pytest.MonkeyPatch, group: str, cls: type[OtherWork]) -> Case:
    register(monkeypatch, cls)
    return next(case for case in suite.cases(group, DRY) if case.id == cls.name)


@pytest.mark.parametrize("group", ["evaluation", "sampling"])
def test_work_besides_steps_is_measured_beside_eagers(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    entry = work_case(monkeypatch, group, OtherWork).entry(plain_timer, {})
    assert entry["backend"] == "other-work"
    assert entry["rivals"]["eager"]["ratio"] == pytest.approx(
        entry["rivals"]["eager"]["ms"]["median"] / entry["ms"]["median"]
    )


@pytest.mark.parametrize("group", ["evaluation", "sampling"])
def test_work_of_a_backend_whose_steps_are_wrong_gets_no_number(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    class WrongSteps(OtherWork, Wrong):
        name = "wrong-steps"

    with pytest.raises(NotEquivalent, match="exp_avg of mlp"):
        work_case(monkeypatch, group, WrongSteps).entry(plain_timer, {})


def test_a_wrong_evaluation_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongLoss(OtherWork):
        name = "wrong-loss"
        error = 2e-5

        def mean_loss(self, windows: WeightedWindows) -> float:
            return super().mean_loss(windows) + self.error

    case = work_case(monkeypatch, "evaluation", WrongLoss)
    with pytest.raises(NotEquivalent, match=r"its evaluation is off by 2\.0e-05"):
        case.entry(plain_timer, {})
    WrongLoss.error = math.nan
    with pytest.raises(NotEquivalent, match="its evaluation is off by nan"):
        case.entry(plain_timer, {})


@pytest.mark.parametrize(
    "wrong",
    [lambda drawn: [0] * len(drawn), lambda drawn: [*drawn[:-1], (drawn[-1] + 1) % 27], lambda drawn: drawn[:-1]],
    ids=["zeros", "the last token", "too few"],
)
def test_a_wrong_sample_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[list[int]], list[int]]
) -> None:
    class WrongSample(OtherWork):
        name = "wrong-sample"

        def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
            return wrong(super().sample(prompt, count, seed))

    with pytest.raises(NotEquivalent, match="its sampling is off by"):
        work_case(monkeypatch, "sampling", WrongSample).entry(plain_timer, {})


def test_a_sample_that_rounding_took_across_a_border_is_right() -> None:
    model = MLP(DEFAULT, initial_parameters(DEFAULT, 1)).double()
    prompt, uniforms = [0, 1, 2], RNG(SAMPLE_SEED).fill_uniform(50)

    def drawn(shift: float) -> list[int]:
        shifted = iter(uniforms + shift)
        tokens = SimpleNamespace(random=lambda: next(shifted))
        return sample(lambda context: model(torch.tensor([context]))[0][0].detach(), prompt, 50, tokens, 3)  # type: ignore[arg-type]

    assert other_work.sample_error(drawn(0), prompt, 50, model, 3) <= 0
    moved = drawn(0.01)  # as logits that are off by as much would
    assert moved != drawn(0)
    assert 0 < other_work.sample_error(moved, prompt, 50, model, 3) <= 0.01


def test_the_loop_on_python_lists_ends_with_the_loss_that_runs_are_held_to(capsys: pytest.CaptureFixture[str]) -> None:
    reference_loop.main(["--quiet", "--num-steps", "20"])
    assert capsys.readouterr().out == f"test_loss {processes.TEST_LOSS[20]:.6f}\n"


def test_a_run_is_measured_from_start_to_end() -> None:
    case = next(case for case in suite.cases("run", DRY) if case.id == "40 steps")
    entry = case.entry(plain_timer, {})
    assert entry["command"] == "python -m mlp_fast.train --device cpu --num-steps 40"
    assert entry["steps"] == 40
    assert entry["ms"]["median"] > 100


@pytest.mark.parametrize("wrong", ["mlp_fast.train", "bench.reference_loop"])
@pytest.mark.parametrize("printed", ["test_loss 2.921880\n", "test_loss nan\n", ""])
def test_a_run_that_ends_with_another_loss_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, wrong: str, printed: str
) -> None:
    outputs = {"mlp_fast.train": "step 0\ntest_loss 2.921877\n", "bench.reference_loop": "test_loss 2.921876\n"}
    monkeypatch.setattr(processes, "python", lambda command: outputs[command[1]])
    case = next(case for case in suite.cases("run", DRY) if case.id == "20 steps")
    assert set(case.entry(plain_timer, {})["rivals"]) == {"reference-loop"}
    outputs[wrong] = printed
    with pytest.raises(NotEquivalent, match="the test loss after 20 steps is off by"):
        case.entry(plain_timer, {})


def test_the_losses_of_a_run_that_ends_with_another_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"event": "config", "chosen_backend": "native", "num_steps": 50_000, "floor": 2.35}
    test = {"event": "test", "loss": processes.TEST_LOSS[50_000]}

    def trained(arguments: list[str]) -> None:
        file = Path(arguments[arguments.index("--log-json") + 1])
        file.write_text(f"{json.dumps(config)}\n{json.dumps(test)}\n")

    monkeypatch.setattr(record.train, "main", trained)
    assert record.losses(Plan())["test_loss"] == processes.TEST_LOSS[50_000]
    test["loss"] += 1e-4
    with pytest.raises(NotEquivalent, match="native is not equivalent: the test loss after 50,000 steps"):
        record.losses(Plan())


def test_larger_training_that_ends_with_another_loss_than_eagers_gets_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = {"eager-raw": processes.Trained(2.0, 1000, 3.000005), "eager": processes.Trained(6.0, 2000, 3.0)}
    monkeypatch.setattr(processes, "trained", lambda options, processes=1: runs[options[-1]])
    case = processes.training_case("eager-raw", "eager-raw", DRY, ["--device", "cpu"], 27)
    entry = case.entry(plain_timer, {})
    assert entry["ms"]["median"] == pytest.approx(2)
    assert entry["rivals"]["eager"]["ratio"] == pytest.approx(3)
    assert entry["peak_bytes"] == 1000
    runs["eager-raw"] = runs["eager-raw"]._replace(test_loss=3.00002)
    with pytest.raises(NotEquivalent, match=r"the test loss is off by 2\.0e-05"):
        case.entry(plain_timer, {})


def test_a_wrong_operator_gets_no_number() -> None:
    config = DRY.config()
    right = operators.OPERATORS["linear_cross_entropy-and-backward"]
    operators.check("right", right, config, CPU)

    def wrong(config: Config, device: torch.device, dtype: torch.dtype, by: str) -> Callable[[], list[Tensor]]:
        work = right(config, device, dtype, by)
        return lambda: [t * (1 + 1e-3 * (by == operators.FUSED)) for t in work()]

    with pytest.raises(NotEquivalent, match="wrong is not equivalent"):
        operators.check("wrong", wrong, config, CPU)


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_both_sides_of_an_operators_case_compute_the_same(name: str) -> None:
    config = DRY.config()
    fused, plain = (operators.OPERATORS[name](config, CPU, torch.float32, by)() for by in ("fused", "torch"))
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_barrier_probes_kernel_compiles_without_a_gpu() -> None:
    pytest.importorskip("triton")
    from bench.barrier_kernel import barriers_kernel
    from mlp_fast.kernels._aot import Shipped

    word = torch.zeros(1, dtype=torch.int32)
    arguments = {"counter_ptr": word, "error_ptr": word, "rounds": 3, "G": 64}
    for capability in (80, 90):
        ptx = Shipped(barriers_kernel, arguments, {"num_warps": 8}).compile(capability).asm["ptx"]
        assert ptx.count("red.release.gpu") == 1


# --- recordings -------------------------------------------------------------------------------------------------------


def entry_of(group: str, id: str, median: float, spread: float = 0.1, **more: Any) -> Entry:
    ms = {"median": median, "min": median * (1 - spread), "max": median * (1 + spread)}
    return {"group": group, "id": id, "per": "step", "ms": ms, "rivals": {}, **more}


def test_the_fastest_backend_is_that_of_the_least_median_in_float32() -> None:
    record_ = Recording(FACTS)
    assert record_.fastest() == ""
    record_.entries = [
        entry_of("step", "a", 0.03, backend="triton-step", precision="fp32"),
        entry_of("step", "b", 0.02, spread=0.5, backend="triton-persistent", precision="fp32"),
        entry_of("step", "c", 0.01, backend="triton-step", precision="tf32"),
        entry_of("step", "d", 0.01, backend="reference-loop", precision="fp32"),  # nothing to train with
        entry_of("sweep", "e", 0.01, backend="native", precision="fp32"),
        entry_of("step", "f", 0.025, spread=0.9, backend="triton-op", precision="fp32"),
    ]
    assert record_.fastest() == "triton-persistent"


def test_the_plain_runner_records_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "recording.json"
    assert record.main(["--dry-run", "--groups", "rng,sampling", "--device", "cpu", "--out", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["dry"] is True
    assert {"device", "driver", "versions", "commit", "date"} <= set(content)
    loaded = recording.load(file)
    assert [entry["id"] for entry in loaded.group("rng")] == ["fill 10,000", "scalar 100"]
    assert loaded.entry("sampling", "eager") is not None
    out = capsys.readouterr().out
    assert "| sampling | eager |" in out
    assert "Absolute times are that machine's" in out


def test_a_spent_budget_leaves_cases_out_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "recording.json"
    record.main(["--dry-run", "--groups", "rng", "--device", "cpu", "--budget", "0", "--out", str(file)])
    loaded = recording.load(file)
    assert loaded.entries == []
    assert [skipped[2] for skipped in loaded.skipped] == ["the budget of 0 s was spent"] * 2


def test_a_spent_budget_leaves_further_results_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recording.json"
    monkeypatch.setattr(record, "chosen", lambda named, plan: [])
    record.main(["--dry-run", "--device", "cpu", "--budget", "0", "--out", str(file)])
    left_out = [("extra", name, "the budget of 0 s was spent") for name in ("profile", "compare", "losses", "numerics")]
    assert recording.load(file).skipped == left_out


def test_a_case_or_result_that_breaks_off_is_noted_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Entry:
        raise RuntimeError("CUDA error: out of luck\nand more about it")

    def rng_cases(plan: Plan) -> list[Case]:
        return [Case("rng", "broken", broken), *suite.GROUPS["rng"](plan)]

    def compared(plan: Plan) -> dict[str, Any]:
        # What came before must be in the file: a limit of time may end the process at any moment.
        assert [entry["id"] for entry in recording.load(file).entries] == ["fill 10,000", "scalar 100"]
        return {"output": "compared"}

    file = tmp_path / "recording.json"
    monkeypatch.setattr(record, "chosen", lambda named, plan: ["rng"])
    monkeypatch.setattr(record, "cases", lambda group, plan: rng_cases(plan))
    monkeypatch.setattr(record, "profiles", broken)
    monkeypatch.setattr(record, "comparison", compared)
    monkeypatch.setattr(record, "losses", lambda plan: recording.load(file).extra["compare"])
    monkeypatch.setattr(record, "arithmetic", broken)
    assert record.main(["--dry-run", "--device", "cpu", "--out", str(file)]) == 1
    loaded = recording.load(file)
    assert loaded.refused == [
        (group, id, "failed: RuntimeError: CUDA error: out of luck")
        for group, id in (("rng", "broken"), ("extra", "profile"), ("extra", "numerics"))
    ]
    assert [entry["id"] for entry in loaded.entries] == ["fill 10,000", "scalar 100"]
    assert loaded.extra == {"compare": {"output": "compared"}, "losses": {"output": "compared"}}
    told = capsys.readouterr()
    assert "- extra: numerics: no number: failed: RuntimeError" in told.out
    assert "in broken" in told.err  # where it broke off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "speed"], "'speed' is unknown"),
        (["--dry-run"], "--dry-run needs --out"),
    ],
)
def test_bad_input_of_the_runner_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        record.main(arguments)


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 99}', "[1]"])
def test_a_file_that_is_no_recording_is_one_clear_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UserError, match="recording"):
        recording.load(file)
    with pytest.raises(UserError, match="cannot read it"):
        recording.load(tmp_path / "none.json")


def test_the_real_recordings_of_a_device_come_the_latest_first(tmp_path: Path) -> None:
    for day, dry in (("01", False), ("02", False), ("03", True)):
        facts = {**FACTS, "date": f"2030-01-{day}T00:00:00+00:00"}
        Recording(facts, dry=dry).save(tmp_path / "cpu" / f"{day}.json")
    (recordings,) = recording.recorded(tmp_path)
    assert [record_.facts["date"][:10] for record_ in recordings] == ["2030-01-02", "2030-01-01"]


# --- promises ---------------------------------------------------------------------------------------------------------


def test_promises_are_kept_broken_or_not_measured() -> None:
    record_ = Recording(FACTS)
    native = entry_of("step", "native-128-fp32", 0.2)
    native["rivals"] = {"reference-loop": {"ms": {}, "ratio": 7.0}, "compile-step": {"ms": {}, "ratio": 2.0}}
    record_.entries = [native, entry_of("rng", "fill 10,000,000", 400.0)]
    lines = tables.claims([record_]).splitlines()
    assert "| native over the loop on Python lists, all threads | 6 | 7.00 | yes |" in lines
    assert "| native over compile-step, all threads | 2.5 | 2.00 | **no** |" in lines
    assert "| 10,000,000 uniforms over one second | 1 | 2.50 | yes |" in lines
    assert "| compile-step over eager | 1 | - | not measured |" in lines
    assert not any("triton" in line for line in lines)


def test_a_promise_over_several_recordings_shows_the_least_and_the_most() -> None:
    records = []
    for ratio in (5.0, 7.0, 9.0):
        native = entry_of("step", "native-128-fp32", 0.2)
        native["rivals"] = {"reference-loop": {"ms": {}, "ratio": ratio}, "compile-step": {"ms": {}, "ratio": 3.0}}
        records.append(Recording(FACTS, entries=[native]))
    lines = tables.claims([*records, Recording(FACTS), Recording({**FACTS, "device_type": "tpu"})]).splitlines()
    assert "| native over the loop on Python lists, all threads | 6 | 5.00..9.00 | **in 2 of 3** |" in lines
    assert "| native over compile-step, all threads | 2.5 | 3.00 | yes |" in lines


def test_a_long_run_of_the_reference_is_scaled_from_the_short_one() -> None:
    record_ = Recording(FACTS)
    short = entry_of("run", "5000 steps", 4000.0, steps=5000)
    short["rivals"] = {"reference-loop": {"ms": {"median": 17_000.0}, "ratio": 4.25}}
    record_.entries = [short, entry_of("run", "50000 steps", 15_200.0, steps=50_000)]
    assert tables.measured(record_, ("run", "50000 steps"), "reference-loop") is None  # the start is not known
    record_.entries.append(entry_of("start-up", "import mlp_fast.train", 2000.0))
    ratio, scaled = tables.measured(record_, ("run", "50000 steps"), "reference-loop") or (math.nan, False)
    assert scaled
    assert ratio == pytest.approx((2000 + 15_000 * 10) / 15_200)
    assert tables.measured(record_, ("run", "5000 steps"), "reference-loop") == (4.25, False)
    assert "scaled from 5,000 steps" in tables.claims([record_])


def test_the_case_objects_tell_settings_apart() -> None:
    setting = steps.Setting(DRY.config(), threads=1)
    assert setting == dataclasses.replace(setting)
    assert setting != dataclasses.replace(setting, threads=2)
    assert setting != steps.Setting(DRY.config(batch_size=17), threads=1)

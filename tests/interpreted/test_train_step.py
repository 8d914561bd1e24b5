"""The step kernels against float64: compiled on a GPU where there is one, in Triton's interpreter elsewhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from steps import CPU, DEVICE, Problem, Reference, planes, problem
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.eager import Eager
from mlp_fast.backends.triton_persistent import TritonPersistent
from mlp_fast.backends.triton_step import TritonStep
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.kernels import train_step
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.kernels.train_step import StepConfig, TrainStep
from mlp_fast.model.mlp import B1, B2, W1, W2, WTE, Shape
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_windows

DEFAULT = (128, 27, 3, 48, 512)  # B, V, T, E, H
ODD = (19, 29, 2, 13, 37)
# Tiles so small that every loop of every phase runs more than once, unevenly, at the sizes of ODD.
SMALL_TILES = {"BLOCK_B": 16, "BLOCK_V": 16, "BLOCK_E": 16, "BLOCK_H": 16, "G": 2}


def machine(task: Problem, poison: bool = True, **changes: Any) -> TrainStep:
    """A launcher at the problem's state, everything that it does not load filled with NaN or garbage."""
    config, shape = task.config, task.shape
    C = train_step.default_config(
        config.batch_size, shape.V, shape.T, shape.E, shape.H, deterministic=config.reduction == "deterministic"
    )
    kernels = TrainStep(replace(C, **changes), task.tape.tokens.to(DEVICE), update_scalars(config))
    if poison:
        for name, buffer in kernels.buffers._asdict().items():
            if name not in ("tape", "scalars"):
                buffer.fill_(float("nan") if buffer.is_floating_point() else -123456789)
    kernels.load(task.planes, task.state.step)
    return kernels


def exact(task: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every intermediate result of the first step, by the textbook formulas and autograd, in a precision of choice."""
    config, T, V = task.config, task.shape.T, task.shape.V
    contexts, targets = task.tape.batch(task.state.step, config.batch_size)
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in task.state.parameters.items()}
    emb = leaves[WTE][contexts]  # (B, T, E)
    pre = emb.flatten(1) @ leaves[W1].t() + leaves[B1]
    hidden = pre.tanh()
    logits = hidden @ leaves[W2].t() + leaves[B2]
    row_losses = F.cross_entropy(logits, targets, reduction="none")
    loss = row_losses.mean()
    for tensor in (pre, logits):
        tensor.retain_grad()
    loss.backward()
    weight = leaves[W1].view(-1, T, task.shape.E)
    one_hot = F.one_hot(contexts, V).to(dtype)  # (B, T, V)
    results = {name: tensor.grad for name, tensor in leaves.items()} | {
        "table": torch.einsum("ve,hte->tvh", leaves[WTE], weight),
        "hidden": hidden,
        "logits": logits,
        "row_losses": row_losses,
        "loss": loss,
        "dlogits": logits.grad,
        "dpre": pre.grad,
        "dtable": torch.einsum("btv,bh->tvh", one_hot, pre.grad),
    }
    return {name: tensor.detach() for name, tensor in results.items() if tensor is not None}


def phase_results(kernels: TrainStep, step: int) -> dict[str, Tensor]:
    """The same results as the kernels compute them: launches one step, and reads the buffers in between."""
    C, buf = kernels.config, kernels.buffers
    options = {"num_warps": C.num_warps, "num_stages": 1}
    before = [tensor.clone() for tensor in kernels.planes()[1]]
    train_step.forward_kernel[(C.PROGRAMS,)](buf, kernels.num_windows, C, UPDATE=False, **options)
    results = {} if C.gather else {"table": buf.table[C.R - 1].clone()}
    results |= {"hidden": buf.hidden.clone(), "logits": summed(buf.logits[step % 2, :, : C.V], 40)}
    if C.rows:
        train_step.softmax_kernel[(C.PROGRAMS,)](buf, kernels.num_windows, C, **options)
    train_step.backward_kernel[(C.PROGRAMS,)](buf, kernels.num_windows, C, **options)
    if C.R > 1:
        train_step.update_kernel[(C.PROGRAMS,)](buf, C, **options)
    results |= {
        "row_losses": buf.row_losses,
        "loss": buf.losses[step],
        "dlogits": buf.dlogits if buf.dlogits.dim() == 2 else buf.dlogits[C.G - 1],
        "dtable": buf.table.sum(0),
        WTE: summed(buf.dwte[step % 2], 44),
    }
    if not C.one_pass:
        results["dpre"] = buf.dpre
    # AdamW's first moment tells the gradient: m' = m + 0.1 (g - m).
    after = kernels.planes()[1]
    for i, name in ((1, W1), (2, B1), (3, W2), (4, B2)):
        results[name] = (after[i].double() - before[i].double()) / 0.1 + before[i].double()
    return {name: tensor.cpu() for name, tensor in results.items()}


def summed(buffer: Tensor, bits: int) -> Tensor:
    """A sum across programs as numbers."""
    return buffer.double() / 2**bits if buffer.dtype == torch.int64 else buffer


@pytest.mark.parametrize("rows", [False, True], ids=["redundant", "rows"])
@pytest.mark.parametrize("reduction", ["deterministic", "fast"])
def test_every_phase_follows_float64_at_odd_sizes_in_many_tiles(rows: bool, reduction: str) -> None:
    check_phases(problem(*ODD, n=60, reduction=reduction), rows=rows, **SMALL_TILES)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        (ODD, SMALL_TILES | {"R": 2}),  # gathers
        (ODD, SMALL_TILES | {"R": 3, "rows": True}),  # groups of fewer rows than a block
        ((70, 18, 2, 40, 37), SMALL_TILES | {"R": 2}),  # tables, and several blocks of a share
        ((70, 33, 2, 21, 37), SMALL_TILES | {"R": 4, "G": 1}),
        (ODD, SMALL_TILES | {"R": 2, "BLOCK_V": 32, "G": 3}),  # in one pass over the rows
        (ODD, SMALL_TILES | {"R": 2, "BLOCK_V": 32}),  # the whole vocabulary in a block, but several tiles a program
        (DEFAULT, {"R": 4, "BLOCK_B": 32}),
    ],
)
def test_every_phase_follows_float64_in_groups_of_rows(sizes: tuple[int, ...], changes: dict[str, int]) -> None:
    check_phases(problem(*sizes, n=300), **changes)


@pytest.mark.parametrize(
    "sizes",
    [DEFAULT, (1, 1, 1, 1, 1), (1, 2, 16, 3, 5), (127, 256, 1, 5, 33), (129, 65, 2, 3, 130), (33, 3, 8, 256, 16)],
    ids=lambda sizes: "B{}-V{}-T{}-E{}-H{}".format(*sizes),
)
def test_every_phase_follows_float64(sizes: tuple[int, int, int, int, int]) -> None:
    check_phases(problem(*sizes, n=300))


def check_phases(task: Problem, **changes: Any) -> None:
    """Quack's rule for every element of every result: at most twice torch's own float32 error, and 1e-6."""
    truth, torch_results = exact(task, torch.float64), exact(task, torch.float32)
    kernels = machine(task, **changes)
    got = phase_results(kernels, task.state.step)
    on_chip = {"table": kernels.config.gather, "dpre": kernels.config.one_pass}
    assert truth.keys() - got.keys() == {name for name, never_stored in on_chip.items() if never_stored}
    for name in got:
        expected = truth[name]
        ours = (got[name].double() - expected).abs().max().item()
        theirs = (torch_results[name].double() - expected).abs().max().item()
        assert ours <= 2 * theirs + 1e-6, f"{name}: {ours:.2e}, torch {theirs:.2e}"


# --- steps, end to end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("rows", [False, True], ids=["redundant", "rows"])
def test_one_and_two_default_steps_follow_float64(steps: int, rows: bool) -> None:
    check_steps(problem(*DEFAULT, n=2000), steps, rows=rows, G=3, BLOCK_H=128)


@pytest.mark.parametrize(("reduction", "steps"), [("deterministic", 50), ("fast", 20)])
def test_odd_steps_follow_float64_through_wrapping_windows(reduction: str, steps: int) -> None:
    # 41 windows and batches of 19: every batch but a few begins elsewhere, and about half of them wrap round.
    check_steps(problem(*ODD, n=43, reduction=reduction), steps, G=2, BLOCK_H=32)


def test_a_batch_may_wrap_round_the_tape_more_than_once() -> None:
    check_steps(problem(50, 5, 2, 4, 8, n=9), 3)


def check_steps(task: Problem, steps: int, **changes: Any) -> None:
    reference, kernels = Reference(task), machine(task, **changes)
    losses = reference.advance(steps)
    kernels.run(steps)
    torch.testing.assert_close(kernels.buffers.losses[:steps].double().cpu(), losses, rtol=0, atol=2e-6)
    reference.check(kernels.planes())
    assert torch.equal(kernels.buffers.replicas[0], kernels.buffers.replicas[-1])


@pytest.fixture(scope="module")
def fifty(request: pytest.FixtureRequest) -> tuple[bool, TrainState, Tensor, Reference, Tensor]:
    """50 steps of the default model by --interpret; on the names corpus where it is at hand."""
    try:
        corpus, is_names = request.getfixturevalue("names_corpus"), True
    except pytest.skip.Exception:
        corpus, is_names = request.getfixturevalue("embedded_corpus"), False
    config = Config(backend="triton-step", interpret=True, num_steps=1000, device="cpu")
    shape = Shape(len(corpus.vocabulary), 3, 48, 512)
    task = Problem(config, shape, Tape(corpus.train, 3), TrainState.initial(shape, config.seed))
    backend = TritonStep(config, shape, task.tape, task.state, DEVICE)
    losses = backend.advance(50)
    reference = Reference(task)
    return is_names, backend.state(), losses, reference, reference.advance(50)


def test_fifty_default_steps_follow_float64(fifty: tuple[bool, TrainState, Tensor, Reference, Tensor]) -> None:
    _, state, losses, reference, expected = fifty
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=0, atol=2e-6)
    reference.check(planes(state))


def test_fifty_default_steps_follow_the_golden_trace(
    fifty: tuple[bool, TrainState, Tensor, Reference, Tensor], golden: dict[str, Any]
) -> None:
    is_names, _, losses, *_ = fifty
    if not is_names:
        pytest.skip("the golden figures are of the names corpus, which is not at hand")
    expected = torch.tensor(golden["MLPRaw"]["batch_loss_first_50_steps"], dtype=torch.float64)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=0, atol=5e-7)


# --- what holds to the bit ---------------------------------------------------------------------------------------


interpreted = pytest.mark.skipif(not interpreting(), reason="it takes hold of Triton's interpreter")


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in descending order instead of ascending."""
    builder = triton.runtime.interpreter.interpreter_builder
    ascending = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: ascending(builder.grid_dim[0] - 1 - x, y, z), raising=True
    )


def bits_after(task: Problem, steps: int, **changes: Any) -> list[Tensor]:
    kernels = machine(task, **changes)
    kernels.run(steps)
    return [kernels.buffers.losses[:steps], *(tensor.clone() for plane in kernels.planes() for tensor in plane)]


@interpreted
@pytest.mark.parametrize(("reduction", "same"), [("deterministic", True), ("fast", False)])
def test_the_order_of_programs_changes_no_bit_of_a_deterministic_run(
    request: pytest.FixtureRequest, reduction: str, same: bool
) -> None:
    task = problem(32, 27, 3, 16, 64, n=100, reduction=reduction)
    tiles = {"G": 4, "BLOCK_H": 16}
    ascending, again = bits_after(task, 2, **tiles), bits_after(task, 2, **tiles)
    request.getfixturevalue("backwards")
    descending = bits_after(task, 2, **tiles)
    assert all(map(torch.equal, ascending, again))
    assert all(map(torch.equal, ascending, descending)) == same


def test_runs_of_steps_can_be_cut_anywhere() -> None:
    task = problem(*ODD, n=60)
    whole = bits_after(task, 5, G=2, BLOCK_H=32)
    kernels = machine(task, G=2, BLOCK_H=32)
    for steps in (1, 0, 3, 1):
        kernels.run(steps)
    pieces = [kernels.buffers.losses[:5], *(tensor for plane in kernels.planes() for tensor in plane)]
    assert all(map(torch.equal, whole, pieces))


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", [W2, WTE])
@pytest.mark.parametrize("reduction", ["deterministic", "fast"])
def test_a_diverged_model_shows_nan_losses(value: float, name: str, reduction: str) -> None:
    task = problem(*ODD, n=60, reduction=reduction)
    task.state.parameters[name].view(-1)[0] = value
    task.state.parameters[W1].mul_(1e3)  # so that a huge embedding makes a huge gradient
    kernels, eager = machine(task), Eager(task.config, task.shape, task.tape, task.state, CPU)
    kernels.run(3)
    losses, expected = kernels.buffers.losses[:3].cpu(), eager.advance(3)
    # Fixed point has less range than fp32, so it may give up where eager is still finite, never the other way round,
    # and never with a number that is not eager's.
    finite = losses.isfinite()
    assert not (finite & ~expected.isfinite()).any()
    torch.testing.assert_close(losses[:1][finite[:1]], expected[:1][finite[:1]], rtol=1e-4, atol=0)


# --- launches, errors ------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, by name."""
    names: list[str] = []
    executor = triton.runtime.interpreter.GridExecutor
    call = executor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", counted)
    return names


@interpreted
@pytest.mark.parametrize(("rows", "per_step"), [(False, 2), (True, 3)])
def test_a_step_is_two_or_three_launches(launches: list[str], rows: bool, per_step: int) -> None:
    kernels = machine(problem(*ODD, n=60), rows=rows)
    kernels.run(10)
    assert len(launches) == kernels.launches == 10 * per_step + 1


@interpreted
def test_an_evaluation_and_a_sample_are_one_launch_each(launches: list[str]) -> None:
    task = problem(*ODD, n=60)
    backend = TritonStep(task.config, task.shape, task.tape, task.state, DEVICE)
    backend.mean_loss(evaluated_windows(task.tape, 19).to(DEVICE))
    assert launches == ["mean_loss_kernel"]
    backend.sample([1, 2], 5, seed=42)
    assert launches == ["mean_loss_kernel", "sample_kernel"]


@pytest.mark.parametrize(("letter", "most"), [("B", 8192), ("V", 256), ("T", 16), ("E", 256), ("H", 4096)])
def test_sizes_past_the_limit_name_triton_op(letter: str, most: int) -> None:
    sizes = dict.fromkeys("BVTEH", 1)
    train_step.check_sizes(**sizes | {letter: most})
    with pytest.raises(ValueError, match=rf"{letter} from 1 to {most} \(got {most + 1}\); triton-op"):
        train_step.check_sizes(**sizes | {letter: most + 1})


def test_the_backends_reject_what_their_kernels_lack() -> None:
    assert backends.unsupported("triton-step", Config(), Shape(27, 3, 48, 512)) is None
    assert "triton-op" in str(backends.unsupported("triton-step", Config(), Shape(300, 3, 48, 512)))
    assert "--form gather" in str(backends.unsupported("triton-step", Config(form="gather"), Shape(27, 3, 48, 512)))


def test_a_tape_without_a_window_is_refused() -> None:
    machine(problem(*DEFAULT, n=4), poison=False)
    with pytest.raises(ValueError, match="too few"):
        TrainStep(StepConfig(*DEFAULT, 1, 16, 16, 16, 16), torch.zeros(3), torch.zeros(1, 3))


def test_the_schedule_has_an_end() -> None:
    task = problem(*ODD, n=60, num_steps=3)
    backend = TritonStep(task.config, task.shape, task.tape, task.state, DEVICE)
    backend.advance(3)
    with pytest.raises(ValueError, match="beyond the schedule"):
        backend.advance(1)


# --- backends, and states that move between them -----------------------------------------------------------------


@pytest.mark.parametrize("cls", [TritonStep, TritonPersistent])
def test_a_state_moves_between_backends(cls: type[TritonStep] | type[TritonPersistent]) -> None:
    task = problem(*ODD, n=60)
    eager = Eager(task.config, task.shape, task.tape, task.state, CPU)
    expected = eager.advance(12)
    eager.load(task.state)
    first = eager.advance(4)
    kernels = cls(task.config, task.shape, task.tape, eager.state(), DEVICE)
    kernels.prepare()
    second = kernels.advance(4).cpu()
    eager.load(kernels.state())
    third = eager.advance(4)
    torch.testing.assert_close(torch.cat([first, second, third]), expected, rtol=0, atol=1e-5)


def test_the_registry_has_both_backends() -> None:
    assert {"triton-step", "triton-persistent"} <= set(backends.REGISTRY)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(interpreting(), reason="needs a CUDA device")
@pytest.mark.parametrize(("cls", "most"), [(TritonStep, 4 * 200 + 1), (TritonPersistent, 2)])
def test_the_profiler_counts_the_launches_of_an_interval(
    cls: type[TritonStep] | type[TritonPersistent], most: int
) -> None:
    task = problem(*DEFAULT, n=2000, num_steps=1000)
    backend = cls(task.config, task.shape, task.tape, task.state, DEVICE)
    backend.prepare()
    backend.advance(200)
    backend.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backend.kernels.run(200) if cls is TritonPersistent else backend._run(200)
        torch.cuda.synchronize()
    ours = [event for event in profile.events() if event.name.endswith("_kernel")]
    assert 0 < len(ours) <= most


@pytest.mark.cuda
@pytest.mark.skipif(interpreting(), reason="needs a CUDA device")
@pytest.mark.parametrize("cls", [TritonStep, TritonPersistent])
def test_a_thousand_steps_give_the_same_bits_again(cls: type[TritonStep] | type[TritonPersistent]) -> None:
    task = problem(*DEFAULT, n=2000, num_steps=1000)
    runs = []
    for _ in range(2):
        backend = cls(task.config, task.shape, task.tape, task.state, DEVICE)
        backend.prepare()
        losses = torch.cat([backend.advance(200) for _ in range(5)])
        backend.synchronize()
        runs.append([losses.cpu(), *(tensor for plane in planes(backend.state()) for tensor in plane)])
    assert all(map(torch.equal, *runs))


def test_a_tape_past_the_numbers_of_its_windows_names_triton_op() -> None:
    task = problem(4, 3, 2, 4, 16, n=40)
    long = Tape(torch.zeros(1, dtype=torch.uint8).expand(2**31), 2)
    for backend in ("triton-step", "triton-persistent"):
        config = replace(task.config, backend=backend, interpret=interpreting())
        assert backends.unsupported(backend, config, task.shape, task.tape) is None
        assert "2147483648" in str(backends.unsupported(backend, config, task.shape, long))
        with pytest.raises(UserError, match=r"tapes of up to 2147467264 tokens .*; triton-op any"):
            backends.create(config, task.shape, long, task.state)

"""What the Triton backends launch on a GPU, seen by a driver that does nothing: grids, arguments, order, and when."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest

# Sixty steps of a longer schedule, with an evaluation after fifty.
RUN = ["--num-steps", "200", "--eval-every", "50", "--stop-after", "60"]
TRITON = ("triton-op", "triton-step", "triton-persistent")
Run = dict[str, Any]


@pytest.fixture(scope="module")
def h100(on_stub_gpu: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every Triton backend at the default sizes, to the end, and resumed half-way."""
    commands = []
    for name in TRITON:
        out = str(tmp_path_factory.mktemp(name))
        commands.append(["--backend", name, *RUN, "--out", out, "--stop-after", "55"])
        commands.append(["--resume", out, "--stop-after", "60"])
    return on_stub_gpu("launches.py", capability=90, processors=132, commands=commands, shipped=True)


@pytest.fixture(scope="module")
def runs(h100: dict[str, Any]) -> dict[str, tuple[Run, Run]]:
    """name -> the run of a backend, and the resumed one."""
    return {name: (h100["runs"][2 * i], h100["runs"][2 * i + 1]) for i, name in enumerate(TRITON)}


def launches(run: Run, verb: str) -> list[list[dict[str, Any]]]:
    """The launches of every call of that name."""
    return [call["launches"] for call in run["calls"] if call["verb"] == verb]


@pytest.mark.parametrize("name", TRITON)
def test_a_run_prepares_trains_evaluates_samples_and_resumes(name: str, runs: dict[str, tuple[Run, Run]]) -> None:
    first, resumed = runs[name]
    assert (first["code"], first["device"]) == (resumed["code"], resumed["device"]) == (0, "cuda")
    verbs = [call["verb"] for call in first["calls"]]
    assert verbs[0] == "prepare"
    assert {"advance", "mean_loss", "sample", "state"} <= set(verbs)
    for run, steps in ((first, [50, 5]), (resumed, [5])):
        assert [call["steps"] for call in run["calls"] if call["verb"] == "advance"] == steps
        assert all(call["launches"] for call in run["calls"] if call["verb"] != "state")


@pytest.mark.parametrize("name", TRITON)
def test_nothing_is_compiled_or_loaded_after_prepare(name: str, runs: dict[str, tuple[Run, Run]]) -> None:
    for run in runs[name]:
        for call in run["calls"][1:]:
            assert call["loads"] == [], f"{call['verb']} loads"


def test_the_kernels_of_these_runs_are_shipped_ones(h100: dict[str, Any]) -> None:
    assert h100["strangers"] == []


def test_shipped_kernels_compile_to_the_code_that_is_launched(h100: dict[str, Any]) -> None:
    # Two of these have arguments that are not specialised: had they been, other code would be measured.
    assert h100["same_code"] == {"mean_loss_kernel": True, "logits_kernel": True, "sample_kernel": True}


def test_a_step_is_three_launches_in_a_replayed_graph(runs: dict[str, tuple[Run, Run]]) -> None:
    run, _ = runs["triton-step"]
    assert [run["config"][name] for name in ("G", "R", "rows")] == [32, 4, False]
    for steps, made in zip((50, 5), launches(run, "advance"), strict=True):
        kernels = [launch["kernel"] for launch in made]
        # A graph of 50 steps, then five of one step, each of which ends with the update of wte that is still due.
        graphs = [50] if steps == 50 else [1] * 5
        step = ["forward_kernel", "backward_kernel", "update_kernel"]
        expected = [[*step * length, "embedding_kernel"] for length in graphs]
        assert kernels == [name for graph in expected for name in graph]
        assert {(*launch["grid"], launch["threads"], launch["cooperative"]) for launch in made} == {
            (128, 1, 1, 256, False)
        }
        assert len({launch["stream"] for launch in made}) == 1
        for launch in made:
            windows = [run["num_windows"]] if launch["kernel"] in ("forward_kernel", "backward_kernel") else []
            assert launch["arguments"] == run["buffers"] + windows
    # Only the first forward kernel of a graph leaves the update of wte out: that of the step before has been done.
    forward = [launch["load"] for launch in launches(run, "advance")[0] if launch["kernel"] == "forward_kernel"]
    assert forward[0] not in forward[1:]
    assert len(set(forward[1:])) == 1
    captured, direct = launches(run, "advance")[0][0]["stream"], launches(run, "mean_loss")[0][0]["stream"]
    assert captured != direct, "the graph was not captured"


def test_many_steps_are_one_cooperative_launch(runs: dict[str, tuple[Run, Run]]) -> None:
    for run, advances in zip(runs["triton-persistent"], ([50, 5], [5]), strict=True):
        made = [launch for call in launches(run, "advance") for launch in call]
        assert [launch["kernel"] for launch in made] == ["persistent_kernel"] * len(advances)
        prepared = [a["arguments"][-1] for a in launches(run, "prepare")[0] if a["kernel"] == "persistent_kernel"]
        # Three barriers a step of 128 programs each; the counter goes on from launch to launch.
        arrivals = [3 * 128 * steps for steps in accumulate([*prepared, *advances])][len(prepared) - 1 :]
        for launch, steps, before in zip(made, advances, arrivals, strict=False):
            assert (launch["grid"], launch["threads"], launch["cooperative"]) == ([128, 1, 1], 256, True)
            first_program = 0
            rest = [run["num_windows"], before, first_program, steps]
            assert launch["arguments"] == [*run["buffers"], *run["words"], *rest]


def test_the_operators_update_everything_in_one_launch(runs: dict[str, tuple[Run, Run]]) -> None:
    run, _ = runs["triton-op"]
    (step, *_), steps = launches(run, "advance"), 50
    made = [launch for launch in step if launch["kernel"] == "adamw_kernel"]
    assert len(made) == steps
    V, T, E, H = 27, 3, 48, 512
    numels = [V * E, H * T * E, H, V * H, V]
    grid = sum(-(-numel // 1024) for numel in numels)
    assert all((launch["grid"], launch["cooperative"]) == ([grid, 1, 1], False) for launch in made)
    # Four pointers for each of five tensors, their lengths, the step and the rate.
    assert all(launch["arguments"][20:25] == numels and len(launch["arguments"]) == 27 for launch in made)
    assert len({tuple(launch["arguments"]) for launch in made}) <= steps


@pytest.mark.parametrize("name", TRITON)
def test_evaluations_and_samples_are_few_launches(name: str, runs: dict[str, tuple[Run, Run]]) -> None:
    run, _ = runs[name]
    if name == "triton-op":
        assert {launch["kernel"] for call in launches(run, "sample") for launch in call} == {
            "embed_linear_tanh_fwd_gather_kernel"
        }
        return
    for call in launches(run, "mean_loss"):
        (launch,) = call
        rows = launch["arguments"][5]
        assert (launch["kernel"], launch["grid"]) == ("mean_loss_kernel", [-(-rows // 64), 1, 1])
    ((launch,),) = launches(run, "sample")
    assert (launch["kernel"], launch["grid"], launch["arguments"][2]) == ("sample_kernel", [1, 1, 1], 200)


def test_a_slice_of_an_a100_has_a_program_for_each_multiprocessor(on_stub_gpu: Callable[..., Any]) -> None:
    # The smallest slice: 14 multiprocessors, fewer than the 32 tiles of hidden units. The driver refuses a cooperative
    # launch of more programs than there are multiprocessors.
    commands = [["--backend", "triton-persistent", *RUN]]
    answer = on_stub_gpu("launches.py", capability=80, processors=14, commands=commands, shipped=False)
    assert "too many blocks in cooperative launch" in answer["too_many"]
    (run,) = answer["runs"]
    assert run["code"] == 0
    assert (run["config"]["G"], run["tiles"]) == (14, 32)
    made = [launch for call in launches(run, "advance") for launch in call]
    assert [launch["kernel"] for launch in made] == ["persistent_kernel"] * 2
    assert all(launch["grid"] == [14, 1, 1] and launch["cooperative"] for launch in made)
    assert [launch["arguments"][-1] for launch in made] == [50, 10]

"""Checkpoints come back bit for bit, what is not whole is refused, and a resumed run is the same run."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from processes import SIZES, make_corpus
from safetensors import safe_open

from mlp_fast import backends, evaluate, files, sample, train
from mlp_fast.config import PER_COMMAND, Config
from mlp_fast.corpus.load import load
from mlp_fast.errors import UserError
from mlp_fast.model.state import TrainState
from mlp_fast.run import checkpoint, training
from mlp_fast.run import folder as run_folder
from mlp_fast.run.checkpoint import Checkpoint, Damaged
from mlp_fast.run.folder import INDEX, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN_V1 = Path(__file__).parent / "golden" / "checkpoint_v1.safetensors"  # written by version 1 of the program


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 30 steps with checkpoints of steps 10, 20 (the best) and 30; not to be changed."""
    out = tmp_path_factory.mktemp("run")
    train.main([*options(corpus_folder), "--out", str(out), "--checkpoint-every", "10", "--eval-every", "5"])
    return out


def options(corpus_folder: str, *more: str) -> list[str]:
    """30 steps, evaluated at 0, 7, 14, 21, 28 and 29."""
    return [*SIZES, "--quiet", "--data", corpus_folder, "--num-steps", "30", "--eval-every", "7", *more]


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    kinds = {"p": state.parameters, "m": state.exp_avg, "v": state.exp_avg_sq}
    return {f"{kind} {name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


def assert_same(a: TrainState, b: TrainState, tolerance: float = 0.0) -> None:
    assert a.step == b.step
    one, other = tensors_of(a), tensors_of(b)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_saved_comes_back_bit_for_bit(corpus_folder: str, tmp_path: Path, direct: bool) -> None:
    config = Config(data=corpus_folder, embedding_size=3, hidden_size=5, direct=direct, num_steps=9, out="away")
    corpus = load(corpus_folder)
    saved = Checkpoint(TrainState({}, {}, {}), config, corpus.vocabulary, corpus.fingerprint, {"val_loss": 1.25})
    state = TrainState.initial(saved.shape, 3)
    for tensor in tensors_of(state).values():
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    state.step = 7
    saved = Checkpoint(state, config, corpus.vocabulary, corpus.fingerprint, {"val_loss": 1.25}, (1, 4, 4))
    path = tmp_path / checkpoint.file_name(7)
    checkpoint.save(path, saved)
    back = checkpoint.load(path)
    assert_same(back.state, state)
    assert (back.vocabulary, back.fingerprint, back.losses) == (saved.vocabulary, saved.fingerprint, saved.losses)
    assert back.beginning == (1, 4, 4)
    assert back.config == Config(**{**vars(config), "out": None})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.safetensors"]


def test_a_file_says_all_about_itself_but_nothing_of_the_command(run: Path) -> None:
    with safe_open(run / "step-00000030.safetensors", framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["mlp_fast"])
    assert facts["format_version"] == checkpoint.FORMAT_VERSION
    assert facts["step"] == 30
    assert facts["losses"]["evaluated_at"] == 29
    assert not set(facts["config"]) & set(PER_COMMAND)
    assert re.fullmatch("[0-9a-f]{64}", facts["corpus_fingerprint"])
    assert re.fullmatch("[0-9a-f]{64}", metadata["sha256"])


def test_a_nine_digit_step_comes_after_an_eight_digit_one(tmp_path: Path) -> None:
    for step in (5, 999_999_999, 99_999_999):
        (tmp_path / checkpoint.file_name(step)).touch()
    assert [p.name for p in checkpoint.files_in(tmp_path)] == [
        checkpoint.file_name(step) for step in (5, 99_999_999, 999_999_999)
    ]


def test_a_file_of_version_1_still_loads() -> None:
    """Against the program itself: seven steps of the same run, computed now."""
    old = checkpoint.load(GOLDEN_V1)
    assert old.losses == {}
    assert old.beginning == ()
    assert old.config.out is None
    result = train.train(Config(**{**vars(old.config), "stop_after": 7, "quiet": True}))
    assert_same(old.state, result.state, tolerance=1e-5)


def test_an_older_version_is_upgraded_step_by_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 5)
    renamed = {
        3: lambda facts: facts | {"seen": [2]},
        4: lambda facts: facts | {"losses": {"seen": len(facts["seen"])}},
    }
    monkeypatch.setattr(checkpoint, "UPGRADES", checkpoint.UPGRADES | renamed)
    assert checkpoint.load(run).losses == {"seen": 1}
    assert checkpoint.load(GOLDEN_V1).losses == {"seen": 1}


def test_a_newer_version_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match=r"format version 3 is newer than 2; update"):
        checkpoint.load(run)


def refused(path: Path) -> bool:
    """Whether reading is refused in one line; anything but refusing and reading is an error."""
    try:
        checkpoint.read(path)
    except UserError as error:
        message = str(error)
    else:
        return False
    assert str(path) in message
    assert "\n" not in message
    return True


def check_flips(content: bytes, masks: list[int], path: Path) -> int:
    """Every byte of a checkpoint changed in turn; each is refused. Returns how many there were."""
    path.write_bytes(content)
    assert not refused(path)
    with path.open("rb+", buffering=0) as file:
        for place in range(len(content)):
            for mask in masks:
                os.pwrite(file.fileno(), bytes([content[place] ^ mask]), place)
                assert refused(path), f"byte {place} ^ {mask} goes unnoticed"
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert not refused(path)
    return len(content) * len(masks)


def small_checkpoint(corpus_folder: str, path: Path) -> bytes:
    """The smallest run there is."""
    train.main(options(corpus_folder, "--hidden-size=1", "--embedding-size=1", "--stop-after=2", f"--out={path}"))
    return checkpoint.locate(path).read_bytes()


def test_every_byte_flipped_is_refused(corpus_folder: str, tmp_path: Path, counts: dict[str, int]) -> None:
    content = small_checkpoint(corpus_folder, tmp_path / "run")
    counts["flipped bytes of a checkpoint, each refused"] += check_flips(content, [0xFF], tmp_path / "flipped")


@pytest.mark.long
def test_every_bit_flipped_is_refused(run: Path, tmp_path: Path, counts: dict[str, int]) -> None:
    content = checkpoint.locate(run).read_bytes()
    counts["flipped bits of a checkpoint, each refused"] += check_flips(
        content, [1 << bit for bit in range(8)], tmp_path / "flipped"
    )


def test_every_cut_is_refused(corpus_folder: str, tmp_path: Path, counts: dict[str, int]) -> None:
    content = small_checkpoint(corpus_folder, tmp_path / "run")
    path = tmp_path / "cut"
    path.write_bytes(content + b"\0")
    assert refused(path)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        assert refused(path), f"cut to {length} bytes goes unnoticed"
    counts["lengths that a checkpoint was cut to, each refused"] += len(content)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_foreign_files_are_refused_and_never_unpickled(run: Path, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    torch.save({"state": Bomb(fired)}, tmp_path / "step-00000001.safetensors")
    (tmp_path / "step-00000002.safetensors").write_bytes(pickle.dumps(Bomb(fired)))
    (tmp_path / "step-00000003.safetensors").write_bytes(b"")
    (tmp_path / "step-00000004.safetensors").write_text("anna\nbob\n")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "step-00000005.safetensors")
    bf16 = {"w": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1)}
    safetensors.torch.save_file(bf16, tmp_path / "step-00000006.safetensors", {"mlp_fast": "{}", "sha256": "0"})
    for path in checkpoint.files_in(tmp_path):
        with pytest.raises(Damaged, match=f"{path.name} is .*no good checkpoint lies beside it"):
            checkpoint.load(path)
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired)))
    assert fired.exists(), "the bomb is a dud"


@pytest.mark.parametrize("command", [sample.main, evaluate.main, lambda argv: train.main(["--resume", *argv])])
def test_strange_paths_are_one_line_in_every_command(tmp_path: Path, command: Callable[[list[str]], int]) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    link.symlink_to(link)
    for path in (str(tmp_path), str(tmp_path / "none"), str(fifo), "/dev/null", "a\0b", "x" * 300, str(link), ""):
        with pytest.raises(UserError) as caught:
            command([path])
        assert "\n" not in str(caught.value)
    (tmp_path / "step-00000001.safetensors").symlink_to(fifo)
    with pytest.raises(UserError, match="not a regular file"):
        command([str(tmp_path)])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("command", [sample.main, evaluate.main, lambda argv: train.main(["--resume", *argv])])
def test_a_damaged_file_is_refused_and_a_good_one_offered(
    run: Path, tmp_path: Path, command: Callable[[list[str]], int]
) -> None:
    folder = copy_of(run, tmp_path / "run")
    damage(folder / "step-00000030.safetensors")
    os.truncate(folder / "step-00000020.safetensors", 700)
    for path in (folder, folder / "step-00000030.safetensors"):
        with pytest.raises(Damaged, match=r"step-00000030.* is damaged.*last good one .*step-00000010.safetensors$"):
            command([str(path)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_document_is_read_or_refused(run: Path, tmp_path: Path, data: Any) -> None:
    """The checksum is no signature: whoever writes nonsense can also sum it."""
    tensors, metadata = checkpoint._read(run / "step-00000010.safetensors")
    facts = json.loads(metadata["mlp_fast"])
    where = data.draw(st.sampled_from([facts, facts["config"], facts["losses"]]))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
    if data.draw(st.booleans()):
        tensors.pop(data.draw(st.sampled_from(sorted(tensors))))
    document = json.dumps(data.draw(st.one_of(st.just(facts), st.just(facts), JSON)))
    path = tmp_path / "forged"
    path.write_bytes(
        safetensors.torch.save(tensors, {"mlp_fast": document, "sha256": checkpoint._checksum(document, tensors)})
    )
    if not refused(path):
        checkpoint.read(path).model()


@pytest.mark.parametrize("wrong", [{"config": {"one\ntwo": None}}, {"losses": {"val_loss": 10**400}}])
def test_nonsense_that_sums_right_is_one_line(run: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    tensors, metadata = checkpoint._read(run / "step-00000010.safetensors")
    document = json.dumps(json.loads(metadata["mlp_fast"]) | wrong)
    path = tmp_path / "forged"
    path.write_bytes(
        safetensors.torch.save(tensors, {"mlp_fast": document, "sha256": checkpoint._checksum(document, tensors)})
    )
    assert refused(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=60), length=st.none() | st.integers(0, 2**64 - 1))
def test_random_bytes_are_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = tmp_path / "random"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    assert refused(path)


# --- the folder -------------------------------------------------------------------------------------------------------


def at_step(saved: Checkpoint, step: int, val_loss: float) -> Checkpoint:
    state = saved.state.clone()
    state.step = step
    losses = {"evaluated_at": step, "val_loss": val_loss}
    return Checkpoint(state, saved.config, saved.vocabulary, saved.fingerprint, losses)


def steps_in(folder: Path) -> list[int]:
    return [int(p.name[5:13]) for p in checkpoint.files_in(folder)]


def test_the_newest_and_the_best_are_kept(run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(run)
    with RunFolder(tmp_path, keep=2) as folder:
        folder.begin(None)
        for step, val_loss in enumerate([3.0, 1.0, 2.0, 1.0, 1.5, 0.5, 0.7], 1):
            folder.save(at_step(saved, step, val_loss))
            index = json.loads((tmp_path / INDEX).read_text())
            assert list(index["checkpoints"]) == [p.name for p in checkpoint.files_in(tmp_path)]
            if step == 5:
                assert steps_in(tmp_path) == [2, 4, 5]
                assert index["best"] == "step-00000002.safetensors"
        folder.note(7, test_loss=0.75)
    assert steps_in(tmp_path) == [6, 7]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["best"] == "step-00000006.safetensors"
    assert index["checkpoints"]["step-00000007.safetensors"] == {
        "step": 7,
        "evaluated_at": 7,
        "val_loss": 0.7,
        "test_loss": 0.75,
    }


def best_of(folder: Path) -> str | None:
    return json.loads((folder / INDEX).read_text())["best"]


def test_only_its_own_loss_makes_a_checkpoint_the_best(corpus_folder: str, tmp_path: Path) -> None:
    """Evaluations at 0, 7, 14, 21, 28 and 29; the loss falls all the time."""
    train.main(options(corpus_folder, f"--out={tmp_path / 'between'}", "--checkpoint-every=5", "--stop-after=20"))
    assert best_of(tmp_path / "between") is None
    train.main(options(corpus_folder, f"--out={tmp_path / 'some'}", "--checkpoint-every=4", "--keep=1"))
    assert best_of(tmp_path / "some") == "step-00000028.safetensors"
    assert steps_in(tmp_path / "some") == [28, 30]
    train.main(options(corpus_folder, f"--out={tmp_path / 'at'}", "--checkpoint-every=7", "--stop-after=25"))
    assert best_of(tmp_path / "at") == "step-00000021.safetensors"


def test_what_is_not_kept_goes_even_after_an_index_that_failed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, write = checkpoint.load(run), files.write_atomically

    def failing(path: Path, content: bytes) -> None:
        raise OSError("the disk is full")

    with RunFolder(tmp_path, keep=1) as folder:
        folder.save(at_step(saved, 1, 3.0))
        monkeypatch.setattr(run_folder, "write_atomically", failing)
        with pytest.raises(OSError, match="full"):
            folder.save(at_step(saved, 2, 2.0))
        assert steps_in(tmp_path) == [1, 2], "the index names step 1 still"
        monkeypatch.setattr(run_folder, "write_atomically", write)
        folder.save(at_step(saved, 3, 1.0))
    assert steps_in(tmp_path) == [3]
    assert list(json.loads((tmp_path / INDEX).read_text())["checkpoints"]) == ["step-00000003.safetensors"]


def test_a_folder_made_anew_belongs_to_whoever_made_it(run: Path, tmp_path: Path) -> None:
    saved, path = checkpoint.load(run), tmp_path / "run"
    with RunFolder(path, keep=3) as folder:
        folder.save(at_step(saved, 1, 3.0))
        path.rename(tmp_path / "away")
        path.mkdir()
        with pytest.raises(FileNotFoundError):
            folder.save(at_step(saved, 2, 2.0))
        with RunFolder(path, keep=3) as other:
            other.save(at_step(saved, 1, 2.5))
            before = {p.name: p.read_bytes() for p in path.iterdir()}
            with pytest.raises(FileNotFoundError):
                folder.save(at_step(saved, 2, 2.0))
            with pytest.raises(FileNotFoundError):
                folder.note(1, test_loss=1.0)
            assert folder.newest is None
            assert other.newest == path / checkpoint.file_name(1)
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_checkpoint_that_someone_removed_is_not_named(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    with RunFolder(folder, keep=3) as opened:
        opened.begin(folder / "step-00000030.safetensors")
        (folder / "step-00000030.safetensors").unlink()
        assert opened.newest == folder / "step-00000020.safetensors"


def test_a_loaded_checkpoint_does_not_hold_its_file(run: Path) -> None:
    loaded = checkpoint.load(run)
    assert loaded.state.step == 30
    assert str(run) not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_goes_after_its_successor_is_durable(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of the system calls: content, its name, the index, its name; only then a removal."""
    saved, calls = checkpoint.load(run), []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **more: Any) -> Any:
            calls.append(name if name == "fsync" else f"{name} {Path(args[-1]).name}")
            return call(*args, **more)

        return noting

    with RunFolder(tmp_path, keep=1) as folder:
        folder.save(at_step(saved, 1, 2.0))
        monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
        monkeypatch.setattr(os, "replace", noted("replace", replace))
        monkeypatch.setattr(os, "unlink", noted("unlink", unlink))
        folder.save(at_step(saved, 2, 1.0))
    written = ["fsync", "replace {}", "fsync"]
    assert calls == [
        *(c.format("step-00000002.safetensors") for c in written),
        *(c.format("run.json") for c in written),
        "unlink step-00000001.safetensors",
    ]


BIG = b'{"checkpoints": {"step-00000030.safetensors": {"val_loss": 1%s}}}' % (b"0" * 400)  # no float holds it


@pytest.mark.parametrize("index", [None, b"", b"{}", b'{"checkpoints": 3}', b"[" * 100_000, BIG])
def test_a_folder_is_whole_without_its_index(run: Path, tmp_path: Path, index: bytes | None) -> None:
    folder = copy_of(run, tmp_path / "run")
    (folder / INDEX).unlink()
    if index is not None:
        (folder / INDEX).write_bytes(index)
    with RunFolder(folder, keep=3) as opened:
        assert opened.begin(folder / "step-00000030.safetensors") == []
        assert list(opened.entries) == [p.name for p in checkpoint.files_in(run)]
        assert opened.best == best_of(run) == "step-00000020.safetensors"


def test_what_a_killed_run_left_half_written_is_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, folder = os.replace, copy_of(run, tmp_path / "run")
    names = {"a": folder / checkpoint.file_name(40), "b": folder / INDEX}

    def kill(source: str, target: str) -> None:
        shutil.copy(source, f"{source}.copy")  # what a process that dies here would leave
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    for name in names.values():
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(name, b"half")
    monkeypatch.setattr(os, "replace", replace)
    half = [path.rename(path.with_suffix("")) for path in folder.glob(".*.copy")]
    assert len(half) == len(names)
    foreign = [".mywork.tmp", ".mywork.12.tmp", ".step-1.safetensors.12.tmp", ".run.json.tmp", "run.json.12.tmp"]
    for name in foreign:
        (folder / name).write_text("precious")
    (folder / ".run.json.13.tmp").mkdir()
    with RunFolder(folder, keep=3) as opened:
        opened.begin(folder / "step-00000030.safetensors")
    assert [path for path in half if path.exists()] == []
    assert [(folder / name).read_text() for name in foreign] == ["precious"] * len(foreign)
    assert steps_in(folder) == steps_in(run)


def test_a_refused_run_removes_nothing(run: Path, corpus_folder: str, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    half = folder / ".step-00000040.safetensors.12.tmp"
    half.touch()
    with pytest.raises(UserError, match="holds a run already"):
        train.main(options(corpus_folder, "--out", str(folder)))
    assert half.exists()


@pytest.mark.parametrize("option", ["--out", "--resume"])
def test_an_empty_name_is_not_the_current_folder(
    option: str, run: Path, corpus_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(run, tmp_path / "run") if option == "--resume" else tmp_path)
    with pytest.raises(UserError, match=f"{option} is empty"):
        train.main(options(corpus_folder, f"{option}="))


def test_a_run_goes_on_from_what_another_has_saved_while_the_corpus_was_read(
    corpus_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    train.main(options(corpus_folder, "--out", out, "--stop-after", "5"))
    load_for = training.load_for

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(training, "load_for", load_for)
        train.main(["--quiet", "--resume", out, "--stop-after", "9"])
        return load_for(*args)

    monkeypatch.setattr(training, "load_for", meanwhile)
    train.main(["--quiet", "--resume", out, "--stop-after", "12"])
    assert steps_in(Path(out)) == [5, 9, 12]


def test_what_a_run_has_is_told_before_settings_are_held_against_each_other(run: Path) -> None:
    with pytest.raises(UserError, match=r"--min-count 5: the run in .* has 1; leave the option out"):
        train.main(["--resume", str(run), "--min-count", "5"])


def test_a_folder_in_use_is_told_even_where_nobody_can_read_by_whom(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep=1):
        (tmp_path / run_folder.HOLDER).unlink()
        (tmp_path / run_folder.HOLDER).mkdir()
        with pytest.raises(UserError, match=r"in use by another run \(process number unknown\)"):
            RunFolder(tmp_path, keep=1)


def test_a_fresh_run_never_touches_another_ones_folder(run: Path, corpus_folder: str) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(UserError, match=r"holds a run already .*--resume"):
        train.main(options(corpus_folder, "--out", str(run)))
    assert {p.name: p.read_bytes() for p in run.iterdir()} | {".lock": b""} == before | {".lock": b""}


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, corpus_folder: str) -> None:
    with RunFolder(tmp_path, keep=3), pytest.raises(UserError, match=f"in use by another run .process {os.getpid()}.;"):
        train.main(options(corpus_folder, "--out", str(tmp_path)))
    train.main(options(corpus_folder, "--out", str(tmp_path)))


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run", "a\0b", "x" * 300])
def test_an_unwritable_folder_is_refused_at_the_start(out: str, corpus_folder: str) -> None:
    with pytest.raises(UserError, match="--out"):
        train.main(options(corpus_folder, "--out", out))


# --- going on ---------------------------------------------------------------------------------------------------------


def interrupted_and_resumed(corpus_folder: str, out: Path, first: str, second: str, *more: str) -> TrainState:
    """13 of 30 steps on one backend, the rest on another."""
    arguments = options(corpus_folder, *more, "--out", str(out))
    train.main([*arguments, "--backend", first, "--stop-after", "13"])
    train.main(["--resume", str(out), "--quiet", "--backend", second])
    return checkpoint.load(out).state


def available(name: str) -> str:
    reason = backends.unsupported(name, Config(interpret=False))
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


def uninterrupted(corpus_folder: str, out: Path, name: str) -> TrainState:
    train.main([*options(corpus_folder, "--out", str(out)), "--backend", name])
    return checkpoint.load(out).state


QUICK = ("eager-raw", "eager", "native")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads; more of them may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", QUICK)
def test_a_resumed_run_is_bit_identical(name: str, corpus_folder: str, tmp_path: Path) -> None:
    whole = uninterrupted(corpus_folder, tmp_path / "whole", available(name))
    assert_same(whole, interrupted_and_resumed(corpus_folder, tmp_path / "parts", name, name))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in backends.REGISTRY if name not in QUICK])
def test_a_resumed_run_is_bit_identical_on_every_backend(name: str, corpus_folder: str, tmp_path: Path) -> None:
    test_a_resumed_run_is_bit_identical(name, corpus_folder, tmp_path)


@pytest.mark.parametrize(("first", "second"), [("eager-raw", "eager"), ("eager", "native"), ("native", "eager-raw")])
def test_a_run_goes_on_with_another_backend(first: str, second: str, corpus_folder: str, tmp_path: Path) -> None:
    whole = uninterrupted(corpus_folder, tmp_path / "whole", "eager")
    parts = interrupted_and_resumed(corpus_folder, tmp_path / "parts", available(first), available(second))
    assert_same(whole, parts, tolerance=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ("eager", "native", "eager-raw"),
        ("native", "eager"),
        pytest.param(("eager", "native", "compile-step"), marks=pytest.mark.long),
        pytest.param(("compile-step", "native", "eager"), marks=pytest.mark.long),
    ],
)
def test_losses_across_backends_agree_to_1e_5(names: tuple[str, ...], tmp_path: Path) -> None:
    """300 steps at the default sizes, handed from one backend to the next, and in eager alone."""
    common = ["--quiet", "--eval-every=50", "--num-steps=300"]
    train.main([*common, "--backend=eager", f"--log-json={tmp_path / 'whole'}"])
    run, log = tmp_path / "run", f"--log-json={tmp_path / 'parts'}"
    for place, name in enumerate(names):
        begin = [f"--resume={run}", "--quiet"] if place else [*common, f"--out={run}"]
        last = 300 * (place + 1) // len(names)
        train.main([*begin, f"--backend={available(name)}", f"--stop-after={last}", log])
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == 2 * 7 + 1
    assert parts == pytest.approx(whole, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_checkpoints_change_no_number(name: str, corpus_folder: str, tmp_path: Path) -> None:
    whole = uninterrupted(corpus_folder, tmp_path / "whole", available(name))
    for every in ("1", "4", "1000"):
        out = tmp_path / every
        train.main([*options(corpus_folder, "--out", str(out)), "--backend", name, "--checkpoint-every", every])
        assert_same(whole, checkpoint.load(out).state)


def losses(log: Path) -> list[float]:
    """All evaluations' losses, then the last test loss."""
    test = [json.loads(line) for line in log.read_text().splitlines()][-1]["loss"]
    return [loss for _, *both in evaluations(log) for loss in both] + [test]


def evaluations(log: Path) -> list[tuple[int, float, float]]:
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [(e["step"], e["train_loss"], e["val_loss"]) for e in events if e["event"] == "eval"]


def test_the_log_goes_on_where_it_ended(corpus_folder: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    whole.write_text('{"event": "eval", "step": 1, "train_loss": 1, "val_loss": 1}\n' * 99)  # of an earlier run
    train.main(options(corpus_folder, "--log-json", str(whole)))
    train.main(options(corpus_folder, "--log-json", str(parts), "--stop-after=14", "--out", str(tmp_path / "run")))
    with parts.open("a") as file:
        file.write('{"event": "ev')  # as a kill may leave it
    train.main(["--resume", str(tmp_path / "run"), "--quiet", "--log-json", str(parts)])
    assert evaluations(parts) == evaluations(whole)
    assert [step for step, *_ in evaluations(whole)] == [0, 7, 14, 21, 28, 29]


def test_an_evaluation_that_the_checkpoint_has_is_not_made_again(corpus_folder: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    train.main(options(corpus_folder, "--stop-after=15", "--checkpoint-every=14", f"--out={tmp_path / 'run'}"))
    file = tmp_path / "run" / "step-00000014.safetensors"
    train.main([f"--resume={file}", "--quiet", f"--out={tmp_path / 'other'}", f"--log-json={log}"])
    assert [step for step, *_ in evaluations(log)] == [21, 28, 29]


def test_a_resumed_run_saves_where_it_came_from(run: Path, tmp_path: Path, corpus_folder: str) -> None:
    train.main(options(corpus_folder, "--stop-after=8", "--checkpoint-every=4", f"--out={tmp_path / 'run'}"))
    train.main(["--resume", str(tmp_path / "run"), "--quiet", "--keep", "9"])
    assert steps_in(tmp_path / "run") == [4, 8, 12, 16, 20, 24, 28, 30]
    train.main(["--resume", str(tmp_path / "run/step-00000020.safetensors"), "--quiet", f"--out={tmp_path / 'other'}"])
    assert steps_in(tmp_path / "other") == [24, 28, 30]
    assert_same(checkpoint.load(tmp_path / "other").state, checkpoint.load(run).state)


def test_an_older_checkpoint_never_overwrites_newer_ones(run: Path) -> None:
    with pytest.raises(UserError, match=r"holds newer checkpoints than step-00000010.*--out another folder"):
        train.main(["--resume", str(run / "step-00000010.safetensors")])


def test_damaged_checkpoints_are_set_aside(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(run, tmp_path / "run")
    last = folder / "step-00000030.safetensors"
    for number in (1, 2):
        damage(last)
        damaged = last.read_bytes()
        train.main(["--resume", str(folder / "step-00000020.safetensors"), "--quiet"])
        assert f"set aside: {last}.damaged-{number}\n" in capsys.readouterr().err
        assert Path(f"{last}.damaged-{number}").read_bytes() == damaged
        assert_same(checkpoint.load(folder).state, checkpoint.load(run).state)
    assert len(list(folder.glob("*.damaged*"))) == 2


def test_a_refused_run_sets_nothing_aside(run: Path, tmp_path: Path) -> None:
    """Neither one on another corpus, nor one beside a checkpoint of a newer version, which is no damaged one."""
    other = Path(make_corpus(tmp_path / "other"))
    (other / "val.txt").write_text("nora\n" * 20)
    folder = copy_of(run, tmp_path / "run")
    damage(folder / "step-00000010.safetensors")
    with pytest.raises(UserError, match="is not the corpus"):
        train.main(["--resume", str(folder), "--data", str(other)])
    tensors, metadata = checkpoint._read(folder / "step-00000020.safetensors")
    document = json.dumps(json.loads(metadata["mlp_fast"]) | {"format_version": checkpoint.FORMAT_VERSION + 1})
    newer = {"mlp_fast": document, "sha256": checkpoint._checksum(document, tensors)}
    (folder / "step-00000020.safetensors").write_bytes(safetensors.torch.save(tensors, newer))
    with pytest.raises(UserError, match="is newer than"):
        train.main(["--resume", str(folder)])
    assert steps_in(folder) == [10, 20, 30]
    assert not list(folder.glob("*.damaged*"))


def test_a_finished_run_only_tells_its_end_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(run, tmp_path / "run")
    before = (folder / "step-00000030.safetensors").stat().st_mtime_ns
    assert train.main(["--resume", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "going on after 30 of 30 steps" in printed
    index = json.loads((folder / INDEX).read_text())
    assert f"test_loss {index['checkpoints']['step-00000030.safetensors']['test_loss']:.6f}" in printed
    assert (folder / "step-00000030.safetensors").stat().st_mtime_ns == before


CONTRADICTIONS = (
    ["--hidden-size=6", "--embedding-size=4", "--context-length=3", "--batch-size=9", "--num-steps=31", "--seed=5"],
    ["--learning-rate=0.1", "--weight-decay=0.5", "--direct", "--preset=tiny", "--tokens=byte"],
)


@pytest.mark.parametrize("option", [option for line in CONTRADICTIONS for option in line])
def test_an_option_that_contradicts_the_run_is_refused(run: Path, option: str) -> None:
    with pytest.raises(UserError, match=r"--[a-z-]+ .*: the run in .* has .*leave the option out"):
        train.main(["--resume", str(run), option])


def test_options_that_agree_or_may_change_are_taken(run: Path, tmp_path: Path, corpus_folder: str) -> None:
    moved = shutil.copytree(corpus_folder, tmp_path / "moved")
    folder = copy_of(run, tmp_path / "run")
    more = ["--hidden-size=5", "--backend=eager-raw", f"--data={moved}", "--eval-every=3", "--keep=2", "--quiet"]
    assert train.main(["--resume", str(folder), *more]) == 0


def test_a_corpus_that_is_not_where_it_was_may_be_named_anew(
    run: Path, corpus_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(corpus_folder).parent)
    out = tmp_path / "run"
    train.main([*options(Path(corpus_folder).name), f"--out={out}", "--stop-after=9"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file or folder; if the corpus of .*run lies elsewhere, .*--data"):
        train.main([f"--resume={out}"])
    train.main([f"--resume={out}", f"--data={corpus_folder}", "--quiet"])
    assert_same(checkpoint.load(out).state, checkpoint.load(run).state)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        train.main([*options("none"), f"--out={tmp_path / 'new'}"])


def test_another_corpus_is_refused(run: Path, tmp_path: Path) -> None:
    other = Path(make_corpus(tmp_path / "other"))
    (other / "val.txt").write_text("nora\n" * 20)
    with pytest.raises(UserError, match=r"--data .* is not the corpus"):
        train.main(["--resume", str(run), "--data", str(other)])


def test_a_step_already_passed_is_no_place_to_stop(run: Path) -> None:
    with pytest.raises(UserError, match=r"--stop-after 20: .* has done 30 steps already"):
        train.main(["--resume", str(run), "--stop-after", "20"])


def test_a_library_user_must_give_the_runs_own_settings(run: Path) -> None:
    with pytest.raises(UserError, match=r"--hidden-size 512: the run in .* has 5"):
        train.train(Config(resume=str(run), context_length=2, embedding_size=3, backend="eager"))


def test_checkpoint_every_needs_a_folder(corpus_folder: str) -> None:
    with pytest.raises(UserError, match="--out DIR"):
        train.main(options(corpus_folder, "--checkpoint-every", "5"))

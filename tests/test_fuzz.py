"""Fuzzed command lines and corpora: a run ends with a documented exit code, in time, and never with a traceback."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from processes import make_corpus

from mlp_fast import evaluate, sample, train
from mlp_fast.config import Config, flag
from mlp_fast.errors import EXIT_NON_FINITE, EXIT_NOT_SAVED, EXIT_USER_ERROR, UserError
from mlp_fast.run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTED = {0, EXIT_USER_ERROR, EXIT_NOT_SAVED, EXIT_NON_FINITE}
TIME_LIMIT = 60  # seconds a run of some steps may take on a busy machine before it counts as hung
FUZZED = "fuzzed command lines and corpora, none with a traceback, a hang or an undocumented exit code"

FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


class Hung(BaseException):
    """The time limit has passed."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Hung where the block takes longer."""

    def hung(signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback()
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def exit_code(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """What the command would exit with; anything that would be a traceback is raised."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(time_limit(TIME_LIMIT))
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            code = main(argv)
        except UserError as error:
            code = error.exit_code
        except SystemExit as end:  # --help
            code = end.code or 0  # type: ignore[assignment]
    assert code in DOCUMENTED, (code, argv)
    return code


# --- command lines ----------------------------------------------------------------------------------------------------

# Sizes that any machine can compute in no time, and values at and beyond every limit. Backends that compile are left
# out: they would take a minute each; what they do with bad settings is decided before they are made.
SIZES = st.integers(1, 9).map(str) | st.sampled_from(
    ["0", "-1", "16777217", str(10**30), "1e3", "3.5", "", "many", "٣"]
)
RATES = st.sampled_from(["0", "1e-3", "0.5", "1e6", "1e7", "-1", "nan", "inf", "1e400", "", "fast"])
STRANGE = ["", " ", "-", "--", "\n", "\0", "\x1b[2J", "é", "\udcff", "/", ".", "..", "x" * 300, "a/b/c", "~", "$(id)"]
STRANGE += ["/dev/null", "/dev/zero", "/dev/full", "/dev/null/below", "/proc/self/mem", "/etc/passwd", "names", "%s"]
BACKENDS = ["eager", "eager-raw", "native", "quantum", "triton", "triton-step", "triton-persistent", "", "EAGER"]
CHOICES = {
    "backend": st.sampled_from(BACKENDS),
    "data": st.sampled_from(["CORPUS"] * 6 + STRANGE),
    "tokens": st.sampled_from(["char", "byte", "word", "letter"]),
    "device": st.sampled_from(["auto", "cpu", "cuda", "tpu"]),
    "precision": st.sampled_from(["fp32", "tf32", "fp8"]),
    "form": st.sampled_from(["auto", "table", "gather", "list"]),
    "reduction": st.sampled_from(["deterministic", "fast", "slow"]),
    "compile_mode": st.sampled_from(["default", "max-autotune", "fastest"]),
    "on_nan": st.sampled_from(["stop", "continue", "go"]),
    "out": st.sampled_from(["OUT/run", "OUT/other", *STRANGE]),
    "log_json": st.sampled_from(["OUT/log.jsonl", *STRANGE]),
    "plot": st.sampled_from(["OUT/none/curve.png", "OUT/curve.txt", *STRANGE]),
    "resume": st.sampled_from(["RUN", "OUT/run", "OUT/other", *STRANGE]),
    "seed": st.sampled_from(["1", "1337", "0", "-5", str(2**64 - 1), str(2**64), "x"]),
    "learning_rate": RATES,
    "weight_decay": RATES,
}
OPTIONS = {
    **{field: CHOICES.get(field, SIZES) for field, value in vars(Config()).items() if not isinstance(value, bool)},
    "preset": st.sampled_from(["tiny", "huge"]),
}
SWITCHES = [
    "--quiet",
    "--no-quiet",
    "--direct",
    "--list-backends",
    "--help",
    "--no-help",
    "--interpret=1",
    "-x",
    "--",
    "?",
]
# Good settings that come first, so that most lines get past the parser; what is fuzzed comes after them and wins.
SMALL = (
    "--backend=eager --data=CORPUS --context-length=2 --embedding-size=2 --hidden-size=3 --batch-size=4 --num-steps=5"
)


@st.composite
def command_lines(draw: st.DrawFn, resumed: bool) -> list[str]:
    """Words of a command line; CORPUS, RUN and OUT stand for paths."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    words = [f"{flag(name)}={draw(OPTIONS[name])}" for name in names]
    words += draw(st.lists(st.sampled_from(SWITCHES), max_size=1) if draw(st.integers(0, 3)) == 0 else st.just([]))
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.text(max_size=8)))
    return [*(["--resume=RUN"] if resumed else SMALL.split()), *words]


def usable(word: str) -> bool:
    """Leaves out what is valid but would run for minutes or write outside of the test's folder."""
    name, _, value = word.partition("=")
    writes = name in ("--out", "--log-json", "--plot") and not value.startswith(("OUT", "/dev", "/proc"))
    endless = word == "--num-steps=16777217"
    return not (writes and value not in ("", "\0", "x" * 300)) and value not in ("names", "embedded") and not endless


class Commands:
    """Runs fuzzed command lines in a folder, where a good corpus and a good run are to be had."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.corpus = make_corpus(folder / "corpus")
        self.run = folder / "run"
        words = self.paths(SMALL.split())
        train.main([*words, f"--out={self.run}", "--quiet", "--stop-after=3"])
        self.saved = checkpoint.locate(self.run).read_bytes()
        self.codes: dict[int, int] = {}
        monkeypatch.chdir(folder)

    def paths(self, words: list[str]) -> list[str]:
        places = {"CORPUS": self.corpus, "RUN": str(self.run), "OUT": str(self.folder / "out")}
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        return words

    def try_line(self, words: list[str]) -> None:
        """Runs one line, and keeps the good run good."""
        code = exit_code(train.main, self.paths([word for word in words if usable(word)]))
        self.codes[code] = self.codes.get(code, 0) + 1
        for path in self.run.glob("step-*"):
            if path.name != "step-00000003.safetensors":
                path.unlink()
        first = self.run / "step-00000003.safetensors"
        if not first.exists():
            first.write_bytes(self.saved)


def fuzz_command_lines(examples: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(folder, monkeypatch)

    @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate, Phase.shrink], **FUZZ)
    @given(words=st.booleans().flatmap(command_lines))
    @example(["--resume=--"])
    @example(["--data=--"])
    def any_line(words: list[str]) -> None:
        commands.try_line(words)

    any_line()
    assert commands.codes.get(0, 0) > examples / 10, "hardly a line gets past the parser"
    assert commands.codes.get(EXIT_USER_ERROR, 0) > examples / 10, "hardly a line is wrong"


def test_any_command_line_ends_with_a_documented_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    fuzz_command_lines(120, tmp_path, monkeypatch)
    counts[FUZZED] += 120


@pytest.mark.long
def test_7000_command_lines_end_with_a_documented_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    fuzz_command_lines(7000, tmp_path, monkeypatch)
    counts[FUZZED] += 7000


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=400, **FUZZ)
@given(st.dictionaries(st.sampled_from(sorted(vars(Config()))), VALUES, max_size=3))
def test_any_settings_make_a_config_or_a_user_error(changes: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        config = Config(**changes)
        assert vars(config) == vars(Config()) | changes


@pytest.mark.parametrize("command", [sample, evaluate])
def test_any_arguments_of_the_other_commands_are_answered(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    commands = Commands(tmp_path, monkeypatch)
    values = {
        "--prompt": st.text(alphabet="abnor\\\n\0é\udcff", max_size=6),
        "--length": st.integers(-3, 30).map(str) | st.sampled_from(["", "x", "1e3"]),
        "--seed": st.integers(-3, 2**65).map(str) | st.sampled_from(["", "x"]),
        "--data": st.sampled_from(["CORPUS", *STRANGE]),
        "--backend": st.sampled_from(BACKENDS),
        "--device": st.sampled_from(["auto", "cpu", "cuda", "tpu"]),
    }
    options = st.sampled_from(sorted(values)).flatmap(lambda name: values[name].map(lambda value: f"{name}={value}"))

    @settings(max_examples=60, **FUZZ)
    @given(where=st.sampled_from(["RUN"] * 5 + STRANGE), words=st.lists(options, max_size=3))
    def any_line(where: str, words: list[str]) -> None:
        exit_code(command.main, commands.paths([where, *words]))

    any_line()
    counts[FUZZED] += 60


# --- corpora ----------------------------------------------------------------------------------------------------------

LINES = [
    "anna\n",
    "bob\r\n",
    "nora\r",
    "\n",
    "a" * 70,
    "\ufeff",
    "é",
    "ﷺ",
    "\U0001f600\n",
    "\0",
    " \t",
    "\u2028",
    "na\u0301\n",
]
NO_TEXT = [b"\xff", b"\xed\xa0\x80", b"\xc3", b"\x80", b"\xf4\x90\x80\x80", b"\xfe\xff"]  # lone surrogates and the like
BYTES = [line.encode() for line in LINES] + NO_TEXT
GOOD = b"anna\nbob\nnora\n" * 3
CONTENT = st.lists(st.sampled_from([*BYTES, GOOD, GOOD]) | st.binary(max_size=6), max_size=12).map(b"".join)


def fuzz_corpora(examples: int, folder: Path) -> None:
    codes = dict.fromkeys(DOCUMENTED, 0)
    sizes = SMALL.replace("--data=CORPUS ", "").split()

    @settings(max_examples=examples, phases=[Phase.generate, Phase.shrink], **FUZZ)
    @given(
        train_text=st.just(GOOD) | CONTENT.map(lambda text: GOOD + text),
        other=st.just(GOOD) | CONTENT,
        tokens=st.sampled_from(["char", "byte", "word"]),
        one_file=st.booleans(),
    )
    def any_corpus(train_text: bytes, other: bytes, tokens: str, one_file: bool) -> None:
        for split, text in {"train": train_text, "val": other, "test": GOOD}.items():
            (folder / f"{split}.txt").write_bytes(text)
        data = folder / "val.txt" if one_file else folder
        codes[exit_code(train.main, [*sizes, f"--data={data}", f"--tokens={tokens}", "--num-steps=2"])] += 1

    any_corpus()
    assert codes[0] > examples / 10
    assert codes[EXIT_USER_ERROR] > examples / 10


def test_any_corpus_trains_or_is_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    fuzz_corpora(80, tmp_path)
    counts[FUZZED] += 80


@pytest.mark.long
def test_3000_corpora_train_or_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    fuzz_corpora(3000, tmp_path)
    counts[FUZZED] += 3000


def test_the_fuzzer_sees_tracebacks_hangs_and_strange_codes() -> None:
    def hangs(argv: list[str]) -> int:
        with time_limit(1):
            while True:
                pass

    def breaks(argv: list[str]) -> int:
        raise RuntimeError

    with pytest.raises(Hung):
        exit_code(hangs, [])
    with pytest.raises(RuntimeError):
        exit_code(breaks, [])
    with pytest.raises(AssertionError):
        exit_code(lambda argv: 1, [])
    assert sys.exc_info() == (None, None, None)

"""Every setting of a run and its default, in one frozen dataclass; cli.py makes the options of it."""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlp_fast.errors import UserError
from mlp_fast.kernels._model import FORMS

PRECISIONS = ("fp32", "tf32x3", "tf32")
REDUCTIONS = ("deterministic", "fast")
DEVICES = ("auto", "cpu", "cuda")
TOKENS = ("char", "byte", "word")
SPLITTING = ("shuffled", "contiguous")
ON_NAN = ("stop", "continue")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

MAX_SEED = 2**64 - 1
# Sizes past these would need more memory than any machine has; the bound turns a typing slip into one clear line.
MAX_SIZE = 2**24
# Some backends keep the learning rate and the loss of every step on the device: 16 bytes a step.
MAX_STEPS = 10**8
MAX_THREADS = 1024

# --preset NAME sets these options; one given by itself on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"context_length": 2, "embedding_size": 8, "hidden_size": 32, "batch_size": 64, "num_steps": 1000},
    "default": {},
    "large": {"tokens": "byte", "context_length": 8, "embedding_size": 64, "hidden_size": 4096},
    # Sizes of Bengio et al. 2003, who merge the words that occur three times or less (their Brown corpus is left with
    # 16,383 words). An evaluation computes that many logits for every window of val, hence seldom.
    "bengio2003": {
        "tokens": "word",
        "min_count": 4,
        "context_length": 5,
        "embedding_size": 60,
        "hidden_size": 100,
        "direct": True,
        "eval_every": 5000,
    },
}


def _option(
    default: Any, help: str, *, role: str, choices: Any = None, least: Any = None, most: Any = None, metavar: Any = None
) -> Any:
    """A setting: its default, its help text, what it is to a run (one of the roles below), and what values it takes."""
    metadata = {"help": help, "role": role, "choices": choices, "least": least, "most": most, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


_run = partial(_option, role="run")  # defines the run
_model = partial(_option, role="model")  # defines its model: --init-from takes it over
_corpus = partial(_option, role="corpus")  # name, place or form of the corpus, which fingerprints identify
_way = partial(_option, role="way")  # a way of computing the same
_watch = partial(_option, role="watch")  # what a whole run needs, and no command of a few steps
_command = partial(_option, role="command")  # of one command and not of the run: no checkpoint keeps it


@dataclass(frozen=True)
class Config:
    """The settings of a run. Invalid values raise UserError, naming the option.

    Sizes are counts, learning_rate and weight_decay are AdamW's, eval_every is in steps.
    """

    backend: str = _way("auto", "the backend that computes the steps; see --list-backends", metavar="NAME")
    data: str = _corpus("embedded", "embedded, names, a folder with train/val/test.txt, or one text file")
    split: str = _corpus("shuffled", "how one text file is split: its lines shuffled, or in order", choices=SPLITTING)
    encoding: str = _corpus("utf-8", "of text files, by a name that Python knows (gbk, latin-1, ...)", metavar="NAME")
    tokens: str = _model("char", "what a token is", choices=TOKENS)
    min_count: int = _model(1, "words that train has fewer times than this become <unk>", least=1, most=MAX_STEPS)
    context_length: int = _model(3, "tokens that predict the next one (T)", least=1, most=4096)
    embedding_size: int = _model(48, "numbers per token embedding (E)", least=1, most=MAX_SIZE)
    hidden_size: int = _model(512, "hidden units (H)", least=1, most=MAX_SIZE)
    direct: bool = _model(False, "add direct connections from the embeddings to the logits")
    batch_size: int = _run(128, "windows per step (B)", least=1, most=MAX_SIZE)
    num_steps: int = _run(50_000, "steps of the learning-rate schedule", least=1, most=MAX_STEPS)
    stop_after: int | None = _command(None, "stop after this many steps, the schedule unchanged", least=1)
    learning_rate: float = _run(7e-4, "AdamW's learning rate before the cosine decay", least=0.0, most=1e6)
    weight_decay: float = _run(1e-4, "AdamW's decoupled weight decay, on every parameter", least=0.0, most=1e6)
    seed: int = _run(1337, "seed of the initial values", least=1, most=MAX_SEED)
    eval_every: int = _watch(200, "steps between evaluations", least=1)
    device: str = _way("auto", "where to compute", choices=DEVICES)
    threads: int | None = _way(None, "CPU threads; if not given, one per processor", least=1, most=MAX_THREADS)
    precision: str = _way("fp32", "arithmetic of the matrix products", choices=PRECISIONS)
    form: str = _way("auto", "first layer as a table per token or as gathered rows", choices=FORMS)
    reduction: str = _way("deterministic", "sums across programs: repeatable, or fast", choices=REDUCTIONS)
    compile_mode: str = _way("default", "torch.compile's mode, for the compile backends", choices=COMPILE_MODES)
    interpret: bool = _way(False, "run Triton kernels in Triton's interpreter (slow, needs no GPU)")
    on_nan: str = _watch("stop", "what to do when a loss is not finite", choices=ON_NAN)
    out: str | None = _command(None, "folder for checkpoints: at the end, and --checkpoint-every", metavar="DIR")
    checkpoint_every: int | None = _watch(None, "steps between two checkpoints in --out", least=1)
    keep: int = _watch(3, "checkpoints to keep: so many of the newest, and the best", least=1)
    resume: str | None = _command(None, "go on with a run: its folder, or one of its checkpoint files", metavar="RUN")
    init_from: str | None = _run(None, "start from the model of another run, with a new schedule", metavar="RUN")
    log_json: str | None = _command(None, "write the log as JSON Lines", metavar="FILE")
    plot: str | None = _command(None, "draw the loss curves (PNG, SVG or PDF)", metavar="FILE")
    quiet: bool = _command(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
            _check(field, getattr(self, field.name))
        if self.stop_after is not None and self.stop_after > self.num_steps:
            raise UserError(f"--stop-after must be at most --num-steps, {self.num_steps} (got {self.stop_after})")
        if self.min_count > 1 and self.tokens != "word":
            raise UserError(f"--min-count {self.min_count} is for words; add --tokens word")
        _check_encoding(self.encoding)
        if self.encoding != "utf-8" and self.tokens == "byte":
            raise UserError(f"--encoding {self.encoding} is for text; bytes are read as they are: leave it out")

    @property
    def last_step(self) -> int:
        """Steps that this run makes: num_steps, or stop_after where that is given."""
        return self.num_steps if self.stop_after is None else self.stop_after


def _of(*roles: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Config) if field.metadata["role"] in roles)


PER_COMMAND, OF_THE_MODEL, OF_THE_CORPUS = _of("command"), _of("model"), _of("corpus")
OF_THE_RUN = _of("run", "model")  # what --resume may not change
RUN_ONLY = (*_of("command", "watch"), "init_from")  # not offered by commands that make a few steps


def flag(name: str) -> str:
    """The command-line spelling of a setting: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, and a path as its name: what JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    kinds = typing.get_args(field.type) or (field.type,)
    # bool is an int to Python, and an int serves as a float; neither may pass for the other here
    if type(value) not in (*kinds, *([int] if float in kinds else [])):
        raise UserError(f"{flag(field.name)} {value!r} is of the wrong type; give {plain_type(field.type).__name__}")
    if value is None:
        return
    choices, least, most = (field.metadata[key] for key in ("choices", "least", "most"))
    if choices and value not in choices:
        raise UserError(f"{flag(field.name)} {value!r} is unknown; choose one of {', '.join(choices)}")
    if reason := out_of_bounds(value, least, most):
        raise UserError(f"{flag(field.name)} {reason} (got {value})")
    if value == "":
        raise UserError(f"{flag(field.name)} is empty; give it a value, or leave it out")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{flag(field.name)} contains a NUL character; remove it")


def out_of_bounds(value: Any, least: float | None, most: float | None) -> str | None:
    """What a value must be that is not finite or not between two bounds, or None where it is."""
    if isinstance(value, float) and not math.isfinite(value):  # of a huge int it cannot be asked
        return "must be a finite number"
    if least is not None and value < least:
        return f"must be at least {least}"
    if most is not None and value > most:
        return f"must be at most {most}"
    return None


def _check_encoding(name: str) -> None:
    """UserError unless Python can read text in it; some of its codecs are not encodings of text."""
    try:
        b"a".decode(name)
    except UnicodeError:  # it is one, though b"a" is not a text in it
        return
    except (LookupError, ValueError):
        raise UserError(
            f"--encoding {name!r} is unknown; give a name that Python knows, as utf-8, utf-16, gbk or latin-1"
        ) from None


def plain_type(hint: Any) -> Any:
    """int | None -> int: the type of an option's value where it is given."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint

"""A checkpoint: one self-describing safetensors file; nothing here unpickles.

`step-00001000.safetensors` holds the parameters under the nn.Module's state_dict names, AdamW's moments under
"exp_avg." and "exp_avg_sq." + name, and in its metadata a JSON document (format version, step, config, vocabulary, the
corpus' fingerprint and beginning, the latest evaluation) and a SHA-256 over this document and every tensor. The file
appears whole or not at all. Which files a run keeps, folder.py decides.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlp_fast.config import PER_COMMAND, Config
from mlp_fast.corpus.tokenizer import Vocabulary, from_json
from mlp_fast.errors import UserError, one_line
from mlp_fast.files import file_mode, write_atomically
from mlp_fast.model.mlp import MLP, Shape
from mlp_fast.model.state import TrainState

FORMAT_VERSION = 3
FILE_NAME = re.compile(r"step-\d{8,}\.safetensors")
_PREFIXES = {"parameters": "", "exp_avg": "exp_avg.", "exp_avg_sq": "exp_avg_sq."}  # of the tensors' names in the file

Facts = dict[str, Any]


class Damaged(UserError):
    """The file is cut, damaged, or not a checkpoint of this program."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: the state, and what it takes to use it or to go on with it.

    Attributes:
        state: parameters, moments and step.
        config: the run's settings, without those of a single command (config.PER_COMMAND).
        vocabulary: the tokens of the model.
        fingerprint: the corpus'; see Corpus.
        losses: of the latest evaluation: "evaluated_at" (its step), "train_loss" and "val_loss" in nats; or empty.
        beginning: the first T tokens of train, which stand before a short prompt; empty in files of version 2.
        path: the file that it was read from, if any.
    """

    state: TrainState
    config: Config
    vocabulary: Vocabulary
    fingerprint: str
    losses: dict[str, float] = field(default_factory=dict)
    beginning: tuple[int, ...] = ()
    path: Path | None = None

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return Shape.of(self.config, len(self.vocabulary))

    @property
    def given_vocabulary(self) -> Vocabulary | None:
        """The vocabulary that the run's corpus is read with: the model's after --init-from; None for its own."""
        return self.vocabulary if self.config.init_from is not None else None

    def model(self) -> MLP:
        """The trained nn.Module."""
        return MLP(self.shape, self.state.parameters)


def file_name(step: int) -> str:
    """The name of a step's checkpoint file."""
    return f"step-{step:08d}.safetensors"


def files_in(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, the newest last. OSError where it cannot be read."""
    files = (path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name))
    return sorted(files, key=lambda path: int(path.stem.removeprefix("step-")))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint file, whole or not at all. OSError where that fails."""
    state = checkpoint.state
    tensors = {_PREFIXES[kind] + name: tensor for kind, part in state.parts.items() for name, tensor in part.items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "config": _of_the_run(dataclasses.asdict(checkpoint.config)),
        "vocabulary": checkpoint.vocabulary.as_json(),
        "corpus_fingerprint": checkpoint.fingerprint,
        "losses": checkpoint.losses,
        "beginning": list(checkpoint.beginning),
    }
    document = json.dumps(facts)
    metadata = {"mlp_fast": document, "sha256": _checksum(document, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def locate(path: Path) -> Path:
    """The checkpoint file at a path: itself, or the newest of a folder.

    Raises:
        UserError: there is none.
    """
    mode = file_mode(path)
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path} is not a regular file; give the folder that --out wrote, or a checkpoint file")
    try:
        files = files_in(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    if not files:
        raise UserError(f"{path} holds no checkpoint (step-*.safetensors); give the folder that --out wrote")
    return files[-1]


def load(run: Path | str) -> Checkpoint:
    """Reads a checkpoint: a file, or a folder's newest one.

    Raises:
        Damaged: the file is cut, damaged or foreign; the message names the last good one beside it.
        UserError: it is missing, cannot be read, or is of a newer format.
    """
    path = locate(Path(run))
    try:
        return read(path)
    except Damaged as error:
        good = _last_good(path.parent)
        offer = "no good checkpoint lies beside it" if good is None else f"the last good one beside it is {good}"
        raise Damaged(f"{error}; {offer}") from None


def _last_good(folder: Path) -> Path | None:
    """The newest checkpoint file of a folder that can be read, or None."""
    with contextlib.suppress(OSError):
        for path in reversed(files_in(folder)):
            with contextlib.suppress(UserError):
                read(path)
                return path
    return None


def read(path: Path) -> Checkpoint:
    """Reads one checkpoint file and checks all of it; errors as load(), without the offer."""
    tensors, metadata = _read(path)
    document = metadata.get("mlp_fast")
    if document is None:
        raise Damaged(f"{path} is not a checkpoint of mlp_fast")
    if metadata.get("sha256") != _checksum(document, tensors):
        raise Damaged(f"{path} is damaged: its checksum does not fit its content")
    try:
        facts = json.loads(document)
        version = facts["format_version"]
        for older in range(version, FORMAT_VERSION):
            facts = UPGRADES[older](facts)
        if version <= FORMAT_VERSION:
            return _checkpoint(path, facts, tensors)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, UserError) as error:
        # In one line, since it may quote lines of the file.
        raise Damaged(f"{path} is not a checkpoint of mlp_fast: {type(error).__name__} {one_line(error)}") from None
    raise UserError(f"{path}: its format version {version} is newer than {FORMAT_VERSION}; update mlp_fast")


def _checkpoint(path: Path, facts: Facts, tensors: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint of a document of FORMAT_VERSION; any of the errors that read() catches where it is invalid."""
    config, vocabulary, step = Config(**facts["config"]), from_json(facts["vocabulary"]), facts["step"]
    if type(step) is not int or not 0 <= step <= config.num_steps:
        raise ValueError(f"step {step!r} is not one of the run's")
    losses = dict(facts["losses"])
    if not all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in losses.values()):
        raise ValueError("the losses are not finite numbers")
    sizes = Shape.of(config, len(vocabulary)).parameters
    wanted = {prefix + name: size for prefix in _PREFIXES.values() for name, size in sizes.items()}
    if {key: tuple(t.shape) for key, t in tensors.items() if t.dtype == torch.float32} != wanted:
        raise ValueError("the tensors do not fit the config")
    parts = {kind: {name: tensors[prefix + name] for name in sizes} for kind, prefix in _PREFIXES.items()}
    beginning = tuple(facts["beginning"])
    if not all(type(token) is int and 0 <= token < len(vocabulary) for token in beginning):
        raise ValueError("the beginning is not of the vocabulary")
    return Checkpoint(
        TrainState(**parts, step=step), config, vocabulary, str(facts["corpus_fingerprint"]), losses, beginning, path
    )


# version -> the function that makes its documents those of the next version. Version 1 kept the settings of the command
# in the config, and no losses; version 2 did not keep the beginning of the corpus.
UPGRADES: dict[int, Callable[[Facts], Facts]] = {
    1: lambda facts: {**facts, "config": _of_the_run(facts["config"]), "losses": {}},
    2: lambda facts: {**facts, "beginning": []},
}


def _of_the_run(settings: Facts) -> Facts:
    return {name: value for name, value in settings.items() if name not in PER_COMMAND}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not stat.S_ISREG(file_mode(path)):  # opening a FIFO would wait for a writer
        raise Damaged(f"{path} is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: what is mapped would keep the space of a deleted file for as long as the state lives.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is damaged or not a checkpoint ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None


def _checksum(document: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the document and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

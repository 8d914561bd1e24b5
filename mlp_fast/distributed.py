"""Data parallel: the processes that torchrun starts compute, together, the steps of one.

    torchrun --nproc-per-node N -m mlp_fast.train ...

Rank r of N takes rows floor(r*B/N) .. floor((r+1)*B/N) of every batch and scales its mean loss by the part of the
rows that its shard is, so that losses and gradients all-reduced over the ranks are those of the whole batch, uneven
shards included. Every rank then makes the same AdamW update of the same state: parameters are never sent. Evaluations
split their windows in the same way. Rank 0 alone prints and writes.
"""

import datetime
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlp_fast.errors import Interrupted, UserError

# How long a step waits for the other processes. The end of one is noticed at once, by its closed connection (gloo) or
# by torchrun; this is for a machine that falls silent.
TIMEOUT = datetime.timedelta(seconds=25)
# How long a rank waits where others may take their time: compiling, making tokens of a large corpus, evaluating, or
# writing to a slow disk.
PATIENCE = datetime.timedelta(hours=1)
_REMEDY = "start the processes by torchrun, or unset WORLD_SIZE to run one"


class LostContact(UserError):
    """Another process of the run has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of the run: this one's number, and how many. World() is a run of one process."""

    rank: int = 0
    size: int = 1

    def shard(self, count: int) -> slice:
        """This rank's shard of `count` rows."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all_reduce_(self, tensor: Tensor, **how: Any) -> Tensor:
        """All-reduces a tensor, by its sum unless `how` says otherwise, in place, on every rank to the same bits."""
        if self.size > 1:
            self._checked(dist.all_reduce, tensor, **how)
        return tensor

    def all_reduce_gradients(self, tensors: list[Tensor]) -> None:
        """All-reduces several tensors of one dtype and device, in place, as one message."""
        if self.size == 1:
            return
        joined = self.all_reduce_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def mean(self, value: float, weight: float) -> float:
        """The mean of the ranks' values by their weights, in float64; a value of weight 0 is left out.

        For evaluations: waits for as long as PATIENCE, since a rank's share of a large one may take long.
        """
        if self.size == 1:
            return value
        sums = torch.tensor([value * weight if weight else 0.0, weight], dtype=torch.float64)
        total, weights = self.all_reduce_(sums, group=_patient).tolist()
        return total / weights

    def max(self, value: float) -> float:
        """The largest of the ranks' values, for decisions that must be the same on all."""
        if self.size == 1:
            return value
        return self.all_reduce_(torch.tensor(value, dtype=torch.float64), op=dist.ReduceOp.MAX).item()

    def barrier(self) -> None:
        """Waits until every rank is here, for as long as PATIENCE."""
        self.all_reduce_(torch.zeros(1), group=_patient)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Around work that may fail on some ranks only: a UserError of one is raised on all, to be reported once."""
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        messages: list[str | None] = [str(failure) if failure else None] * self.size
        if self.size > 1:
            self._checked(dist.all_gather_object, messages, messages[0], group=_patient)
        for rank, message in enumerate(messages):
            if failure and rank == self.rank:
                raise failure
            if message is not None:
                raise UserError(f"rank {rank}: {message}" if rank else message)

    def _checked(self, collective: Callable[..., Any], *arguments: Any, **how: Any) -> None:
        """Calls a collective operation; LostContact where it fails."""
        try:
            collective(*arguments, **how)
        except RuntimeError as error:
            # Of gloo's and NCCL's message only what happened, without the place in their source and what follows.
            what = re.match(r"(?:\[\S+:\d+\] )?(.+?)(?:\. |$)", str(error).strip(), re.MULTILINE)
            reason = what[1] if what else type(error).__name__
            raise LostContact(
                f"rank {self.rank} stops: another process has ended or does not answer ({reason}); "
                "see what it said; --resume goes on from the last checkpoint"
            ) from None


_current = World()
_patient: Any = None  # the process group with PATIENCE, on CPU tensors


def world() -> World:
    """The processes of this run; World() outside of joined()."""
    return _current


def launched_rank() -> int:
    """The number that torchrun has given this process; 0 without it. UserError: see joined()."""
    return _from_torchrun("RANK", 0)


def gpu_missing() -> str | None:
    """Why this process has no GPU of its own on a machine with CUDA, or None where it has."""
    local, gpus = _from_torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
    return f"process {local} of this machine has no GPU of its own, there are {gpus}" if local >= gpus else None


def _from_torchrun(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment is not a number; {_REMEDY}")
    return int(value)


@contextmanager
def joined() -> Iterator[World]:
    """Connects the processes that torchrun has started for as long as the block runs; nothing to do for one.

    CPU tensors go through gloo; where there is CUDA, CUDA tensors go through NCCL, and each process takes the GPU of
    its local rank as the current one; see gpu_missing.

    Rank 0 alone reports a UserError that leaves the block: on the others it ends the process without a word, but for
    LostContact.

    Raises:
        UserError: the processes do not find each other, or the environment gives impossible places.
    """
    global _current, _patient
    size = _from_torchrun("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    _patient = _connected(size)
    _current = World(dist.get_rank(), size)
    try:
        yield _current
    except LostContact:
        if not dist.is_nccl_available():  # NCCL would wait for those that are gone
            _disconnect()
        raise
    except (Interrupted, UserError) as error:
        _disconnect()
        if _current.rank and isinstance(error, UserError):
            raise SystemExit(error.exit_code) from None
        raise
    else:
        _disconnect()
    finally:
        _current = World()


def _connected(size: int) -> Any:
    """Makes the process groups; returns the patient one."""
    if launched_rank() >= size:
        raise UserError(f"RANK={launched_rank()} in the environment is not below WORLD_SIZE={size}; {_REMEDY}")
    if not dist.is_available():
        raise UserError("this build of torch has no torch.distributed; run one process")
    backend = "gloo"
    if torch.cuda.is_available():
        if gpu_missing() is None:
            torch.cuda.set_device(_from_torchrun("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes did not find each other ({reason}); {_REMEDY}") from None


def _disconnect() -> None:
    """Ends the process groups with their threads, one of which could abort the process while the interpreter ends."""
    global _patient
    _patient = None  # a group lives on for as long as anything refers to it
    with suppress(RuntimeError):
        dist.destroy_process_group()

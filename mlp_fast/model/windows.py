"""The token tape: one split as one line of tokens, over which windows of T inputs and one target slide."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_EVAL_BATCHES = 20  # the train loss of an evaluation covers this many batches
# A larger tape stays in the host's memory, or in its file, and batches are copied to the GPU one by one.
DEVICE_TAPE_BYTES = 4 * 2**30


class Tape:
    """A split's tokens and its windows: window i is tokens[i : i+T] with the target tokens[i+T].

    There are n - T windows; element j of batch k is window (k*B + j) mod (n - T), so batches run on without end.

    Args:
        tokens: shape (n,), an integer dtype, n > T.
        context_length: T.
        device: where batches go; that of tokens, if None.
    """

    def __init__(self, tokens: Tensor, context_length: int, device: torch.device | None = None) -> None:
        self.tokens = tokens
        self.device = tokens.device if device is None else device
        self.context_length = context_length
        self.rows = tokens.unfold(0, context_length + 1, 1)  # (n-T, T+1), a view
        self.num_windows = len(self.rows)

    def to(self, device: torch.device) -> "Tape":
        """The same tape for a device: on it, or beside it where stays_on_host says so."""
        tokens = self.tokens if self.stays_on_host(device) else self.tokens.to(device)
        return Tape(tokens, self.context_length, device)

    def stays_on_host(self, device: torch.device) -> bool:
        """Whether the tape is too large for a device that is not the CPU."""
        return device.type != "cpu" and self.tokens.nbytes > DEVICE_TAPE_BYTES

    def positions(self, first: int | Tensor, count: int) -> Tensor:
        """The windows of batch elements first .. first+count-1, wrapped; shape (count,), int64."""
        return (torch.arange(count, device=self.tokens.device) + first) % self.num_windows

    def batch(self, k: int | Tensor, batch_size: int, part: slice | None = None) -> tuple[Tensor, Tensor]:
        """Batch k, a number or an int64 scalar on the device: contexts (B, T) and targets (B,), int64.

        Of `part`, a slice of 0..B with both ends, only those rows.
        """
        first, end = (0, batch_size) if part is None else (part.start, part.stop)
        position = k * batch_size + first
        if isinstance(position, int) and position % self.num_windows + end - first <= self.num_windows:
            start = position % self.num_windows  # nothing wraps: a slice in place of an index, half the operations
            rows = self.rows[start : start + end - first]
        else:
            rows = self.rows[self.positions(position, end - first)]
        rows = rows.long().to(self.device)
        return rows[:, :-1], rows[:, -1]


@dataclass(frozen=True, eq=False)  # hashed by identity, so that backends can cache derived data per object
class WeightedWindows:
    """The distinct windows that an evaluation visits, each with how often.

    Evaluating a distinct window once and weighting it gives the mean over all of them; only the order of additions
    differs. Rows are sorted, so those that share a context lie side by side.

    Attributes:
        rows: (D, T+1), int64: T inputs and the target.
        counts: (D,), float64, on the same device.
    """

    rows: Tensor
    counts: Tensor

    @property
    def contexts(self) -> Tensor:
        """(D, T), int64."""
        return self.rows[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(D,), int64."""
        return self.rows[:, -1]

    def mean(self, losses: Tensor) -> float:
        """The mean over all visited windows of per-row values, shape (D,), summed in float64."""
        return (losses.double() * self.counts).sum().item() / self.weight

    @functools.cached_property
    def weight(self) -> float:
        """The sum of the counts."""
        return self.counts.sum().item()

    def part(self, rows: slice) -> "WeightedWindows":
        """Some of them; where it is all, these themselves."""
        if rows == slice(0, len(self.rows)):
            return self
        return WeightedWindows(self.rows[rows], self.counts[rows])

    def to(self, device: torch.device) -> "WeightedWindows":
        """The same windows on a device."""
        return WeightedWindows(self.rows.to(device), self.counts.to(device))


def evaluated_count(tape: Tape, batch_size: int, max_batches: int | None = None) -> int:
    """How many windows an evaluation visits, from window 0 on: those of floor(n/B) batches, at most max_batches."""
    batches = len(tape.tokens) // batch_size
    return batch_size * (batches if max_batches is None else min(batches, max_batches))


def evaluated_positions(tape: Tape, batch_size: int, max_batches: int | None = None) -> Tensor:
    """The windows that an evaluation visits, in order; shape (evaluated_count(),), int64."""
    return tape.positions(0, evaluated_count(tape, batch_size, max_batches))


def evaluated_windows(tape: Tape, batch_size: int, max_batches: int | None = None) -> WeightedWindows:
    """The distinct windows of an evaluation, see evaluated_positions; on the device of the tape's tokens.

    Sorted as columns, without a copy of the windows: beside the result it takes some 40 bytes for each. torch.unique
    makes a tensor of every row, which takes 300.
    """
    visits = evaluated_count(tape, batch_size, max_batches)
    # Window i is visited once in every round over the tape that is whole, and once more in the last, if it reaches i.
    size = min(visits, tape.num_windows)
    rounds, rest = divmod(visits, max(size, 1))
    tokens = tape.tokens[: size + tape.context_length].cpu().numpy()
    columns = [tokens[j : j + size] for j in range(tape.context_length + 1)]
    order = np.lexsort(columns[::-1])  # the last key is the first to sort by
    new = np.zeros(size, bool)
    new[:1] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    counts = rounds * np.diff(starts, append=size)
    counts += np.add.reduceat(order < rest, starts, dtype=np.int64)
    device = tape.tokens.device
    rows = tape.rows[torch.from_numpy(order[starts]).to(device)].long()
    return WeightedWindows(rows, torch.from_numpy(counts).double().to(device))


def windows_of_splits(tapes: dict[str, Tape], batch_size: int, device: torch.device) -> dict[str, WeightedWindows]:
    """split -> the windows that its loss is the mean over: of train only the first batches, of the others all."""
    limits = {"train": TRAIN_EVAL_BATCHES}
    return {split: evaluated_windows(tape, batch_size, limits.get(split)).to(device) for split, tape in tapes.items()}

"""The whole training step on the CPU: the C kernel of csrc/train_step.c, its arguments checked, called through ctypes.

ctypes releases the GIL for the time of a call, and calls that compute are kept short, so that signals are answered; no
result depends on where the work is cut. No argument reaches C unchecked: wrong sizes, dtypes, layouts and tokens raise
ValueError or TypeError here. C allocates nothing; where memory is refused here, a call raises MemoryError, and leaves
the model as it was.
"""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu_library
from ._cpu_library import Model, Windows, isa_number
from ._cpu_library import instruction_sets as instruction_sets
from ._cpu_library import unavailable as unavailable
from ._model import FORMS

RESPONSE_TIME = 0.04  # seconds that one call of C takes, where its least piece of work allows it
PAUSE, LONGEST_PAUSE = 0.25, 4.0  # seconds for which fewer threads work after they lacked processors
LEAST_CONTEXTS = 16  # of one call: fewer cost nearly as much, since they read all weights
MAX_VOCAB = 2**31 - 1  # tokens are int32
ALIGNMENT = 64
PAGE, PAGE_OFFSET = 1024, 336  # floats; the offset is about a third of a page, and in bytes a multiple of ALIGNMENT
TOKEN_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_count(name: str, value: int, least: int = 1, most: int = 2**62) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int (got {type(value).__name__})")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in {least}..{most} (got {value})")
    return value


def _check_number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number (got {type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite (got {value})")
    return float(value)


def _check_tensor(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], *, copy: bool = True
) -> Tensor:
    """The tensor, contiguous; None in `shape` stands for any size. Without `copy` it must be contiguous already."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor (got {type(tensor).__name__})")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of {' or '.join(map(str, dtypes))} (got {tensor.dtype})")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU (got {tensor.device})")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(want not in (None, got) for want, got in zip(shape, sizes, strict=True)):
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name} must have shape {wanted} (got {sizes})")
    if not (copy or tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous (got strides {tensor.stride()})")
    return tensor.detach().contiguous()


def _check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    if tokens.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(tokens))
    if least < 0 or most >= vocab_size:
        raise ValueError(f"{name} must lie in 0..{vocab_size - 1} (got {least if least < 0 else most})")


@dataclass(frozen=True)
class Pairs:
    """Weighted pairs of a context and a target, every context held once; NativeModel.pairs makes them.

    Attributes:
        contexts: (C, T), of one of TOKEN_TYPES, below V.
        begins: (C+1,), int64: the pairs of context c are begins[c] .. begins[c+1]-1.
        targets: (N,), int32, below V.
        weights: (N,), float64.
        V: the vocabulary that they were checked against.

    Raises:
        TypeError, ValueError: they are not so.
    """

    contexts: Tensor
    begins: Tensor
    targets: Tensor
    weights: Tensor
    V: int

    def __post_init__(self) -> None:
        _check_count("V", self.V, most=MAX_VOCAB)
        _check_tensor("the pairs' contexts", self.contexts, TOKEN_TYPES, (None, None), copy=False)
        _check_tensor("the pairs' begins", self.begins, (torch.int64,), (len(self.contexts) + 1,), copy=False)
        _check_tensor("the pairs' targets", self.targets, (torch.int32,), (None,), copy=False)
        _check_tensor("the pairs' weights", self.weights, (torch.float64,), (len(self.targets),), copy=False)
        _check_tokens("the pairs' contexts", self.contexts, self.V)
        _check_tokens("the pairs' targets", self.targets, self.V)
        ends = (int(self.begins[0]), int(self.begins[-1]))
        if ends != (0, len(self.targets)) or bool((self.begins.diff() < 1).any()):
            raise ValueError(f"the pairs' begins must rise from 0 to {len(self.targets)}")


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Makes torch's refusal of memory, a RuntimeError, what it is; also as a decorator."""
    try:
        yield
    except RuntimeError as error:
        refusal = re.search(r"you tried to allocate \d+ bytes|bad_alloc", str(error))
        if refusal is None:
            raise
        raise MemoryError(f"native: the memory was refused ({refusal[0]})") from None


# --- threads ---------------------------------------------------------------------------------------------------------


class _Backoff:
    """How many threads work: torch.get_num_threads(), but fewer for a while where other work takes the processors.

    Exponential backoff: half as many after a call that C broke off, for PAUSE seconds, doubled each time that it
    happens again, up to LONGEST_PAUSE; then all are tried anew.
    """

    def __init__(self) -> None:
        self._most, self._until, self._pause = 0, 0.0, PAUSE

    def threads(self) -> int:
        threads = torch.get_num_threads()
        return threads if time.monotonic() >= self._until else min(threads, self._most)

    def worked(self, threads: int, *, oversubscribed: bool) -> None:
        """Notes after a call how many threads worked, and whether they lacked processors."""
        if oversubscribed:
            self._most, self._until = max(1, threads // 2), time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif time.monotonic() >= self._until:
            self._pause = PAUSE


# --- the model -------------------------------------------------------------------------------------------------------


class NativeModel:
    """A model and its AdamW state in the kernel's packed layout.

    Training and evaluations of large models use torch.get_num_threads() threads, at most one per 64 hidden units, or
    32 where there are few; evaluations of small ones at most one per 64 contexts; sampling one. Training uses fewer
    while other work takes the processors. The bits do not depend on the number of threads.

    Args:
        V, T, E, H: vocabulary, context length, embedding, hidden units.
        form: "table", "gather", or "auto": table for batches whose distinct tokens are at most 3/4 of their rows.
        isa: one of instruction_sets(); the best, or MLP_FAST_ISA, if None.
    """

    @_memory_errors()
    def __init__(self, V: int, T: int, E: int, H: int, form: str = "auto", isa: str | None = None) -> None:
        self._library = _cpu_library.library()
        self.V = _check_count("V", V, most=MAX_VOCAB)
        self.T, self.E, self.H = _check_count("T", T), _check_count("E", E), _check_count("H", H)
        if form not in FORMS:
            raise ValueError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
        if (max(V, H) + 1024) * (T * E + V + H + 1024) > 2**56:
            raise ValueError(f"a model of V={V}, T={T}, E={E}, H={H} does not fit any memory")
        self._model = Model(V, T, E, H, isa_number(isa), FORMS.index(form))
        floats = self._library.mlp_packed_floats(self._model)
        # One piece of memory: were the parameters and their moments whole pages apart, a load of one would wait for a
        # store of another, since processors first compare the lower 12 bits of addresses.
        stride = floats + (PAGE_OFFSET - floats) % PAGE
        memory = torch.zeros(3 * stride)
        self._packed = p, m, v = [memory[i * stride :][:floats] for i in range(3)]
        self._model.parameters, self._model.exp_avg, self._model.exp_avg_sq = p.data_ptr(), m.data_ptr(), v.data_ptr()
        self._step = ctypes.c_int64(0)
        self._backoff = _Backoff()
        self._pace: dict[tuple[str | int, ...], int] = {}  # kind of work -> pieces of it in RESPONSE_TIME
        self._memory: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """Steps done; right even after an exception in train()."""
        return self._step.value

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of wte, W1, b1, W2, b2."""
        return ((self.V, self.E), (self.H, self.T * self.E), (self.H,), (self.V, self.H), (self.V,))

    @_memory_errors()
    def load(
        self, parameters: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], step: int
    ) -> None:
        """Takes over a state, copying it. Each sequence is wte, W1, b1, W2, b2: float32 tensors of self.shapes."""
        _check_count("step", step, least=0)
        names, checked = ("wte", "W1", "b1", "W2", "b2"), []
        for kind, tensors in (("parameters", parameters), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if len(tensors) != len(names):
                raise ValueError(f"{kind} must be the five tensors {', '.join(names)} (got {len(tensors)})")
            checked.append(
                [
                    _check_tensor(f"{kind}: {name}", tensor, (torch.float32,), shape)
                    for name, tensor, shape in zip(names, tensors, self.shapes, strict=True)
                ]
            )
        for packed, tensors in zip(self._packed, checked, strict=True):
            packed.zero_()
            self._library.mlp_transfer(self._model, True, packed, *tensors)
        self._step.value = step

    @_memory_errors()
    def store(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Copies of the parameters and both moments, each as load() takes them."""
        parameters, exp_avg, exp_avg_sq = ([torch.empty(shape) for shape in self.shapes] for _ in range(3))
        for packed, tensors in zip(self._packed, (parameters, exp_avg, exp_avg_sq), strict=True):
            self._library.mlp_transfer(self._model, False, packed, *tensors)
        return parameters, exp_avg, exp_avg_sq

    @_memory_errors()
    def set_tape(self, tokens: Tensor, *, copy: bool = True) -> None:
        """The tokens to train on, (n,), n > T, in 0..V-1; they are checked here and only here.

        Args:
            copy: False keeps the tensor itself, for a tape mapped from a file; it must never change.
        """
        tokens = _check_tensor("the tape", tokens, TOKEN_TYPES, (None,))
        if len(tokens) <= self.T:
            raise ValueError(f"the tape must have more than T = {self.T} tokens (got {len(tokens)})")
        _check_tokens("the tape's tokens", tokens, self.V)
        self._tape = tokens.clone(memory_format=torch.contiguous_format) if copy else tokens.contiguous()

    @_memory_errors()
    def train(self, batch_size: int, steps: int, num_steps: int, learning_rate: float, weight_decay: float) -> Tensor:
        """Does `steps` steps of AdamW from the present one on and returns their batch losses, (steps,), float64.

        Element j of step s is window (s * batch_size + j) mod (n - T) of the tape; its learning rate is
        learning_rate * (1 + cos(pi s / num_steps)) / 2. Signals are handled every RESPONSE_TIME seconds or so, but not
        in the middle of a step: a step of the largest models takes longer.
        """
        _check_count("batch_size", batch_size, most=2**31 - 1)
        _check_count("steps", steps, least=0)
        _check_count("num_steps", num_steps)
        learning_rate = _check_number("learning_rate", learning_rate)
        weight_decay = _check_number("weight_decay", weight_decay)
        if self.step + steps > 2**62 // batch_size:
            raise ValueError(f"step {self.step + steps} is too large")
        if not hasattr(self, "_tape"):
            raise RuntimeError("set_tape() comes before train()")
        windows = Windows.of(self._tape, stride=1, count=len(self._tape) - self.T, has_target=True)
        losses = torch.empty(steps, dtype=torch.float64)
        memory = self._workspace("mlp_workspace_bytes", batch_size, torch.get_num_threads())
        begin = self.step
        while (first := self.step - begin) < steps:
            threads = self._backoff.threads()
            work = ("steps", batch_size, threads)
            count, start = min(self._pace.get(work, 1), steps - first), time.perf_counter()
            self._library.mlp_train(
                self._model, memory, windows, batch_size, self._step, count,
                num_steps, learning_rate, weight_decay, threads, losses[first:],
            )  # fmt: skip
            done = self.step - begin - first
            self._timed(work, done, time.perf_counter() - start)
            self._backoff.worked(threads, oversubscribed=done < count)
        return losses

    @_memory_errors()
    def logits(self, contexts: Tensor) -> Tensor:
        """Contexts (N, T), integer, in 0..V-1 -> logits (N, V), float32."""
        contexts = _check_tensor("contexts", contexts, TOKEN_TYPES, (None, self.T))
        _check_tokens("contexts", contexts, self.V)
        logits = torch.empty(len(contexts), self.V)
        for first, arguments in self._passes(contexts):
            self._library.mlp_logits(*arguments, logits[first:])
        return logits

    @_memory_errors()
    def pairs(self, rows: Tensor, weights: Tensor) -> Pairs:
        """What loss_sum takes; it is worth keeping, where the same pairs are evaluated again.

        Args:
            rows: (N, T+1), integer, in 0..V-1: T inputs and the target. Neighbours that share their inputs are
                evaluated once.
            weights: (N,), float64.
        """
        rows = _check_tensor("rows", rows, TOKEN_TYPES, (None, self.T + 1))
        weights = _check_tensor("weights", weights, (torch.float64,), (len(rows),))
        _check_tokens("rows", rows, self.V)
        contexts = rows[:, :-1]
        differ = torch.ones(len(rows) + 1, dtype=torch.bool)  # from the one before; and one past the last
        differ[1:-1] = (contexts[1:] != contexts[:-1]).any(dim=1)
        begins = differ.nonzero().flatten()
        return Pairs(contexts[begins[:-1]].contiguous(), begins, rows[:, -1].to(torch.int32), weights, self.V)

    @_memory_errors()
    def loss_sum(self, pairs: Pairs) -> float:
        """The sum of weights times cross-entropies, in nats, added up in float64."""
        if pairs.contexts.shape[1] != self.T or pairs.V > self.V:
            raise ValueError(
                f"pairs of {pairs.contexts.shape[1]} tokens below {pairs.V} were made for another model than this one "
                f"with T={self.T} and V={self.V}"
            )
        losses = torch.empty(len(pairs.contexts), dtype=torch.float64)
        for first, arguments in self._passes(pairs.contexts):
            begins = pairs.begins[first:]
            self._library.mlp_losses(*arguments, losses[first:], begins, pairs.targets, pairs.weights)
        return losses.sum().item()

    @_memory_errors()
    def sample(self, context: Sequence[int], count: int, seed: int) -> list[int]:
        """Draws `count` tokens after a context of T, one xorshift64* uniform each, the generator starting at `seed`."""
        _check_count("count", count, least=0)
        _check_count("seed", seed, most=2**64 - 1)
        if len(context) != self.T:
            raise ValueError(f"the context must have {self.T} tokens (got {len(context)})")
        window = torch.tensor([_check_count("a token of the context", x, 0, self.V - 1) for x in context])
        state, logits = ctypes.c_uint64(seed), torch.empty(self.V)
        drawn = torch.empty(count, dtype=torch.int64)
        for first, draws in self._calls(("draws",), count):
            memory = self._workspace("mlp_forward_bytes", 1, 1)
            self._library.mlp_sample(self._model, memory, window, state, draws, logits, drawn[first:])
        return drawn.tolist()

    def _passes(self, contexts: Tensor) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Cuts contexts (N, T) into calls of C: the first of each, and the arguments that forward passes begin with."""
        threads = torch.get_num_threads()
        for first, count in self._calls(("contexts", threads), len(contexts), LEAST_CONTEXTS):
            windows = Windows.of(contexts[first:], stride=self.T, count=count, has_target=False)
            memory = self._workspace("mlp_forward_bytes", count, threads)
            yield first, (self._model, memory, windows, threads)

    def _calls(self, work: tuple[str | int, ...], pieces: int, least: int = 1) -> Iterator[tuple[int, int]]:
        """Cuts pieces of some work into calls of C: the first piece of each, and how many.

        Every call is timed until the next is asked for, which then has as many pieces as RESPONSE_TIME is enough for,
        if they take as long as the last ones did: at most twice the pace before, and never fewer than `least`.
        """
        first = 0
        while first < pieces:
            pace = self._pace.get(work, least)
            count = min(pace, pieces - first)
            start = time.perf_counter()
            yield first, count
            self._timed(work, count, time.perf_counter() - start, least)
            first += count

    def _timed(self, work: tuple[str | int, ...], pieces: int, seconds: float, least: int = 1) -> None:
        """Notes how long a call took, for the next one."""
        pace = self._pace.get(work, least)
        self._pace[work] = max(least, min(2 * pace, int(RESPONSE_TIME * pieces / max(seconds, 1e-9))))

    def _workspace(self, measure: str, windows: int, threads: int) -> int:
        """The address of as many bytes as the library's `measure` asks for; kept from call to call."""
        if (max(self.V, self.H, windows) + 1024) * (self.T * self.E + self.V + self.H + 1024) * threads > 2**58:
            raise ValueError(f"{windows} windows of T={self.T} on {threads} threads do not fit any memory")
        needed = getattr(self._library, measure)(self._model, windows, threads) + ALIGNMENT
        if measure not in self._memory or self._memory[measure].numel() < needed:
            self._memory[measure] = torch.empty(needed, dtype=torch.uint8)
        return -(-self._memory[measure].data_ptr() // ALIGNMENT) * ALIGNMENT


def tanh(x: Tensor, isa: str | None = None) -> Tensor:
    """tanh as the kernel computes it: float32, shape (n,)."""
    return _elementwise("mlp_tanh", x, isa)


def exp(x: Tensor, isa: str | None = None) -> Tensor:
    """exp as the kernel computes it, for x <= 88: float32, shape (n,)."""
    return _elementwise("mlp_exp", x, isa)


def _elementwise(name: str, x: Tensor, isa: str | None) -> Tensor:
    padded = _padded("x", x, len(x))
    y = torch.empty_like(padded)
    getattr(_cpu_library.library(), name)(isa_number(isa), padded, y, len(padded))
    return y[: len(x)]


def _padded(name: str, x: Tensor, size: int) -> Tensor:
    """A copy of x, float32, shape (size,), with zeros up to a multiple of 32."""
    return F.pad(_check_tensor(name, x, (torch.float32,), (size,)), (0, -size % 32))


def adamw_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, decay: float, step_size: float, sqrt_bias2: float,
    isa: str | None = None,
) -> None:  # fmt: skip
    """AdamW in place as the kernel computes it.

    Args:
        p, grad, m, v: float32, shape (n,): parameters, gradient, first and second moments.
        decay, step_size, sqrt_bias2: 1 - lr*weight_decay, lr / (1 - beta1^step) and sqrt(1 - beta2^step).
    """
    padded = [_padded(name, x, len(p)) for name, x in (("p", p), ("m", m), ("v", v), ("grad", grad))]
    _cpu_library.library().mlp_adamw(isa_number(isa), decay, step_size, sqrt_bias2, *padded, len(padded[0]))
    for x, result in zip((p, m, v), padded, strict=False):
        x.copy_(result[: len(p)])

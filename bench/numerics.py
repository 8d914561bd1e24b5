"""The effect of the arithmetic of matrix products on a run: fp32, tf32x3 and tf32 against float64, without a GPU.

    python -m bench.numerics [--num-steps N]

TF32 keeps 10 of fp32's 23 bits of mantissa, so it can be emulated: the operands of every product are rounded to it and
multiplied in fp32, where their products are exact. All runs go through model.manual_step, the kernels' formulas,
from the same initial values and over the same batches; only the matrix product differs.

    float64        every number in float64: the truth
    fp32 gather    float32, the first layer as a product of gathered rows
    fp32 table     float32, the first layer as a table of products: the same function, its additions in another order
    tf32x3         operands as a sum of two TF32 numbers, three products of the four: about fp32
    tf32           operands rounded to TF32, to the nearest
    tf32 cut       operands cut to TF32: what a tensor core does with fp32 numbers that are not rounded
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlp_fast.backends.compiled import forward
from mlp_fast.cli import run_main
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus, load
from mlp_fast.measure import table as markdown
from mlp_fast.model.manual_step import adamw_, loss_and_gradients
from mlp_fast.model.mlp import Shape
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_windows

_DROPPED_BITS = 13  # fp32's bits of mantissa that TF32 has not


def truncated(x: Tensor) -> Tensor:
    """Float32 numbers cut to TF32, towards 0."""
    return (x.contiguous().view(torch.int32) & -(1 << _DROPPED_BITS)).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """Float32 numbers rounded to TF32, to the nearest, ties away from 0 (PTX: cvt.rna.tf32.f32)."""
    return truncated((x.contiguous().view(torch.int32) + (1 << (_DROPPED_BITS - 1))).view(torch.float32))


def tf32x3(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by three products of TF32 numbers, the smallest first; low @ low is left out."""
    a_high, b_high = rounded(a), rounded(b)
    a_low, b_low = rounded(a - a_high), rounded(b - b_high)
    return (a_low @ b_high + a_high @ b_low) + a_high @ b_high


class Arithmetic(NamedTuple):
    """How a run computes: the dtype of all its numbers, the form of the first layer, and the matrix product."""

    dtype: torch.dtype
    form: str
    product: Callable[[Tensor, Tensor], Tensor]


ARITHMETICS = {
    "float64": Arithmetic(torch.float64, "gather", torch.matmul),
    "fp32 gather": Arithmetic(torch.float32, "gather", torch.matmul),
    "fp32 table": Arithmetic(torch.float32, "table", torch.matmul),
    "tf32x3": Arithmetic(torch.float32, "table", tf32x3),
    "tf32": Arithmetic(torch.float32, "table", lambda a, b: rounded(a) @ rounded(b)),
    "tf32 cut": Arithmetic(torch.float32, "table", lambda a, b: truncated(a) @ truncated(b)),
}


class Products(TorchFunctionMode):
    """Within it every matrix product is computed by `product`."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            return self.product(*args)
        return func(*args, **(kwargs or {}))


def train(arithmetic: Arithmetic, config: Config, corpus: Corpus) -> tuple[float, Tensor, Tensor]:
    """config.num_steps steps of the model in an arithmetic, on the CPU.

    Returns:
        The validation loss, the batch losses (steps,), and all parameters (P,); in float64.
    """
    T, B = config.context_length, config.batch_size
    initial = TrainState.initial(Shape.of(config, len(corpus.vocabulary)), config.seed)
    parameters, exp_avg, exp_avg_sq = (
        {name: tensor.to(arithmetic.dtype) for name, tensor in part.items()} for part in initial.parts.values()
    )
    scalars, tape = update_scalars(config).to(arithmetic.dtype), Tape(corpus.train, T)
    windows = evaluated_windows(Tape(corpus.val, T), B)
    losses = []
    with Products(arithmetic.product):
        for step in range(config.num_steps):
            loss, gradients = loss_and_gradients(parameters, *tape.batch(step, B), arithmetic.form)
            adamw_(parameters, gradients, exp_avg, exp_avg_sq, scalars[step])
            losses.append(loss.double())
        val_losses = F.cross_entropy(forward(parameters, windows.contexts), windows.targets, reduction="none")
    every = torch.cat([tensor.double().flatten() for tensor in parameters.values()])
    return windows.mean(val_losses), torch.stack(losses), every


def relative(computed: Tensor, true: Tensor) -> float:
    """The norm of a tensor's error, relative to that of the true one."""
    return ((computed.double() - true).norm() / true.norm()).item()


def table(config: Config, corpus: Corpus) -> str:
    """Runs every arithmetic; a Markdown table of their validation losses (nats) and their differences from float64.

    The differences are of the validation loss, the largest of a batch loss, and relative, by their norms, of all
    parameters after the last step and of one product of a first layer's size, with normal operands.
    """
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=generator) for size in ((128, 144), (144, 512)))
    runs = {name: train(arithmetic, config, corpus) for name, arithmetic in ARITHMETICS.items()}
    true_val_loss, true_losses, true_parameters = runs["float64"]
    rows = []
    for name, (val_loss, losses, parameters) in runs.items():
        dtype, _, product = ARITHMETICS[name]
        differences = (
            abs(val_loss - true_val_loss),
            (losses - true_losses).abs().max().item(),
            relative(parameters, true_parameters),
            relative(product(a.to(dtype), b.to(dtype)), a.double() @ b.double()),
        )
        rows.append([name, f"{val_loss:.6f}", *("-" if d == 0 else f"{d:.1e}" for d in differences)])
    header = ("arithmetic", "val loss", "its difference", "largest of a batch loss", "parameters", "one product")
    return markdown.table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.numerics", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--num-steps", type=int, default=1000, help="of every run (default: %(default)s)")
    config = Config(num_steps=parser.parse_args(argv).num_steps)
    print(f"{config.num_steps} steps on the embedded corpus; differences from float64\n")
    print(table(config, load("embedded")))
    return 0


if __name__ == "__main__":
    run_main(main)

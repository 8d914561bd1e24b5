"""Cases of the fused operators, each beside plain torch and, on CUDA, beside its naive kernel.

On CUDA all are captured in a graph: kernels back to back are timed, and not how fast the host launches them. A fused
operator is compared with float64 first: error(fused) <= 2 * error(torch) + 1e-6, relative to the largest number of each
result.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Entry, Plan, Timer, Work, matmul_precision, repeated, timed_beside, waited
from bench.lower_bound import Probes
from mlp_fast import ops
from mlp_fast.config import Config
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import require
from mlp_fast.measure.timing import seconds
from mlp_fast.model.mlp import B1, B2, W1, W2, WTE, Shape, initial_parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS

CALLS = 100  # in a captured graph
WARM = 3  # calls before any that counts
# What computes an operator:
FUSED, TORCH, NAIVE = "fused", "torch", "naive kernel"
# and what else it is timed beside:
CHUNKED = "F.linear_cross_entropy"  # in chunks of rows, without all logits in memory
COMPILE, COPY, EMPTY = "torch.compile", "copy of as many bytes", "an empty kernel"
LARGE_BATCH = 65_536
V = 27

# (config, device, dtype, what computes it) -> work that returns the operator's results.
Maker = Callable[[Config, torch.device, torch.dtype, str], Work]


def _inputs(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and hidden activations, which need gradients, tokens and targets: the same numbers in every dtype."""
    B, T = config.batch_size, config.context_length
    generator = torch.Generator().manual_seed(1)
    tokens = {
        "idx": torch.randint(V, (B, T), generator=generator),
        "targets": torch.randint(V, (B,), generator=generator),
    }
    numbers = {**initial_parameters(Shape.of(config, V), config.seed)}
    numbers["h"] = torch.rand(B, config.hidden_size, generator=generator) * 2 - 1
    tensors = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in numbers.items()}
    return tensors | {name: tensor.to(device) for name, tensor in tokens.items()}


def _passes(forward: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor | None, backward: bool) -> Work:
    """A forward pass; or a forward and a backward pass, which return the gradients of the inputs."""
    if backward:
        return lambda: list(torch.autograd.grad(forward(), inputs, gradient))
    return lambda: [forward().detach()]


def _naive(operator: str) -> Callable[..., Any]:
    """An operator's first kernel, which has no backward pass; it needs the package triton."""
    return getattr(importlib.import_module(f"mlp_fast.kernels.{operator}"), f"{operator}_1")


def embed_linear_tanh(
    config: Config, device: torch.device, dtype: torch.dtype, by: str, *, form: str, backward: bool
) -> Work:
    """h = tanh(linear(embedding)) of the first layer."""
    x = _inputs(config, device, dtype)
    idx, weights = x["idx"], [x[WTE], x[W1], x[B1]]
    forward: Callable[[], Tensor]
    if by == FUSED:
        forward = partial(ops.embed_linear_tanh, idx, *weights, form=form, precision=config.precision)
    elif by == NAIVE:
        forward = partial(_naive("embed_linear_tanh"), idx, *(weight.detach() for weight in weights))
    else:
        forward = lambda: torch.tanh(F.linear(F.embedding(idx, x[WTE]).flatten(1), x[W1], x[B1]))  # noqa: E731
    return _passes(forward, weights, x["h"].detach(), backward)


def linear_cross_entropy(config: Config, device: torch.device, dtype: torch.dtype, by: str, *, backward: bool) -> Work:
    """The mean loss of the last layer."""
    x = _inputs(config, device, dtype)
    targets, operands = x["targets"], [x["h"], x[W2], x[B2]]
    h, weight, bias = operands
    forward: Callable[[], Tensor]
    if by == FUSED:
        forward = partial(ops.linear_cross_entropy, h, weight, bias, targets, precision=config.precision)
    elif by == NAIVE:
        forward = partial(_naive("linear_cross_entropy"), *(operand.detach() for operand in operands), targets)
    elif by == CHUNKED:
        options = torch.nn.LinearCrossEntropyOptions()
        forward = partial(F.linear_cross_entropy, h, weight, targets, linear_bias=bias, options=options)
    else:
        forward = lambda: F.cross_entropy(F.linear(h, weight, bias), targets)  # noqa: E731
    return _passes(forward, operands, None, backward)


def adamw(config: Config, device: torch.device, dtype: torch.dtype, by: str) -> Work:
    """The first update of the parameters, which are its result; every call updates them again."""
    x = _inputs(config, device, dtype)
    params = [x[name].detach().requires_grad_() for name in (WTE, W1, B1, W2, B2)]
    grads = [torch.sin(torch.arange(p.numel(), device=device, dtype=dtype)).view_as(p) * 1e-2 for p in params]
    held = [p.detach() for p in params]
    moments = ([torch.zeros_like(p) for p in held] for _ in range(2))
    rate = torch.tensor(config.learning_rate, dtype=torch.float64, device=device)
    operands: list[Any] = [held, grads, *moments, torch.ones((), device=device), rate]
    settings: dict[str, Any] = {"betas": (BETA1, BETA2), "eps": EPS, "weight_decay": config.weight_decay}
    update: Callable[[], object]
    if by == FUSED:
        update = partial(ops.adamw_, *operands, **settings)
    elif by == NAIVE:
        update = partial(_naive("adamw"), *operands, BETA1, BETA2, EPS, config.weight_decay)
    else:
        for p, gradient in zip(params, grads, strict=True):
            p.grad = gradient
        cuda = device.type == "cuda"
        update = torch.optim.AdamW(params, config.learning_rate, fused=cuda or None, capturable=cuda, **settings).step

    def work() -> list[Tensor]:
        update()
        return held

    return work


PASSES = {"": False, "-and-backward": True}
OPERATORS: dict[str, Maker] = {
    **{
        f"embed_linear_tanh-{form}{suffix}": partial(embed_linear_tanh, form=form, backward=backward)
        for form in ("table", "gather")
        for suffix, backward in PASSES.items()
    },
    **{f"linear_cross_entropy{s}": partial(linear_cross_entropy, backward=b) for s, b in PASSES.items()},
    "adamw": adamw,
}


def check(name: str, make: Maker, config: Config, device: torch.device) -> None:
    """Raises NotEquivalent where the fused operator is further from float64 than twice plain torch and a slack."""
    true = [t.double().cpu() for t in make(config, torch.device("cpu"), torch.float64, TORCH)()]
    errors = []
    for by in (FUSED, TORCH):
        results = zip(make(config, device, torch.float32, by)(), true, strict=True)
        errors.append([((r.double().cpu() - t).abs().max() / t.abs().max().clamp(1e-30)).item() for r, t in results])
    slack = 1e-6 if config.precision != "tf32" else 2.0**-9  # torch may round its operands where the kernel cuts them
    for mine, theirs in zip(*errors, strict=True):
        require(name, "a result", mine, 2 * theirs + slack)


def calls_of(work: Work, plan: Plan) -> int:
    """Calls in a round: a single one of a millisecond would time how the threads wake up."""
    if plan.device != "cpu":
        return CALLS
    return max(1, math.ceil(plan.round_seconds / min(seconds(work) for _ in range(WARM))))


def _peak_bytes(work: Work, device: torch.device) -> int | None:
    """The peak of device memory during the work, above what is held before it; None on the CPU."""
    if device.type == "cpu":
        return None
    work()
    with machine.PeakMemory(device) as memory:
        work()
    return memory.bytes


def other(by: str, make: Maker, config: Config, device: torch.device) -> Work:
    """A call of an operator by that name, or of something else that it is timed beside."""
    if by == EMPTY:
        return (lambda: None) if device.type == "cpu" else partial(torch.cuda._sleep, 0)
    if by == COPY:
        # As many bytes as the table form must move: h written and the tokens read; half read here, and half written.
        numbers = config.batch_size * (config.hidden_size + 2 * config.context_length)  # of 4 bytes; a token has 8
        source = torch.ones(numbers // 2, device=device)
        return partial(torch.empty_like(source).copy_, source)
    if by == COMPILE:
        return torch.compile(make(config, device, torch.float32, TORCH), fullgraph=True)
    return make(config, device, torch.float32, by)


def operator_case(name: str, make: Maker, config: Config, plan: Plan, *more: str) -> Case:
    """An operator beside plain torch, and beside `more`."""
    device, precision = torch.device(plan.device), config.precision

    def run(timer: Timer, probes: Probes) -> Entry:
        with matmul_precision("high" if precision == "tf32" else "highest"):
            check(name, make, config, device)
            works = {by: other(by, make, config, device) for by in (FUSED, TORCH, *more)}
            peak, torch_peak = (_peak_bytes(works[by], device) for by in (FUSED, TORCH))
            calls = calls_of(works[FUSED], plan)
            rounds = {by: waited(repeated(work, device, calls), device) for by, work in works.items()}
            times = timed_beside(timer, rounds.pop(FUSED), rounds, plan.rounds, calls)
        if torch_peak is not None:
            times["rivals"][TORCH]["peak_bytes"] = torch_peak
        return {"B": config.batch_size, "precision": precision, "per": "call", "peak_bytes": peak, **times}

    return Case("kernels", f"{name}-{config.batch_size}-{precision}", run)


def kernel_cases(plan: Plan) -> Iterator[Case]:
    """Every fused operator; then the first layer at a large batch beside a copy, and at a small one beside a launch."""
    for precision in plan.precisions:
        for name, make in OPERATORS.items():
            if name == "adamw" and precision != "fp32":
                continue  # it has no products
            more = [CHUNKED] if name.startswith("linear_cross_entropy") and hasattr(F, "linear_cross_entropy") else []
            if not name.endswith("backward") and precision == "fp32" and plan.device != "cpu":
                more.append(NAIVE)
            yield operator_case(name, make, plan.config(precision=precision), plan, *more)
    large = plan.config() if plan.dry else plan.config(batch_size=LARGE_BATCH)
    for name, ceilings in (("embed_linear_tanh-table", (COMPILE, COPY)), ("embed_linear_tanh-table-and-backward", ())):
        yield operator_case(f"large-{name}", OPERATORS[name], large, plan, *ceilings)
    auto = partial(embed_linear_tanh, form="auto", backward=False)
    yield operator_case("small-embed_linear_tanh", auto, plan.config(), plan, EMPTY)

"""The fused operators as cases, each beside the same function in plain torch and, where there is one, beside its naive
kernel; on CUDA all are captured in a graph.

So what is timed is the device's time for kernels back to back, and not how fast the host launches them. Both sides are
compared with float64 first: error(fused) <= 2 * error(torch) + 1e-6, relative to the largest number, in every result.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import lower_bound
from bench.case import Case, Entry, Plan, Timer, timed_beside
from mlp_fast import ops
from mlp_fast.config import Config
from mlp_fast.measure.equivalence import NotEquivalent
from mlp_fast.measure.timing import seconds
from mlp_fast.model.mlp import B1, B2, W1, W2, WTE, Shape, initial_parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS

CALLS = 100  # in a captured graph
WARM = 3  # calls before any that counts
TORCH, COMPILE, COPY, EMPTY = "torch", "torch.compile", "copy of as many bytes", "an empty kernel"
NAIVE = "naive kernel"
CHUNKED = "F.linear_cross_entropy"  # in chunks of rows, without all logits in memory
LARGE_BATCH = 65_536
V = 27

Work = Callable[[], list[Tensor]]
# (config, device, dtype, fused) -> work that computes, and returns, the operator's results
Maker = Callable[[Config, torch.device, torch.dtype, bool], Work]


def _inputs(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters that need gradients, tokens, targets and hidden activations: the same numbers in every dtype."""
    B, T = config.batch_size, config.context_length
    generator = torch.Generator().manual_seed(1)
    named = initial_parameters(Shape.of(config, V), config.seed)
    tensors = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in named.items()}
    hidden = torch.rand(B, config.hidden_size, generator=generator) * 2 - 1
    tensors["h"] = hidden.to(device, dtype).requires_grad_()
    tensors["idx"] = torch.randint(V, (B, T), generator=generator).to(device)
    tensors["targets"] = torch.randint(V, (B,), generator=generator).to(device)
    return tensors


def _embed_linear_tanh(form: str, backward: bool) -> Maker:
    def make(config: Config, device: torch.device, dtype: torch.dtype, fused: bool) -> Work:
        x = _inputs(config, device, dtype)
        weights = [x[WTE], x[W1], x[B1]]
        gradient = x["h"].detach()

        def forward() -> Tensor:
            if fused:
                return ops.embed_linear_tanh(x["idx"], *weights, form=form, precision=config.precision)
            return torch.tanh(F.linear(F.embedding(x["idx"], x[WTE]).flatten(1), x[W1], x[B1]))

        if backward:
            return lambda: list(torch.autograd.grad(forward(), weights, gradient))
        return lambda: [forward().detach()]

    return make


def _linear_cross_entropy(backward: bool) -> Maker:
    def make(config: Config, device: torch.device, dtype: torch.dtype, fused: bool) -> Work:
        x = _inputs(config, device, dtype)
        operands = h, weight, bias = [x["h"], x[W2], x[B2]]

        def forward() -> Tensor:
            if fused:
                return ops.linear_cross_entropy(h, weight, bias, x["targets"], precision=config.precision)
            return F.cross_entropy(F.linear(h, weight, bias), x["targets"])

        if backward:
            return lambda: list(torch.autograd.grad(forward(), operands))
        return lambda: [forward().detach()]

    return make


def _updated(config: Config, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Parameters with gradients."""
    x = _inputs(config, device, dtype)
    params = [x[name].detach().requires_grad_() for name in (WTE, W1, B1, W2, B2)]
    for p in params:
        p.grad = torch.sin(torch.arange(p.numel(), device=device, dtype=dtype)).view_as(p) * 1e-2
    return params


def _adamw_by(update: Callable[..., None], config: Config, device: torch.device, dtype: torch.dtype) -> Work:
    """An update by a function with the arguments of kernels.adamw.adamw()."""
    params = _updated(config, device, dtype)
    grads = [p.grad for p in params if p.grad is not None]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    step, rate = torch.ones(1, device=device), torch.full((1,), config.learning_rate, device=device)

    def work() -> list[Tensor]:
        held = [p.detach() for p in params]
        update(held, grads, first, second, step, rate, BETA1, BETA2, EPS, config.weight_decay)
        return held

    return work


def _fused_adamw(
    params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, decay: float,
) -> None:  # fmt: skip
    ops.adamw_(params, grads, first, second, step, lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)


def _adamw(config: Config, device: torch.device, dtype: torch.dtype, fused: bool) -> Work:
    """The first update, over and over: the parameters that it returns are those after the first."""
    if fused:
        return _adamw_by(_fused_adamw, config, device, dtype)
    params, lr, decay = _updated(config, device, dtype), config.learning_rate, config.weight_decay
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        params, lr, betas=(BETA1, BETA2), eps=EPS, weight_decay=decay, fused=cuda or None, capturable=cuda
    )

    def plain() -> list[Tensor]:
        optimizer.step()
        return [p.detach() for p in params]

    return plain


OPERATORS: dict[str, Maker] = {
    "embed_linear_tanh-table": _embed_linear_tanh("table", backward=False),
    "embed_linear_tanh-table-and-backward": _embed_linear_tanh("table", backward=True),
    "embed_linear_tanh-gather": _embed_linear_tanh("gather", backward=False),
    "embed_linear_tanh-gather-and-backward": _embed_linear_tanh("gather", backward=True),
    "linear_cross_entropy": _linear_cross_entropy(backward=False),
    "linear_cross_entropy-and-backward": _linear_cross_entropy(backward=True),
    "adamw": _adamw,
}


def check(name: str, make: Maker, config: Config, device: torch.device) -> None:
    """Raises NotEquivalent where the fused operator is further from float64 than plain torch may excuse."""
    true = [t.double().cpu() for t in make(config, torch.device("cpu"), torch.float64, False)()]
    errors = []
    for fused in (True, False):
        results = [t.double().cpu() for t in make(config, device, torch.float32, fused)()]
        scale = [max(t.abs().max().item(), 1e-30) for t in true]
        errors.append([((r - t).abs().max().item() / s) for r, t, s in zip(results, true, scale, strict=True)])
    slack = 1e-6 if config.precision != "tf32" else 2.0**-9  # torch may round its operands where the kernel cuts them
    for mine, theirs in zip(*errors, strict=True):
        if not mine <= 2 * theirs + slack:
            raise NotEquivalent(f"{name} is not equivalent: off by {mine:.1e}, torch by {theirs:.1e}")


def calls_of(work: Callable[[], object], plan: Plan) -> int:
    """How many calls of the work make a round: a single one of a millisecond would time how the threads wake up."""
    if plan.device != "cpu":
        return CALLS
    return max(1, math.ceil(plan.round_seconds / min(seconds(work) for _ in range(WARM))))


def repeated(work: Callable[[], object], device: torch.device, calls: int) -> Callable[[], object]:
    """Something that does the work so many times and waits for it."""
    if device.type == "cpu":

        def repeat() -> None:
            for _ in range(calls):
                work()

        work()
        return repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd must have run where it is captured
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    return replay


# What is timed beside an operator: (config, device) -> work.
Other = Callable[[Config, torch.device], Callable[[], object]]


def operator_case(name: str, make: Maker, config: Config, plan: Plan, more: dict[str, Other] | None = None) -> Case:
    """An operator beside plain torch, and beside what else is given."""
    device, precision = torch.device(plan.device), config.precision

    def run(timer: Timer, probes: lower_bound.Probes) -> Entry:
        before_precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            check(name, make, config, device)
            works: dict[str, Callable[[], object]] = {TORCH: make(config, device, torch.float32, False)}
            works |= {other: of(config, device) for other, of in (more or {}).items()}
            fused = make(config, device, torch.float32, True)
            peak, torch_peak = _peak_bytes(fused, device), _peak_bytes(works[TORCH], device)
            calls = calls_of(fused, plan)
            others = {other: repeated(work, device, calls) for other, work in works.items()}
            times = timed_beside(timer, repeated(fused, device, calls), others, plan.rounds, calls)
        finally:
            torch.set_float32_matmul_precision(before_precision)
        if torch_peak is not None:
            times["rivals"][TORCH]["peak_bytes"] = torch_peak
        return {"B": config.batch_size, "precision": precision, "per": "call", "peak_bytes": peak, **times}

    return Case("kernels", f"{name}-{config.batch_size}-{precision}", run)


def _peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Device memory that the work takes at its peak, beyond what is held before it; None on the CPU."""
    if device.type == "cpu":
        return None
    work()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _compiled(make: Maker) -> Other:
    return lambda config, device: torch.compile(make(config, device, torch.float32, False), fullgraph=True)


def _chunked(backward: bool) -> dict[str, Other]:
    """torch's own operator, where this torch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}

    def make(config: Config, device: torch.device) -> Callable[[], object]:
        x = _inputs(config, device, torch.float32)
        operands = h, weight, bias = [x["h"], x[W2], x[B2]]

        def forward() -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(h, weight, x["targets"], linear_bias=bias, options=options)

        return (lambda: torch.autograd.grad(forward(), operands)) if backward else forward

    return {CHUNKED: make}


def _copy(config: Config, device: torch.device) -> Callable[[], object]:
    """Moves as many bytes as the table form must: h written and the tokens read; half read here, and half written."""
    numbers = config.batch_size * (config.hidden_size + 2 * config.context_length)  # of 4 bytes; a token has 8
    source = torch.ones(numbers // 2, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _empty_kernel(config: Config, device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.cuda._sleep(0)


def naive_embed_linear_tanh(config: Config, device: torch.device) -> Work:
    """Version 1 of kernels/embed_linear_tanh.py."""
    from mlp_fast.kernels.embed_linear_tanh import embed_linear_tanh_1

    x = _inputs(config, device, torch.float32)
    return lambda: [embed_linear_tanh_1(x["idx"], x[WTE].detach(), x[W1].detach(), x[B1].detach())]


def naive_linear_cross_entropy(config: Config, device: torch.device) -> Work:
    """Version 1 of kernels/linear_cross_entropy.py."""
    from mlp_fast.kernels.linear_cross_entropy import linear_cross_entropy_1

    x = _inputs(config, device, torch.float32)
    return lambda: [linear_cross_entropy_1(x["h"].detach(), x[W2].detach(), x[B2].detach(), x["targets"])]


def naive_adamw(config: Config, device: torch.device) -> Work:
    """Version 1 of kernels/adamw.py."""
    from mlp_fast.kernels.adamw import adamw_1

    return _adamw_by(adamw_1, config, device, torch.float32)


# The naive kernels, which are forward passes and an update, beside the operators that compute the same.
NAIVE_WORKS: dict[str, Callable[[Config, torch.device], Work]] = {
    "embed_linear_tanh-table": naive_embed_linear_tanh,
    "embed_linear_tanh-gather": naive_embed_linear_tanh,
    "linear_cross_entropy": naive_linear_cross_entropy,
    "adamw": naive_adamw,
}


def ceiling_cases(plan: Plan) -> Iterator[Case]:
    """The forward pass beside the ceilings of a large and of a small batch, and the memory of both passes."""
    forward, both = OPERATORS["embed_linear_tanh-table"], OPERATORS["embed_linear_tanh-table-and-backward"]
    large = plan.config() if plan.dry else plan.config(batch_size=LARGE_BATCH)
    ceilings: dict[str, Other] = {COMPILE: _compiled(forward), COPY: _copy}
    yield operator_case("large-embed_linear_tanh-table", forward, large, plan, ceilings)
    yield operator_case("large-embed_linear_tanh-table-and-backward", both, large, plan)
    auto = _embed_linear_tanh("auto", backward=False)
    yield operator_case("small-embed_linear_tanh", auto, plan.config(), plan, {EMPTY: _empty_kernel})


def kernel_cases(plan: Plan) -> Iterator[Case]:
    """The fused operators beside the same in plain torch."""
    for precision in plan.precisions:
        for name, make in OPERATORS.items():
            if name == "adamw" and precision != "fp32":
                continue  # it has no products
            backward = name.endswith("backward")
            more = _chunked(backward) if name.startswith("linear_cross_entropy") else {}
            if name in NAIVE_WORKS and precision == "fp32" and plan.device != "cpu":
                more = more | {NAIVE: NAIVE_WORKS[name]}
            yield operator_case(name, make, plan.config(precision=precision), plan, more)
    yield from ceiling_cases(plan)

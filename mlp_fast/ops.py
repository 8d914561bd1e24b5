"""The fused operators, for anyone's nn.Module: embed_linear_tanh, linear_cross_entropy, adamw_; and FusedMLP.

Each is an operator of torch.library (torch.ops.mlp_fast.*) with autograd, autocast and a fake implementation, so that
torch.compile, torch.export and CUDA graphs take it as it is. On CUDA tensors it runs the Triton kernels of kernels/,
under TRITON_INTERPRET=1 also on CPU tensors; everywhere else, and for float64, it is computed by plain torch. The
operators are opaque to the compiler on purpose: they have no neighbours worth fusing with, and so compiled, exported
and eager code run the very same kernels.

Importing this module needs neither Triton nor CUDA.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlp_fast.kernels._runtime import INPUT_PRECISION, interpreting
from mlp_fast.models import MLP, Parameters, Shape

FORMS = ("auto", "gather", "table")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.uint8, torch.int32, torch.int64)


def embed_linear_tanh(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor, *, form: str = "auto", precision: str = "fp32"
) -> Tensor:
    """tanh(F.linear(F.embedding(idx, wte).flatten(1), weight, bias)), without writing the embeddings to memory.

    Args:
        idx: tokens (B, T), uint8, int32 or int64, in [0, V). B may be 0.
        wte: embeddings (V, E); float32, bfloat16, float16 or float64, as weight and bias.
        weight: (H, T*E), any strides.
        bias: (H,).
        form: `gather` multiplies gathered rows; `table` multiplies every row of wte once and gathers products;
            `auto` takes the table while V < B. The same function, but for the order of additions, and that the table
            form reads every row of wte: one that is not finite makes gradients NaN even if no token names it.
        precision: of fp32 products on CUDA: `fp32`, `tf32x3` (about as accurate, on tensor cores), `tf32`.
            16-bit inputs are multiplied on tensor cores. Sums are always fp32.

    Returns:
        (B, H), of weight's dtype. Gradients reach wte, weight and bias; they have the same bits on every run.

    Raises:
        TypeError, ValueError: a dtype, shape, device or name is not as above; on the CPU also a token out of range.
            On CUDA such a token would cost a synchronisation to report: it reads nothing and makes its row NaN, and
            with it the gradients.

    Example::

        h = embed_linear_tanh(idx, model.wte.weight, model.mlp[0].weight, model.mlp[0].bias)
    """
    return torch.ops.mlp_fast.embed_linear_tanh(idx, wte, weight, bias, form, precision)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """F.cross_entropy(F.linear(h, weight, bias), targets), without writing the logits to memory.

    Args:
        h: (B, H); float32, bfloat16, float16 or float64, as weight and bias. B may be 0: the mean of nothing is NaN.
        weight: (V, H), any strides.
        bias: (V,).
        targets: classes (B,), uint8, int32 or int64, in [0, V); there is no ignored index.
        precision: as in embed_linear_tanh.

    Returns:
        The mean in nats, a scalar: float32, or float64 for float64. Gradients reach h, weight and bias; they have the
        same bits on every run.

    Raises:
        TypeError, ValueError: a dtype, shape, device or name is not as above; on the CPU also a target out of range.
            On CUDA such a target makes the loss and all gradients NaN.

    Example::

        loss = linear_cross_entropy(h, model.mlp[2].weight, model.mlp[2].bias, targets)
        loss.backward()
    """
    return torch.ops.mlp_fast.linear_cross_entropy(h, weight, bias, targets, precision)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """One step of torch.optim.AdamW, in place, all tensors in one launch (one for every 64).

    Args:
        params, exp_avgs, exp_avg_sqs: updated; all tensors of one dtype (float32, bfloat16, float16, float64) and
            device. The tensors of an index have one shape; on CUDA params and moments also one dense layout.
        grads: of the same shapes and dtype, any strides.
        step: the number of this update, counted from 1; one number, float32, int32 or int64, on the device.
        lr: the learning rate; one number, float32 or float64, on the device. Neither is read by the host on CUDA, so
            a captured graph follows both.
        betas, eps, weight_decay: as in torch.optim.AdamW.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout is not as above, or a number is out of its range; of
            step and lr only on the CPU, where reading them costs no synchronisation.

    Example::

        step.add_(1)
        adamw_(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, step, lr)
    """
    with torch.no_grad():
        torch.ops.mlp_fast.adamw_(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), step, lr, *betas, eps, weight_decay
        )


class FusedMLP(MLP):
    """models.MLP computed by the fused operators: same parameters, same state_dict, same function.

    Args:
        shape: the sizes.
        parameters: initial values as from models.initial_parameters(); without them torch's own are kept.
        form, precision: as in embed_linear_tanh.

    Raises:
        ValueError: form or precision is unknown.

    Example::

        model = FusedMLP(Shape(V=27, T=3, E=48, H=512)).cuda()
        model.load_state_dict(MLP(model.shape).state_dict())
        model.loss(idx, targets).backward()
    """

    def __init__(
        self, shape: Shape, parameters: Parameters | None = None, *, form: str = "auto", precision: str = "fp32"
    ) -> None:
        super().__init__(shape, parameters)
        self.shape = shape
        self.form = _one_of("form", form, FORMS)
        self.precision = _one_of("precision", precision, INPUT_PRECISION)

    def hidden(self, idx: Tensor) -> Tensor:
        """Contexts (B, T), integer -> hidden layer (B, H)."""
        fc1 = cast(nn.Linear, self.mlp[0])
        return embed_linear_tanh(idx, self.wte.weight, fc1.weight, fc1.bias, form=self.form, precision=self.precision)

    def forward(self, idx: Tensor) -> Tensor:
        """Contexts (B, T), integer -> logits (B, V)."""
        logits = self.mlp[2](self.hidden(idx))
        return logits if self.direct is None else logits + self.direct(self.wte(idx).flatten(1))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Contexts (B, T) and next tokens (B,), integer -> mean cross-entropy in nats, a scalar."""
        fc2 = cast(nn.Linear, self.mlp[2])
        inputs, weight = self.hidden(idx), fc2.weight
        if self.direct is not None:
            # h W2^T + emb D^T as one product, so that these logits are not written to memory either.
            inputs = torch.cat([inputs, self.wte(idx).flatten(1)], dim=1)
            weight = torch.cat([weight, self.direct.weight], dim=1)
        return linear_cross_entropy(inputs, weight, fc2.bias, targets, precision=self.precision)


# ---------------------------------------------------------------------------------------------------------------
# Checks


def _one_of(what: str, name: str, names: Sequence[str] | dict[str, str]) -> str:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(names)}")
    return name


def _check_dtype(names: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """All tensors have the same dtype, one of `dtypes`."""
    if tensors and (tensors[0].dtype not in dtypes or any(t.dtype != tensors[0].dtype for t in tensors)):
        expected, found = (
            ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in group}))
            for group in (dtypes, [t.dtype for t in tensors])
        )
        raise TypeError(f"{names} must have one dtype of {expected}, not {found}")


def _check_device(names: str, tensors: Sequence[Tensor]) -> None:
    if any(t.device != tensors[0].device for t in tensors):
        found = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"{names} must be on one device, not on {found}")


def _check_in_range(what: str, t: Tensor, V: int) -> None:
    """On the CPU, where it costs no synchronisation; on CUDA the kernels mask."""
    if t.device.type == "cpu" and t.numel() > 0:
        low, high = (int(x) for x in t.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"{what} must be in [0, {V}), but reach from {low} to {high}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _check_embed_linear_tanh(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor, form: str, precision: str) -> None:
    _one_of("form", form, FORMS)
    _one_of("precision", precision, INPUT_PRECISION)
    _check_dtype("idx", [idx], _INTEGERS)
    _check_dtype("wte, weight and bias", [wte, weight, bias], _FLOATS)
    _check_device("idx, wte, weight and bias", [idx, wte, weight, bias])
    if (
        (idx.dim(), wte.dim(), weight.dim(), bias.dim()) != (2, 2, 2, 1)
        or weight.shape[1] != idx.shape[1] * wte.shape[1]
        or bias.shape[0] != weight.shape[0]
        or 0 in (idx.shape[1], *wte.shape, *weight.shape)
    ):
        raise ValueError(
            "shapes must be idx (B, T), wte (V, E), weight (H, T*E), bias (H,), none but B zero, "
            f"not {_shapes(idx, wte, weight, bias)}"
        )


def _check_linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str) -> None:
    _one_of("precision", precision, INPUT_PRECISION)
    _check_dtype("targets", [targets], _INTEGERS)
    _check_dtype("h, weight and bias", [h, weight, bias], _FLOATS)
    _check_device("h, weight, bias and targets", [h, weight, bias, targets])
    if (
        (h.dim(), weight.dim(), bias.dim(), targets.dim()) != (2, 2, 1, 1)
        or weight.shape[1] != h.shape[1]
        or bias.shape[0] != weight.shape[0]
        or targets.shape[0] != h.shape[0]
        or 0 in weight.shape
    ):
        raise ValueError(
            "shapes must be h (B, H), weight (V, H), bias (V,), targets (B,), none but B zero, "
            f"not {_shapes(h, weight, bias, targets)}"
        )


def _check_adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    names = "params, grads, exp_avgs and exp_avg_sqs"
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        lengths = f"{len(params)}, {len(grads)}, {len(exp_avgs)}, {len(exp_avg_sqs)}"
        raise ValueError(f"{names} must have one length, not {lengths}")
    _check_dtype(names, [*params, *grads, *exp_avgs, *exp_avg_sqs], _FLOATS)
    _check_device(f"{names}, step and lr", [*params, *grads, *exp_avgs, *exp_avg_sqs, step, lr])
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if not p.shape == g.shape == m.shape == v.shape:
            raise ValueError(f"{names}: the shapes at index {i} differ: {_shapes(p, g, m, v)}")
    if step.numel() != 1 or lr.numel() != 1:
        raise ValueError(f"step and lr must hold one number each, not {step.numel()} and {lr.numel()}")
    _check_dtype("step", [step], (torch.float32, torch.int32, torch.int64))
    _check_dtype("lr", [lr], (torch.float32, torch.float64))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), not {beta1} and {beta2}")
    if not (eps >= 0 and weight_decay >= 0):
        raise ValueError(f"eps and weight_decay must not be negative: {eps} and {weight_decay}")


def _check_scalars(step: Tensor, lr: Tensor) -> None:
    """On the CPU, where it costs no synchronisation."""
    if step.device.type == "cpu" and not (step.item() >= 1 and lr.item() >= 0):
        raise ValueError(f"step counts from 1 and lr must not be negative: {step.item():g} and {lr.item():g}")


# ---------------------------------------------------------------------------------------------------------------
# Which implementation


def _use_kernels(t: Tensor) -> bool:
    """Whether a tensor's computation is done by the Triton kernels, else by plain torch."""
    return t.dtype != torch.float64 and (t.device.type == "cuda" or (t.device.type == "cpu" and interpreting()))


def _kernels(name: str) -> ModuleType:
    """A module of kernels/, imported at its first use: it needs Triton."""
    import importlib

    try:
        return importlib.import_module(f"mlp_fast.kernels.{name}")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the fused operators need Triton on CUDA tensors: {error}") from None


def _or_empty(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator cannot return None: gradients that are not needed become empty tensors."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _wide(t: Tensor) -> Tensor:
    """16-bit tensors as fp32, in which plain torch computes as the kernels do."""
    return t if t.dtype == torch.float64 else t.float()


# ---------------------------------------------------------------------------------------------------------------
# embed_linear_tanh


@torch.library.custom_op("mlp_fast::embed_linear_tanh", mutates_args=())
def _embed_linear_tanh(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor, form: str = "auto", precision: str = "fp32"
) -> Tensor:
    _check_embed_linear_tanh(idx, wte, weight, bias, form, precision)
    _check_in_range("tokens of idx", idx, wte.shape[0])
    if _use_kernels(weight):
        with torch.cuda.device_of(weight):
            kernels = _kernels("embed_linear_tanh")
            return kernels.embed_linear_tanh_fwd(idx, wte, weight, bias, form, precision)
    emb = F.embedding(idx.long(), _wide(wte)).flatten(1)
    return F.linear(emb, _wide(weight), _wide(bias)).tanh().to(weight.dtype)


@_embed_linear_tanh.register_fake
def _(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor, form: str = "auto", precision: str = "fp32") -> Tensor:
    _check_embed_linear_tanh(idx, wte, weight, bias, form, precision)
    return weight.new_empty(idx.shape[0], weight.shape[0])


@torch.library.custom_op("mlp_fast::embed_linear_tanh_backward", mutates_args=())
def _embed_linear_tanh_backward(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, form: str, precision: str,
    need_wte: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _use_kernels(weight):
        with torch.cuda.device_of(weight):
            gradients = _kernels("embed_linear_tanh").embed_linear_tanh_bwd(
                dh, h, idx, wte, weight, form, precision, need_wte, need_weight
            )
    else:
        gradients = _embed_linear_tanh_backward_plain(dh, h, idx, wte, weight, need_wte, need_weight)
    dwte, dweight, dbias = _or_empty(gradients, weight)
    return dwte, dweight, dbias


def _embed_linear_tanh_backward_plain(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, need_wte: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dwte = dweight = dbias = None
    dpre = _wide(dh) * (1 - _wide(h).square())
    tokens = idx.long()
    if need_weight:
        emb = F.embedding(tokens, _wide(wte)).flatten(1)
        dweight, dbias = (dpre.t() @ emb).to(weight.dtype), dpre.sum(0).to(weight.dtype)
    if need_wte:
        demb = (dpre @ _wide(weight)).view(-1, wte.shape[1])
        dwte = demb.new_zeros(wte.shape).index_add_(0, tokens.flatten(), demb).to(wte.dtype)
    return dwte, dweight, dbias


@_embed_linear_tanh_backward.register_fake
def _(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, form: str, precision: str,
    need_wte: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dwte = wte.new_empty(wte.shape) if need_wte else wte.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    dbias = weight.new_empty(weight.shape[0]) if need_weight else weight.new_empty(0)
    return dwte, dweight, dbias


def _embed_linear_tanh_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, wte, weight, _, ctx.form, ctx.precision = inputs
    ctx.save_for_backward(output, idx, wte, weight)


def _embed_linear_tanh_autograd(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    h, idx, wte, weight = ctx.saved_tensors
    wants_wte, wants_weight, wants_bias = ctx.needs_input_grad[1:4]  # ends with it where the rest are defaults
    dwte, dweight, dbias = torch.ops.mlp_fast.embed_linear_tanh_backward(
        dh, h, idx, wte, weight, ctx.form, ctx.precision, wants_wte, wants_weight or wants_bias
    )
    gradients = dwte if wants_wte else None, dweight if wants_weight else None, dbias if wants_bias else None
    return None, *gradients, None, None


_embed_linear_tanh.register_autograd(_embed_linear_tanh_autograd, setup_context=_embed_linear_tanh_setup)


# ---------------------------------------------------------------------------------------------------------------
# linear_cross_entropy: the operator of that name returns the loss alone, on top of one that also returns what the
# backward pass needs.


@torch.library.custom_op("mlp_fast::linear_cross_entropy_forward", mutates_args=())
def _linear_cross_entropy_forward(
    h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    _check_linear_cross_entropy(h, weight, bias, targets, precision)
    _check_in_range("targets", targets, weight.shape[0])
    if _use_kernels(h):
        with torch.cuda.device_of(h):
            return _kernels("linear_cross_entropy").linear_cross_entropy_fwd(h, weight, bias, targets, precision)
    logits = F.linear(_wide(h), _wide(weight), _wide(bias))
    highest = logits.amax(1)
    log_sum = (logits - highest[:, None]).exp().sum(1).log()
    target_logits = logits.gather(1, targets.long()[:, None])[:, 0]
    return ((highest - target_logits) + log_sum).mean(), torch.stack([highest, log_sum])


@_linear_cross_entropy_forward.register_fake
def _(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    _check_linear_cross_entropy(h, weight, bias, targets, precision)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.new_empty((), dtype=dtype), h.new_empty((2, h.shape[0]), dtype=dtype)


@torch.library.custom_op("mlp_fast::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: Tensor, lse: Tensor, h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str,
    need_h: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _use_kernels(h):
        with torch.cuda.device_of(h):
            gradients = _kernels("linear_cross_entropy").linear_cross_entropy_bwd(
                dloss, lse, h, weight, bias, targets, precision, need_h, need_weight
            )
    else:
        gradients = _linear_cross_entropy_backward_plain(dloss, lse, h, weight, bias, targets, need_h, need_weight)
    dh, dweight, dbias = _or_empty(gradients, weight)
    return dh, dweight, dbias


def _linear_cross_entropy_backward_plain(
    dloss: Tensor, lse: Tensor, h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
    need_h: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dh = dweight = dbias = None
    highest, log_sum = lse[:, :, None]
    g = (F.linear(_wide(h), _wide(weight), _wide(bias)) - highest - log_sum).exp()
    g.scatter_add_(1, targets.long()[:, None], -torch.ones_like(highest))
    g *= dloss / max(h.shape[0], 1)
    if need_h:
        dh = (g @ _wide(weight)).to(h.dtype)
    if need_weight:
        dweight, dbias = (g.t() @ _wide(h)).to(weight.dtype), g.sum(0).to(bias.dtype)
    return dh, dweight, dbias


@_linear_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, lse: Tensor, h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str,
    need_h: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dh = h.new_empty(h.shape) if need_h else h.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    dbias = weight.new_empty(weight.shape[0]) if need_weight else weight.new_empty(0)
    return dh, dweight, dbias


def _linear_cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, weight, bias, targets, ctx.precision = inputs
    ctx.save_for_backward(output[1], h, weight, bias, targets)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _linear_cross_entropy_autograd(ctx: Any, dloss: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 5
    wants_h, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dh, dweight, dbias = torch.ops.mlp_fast.linear_cross_entropy_backward(
        dloss, *ctx.saved_tensors, ctx.precision, wants_h, wants_weight or wants_bias
    )
    return dh if wants_h else None, dweight if wants_weight else None, dbias if wants_bias else None, None, None


_linear_cross_entropy_forward.register_autograd(
    _linear_cross_entropy_autograd, setup_context=_linear_cross_entropy_setup
)


def _linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, precision: str = "fp32") -> Tensor:
    return torch.ops.mlp_fast.linear_cross_entropy_forward(h, weight, bias, targets, precision)[0]


_library = torch.library.Library("mlp_fast", "FRAGMENT")
_library.define(f"linear_cross_entropy{torch.library.infer_schema(_linear_cross_entropy, mutates_args=())}")
_library.impl("linear_cross_entropy", _linear_cross_entropy, "CompositeImplicitAutograd")


# ---------------------------------------------------------------------------------------------------------------
# adamw_


@torch.library.custom_op("mlp_fast::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)
    _check_scalars(step, lr)
    if params and _use_kernels(params[0]):
        for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
            if not (_is_dense(p) and _layout(p) == _layout(m) == _layout(v)):
                raise ValueError(
                    f"params, exp_avgs and exp_avg_sqs must have one dense layout each, but the strides at index {i} "
                    f"are {p.stride()}, {m.stride()}, {v.stride()}"
                )
        grads = [
            g if _layout(g) == _layout(p) else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)
        ]
        with torch.cuda.device_of(params[0]):
            _kernels("adamw").adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)
        return
    update, rate = step.item(), lr.item()
    step_size, root = rate / (1 - beta1**update), math.sqrt(1 - beta2**update)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - rate * weight_decay).addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-step_size)


@_adamw_.register_fake
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)


def _is_dense(t: Tensor) -> bool:
    """Whether the tensor's numbers fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(_layout(t)):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(t: Tensor) -> list[tuple[int, int]]:
    """The strides and sizes that say where a tensor's numbers lie: a dimension of one may have any stride."""
    return [pair for pair in zip(t.stride(), t.shape, strict=True) if pair[1] > 1] if t.numel() else []


# ---------------------------------------------------------------------------------------------------------------
# autocast


def _register_autocast(name: str, device: str) -> None:
    """Under autocast the floating-point inputs of the operator are cast to autocast's dtype of the moment."""
    op: Callable[..., Tensor] = getattr(torch.ops.mlp_fast, name)

    def cast_and_call(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.dtype in _FLOATS[:3] else a for a in args]
        with torch.autocast(device, enabled=False):
            return op(*cast)

    _library.impl(name, cast_and_call, f"Autocast{device.upper()}")


for _name in ("embed_linear_tanh", "linear_cross_entropy"):
    for _device in ("cpu", "cuda"):
        _register_autocast(_name, _device)

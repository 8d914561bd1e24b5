"""The operators as PyTorch sees them, by their plain implementation: registration, gradients, compilation, errors."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mlp_fast import ops
from mlp_fast.model.mlp import MLP, Shape, initial_parameters

# torch writes some of its tangents in what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

SHAPE = Shape(V=11, T=3, E=4, H=6)
OPERATORS = torch.ops.mlp_fast


def inputs(dtype: torch.dtype = torch.float32, B: int = 5) -> dict[str, Tensor]:
    """Arguments of the operators by name; leaves that need a gradient where they can."""
    wte, weight, bias, weight2, bias2 = (t.to(dtype).requires_grad_() for t in initial_parameters(SHAPE, 1).values())
    g = torch.Generator().manual_seed(2)
    return {
        "idx": torch.randint(SHAPE.V, (B, SHAPE.T), generator=g),
        "targets": torch.randint(SHAPE.V, (B,), generator=g),
        "h": torch.randn(B, SHAPE.H, generator=g).to(dtype).requires_grad_(),
        "wte": wte, "weight": weight, "bias": bias, "weight2": weight2, "bias2": bias2,
    }  # fmt: skip


def eager_hidden(x: dict[str, Tensor]) -> Tensor:
    return torch.tanh(F.linear(F.embedding(x["idx"].long(), x["wte"]).flatten(1), x["weight"], x["bias"]))


def test_import_needs_neither_triton_nor_a_compiler() -> None:
    code = "import sys, mlp_fast, mlp_fast.ops; assert not {'triton', 'torch._dynamo'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("B", [0, 1, 5])
def test_plain_embed_equals_eager(B: int) -> None:
    x = inputs(B=B)
    h = ops.embed_linear_tanh(x["idx"], x["wte"], x["weight"], x["bias"])
    torch.testing.assert_close(h, eager_hidden(x))
    names = ("wte", "weight", "bias")
    got = torch.autograd.grad(h.sum(), [x[name] for name in names])
    expected = torch.autograd.grad(eager_hidden(x).sum(), [x[name] for name in names])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_loss_equals_eager(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss = ops.linear_cross_entropy(x["h"], x["weight2"], x["bias2"], x["targets"])
    expected = F.cross_entropy(F.linear(x["h"].to(wide), x["weight2"].to(wide), x["bias2"].to(wide)), x["targets"])
    torch.testing.assert_close(loss, expected)
    names = ("h", "weight2", "bias2")
    got = torch.autograd.grad(loss * 3, [x[name] for name in names])
    for a, b in zip(got, torch.autograd.grad(expected * 3, [x[name] for name in names]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


# Each option alone, and together; the second target is ignored by some.
OPTIONS: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": -100},
    {"ignore_index": 3, "reduction": "none"},
    {"weight": torch.linspace(0.1, 2, SHAPE.V)},
    {"weight": torch.linspace(0.1, 2, SHAPE.V), "reduction": "sum", "ignore_index": 3},
    {"label_smoothing": 0.2},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"label_smoothing": 0.3, "weight": torch.linspace(0.1, 2, SHAPE.V), "ignore_index": -100},
]


def with_options(x: dict[str, Tensor], options: dict[str, Any], bias: bool) -> dict[str, Any]:
    """Arguments of torch's own function, by its names."""
    targets = x["targets"].clone()
    targets[1] = options.get("ignore_index", targets[1])
    linear_bias = x["bias2"] if bias else None
    return {
        "input": x["h"], "linear_weight": x["weight2"], "linear_bias": linear_bias, "target": targets
    } | options  # fmt: skip


def loss_and_gradients(f: Callable[..., Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    loss = f(**arguments)
    dloss = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)
    operands = [arguments[name] for name in ("input", "linear_weight", "linear_bias")]
    return [loss, *torch.autograd.grad(loss, [t for t in operands if t is not None], dloss)]


def reference_loss(**arguments: Any) -> Tensor:
    """torch's own, which the oldest torch that the project takes does not have, by its definition."""
    operands = [arguments.pop(name) for name in ("input", "linear_weight", "linear_bias")]
    weight = arguments.pop("weight", None)
    logits = F.linear(*operands)
    return F.cross_entropy(logits, weight=None if weight is None else weight.to(logits.dtype), **arguments)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_have_the_names_and_meanings_of_torchs(options: dict[str, Any]) -> None:
    for bias in (True, False):
        arguments = with_options(inputs(torch.float64), options, bias)
        expected = loss_and_gradients(reference_loss, arguments)
        got = loss_and_gradients(ops.linear_cross_entropy, arguments)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        torchs = getattr(F, "linear_cross_entropy", None)
        if torchs is not None:
            wide = {k: v.double() if k == "weight" else v for k, v in arguments.items()}
            torch.testing.assert_close(loss_and_gradients(torchs, wide), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, OPTIONS[-1]], ids=str)
def test_options_in_compiled_code(options: dict[str, Any]) -> None:
    """Which calls the opaque operators: what they compute of gradients is written out, not autograd's."""
    arguments = with_options(inputs(torch.float64), options, True)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(reference_loss, arguments)
    torch.testing.assert_close(loss_and_gradients(compiled, arguments), expected, rtol=1e-10, atol=1e-12)


def test_embed_without_a_bias() -> None:
    x = inputs(torch.float64)
    got = ops.embed_linear_tanh(x["idx"], x["wte"], x["weight"], None)
    expected = eager_hidden(x | {"bias": torch.zeros(SHAPE.H, dtype=torch.float64)})
    torch.testing.assert_close(got, expected)
    compiled = torch.compile(ops.embed_linear_tanh, fullgraph=True, backend="aot_eager")
    for h in (got, compiled(x["idx"], x["wte"], x["weight"], None)):
        gradients = torch.autograd.grad(h.sum(), [x["wte"], x["weight"]])
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.sum(), [x["wte"], x["weight"]], retain_graph=True)
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    x = inputs()
    expected = ops.embed_linear_tanh(x["idx"], x["wte"], x["weight"], x["bias"])
    assert torch.equal(ops.embed_linear_tanh(x["idx"].to(dtype), x["wte"], x["weight"], x["bias"]), expected)
    loss = ops.linear_cross_entropy(x["h"], x["weight2"], x["bias2"], x["targets"])
    assert torch.equal(ops.linear_cross_entropy(x["h"], x["weight2"], x["bias2"], x["targets"].to(dtype)), loss)


def test_opcheck() -> None:
    x = inputs()
    check = torch.library.opcheck
    embed = (x["idx"], x["wte"], x["weight"], x["bias"])
    check(OPERATORS.embed_linear_tanh_v2.default, embed)
    check(OPERATORS.embed_linear_tanh_v2.default, (*embed[:2], x["weight"].t().detach().contiguous().t(), embed[3]))
    check(OPERATORS.embed_linear_tanh_v2.default, (*(t.detach() for t in embed), "gather", "tf32"))
    loss, opaque = (x["h"], x["weight2"], x["bias2"], x["targets"]), (x["targets"], x["h"], x["weight2"], x["bias2"])
    check(OPERATORS.linear_cross_entropy_v2.default, loss)
    check(OPERATORS.linear_cross_entropy_v2.default, (*loss, torch.ones(SHAPE.V), "none", 0, 0.1))
    for rows in (None, torch.rand(2, 5)):
        check(OPERATORS.linear_cross_entropy_forward.default, (*opaque, rows, "fp32"))
    h = eager_hidden(x).detach()
    embed, opaque = (tuple(t.detach() for t in operands) for operands in (embed, opaque))
    for needs in ([True, True, True], [True, False, False], [False, True, True], [False, False, True]):
        check(OPERATORS.embed_linear_tanh_backward.default, (torch.ones_like(h), h, needs, *embed, "auto", "fp32"))
        for rows, dloss in ((None, torch.ones(())), (torch.rand(2, 5), torch.rand(5))):
            lse = OPERATORS.linear_cross_entropy_forward(*opaque, rows, "fp32")[1]
            check(OPERATORS.linear_cross_entropy_backward.default, (dloss, lse, needs, *opaque, rows, "fp32"))


def test_opcheck_adamw() -> None:
    tensors = [[torch.rand(3), torch.rand(2, 2)] for _ in range(4)]
    arguments = (*tensors, torch.tensor(1.0), torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01)
    torch.library.opcheck(OPERATORS.adamw_.default, arguments)


def test_gradcheck() -> None:
    x = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *p: ops.embed_linear_tanh(x["idx"], *p), [x["wte"], x["weight"], x["bias"]])
    assert torch.autograd.gradcheck(
        lambda *p: ops.linear_cross_entropy(*p, x["targets"]), [x["h"], x["weight2"], x["bias2"]]
    )


def pairs(x: dict[str, Tensor]) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Of each operator: it, the same function in plain torch, and what both are differentiated by."""
    idx, targets = x["idx"], x["targets"]
    return {
        "embed": (
            lambda *p: ops.embed_linear_tanh(idx, *p),
            lambda wte, *p: torch.tanh(F.linear(F.embedding(idx, wte).flatten(1), *p)),
            tuple(x[name].detach() for name in ("wte", "weight", "bias")),
        ),
        "loss": (
            lambda *p: ops.linear_cross_entropy(*p, targets),
            lambda *p: F.cross_entropy(F.linear(*p), targets),
            tuple(x[name].detach() for name in ("h", "weight2", "bias2")),
        ),
    }


def tangents(parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cos(3.0 * torch.arange(p.numel())).to(p.dtype).view_as(p) for p in parameters)


def dual(f: Callable[..., Tensor], p: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, p, tangents(p)))))


def dual_in_the_backward_pass(f: Callable[..., Tensor], p: tuple[Tensor, ...]) -> Any:
    """The tangent reaches an operator that had none on its way forward."""
    leaves = [t.clone().requires_grad_() for t in p]
    out = f(*leaves)
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        return [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(out, leaves, dout)]


def gradient_of_gradients(f: Callable[..., Tensor], p: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in p]
    gradients = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


DERIVATIVES: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, p: torch.func.jvp(f, p, tangents(p)),
    "jacfwd": lambda f, p: torch.func.jacfwd(f, (0, 1, 2))(*p),
    "jacrev": lambda f, p: torch.func.jacrev(f, (0, 1, 2))(*p),
    "grad": lambda f, p: torch.func.grad(lambda *q: f(*q).square().sum(), (0, 1, 2))(*p),
    "hessian": lambda f, p: torch.func.hessian(lambda *q: f(*q).sum(), (0, 1, 2))(*p),
    "vmap": lambda f, p: torch.func.vmap(f)(*(torch.stack([t, -t]) for t in p)),
    "vmap of grad": lambda f, p: torch.func.vmap(torch.func.grad(lambda *q: f(*q).sum(), 1), (None, 0, None))(
        p[0], torch.stack([p[1], -p[1]]), p[2]
    ),
    "dual": dual,
    "dual in the backward pass": dual_in_the_backward_pass,
    "gradient of gradients": gradient_of_gradients,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("operator", ["embed", "loss"])
def test_derivatives_of_every_kind_are_plain_torchs(operator: str, derivative: str) -> None:
    ours, plain, parameters = pairs(inputs(torch.float64))[operator]
    got, expected = (DERIVATIVES[derivative](f, parameters) for f in (ours, plain))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_compiled_tangents_are_plain_torchs() -> None:
    for ours, plain, parameters in pairs(inputs(torch.float64)).values():

        def jvp(*p: Tensor, ours: Callable[..., Tensor] = ours) -> Any:
            return torch.func.jvp(ours, p, tangents(p))

        got = torch.compile(jvp, fullgraph=True, backend="aot_eager")(*parameters)
        torch.testing.assert_close(got, torch.func.jvp(plain, parameters, tangents(parameters)), rtol=1e-10, atol=1e-12)


def test_gradients_of_one_sample_at_a_time() -> None:
    x = inputs(torch.float64)
    weight, bias = x["weight2"].detach(), x["bias2"].detach()

    def of(loss: Callable[..., Tensor]) -> Tensor:
        one = torch.func.grad(lambda w, h, target: loss(h[None], w, bias, target[None]))
        return torch.func.vmap(one, (None, 0, 0))(weight, x["h"].detach(), x["targets"])

    expected = of(lambda h, w, b, target: F.cross_entropy(F.linear(h, w, b), target))
    torch.testing.assert_close(of(ops.linear_cross_entropy), expected, rtol=1e-10, atol=1e-12)


def test_the_model_in_functional_calls() -> None:
    x, eager, fused = inputs(), MLP(SHAPE, initial_parameters(SHAPE, 1)), model()
    parameters = {name: p.detach() for name, p in eager.named_parameters()}

    def gradients(model: torch.nn.Module) -> Any:
        call = torch.func.functional_call
        return torch.func.grad(lambda p: call(model, p, (x["idx"], x["targets"]))[1])(parameters)

    torch.testing.assert_close(gradients(fused), gradients(eager))


def test_gradients_only_where_needed() -> None:
    x = inputs()
    h = ops.embed_linear_tanh(x["idx"], x["wte"].detach(), x["weight"].detach(), x["bias"])
    h.sum().backward()
    assert x["bias"].grad is not None
    loss = ops.linear_cross_entropy(x["h"].detach(), x["weight2"].detach(), x["bias2"], x["targets"])
    loss.backward()
    assert x["bias2"].grad is not None
    assert not ops.linear_cross_entropy(*(x[n].detach() for n in ("h", "weight2", "bias2")), x["targets"]).requires_grad


def model() -> ops.FusedMLP:
    return ops.FusedMLP(SHAPE, initial_parameters(SHAPE, 1))


def loss_by(model: Any, x: dict[str, Tensor]) -> Tensor:
    return model(x["idx"], x["targets"])[1]


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, direct=True)], ids=["plain", "direct"])
def test_state_dict_goes_both_ways(shape: Shape) -> None:
    eager, fused = MLP(shape), ops.FusedMLP(shape)
    fused.load_state_dict(eager.state_dict())
    x = inputs()
    torch.testing.assert_close(fused(x["idx"]), eager(x["idx"]))
    torch.testing.assert_close(loss_by(fused, x), loss_by(eager, x))
    MLP(shape).load_state_dict(fused.state_dict())


def test_compiles_as_one_graph() -> None:
    fused = model()
    compiled = torch.compile(fused, fullgraph=True)
    for B in (5, 6, 9):  # the third is compiled for any B
        x = inputs(B=B)
        fused.zero_grad()
        expected = loss_by(fused, x)
        expected.backward()
        grads = [p.grad for p in fused.parameters()]
        fused.zero_grad()
        loss = loss_by(compiled, x)
        loss.backward()
        assert torch.equal(loss, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, [p.grad for p in fused.parameters()], strict=True))


def test_optimizer_step_compiles_as_one_graph() -> None:
    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, number: Tensor, lr: Tensor) -> None:
        ops.adamw_([p], [g], [m], [v], number, lr)

    tensors = [torch.rand(7) for _ in range(4)]
    expected = [t.clone() for t in tensors]
    step(*expected, torch.tensor(3.0), torch.tensor(0.1))
    torch.compile(step, fullgraph=True)(*tensors, torch.tensor(3.0), torch.tensor(0.1))
    for a, b in zip(tensors, expected, strict=True):
        assert torch.equal(a, b)


def test_exports() -> None:
    x = inputs()
    program = torch.export.export(model(), (x["idx"],), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    assert any("mlp_fast.embed_linear_tanh" in str(node.target) for node in program.graph.nodes)
    other = inputs(B=9)["idx"]
    torch.testing.assert_close(program.module()(other), model()(other))


def test_the_loss_exports() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

        def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
            return self.model(idx, targets)[1]

    x, B = inputs(), torch.export.Dim("B", min=2)
    program = torch.export.export(Loss(), (x["idx"], x["targets"]), dynamic_shapes=({0: B}, {0: B}))
    assert any("mlp_fast.linear_cross_entropy" in str(node.target) for node in program.graph.nodes)
    other = inputs(B=9)
    torch.testing.assert_close(program.module()(other["idx"], other["targets"]), loss_by(model(), other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, fused = inputs(), model()
    for call in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=dtype):
            assert fused.hidden(x["idx"]).dtype == dtype
            assert OPERATORS.embed_linear_tanh_v2(x["idx"], x["wte"], x["weight"], x["bias"]).dtype == dtype
            loss = loss_by(call, x)
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, loss_by(fused, x), rtol=2e-2, atol=0)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())
    with torch.autocast("cpu", dtype=dtype):
        double = inputs(torch.float64)
        assert (
            ops.embed_linear_tanh(double["idx"], double["wte"], double["weight"], double["bias"]).dtype == torch.float64
        )


def embed(**changes: Any) -> Tensor:
    x: dict[str, Any] = {name: inputs()[name] for name in ("idx", "wte", "weight", "bias")} | changes
    return ops.embed_linear_tanh(x.pop("idx"), x.pop("wte"), x.pop("weight"), x.pop("bias"), **x)


def loss_of(**changes: Any) -> Tensor:
    x: dict[str, Any] = {name: inputs()[name] for name in ("h", "weight2", "bias2", "targets")} | changes
    return ops.linear_cross_entropy(x.pop("h"), x.pop("weight2"), x.pop("bias2"), x.pop("targets"), **x)


IDX = torch.zeros(5, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"idx": IDX.float()}, TypeError, "idx must have one dtype of int16, int32, int64, int8, uint8, not float32"),
        ({"idx": IDX + 11}, ValueError, r"tokens of idx must be in \[0, 11\), but reach from 11 to 11"),
        ({"idx": IDX - 1}, ValueError, "reach from -1 to -1"),
        ({"idx": IDX[0]}, ValueError, r"shapes must be idx \(B, T\)"),
        ({"idx": IDX[:, :2]}, ValueError, "shapes must be"),
        ({"idx": IDX.to("meta")}, ValueError, "must be on one device, not on cpu, meta"),
        ({"wte": torch.zeros(11, 4, dtype=torch.float64)}, TypeError, "one dtype of .*, not float32, float64"),
        ({"wte": torch.zeros(11, 4, dtype=torch.int32)}, TypeError, "not float32, int32"),
        ({"wte": torch.zeros(11, 5)}, ValueError, "shapes must be"),
        ({"wte": torch.zeros(0, 4)}, ValueError, "none but B zero"),
        ({"bias": torch.zeros(7)}, ValueError, "shapes must be"),
        ({"form": "tabel"}, ValueError, "unknown form 'tabel': choose one of auto, gather, table"),
        ({"precision": "fp8"}, ValueError, "unknown precision 'fp8': choose one of fp32, tf32x3, tf32"),
    ],
)  # fmt: skip
def test_embed_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.full((5,), -100)}, ValueError, r"targets must be in \[0, 11\), but reach from -100 to -100"),
        ({"targets": torch.zeros(5)}, TypeError, "target must have one dtype of"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shapes must be input \(B, H\)"),
        ({"h": torch.zeros(5, 7)}, ValueError, "shapes must be"),
        ({"h": torch.zeros(5, 6, dtype=torch.float16)}, TypeError, "not float16, float32"),
        ({"bias2": torch.zeros(11, device="meta")}, ValueError, "must be on one device"),
        ({"weight2": torch.zeros(0, 6), "bias2": torch.zeros(0)}, ValueError, "none but B zero"),
        ({"precision": "ieee"}, ValueError, "unknown precision"),
        ({"reduction": "avg"}, ValueError, "unknown reduction 'avg': choose one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], not 1.5"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be of the shape \(V,\) = \(11,\), not \(5,\)"),
        ({"weight": torch.ones(11, dtype=torch.int64)}, TypeError, "weight must have one dtype of"),
        ({"weight": torch.ones(11, device="meta")}, ValueError, "weight and linear_weight must be on one device"),
        ({"weight": torch.ones(11, requires_grad=True)}, ValueError, "weight must not require a gradient"),
        (
            {"targets": torch.tensor([-1, 11, -1, 0, 0]), "ignore_index": -1},
            ValueError,
            r"targets must be in \[0, 11\), but reach from 0 to 11",
        ),
    ],
)  # fmt: skip
def test_loss_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_of(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": []}, ValueError, "must have one length, not 0, 1, 1, 1"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"the shapes at index 0 differ: \(3,\), \(4,\)"),
        ({"grads": [torch.zeros(3).double()]}, TypeError, "not float32, float64"),
        ({"lr": torch.tensor(1)}, TypeError, "lr must have one dtype of float32, float64, not int64"),
        ({"step": torch.zeros(2)}, ValueError, "step and lr must hold one number each, not 2 and 1"),
        ({"step": torch.tensor(1.0, device="meta")}, ValueError, "must be on one device"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be in"),
        ({"eps": -1.0}, ValueError, "must not be negative"),
        ({"step": torch.tensor(0)}, ValueError, "step counts from 1 and lr must not be negative: 0 and 0.1"),
        ({"lr": torch.tensor(-0.5)}, ValueError, "must not be negative: 1 and -0.5"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, "must not be negative: 1 and nan"),
        ({"grads": [None]}, ValueError, r"grads\[0\] is None: backward\(\) has not reached params\[0\]"),
    ],
)
def test_adamw_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    arguments: dict[str, Any] = {name: [torch.zeros(3)] for name in names}
    arguments |= {"step": torch.tensor(1.0), "lr": torch.tensor(0.1)} | changes
    with pytest.raises(error, match=message):
        ops.adamw_(**arguments)


def test_adamw_equals_torch() -> None:
    parameters = [torch.nn.Parameter(t) for t in initial_parameters(SHAPE, 1).values()]
    ours = [p.detach().clone() for p in parameters]
    m, v = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = torch.optim.AdamW(parameters, lr=7e-4, weight_decay=1e-4)
    step, lr = torch.zeros(()), torch.tensor(7e-4, dtype=torch.float64)
    for i in range(5):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for p in ours]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        optimizer.step()
        ops.adamw_(ours, grads, m, v, step.add_(1), lr, weight_decay=1e-4)
    for a, b in zip(ours, parameters, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("operand", ["params", "grads", "exp_avgs", "exp_avg_sqs", "lr"])
def test_adamw_has_no_derivative_and_says_so(operand: str) -> None:
    def update(t: Tensor) -> Tensor:
        arguments: dict[str, Any] = {name: [torch.ones(())] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        arguments |= {"step": torch.tensor(1), "lr": torch.tensor(0.1)}
        arguments |= {operand: t.clone() if operand == "lr" else [t.clone()]}
        ops.adamw_(**arguments)
        return arguments["params"][0]

    one = torch.ones(())
    with pytest.raises(RuntimeError, match="adamw_ updates in place and has no derivative"):
        torch.func.jvp(update, (one,), (one,))
    with pytest.raises(RuntimeError, match="adamw_ updates in place"), forward_ad.dual_level():
        update(forward_ad.make_dual(one, one))
    with pytest.raises(RuntimeError, match="adamw_ updates in place"):
        torch.func.vmap(update)(torch.ones(3))


# ---------------------------------------------------------------------------------------------------------------
# FusedMLP calls no layer, so nothing may be asked of one that then does not happen.

HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("layer", ["wte", "mlp.0", "mlp.1", "mlp.2", "direct"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_layers_are_refused(layer: str, kind: str) -> None:
    fused, x = ops.FusedMLP(dataclasses.replace(SHAPE, direct=True)), inputs()
    handle = getattr(fused.get_submodule(layer), f"register_{kind}")(lambda *_: None)
    for targets in (None, x["targets"]):
        with pytest.raises(RuntimeError, match=rf"would not call the hooks on {layer}: use MLP"):
            fused(x["idx"], targets)
    handle.remove()
    fused(x["idx"], x["targets"])


def test_a_layer_put_in_place_of_another_is_refused() -> None:
    fused, x = model(), inputs()
    fused.mlp[1] = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match=r"FusedMLP would not call mlp\.1, a ReLU: use MLP"):
        fused(x["idx"], x["targets"])


def test_hooks_on_the_model_and_parametrised_weights_work() -> None:
    x, fused, eager = inputs(), model(), MLP(SHAPE, initial_parameters(SHAPE, 1))
    seen: list[Any] = []
    fused.register_forward_hook(lambda module, arguments, output: seen.append(output))
    for m in (fused, eager):
        torch.nn.utils.parametrizations.weight_norm(m.mlp[0])
        with torch.no_grad():
            m.mlp[0].parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr]
    loss = loss_by(fused, x)
    torch.testing.assert_close(loss, loss_by(eager, x))
    assert seen == [(None, loss)]


def shapes_within(model: torch.nn.Module, x: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """Of everything that the model computes between its operators, on the way to the loss."""
    nodes = torch.export.export(model, (x["idx"], x["targets"])).graph.nodes
    return {tuple(node.meta["val"].shape) for node in nodes if isinstance(node.meta.get("val"), Tensor)}


@pytest.mark.parametrize("direct", [False, True])
def test_the_loss_comes_without_logits(direct: bool) -> None:
    x, shape = inputs(B=7), dataclasses.replace(SHAPE, direct=direct)
    assert (7, SHAPE.V) in shapes_within(MLP(shape), x)
    assert (7, SHAPE.V) not in shapes_within(ops.FusedMLP(shape), x)
    assert ops.FusedMLP(shape)(x["idx"], x["targets"])[0] is None
    assert ops.FusedMLP(shape)(x["idx"])[1] is None

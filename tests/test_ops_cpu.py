"""The operators as PyTorch sees them, by their plain implementation: registration, gradients, compilation, errors."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fast import ops
from mlp_fast.models import MLP, Shape, initial_parameters

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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
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
    check(OPERATORS.embed_linear_tanh.default, embed)
    check(OPERATORS.embed_linear_tanh.default, (*embed[:2], x["weight"].t().detach().contiguous().t(), embed[3]))
    check(OPERATORS.embed_linear_tanh.default, (*(t.detach() for t in embed), "gather", "tf32"))
    loss = (x["h"], x["weight2"], x["bias2"], x["targets"])
    check(OPERATORS.linear_cross_entropy.default, loss)
    check(OPERATORS.linear_cross_entropy_forward.default, (*loss, "fp32"))
    h = eager_hidden(x).detach()
    for needs in ((True, True), (True, False), (False, True)):
        backward = (torch.ones_like(h), h, *(t.detach() for t in embed[:3]), "auto", "fp32", *needs)
        check(OPERATORS.embed_linear_tanh_backward.default, backward)
        detached = [t.detach() for t in loss]
        lse = OPERATORS.linear_cross_entropy_forward(*detached, "fp32")[1]
        check(OPERATORS.linear_cross_entropy_backward.default, (torch.ones(()), lse, *detached, "fp32", *needs))


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


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, direct=True)], ids=["plain", "direct"])
def test_state_dict_goes_both_ways(shape: Shape) -> None:
    eager, fused = MLP(shape), ops.FusedMLP(shape)
    fused.load_state_dict(eager.state_dict())
    x = inputs()
    torch.testing.assert_close(fused(x["idx"]), eager(x["idx"]))
    torch.testing.assert_close(fused.loss(x["idx"], x["targets"]), eager.loss(x["idx"], x["targets"]))
    MLP(shape).load_state_dict(fused.state_dict())


def test_compiles_as_one_graph() -> None:
    fused = model()
    compiled = torch.compile(fused.loss, fullgraph=True)
    for B in (5, 6, 9):  # the third is compiled for any B
        x = inputs(B=B)
        fused.zero_grad()
        expected = fused.loss(x["idx"], x["targets"])
        expected.backward()
        grads = [p.grad for p in fused.parameters()]
        fused.zero_grad()
        loss = compiled(x["idx"], x["targets"])
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
            return self.model.loss(idx, targets)

    x, B = inputs(), torch.export.Dim("B", min=2)
    program = torch.export.export(Loss(), (x["idx"], x["targets"]), dynamic_shapes=({0: B}, {0: B}))
    assert any("mlp_fast.linear_cross_entropy" in str(node.target) for node in program.graph.nodes)
    other = inputs(B=9)
    torch.testing.assert_close(
        program.module()(other["idx"], other["targets"]), model().loss(other["idx"], other["targets"])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, fused = inputs(), model()
    for call in (fused.loss, torch.compile(fused.loss, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=dtype):
            assert fused.hidden(x["idx"]).dtype == dtype
            assert OPERATORS.embed_linear_tanh(x["idx"], x["wte"], x["weight"], x["bias"]).dtype == dtype
            loss = call(x["idx"], x["targets"])
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, fused.loss(x["idx"], x["targets"]), rtol=2e-2, atol=0)
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
        ({"idx": IDX.float()}, TypeError, "idx must have one dtype of int32, int64, uint8, not float32"),
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
        ({"targets": torch.zeros(5)}, TypeError, "targets must have one dtype of"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shapes must be h \(B, H\)"),
        ({"h": torch.zeros(5, 7)}, ValueError, "shapes must be"),
        ({"h": torch.zeros(5, 6, dtype=torch.float16)}, TypeError, "not float16, float32"),
        ({"bias2": torch.zeros(11, device="meta")}, ValueError, "must be on one device"),
        ({"weight2": torch.zeros(0, 6), "bias2": torch.zeros(0)}, ValueError, "none but B zero"),
        ({"precision": "ieee"}, ValueError, "unknown precision"),
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

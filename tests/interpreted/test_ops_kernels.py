"""The operators' Triton kernels against float64: in the interpreter, or compiled where there is a CUDA device.

The rule everywhere: the error against float64 is at most twice torch's own in the same precision, plus 1e-6. The
kernels' outputs and scratch are filled with NaN beforehand, so that a number never written cannot pass.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.autograd import forward_ad

from mlp_fast import ops
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.model.mlp import MLP, Shape, initial_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device was found")


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN where it can; and the kernels, not plain torch, are what runs."""
    assert DEVICE == "cuda" or interpreting()
    empty = torch.empty

    def nan(*args: object, **kwargs: object) -> Tensor:
        t = empty(*args, **kwargs)  # type: ignore[call-overload]
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", nan)
        yield


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(1000 * sum(shape) + seed)
    return (torch.randn(shape, generator=g) * scale).to(DEVICE)


def randint(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high + sum(shape))).to(DEVICE, dtype)


def gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None) -> list[Tensor]:
    """f's value and its gradients with respect to the inputs, whose strides are kept."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    out.backward(None if dout is None else dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def assert_accurate(
    got: Sequence[Tensor], torchs: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> None:
    # The interpreter truncates to bf16 where hardware rounds, so there its errors are up to twice as large.
    factor = 4 if dtype == torch.bfloat16 and interpreting() else 2
    for i, (a, b, x) in enumerate(zip(got, torchs, truth, strict=True)):
        assert a.shape == x.shape
        if x.numel():
            allowed = factor * (b.double() - x).abs().max().item() + 1e-6
            assert (a.double() - x).abs().max().item() <= allowed, f"tensor {i}"


def eager_hidden(idx: Tensor) -> Callable[..., Tensor]:
    return lambda wte, weight, bias: torch.tanh(F.linear(F.embedding(idx.long(), wte).flatten(1), weight, bias))


def check_embed(
    idx: Tensor,
    wte: Tensor,
    weight: Tensor,
    bias: Tensor,
    form: str,
    dout: Tensor | None = None,
    precision: str = "fp32",
) -> None:
    """Value and gradients of embed_linear_tanh by the rule."""
    if dout is None:
        dout = randn(idx.shape[0], weight.shape[0], seed=4) / max(idx.shape[0], 1)
    inputs = (wte, weight, bias)
    assert_accurate(
        gradients(lambda *p: ops.embed_linear_tanh(idx, *p, form=form, precision=precision), inputs, dout),
        gradients(eager_hidden(idx), inputs, dout),
        gradients(eager_hidden(idx), [t.double() for t in inputs], dout),
    )


def kernels(name: str) -> ModuleType:
    return importlib.import_module(f"mlp_fast.kernels.{name}")


def model(T: int, V: int, E: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(V, E), randn(H, T * E, seed=1, scale=(T * E) ** -0.5), randn(H, seed=2)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("B", [0, 1, 127, 128, 129])
def test_embed_batch_sizes(B: int, form: str) -> None:
    check_embed(randint(27, B, 3), *model(3, 27, 48, 65), form)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize(
    ("T", "V", "E", "H"),
    [(1, 1, 1, 1), (2, 2, 3, 5), (3, 27, 17, 31), (4, 64, 16, 32), (5, 65, 15, 33), (6, 7, 9, 70), (7, 33, 33, 3),
     (8, 66, 5, 17), (1, 300, 5, 17)],
)  # fmt: skip
def test_embed_sizes(T: int, V: int, E: int, H: int, form: str) -> None:
    check_embed(randint(V, 37, T), *model(T, V, E, H), form)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("form", ["table", "gather"])
def test_embed_index_dtypes(dtype: torch.dtype, form: str) -> None:
    check_embed(randint(70, 40, 2, dtype=dtype), *model(2, 70, 6, 20), form)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("V", [255, 256, 257, 300])
def test_embed_bytes_of_a_vocabulary_as_large_as_their_range(V: int, form: str) -> None:
    idx = torch.cat([randint(min(V, 256), 20, 2), torch.tensor([[0, min(V, 256) - 1]], device=DEVICE)])
    check_embed(idx.to(torch.uint8), *model(2, V, 3, 5), form)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("V", [27, 80])
def test_embed_one_repeated_token(V: int, form: str) -> None:
    check_embed(torch.full((300, 2), V - 1, device=DEVICE), *model(2, V, 6, 20), form)


def test_embed_long_segments_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels("_sum_by_token"), "SEGMENT_PART", 64)
    idx = torch.where(randint(10, 150, 2) > 0, 3, randint(70, 150, 2))
    for form in ("table", "gather"):
        check_embed(idx, *model(2, 70, 2, 3), form)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("layout", ["transposed", "expanded rows", "expanded columns", "sliced", "offset"])
def test_embed_weight_layouts(layout: str, form: str) -> None:
    T, V, E, H = 2, 11, 9, 21
    wte, weight, bias = model(T, V, E, H)
    laid_out = {
        "transposed": weight.t().contiguous().t(),
        "expanded rows": weight[:1].expand(H, T * E),
        "expanded columns": weight[:, :1].expand(H, T * E),
        "sliced": randn(H, 3 * T * E)[:, ::3],
        "offset": randn(H * T * E + 1, scale=0.2)[1:].view(H, T * E),
    }[layout]
    check_embed(randint(V, 33, T), wte.t().contiguous().t(), laid_out, bias, form)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("V", [20, 90])
def test_embed_gradient_layouts(V: int, form: str) -> None:
    B, H = 33, 21
    idx, parameters = randint(V, B, 2), model(2, V, 9, H)
    for dout in (
        torch.full((), 0.1, device=DEVICE).expand(B, H),
        randn(1, H).expand(B, H) / B,
        randn(H, B).t() / B,
        randn(B, 2 * H)[:, ::2] / B,
    ):
        check_embed(idx, *parameters, form, dout)


@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize("scale", [1e-7, 40.0])
def test_embed_tiny_and_saturated(scale: float, form: str) -> None:
    """Relative accuracy where pre-activations are tiny; no NaN where tanh is flat."""
    idx, (wte, weight, bias) = randint(27, 40, 3), model(3, 27, 8, 20)
    check_embed(idx, wte, weight * scale, bias * scale, form)
    h = ops.embed_linear_tanh(idx, wte, weight * scale, bias * scale, form=form)
    truth = eager_hidden(idx)(wte.double(), (weight * scale).double(), (bias * scale).double())
    if scale < 1:
        large = truth.abs() > scale / 2
        assert ((h - truth) / truth).abs()[large].max() < 2e-6
        # dwte is as tiny as the weights, far below the 1e-6 of the rule: relative to its largest number, then.
        inputs, dout = (wte, weight * scale, bias * scale), randn(40, 20, seed=4)
        got, torchs, exact = (
            gradients(f, parameters, dout)[1].double()
            for f, parameters in (
                (lambda *p: ops.embed_linear_tanh(idx, *p, form=form), inputs),
                (eager_hidden(idx), inputs),
                (eager_hidden(idx), [t.double() for t in inputs]),
            )
        )
        size = exact.abs().max()
        assert size < 1e-4
        assert (got - exact).abs().max() / size <= 2 * (torchs - exact).abs().max() / size + 1e-6


def test_embed_gradients_only_where_needed() -> None:
    idx, parameters = randint(27, 9, 3), model(3, 27, 8, 20)
    dout = randn(9, 20)
    truth = gradients(eager_hidden(idx), [t.double() for t in parameters], dout)[1:]
    for form, needs in itertools.product(("table", "gather"), itertools.product((False, True), repeat=3)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(parameters, needs, strict=True)]
        h = ops.embed_linear_tanh(idx, *leaves, form=form)
        assert h.requires_grad == any(needs)
        if any(needs):
            h.backward(dout)
        for leaf, need, expected in zip(leaves, needs, truth, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-4)


def test_embed_forms_are_chosen_by_the_rule() -> None:
    from mlp_fast.kernels.embed_linear_tanh import choose_form

    assert choose_form("auto", B=28, V=27) == "table"
    assert choose_form("auto", B=27, V=27) == "gather"
    assert choose_form("gather", B=28, V=27) == "gather"
    assert choose_form("table", B=1, V=27) == "table"


@pytest.mark.parametrize("form", ["table", "gather"])
def test_embed_invalid_tokens_make_nan_rows(form: str) -> None:
    """What the operator refuses on the CPU, the kernel masks: also a token that is valid only modulo 2^32."""
    from mlp_fast.kernels.embed_linear_tanh import embed_linear_tanh_bwd, embed_linear_tanh_fwd

    for V in (5, 70):
        parameters = model(2, V, 4, 6)
        idx = torch.tensor([[0, 1], [V, 0], [0, -1], [2**32 + 1, 2], [4, 3]], device=DEVICE)
        h = embed_linear_tanh_fwd(idx, *parameters, form, "fp32")
        assert h.isnan().all(dim=1).tolist() == [False, True, True, True, False]
        torch.testing.assert_close(h[[0, 4]], eager_hidden(idx[[0, 4]])(*parameters))
        dwte, dweight, dbias = embed_linear_tanh_bwd(
            torch.ones_like(h), h, idx, *parameters[:2], form, "fp32", True, True
        )
        assert dweight.isnan().all()
        assert dbias.isnan().all()
        assert dwte.isnan().any()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 50),
    T=st.integers(1, 8),
    V=st.integers(1, 300),
    E=st.integers(1, 20),
    H=st.integers(1, 40),
    form=st.sampled_from(["auto", "table", "gather"]),
    precision=st.sampled_from(["fp32"] if DEVICE == "cuda" else ["fp32", "tf32x3", "tf32"]),
    index=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    transposed=st.booleans(),
)
def test_embed_any_sizes(
    B: int, T: int, V: int, E: int, H: int, form: str, precision: str, index: torch.dtype, transposed: bool
) -> None:
    """In the interpreter every precision computes in fp32, so the rule is the same."""
    idx = randint(min(V, 256) if index == torch.uint8 else V, B, T, dtype=index)
    wte, weight, bias = model(T, V, E, H)
    check_embed(idx, wte, weight.t().contiguous().t() if transposed else weight, bias, form, precision=precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["table", "gather"])
def test_embed_16_bits(dtype: torch.dtype, form: str) -> None:
    """Against float64 on the same rounded inputs, by the same rule: fp32 accumulation is no worse than torch's."""
    for V in (27, 70):
        idx, dout = randint(V, 64, 3), randn(64, 40)
        inputs = [t.to(dtype) for t in model(3, V, 16, 40)]
        got = gradients(lambda *p, idx=idx: ops.embed_linear_tanh(idx, *p, form=form), inputs, dout)
        assert all(t.dtype == dtype for t in got)
        # torch's own path, operation by operation in 16 bits; the gradient enters rounded in both
        theirs = gradients(eager_hidden(idx), inputs, dout)
        truth = gradients(eager_hidden(idx), [t.double() for t in inputs], dout.to(dtype))
        assert_accurate(got, theirs, truth, dtype)


@pytest.mark.parametrize(("B", "T", "V", "E", "H"), [(0, 2, 5, 3, 4), (3, 1, 1, 1, 1), (9, 2, 27, 5, 130)])
def test_the_naive_embed(B: int, T: int, V: int, E: int, H: int) -> None:
    idx, (wte, weight, bias) = randint(V, B, T), model(T, V, E, H)
    for laid_out in (weight, weight.t().contiguous().t()):
        h = kernels("embed_linear_tanh").embed_linear_tanh_1(idx, wte, laid_out, bias)
        truth = eager_hidden(idx)(*(t.double() for t in (wte, weight, bias)))
        assert_accurate([h], [eager_hidden(idx)(wte, weight, bias)], [truth])


# ---------------------------------------------------------------------------------------------------------------


def eager_loss(targets: Tensor) -> Callable[..., Tensor]:
    return lambda h, weight, bias: F.cross_entropy(F.linear(h, weight, bias), targets.long())


def check_loss(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dloss: float = 1.0) -> None:
    inputs, dout = (h, weight, bias), torch.tensor(dloss, device=DEVICE)
    assert_accurate(
        gradients(lambda *p: ops.linear_cross_entropy(*p, targets), inputs, dout),
        gradients(eager_loss(targets), inputs, dout),
        gradients(eager_loss(targets), [t.double() for t in inputs], dout),
    )


def head(V: int, H: int) -> tuple[Tensor, Tensor]:
    return randn(V, H, seed=5, scale=H**-0.5), randn(V, seed=6)


@pytest.mark.parametrize("B", [1, 127, 128, 129])
def test_loss_batch_sizes(B: int) -> None:
    check_loss(randn(B, 65).tanh(), *head(27, 65), randint(27, B))


@pytest.mark.parametrize(("B", "V", "H"), [(5, 1, 1), (33, 2, 3), (64, 31, 33), (40, 33, 32), (20, 300, 17)])
def test_loss_sizes(B: int, V: int, H: int) -> None:
    check_loss(randn(B, H), *head(V, H), randint(V, B), dloss=3.0)


@pytest.mark.parametrize(("B", "V", "H"), [(1, 1, 1), (5, 27, 33), (3, 70, 8)])
def test_the_naive_loss(B: int, V: int, H: int) -> None:
    (weight, bias), h, targets = head(V, H), randn(B, H), randint(V, B)
    for laid_out in (weight, weight.t().contiguous().t()):
        loss = kernels("linear_cross_entropy").linear_cross_entropy_1(h, laid_out, bias, targets)
        truth = eager_loss(targets)(*(t.double() for t in (h, weight, bias)))
        assert_accurate([loss], [eager_loss(targets)(h, weight, bias)], [truth])


@pytest.mark.parametrize("min_programs", [1, 6, 128])
def test_loss_cut_into_few_and_many_programs(min_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program goes through all blocks of V and of hidden units, or some, or each has a program of its own."""
    monkeypatch.setattr(kernels("linear_cross_entropy"), "MIN_PROGRAMS", min_programs)
    check_loss(randn(70, 40), *head(135, 40), randint(135, 70))


def test_loss_of_nothing_is_nan_with_zero_gradients() -> None:
    value, *grads = gradients(lambda *p: ops.linear_cross_entropy(*p, randint(5, 0)), (randn(0, 4), *head(5, 4)), None)
    assert value.isnan()
    assert [t.shape for t in grads] == [(0, 4), (5, 4), (5,)]
    assert all((t == 0).all() for t in grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_loss_target_dtypes(dtype: torch.dtype) -> None:
    check_loss(randn(20, 8), *head(40, 8), randint(40, 20, dtype=dtype))


@pytest.mark.parametrize("min_programs", [1, 128])
def test_loss_with_classes_ruled_out(min_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf, also for all classes of a block: no gradient, and nothing else is disturbed."""
    monkeypatch.setattr(kernels("linear_cross_entropy"), "MIN_PROGRAMS", min_programs)
    weight, bias = head(70, 8)
    for first, last in ((0, 32), (30, 70), (5, 6)):
        ruled_out = bias.clone()
        ruled_out[first:last] = float("-inf")
        allowed = torch.tensor([v for v in range(70) if not first <= v < last], device=DEVICE)
        targets = allowed[randint(len(allowed), 40)]
        check_loss(randn(40, 8), weight, ruled_out, targets)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which takes the logarithm of 0 with NumPy
def test_loss_with_all_classes_ruled_out_is_nan() -> None:
    weight, bias = head(70, 8)
    assert ops.linear_cross_entropy(randn(3, 8), weight, torch.full_like(bias, float("-inf")), randint(70, 3)).isnan()


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_loss_of_flat_and_peaked_distributions(scale: float) -> None:
    weight, bias = head(50, 16)
    check_loss(randn(64, 16), weight * scale, bias * scale, randint(50, 64))
    check_loss(randn(64, 16), weight, bias + 1e4 * (scale > 1), randint(50, 64))


def test_loss_layouts() -> None:
    h, (weight, bias), targets = randn(20, 12), head(40, 12), randint(40, 20)
    for laid_out in (
        weight.t().contiguous().t(),
        weight[:1].expand(40, 12),
        weight[:, :1].expand(40, 12),
        randn(40, 36)[:, ::3],
    ):
        check_loss(h, laid_out, bias, targets)
    check_loss(h.t().contiguous().t(), weight, bias[:1].expand(40), targets)
    check_loss(h[:1].expand(20, 12), weight, bias, targets)


def test_loss_gradients_only_where_needed() -> None:
    inputs, targets = (randn(20, 12), *head(40, 12)), randint(40, 20)
    truth = gradients(eager_loss(targets), [t.double() for t in inputs], None)[1:]
    for needs in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        loss = ops.linear_cross_entropy(*leaves, targets)
        if any(needs):
            loss.backward()
        for leaf, need, expected in zip(leaves, needs, truth, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-6)


def test_gradients_of_a_batch_of_outputs_at_a_time() -> None:
    """torch.autograd.grad(is_grads_batched=True), as vectorised Jacobians use it."""
    h, (weight, bias), targets = randn(5, 12), head(40, 12), randint(40, 5)
    idx, wte, w1, b1 = randint(9, 5, 3), randn(9, 4), randn(12, 12, seed=1), randn(12, seed=2)
    losses = lambda h: ops.linear_cross_entropy(h, weight, bias, targets, reduction="none")  # noqa: E731
    hidden = lambda wte: ops.embed_linear_tanh(idx, wte, w1, b1).sum(0)  # noqa: E731
    for f, x in ((losses, h), (hidden, wte)):
        out = f(leaf := x.clone().requires_grad_())
        batch = torch.eye(len(out), device=DEVICE)
        (batched,) = torch.autograd.grad(out, leaf, batch, is_grads_batched=True, retain_graph=True)
        for dout, found in zip(batch, batched, strict=True):
            (expected,) = torch.autograd.grad(out, leaf, dout, retain_graph=True)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_loss_invalid_targets_make_nan() -> None:
    from mlp_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    h, (weight, bias) = randn(3, 4), head(40, 4)
    for bad in (40, -1, 2**32):
        targets = torch.tensor([1, bad, 3], device=DEVICE)
        loss, lse = linear_cross_entropy_fwd(h, weight, bias, targets, "fp32")
        dloss = torch.ones_like(loss)
        dh, dweight, dbias = linear_cross_entropy_bwd(dloss, lse, h, weight, bias, targets, "fp32", True, True)
        assert loss.isnan()
        assert dh.isnan().any(dim=1).tolist() == [False, True, False]
        assert dweight.isnan().all()
        assert dbias.isnan().all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 70),
    V=st.integers(1, 300),
    H=st.integers(1, 40),
    index=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    transposed=st.booleans(),
)
def test_loss_any_sizes(B: int, V: int, H: int, index: torch.dtype, transposed: bool) -> None:
    (weight, bias), targets = head(V, H), randint(min(V, 256) if index == torch.uint8 else V, B, dtype=index)
    check_loss(randn(B, H), weight.t().contiguous().t() if transposed else weight, bias, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_16_bits(dtype: torch.dtype) -> None:
    inputs, targets = [t.to(dtype) for t in (randn(70, 40), *head(50, 40))], randint(50, 70)
    got = gradients(lambda *p: ops.linear_cross_entropy(*p, targets), inputs, None)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype, dtype]
    theirs = gradients(eager_loss(targets), inputs, None)
    truth = gradients(eager_loss(targets), [t.double() for t in inputs], None)
    assert_accurate(got, theirs, truth, dtype)


WEIGHTS = torch.linspace(0.1, 2, 40, device=DEVICE)
OPTIONS: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": -100},
    {"ignore_index": 3, "reduction": "none"},
    {"weight": WEIGHTS},
    {"weight": WEIGHTS, "reduction": "sum", "ignore_index": 3},
    {"label_smoothing": 0.2},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"label_smoothing": 0.3, "weight": WEIGHTS, "ignore_index": -100},
]


def check_options(options: dict[str, Any], B: int, dtype: torch.dtype = torch.float32) -> None:
    """Loss and gradients by the rule; some targets are the ignored one."""
    targets = torch.where(randint(4, B) == 0, options.get("ignore_index", 0), randint(40, B))
    dloss = torch.linspace(0.5, 1.5, B, device=DEVICE) if options.get("reduction") == "none" else None

    def theirs(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = {name: value.to(h.dtype) if name == "weight" else value for name, value in options.items()}
        return F.cross_entropy(F.linear(h, weight, bias), targets, **wide)

    operands = [t.to(dtype) for t in (randn(B, 12), *head(40, 12))]
    assert_accurate(
        gradients(lambda *p: ops.linear_cross_entropy(*p, targets, **options), operands, dloss),
        gradients(theirs, operands, dloss),
        gradients(theirs, [t.double() for t in operands], dloss),
        dtype,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_options(options: dict[str, Any]) -> None:
    check_options(options, 70)


@pytest.mark.parametrize("options", OPTIONS[-1:] + OPTIONS[1:2], ids=str)
def test_loss_options_in_16_bits(options: dict[str, Any]) -> None:
    check_options(options, 70, torch.float16)


def test_small_losses_keep_their_gradients_in_16_bits() -> None:
    """The gradient of a row's logits is too small for 16 bits; that of the weights, which sums over rows, is not."""
    operands, targets = [t.half() for t in (randn(64, 8), *head(5, 8))], randint(5, 64)
    got, truth = (
        torch.autograd.grad(loss, leaves[1])[0].double()
        for dtype in (torch.float16, torch.float64)
        for leaves in [[t.to(dtype).requires_grad_() for t in operands]]
        for loss in [1e-3 * ops.linear_cross_entropy(*leaves, targets, reduction="none").mean()]
    )
    assert ((got - truth).norm() / truth.norm()).item() < 2e-3


@pytest.mark.parametrize("options", [{}, OPTIONS[-1], {"reduction": "none"}, {"reduction": "sum", "weight": WEIGHTS}])
def test_loss_options_of_nothing_and_of_ignored_rows_alone(options: dict[str, Any]) -> None:
    for B in (0, 3):
        targets = torch.full((B,), -100, device=DEVICE)
        options = options | {"ignore_index": -100}
        inputs = randn(B, 4), *head(40, 4)
        dloss = torch.ones(B, device=DEVICE) if options.get("reduction") == "none" else None
        got = gradients(lambda *p: ops.linear_cross_entropy(*p, targets, **options), inputs, dloss)  # noqa: B023
        expected = gradients(lambda *p: F.cross_entropy(F.linear(*p), targets, **options), inputs, dloss)  # noqa: B023
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_loss_invalid_targets_make_nan_of_weighted_losses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlp_fast.ops._linear_cross_entropy.check_in_range", lambda *_: None)  # refuses them on the CPU
    operands, targets = [randn(3, 4), *head(40, 4)], torch.tensor([1, 40, 3], device=DEVICE)
    loss, dh, dweight, dbias = gradients(
        lambda *p: ops.linear_cross_entropy(
            *p, targets, weight=WEIGHTS, reduction="none", ignore_index=-100, label_smoothing=0.1
        ),
        operands,
        torch.ones(3, device=DEVICE),
    )
    assert loss.isnan().tolist() == [False, True, False]
    assert dh.isnan().any(dim=1).tolist() == [False, True, False]
    assert dweight.isnan().all()
    assert dbias.isnan().all()


def test_operators_without_a_bias() -> None:
    idx, (wte, weight, _), targets = randint(27, 33, 2), model(2, 27, 9, 21), randint(27, 33)
    for ours, theirs, operands, dout in (
        (
            lambda *p: ops.embed_linear_tanh(idx, *p, None),
            lambda *p: eager_hidden(idx)(*p, None),
            (wte, weight),
            randn(33, 21) / 33,
        ),
        (
            lambda *p: ops.linear_cross_entropy(*p, None, targets),
            lambda *p: F.cross_entropy(F.linear(*p), targets),
            (randn(33, 12), head(27, 12)[0]),
            None,
        ),
    ):
        truth = gradients(theirs, [t.double() for t in operands], dout)
        assert_accurate(gradients(ours, operands, dout), gradients(theirs, operands, dout), truth)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch itself
def test_tangents_and_transforms_of_the_kernels_operators() -> None:
    """Which are plain torch's; tests/test_ops_cpu.py has every kind. What is here: they do not enter the kernels."""
    idx, targets, parameters = randint(27, 9, 2), randint(27, 9), model(2, 27, 4, 6)
    embed = lambda *p: ops.embed_linear_tanh(idx, *p)  # noqa: E731
    loss = lambda *p: ops.linear_cross_entropy(*p, targets)  # noqa: E731
    for ours, plain, p in (
        (embed, eager_hidden(idx), parameters),
        (loss, eager_loss(targets), (randn(9, 6), *head(27, 6))),
    ):
        tangents = tuple(randn(*t.shape, seed=9) for t in p)
        for derivative in (
            lambda f, p=p, tangents=tangents: torch.func.jvp(f, p, tangents),
            lambda f, p=p: torch.func.grad(lambda *q: f(*q).square().sum(), (0, 1, 2))(*p),
            lambda f, p=p: torch.func.vmap(f)(*(torch.stack([t, -t]) for t in p)),
            lambda f, p=p: torch.func.hessian(lambda *q: f(*q).sum(), 2)(*p),
        ):
            torch.testing.assert_close(derivative(ours), derivative(plain), rtol=1e-4, atol=1e-5)
        leaves = [t.clone().requires_grad_() for t in p]
        out = ours(*leaves)
        with forward_ad.dual_level():
            dout = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
            for gradient in torch.autograd.grad(out, leaves, dout, retain_graph=True):
                primal, tangent = forward_ad.unpack_dual(gradient)
                assert tangent is not None
                torch.testing.assert_close(tangent, 2 * primal)
        second = [
            torch.autograd.grad(
                torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)[1].sum(), leaves
            )
            for f in (ours, plain)
        ]
        torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


def test_loss_of_a_large_vocabulary() -> None:
    h, (weight, bias), targets = randn(2, 3), head(20_011, 3), randint(20_011, 2)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(h, weight, bias, targets)
    truth = eager_loss(targets)(h.double(), weight.double(), bias.double())
    assert abs(loss.item() - truth.item()) < 2e-6


@pytest.mark.long
def test_loss_of_the_largest_vocabulary() -> None:
    check_loss(randn(2, 3), *head(100_000, 3), randint(100_000, 2))


# ---------------------------------------------------------------------------------------------------------------

Moments = tuple[list[Tensor], list[Tensor], list[Tensor]]


def run_adamw(
    initial: Sequence[Tensor], dtype: torch.dtype, ours: bool, steps: int = 6,
    scalars: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> Moments:  # fmt: skip
    """Steps of ops.adamw_ or of torch.optim.AdamW over the same made-up gradients; (params, exp_avg, exp_avg_sq)."""
    params = [torch.nn.Parameter(t.detach().clone(memory_format=torch.preserve_format).to(dtype)) for t in initial]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    optimizer = torch.optim.AdamW(params, weight_decay=1e-2)
    step = torch.zeros((), dtype=scalars[0], device=DEVICE)
    lr = torch.zeros((), dtype=scalars[1], device=DEVICE)
    for i in range(steps):
        grads = [randn(*p.shape, seed=100 + i).to(dtype) for p in params]
        rate = 1e-3 * (1 - i / 10)
        if ours:
            step.add_(1)
            lr.fill_(rate)
            ops.adamw_(params, grads, m, v, step, lr, weight_decay=1e-2)
        else:
            optimizer.param_groups[0]["lr"] = rate
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
    if not ours:
        m = [optimizer.state[p]["exp_avg"] for p in params]
        v = [optimizer.state[p]["exp_avg_sq"] for p in params]
    return [p.detach() for p in params], m, v


def check_adamw(
    initial: Sequence[Tensor],
    scalars: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    steps: int = 6,
) -> None:
    got = run_adamw(initial, torch.float32, True, steps, scalars)
    theirs, truth = (run_adamw(initial, dtype, False, steps) for dtype in (torch.float32, torch.float64))
    for a, b, x in zip(got, theirs, truth, strict=True):
        assert_accurate(a, b, x)


def test_adamw_of_the_model() -> None:
    check_adamw([t.to(DEVICE) for t in initial_parameters(Shape(V=27, T=3, E=8, H=40), 1).values()])


def test_adamw_sizes_and_layouts() -> None:
    check_adamw(
        [randn(), randn(1), randn(0), randn(1023), randn(1025), randn(7, 9).t(), randn(2, 3, 5).transpose(0, 2)]
    )
    # A dimension of one, or no number at all, lies densely whatever its strides.
    check_adamw([randn(9).as_strided((9, 1), (1, 7)), randn(4, 5)[:0, ::2], randn(1, 5).t()])


def test_the_naive_adamw_has_the_bits_of_the_other() -> None:
    """Which is held to float64 and to torch."""
    lists = [[randn(*shape, seed=i).abs() for shape in ((), (0,), (1025,), (7, 9))] for i in range(4)]
    others = [[t.clone() for t in tensors] for tensors in lists]
    step, lr = torch.full((), 7.0, device=DEVICE), torch.tensor(1e-3, dtype=torch.float64, device=DEVICE)
    kernels("adamw").adamw_1(*lists, step, lr, 0.9, 0.999, 1e-8, 1e-2)
    kernels("adamw").adamw(*others, step, lr, 0.9, 0.999, 1e-8, 1e-2)
    for a, b in zip(lists, others, strict=True):
        assert all(map(torch.equal, a, b))
    assert not torch.equal(lists[0][2], randn(1025).abs())


def test_adamw_takes_any_number_of_tensors() -> None:
    check_adamw([randn(3 + i % 3, seed=i) for i in range(66)], steps=1)
    ops.adamw_([], [], [], [], torch.ones((), device=DEVICE), torch.ones((), device=DEVICE))


@pytest.mark.parametrize("scalars", [(torch.int32, torch.float64), (torch.int64, torch.float32)])
def test_adamw_step_and_rate_dtypes(scalars: tuple[torch.dtype, torch.dtype]) -> None:
    check_adamw([randn(50)], scalars)


def test_adamw_late_step() -> None:
    """Bias corrections keep fp32 accuracy at any step: from p = 0 the update is all there is, and no digit hides."""
    for number in (1, 2, 50_000):
        p, g, m, v = (randn(100, seed=i) for i in range(4))
        p, v = torch.zeros_like(p), v.square()
        expected = [t.double() for t in (p, m, v)]
        optimizer = torch.optim.AdamW([expected[0]], lr=1e-3)
        expected[0].grad = g.double()
        optimizer.state[expected[0]] = {
            "step": torch.tensor(float(number - 1)), "exp_avg": expected[1], "exp_avg_sq": expected[2],
        }  # fmt: skip
        optimizer.step()
        ops.adamw_([p], [g], [m], [v], torch.full((), number, device=DEVICE), torch.tensor(1e-3, device=DEVICE))
        for a, x in zip((p, m, v), expected, strict=True):
            torch.testing.assert_close(a.double(), x, rtol=1e-6, atol=1e-9)


def test_adamw_refuses_overlapping_and_gapped_layouts() -> None:
    one = torch.ones((), device=DEVICE)
    for bad in (randn(1).expand(4), randn(8)[::2]):
        good = [randn(4) for _ in range(3)]
        with pytest.raises(ValueError, match="dense layout"):
            ops.adamw_([bad], [good[0]], [good[1]], [good[2]], one, one)
    with pytest.raises(ValueError, match="dense layout"):
        ops.adamw_([randn(3, 4)], [randn(3, 4)], [randn(4, 3).t()], [randn(3, 4)], one, one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_16_bits(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and interpreting():
        pytest.skip("the interpreter truncates to bf16 where hardware rounds, which here is the whole error")
    got = run_adamw([randn(500)], dtype, True, 1)
    theirs = run_adamw([randn(500)], dtype, False, 1)
    truth = run_adamw([randn(500).to(dtype)], torch.float64, False, 1)
    for a, b, x in zip(got, theirs, truth, strict=True):
        assert_accurate(a, b, x, dtype)
        assert a[0].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------


def batch(B: int = 20) -> tuple[Tensor, Tensor]:
    return randint(27, B, 3), randint(27, B)


def pair() -> tuple[MLP, ops.FusedMLP]:
    shape = Shape(V=27, T=3, E=8, H=40)
    parameters = initial_parameters(shape, 1)
    return MLP(shape, parameters).to(DEVICE), ops.FusedMLP(shape, parameters).to(DEVICE)


def test_model_equals_eager() -> None:
    eager, fused = pair()
    idx, targets = batch(100)
    torch.testing.assert_close(fused(idx), eager(idx), rtol=1e-5, atol=1e-6)
    losses = [m(idx, targets)[1] for m in (eager, fused)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for a, b in zip(eager.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_opcheck_of_the_kernels() -> None:
    """As in test_ops_cpu.py, but what runs here are the kernels: no hidden mutation, no aliasing, the fakes agree."""
    check, operators = torch.library.opcheck, torch.ops.mlp_fast
    embed = (randint(11, 5, 2), *(t.requires_grad_() for t in model(2, 11, 3, 4)))
    for form in ("table", "gather"):
        check(operators.embed_linear_tanh_v2.default, (*embed, form))
    check(operators.linear_cross_entropy_v2.default, (randn(5, 4).requires_grad_(), *head(7, 4), randint(7, 5)))
    tensors = [[randn(3, seed=i).abs(), randn(2, 2, seed=i).abs()] for i in range(4)]
    check(operators.adamw_.default, (*tensors, *torch.ones(2, device=DEVICE).unbind(), 0.9, 0.999, 1e-8, 0.01))


def test_same_bits_every_run() -> None:
    _, fused = pair()
    idx, targets = batch(100)
    runs = []
    for _ in range(3):
        fused.zero_grad()
        _, loss = fused(idx, targets)
        loss.backward()
        runs.append([loss.detach(), *(p.grad.clone() for p in fused.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_model_under_torch_compile() -> None:
    _, fused = pair()
    idx, targets = batch()
    _, expected = fused(idx, targets)
    # Inductor imports Triton for its own ends, which the interpreter's patches do not suit.
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    _, loss = compiled(idx, targets)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(p.grad is not None for p in fused.parameters())


@needs_cuda
@pytest.mark.cuda
def test_cuda_graph() -> None:
    _, fused = pair()
    idx, targets = batch(128)
    params = list(fused.parameters())
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    step, lr = torch.zeros((), device=DEVICE), torch.full((), 1e-3, device=DEVICE)
    start = [p.detach().clone() for p in params]

    def one_step() -> Tensor:
        _, loss = fused(idx, targets)
        grads = torch.autograd.grad(loss, params)
        step.add_(1)
        ops.adamw_(params, grads, m, v, step, lr)
        return loss

    expected = [one_step().item() for _ in range(6)]
    with torch.no_grad():
        for t, s in zip(params, start, strict=True):
            t.copy_(s)
        for t in (*m, *v, step):
            t.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = one_step()
    replayed = []
    for _ in range(6):
        graph.replay()
        replayed.append(loss.item())
    assert replayed == expected


@needs_cuda
@pytest.mark.cuda
def test_several_streams() -> None:
    _, fused = pair()
    batches = [(randint(27, B, 3), randint(27, B)) for B in range(100, 108)]
    expected = [fused(*b)[1].item() for b in batches]
    torch.cuda.synchronize()
    losses = []
    for b in batches:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            losses.append(fused(*b)[1])
    torch.cuda.synchronize()
    assert [loss.item() for loss in losses] == expected


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32x3", 3e-6), ("tf32", 3e-3)])
def test_tensor_core_precisions(precision: str, tolerance: float) -> None:
    idx, parameters = randint(27, 200, 3), model(3, 27, 48, 128)
    truth = eager_hidden(idx)(*(t.double() for t in parameters))
    for form in ("table", "gather"):
        h = ops.embed_linear_tanh(idx, *parameters, form=form, precision=precision)
        assert (h - truth).abs().max() < tolerance

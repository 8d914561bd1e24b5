"""The operators' kernels as compiled, in the emulator: against float64 by the rule of tests/interpreted."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from emulator import Emulator, Schedule
from kernels_under_test import ADVERSE, undefined

from bench import operators
from mlp_fast.config import Config
from mlp_fast.kernels import embed_linear_tanh, linear_cross_entropy
from mlp_fast.kernels._sum import sum_parts

pytestmark = pytest.mark.usefixtures("engine", "one_thread")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# TF32 rounds operands to 11 bits: what is left of sums of about one, as bench and tests/interpreted allow it.
TF32_TOLERANCE = 4e-3
# Few blocks at a time: those that come later find what the earlier ones left.
SCHEDULES = (Schedule(), Schedule(**vars(ADVERSE) | {"resident": 6}))


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * sum(shape) + seed)) * scale


def randint(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high + sum(shape))).to(dtype)


def gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None) -> list[Tensor]:
    """f's value and its gradients with respect to the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    out.backward(None if dout is None else dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def check(
    kernels: Callable[[], Sequence[Tensor | None]], torchs: Sequence[Tensor], truth: Sequence[Tensor],
    capability: int, precision: str,
) -> None:  # fmt: skip
    """Under all schedules: at most twice torch's own error and 1e-6, no finding but harmless ones, the same bits."""
    outcomes = []
    for schedule in SCHEDULES:
        with Emulator(capability, schedule) as emulator:
            got = kernels()
        assert undefined(emulator.findings) == []
        outcomes.append(got)
        for i, (a, b, x) in enumerate(zip(got, torchs, truth, strict=True)):
            assert a is not None
            assert a.shape == x.shape
            if x.numel():
                allowed = TF32_TOLERANCE if precision == "tf32" else 2 * (b.double() - x).abs().max().item() + 1e-6
                assert (a.double() - x).abs().max().item() <= allowed, f"tensor {i}"
    for a, b in zip(*outcomes, strict=True):
        assert a is not None
        assert b is not None
        # A race that is harmless changes no bit.
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check_embed(
    B: int, T: int, V: int, E: int, H: int, form: str, capability: int = 90, precision: str = "fp32",
    index: torch.dtype = torch.int64, stride: int = 1,
) -> None:  # fmt: skip
    """Both directions of embed_linear_tanh; precision is of fp32 operands, or a type of 16 bits."""
    dtype, arithmetic = (DTYPES[precision], "fp32") if precision in DTYPES else (torch.float32, precision)
    idx = randint(min(V, 256) if index == torch.uint8 else V, B, T, dtype=index)
    wte, bias = randn(V, E).to(dtype), randn(H, seed=2).to(dtype)
    weight = randn(H, stride * T * E, seed=1, scale=(T * E) ** -0.5).to(dtype)[:, ::stride]
    dh = (randn(B, H, seed=4) / max(B, 1)).to(dtype)

    def kernels() -> list[Tensor | None]:
        h = embed_linear_tanh.embed_linear_tanh_fwd(idx, wte, weight, bias, form, arithmetic)
        grads = embed_linear_tanh.embed_linear_tanh_bwd(dh, h, idx, wte, weight, form, arithmetic, True, True)
        return [h, *grads]

    def plain(wte: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(F.linear(F.embedding(idx.long(), wte).flatten(1), weight, bias))

    inputs = (wte, weight, bias)
    truth = gradients(plain, [t.double() for t in inputs], dh)
    check(kernels, gradients(plain, inputs, dh), truth, capability, precision)


def check_loss(
    B: int, V: int, H: int, capability: int = 90, precision: str = "fp32", index: torch.dtype = torch.int64
) -> None:
    """Both directions of linear_cross_entropy."""
    dtype, arithmetic = (DTYPES[precision], "fp32") if precision in DTYPES else (torch.float32, precision)
    h, weight, bias = randn(B, H).to(dtype), randn(V, H, seed=1, scale=H**-0.5).to(dtype), randn(V, seed=2).to(dtype)
    targets = randint(min(V, 256), B, dtype=index)

    def kernels() -> list[Tensor | None]:
        loss, lse = linear_cross_entropy.linear_cross_entropy_fwd(h, weight, bias, targets, arithmetic)
        one = torch.ones(())
        grads = linear_cross_entropy.linear_cross_entropy_bwd(
            one, lse, h, weight, bias, targets, arithmetic, True, True
        )
        return [loss, *grads]

    def plain(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight, bias), targets.long())

    inputs = (h, weight, bias)
    truth = gradients(plain, [t.double() for t in inputs], None)
    check(kernels, gradients(plain, inputs, None), truth, capability, precision)


@pytest.mark.parametrize("form", ["table", "gather"])
def test_embed_linear_tanh(form: str) -> None:
    check_embed(70, 2, 27, 17, 40, form)


def test_linear_cross_entropy() -> None:
    check_loss(70, 80, 40)


@pytest.mark.parametrize(
    ("B", "T", "V", "E", "H"), [(5, 2, 27, 3, 130), pytest.param(128, 3, 27, 48, 512, marks=pytest.mark.long)]
)
def test_the_naive_kernels(B: int, T: int, V: int, E: int, H: int) -> None:
    idx, wte, weight, bias = randint(V, B, T), randn(V, E), randn(H, T * E, seed=1, scale=(T * E) ** -0.5), randn(H)

    def hidden(wte: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(F.linear(F.embedding(idx, wte).flatten(1), weight, bias))

    inputs = (wte, weight, bias)
    check(
        lambda: [embed_linear_tanh.embed_linear_tanh_1(idx, *inputs)],
        [hidden(*inputs)], [hidden(*(t.double() for t in inputs))], 90, "fp32",
    )  # fmt: skip
    h, head, head_bias, targets = randn(B, H), randn(V, H, seed=1, scale=H**-0.5), randn(V), randint(V, B)

    def loss(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight, bias), targets)

    inputs = (h, head, head_bias)
    check(
        lambda: [linear_cross_entropy.linear_cross_entropy_1(*inputs, targets)],
        [loss(*inputs)], [loss(*(t.double() for t in inputs))], 90, "fp32",
    )  # fmt: skip


def test_the_naive_works_of_the_benchmark_compute_what_they_stand_beside() -> None:
    config = Config(batch_size=5, context_length=2, embedding_size=3, hidden_size=20)
    for make in (make for name, make in operators.OPERATORS.items() if not name.endswith("backward")):
        with Emulator(90):
            got = make(config, torch.device("cpu"), torch.float32, operators.NAIVE)()
        plain = make(config, torch.device("cpu"), torch.float32, operators.TORCH)()
        assert len(got) == len(plain)
        for a, b in zip(got, plain, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=2e-6, atol=2e-6)


def test_products_of_16_bits() -> None:
    check_embed(33, 2, 27, 17, 40, "gather", 80, "bf16")
    check_embed(33, 2, 27, 17, 40, "gather", 75, "fp16")


@pytest.mark.parametrize("form", ["table", "gather"])
def test_an_empty_batch(form: str) -> None:
    check_embed(0, 2, 27, 17, 40, form)


def test_parts_are_added_in_their_order() -> None:
    """No product, so nothing to contract: the bits are those of additions one by one, as in Triton's interpreter."""
    parts = randn(7, 1000)
    expected = torch.zeros(1000)
    for part in parts:
        expected += part
    for schedule in SCHEDULES:
        with Emulator(90, schedule) as emulator:
            assert torch.equal(sum_parts(parts), expected)
        assert emulator.findings == []


ARCHITECTURES = [
    *itertools.product((80, 90, 100), ("fp32", "tf32x3", "tf32", "bf16", "fp16")),
    (75, "fp32"),
    (75, "fp16"),
]


@pytest.mark.long
@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize(("capability", "precision"), ARCHITECTURES)
def test_embed_linear_tanh_everywhere(capability: int, precision: str, form: str) -> None:
    check_embed(128, 3, 27, 48, 512, form, capability, precision)
    check_embed(129, 3, 27, 17, 65, form, capability, precision, index=torch.uint8, stride=2)
    check_embed(37, 2, 300, 5, 33, form, capability, precision)


@pytest.mark.long
@pytest.mark.parametrize("form", ["table", "gather"])
@pytest.mark.parametrize(("B", "T", "V", "E", "H"), [(1, 1, 2, 1, 1), (40, 5, 65, 15, 33), (1, 3, 27, 48, 64)])
def test_embed_linear_tanh_at_odd_sizes(B: int, T: int, V: int, E: int, H: int, form: str) -> None:
    check_embed(B, T, V, E, H, form)


@pytest.mark.parametrize("form", ["table", "gather"])
def test_a_vocabulary_of_one_token(form: str) -> None:
    """A launch makes a constant of a 1."""
    check_embed(3, 1, 1, 4, 5, form)


@pytest.mark.long
@pytest.mark.parametrize(("capability", "precision"), ARCHITECTURES)
def test_linear_cross_entropy_everywhere(capability: int, precision: str) -> None:
    check_loss(128, 27, 512, capability, precision)
    check_loss(129, 27, 65, capability, precision, index=torch.uint8)
    check_loss(16, 2000, 33, capability, precision)
    check_loss(1, 1, 1, capability, precision)

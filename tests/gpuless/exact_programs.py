"""Launches of kernels on numbers of few binary digits; run as a script, in Triton's interpreter: argument, the file for
their results.

Products and sums of such numbers are exact in float32. So it does not matter in which order a kernel adds, nor whether
the compiler fuses a product into a sum: the same results have the same bits.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mlp_fast.kernels._runtime import enable_interpreter

Results = dict[str, Tensor]
B, T, V, E, H = 40, 2, 11, 6, 36


def dyadic(*shape: int, seed: int, least: int = -4) -> Tensor:
    """Quarters between -1 and 1; with least=0 none below 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, 5, shape, generator=generator) / 4


def embed(form: str, wide: bool = False) -> Results:
    """embed_linear_tanh; `wide` with a vocabulary whose gradients are summed by sorting."""
    from mlp_fast.kernels.embed_linear_tanh import embed_linear_tanh_bwd, embed_linear_tanh_fwd

    size = 80 if wide else V
    idx = torch.randint(size, (B, T), generator=torch.Generator().manual_seed(1))
    wte, weight, bias = dyadic(size, E, seed=2), dyadic(H, T * E, seed=3), dyadic(H, seed=4)
    h = embed_linear_tanh_fwd(idx, wte, weight, bias, form, "fp32")
    # Backward from an h of few digits, not from that one.
    dh, held = dyadic(B, H, seed=5), dyadic(B, H, seed=6)
    dwte, dweight, dbias = embed_linear_tanh_bwd(dh, held, idx, wte, weight, form, "fp32", True, True)
    assert dwte is not None and dweight is not None and dbias is not None  # noqa: PT018
    return {"h": h, "dwte": dwte, "dweight": dweight, "dbias": dbias}


def naive_embed() -> Results:
    """embed_linear_tanh_1."""
    from mlp_fast.kernels.embed_linear_tanh import embed_linear_tanh_1

    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    return {"h": embed_linear_tanh_1(idx, dyadic(V, E, seed=2), dyadic(H, T * E, seed=3), dyadic(H, seed=4))}


def loss() -> Results:
    """linear_cross_entropy, and what it knows of each row."""
    from mlp_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    h, weight, bias = dyadic(B, H, seed=1), dyadic(V, H, seed=2), dyadic(V, seed=3)
    targets = torch.randint(V, (B,), generator=torch.Generator().manual_seed(4))
    mean, lse = linear_cross_entropy_fwd(h, weight, bias, targets, "fp32")
    dh, dweight, dbias = linear_cross_entropy_bwd(
        torch.ones(()), lse, h, weight, bias, targets, "fp32", True, True
    )  # fmt: skip
    assert dh is not None and dweight is not None and dbias is not None  # noqa: PT018
    return {"highest": lse[0], "log_sum": lse[1], "loss": mean, "dh": dh, "dweight": dweight, "dbias": dbias}


def naive_loss() -> Results:
    """linear_cross_entropy_1."""
    from mlp_fast.kernels.linear_cross_entropy import linear_cross_entropy_1

    h, weight, bias = dyadic(B, H, seed=1), dyadic(V, H, seed=2), dyadic(V, seed=3)
    targets = torch.randint(V, (B,), generator=torch.Generator().manual_seed(4))
    return {"loss": linear_cross_entropy_1(h, weight, bias, targets)}


def adamw(beta1: float, beta2: float, version: int = 2) -> Results:
    """An update of one tensor of 1,500 numbers, a fifth of which never had a gradient."""
    from mlp_fast.kernels import adamw as module

    p, g, m, v = (dyadic(1500, seed=seed, least=0 if seed == 4 else -4) for seed in (1, 2, 3, 4))
    idle = torch.arange(1500) % 5 == 0
    g[idle], m[idle] = 0.0, 0.0
    update = module.adamw if version == 2 else module.adamw_1
    update([p], [g], [m], [v], torch.tensor(3.0), torch.tensor(1e-3, dtype=torch.float64), beta1, beta2, 1e-8, 1e-4)
    return {"p": p, "idle p": p[idle], "m": m, "v": v}


def step() -> Results:
    """A training step on tokens that leave one out: that token's embedding has no gradient."""
    from mlp_fast.config import Config
    from mlp_fast.kernels import train_step
    from mlp_fast.model.schedule import update_scalars

    config = Config(context_length=T, embedding_size=E, hidden_size=H, batch_size=B, num_steps=10)
    shapes = ((V, E), (H, T * E), (H,), (V, H), (V,))
    planes = [[dyadic(*shape, seed=i) for i, shape in enumerate(shapes)]]
    planes += [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    tokens = torch.randint(V - 1, (200,), generator=torch.Generator().manual_seed(9), dtype=torch.int32)
    kernels = train_step.TrainStep(train_step.default_config(B, V, T, E, H), tokens, update_scalars(config))
    kernels.load(planes, 0)
    kernels.run(1)
    wte = kernels.planes()[0][0]
    return {"idle wte": wte[V - 1], "wte": wte, "loss": kernels.buffers.losses[:1]}


PROGRAMS: dict[str, Callable[[], Results]] = {
    "embed_linear_tanh_1": naive_embed,
    "embed_linear_tanh gather": lambda: embed("gather"),
    "embed_linear_tanh table": lambda: embed("table"),
    "embed_linear_tanh table, sorted": lambda: embed("table", wide=True),
    "linear_cross_entropy_1": naive_loss,
    "linear_cross_entropy": loss,
    "adamw_1, betas of few digits": lambda: adamw(0.5, 0.75, version=1),
    "adamw, betas of few digits": lambda: adamw(0.5, 0.75),
    "adamw": lambda: adamw(0.9, 0.999),
    "train_step": step,
}

if __name__ == "__main__":
    enable_interpreter()
    torch.set_num_threads(1)
    torch.save({name: program() for name, program in PROGRAMS.items()}, sys.argv[1])

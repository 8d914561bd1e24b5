"""The model in its two eager styles: `MLPRaw` on bare tensors, `MLP` as an nn.Module. Same numbers.

    emb = wte[idx] flattened to (B, T*E);  h = tanh(emb W1^T + b1);  logits = h W2^T + b2;  loss = mean cross-entropy

after Bengio et al. 2003, "A Neural Probabilistic Language Model". The paper's optional direct connections from the
embeddings to the logits, a matrix D (V, T*E), add emb D^T to the logits of a model whose Shape asks for them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlp_fast.config import Config
from mlp_fast.model.rng import RNG

# Parameters under the names of MLP's state_dict, in the order in which they are drawn and stored everywhere.
WTE, W1, B1, W2, B2 = PARAMETER_NAMES = ("wte.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
DIRECT = "direct.weight"  # the last, where there are direct connections

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: vocabulary V, context length T, embedding E, hidden units H, and whether D is there."""

    V: int
    T: int
    E: int
    H: int
    direct: bool = False

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> "Shape":
        """The sizes of a run's model."""
        return cls(vocab_size, config.context_length, config.embedding_size, config.hidden_size, config.direct)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter."""
        V, T, E, H = self.V, self.T, self.E, self.H
        plain = {WTE: (V, E), W1: (H, T * E), B1: (H,), W2: (V, H), B2: (V,)}
        return plain | {DIRECT: (V, T * E)} if self.direct else plain

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(shape) for shape in self.parameters.values())


def initial_parameters(shape: Shape, seed: int) -> Parameters:
    """Initial values, float32 on the CPU, drawn from one RNG in the order of PARAMETER_NAMES, then D.

    wte is N(0, 1); each linear layer's weight and bias are U(-s, s) with s = 1 / sqrt(fan in), torch's own rule; so is
    D with its own fan in, T*E. Being the last draw, D leaves the other values as they are without it.
    """
    rng = RNG(seed)
    s1, s2 = 1 / math.sqrt(shape.T * shape.E), 1 / math.sqrt(shape.H)
    bounds = {W1: s1, B1: s1, W2: s2, B2: s2, DIRECT: s1}
    return {
        name: rng.normal(size) if name == WTE else rng.uniform(size, -bounds[name], bounds[name])
        for name, size in shape.parameters.items()
    }


class MLPRaw:
    """The model on bare tensors, every operation spelled out.

    Its weights are the transposed views (T*E, H), (H, V) and (T*E, V) of the stored matrices, so that `x @ weight`
    reads as the formula does.

    Args:
        parameters: as from initial_parameters(); cloned.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.wte = parameters[WTE].clone()
        self.fc1_weight = parameters[W1].clone().t()
        self.fc1_bias = parameters[B1].clone()
        self.fc2_weight = parameters[W2].clone().t()
        self.fc2_bias = parameters[B2].clone()
        self.direct_weight = parameters[DIRECT].clone().t() if DIRECT in parameters else None
        for tensor in self.parameters().values():
            tensor.requires_grad_()

    def parameters(self) -> Parameters:
        """The bare tensors under the names of Shape.parameters."""
        tensors = (self.wte, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        named = dict(zip(PARAMETER_NAMES, tensors, strict=True))
        return named if self.direct_weight is None else named | {DIRECT: self.direct_weight}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Contexts (B, T), integer, and next tokens (B,), int64 -> (logits (B, V), mean cross-entropy in nats).

        Both float32, the loss a scalar; it is None without targets.
        """
        emb = self.wte[idx].flatten(1)
        hidden = torch.tanh(emb @ self.fc1_weight + self.fc1_bias)
        logits = hidden @ self.fc2_weight + self.fc2_bias
        if self.direct_weight is not None:
            logits = logits + emb @ self.direct_weight
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    __call__ = forward


class MLP(nn.Module):
    """The model as an nn.Module.

    Args:
        shape: the sizes.
        parameters: initial values as from initial_parameters(); without them torch's own are kept.
    """

    def __init__(self, shape: Shape, parameters: Parameters | None = None) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.V, shape.E)
        self.mlp = nn.Sequential(nn.Linear(shape.T * shape.E, shape.H), nn.Tanh(), nn.Linear(shape.H, shape.V))
        self.direct = nn.Linear(shape.T * shape.E, shape.V, bias=False) if shape.direct else None
        if parameters is not None:
            self.load_state_dict(parameters)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As MLPRaw.forward."""
        emb = self.wte(idx).flatten(1)
        logits = self.mlp(emb) if self.direct is None else self.mlp(emb) + self.direct(emb)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

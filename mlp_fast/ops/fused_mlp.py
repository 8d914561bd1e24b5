"""FusedMLP: the model on the fused operators."""

from typing import cast

import torch
from torch import Tensor, nn

from mlp_fast.kernels._model import FORMS
from mlp_fast.kernels._runtime import INPUT_PRECISION
from mlp_fast.model.mlp import MLP, Parameters, Shape
from mlp_fast.ops._checks import one_of
from mlp_fast.ops._embed_linear_tanh import embed_linear_tanh
from mlp_fast.ops._linear_cross_entropy import linear_cross_entropy


class FusedMLP(MLP):
    """model.mlp.MLP computed by the fused operators: same parameters, same state_dict, same function.

    Its layers hold the parameters and are not called, so hooks on them are refused; hooks on the model itself work.

    Args:
        shape: the sizes.
        parameters: initial values as from model.mlp.initial_parameters(); without them torch's own are kept.
        form, precision: as in embed_linear_tanh.

    Raises:
        ValueError: form or precision is unknown.

    Example::

        model = FusedMLP(Shape(V=27, T=3, E=48, H=512)).cuda()
        model.load_state_dict(MLP(model.shape).state_dict())
        _, loss = model(idx, targets)
        loss.backward()
    """

    def __init__(
        self, shape: Shape, parameters: Parameters | None = None, *, form: str = "auto", precision: str = "fp32"
    ) -> None:
        super().__init__(shape, parameters)
        self.shape = shape
        self.form = one_of("form", form, FORMS)
        self.precision = one_of("precision", precision, INPUT_PRECISION)

    def forward(  # type: ignore[override]  # MLP has logits in any case
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Contexts (B, T), integer -> (logits (B, V), None); with the next tokens (B,), integer -> (None, loss).

        The loss is the mean cross-entropy in nats, a scalar. It comes without the logits, which are not written to
        memory for it.

        Raises:
            RuntimeError: a layer has hooks or was replaced.
        """
        self._check_layers()
        hidden = self.hidden(idx)
        output = cast(nn.Linear, self.mlp[2])
        if targets is None:
            logits = output(hidden)
            return (logits if self.direct is None else logits + self.direct(self.wte(idx).flatten(1))), None
        weight = output.weight
        if self.direct is not None:
            # h W2^T + emb D^T as one product, so that these logits are not written to memory either.
            hidden = torch.cat([hidden, self.wte(idx).flatten(1)], dim=1)
            weight = torch.cat([weight, self.direct.weight], dim=1)
        return None, linear_cross_entropy(hidden, weight, output.bias, targets, precision=self.precision)

    def hidden(self, idx: Tensor) -> Tensor:
        """Contexts (B, T), integer -> hidden layer (B, H)."""
        fc1 = cast(nn.Linear, self.mlp[0])
        return embed_linear_tanh(idx, self.wte.weight, fc1.weight, fc1.bias, form=self.form, precision=self.precision)

    def _check_layers(self) -> None:
        """What a layer would do beyond its formula must not be left out in silence."""
        layers: dict[str, tuple[nn.Module, type[nn.Module]]] = {"wte": (self.wte, nn.Embedding)}
        layers |= {f"mlp.{i}": (self.mlp[i], kind) for i, kind in enumerate((nn.Linear, nn.Tanh, nn.Linear))}
        if self.direct is not None:
            layers["direct"] = (self.direct, nn.Linear)
        for name, (layer, kind) in layers.items():
            if type(layer).forward is not kind.forward:
                raise RuntimeError(f"FusedMLP would not call {name}, a {type(layer).__name__}: use MLP, which calls it")
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                raise RuntimeError(f"FusedMLP would not call the hooks on {name}: use MLP, which calls them")

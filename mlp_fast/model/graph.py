"""The computation graph of the model, as torch.fx traces it, and a table of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from mlp_fast.model.mlp import MLP


@dataclass(frozen=True)
class Operation:
    """A node of the computation graph.

    Attributes:
        name: unique; a layer's is its name in the nn.Module.
        kind: what it computes: a layer's class with its sizes, a function's name, or "input" and "output".
        shape: of its result.
        parameters: how many numbers the layer learns.
        inputs: the names of the operations whose results it takes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    inputs: tuple[str, ...]


def computation_graph(model: MLP, batch_size: int, context_length: int) -> list[Operation]:
    """The operations from contexts (B, T) and targets (B,) to the loss, each after those that it depends on."""
    traced = fx.symbolic_trace(model)
    tokens = torch.zeros(batch_size, context_length, dtype=torch.int64)
    ShapeProp(traced).propagate(tokens, tokens[:, 0])
    layers = dict(traced.named_modules())
    return [_operation(node, layers) for node in traced.graph.nodes if node.op != "output"]


def _operation(node: fx.Node, layers: dict[str, nn.Module]) -> Operation:
    kind, parameters = "input", 0
    if node.op == "call_module":
        layer = layers[str(node.target)]
        kind, parameters = f"{type(layer).__name__}({_sizes(layer)})", sum(p.numel() for p in layer.parameters())
    elif node.op != "placeholder":
        kind = node.target if isinstance(node.target, str) else cast(Any, node.target).__name__
    shape = tuple(cast(TensorMetadata, node.meta["tensor_meta"]).shape)
    return Operation(_name(node), kind, shape, parameters, tuple(_name(parent) for parent in node.all_input_nodes))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _sizes(layer: nn.Module) -> str:
    return f"{layer.in_features}, {layer.out_features}" if isinstance(layer, nn.Linear) else layer.extra_repr()


def summary(operations: Sequence[Operation]) -> str:
    """Operations, output shapes and parameter counts as a table of text, and the memory that the parameters take."""
    rows = [("operation", "kind", "output shape", "parameters")]
    rows += [
        (o.name, o.kind, str(o.shape or "scalar"), f"{o.parameters:,}" if o.parameters else "-") for o in operations
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{n:{widths[0]}}  {k:{widths[1]}}  {s:{widths[2]}}  {p:>{widths[3]}}" for n, k, s, p in rows]
    total = sum(operation.parameters for operation in operations)
    rule = "-" * len(lines[0])
    return "\n".join(
        [
            lines[0],
            rule,
            *lines[1:],
            rule,
            f"parameters: {total:,}, in float32 {4 * total:,} bytes; with AdamW's two moments {12 * total:,} bytes",
        ]
    )

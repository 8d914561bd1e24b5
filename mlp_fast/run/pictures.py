"""A saved model in pictures: its embeddings, what it expects after a context, its computation graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from mlp_fast.corpus.tokenizer import Vocabulary
from mlp_fast.model.mlp import MLP
from mlp_fast.run.checkpoint import Checkpoint
from mlp_fast.run.plot import drawable, figure

PICTURES = ("embeddings", "probabilities", "graph")
FORMATS = ("png", "svg")
SHOWN_BARS = 40  # beyond so many tokens the chart shows the most probable ones
SHOWN_LABELS = 200  # beyond so many, points of the embedding plot have no label
BOX = 0.25  # half the height of a box in the graph, where rows are 1 apart


def visualize(saved: Checkpoint, context: Sequence[int], folder: Path, format: str) -> str:
    """Writes the pictures, that of the probabilities after a context of T tokens, and summary.txt into a folder.

    Returns the summary; OSError where a file cannot be written.
    """
    model, vocabulary = saved.model(), saved.vocabulary
    operations = computation_graph(model, saved.config.batch_size, saved.config.context_length)
    text = summary(operations)
    (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    draw_embeddings(folder / f"embeddings.{format}", model.wte.weight.detach(), vocabulary)
    draw_probabilities(folder / f"probabilities.{format}", next_probabilities(model, context), context, vocabulary)
    draw_graph(folder / f"graph.{format}", operations)
    return text


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

    @property
    def size(self) -> str:
        """The shape of the result, in words."""
        return str(self.shape or "scalar")


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
        sizes = f"{layer.in_features}, {layer.out_features}" if isinstance(layer, nn.Linear) else layer.extra_repr()
        kind, parameters = f"{type(layer).__name__}({sizes})", sum(p.numel() for p in layer.parameters())
    elif node.op != "placeholder":
        kind = node.target if isinstance(node.target, str) else cast(Any, node.target).__name__
    shape = tuple(cast(TensorMetadata, node.meta["tensor_meta"]).shape)
    return Operation(_name(node), kind, shape, parameters, tuple(map(_name, node.all_input_nodes)))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def summary(operations: Sequence[Operation]) -> str:
    """Operations, output shapes and parameter counts as a table of text, and the memory that the parameters take."""
    rows = [("operation", "kind", "output shape", "parameters")]
    rows += [(o.name, o.kind, o.size, f"{o.parameters:,}" if o.parameters else "-") for o in operations]
    name, kind, size, count = (max(map(len, column)) for column in zip(*rows, strict=True))
    header, *lines = [f"{n:{name}}  {k:{kind}}  {s:{size}}  {p:>{count}}" for n, k, s, p in rows]
    rule = "-" * len(header)
    total = sum(operation.parameters for operation in operations)
    memory = f"in float32 {4 * total:,} bytes; with AdamW's two moments {12 * total:,} bytes"
    return "\n".join([header, rule, *lines, rule, f"parameters: {total:,}, {memory}"])


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components (Pearson 1901) of embeddings (V, E).

    Returns:
        Coordinates (V, 2), in the embeddings' own units, and each component's share of the variance, (2,). The sign of
        a component is free: it is chosen so that the coordinate farthest from 0 is positive. What does not exist, for
        want of rows or columns, is 0.
    """
    centred = (embeddings - embeddings.mean(0)).double()
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = F.pad(left * singular, (0, 2))[:, :2]
    variance = F.pad(singular**2, (0, 2))[:2]
    farthest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    return coordinates * farthest.sign(), variance / (singular**2).sum().clamp_min(torch.finfo().tiny)


def next_probabilities(model: MLP, context: Sequence[int]) -> Tensor:
    """The probabilities (V,), float64, of the token after a context of T tokens."""
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([list(context)]))[0][0].double(), dim=0)


def draw_embeddings(path: Path, embeddings: Tensor, vocabulary: Vocabulary) -> None:
    """Draws the first two principal components of embeddings (V, E), each point labelled with its token."""
    coordinates, share = principal_components(embeddings)
    with figure(path, 6.4, 5.4) as axes:
        axes.scatter(*coordinates.t().tolist(), s=12 if len(coordinates) <= SHOWN_LABELS else 2)
        if len(coordinates) <= SHOWN_LABELS:
            for token, point in enumerate(coordinates.tolist()):
                label = _label(vocabulary, token)
                axes.annotate(label, point, xytext=(4, 4), textcoords="offset points", parse_math=False)
        axes.set(
            title=f"Embeddings of {len(embeddings)} tokens: {embeddings.shape[1]} dimensions in two",
            xlabel=f"first principal component ({share[0]:.0%} of the variance; embedding units)",
            ylabel=f"second ({share[1]:.0%}; embedding units)",
        )
        axes.grid(alpha=0.3)


def draw_probabilities(path: Path, probabilities: Tensor, context: Sequence[int], vocabulary: Vocabulary) -> None:
    """Draws next-token probabilities (V,) as bars: all of them, or the SHOWN_BARS greatest of many."""
    shown = list(range(len(probabilities)))
    if len(shown) > SHOWN_BARS:
        shown = probabilities.topk(SHOWN_BARS).indices.tolist()
    with figure(path, 6.4, 4) as axes:
        axes.bar(range(len(shown)), probabilities[shown].tolist())
        labels = [_label(vocabulary, token) for token in shown]
        rotation = 90 if max(len(label) for label in labels) > 3 else 0
        axes.set_xticks(range(len(shown)), labels, rotation=rotation, parse_math=False)
        entropy = -torch.xlogy(probabilities, probabilities).sum()
        after = " ".join(_label(vocabulary, token) for token in context)
        axes.set_title(f"What comes after: {after}   (entropy {entropy:.2f} nats)", parse_math=False)
        most = "" if len(shown) == len(probabilities) else f", the {len(shown)} most probable of {len(probabilities):,}"
        axes.set(xlabel=f"next token{most}", ylabel="probability")
        axes.grid(axis="y", alpha=0.3)


def draw_graph(path: Path, operations: Sequence[Operation]) -> None:
    """Draws operations as boxes, each a row below the last of those it depends on, with arrows along the data."""
    depths = _depths(operations)
    rows = [[o for o in operations if depths[o.name] == depth] for depth in range(max(depths.values()) + 1)]
    widest = max(map(len, rows))
    places = {o.name: (i - (len(row) - 1) / 2, -depth) for depth, row in enumerate(rows) for i, o in enumerate(row)}
    with figure(path, max(5.0, 0.6 + 2.6 * widest), 1 + 0.8 * len(rows)) as axes:
        for operation in operations:
            x, y = places[operation.name]
            for parent in operation.inputs:
                x0, y0 = places[parent]
                arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", (x, y + BOX), (x0, y0 - BOX), arrowprops=arrow)
            title = operation.name if operation.name == operation.kind else f"{operation.name}: {operation.kind}"
            parameters = f", {operation.parameters:,} parameters" if operation.parameters else ""
            box = {"boxstyle": "round", "facecolor": "lightblue" if operation.parameters else "white"}
            text = f"{title}\n{operation.size}{parameters}"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, parse_math=False)
        axes.set_title("Computation graph: operation, output shape, parameters")
        axes.set(xlim=(-widest / 2 - 0.3, widest / 2 + 0.3), ylim=(-len(rows) + 0.4, 0.6))
        axes.axis("off")


def _depths(operations: Sequence[Operation]) -> dict[str, int]:
    """The number of operations on the longest way to each from an input; of an input, one less than its first use's."""
    depths: dict[str, int] = {}
    for operation in operations:
        depths[operation.name] = max((depths[parent] + 1 for parent in operation.inputs), default=0)
    for operation in operations:
        if not operation.inputs:
            depths[operation.name] = min(depths[o.name] for o in operations if operation.name in o.inputs) - 1
    return depths


def _label(vocabulary: Vocabulary, token: int) -> str:
    r"""A token as the pictures show it: itself; \n, \x00 or a code point where it cannot be seen or drawn."""
    return "".join(map(_shown, vocabulary.decode([token]))) or "''"


def _shown(character: str) -> str:
    if character == " ":
        return "' '"
    if not character.isprintable():
        return character.encode("unicode_escape").decode()
    return drawable(character)

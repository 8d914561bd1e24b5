"""The least time a step can take, from what the machine was measured to do (probes.py); likewise operators.

    lower bound = max(operations / rate, bytes / bandwidth) + synchronisation

Operations of a step, two for every multiply-add:

    gather   2 * 3 (B T E) H                       first layer forward, dW1, demb
    table    2 * 3 (T V E) H + 2 B T H             tables, dW1, dwte; look-up and segment sum are additions
    both     2 * 3 B V H  +  14 P                  logits, dW2, dh; AdamW on the P parameters
    direct   2 * 3 B V (T E)                       logits, dD, demb

Bytes: parameters and both moments are read once and written once, 24 P. They count at the bandwidth of a working set
of their size: at the default sizes they fit any cache.

Synchronisation: kernels and grid barriers. A launch costs what the host needs for an empty one, or, captured in a
graph, what an empty node takes; a barrier costs what was measured for that many programs. On the CPU it is left out.

The operations are those of the function, not of an implementation: a kernel that multiplies one-hot matrices or
computes a softmax in every program does more, and that is part of its distance from the lower bound.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlp_fast.kernels._model import choose_form
from mlp_fast.model.mlp import Shape

ADAMW_OPERATIONS = 14  # an element: 3 first moment, 4 second, 7 update
STATE_BYTES = 24  # a parameter: itself and two moments, 4 bytes each, read and written
GATHER_BACKENDS = ("reference-loop", "eager-raw", "eager", "compile-raw", "compile")

Probes = Mapping[str, Any]


class Cost(NamedTuple):
    """What is asked for at the least."""

    operations: float
    bytes: float


class Synchronisation(NamedTuple):
    """How a step waits: launches by the host, or captured, and barriers among so many programs."""

    launches: float = 0
    captured: bool = False
    barriers: float = 0
    programs: int = 0


class LowerBound(NamedTuple):
    """The parts of a step's lower bound, in milliseconds; a part that nothing was measured for is 0."""

    compute: float
    memory: float
    synchronisation: float

    @property
    def total(self) -> float:
        """Computing and moving overlap; waiting comes on top."""
        return max(self.compute, self.memory) + self.synchronisation


def step_cost(shape: Shape, batch_size: int, form: str) -> Cost:
    """Operations and bytes of a step in a form of the first layer, "table" or "gather"."""
    B, V, T, E, H = batch_size, shape.V, shape.T, shape.E, shape.H
    direct = 6 * B * V * T * E if shape.direct else 0
    P = shape.num_parameters
    operations = _first_layer(shape, B, form) + 6 * B * V * H + direct + ADAMW_OPERATIONS * P
    return Cost(operations, STATE_BYTES * P)


def _first_layer(shape: Shape, B: int, form: str) -> float:
    T, E, H = shape.T, shape.E, shape.H
    return 6 * T * shape.V * E * H + 2 * B * T * H if form == "table" else 6 * B * T * E * H


def operator_cost(name: str, shape: Shape, batch_size: int) -> Cost:
    """Of an operator in float32 with its backward pass, or of AdamW: each pass reads and writes a tensor once."""
    B, V, T, E, H = batch_size, shape.V, shape.T, shape.E, shape.H
    if name == "adamw":
        return Cost(ADAMW_OPERATIONS * shape.num_parameters, (STATE_BYTES + 4) * shape.num_parameters)
    if name.startswith("linear_cross_entropy"):  # h, weight and bias; their gradients; targets
        return Cost(6 * B * V * H, 4 * 3 * (B * H + V * H + V) + 2 * 8 * B)
    form = "table" if "-table" in name else "gather"
    # h; h and dh; wte, weight and bias, and their gradients; tokens
    return Cost(_first_layer(shape, B, form), 4 * 3 * (B * H + V * E + T * E * H + H) + 2 * 8 * B * T)


def evaluation_cost(shape: Shape, windows: int) -> Cost:
    """Of the mean loss over so many windows, in float32."""
    forward = shape.T * shape.E * shape.H + shape.H * shape.V
    return Cost(2 * windows * forward, 4 * shape.num_parameters + 8 * windows * (shape.T + 2))


def form_of(backend: str, form: str, shape: Shape, batch_size: int) -> str:
    """The form that a backend computes: autograd's is the gather form."""
    return "gather" if backend in GATHER_BACKENDS else choose_form(form, batch_size, shape.V)


def step_bound(
    cost: Cost, probes: Probes, precision: str, threads: int, sync: Synchronisation | None = None
) -> LowerBound | None:
    """The lower bound of a step, or None where the machine's rate was not measured.

    Args:
        probes: as probes.measure_all() returns them.
        threads: on the CPU, how many work; the rate measured for the nearest number counts.
        sync: how the step waits; nothing where None.
    """
    rate, bandwidth = _rate(probes, precision, threads), _bandwidth(probes, cost.bytes)
    if rate is None or bandwidth is None:
        return None
    waiting = _waiting(sync or Synchronisation(), probes)
    return LowerBound(1e3 * cost.operations / rate, 1e3 * cost.bytes / bandwidth, waiting)


def _nearest(measured: Mapping[str, float], number: float) -> float:
    """What was measured for the number nearest to this one."""
    return measured[min(measured, key=lambda key: abs(int(key) - number))]


def _rate(probes: Probes, precision: str, threads: int) -> float | None:
    """Operations per second: the FMA peak of so many threads on the CPU, the precision's matrix rate on CUDA."""
    if isinstance(probes.get("fma_rate"), Mapping):
        return _nearest(probes["fma_rate"], threads)
    fp32, tf32 = (rate if isinstance(rate := probes.get(name), float) else None for name in ("fp32_rate", "tf32_rate"))
    if precision == "fp32" or tf32 is None:
        return fp32
    # Three tensor-core products for one, unless plain FMA is faster.
    return tf32 if precision == "tf32" else max(tf32 / 3, fp32 or 0.0)


def _bandwidth(probes: Probes, size: float) -> float | None:
    """Bytes per second of the smallest measured working set that holds `size` bytes, else of the largest."""
    measured = probes.get("copy_bandwidth")
    if not isinstance(measured, Mapping):
        return None
    sets = sorted(int(key) for key in measured)
    return measured[str(next((bytes_ for bytes_ in sets if bytes_ >= size), sets[-1]))]


def _waiting(sync: Synchronisation, probes: Probes) -> float:
    """Milliseconds; of a wait that was not measured, none."""
    each, barriers = probes.get("graph_node" if sync.captured else "empty_launch"), probes.get("grid_barrier")
    total = sync.launches * each if isinstance(each, float) else 0.0
    if sync.barriers and isinstance(barriers, Mapping):
        total += sync.barriers * _nearest(barriers, sync.programs)
    return 1e3 * total

"""Lower bounds: the least operations and bytes of a step, an evaluation and operators, and by probes.py a step's time.

    lower bound = max(operations / rate, bytes / bandwidth) + synchronisation

Operations of a step, two for every multiply-add:

    gather   2 * 3 (B T E) H                       first layer forward, dW1, demb
    table    2 * 3 (T V E) H + 2 B T H             tables, dW1, dwte; look-up and segment sum are additions
    both     2 * 3 B V H  +  14 P                  logits, dW2, dh; AdamW on the P parameters
    direct   2 * 3 B V (T E)                       logits, dD, demb

Bytes: parameters and both moments are read once and written once, 24 P. They count at the bandwidth of a working set
of their size: at the default sizes they fit any cache.

Synchronisation: kernels and grid barriers. A launch takes the host's time for an empty one, or, captured in a graph,
the time of an empty node; a barrier takes the time that was measured for that many programs. The CPU has neither.

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
    """The least that computes a function."""

    operations: float
    bytes: float


class Synchronisation(NamedTuple):
    """The waits of a step: launches by the host, or captured, and barriers among so many programs."""

    launches: float = 0
    captured: bool = False
    barriers: float = 0
    programs: int = 0


class LowerBound(NamedTuple):
    """The parts of a step's lower bound, in milliseconds; a wait that was not measured is 0."""

    compute: float
    memory: float
    synchronisation: float

    @property
    def total(self) -> float:
        """Computation and memory traffic overlap; waits add to them."""
        return max(self.compute, self.memory) + self.synchronisation


def _operations(shape: Shape, B: int, form: str) -> dict[str, float]:
    """The operations of the parts of a step, by operator; of the products with their backward passes."""
    V, T, E, H = shape.V, shape.T, shape.E, shape.H
    return {
        "embed_linear_tanh": 6 * T * V * E * H + 2 * B * T * H if form == "table" else 6 * B * T * E * H,
        "linear_cross_entropy": 6 * B * V * H,
        "direct": 6 * B * V * T * E if shape.direct else 0,
        "adamw": ADAMW_OPERATIONS * shape.num_parameters,
    }


def step_cost(shape: Shape, batch_size: int, form: str) -> Cost:
    """The cost of a step in a form of the first layer, "table" or "gather"."""
    return Cost(sum(_operations(shape, batch_size, form).values()), STATE_BYTES * shape.num_parameters)


def operator_cost(name: str, shape: Shape, batch_size: int) -> Cost:
    """The cost of one of operators.OPERATORS in float32, with its backward pass: each pass moves each tensor once."""
    operator, form = name.partition("-")[0], "table" if "-table" in name else "gather"
    B, V, T, E, H = batch_size, shape.V, shape.T, shape.E, shape.H
    moved = {
        # Floats move three times, forward, backward and as gradients; tokens, of 8 bytes, twice.
        "embed_linear_tanh": 3 * 4 * (B * H + V * E + T * E * H + H) + 2 * 8 * B * T,
        "linear_cross_entropy": 3 * 4 * (B * H + V * H + V) + 2 * 8 * B,
        "adamw": (STATE_BYTES + 4) * shape.num_parameters,  # the gradient as well
    }
    return Cost(_operations(shape, B, form)[operator], moved[operator])


def evaluation_cost(shape: Shape, windows: int) -> Cost:
    """The cost of the mean loss over so many windows, in float32."""
    forward = shape.T * shape.E * shape.H + shape.H * shape.V
    return Cost(2 * windows * forward, 4 * shape.num_parameters + 8 * windows * (shape.T + 2))


def form_of(backend: str, form: str, shape: Shape, batch_size: int) -> str:
    """The form of the first layer that a backend computes: autograd's is the gather form."""
    return "gather" if backend in GATHER_BACKENDS else choose_form(form, batch_size, shape.V)


def step_bound(
    cost: Cost, probes: Probes, precision: str, threads: int, sync: Synchronisation | None = None
) -> LowerBound | None:
    """The lower bound of a step, or None where the machine's rate was not measured.

    Args:
        probes: as probes.measure_all() returns them.
        threads: on the CPU, those that work; the rate is that of the nearest number of threads measured.
        sync: the waits of the step; none where None.
    """
    rate, bandwidth = _rate(probes, precision, threads), _bandwidth(probes, cost.bytes)
    if rate is None or bandwidth is None:
        return None
    waiting = _waiting(sync or Synchronisation(), probes)
    return LowerBound(1e3 * cost.operations / rate, 1e3 * cost.bytes / bandwidth, waiting)


def _nearest(measured: Mapping[str, float], number: float) -> float:
    """The value that was measured for the number nearest to this one."""
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
    """Milliseconds; 0 for a wait that was not measured."""
    each, barriers = probes.get("graph_node" if sync.captured else "empty_launch"), probes.get("grid_barrier")
    total = sync.launches * each if isinstance(each, float) else 0.0
    if sync.barriers and isinstance(barriers, Mapping):
        total += sync.barriers * _nearest(barriers, sync.programs)
    return 1e3 * total

"""Whether a backend computes the model: 20 steps from the initial state, compared with the same steps in float64.

Compared are the losses, and after them the parameters and both moments. A backend may err by twice the error of eager
in the same precision, plus a tolerance:

    error(backend, float64) <= 2 * error(eager, float64) + tolerance

AdamW divides a gradient by its own size, so a wrong scale hardly shows in the parameters; it does in the moments.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.model.mlp import MLP, Parameters, Shape, initial_parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

BASELINE = "eager"
CHECK_STEPS = 20

# By precision: of a loss in nats, and of the state relative to its tensors. TF32 keeps 10 bits of an operand: 2^-10 is
# its rounding, and 5e-5 nats what that was seen to do to a loss.
LOSS_TOLERANCE = {"fp32": 1e-6, "tf32x3": 1e-6, "tf32": 5e-5}
STATE_TOLERANCE = {"fp32": 1e-5, "tf32x3": 1e-5, "tf32": 4e-3}
EAGER_TOLERANCES = 10  # eager is compared with float64 only, and may err by so many tolerances


class NotEquivalent(Exception):
    """A backend computes something else than the model; the message says what and by how much."""


@dataclass(frozen=True)
class Errors:
    """How far a run went from the float64 one.

    Attributes:
        loss: the largest difference of a batch loss, in nats.
        state: (part, parameter name) -> difference. Of a parameter the RMS over the tensor's own: a gradient that is
            zero but for rounding moves single elements by a whole learning rate. Of a moment the largest over the
            tensor's largest.
    """

    loss: float
    state: dict[tuple[str, str], float]


class Verifier:
    """Compares backends with float64 and with eager.

    Args:
        config: sizes, schedule and precision of the runs to be compared.
        shape: the model's sizes.
        tape: the training split, on the CPU.
    """

    def __init__(self, config: Config, shape: Shape, tape: Tape) -> None:
        self.config = config
        self.initial = TrainState.initial(shape, config.seed)
        self.steps = min(CHECK_STEPS, config.num_steps)
        self.losses, self.state = float64_run(config, shape, tape, self.steps)
        self.eager = self._errors(backends.create(replace(config, backend=BASELINE), shape, tape, self.initial))

    def check(self, backend: Backend) -> float:
        """The backend's largest loss error, in nats; it is left at the initial state.

        Raises:
            NotEquivalent: an error exceeds its limit.
        """

        def limit(eager: float, tolerance: float) -> float:
            return EAGER_TOLERANCES * tolerance if backend.name == BASELINE else 2 * eager + tolerance

        errors, precision = self._errors(backend), self.config.precision
        require(backend.name, "a loss", errors.loss, limit(self.eager.loss, LOSS_TOLERANCE[precision]))
        for (part, name), error in errors.state.items():
            most = limit(self.eager.state[part, name], STATE_TOLERANCE[precision])
            require(backend.name, f"{part} of {name}, relative,", error, most)
        return errors.loss

    def _errors(self, backend: Backend) -> Errors:
        backend.load(self.initial)
        losses = backend.advance(self.steps).double().cpu()
        found = backend.state().parts
        backend.load(self.initial)
        state = {
            (part, name): _relative_error(found[part][name], true, largest=part != "parameters")
            for part, tensors in self.state.parts.items()
            for name, true in tensors.items()
        }
        return Errors((losses - self.losses).abs().max().item(), state)


def float64_run(config: Config, shape: Shape, tape: Tape, steps: int) -> tuple[Tensor, TrainState]:
    """The first steps of a run in float64 on the CPU, under autograd with torch's AdamW: batch losses and state."""
    model = MLP(shape, initial_parameters(shape, config.seed)).double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(BETA1, BETA2), eps=EPS, weight_decay=config.weight_decay
    )
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        _, loss = model(*tape.batch(step, config.batch_size))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    tensors = dict(model.named_parameters())

    def moment(key: str) -> Parameters:
        return {name: optimizer.state[tensors[name]][key] for name in shape.parameters}

    parameters = {name: tensors[name].detach() for name in shape.parameters}
    return torch.stack(losses), TrainState(parameters, moment("exp_avg"), moment("exp_avg_sq"), steps)


def _relative_error(found: Tensor, true: Tensor, *, largest: bool) -> float:
    """The error over the true tensor's size, both by the largest element or the RMS; over zeros, the error itself."""
    order = math.inf if largest else 2
    error, size = (torch.linalg.vector_norm(tensor, order) for tensor in (found - true, true))
    return (error / size if size > 0 else error).item()


def require(name: str, what: str, error: float, limit: float) -> None:
    """NotEquivalent where something that `name` computed is off by more than the limit, or is not a number."""
    if not (math.isfinite(error) and error <= limit):
        raise NotEquivalent(f"{name} is not equivalent: {what} is off by {error:.1e} (at most {limit:.1e} may be)")

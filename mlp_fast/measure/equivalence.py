"""Whether a backend computes the model: 20 steps from the initial state, compared with the same steps in float64.

Compared are the losses, and after them the parameters and both moments. A backend may err by twice the error of eager
in the same precision, plus a tolerance:

    error(backend, float64) <= 2 * error(eager, float64) + tolerance

AdamW divides a gradient by its own size, so a wrong scale hardly shows in the parameters; it does in the moments.
"""

import math
from dataclasses import replace

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
LOSS = "a loss"
CHECK_STEPS = 20

# By precision: of a loss in nats, and of the state relative to its tensors. TF32 keeps 10 bits of an operand: 2^-10 is
# its rounding, and 5e-5 nats what that was seen to do to a loss.
LOSS_TOLERANCE = {"fp32": 1e-6, "tf32x3": 1e-6, "tf32": 5e-5}
STATE_TOLERANCE = {"fp32": 1e-5, "tf32x3": 1e-5, "tf32": 4e-3}
EAGER_TOLERANCES = 10  # eager is compared with float64 only, and may err by so many tolerances


class NotEquivalent(Exception):
    """A backend computes something else than the model; the message says what and by how much."""


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
        errors = self._errors(backend)
        for what, error in errors.items():
            tolerance = (LOSS_TOLERANCE if what == LOSS else STATE_TOLERANCE)[self.config.precision]
            limit = EAGER_TOLERANCES * tolerance if backend.name == BASELINE else 2 * self.eager[what] + tolerance
            require(backend.name, what, error, limit)
        return errors[LOSS]

    def _errors(self, backend: Backend) -> dict[str, float]:
        """What is compared, in words -> how far it is from the float64 run.

        A loss in nats, the largest over the steps. A parameter by the RMS over the tensor's own: a gradient that is
        zero but for rounding moves single elements by a whole learning rate. A moment by its largest over the tensor's.
        """
        backend.load(self.initial)
        losses = backend.advance(self.steps).double().cpu()
        found = backend.state().parts
        backend.load(self.initial)
        errors = {LOSS: (losses - self.losses).abs().max().item()}
        for part, tensors in self.state.parts.items():
            for name, true in tensors.items():
                order = 2 if part == "parameters" else math.inf
                error, size = (torch.linalg.vector_norm(t, order) for t in (found[part][name] - true, true))
                errors[f"{part} of {name}, relative,"] = (error / size if size > 0 else error).item()
        return errors


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


def require(name: str, what: str, error: float, limit: float) -> None:
    """NotEquivalent where something that `name` computed is off by more than the limit, or is not a number."""
    if not (math.isfinite(error) and error <= limit):
        raise NotEquivalent(f"{name} is not equivalent: {what} is off by {error:.1e} (at most {limit:.1e} may be)")

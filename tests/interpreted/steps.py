"""What the tests of the step kernels share: a problem of any size, its float64 run, and the rule of comparison."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fast.backends.eager import Eager
from mlp_fast.config import Config
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.model.mlp import MLP, PARAMETER_NAMES, Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

CPU = torch.device("cpu")
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # of the kernels


@dataclass
class Problem:
    """A model, its tape and its settings."""

    config: Config
    shape: Shape
    tape: Tape
    state: TrainState

    @property
    def planes(self) -> list[list[Tensor]]:
        """The state as the launchers take it."""
        return planes(self.state)


def problem(B: int, V: int, T: int, E: int, H: int, n: int, *, num_steps: int = 100, **settings: object) -> Problem:
    """A problem on random tokens, at a state with moments that are not zero."""
    generator = torch.Generator().manual_seed(B + V + T + E + H)
    tokens = torch.randint(0, V, (n,), generator=generator)
    config = Config(context_length=T, embedding_size=E, hidden_size=H, batch_size=B, num_steps=num_steps, **settings)  # type: ignore[arg-type]
    shape = Shape(V, T, E, H)
    state = TrainState.initial(shape, 1337)
    for name in PARAMETER_NAMES:
        state.exp_avg[name].copy_(1e-3 * torch.randn(state.exp_avg[name].shape, generator=generator))
        state.exp_avg_sq[name].copy_(1e-5 * torch.rand(state.exp_avg[name].shape, generator=generator))
    return Problem(config, shape, Tape(tokens, T), state)


def planes(state: TrainState) -> list[list[Tensor]]:
    """Parameters and moments in order."""
    return [[part[name] for name in PARAMETER_NAMES] for part in (state.parameters, state.exp_avg, state.exp_avg_sq)]


class Truth:
    """The same training in float64: torch's autograd and torch.optim.AdamW."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.step = problem, problem.state.step
        self.model = MLP(problem.shape, problem.state.parameters).double()
        config = problem.config
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=config.weight_decay)
        for name, tensor in self.model.named_parameters():
            self.optimizer.state[tensor] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": problem.state.exp_avg[name].double(),
                "exp_avg_sq": problem.state.exp_avg_sq[name].double(),
            }

    def advance(self, steps: int) -> Tensor:
        """So many steps; their losses."""
        config, losses = self.problem.config, []
        for _ in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / config.num_steps))
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * cosine
            self.optimizer.zero_grad()
            _, loss = self.model(*self.problem.tape.batch(self.step, config.batch_size))
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.step += 1
        return torch.stack(losses)

    def planes(self) -> list[list[Tensor]]:
        """Parameters and moments in order, float64."""
        parameters = list(self.model.parameters())
        moments = [[self.optimizer.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq")]
        return [[p.detach() for p in parameters], *moments]


class Reference:
    """The float64 run of a problem and eager's float32 run beside it."""

    def __init__(self, problem: Problem) -> None:
        self.truth = Truth(problem)
        self.eager = Eager(problem.config, problem.shape, problem.tape, problem.state, CPU)

    def advance(self, steps: int) -> Tensor:
        """Moves both; the float64 losses."""
        self.eager.advance(steps)
        return self.truth.advance(steps)

    def check(self, got: list[list[Tensor]]) -> None:
        """Every tensor is at most twice as far from float64, by norm, as eager is, and 1e-6."""
        torch_runs = planes(self.eager.state())
        for kind, held, eager, true in zip("pmv", got, torch_runs, self.truth.planes(), strict=True):
            for name, a, b, t in zip(PARAMETER_NAMES, held, eager, true, strict=True):
                ours, theirs = (a.double().cpu() - t).norm().item(), (b.double() - t).norm().item()
                assert ours <= 2 * theirs + 1e-6, f"{kind} of {name}: {ours:.2e}, eager {theirs:.2e}"

"""The baselines: MLPRaw and MLP under autograd, with torch.optim.AdamW."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.precision import MATMUL_PRECISION, unsupported_by_torch
from mlp_fast.config import Config
from mlp_fast.model.mlp import DIRECT, MLP, W1, W2, MLPRaw, Parameters, Shape
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape


class AutogradLoop(Backend):
    """A training loop of loss.backward() and optimizer.step() around a model."""

    model: Any
    limits = "any sizes, with (B, V) logits in memory"
    direct = True
    distributed = True
    host_tape = True
    transposed: ClassVar[frozenset[str]] = frozenset()  # parameters that the model holds as the transposed view

    def __init__(self, config: Config, shape: Shape, tape: Tape, state: TrainState, device: torch.device) -> None:
        super().__init__(config, shape, tape, state, device)
        torch.set_float32_matmul_precision(MATMUL_PRECISION[config.precision])
        self._build(state.parameters)
        self.loss = self._loss  # the function that the compiled backends replace
        self.optimizer = torch.optim.AdamW(
            self._tensors().values(),
            lr=config.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=config.weight_decay,
        )
        self.load(state)

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        return None if shape is None else unsupported_by_torch(config.precision, device)

    def _build(self, parameters: Parameters) -> None:
        raise NotImplementedError

    def _tensors(self) -> Parameters:
        return dict(self.model.named_parameters())

    def prepare(self) -> None:
        if self.world.size > 1:
            # Compiles without the others: their compilers may take their time.
            self._gradients(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            self.world.barrier()
        super().prepare()

    def advance(self, steps: int) -> Tensor:
        losses = torch.empty(steps, device=self.device)
        tensors = list(self._tensors().values())
        for i in range(steps):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.config)
            losses[i] = self._gradients(self.step)
            self.world.all_reduce_gradients([tensor.grad for tensor in tensors if tensor.grad is not None])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return self.world.all_reduce_(losses)

    def _gradients(self, step: int) -> Tensor:
        """Adds this rank's part of a step's gradients to .grad; returns its part of the batch loss."""
        part = self.world.shard(self.config.batch_size)
        contexts, targets = self.tape.batch(step, self.config.batch_size, part)
        loss = self.loss(contexts, targets)
        if self.world.size > 1:
            loss = loss * (len(targets) / self.config.batch_size)
        loss.backward()
        return loss.detach()

    def _loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        return self.model(contexts, targets)[1]

    def state(self) -> TrainState:
        held = {
            name: {"parameters": tensor, **self.optimizer.state[tensor]} for name, tensor in self._tensors().items()
        }
        parameters, exp_avg, exp_avg_sq = (
            {name: self._stored(name, tensors[part]) for name, tensors in held.items()}
            for part in ("parameters", "exp_avg", "exp_avg_sq")
        )
        return TrainState(parameters, exp_avg, exp_avg_sq, self.step)

    def load(self, state: TrainState) -> None:
        self.step = state.step
        for name, tensor in self._tensors().items():
            with torch.no_grad():
                tensor.copy_(self._held(name, state.parameters[name]))
            self.optimizer.state[tensor] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": torch.empty_like(tensor).copy_(self._held(name, state.exp_avg[name])),
                "exp_avg_sq": torch.empty_like(tensor).copy_(self._held(name, state.exp_avg_sq[name])),
            }

    def logits(self, contexts: Tensor) -> Tensor:
        return self.model(contexts)[0]

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """A stored tensor as the model holds it."""
        return tensor.t() if name in self.transposed else tensor

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as the state stores it: copied, contiguous, on the CPU."""
        view = tensor.detach().t() if name in self.transposed else tensor.detach()
        return view.to("cpu", copy=True).contiguous()


class EagerRaw(AutogradLoop):
    """MLPRaw: every operation spelled out on bare tensors, its weights transposed views of the stored ones."""

    name = "eager-raw"
    summary = "MLPRaw, bare tensors under autograd: the first baseline"
    transposed = frozenset({W1, W2, DIRECT})

    def _build(self, parameters: Parameters) -> None:
        self.model = MLPRaw({name: tensor.to(self.device) for name, tensor in parameters.items()})

    def _tensors(self) -> Parameters:
        return self.model.parameters()


class Eager(AutogradLoop):
    """MLP, an nn.Module: the baseline that every other backend's time and error are compared with."""

    name = "eager"
    summary = "MLP, an nn.Module under autograd: the second baseline"

    def _build(self, parameters: Parameters) -> None:
        self.model = MLP(self.shape, parameters).to(self.device)

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

    def build(self) -> None:
        torch.set_float32_matmul_precision(MATMUL_PRECISION[self.config.precision])
        tensors = self._make_model()
        self.loss = self._loss  # the function that the compiled backends replace
        self.optimizer = torch.optim.AdamW(
            tensors.values(),
            lr=self.config.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=self.config.weight_decay,
        )
        exp_avg, exp_avg_sq = ({name: torch.zeros_like(t) for name, t in tensors.items()} for _ in range(2))
        for name, tensor in tensors.items():
            moments = {"exp_avg": exp_avg[name], "exp_avg_sq": exp_avg_sq[name]}
            self.optimizer.state[tensor] = {"step": torch.tensor(0.0), **moments}
        self.tensors = tensors
        self.parts = [  # in the shapes in which they are stored
            {name: t.detach().t() if name in self.transposed else t.detach() for name, t in part.items()}
            for part in (tensors, exp_avg, exp_avg_sq)
        ]

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        return None if shape is None else unsupported_by_torch(config.precision, device)

    def _make_model(self) -> Parameters:
        """Makes `model`, its values of no matter; returns its parameters."""
        raise NotImplementedError

    def prepare(self) -> None:
        if self.world.size > 1:
            # Compiles without the others: their compilers may take their time.
            self._gradients(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            self.world.barrier()
        super().prepare()

    def advance(self, steps: int) -> Tensor:
        losses = torch.empty(steps, device=self.device)
        for i in range(steps):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.config)
            losses[i] = self._gradients(self.step)
            self.world.all_reduce_gradients([t.grad for t in self.tensors.values() if t.grad is not None])
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
        return TrainState.copied(self.parts, self.step)

    def load(self, state: TrainState) -> None:
        state.copy_to(self.parts)
        self.step = state.step
        for held in self.optimizer.state.values():
            held["step"].fill_(state.step)

    def logits(self, contexts: Tensor) -> Tensor:
        return self.model(contexts)[0]


class EagerRaw(AutogradLoop):
    """MLPRaw: every operation spelled out on bare tensors, its weights transposed views of the stored ones."""

    name = "eager-raw"
    summary = "MLPRaw, bare tensors under autograd: the first baseline"
    transposed = frozenset({W1, W2, DIRECT})

    def _make_model(self) -> Parameters:
        self.model = MLPRaw({name: torch.empty(s, device=self.device) for name, s in self.shape.parameters.items()})
        return self.model.parameters()


class Eager(AutogradLoop):
    """MLP, an nn.Module: the baseline that every other backend's time and error are compared with."""

    name = "eager"
    summary = "MLP, an nn.Module under autograd: the second baseline"

    def _make_model(self) -> Parameters:
        self.model = MLP(self.shape).to(self.device)
        return dict(self.model.named_parameters())

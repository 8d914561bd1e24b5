"""The baselines: MLPRaw and MLP under autograd, with torch.optim.AdamW."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.requirements import use_precision
from mlp_fast.model.mlp import DIRECT, MLP, W1, W2, MLPRaw, Parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate
from mlp_fast.model.state import TrainState


class AutogradBackend(Backend):
    """A model under autograd; the processes of torchrun share a batch.

    A rank's loss is the mean over its rows times their part of the batch, so that the sums over the ranks, of losses as
    of gradients, are those of the batch.
    """

    model: Any  # contexts and, where they are given, targets -> logits and the mean cross-entropy
    tensors: Parameters  # of the model
    loss: Callable[[Tensor, Tensor], Tensor]  # _loss, or its compiled form
    direct = True
    distributed = True

    def _loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        return self.model(contexts, targets)[1]

    def rank_loss(self, step: int | Tensor) -> Tensor:
        """This rank's part of a step's batch loss, a scalar with its graph."""
        batch_size = self.config.batch_size
        contexts, targets = self.tape.batch(step, batch_size, self.world.shard(batch_size))
        loss = self.loss(contexts, targets)
        return loss if self.world.size == 1 else loss * (len(targets) / batch_size)

    def prepare(self) -> None:
        if self.world.size > 1:
            # Compiles without the others: their compilers may take their time.
            torch.autograd.grad(self.rank_loss(self.held.step), list(self.tensors.values()))
            self.world.barrier()
        super().prepare()

    @torch.no_grad()
    def logits(self, contexts: Tensor) -> Tensor:
        return self.model(contexts)[0]


class AutogradLoop(AutogradBackend):
    """A training loop of loss.backward() and optimizer.step() around a model."""

    limits = "any sizes, with (B, V) logits in memory"
    host_tape = True
    transposed: ClassVar[frozenset[str]] = frozenset()  # parameters that the model holds as the transposed view

    def build(self) -> None:
        use_precision(self.config.precision)
        self.tensors = self._make_model()
        self.loss = self._loss
        self.optimizer = torch.optim.AdamW(
            self.tensors.values(),
            lr=self.config.learning_rate,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=self.config.weight_decay,
        )
        self.held = TrainState.of({name: self._turned(name, t.detach()) for name, t in self.tensors.items()})
        for name, tensor in self.tensors.items():
            moments = {kind: self._turned(name, self.held.parts[kind][name]) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[tensor] = {"step": torch.tensor(0.0), **moments}

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the model holds it, from one as it is stored; and back."""
        return tensor.t() if name in self.transposed else tensor

    @abstractmethod
    def _make_model(self) -> Parameters:
        """Makes `model`, its values of no matter; returns its parameters."""

    def advance(self, steps: int) -> Tensor:
        losses = torch.empty(steps, device=self.device)
        for i in range(steps):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.held.step, self.config)
            losses[i] = self._gradients(self.held.step)
            self.world.all_reduce_gradients([t.grad for t in self.tensors.values() if t.grad is not None])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.held.step += 1
        return self.world.all_reduce_(losses)

    def _gradients(self, step: int) -> Tensor:
        """Adds this rank's part of a step's gradients to .grad; returns its part of the batch loss."""
        loss = self.rank_loss(step)
        loss.backward()
        return loss.detach()

    def load(self, state: TrainState) -> None:
        super().load(state)
        for held in self.optimizer.state.values():
            held["step"].fill_(state.step)


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

"""The fused operators (mlp_fast.ops) in an ordinary training loop under autograd; on CUDA many steps in one graph."""

import torch
from torch import Tensor

from mlp_fast.backends.device_loop import DeviceLoop
from mlp_fast.backends.precision import unsupported_by_triton
from mlp_fast.backends.step_kernels import kernels_missing
from mlp_fast.config import Config
from mlp_fast.model.mlp import Shape
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rates
from mlp_fast.model.windows import Tape
from mlp_fast.ops import FusedMLP, adamw_


class TritonOp(DeviceLoop):
    """FusedMLP, its gradients by autograd, and ops.adamw_.

    Several processes exchange gradients at every step, and capture nothing.
    """

    name = "triton-op"
    summary = "the fused operators under autograd, in one CUDA graph of steps"
    limits = "any sizes, its logits never in memory"
    direct = True
    distributed = True

    def build(self) -> None:
        config = self.config
        self.model = FusedMLP(self.shape, form=config.form, precision=config.precision).to(self.device)
        self.rates = learning_rates(config, 0, config.num_steps).to(self.device)
        self.parameters = dict(self.model.named_parameters())
        super().build()

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        reason = kernels_missing(device)
        return reason if reason or shape is None else unsupported_by_triton(config.precision, device)

    def _gradients(self) -> tuple[Tensor, list[Tensor]]:
        """This rank's part of the batch loss, and of the gradients."""
        contexts, targets = self.tape.batch(self.step, self.config.batch_size, self.world.shard(self.config.batch_size))
        _, loss = self.model(contexts, targets)
        if self.world.size > 1:
            loss = loss * (len(targets) / self.config.batch_size)
        return loss.detach(), list(torch.autograd.grad(loss, list(self.parameters.values())))

    def _step(self) -> None:
        loss, gradients = self._gradients()
        self.world.all_reduce_gradients(gradients)
        lr = self.rates.index_select(0, self.step)
        self.losses.index_copy_(0, self.step % self.GRAPH_STEPS, loss.view(1))
        self.step += 1  # AdamW counts its updates from 1
        adamw_(
            list(self.parameters.values()),
            gradients,
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            self.step,
            lr,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=self.config.weight_decay,
        )

    def prepare(self) -> None:
        if self.world.size > 1:
            self._gradients()  # compiles without the others: their compilers may take their time
            self.world.barrier()
        super().prepare()

    def evaluated_counts(self) -> set[int]:
        # Its first layer has a form for as many windows as there are tokens, and one for more; both have tiles for few
        # windows and for many.
        return super().evaluated_counts() | {min(self.shape.V, self.evaluation_rows), self.evaluation_rows}

    def advance(self, steps: int) -> Tensor:
        return self.world.all_reduce_(super().advance(steps))

    def logits(self, contexts: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(contexts)[0]

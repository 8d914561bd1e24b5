"""The fused operators (mlp_fast.ops) in an ordinary training loop under autograd; on CUDA many steps in one graph."""

import torch
from torch import Tensor

from mlp_fast.backends.device_loop import DeviceLoop
from mlp_fast.backends.eager import AutogradBackend
from mlp_fast.backends.requirements import triton_missing, unsupported_by_triton
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rates
from mlp_fast.ops import FusedMLP, adamw_


class TritonOp(AutogradBackend, DeviceLoop):
    """FusedMLP, its gradients by autograd, and ops.adamw_.

    Several processes exchange gradients at every step, and capture nothing.
    """

    name = "triton-op"
    summary = "the fused operators under autograd, in one CUDA graph of steps"
    limits = "any sizes, its logits never in memory"
    missing = staticmethod(triton_missing)
    unsupported_precision = staticmethod(unsupported_by_triton)

    def build(self) -> None:
        config = self.config
        self.model = FusedMLP(self.shape, form=config.form, precision=config.precision).to(self.device)
        self.tensors = dict(self.model.named_parameters())
        self.loss = self._loss
        self.rates = learning_rates(config, 0, config.num_steps).to(self.device)
        self.build_loop(self.tensors)

    def _step(self) -> None:
        parameters = list(self.tensors.values())
        loss = self.rank_loss(self.device_step)
        gradients = list(torch.autograd.grad(loss, parameters))
        self.world.all_reduce_gradients(gradients)
        lr = self.rates.index_select(0, self.device_step)
        self.losses.index_copy_(0, self.device_step % self.GRAPH_STEPS, loss.detach().view(1))
        self.device_step += 1  # AdamW counts its updates from 1
        adamw_(
            parameters,
            gradients,
            list(self.held.exp_avg.values()),
            list(self.held.exp_avg_sq.values()),
            self.device_step,
            lr,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=self.config.weight_decay,
        )

    def evaluated_counts(self) -> set[int]:
        # Its first layer has a form for as many windows as there are tokens, and one for more; both have tiles for few
        # windows and for many.
        return super().evaluated_counts() | {min(self.shape.V, self.evaluation_rows), self.evaluation_rows}

    def advance(self, steps: int) -> Tensor:
        return self.world.all_reduce_(super().advance(steps))

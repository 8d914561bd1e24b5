"""Many steps in one launch (kernels/persistent_step.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlp_fast.backends.step_kernels import StepKernels
from mlp_fast.errors import UserError

if TYPE_CHECKING:
    from mlp_fast.kernels.persistent_step import PersistentStep


class TritonPersistent(StepKernels):
    """One cooperative launch per call of advance(), a grid barrier between the phases of a step.

    Raises:
        UserError: from synchronize(), where the programs waited for each other in vain; the state is void then.
    """

    name = "triton-persistent"
    summary = "many steps in one cooperative launch"
    module, launcher = "persistent_step", "PersistentStep"
    kernels: PersistentStep

    def of_the_device(self) -> dict[str, int]:
        major, minor = torch.cuda.get_device_capability(self.device)
        return super().of_the_device() | {"capability": 10 * major + minor}

    def synchronize(self) -> None:
        from mlp_fast.kernels._barrier import BarrierTimeout

        super().synchronize()
        try:
            self.kernels.wait()
        except BarrierTimeout as error:
            raise UserError(f"--backend {self.name}: {error}; go on from a checkpoint (--resume)") from None

"""tanh and exp as the backends compute them, on a million arguments of a real run: nothing is shifted in one direction.

A mean error does not cancel from step to step, as roundings do. So it is held below a hundredth of a unit in the last
place, of tanh also with the sign of the result. exp may have two: a common factor of all exponentials leaves softmax.
"""

import pytest
import torch
from torch import Tensor
from updates import Difference, pre_activations

from mlp_fast.kernels import cpu_step

pytestmark = pytest.mark.usefixtures("one_thread")
ISAS = cpu_step.instruction_sets() if cpu_step.unavailable() is None else ()


def difference(got: Tensor, exact: Tensor) -> Difference:
    """From the float64 truth, in ulp of it."""
    return Difference.of(got, exact, exact.float())


def test_eager() -> None:
    x = pre_activations()
    difference(torch.tanh(x), x.double().tanh()).check("tanh", largest=1, equal=0)


@pytest.mark.parametrize("isa", ISAS)
def test_native(isa: str) -> None:
    x = pre_activations()
    difference(cpu_step.tanh(x, isa), x.double().tanh()).check("tanh", largest=6, equal=0)
    z = -x.abs() * 4
    found = difference(cpu_step.exp(z, isa), z.double().exp())
    assert abs(found.mean) < 0.02
    assert found.largest <= 1.5

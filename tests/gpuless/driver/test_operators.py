"""What the operators do on a GPU that lacks an arithmetic."""

from collections.abc import Callable
from typing import Any


def test_a_t4_is_told_what_it_lacks_in_one_line(on_stub_gpu: Callable[..., Any]) -> None:
    lacking = {
        ("float32", "tf32"): "precision 'tf32' needs",
        ("float32", "tf32x3"): "precision 'tf32x3' needs",
        ("bfloat16", "fp32"): "bf16 operands need",
    }
    arithmetics = [*lacking, ("float32", "fp32"), ("float16", "tf32")]
    *refused, fp32, fp16 = on_stub_gpu("operators.py", capability=75, processors=40, arithmetics=arithmetics)
    rest = "a GPU from sm_80 on, not sm_75; use fp32"
    assert refused == [[f"ValueError: {what} {rest}"] * 2 for what in lacking.values()]
    # What it has it computes; TF32 is an arithmetic of float32 only.
    for embed, loss in (fp32, fp16):
        assert embed == ["embed_linear_tanh_fwd_gather_kernel"]
        assert loss == ["linear_cross_entropy_fwd_kernel"]

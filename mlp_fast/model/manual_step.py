"""One training step as plain tensor algebra, with the backward pass and AdamW written out.

The formulas that the kernels compute, in the form in which torch.compile makes one graph of them. The first layer
has two forms, the same function with its additions in another order:

    gather   pre = wte[idx].flatten(1) @ W1^T + b1
    table    P[t, k] = wte[k] @ W1[:, t]^T for every token k;  pre[b] = b1 + sum_t P[t, idx[b, t]]

The table form costs T*V*E*H multiply-adds in place of B*T*E*H. Direct connections D are a product with emb = wte[idx]
in both forms: V columns an element of the batch leave nothing to save. Backward, with g the gradient of pre:

    gather   dW1 = g^T @ emb;  demb = g @ W1;  dwte[k] = sum of demb[b, t] where idx[b, t] = k
    table    dP[t, k] = sum of g[b] where idx[b, t] = k;  dW1[:, t] = dP[t]^T @ wte;  dwte = sum_t dP[t] @ W1[:, t]
    direct   dD = dlogits^T @ emb;  demb += dlogits @ D

Only the table form makes a one-hot matrix, (T, B, V) with V of the order of B; the gather form's memory grows with V by
the logits, (B, V), and the gradients alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fast.model.mlp import B1, B2, DIRECT, PARAMETER_NAMES, W1, W2, WTE, Parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS


def forward(parameters: Parameters, idx: Tensor, form: str = "gather") -> tuple[Tensor, Tensor, Tensor]:
    """Contexts (B, T), int64 -> emb (B, T*E), h (B, H) and logits (B, V), in the dtype of the parameters."""
    wte, w1, b1, w2, b2 = (parameters[name] for name in PARAMETER_NAMES)
    T = idx.shape[1]
    emb = wte[idx].flatten(1)  # the table form without D makes no use of it: the compiler drops it
    if form == "table":
        table = wte @ by_position(w1, T).transpose(1, 2)  # (T, V, H)
        pre = b1 + sum(table[t][idx[:, t]] for t in range(T))
    else:
        pre = emb @ w1.t() + b1
    h = torch.tanh(pre)
    logits = h @ w2.t() + b2
    return emb, h, logits + emb @ parameters[DIRECT].t() if DIRECT in parameters else logits


def by_position(w1: Tensor, T: int) -> Tensor:
    """W1 (H, T*E) as a view (T, H, E)."""
    return w1.view(len(w1), T, -1).transpose(0, 1)


def loss_and_gradients(parameters: Parameters, idx: Tensor, targets: Tensor, form: str) -> tuple[Tensor, Parameters]:
    """The batch loss and its gradient by hand.

    Args:
        parameters: under the names of Shape.parameters, of any one floating dtype.
        idx, targets: (B, T) and (B,), int64.
        form: "table" or "gather".

    Returns:
        The mean cross-entropy in nats, a scalar, and a gradient for every parameter.
    """
    wte, w1, w2 = parameters[WTE], parameters[W1], parameters[W2]
    (B, T), (V, E), H = idx.shape, wte.shape, len(w1)
    emb, h, logits = forward(parameters, idx, form)
    log_probabilities = torch.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_probabilities, targets)

    # dlogits = (softmax - onehot) / B;  dpre = (dlogits @ W2) (1 - h^2)
    is_target = torch.arange(V, device=idx.device) == targets[:, None]  # one_hot would be int64 and in memory
    dlogits = (log_probabilities.exp() - is_target.to(wte.dtype)) / B
    dpre = (dlogits @ w2) * (1 - h * h)
    if form == "table":
        one_hot = F.one_hot(idx.t(), V).to(wte.dtype)  # (T, B, V)
        dtable = one_hot.transpose(1, 2) @ dpre  # (T, V, H)
        dw1 = (dtable.transpose(1, 2) @ wte).transpose(0, 1).reshape(H, T * E)
        dwte = (dtable @ by_position(w1, T)).sum(0)
        demb = None
    else:
        dw1 = dpre.t() @ emb
        dwte = torch.zeros_like(wte)
        demb = dpre @ w1
    gradients = {W1: dw1, B1: dpre.sum(0), W2: dlogits.t() @ h, B2: dlogits.sum(0)}
    if DIRECT in parameters:
        gradients[DIRECT] = dlogits.t() @ emb
        through_direct = dlogits @ parameters[DIRECT]
        demb = through_direct if demb is None else demb + through_direct
    # dwte[k] += sum of demb[b, t] where idx[b, t] = k
    gradients[WTE] = dwte if demb is None else dwte.index_add(0, idx.flatten(), demb.view(B * T, E))
    return loss, gradients


def adamw_(
    parameters: Parameters, gradients: Parameters, exp_avg: Parameters, exp_avg_sq: Parameters, scalars: Tensor
) -> None:
    """AdamW in place (Loshchilov and Hutter 2019), as torch.optim.AdamW orders its operations.

    Args:
        scalars: (3,), the step's row of schedule.update_scalars().
    """
    decay, step_size, sqrt_bias2 = scalars.unbind()
    for name, parameter in parameters.items():
        m, v, gradient = exp_avg[name], exp_avg_sq[name], gradients[name]
        m.lerp_(gradient, 1 - BETA1)  # m = beta1 m + (1 - beta1) g
        v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)  # v = beta2 v + (1 - beta2) g^2
        parameter.mul_(decay).sub_(step_size * m / (v.sqrt() / sqrt_bias2 + EPS))

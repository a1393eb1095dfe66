"""The output head and its cross-entropy, in chunks, so that (B, T, V) logits are never held whole in training."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of up to this many elements (64 MiB in fp32) are kept for the backward pass; more are made again, chunk by
# chunk, which costs one product with the head and bounds the memory.
CHUNK = 1 << 24


class Scores(NamedTuple):
    """What a loss needs to know of the logits z at each target, all fp32 and (B, T). Ignored targets (-100) have 0."""

    logprob: Tensor  # log p(target)
    logz: Tensor  # logsumexp of z: its square is the z-loss (PaLM, 2022)
    mean_logprob: Tensor  # mean over the vocabulary of log p: label smoothing
    entropy: Tensor  # -sum p log p, for metrics: carries no gradient
    correct: Tensor  # 1 where no other token is likelier than the target, for metrics: carries no gradient


def soft_cap(z: Tensor, cap: float | None) -> Tensor:
    """cap tanh(z / cap): logits that stay within +-cap (Gemma 2, 2024); None leaves them."""
    return z if cap is None else cap * torch.tanh(z / cap)


def scores(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None, chunk: int = CHUNK) -> Scores:
    """x (B, T, D), weight (V, D), targets (B, T) with -100 ignored -> Scores of (B, T) of the logits soft_cap(x W^T).

    The product runs in x's dtype (autocast's where that is on), everything after it in fp32, and the gradient of
    `weight` is summed in fp32. Logits are made of states with a target alone: prompts and padding cost nothing here."""
    B, T, D = x.shape
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _Scores.apply(x.reshape(-1, D), weight, targets.reshape(-1), cap, max(1, chunk // weight.shape[0]))
    return Scores(*(s.view(B, T) for s in out))


class _Scores(torch.autograd.Function):
    """With p = softmax(z): d logprob = onehot - p, d logz = p, d mean_logprob = 1/V - p."""

    @staticmethod
    def forward(ctx, x, weight, targets, cap, rows):
        ctx.set_materialize_grads(False)  # what no loss looks at then has None for its gradient
        at = (targets >= 0).nonzero()[:, 0]
        if len(at) == len(targets):
            at = None
        x, target = (x, targets) if at is None else (x[at], targets[at])
        keep = x.shape[0] <= rows and any(ctx.needs_input_grad)
        w = weight.to(x.dtype)
        found = torch.zeros((len(Scores._fields), len(target)), device=x.device)
        kept = None
        for i in range(0, x.shape[0], rows):
            z = soft_cap(F.linear(x[i : i + rows], w).float(), cap)
            of_target = z.gather(-1, target[i : i + rows, None])[:, 0]
            top = z.amax(-1)
            p = (z - top[:, None]).exp_()
            mass = p.sum(-1)
            logz = top + mass.log()
            mean = z.mean(-1) - logz
            correct = of_target >= top
            p /= mass[:, None]
            entropy = logz - torch.linalg.vecdot(p, z)
            found[:, i : i + rows] = torch.stack((of_target - logz, logz, mean, entropy, correct))
            kept = p if keep and cap is None else None
        ctx.save_for_backward(x, weight, target, at, kept)
        ctx.cap, ctx.rows, ctx.total = cap, rows, len(targets)
        if at is not None:
            found = found.new_zeros((len(found), len(targets))).index_copy_(1, at, found)
        logprob, logz, mean, entropy, correct = found
        ctx.mark_non_differentiable(entropy, correct)
        return logprob, logz, mean, entropy, correct

    @staticmethod
    def backward(ctx, d_logprob, d_logz, d_mean, *_):
        x, weight, target, at, kept = ctx.saved_tensors
        V = weight.shape[0]
        w = weight.to(x.dtype)
        if at is not None:
            d_logprob, d_logz, d_mean = (d if d is None else d[at] for d in (d_logprob, d_logz, d_mean))
        onto_p = torch.zeros(len(target), device=x.device)
        for d, sign in ((d_logprob, -1), (d_logz, 1), (d_mean, -1)):
            if d is not None:
                onto_p = onto_p + sign * d
        dx = torch.empty_like(x)
        learns = ctx.needs_input_grad[1]  # not where only adapters are trained
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learns else None
        for i in range(0, x.shape[0], ctx.rows):
            s = slice(i, i + ctx.rows)
            z = None if kept is not None else soft_cap(F.linear(x[s], w).float(), ctx.cap)
            p = torch.softmax(z, -1) if kept is None else kept
            dz = p * onto_p[s, None]
            if d_mean is not None:
                dz += d_mean[s, None] / V
            if d_logprob is not None:
                dz.scatter_add_(1, target[s, None], d_logprob[s, None])
            if ctx.cap is not None:
                dz *= 1 - (z / ctx.cap).square_()  # tanh' = 1 - tanh^2
            dz = dz.to(x.dtype)
            torch.mm(dz, w, out=dx[s])
            if dw is not None:
                dw += dz.T @ x[s]
        if at is not None:
            dx = dx.new_zeros((ctx.total, dx.shape[1])).index_copy_(0, at, dx)
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None

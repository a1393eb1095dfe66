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


def soft_cap(z: Tensor, cap: float | None) -> Tensor:
    """cap tanh(z / cap): logits that stay within +-cap (Gemma 2, 2024); None leaves them."""
    return z if cap is None else cap * torch.tanh(z / cap)


def scores(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None, chunk: int = CHUNK) -> Scores:
    """x (B, T, D), weight (V, D), targets (B, T) with -100 ignored -> Scores of (B, T) of the logits soft_cap(x W^T).

    The product runs in x's dtype (autocast's where that is on), everything after it in fp32, and the gradient of
    `weight` is summed in fp32."""
    B, T, D = x.shape
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _Scores.apply(x.reshape(-1, D), weight, targets.reshape(-1), cap, max(1, chunk // weight.shape[0]))
    return Scores(*(s.view(B, T) for s in out))


class _Scores(torch.autograd.Function):
    """With p = softmax(z): d logprob = onehot - p, d logz = p, d mean_logprob = 1/V - p."""

    @staticmethod
    def forward(ctx, x, weight, targets, cap, rows):
        keep = x.shape[0] <= rows and any(ctx.needs_input_grad)
        w = weight.to(x.dtype)
        parts, kept = [], None
        for i in range(0, x.shape[0], rows):
            z = soft_cap(F.linear(x[i : i + rows], w).float(), cap)
            target = targets[i : i + rows]
            valid = target >= 0
            logz = z.logsumexp(-1)
            logprob = z.gather(-1, target.clamp_min(0)[:, None])[:, 0] - logz
            mean = z.mean(-1) - logz
            p = torch.softmax(z, -1)
            entropy = logz - torch.linalg.vecdot(p, z)
            parts.append(torch.stack((logprob, logz, mean, entropy)).mul_(valid))
            kept = p if keep and cap is None else None
        ctx.save_for_backward(x, weight, targets, kept)
        ctx.cap, ctx.rows = cap, rows
        logprob, logz, mean, entropy = torch.cat(parts, dim=1)
        ctx.mark_non_differentiable(entropy)
        return logprob, logz, mean, entropy

    @staticmethod
    def backward(ctx, d_logprob, d_logz, d_mean, _):
        x, weight, targets, kept = ctx.saved_tensors
        V = weight.shape[0]
        w = weight.to(x.dtype)
        valid = targets >= 0
        d_logprob, d_logz, d_mean = d_logprob * valid, d_logz * valid, d_mean * valid
        onto_p = d_logz - d_logprob - d_mean
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for i in range(0, x.shape[0], ctx.rows):
            s = slice(i, i + ctx.rows)
            z = None if kept is not None else soft_cap(F.linear(x[s], w).float(), ctx.cap)
            p = torch.softmax(z, -1) if kept is None else kept
            dz = p * onto_p[s, None]
            if d_mean.any():
                dz += d_mean[s, None] / V
            dz.scatter_add_(1, targets[s].clamp_min(0)[:, None], d_logprob[s, None])
            if ctx.cap is not None:
                dz *= 1 - (z / ctx.cap).square_()  # tanh' = 1 - tanh^2
            dz = dz.to(x.dtype)
            torch.mm(dz, w, out=dx[s])
            dw += dz.T @ x[s]
        return dx, dw.to(weight.dtype), None, None, None

"""Pieces that every model shares: norms, rotary positions, attention kernel, dropout. Shapes: B batch, T positions,
H heads, D channels."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019), computed in fp32."""

    tp_plan = {"weight": "replicate"}

    def __init__(self, dim: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Written out: F.rms_norm has no kernel of its own on CPU and takes twice as many steps there.
        y = x if x.dtype == torch.float32 else x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(self.eps)) * self.weight
        return y if x.dtype == torch.float32 else y.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) whose bias can be left out."""

    tp_plan = {"weight": "replicate", "bias": "replicate"}

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@functools.lru_cache(maxsize=8)
def rope_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians a position of each pair of channels: (dim/2,) fp32."""
    with torch.inference_mode(False):  # what is made under inference_mode could not be saved for a later backward
        return theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@functools.lru_cache(maxsize=8)
def rope_angles(positions: Tensor | int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos (..., T, dim) and sin with the sign of the half they meet, fp32, for positions (B, T) or the number T of them
    from 0 on. Memoised by the identity of `positions`: the layers of a model ask for the same ones."""
    frequencies = rope_frequencies(dim, theta, device)
    with torch.inference_mode(not isinstance(positions, int) and positions.is_inference()):
        if isinstance(positions, int):
            angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequencies
        else:
            angles = positions[:, None, :, None] * frequencies
        sin = angles.sin()
        return angles.cos().repeat(*(1,) * (angles.dim() - 1), 2), torch.cat((-sin, sin), -1)


def rope(x: Tensor, positions: Tensor | None, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021), half layout. x (B, H, T, D), positions (B, T) or None for 0..T-1 -> like x.

    A pure function of its arguments: there is no buffer to repair after a meta-device initialisation."""
    T, D = x.shape[-2:]
    cos, sin = rope_angles(T if positions is None else positions, D, theta, x.device)
    y = x if x.dtype == torch.float32 else x.float()
    y = torch.addcmul(y * cos, y.roll(D // 2, -1), sin)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Fixed sine and cosine positions (Vaswani et al. 2017, 3.5). positions (...) -> (..., dim) fp32."""
    inverse = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10000.0) / dim))
    angles = positions[..., None].float() * inverse
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention. q (B, H, T, D), k and v (B, H_kv, T, D), mask broadcastable to (B, H, T, T) with True where
    a query may look; None means causal. -> (B, H, T, D). `scale` defaults to 1/sqrt(D)."""
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 512:
        # The CPU flash kernel multiplies blocks so small that entering the bf16 library costs more than it saves:
        # its backward pass is up to 4 times faster in fp32 at this length.
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return attend(q, k, v, attn_mask=mask)


def document_mask(doc_ids: Tensor) -> Tensor:
    """Causal attention within documents. doc_ids (B, T) -> (B, 1, T, T) bool."""
    T = doc_ids.shape[1]
    same = doc_ids[:, :, None] == doc_ids[:, None, :]
    return (same & torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril())[:, None]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014). On CPU the mask comes from 16-bit lanes of 64-bit draws, because the
    serial generator behind F.dropout is what a training step with dropout waits for; p is rounded to 1/65536 there and
    the kept values are scaled by the rounded probability, so that the expectation is exact."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = round(p * 65536)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return _Dropout.apply(x, keep, 65536 / (65536 - dropped))


class _Dropout(torch.autograd.Function):
    """x * keep * scale with one byte an element kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None

"""Pieces that every model shares: norms, activations, fixed positions, dropout. Shapes: B batch, T positions, D channels,
E experts."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Fixed sine and cosine positions (Vaswani et al. 2017, 3.5). positions (...) -> (..., dim) fp32."""
    inverse = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10000.0) / dim))
    angles = positions[..., None].float() * inverse
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


class Aux(NamedTuple):
    """What a sparse feed-forward part says of a forward pass beside its output."""

    # (B, T), or (B, 1) where each row is one document: auxiliary losses of the document that a token belongs to, weighted;
    # in a branch those of its trunk and itself, as if they stood alone. They are added to the loss once for each target: so
    # a document counts alike however it is packed or padded.
    loss: Tensor
    load: Tensor  # (E,) tokens sent to each expert, a trunk's once for each branch, no padding; of a model (layers, E)
    entropy: Tensor  # (B, T) of the router's distribution, in nats: carries no gradient

    def metrics(self, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics as (sum, count) over the targets, which `mask` (B, T) marks; the loop makes more of router/load."""
        n = mask.sum()
        return {
            "aux": ((self.loss.detach() * mask).sum(), n),
            "router/entropy": ((self.entropy * mask).sum(), n),
            "router/load": (self.load, n),
        }


def gated_hidden(dim: int, ways: int = 1) -> int:
    """Channels of a gated MLP that, `ways` of them together, has as many parameters as a plain one of width 4 dim: 8/3 dim /
    ways, rounded up to a multiple of 32."""
    return -(-8 * dim // (3 * ways) // 32) * 32


def at_layer(setting: Any, layer: int) -> Any:
    """A setting that a list varies over the layers: the list is repeated."""
    return setting[layer % len(setting)] if isinstance(setting, list) else setting


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

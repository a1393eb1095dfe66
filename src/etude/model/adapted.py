"""Linear layers with a low-rank adapter beside a frozen weight, and what they are when merged. etude.lora turns layers of
a model into these. A part that multiplies by a linear layer's weight itself, without calling the layer, asks `weight_of`
for it, or the adapter would not take part."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.model import parts

NAMES = ("lora_A", "lora_B", "lora_magnitude")  # of an adapter's parameters


class Adapted(nn.Linear):
    """W x + b + scale B A x (LoRA, Hu et al. 2021): weight W (out, in) and bias b frozen, lora_A (r, in) and lora_B (out, r)
    trained, in fp32. With a lora_magnitude m (out,) each row of the merged matrix V = W + scale B A is brought to a length
    of its own, m V / |V|, where the gradient takes |V| for a constant (DoRA, Liu et al. 2024, section 4.3).

    Dropout acts on the input of whatever was trained: of B A x and, as in DoRA's own code, of (m / |V| - 1) W x.
    While `enabled` is False the layer is the frozen one."""

    scale: float
    dropout: float
    enabled: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    @staticmethod
    def turn(layer: Any, *, rank: int, scale: float, dropout: float, dora: bool) -> None:
        """Make a plain linear layer one of these, in place: its names, its parameters and who refers to it stay. A is drawn
        with torch's generator, and to begin with the layer computes what it did before."""
        layer.__class__ = Adapted
        layer.scale, layer.dropout, layer.enabled = scale, dropout, True
        sizes = shapes(layer, rank, dora)
        for name in NAMES:
            empty = functools.partial(torch.empty, dtype=torch.float32, device=layer.weight.device)
            layer.register_parameter(name, nn.Parameter(empty(sizes[name])) if name in sizes else None)
        layer.init_weights()

    def init_weights(self) -> None:
        """A as PEFT draws it, uniform in +-1/sqrt(in), B zero, m the lengths of W's rows."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None and not self.weight.is_meta:
            with torch.no_grad():
                self.lora_magnitude.copy_(lengths(self.weight, self.lora_A, self.lora_B, self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.enabled:
            return super().forward(x)
        seen = parts.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(seen, self.lora_A) * self.scale, self.lora_B)
        if self.lora_magnitude is None:
            return super().forward(x) + update
        rows = self.lora_magnitude / lengths(self.weight, self.lora_A, self.lora_B, self.scale)
        y = F.linear(x, self.weight)
        if seen is x:
            turned = rows * (y + update)
        else:
            turned = y + (rows - 1) * F.linear(seen, self.weight) + rows * update
        return (turned if self.bias is None else turned + self.bias).to(y.dtype)

    def merged(self) -> Tensor:
        """The matrix (out, in) that the layer multiplies by, without dropout; of the weight's dtype."""
        if not self.enabled:
            return self.weight
        return merged_weight(self.weight, self.lora_A, self.lora_B, self.lora_magnitude, self.scale)


def shapes(layer: nn.Linear, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Of the parameters that an adapter gives a layer."""
    found: dict[str, tuple[int, ...]] = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    return found | ({"lora_magnitude": (layer.out_features,)} if dora else {})


def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + scale B A| of each row (out,), in fp32 and without a gradient. The sum is not made: its squares are those of W,
    of B A, and twice their product, which are all sums over the rank."""
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        weight, a, b = weight.float(), a.float(), b.float()
        cross = ((weight @ a.mT) * b).sum(1)
        own = ((b @ (a @ a.mT)) * b).sum(1)
        squares = torch.linalg.vector_norm(weight, dim=1).square() + 2 * scale * cross + scale**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros stays one


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    """W + scale B A, its rows brought to the lengths `magnitude` where that is given; computed in fp32."""
    with torch.autocast(weight.device.type, enabled=False):
        merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
        if magnitude is not None:
            merged = merged * (magnitude.float() / lengths(weight, a, b, scale))[:, None]
    return merged.to(weight.dtype)


def weight_of(layer: nn.Linear) -> Tensor:
    """What a linear layer multiplies by (out, in)."""
    return layer.merged() if isinstance(layer, Adapted) else layer.weight


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model is an adapter's, by its dotted name."""
    return name.rpartition(".")[2] in NAMES


def layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers with an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it was before it was adapted."""
    before = [(layer, layer.enabled) for layer in layers(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Plain linear layers again, in place, with the merged matrices as new parameters."""
    for layer in layers(model).values():
        plain: Any = layer
        plain.weight = nn.Parameter(layer.merged().detach(), requires_grad=False)
        for name in (*NAMES, "scale", "dropout", "enabled"):
            delattr(plain, name)
        plain.__class__ = nn.Linear

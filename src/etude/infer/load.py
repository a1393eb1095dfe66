"""A model from a checkpoint or export, by what lies in its folder alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import checkpoint
from etude.model import weights
from etude.text import tokenizer as tok


def load(path: str, device: str, dtype: str, trusted: list[str]) -> tuple[nn.Module, tok.Tokenizer]:
    """-> (model in evaluation mode, tokenizer) of a run, checkpoint or export. Targets outside `trusted` are refused
    before anything is imported."""
    folder = checkpoint.find(path)
    model = weights.from_pretrained(folder, device, weights.DTYPES[dtype], trusted)
    return fuse(model), tok.load(folder)


def fuse(model: nn.Module) -> nn.Module:
    """Let layers of one input be one product: where a module names them in `side_by_side`, their weights become views
    of one matrix, which its `project` multiplies at once. Names, shapes and values stay as they are."""
    for module in model.modules():
        if names := getattr(module, "side_by_side", None):
            layers = [module.get_submodule(n) for n in names]
            module.project = _together(layers)  # type: ignore[assignment]
    return model


def _together(layers: list[Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        nothing = [weight.new_zeros(n) for n in sizes]
        bias = torch.cat([n if layer.bias is None else layer.bias.data for layer, n in zip(layers, nothing)])
    for layer, part in zip(layers, weight.split(sizes)):
        layer.weight.data = part
    return lambda x: F.linear(x, weight, bias).split(sizes, -1)

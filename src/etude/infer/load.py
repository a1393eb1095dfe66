"""A model from a checkpoint or export, by what lies in its folder alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import checkpoint
from etude.config import build, check_targets
from etude.errors import Refusal
from etude.text import tokenizer as tok


def load(path: str, device: str, dtype: str, trusted: list[str]) -> tuple[nn.Module, tok.Tokenizer, dict]:
    """-> (model in evaluation mode, tokenizer, config.json) of a run, checkpoint or export. Weights are read straight
    into a model without random initialisation. Targets outside `trusted` are refused before anything is imported."""
    folder = checkpoint.find(path)
    config = read_config(folder)
    check_targets({"model": config["model"]}, trusted)
    with torch.device("meta"):
        model = build(config["model"], config["vocab_size"])
    checkpoint.materialize(model, checkpoint.tensors(folder, "model", device))
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
    fuse(model)
    return model, tok.load(folder / "tokenizer.json"), config


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
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    for layer, part in zip(layers, weight.split(sizes)):
        layer.weight.data = part
    return lambda x: F.linear(x, weight, bias).split(sizes, -1)


def read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder / 'config.json'} cannot be read: {error}") from None

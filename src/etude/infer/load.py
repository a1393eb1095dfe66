"""A model from a checkpoint or export, by what lies in its folder alone."""

import json
from pathlib import Path

import torch
from torch import nn

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
    return model, tok.load(folder / "tokenizer.json"), config


def read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder / 'config.json'} cannot be read: {error}") from None

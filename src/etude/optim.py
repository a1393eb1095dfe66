"""Optimizers: functions of a model that return a torch optimizer whose groups keep their full rate as `base_lr`."""

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float, betas: list[float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused. Matrices and embeddings are decayed; vectors (norms, biases) are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g | {"base_lr": lr} for g in groups if g["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is `factor` times its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor

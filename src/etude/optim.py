"""Optimizers: functions of a model that return a torch optimizer whose groups keep their full rate as `base_lr`."""

import torch
from torch import nn

from etude.errors import Refusal
from etude.model.roles import ROLES, role, wider


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
    lr_scale: dict[str, float],
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused. The table in model/roles.py says which parameters are decayed, and a role's
    rate is lr times its lr_scale, in muP over its width. Raises Refusal for a role that the table does not have."""
    if unknown := sorted(lr_scale.keys() - set(ROLES)):
        raise Refusal(f"optimizer.lr_scale has no role {unknown[0]}; there is: {', '.join(ROLES)}")
    base = getattr(model, "base_shapes", {})
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            r = role(name, p)
            inputs, _ = wider(name, p, base)
            decay = 0.0 if r == "vector" else weight_decay * inputs
            groups.setdefault((lr_scale.get(r, 1.0) / inputs, decay), []).append(p)
    made = [
        {"params": ps, "weight_decay": decay, "lr": lr * scale, "base_lr": lr * scale}
        for (scale, decay), ps in groups.items()
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(made, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is `factor` times its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor

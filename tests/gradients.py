"""Gradients of a model, and whether two of them are the same."""

from torch import Tensor, nn


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of each tensor's norm."""
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), name

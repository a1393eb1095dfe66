"""Dense feed-forward parts. Each returns (y, aux): what a sparse part has to say beside its output, None for a dense one."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from etude.model import parts
from etude.model.parts import Aux


class MLP(nn.Module):
    """out(act(up(x))) with `hidden` channels (null: 4 dim), `activation` relu, relu2 (its square), gelu, gelu_tanh or silu."""

    tp_plan = {"up": "col", "out": "row"}

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        hidden: int | None,
        activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"],
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        self.check(hidden, dropout)
        hidden = hidden or 4 * dim
        self.act, self.dropout = parts.ACTIVATIONS[activation], dropout
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    @staticmethod
    def check(hidden: int | None, dropout: float) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        if not 0 <= dropout < 1:
            raise ValueError(f"model.ffn.dropout={dropout} should be at least 0 and below 1")
        if hidden is not None and hidden < 1:
            raise ValueError(f"model.ffn.hidden={hidden} should be at least 1")

    def forward(self, x: Tensor) -> tuple[Tensor, Aux | None]:
        """x (B, T, D) -> ((B, T, D), None)."""
        return parts.dropout(self.out(self.act(self.up(x))), self.dropout, self.training), None


class GatedMLP(nn.Module):
    """out(act(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (Shazeer 2020). `hidden` null: 8/3 dim rounded up
    to a multiple of 32, which has the parameters of a plain MLP of width 4 dim."""

    tp_plan = {"gate": "col", "up": "col", "out": "row"}
    side_by_side = ("gate", "up")

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        hidden: int | None,
        activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"],
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        self.check(hidden, dropout)
        hidden = hidden or parts.gated_hidden(dim)
        self.act, self.activation, self.dropout = parts.ACTIVATIONS[activation], activation, dropout
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    @staticmethod
    def check(hidden: int | None, dropout: float) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        if not 0 <= dropout < 1:
            raise ValueError(f"model.ffn.dropout={dropout} should be at least 0 and below 1")
        if hidden is not None and hidden < 1:
            raise ValueError(f"model.ffn.hidden={hidden} should be at least 1")

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """(B, T, D) -> what `side_by_side` names, one after another; inference computes them as one (infer.pack)."""
        return self.gate(x), self.up(x)

    def activate(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the hidden channels (B, T, H)."""
        gate, up = self.project(x)
        return self.act(gate) * up

    def forward(self, x: Tensor) -> tuple[Tensor, Aux | None]:
        """x (B, T, D) -> ((B, T, D), None)."""
        return parts.dropout(self.out(self.activate(x)), self.dropout, self.training), None

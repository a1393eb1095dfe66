"""Grouped-query attention (Ainslie et al. 2023); with as many key heads as query heads it is multi-head attention
(Vaswani et al. 2017), with one it is multi-query attention (Shazeer 2019)."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude.model import parts
from etude.model.attention import Documents, attend
from etude.model.rope import Rope, rope


class GQA(nn.Module):
    """n_heads query heads share n_kv_heads key and value heads (null: as many as n_heads).

    `head_dim` null is dim / n_heads. `rope` null leaves positions out (then the model may add them to its input), and
    `rope_layers` says which layers have them (NoPE, Kazemnejad et al. 2023). `window` is how many positions a query
    sees, itself among them (null: all). Both may be lists, which are repeated over the layers: window [512, 512, null]
    makes every third layer global. `qk_norm` is an RMSNorm of each head's queries and keys before RoPE (Qwen3);
    `gate` multiplies each output channel by the sigmoid of a projection of the input (Qiu et al. 2025). `bias` is that
    of q, k, v and the gate, `out_bias` the output projection's.

    `dropout` acts on the output of the projection, not on the attention weights: so the flash kernel, which on CPU
    has no dropout, is always the one that runs. Raises ValueError where settings do not fit together."""

    tp_plan = {"q": "col", "k": "col", "v": "col", "gate": "col", "out": "row"}

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int | None,
        rope: Rope | None,
        rope_layers: list[bool] | None,
        window: int | list[int | None] | None,
        qk_norm: bool,
        norm_eps: float,
        gate: bool,
        bias: bool,
        out_bias: bool,
        dropout: float,
    ):
        super().__init__()
        self.check(
            dim,
            n_heads,
            n_kv_heads,
            head_dim,
            None if rope is None else dataclasses.asdict(rope),
            rope_layers,
            window,
            dropout,
        )
        n_kv_heads = n_kv_heads or n_heads
        self.head_dim = head_dim or dim // n_heads
        self.scale = self.head_dim**-0.5
        self.n_heads, self.n_kv_heads, self.dropout = n_heads, n_kv_heads, dropout
        self.rope = rope if rope_layers is None or parts.at_layer(rope_layers, layer) else None
        self.window: int | None = parts.at_layer(window, layer)
        self.q = nn.Linear(dim, n_heads * self.head_dim, bias=bias)
        self.k = nn.Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.gate = nn.Linear(dim, n_heads * self.head_dim, bias=bias) if gate else None
        self.out = nn.Linear(n_heads * self.head_dim, dim, bias=out_bias)
        self.q_norm = parts.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = parts.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.side_by_side = ("q", "k", "v", "gate") if gate else ("q", "k", "v")

    @staticmethod
    def check(
        dim: int,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int | None,
        rope: dict | None,
        rope_layers: list | None,
        window: int | list | None,
        dropout: float,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if not 0 <= dropout < 1:
            raise ValueError(f"model.attn.dropout={dropout} should be at least 0 and below 1")
        if n_heads < 1 or (head_dim is None and dim % n_heads):
            raise ValueError(
                f"dim={dim} is not divisible by n_heads={n_heads}; set model.attn.n_heads to a divisor of {dim}"
            )
        if n_kv_heads is not None and (n_kv_heads < 1 or n_heads % n_kv_heads):
            raise ValueError(
                f"n_heads={n_heads} is not divisible by n_kv_heads={n_kv_heads}; set model.attn.n_kv_heads to a divisor of {n_heads}"
            )
        width = head_dim or dim // n_heads
        if rope is not None and rope["dim"] is None and width % 2:
            raise ValueError(f"head_dim={width} is odd and RoPE turns pairs; set model.attn.head_dim to an even number")
        if rope is not None and (rope["dim"] or 0) > width:
            raise ValueError(f"model.attn.rope.dim={rope['dim']} is more than the {width} channels of a head")
        if rope_layers == [] or window == []:
            raise ValueError(
                "model.attn.window and model.attn.rope_layers are repeated over the layers: give null or one"
            )
        if any(w is not None and w < 1 for w in (window if isinstance(window, list) else [window])):
            raise ValueError(f"model.attn.window={window} should be at least 1, or null for all positions")

    def cache_shape(self) -> tuple[int, int, int]:
        """(key heads, key channels, value channels) of one cached position."""
        return self.n_kv_heads, self.head_dim, self.head_dim

    def flops_per_token(self, length: int) -> int:
        """Of the score and value products, forward and backward, per token of a causal row of `length`, counted
        without the causal half as in Chowdhery et al. 2022, appendix B; the projections count as parameters."""
        return 12 * self.n_heads * self.head_dim * min(length, self.window or length)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """(B, T, D) -> what `side_by_side` names, one after another; inference computes them as one (infer.pack)."""
        out = self.q(x), self.k(x), self.v(x)
        return out if self.gate is None else (*out, self.gate(x))

    def turn(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Queries or keys (B, H, T, D) with their positions in them, where the layer has any."""
        return x if self.rope is None else rope(x, positions, self.rope)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, documents: Documents | None = None, cache=None
    ) -> Tensor:
        """x (B, T, D), positions (B, T) or None for 0..T-1, documents or None for one a row -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v, *gate = self.project(x)
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = self.turn(q, positions), self.turn(k, positions)
        if cache is None:
            y = attend(q, k, v, documents, self.scale, self.window)
        else:
            y = cache.attend(q, k, v, self.scale, self.window)
        y = y.transpose(1, 2).reshape(B, T, -1)
        if gate:
            y = y * torch.sigmoid(gate[0])
        return parts.dropout(self.out(y), self.dropout, self.training)

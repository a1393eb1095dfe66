"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values are made from one small latent a position,
and the latent is all that is cached."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude.model import parts
from etude.model.adapted import weight_of
from etude.model.attention import Documents, attend
from etude.model.rope import Rope, rope


class MLA(nn.Module):
    """Each of n_heads heads has qk_nope_head_dim channels made from the latent of kv_lora_rank, and qk_rope_head_dim
    channels that carry the position and whose key all heads share; values have v_head_dim channels. Queries come from
    the input, or by way of q_lora_rank channels.

    With a cache the products are absorbed: a head's key matrix is moved to its query and its value matrix behind the
    attention, so that every head looks at the cached latent itself, as multi-query attention with one key head.
    `rope_layers`, `window` and `dropout` as in GQA; `bias` is that of the projections into the latents and of the
    output (Hugging Face's attention_bias)."""

    tp_plan = {
        "q": "col",
        "q_down": "replicate",
        "q_up": "col",
        "kv_down": "replicate",
        "kv_up": "col",
        "out": "row",
    }

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        n_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: Rope | None,
        rope_layers: list[bool] | None,
        window: int | list[int | None] | None,
        norm_eps: float,
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        sizes = (n_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.check(*sizes, None if rope is None else dataclasses.asdict(rope), rope_layers, window, dropout)
        self.n_heads, self.rank, self.dropout = n_heads, kv_lora_rank, dropout
        self.nope_dim, self.rope_dim, self.v_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.rope = rope if rope_layers is None or parts.at_layer(rope_layers, layer) else None
        self.window: int | None = parts.at_layer(window, layer)
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5 * (rope.score_scale if rope is not None else 1.0)
        q_width = n_heads * (self.nope_dim + self.rope_dim)
        if q_lora_rank is None:
            self.q = nn.Linear(dim, q_width, bias=False)
        else:
            self.q_down = nn.Linear(dim, q_lora_rank, bias=bias)
            self.q_norm = parts.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_up = nn.Linear(q_lora_rank, q_width, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_down = nn.Linear(dim, kv_lora_rank + self.rope_dim, bias=bias)
        self.kv_norm = parts.RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_up = nn.Linear(kv_lora_rank, n_heads * (self.nope_dim + v_head_dim), bias=False)
        self.out = nn.Linear(n_heads * v_head_dim, dim, bias=bias)

    @staticmethod
    def check(
        n_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: dict | None,
        rope_layers: list | None,
        window: int | list | None,
        dropout: float,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if not 0 <= dropout < 1:
            raise ValueError(f"model.attn.dropout={dropout} should be at least 0 and below 1")
        sizes = {"n_heads": n_heads, "q_lora_rank": q_lora_rank or 1, "kv_lora_rank": kv_lora_rank}
        sizes |= {"qk_nope_head_dim": qk_nope_head_dim, "v_head_dim": v_head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"model.attn.{name}={size} should be at least 1")
        if qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise ValueError(f"model.attn.qk_rope_head_dim={qk_rope_head_dim} should be even and at least 2")
        if v_head_dim > qk_nope_head_dim + qk_rope_head_dim:
            raise ValueError(
                f"model.attn.v_head_dim={v_head_dim} should be at most qk_nope_head_dim + qk_rope_head_dim = {qk_nope_head_dim + qk_rope_head_dim}"
            )
        if rope is not None and rope["dim"] not in (None, qk_rope_head_dim):
            raise ValueError(f"model.attn.rope.dim={rope['dim']}: MLA turns qk_rope_head_dim channels; leave it null")
        if rope_layers == [] or window == []:
            raise ValueError(
                "model.attn.window and model.attn.rope_layers are repeated over the layers: give null or one"
            )
        if any(w is not None and w < 1 for w in (window if isinstance(window, list) else [window])):
            raise ValueError(f"model.attn.window={window} should be at least 1, or null for all positions")

    @property
    def side_by_side(self) -> tuple[str, str]:
        return ("q" if self.q_lora_rank is None else "q_down"), "kv_down"

    def cache_shape(self) -> tuple[int, int, int]:
        """(1, latent and rotary key, 0): values are the cached keys' first channels and take no room of their own."""
        return 1, self.rank + self.rope_dim, 0

    def flops_per_token(self, length: int) -> int:
        """As GQA's, of the expanded form that training computes."""
        return 6 * self.n_heads * (self.nope_dim + self.rope_dim + self.v_dim) * min(length, self.window or length)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """(B, T, D) -> what `side_by_side` names, one after another; inference computes them as one (infer.pack)."""
        return (self.q(x) if self.q_lora_rank is None else self.q_down(x)), self.kv_down(x)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries of the channels that the latent makes (B, H, T, nope) -> of the latent itself (B, H, T, R)."""
        return q @ self._up()[0]

    def expand(self, y: Tensor) -> Tensor:
        """Latents that the heads gathered (B, H, T, R) -> their values (B, H, T, v)."""
        return y @ self._up()[1].transpose(1, 2)

    def _up(self) -> tuple[Tensor, ...]:
        return weight_of(self.kv_up).view(self.n_heads, -1, self.rank).split((self.nope_dim, self.v_dim), 1)

    def turn(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Queries or keys (B, H, T, D) with their positions in them, where the layer has any."""
        return x if self.rope is None else rope(x, positions, self.rope)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, documents: Documents | None = None, cache=None
    ) -> Tensor:
        """x (B, T, D), positions (B, T) or None for 0..T-1, documents or None for one a row -> (B, T, D)."""
        B, T, _ = x.shape
        q, latent = self.project(x)
        if self.q_lora_rank is not None:
            q = self.q_up(self.q_norm(q))
        q_nope, q_rope = q.view(B, T, self.n_heads, -1).transpose(1, 2).split((self.nope_dim, self.rope_dim), -1)
        latent, k_rope = latent.split((self.rank, self.rope_dim), -1)
        latent, k_rope = self.kv_norm(latent), k_rope[:, None]  # (B, T, R), (B, 1, T, P)
        q_rope, k_rope = self.turn(q_rope, positions), self.turn(k_rope, positions)
        if cache is None:
            kv = self.kv_up(latent).view(B, T, self.n_heads, -1).transpose(1, 2)
            k_nope, v = kv.split((self.nope_dim, self.v_dim), -1)
            k = torch.cat((k_nope, k_rope.expand(-1, self.n_heads, -1, -1)), -1)
            y = attend(torch.cat((q_nope, q_rope), -1), k, v, documents, self.scale, self.window)
        else:
            q = torch.cat((self.absorb(q_nope), q_rope), -1)  # (B, H, T, R + P)
            k = torch.cat((latent[:, None], k_rope), -1)  # (B, 1, T, R + P)
            y = self.expand(cache.attend(q, k, None, self.scale, self.window)[..., : self.rank])
        y = y.transpose(1, 2).reshape(B, T, -1)
        return parts.dropout(self.out(y), self.dropout, self.training)

"""Grouped-query attention (Ainslie et al. 2023); with as many key heads as query heads it is multi-head attention
(Vaswani et al. 2017), with one it is multi-query attention (Shazeer 2019)."""

from collections.abc import Sequence

from torch import Tensor, nn

from etude.model import parts


class GQA(nn.Module):
    """n_heads query heads share n_kv_heads key and value heads (null: as many as n_heads).

    `head_dim` null is dim / n_heads. `rope_theta` null leaves positions out (then the model adds them to its input).
    `dropout` acts on the output of the projection, not on the attention weights: so the flash kernel, which on CPU
    has no dropout, is always the one that runs. Raises ValueError where the head counts do not divide."""

    tp_plan = {"q": "col", "k": "col", "v": "col", "out": "row"}
    side_by_side = ("q", "k", "v")

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int | None,
        rope_theta: float | None,
        bias: bool,
        dropout: float,
    ):
        super().__init__()
        self.check(dim, n_heads, n_kv_heads, head_dim, rope_theta, dropout)
        n_kv_heads = n_kv_heads or n_heads
        self.head_dim = head_dim or dim // n_heads
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.rope_theta, self.dropout = rope_theta, dropout
        self.q = nn.Linear(dim, n_heads * self.head_dim, bias=bias)
        self.k = nn.Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(dim, n_kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(n_heads * self.head_dim, dim, bias=bias)

    @staticmethod
    def check(
        dim: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None, rope_theta: float | None, dropout: float
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
        if rope_theta is not None and (head_dim or dim // n_heads) % 2:
            raise ValueError(
                f"head_dim={head_dim or dim // n_heads} is odd and RoPE turns pairs; set model.attn.head_dim to an even number"
            )

    def cache_shape(self) -> tuple[int, int, int]:
        """(key heads, key channels, value channels) of one cached position."""
        return self.n_kv_heads, self.head_dim, self.head_dim

    def flops_per_token(self, length: int) -> int:
        """Of the score and value products, forward and backward, per token of a causal row of `length`, counted
        without the causal half as in Chowdhery et al. 2022, appendix B; the projections count as parameters."""
        return 12 * self.n_heads * self.head_dim * length

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """(B, T, D) -> what `side_by_side` names, one after another; inference computes them as one (infer.load.fuse)."""
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache=None) -> Tensor:
        """x (B, T, D), positions (B, T) or None for 0..T-1, mask (B, 1, T, T) bool or None -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.project(x))
        if self.rope_theta is not None:
            q = parts.rope(q, positions, self.rope_theta)
            k = parts.rope(k, positions, self.rope_theta)
        scale = self.head_dim**-0.5
        y = parts.sdpa(q, k, v, mask, scale) if cache is None else cache.attend(q, k, v, scale)
        return parts.dropout(self.out(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)

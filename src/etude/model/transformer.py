"""The decoder that all language models here are: embedding, blocks of attention and feed-forward, norm, head."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.model import head, parts


class Block(nn.Module):
    """x + attn(norm(x)), then x + ffn(norm(x)): pre-norm residuals (Radford et al. 2019)."""

    def __init__(self, attn: nn.Module, ffn: nn.Module, attn_norm: nn.Module, ffn_norm: nn.Module):
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.ffn_norm, self.ffn = ffn_norm, ffn

    def forward(
        self, x: Tensor, positions: Tensor | None, mask: Tensor | None, cache=None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> ((B, T, D), aux)."""
        x = x + self.attn(self.attn_norm(x), positions, mask, cache)
        y, aux = self.ffn(self.ffn_norm(x))
        return x + y, aux


class Transformer(nn.Module):
    """A decoder-only language model over `vocab_size` tokens.

    `attn`, `ffn` are called once a layer as attn(dim, layer) and ffn(dim, layer), `norm` as norm(dim).
    `pos` is how positions enter: "rope" (the attention's own), "learned" or "sinusoidal" (added to the embedding).
    `max_len` is how many positions there are: a hard limit of learned ones only.
    Raises ValueError for settings that do not fit together.

    Initialisation (Radford et al. 2019), all biases 0, norms 1:

    | weight                                          | drawn from                           |
    |-------------------------------------------------|--------------------------------------|
    | embedding, learned positions, untied head       | N(0, init_std)                       |
    | every linear layer                              | N(0, init_std)                       |
    | linear layers named `out` (into the residual)   | N(0, init_std / sqrt(2 n_layers))    |

    `init_std` null is 0.02 sqrt(768 / dim): GPT-2's 0.02 at GPT-2's width, and the same size of activations at others. A
    part with another need defines `init_weights(self)`, which is called after the table's rule."""

    tp_plan = {"embed": "row", "head": "col"}

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        n_layers: int,
        max_len: int,
        pos: Literal["rope", "learned", "sinusoidal"],
        tied: bool,
        dropout: float,
        init_std: float | None,
        checkpoint: bool,
        attn: Callable[[int, int], nn.Module],
        ffn: Callable[[int, int], nn.Module],
        norm: Callable[[int], nn.Module],
    ):
        super().__init__()
        self.vocab_size, self.dim, self.n_layers = vocab_size, dim, n_layers
        self.max_len, self.pos, self.dropout = max_len, pos, dropout
        self.init_std, self.checkpoint = init_std or 0.02 * (768 / dim) ** 0.5, checkpoint
        self.embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if pos == "learned" else None
        self.blocks = nn.ModuleList(Block(attn(dim, i), ffn(dim, i), norm(dim), norm(dim)) for i in range(n_layers))
        self.norm = norm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @staticmethod
    def check(dim: int, n_layers: int, max_len: int, pos: str, dropout: float, attn: dict) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        for name, value in (("dim", dim), ("n_layers", n_layers), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name}={value} should be at least 1; set model.{name}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout} should be at least 0 and below 1")
        if pos != "rope" and attn.get("rope_theta") is not None:
            raise ValueError(
                f"pos={pos} and a rotary attention would both place the tokens; set model.attn.rope_theta=null or model.pos=rope"
            )

    @property
    def position_limit(self) -> int | None:
        """How many positions there are embeddings for; None where any number will do."""
        return self.max_len if self.pos == "learned" else None

    def init_weights(self) -> None:
        """Fill every parameter as in the table above. Needed once, after construction on any device."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith(".out")
                nn.init.normal_(
                    module.weight, std=self.init_std / (2 * self.n_layers) ** 0.5 if into_residual else self.init_std
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.init_std)
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and own is not None:
                own()

    def attentions(self) -> list[Any]:
        """The attention part of each block."""
        return [block.attn for block in self.blocks]

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Forward and backward: 6 per weight that multiplies (position tables and an untied embedding only look up),
        and the attention's products over `length` positions."""
        tables = [self.pos_embed] if self.pos_embed is not None else []
        if self.head.weight is not self.embed.weight:
            tables.append(self.embed)
        looked_up = sum(t.weight.numel() for t in tables)
        return 6 * (self.n_params() - looked_up) + sum(a.flops_per_token(length) for a in self.attentions())

    def hidden(
        self, tokens: Tensor, positions: Tensor | None, doc_ids: Tensor | None, cache
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T) -> (final normed states (B, T, D), sum of auxiliary losses or None)."""
        x = self.embed(tokens)
        if self.pos != "rope":
            where = torch.arange(tokens.shape[1], device=tokens.device)[None] if positions is None else positions
            x = x + (
                self.pos_embed(where) if self.pos_embed is not None else parts.sinusoid(where, self.dim).to(x.dtype)
            )
        x = parts.dropout(x, self.dropout, self.training)
        mask = None if doc_ids is None else parts.document_mask(doc_ids)
        total = None
        for i, block in enumerate(self.blocks):
            if self.checkpoint and torch.is_grad_enabled():
                x, aux = checkpoint(block, x, positions, mask, use_reentrant=False)
            else:
                x, aux = block(x, positions, mask, None if cache is None else cache[i])
            if aux is not None:
                total = aux if total is None else total + aux
        return self.norm(x), total

    def logits(self, x: Tensor) -> Tensor:
        """States (..., D) -> logits (..., V) in fp32."""
        return F.linear(x, self.head.weight).float()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache=None,
    ):
        """tokens (B, T) int64; targets (B, T) with -100 ignored; positions (B, T), None for 0..T-1; doc_ids (B, T):
        no attention across documents; cache: one entry a layer with `attend(q, k, v, scale)`.

        With targets -> (Scores of (B, T), aux or None), else logits (B, T, V) in fp32."""
        x, aux = self.hidden(tokens, positions, doc_ids, cache)
        if targets is None:
            return self.logits(x)
        return head.scores(x, self.head.weight, targets), aux

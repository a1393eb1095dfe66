"""The decoder that all language models here are: embedding, blocks of attention and feed-forward, norm, head."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etude.config import describe
from etude.model import head, parts, roles, weights
from etude.model.attention import Documents
from etude.model.parts import Aux


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream x with a factor r, and norms where `norm_at` says:

    pre       x + r f(norm(x))         Radford et al. 2019
    post      norm(x + r f(x))         Vaswani et al. 2017
    sandwich  x + r norm(f(norm(x)))   Ding et al. 2021; Gemma 2"""

    def __init__(
        self, attn: nn.Module, ffn: nn.Module, norm: Callable[[int], nn.Module], dim: int, norm_at: str, residual: float
    ):
        super().__init__()
        self.attn, self.ffn, self.residual = attn, ffn, residual
        self.sparse = hasattr(ffn, "balance")  # looks at how tokens are spread, document by document
        before, inside, after = NORM_AT[norm_at]
        none = nn.Identity
        self.attn_norm, self.ffn_norm = (norm(dim) if before else none() for _ in range(2))
        self.attn_post_norm, self.ffn_post_norm = (norm(dim) if inside else none() for _ in range(2))
        self.attn_out_norm, self.ffn_out_norm = (norm(dim) if after else none() for _ in range(2))

    def forward(
        self, x: Tensor, positions: Tensor | None, documents: Documents | None, cache=None
    ) -> tuple[Tensor, Aux | None]:
        """x (B, T, D) -> ((B, T, D), aux)."""
        y = self.attn_post_norm(self.attn(self.attn_norm(x), positions, documents, cache))
        x = self.attn_out_norm(self.add(x, y))
        h = self.ffn_norm(x)
        y, aux = self.ffn(h, documents) if self.sparse else self.ffn(h)
        y = self.ffn_post_norm(y)
        return self.ffn_out_norm(self.add(x, y)), aux

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.residual == 1 else self.residual * y)


# Whether there is a norm (before the part, behind it, behind the sum).
NORM_AT = {"pre": (True, False, False), "post": (False, False, True), "sandwich": (True, True, False)}


class Transformer(nn.Module):
    """A decoder-only language model over `vocab_size` tokens.

    `attn`, `ffn` are called once a layer as attn(dim, layer) and ffn(dim, layer), `norm` as norm(dim).
    `pos` is how positions enter: "rope" (the attention's own, or none), "learned" or "sinusoidal" (added to the
    embedding). `max_len` is how many positions there are: a hard limit of learned ones only. `embed_scale` multiplies
    the embedding (null: 1), `residual_scale` what each part adds to the stream (1: nothing), and `logit_cap` c makes
    logits c tanh(z / c) (null: as they are). Initialisation is the table in roles.py.

    `mup` is the maximal update parametrisation (Yang et al. 2022): what is good for the base model, which `mup_base` says,
    is good for a wider one. The base has the same settings but dim=mup_base, or whatever a mapping like
    {dim: 128, attn: {n_heads: 4}} says, and for it nothing changes. Initialisation, rates and decay go by how much wider a
    matrix is than the base's (roles.py), the head's input is multiplied by base dim / dim, and an attention's `scale`,
    1 / sqrt(d) for heads of d channels, becomes sqrt(base d) / d.
    Raises ValueError for settings that do not fit together."""

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
        norm_at: Literal["pre", "post", "sandwich"],
        embed_scale: float | None,
        residual_scale: float,
        logit_cap: float | None,
        dropout: float,
        init_std: float | None,
        checkpoint: bool,
        attn: Callable[[int, int], nn.Module],
        ffn: Callable[[int, int], nn.Module],
        norm: Callable[[int], nn.Module],
        mup: bool = False,  # defaults: of exports that were written before there was this
        mup_base: int | dict[str, Any] = 128,
    ):
        settings = {k: v for k, v in locals().items() if k not in ("self", "vocab_size", "__class__")}
        super().__init__()
        self.node = describe(type(self), settings)  # the config that made this model: save_pretrained writes it
        self.vocab_size, self.dim, self.n_layers = vocab_size, dim, n_layers
        self.max_len, self.pos, self.dropout = max_len, pos, dropout
        self.embed_scale, self.logit_cap = embed_scale, logit_cap
        self.checkpoint = checkpoint
        self.embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if pos == "learned" else None
        self.blocks = nn.ModuleList(
            Block(attn(dim, i), ffn(dim, i), norm, dim, norm_at, residual_scale) for i in range(n_layers)
        )
        self.norm = nn.Identity() if norm_at == "post" else norm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.base_shapes: dict[str, torch.Size] = {}  # of the base model's parameters, by name; none without muP
        self.output_scale, base_dim = 1.0, dim
        if mup:
            base = base_model(settings, mup_base)
            base_dim = base.dim
            self.base_shapes = {name: p.shape for name, p in base.named_parameters()}
            self.output_scale = base_dim / dim
            for mine, its in zip(self.attentions(), base.attentions()):
                if hasattr(mine, "scale"):
                    mine.scale *= mine.scale / its.scale
        self.init_std = init_std or 0.02 * (768 / base_dim) ** 0.5

    @staticmethod
    def check(
        dim: int,
        n_layers: int,
        max_len: int,
        pos: str,
        logit_cap: float | None,
        dropout: float,
        attn: dict,
        ffn: dict,
        mup_base: int | dict = 128,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        base = mup_base if isinstance(mup_base, dict) else {"dim": mup_base}
        if not isinstance(base.get("dim"), int) or base["dim"] < 1:
            raise ValueError(
                f"model.mup_base={mup_base} should be the base model's dim, at least 1, or a mapping with dim"
            )
        left: list[tuple[str, dict, dict]] = [("", base, {"dim": dim, "attn": attn, "ffn": ffn})]
        for path, changes, node in left:
            for key, value in changes.items():
                known = key in node and not key.startswith("_")
                part = known and isinstance(node[key], dict) and node[key].get("_partial_", False)
                if not known or isinstance(value, dict) != part:
                    raise ValueError(
                        f"model.mup_base{path}.{key}={value} changes nothing of the model: it has no such setting"
                    )
                if isinstance(value, dict):
                    left.append((f"{path}.{key}", value, node[key]))
        for name, value in (("dim", dim), ("n_layers", n_layers), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name}={value} should be at least 1; set model.{name}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout} should be at least 0 and below 1")
        if logit_cap is not None and logit_cap <= 0:
            raise ValueError(f"model.logit_cap={logit_cap} should be above 0, or null for none")
        if pos != "rope" and attn.get("rope") is not None:
            raise ValueError(
                f"pos={pos} and a rotary attention would both place the tokens; set model.attn.rope=null or model.pos=rope"
            )

    @property
    def position_limit(self) -> int | None:
        """How many positions there are embeddings for; None where any number will do."""
        return self.max_len if self.pos == "learned" else None

    def init_weights(self) -> None:
        """Fill every parameter as the table in roles.py says. Needed once, after construction on any device."""
        for name, p in self.named_parameters():
            if (role := roles.role(name, p)) == "vector":
                nn.init.zeros_(p)
            else:
                wider = roles.wider(name, p, self.base_shapes)
                nn.init.normal_(p, std=roles.init_std(role, self.init_std, self.n_layers, *wider))
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and own is not None:
                own()

    def attentions(self) -> list[Any]:
        """The attention part of each block."""
        return [block.attn for block in self.blocks]

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def n_active(self) -> int:
        """Parameters that one token's forward pass multiplies with: without those of experts it does not visit, position
        tables and an untied embedding, which only look up."""
        tables = [self.pos_embed] if self.pos_embed is not None else []
        if self.head.weight is not self.embed.weight:
            tables.append(self.embed)
        idle = sum(m.n_idle() for m in self.modules() if hasattr(m, "n_idle"))  # type: ignore[operator]
        return self.n_params() - idle - sum(t.weight.numel() for t in tables)

    def flops_per_token(self, length: int) -> int:
        """Forward and backward: 6 per active parameter, and the attention's products over `length` positions."""
        return 6 * self.n_active() + sum(a.flops_per_token(length) for a in self.attentions())

    def balance(self, load: Tensor) -> None:
        """After a step: let each sparse layer even out its experts' load (layers, E), which is that of Aux."""
        sparse = [block.ffn for block in self.blocks if hasattr(block.ffn, "balance")]
        for ffn, row in zip(sparse, load, strict=True):
            ffn.balance(row)  # type: ignore[operator]

    def hidden(
        self, tokens: Tensor, positions: Tensor | None, doc_ids: Tensor | None, cache, branches: Tensor | None = None
    ) -> tuple[Tensor, Aux | None]:
        """tokens (B, T) -> (final normed states (B, T, D), what the sparse layers say, or None)."""
        if branches is not None and doc_ids is None:
            raise ValueError("branches are those of documents; give doc_ids too, 0 everywhere for one a row")
        documents = None if doc_ids is None else Documents(doc_ids, branches)
        if documents is not None and positions is None:
            positions = documents.positions
        return self.through(self.embedded(tokens, positions), positions, documents, cache)

    def embedded(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """tokens (B, T) -> what enters the first block (B, T, D)."""
        x = self.embed(tokens)
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.pos != "rope":
            where = torch.arange(tokens.shape[1], device=tokens.device)[None] if positions is None else positions
            x = x + (
                self.pos_embed(where) if self.pos_embed is not None else parts.sinusoid(where, self.dim).to(x.dtype)
            )
        return parts.dropout(x, self.dropout, self.training)

    def through(
        self, x: Tensor, positions: Tensor | None, documents: Documents | None, cache
    ) -> tuple[Tensor, Aux | None]:
        """Through all blocks and the last norm; as `hidden`."""
        said: list[Aux] = []
        for i, block in enumerate(self.blocks):
            if self.checkpoint and torch.is_grad_enabled():
                x, aux = checkpoint(block, x, positions, documents, use_reentrant=False)
            else:
                x, aux = block(x, positions, documents, None if cache is None else cache[i])
            if aux is not None:
                said.append(aux)
        return self.norm(x), gather(said)

    def logits(self, x: Tensor) -> Tensor:
        """States (..., D) -> logits (..., V) in fp32."""
        return head.soft_cap(self.head(self.outgoing(x)).float(), self.logit_cap)

    def outgoing(self, x: Tensor) -> Tensor:
        """Final states (..., D) as the head takes them."""
        return x if self.output_scale == 1 else x * self.output_scale

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        branches: Tensor | None = None,
        cache=None,
    ):
        """tokens (B, T) int64; targets (B, T) with -100 ignored; positions (B, T), None for 0..T-1; doc_ids (B, T):
        each run of equal ids is a document by itself, with positions from 0 where none are given, one of negative ids
        padding; branches (B, T): within a document, 0 is the trunk and a run of each other number a branch, which sees
        the trunk and itself and whose positions go on from the trunk's; cache: one entry a layer with
        `attend(q, k, v, scale, window)`.

        With targets -> (Scores of (B, T), aux or None), else logits (B, T, V) in fp32."""
        x, aux = self.hidden(tokens, positions, doc_ids, cache, branches)
        if targets is None:
            return self.logits(x)
        return head.scores(self.outgoing(x), self.head.weight, targets, self.logit_cap), aux

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write model.safetensors and config.json (and tokenizer.json): what from_pretrained and generate.py read."""
        weights.save_pretrained(self, Path(folder), tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        trusted: tuple[str, ...] = ("etude",),
    ) -> "Transformer":
        """The model of a folder that holds an export or a checkpoint, in evaluation mode. Nothing is initialised at
        random: the parameters are made on the meta device and become the tensors read. `dtype` None keeps the files'.
        Raises Refusal for a folder that holds none, and for targets outside the packages in `trusted`."""
        return weights.from_pretrained(Path(folder), device, dtype, list(trusted))


def base_model(settings: dict[str, Any], base: int | dict[str, Any]) -> Transformer:
    """The model that muP compares one of these settings with, on the meta device."""
    changes = base if isinstance(base, dict) else {"dim": base}
    settings = settings | {"mup": False} | {k: changed(settings[k], v) for k, v in changes.items()}
    try:
        with torch.device("meta"):
            return Transformer(1, **settings)
    except ValueError as error:
        raise ValueError(f"model.mup_base={base}: of the base model {error}") from None


def changed(setting: Any, change: Any) -> Any:
    """A part with other settings, or another setting."""
    if not isinstance(change, dict):
        return change
    new = {k: changed(setting.keywords.get(k), v) for k, v in change.items()}
    return functools.partial(setting.func, *setting.args, **setting.keywords | new)


def gather(said: list[Aux]) -> Aux | None:
    """Of all sparse layers: losses summed, loads (layers, E), mean entropy."""
    if not said:
        return None
    loss, load, entropy = zip(*said)
    return Aux(torch.stack(loss).sum(0), torch.stack(load), torch.stack(entropy).mean(0))

"""What a trained model computes inside: where its attention looks, what each layer would say, which experts its tokens visit.
Shapes: B rows, T positions, L layers, H heads, D channels, V tokens, E experts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.analysis.load import need
from etude.errors import Refusal
from etude.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Record:
    """Stands where a layer's cache would (see Transformer.forward) and so is given the queries and keys that the attention
    itself computed, of any kind; MLA's are those of the absorbed form. It answers with the attention's output, written
    out. `probabilities` (B, H, T, T) in fp32: the last index is what is looked at."""

    probabilities: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None = None) -> Tensor:
        """q (B, H, T, C), k (B, H_kv, T, C), v (B, H_kv, T, C_v) or None for k -> (B, H, T, C_v)."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, k if v is None else v))
        at = torch.arange(q.shape[2], device=q.device)
        behind = at[:, None] - at
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
        self.probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (self.probabilities @ v.float()).to(q.dtype)


class Attention(NamedTuple):
    maps: list[Tensor]  # of each layer (B, H, T, T), rows sum to 1
    logits: Tensor  # (B, T, V) of the same forward pass


@torch.no_grad()
def attention(model: Any, tokens: Tensor) -> Attention:
    """The attention probabilities of a model in evaluation mode on tokens (B, T), each row one document. Raises Refusal
    for an attention that takes no cache."""
    for i, part in enumerate(model.attentions()):
        if not hasattr(part, "cache_shape"):
            raise Refusal(
                f"{type(part).__name__} of layer {i} takes no cache, so its probabilities cannot be read; give it cache_shape and cache.attend as in docs/add-a-part.md"
            )
    records = [Record() for _ in model.attentions()]
    logits = model(tokens, cache=records)
    return Attention([record.probabilities for record in records], logits)


@contextmanager
def _watching(modules: Sequence[nn.Module], see: Callable[[int, Any, Any], None]) -> Iterator[None]:
    """While it is open, see(i, what goes in first, what comes out) at each call of modules[i]."""
    with ExitStack() as hooks:
        for i, module in enumerate(modules):
            hooks.enter_context(module.register_forward_hook(lambda _, given, out, i=i: see(i, given[0], out)))
        yield


@torch.no_grad()
def stream(model: Any, tokens: Tensor) -> Tensor:
    """The residual stream (L + 1, B, T, D) on tokens (B, T): what enters the first layer, then what leaves each."""
    states: list[Tensor] = []

    def see(i: int, given: Tensor, out: tuple[Tensor, Any]) -> None:
        states.extend([given, out[0]] if i == 0 else [out[0]])

    with _watching(model.blocks, see):
        model.hidden(tokens, None, None, None)
    return torch.stack(states)


@torch.no_grad()
def spoken(model: Any, states: Tensor) -> Tensor:
    """States of the stream (..., D) through the model's last norm and head -> logits (..., V) in fp32."""
    return model.logits(model.norm(states))


class Lens(NamedTuple):
    """What a model would say if its layers ended early; the first index counts layers, 0 is the embedding."""

    ids: Tensor  # (L + 1, B, T, K) the likeliest next tokens, the first one first
    probabilities: Tensor  # (L + 1, B, T, K)
    losses: Tensor  # (L + 1, B, T - 1) nats of the token that did come next


@torch.no_grad()
def lens(model: Any, tokens: Tensor, top: int = 1) -> Lens:
    """The logit lens (nostalgebraist 2020) on tokens (B, T): the stream behind each layer, read by the last norm and head.
    One layer's logits (B, T, V) are held at a time."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for state in stream(model, tokens):
        log = spoken(model, state).log_softmax(-1)
        best = log.topk(min(top, log.shape[-1]), -1)
        loss = -log[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        found.append((best.indices, best.values.exp(), loss))
    return Lens(*(torch.stack(parts) for parts in zip(*found)))


class Routing(NamedTuple):
    """Of one sparse layer. `share` (E,): of all visits of tokens to experts, how many were each one's; the shared experts,
    which every token visits, are not among them. `entropy` (B, T): of the router's probabilities, in nats; ln E is none
    preferred."""

    layer: int
    share: Tensor
    entropy: Tensor


@torch.no_grad()
def routing(model: Any, tokens: Tensor) -> list[Routing]:
    """Where the sparse layers send tokens (B, T); [] for a model without any."""
    sparse = [i for i, block in enumerate(model.blocks) if block.sparse]
    found: list[Routing] = []

    def see(i: int, given: Tensor, out: tuple[Tensor, Any]) -> None:
        load = out[1].load.float()
        found.append(Routing(sparse[i], load / load.sum(), out[1].entropy))

    with _watching([model.blocks[i].ffn for i in sparse], see):
        model.hidden(tokens, None, None, None)
    return found


# ---------------------------------------------------------------- figures

MARKS = str.maketrans({" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\\t"})


def pieces(tokenizer: Tokenizer, ids: Sequence[int], most: int = 12) -> list[str]:
    """Each token by itself for a label: a dot for a space, an arrow for a new line, no more than `most` characters."""
    texts = [tokenizer.decode([i]).translate(MARKS) or str(tokenizer.token(i)) for i in ids]
    texts = ["".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) for text in texts]
    return [text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}" for text in texts]


def plot_attention(maps: Sequence[Tensor], labels: Sequence[str], row: int = 0) -> "Figure":
    """A panel for each head of `maps` (as Attention.maps), layers from the top down: a line is a position, its darker places
    what it looks at. Tokens are named where there is room."""
    plt = need("matplotlib.pyplot")
    heads = max(m.shape[1] for m in maps)
    side = min(6.0, max(1.5, 11 / heads))  # inches
    figure, axes = plt.subplots(
        len(maps), heads, figsize=(side * heads + 1, side * len(maps)), squeeze=False, layout="constrained"
    )
    drawn = None
    for layer, (line, of_layer) in enumerate(zip(axes, maps)):
        for head, ax in enumerate(line):
            if head >= of_layer.shape[1]:
                ax.axis("off")
                continue
            drawn = ax.imshow(
                of_layer[row, head].float().cpu().numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest"
            )
            named = 72 * side / len(labels) > 7  # points a token
            _name(ax, labels if named and layer == len(maps) - 1 else [], labels if named and head == 0 else [])
            if layer == 0:
                ax.set_title(f"head {head}", fontsize=9)
            if head == 0:
                ax.set_ylabel(f"layer {layer}", fontsize=9, labelpad=6)
    figure.colorbar(drawn, ax=axes, shrink=min(1.0, 3 / (side * len(maps))), label="probability")
    figure.supxlabel("token looked at", fontsize=9)
    return figure


def plot_lens(found: Lens, tokens: Tensor, tokenizer: Tokenizer, row: int = 0) -> "Figure":
    """The likeliest next token behind each layer, the last layer on top, coloured by its probability, and framed where it
    is the one that came in tokens (B, T)."""
    plt = need("matplotlib.pyplot")
    best, sure = found.ids[:, row, :, 0].cpu(), found.probabilities[:, row, :, 0].float().cpu()
    layers, T = best.shape
    figure, ax = plt.subplots(figsize=(1.6 + max(6.0, 0.42 * T), 1.5 + 0.32 * layers), layout="constrained")
    drawn = ax.imshow(sure.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for layer in range(layers):
        for t, text in enumerate(pieces(tokenizer, best[layer].tolist(), 6)):
            ink = "white" if sure[layer, t] < 0.6 else "black"
            ax.text(t, layer, text, ha="center", va="center", fontsize=8, color=ink, parse_math=False)
            if t + 1 < T and best[layer, t] == tokens[row, t + 1]:
                ax.add_patch(
                    plt.Rectangle((t - 0.46, layer - 0.44), 0.92, 0.88, fill=False, color="#D55E00", linewidth=1.6)
                )
    names = ["embedding", *(f"layer {i}" for i in range(layers - 1))]
    _name(ax, pieces(tokenizer, tokens[row].tolist(), 6), names)
    ax.set_xlabel("token read (framed: what is shown did come next)")
    figure.colorbar(drawn, ax=ax, label="probability")
    return figure


def plot_routing(found: Sequence[Routing]) -> "Figure":
    """The share of each expert in each sparse layer, 1 being an even load."""
    plt = need("matplotlib.pyplot")
    E = max(len(r.share) for r in found)
    figure, ax = plt.subplots(figsize=(2.2 + max(4.0, 0.42 * E), 1.5 + 0.42 * len(found)), layout="constrained")
    table = torch.full((len(found), E), torch.nan)
    for i, r in enumerate(found):
        table[i, : len(r.share)] = r.share.cpu() * len(r.share)
    drawn = ax.imshow(table.numpy(), vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    for i, line in enumerate(table.tolist()):
        for e, load in enumerate(line):
            ax.text(e, i, f"{load:.2g}", ha="center", va="center", fontsize=7, color="black" if 0.3 < load < 1.7 else "white")  # fmt: skip
    _name(ax, [str(e) for e in range(E)], [f"layer {r.layer}" for r in found])
    ax.set_xlabel("expert")
    figure.colorbar(drawn, ax=ax, label="load (1: even)", extend="max")
    return figure


def _name(ax: "Axes", x: Sequence[str], y: Sequence[str]) -> None:
    turned = 90 if max(map(len, x), default=0) > 2 else 0
    ax.set_xticks(range(len(x)), x, fontsize=7, rotation=turned, parse_math=False)
    ax.set_yticks(range(len(y)), y, fontsize=7, parse_math=False)
    ax.tick_params(length=0)

"""Attention maps, the logit lens and router load are those of the model's own forward pass."""

import matplotlib
import pytest
import torch
from test_model import made, tokens
from torch import nn

from etude import inspection
from etude.errors import Refusal
from etude.text import tokenizer as tok

matplotlib.use("Agg")
KINDS = {
    "gqa": ["dense"],
    "qwen3": ["dense", "model/attn=qwen3"],
    "gated": ["dense", "model/attn=gated"],
    "mla": ["deepseek_v2"],
    "mla_q_lora": ["deepseek_v3"],
    "window": ["dense", "model.attn.window=[5,null]"],
    "learned positions": ["gpt2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_what_the_model_computes(kind: str) -> None:
    """Causal rows that sum to 1 within the window, from a forward pass that gives the plain one's logits."""
    model, x = made(*KINDS[kind]), tokens()
    found = inspection.attention(model, x)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(x), rtol=1e-5, atol=1e-5)
    assert len(found.maps) == 2
    at = torch.arange(x.shape[1])
    for part, p in zip(model.attentions(), found.maps):
        assert p.shape == (3, 4, 20, 20)
        torch.testing.assert_close(p.sum(-1), torch.ones(3, 4, 20))
        behind = at[:, None] - at
        hidden = (behind < 0) | (behind >= (part.window or 99))
        assert not p[:, :, hidden].any() and (p[:, :, ~hidden] > 0).all()


def test_attention_is_by_the_formula() -> None:
    """One head of the first layer from the projections' weights, written out."""
    model, x = made("gpt2"), tokens(1, 6)
    block = model.blocks[0]
    with torch.no_grad():
        h = block.attn_norm(model.embed(x) + model.pos_embed.weight[:6])
        q, k = (f(h)[0, :, 8:16] for f in (block.attn.q, block.attn.k))  # head 1 of 4, 8 channels each
        scores = [[float(q[i] @ k[j]) / 8**0.5 for j in range(i + 1)] for i in range(6)]
    found = inspection.attention(model, x).maps[0][0, 1]
    for i, row in enumerate(scores):
        torch.testing.assert_close(found[i, : i + 1], torch.tensor(row).softmax(0), rtol=1e-4, atol=1e-5)


def test_an_attention_without_a_cache_is_refused() -> None:
    class Mean(nn.Module):
        def forward(self, x, positions=None, documents=None, cache=None):
            return x.cumsum(1)

    model = made("dense")
    model.blocks[1].attn = Mean()
    with pytest.raises(Refusal, match="Mean of layer 1 takes no cache"):
        inspection.attention(model, tokens())


@pytest.mark.parametrize("kind", ["dense", "gpt", "moe", "deepseek_v2"])
def test_the_last_layer_of_the_lens_is_the_model(kind: str) -> None:
    """To the bit; the first is the embedding, and losses are the model's own scores of the next token."""
    model, x = made(kind), tokens()
    states = inspection.stream(model, x)
    with torch.no_grad():
        logits, (scores, _) = model(x), model(x[:, :-1], x[:, 1:])
        assert torch.equal(inspection.spoken(model, states[-1]), logits)
        assert torch.equal(states[0], model.embedded(x, None)) and states.shape == (3, 3, 20, 32)
    found = inspection.lens(model, x, top=4)
    best = logits.softmax(-1).topk(4, -1)
    assert torch.equal(found.ids[-1], best.indices) and found.ids.shape == (3, 3, 20, 4)
    torch.testing.assert_close(found.probabilities[-1], best.values)
    torch.testing.assert_close(found.losses[-1], -scores.logprob, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.ids[0], found.ids[-1]), "a layer before the last says something else"
    assert not model.blocks[0]._forward_hooks, "nothing is left on the model"


def test_routing_counts_what_the_router_chose() -> None:
    """Shares against a count of the router's choices, token by token; a dense model has none."""
    model, x = made("moe"), tokens()
    chosen: dict[int, list[int]] = {}
    sparse = [i for i, block in enumerate(model.blocks) if block.sparse]
    for i in sparse:
        ffn, real = model.blocks[i].ffn, model.blocks[i].ffn.route

        def route(scores, i=i, real=real):
            picked, weights = real(scores)
            chosen.setdefault(i, []).extend(picked.flatten().tolist())
            return picked, weights

        ffn.route = route
    found = inspection.routing(model, x)
    assert [r.layer for r in found] == sparse and sparse
    for r in found:
        E = model.blocks[r.layer].ffn.n_experts
        counts = torch.tensor([chosen[r.layer].count(e) for e in range(E)])
        torch.testing.assert_close(r.share, counts / counts.sum())
        assert (
            r.entropy.shape == x.shape and (r.entropy > 0).all() and (r.entropy <= torch.tensor(E).log() + 1e-5).all()
        )
    assert inspection.routing(made("dense"), x) == []


def test_pieces_can_be_told_apart() -> None:
    """Spaces, new lines and halves of characters are seen, and long tokens are cut."""
    byte = tok.byte([], [])
    assert inspection.pieces(byte, byte.encode("a b\n\té")) == ["a", "·", "b", "↵", "\\t", "�", "�"]
    assert inspection.pieces(byte, byte.encode("\x01")) == ["\\x01"]
    bpe = tok.bpe(["generalisation generalisation"] * 50, [], vocab_size=400)
    assert max(map(len, inspection.pieces(bpe, bpe.encode("generalisation"), 6))) == 6


def test_figures_name_what_they_show() -> None:
    """Every head has its panel, tokens are named where there is room, dollars are no formulas."""
    byte = tok.byte([], [])
    model = made("moe", vocab_size=byte.vocab_size)
    x = torch.tensor([byte.encode("pay $5 or $6 now")])
    labels = inspection.pieces(byte, x[0].tolist())
    figure = inspection.plot_attention(inspection.attention(model, x).maps, labels)
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 8 and panels[0].get_ylabel() == "layer 0" and panels[3].get_title() == "head 3"
    assert [t.get_text() for t in panels[4].get_xticklabels()] == labels
    figure.canvas.draw()
    figure = inspection.plot_lens(inspection.lens(model, x), x, byte)
    assert len(figure.axes[0].texts) == 3 * x.shape[1]
    figure.canvas.draw()
    found = inspection.routing(model, x)
    figure = inspection.plot_routing(found)
    assert len(figure.axes[0].texts) == sum(len(r.share) for r in found)
    matplotlib.pyplot.close("all")

"""The models: against Hugging Face's, against naive formulas, and what must hold of every part."""

import functools
import itertools
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from etude.config import CONF, build, check
from etude.model import gqa, head, mlp, parts, roles
from etude.model.rope import Rope, rope
from etude.model.transformer import Transformer

V = 61
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
ATTENTIONS = sorted(p.stem for p in (CONF / "model" / "attn").glob("*.yaml"))
FEED_FORWARDS = sorted(p.stem for p in (CONF / "model" / "ffn").glob("*.yaml"))
ATTENTION_OF = {"gpt": "mha", "gpt2": "mha", "deepseek_v2": "mla", "deepseek_v3": "mla_q_lora"}


@functools.cache
def model_node(*overrides: str) -> dict[str, Any]:
    """The checked config of a model; shared by the tests, so not to be written to."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(compose("train", overrides=list(overrides)), "train")["model"]


def small(model: str, *overrides: str) -> list[str]:
    """Overrides that make a choice of conf/model tiny, whatever attention it has, and then `overrides`."""
    attn = next((o[11:] for o in overrides if o.startswith("model/attn=")), ATTENTION_OF.get(model, "gqa"))
    sizes = [f"model={model}", "model.dim=32", "model.n_layers=2", "model.max_len=32", "model.attn.n_heads=4"]
    if attn.startswith("mla"):
        latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
        latent |= {"q_lora_rank": 10} if attn == "mla_q_lora" else {}
        sizes += [f"model.attn.{k}={v}" for k, v in latent.items()]
    elif attn not in ("mha", "mqa"):
        sizes.append("model.attn.n_kv_heads=2")
    return [*sizes, "model.init_std=0.2", *overrides]


def uninitialised(model: str, *overrides: str, vocab_size: int = V, **changes: Any) -> Transformer:
    """A small model as conf/ describes it, with `changes` of the model's own settings (no new composition for those)."""
    return build(model_node(*small(model, *overrides)) | changes, vocab_size)


def made(model: str, *overrides: str, vocab_size: int = V, seed: int = 0, **changes: Any) -> Transformer:
    """The same with weights large enough that logits differ."""
    torch.manual_seed(seed)
    m = uninitialised(model, *overrides, vocab_size=vocab_size, **changes)
    m.init_weights()
    for name, p in m.named_parameters():  # norms and biases too, or a wrong one would not show
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p) if "norm" in name else 0.1 * torch.randn_like(p)
    return m.eval()


def tokens(B: int = 3, T: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- Hugging Face's models with the same weights


def llama(model: Transformer) -> tuple[Any, dict[str, Tensor]]:
    """LlamaForCausalLM with the weights of a dense `model`; -> it and its parameters under our names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attn, ffn = model.blocks[0].attn, model.blocks[0].ffn
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.dim, intermediate_size=ffn.up.out_features, num_hidden_layers=model.n_layers,
            num_attention_heads=attn.n_heads, num_key_value_heads=attn.n_kv_heads, max_position_embeddings=64, rms_norm_eps=1e-6,
            tie_word_embeddings=model.head.weight is model.embed.weight, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    inner = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.out": "mlp.down_proj",
    }  # fmt: skip
    for i in range(model.n_layers):
        names |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{other}" for ours, other in inner.items()}
    their = dict(theirs.named_parameters())
    same = {name: their[names[name.removesuffix(".weight")] + ".weight"] for name, _ in model.named_parameters()}
    assert len(same) == len(their)
    with torch.no_grad():
        for name, p in model.named_parameters():
            same[name].copy_(p)
    return theirs, same


def gpt2(model: Transformer) -> tuple[Any, dict[str, Tensor]]:
    """GPT2LMHeadModel with the weights of a `model` of model=gpt; -> it and a way to read its gradients under our names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size, n_positions=model.max_len, n_embd=model.dim, n_layer=model.n_layers, n_head=model.blocks[0].attn.n_heads,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    t = theirs.transformer
    same: dict[str, Tensor] = {"embed.weight": t.wte.weight, "pos_embed.weight": t.wpe.weight}

    def put(ours: str, module: nn.Module) -> None:
        for leaf in ("weight", "bias"):
            same[f"{ours}.{leaf}"] = getattr(module, leaf)

    put("norm", t.ln_f)
    for i, block in enumerate(t.h):
        put(f"blocks.{i}.attn_norm", block.ln_1)
        put(f"blocks.{i}.ffn_norm", block.ln_2)
        put(f"blocks.{i}.attn.qkv", block.attn.c_attn)
        put(f"blocks.{i}.attn.out", block.attn.c_proj)
        put(f"blocks.{i}.ffn.up", block.mlp.c_fc)
        put(f"blocks.{i}.ffn.out", block.mlp.c_proj)
    ours = joined({n: p.detach() for n, p in model.named_parameters()})
    assert ours.keys() == same.keys() and len(same) == len(list(theirs.parameters()))
    with torch.no_grad():
        for name, p in same.items():
            p.copy_(ours[name])
    return theirs, same


def joined(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as GPT-2 has them: q, k and v side by side, linear weights of blocks transposed."""
    out = {n: t for n, t in named.items() if ".attn.q." not in n and ".attn.k." not in n and ".attn.v." not in n}
    for name in [n for n in named if ".attn.q." in n]:
        out[name.replace(".q.", ".qkv.")] = torch.cat([named[name.replace(".q.", f".{x}.")] for x in "qkv"])
    return {n: t.T if t.dim() == 2 and n.startswith("blocks") else t for n, t in out.items()}


def compare(model: Transformer, theirs: Any, same: dict[str, Tensor], as_theirs=lambda named: named) -> None:
    ids = tokens()
    targets = tokens(seed=2)
    targets[0, :7] = -100
    logits = theirs(input_ids=ids).logits
    torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)
    scores, aux = model(ids, targets=targets)
    assert aux is None
    (-scores.logprob.sum()).backward()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").backward()
    for name, grad in as_theirs({n: p.grad for n, p in model.named_parameters()}).items():
        torch.testing.assert_close(grad, same[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tied", ["true", "false"])
def test_dense_is_llama(tied: str) -> None:
    """RMSNorm, RoPE's layout, grouped heads, SwiGLU, tied head: logits and every gradient."""
    model = made("dense", f"model.tied={tied}")
    compare(model, *llama(model))


def test_gpt_is_gpt2() -> None:
    """LayerNorm, learned positions, biases, GELU."""
    model = made("gpt", "model.ffn.activation=gelu_tanh")
    compare(model, *gpt2(model), joined)


# ---------------------------------------------------------------- the head


def naive(x: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> tuple[Tensor, ...]:
    z = F.linear(x, weight).float()
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = z.log_softmax(-1)
    valid = targets >= 0
    picked = logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return tuple(t * valid for t in (picked, z.logsumexp(-1), logp.mean(-1), -(logp.exp() * logp).sum(-1)))


@pytest.mark.parametrize("chunk", [head.CHUNK, 5 * V, 1])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("cap", [None, 2.0, 30.0])
def test_scores_and_their_gradients(chunk: int, ignored: str, cap: float | None) -> None:
    """Every output, and gradients through each alone and all together, against autograd of the plain formula; in chunks
    that do not divide the rows, and row by row; with capped logits, also where most of them are at the cap."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 7, 8), torch.randn(V, 8), torch.randint(0, V, (2, 7))
    targets[{"none": torch.zeros(2, 7), "some": torch.rand(2, 7) < 0.4, "all": torch.ones(2, 7)}[ignored].bool()] = -100
    for used in ([0], [1], [2], [0, 1, 2]):
        grads = []
        for f in (lambda *a: head.scores(*a, chunk=chunk), naive):
            a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
            outs = f(a, w, targets, cap)
            generator = torch.Generator().manual_seed(3)
            sum((outs[i] * torch.randn(2, 7, generator=generator)).sum() for i in used).backward()
            grads.append((outs, a.grad, w.grad))
        for mine, reference in zip(grads[0][0], grads[1][0]):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
            assert mine.shape == (2, 7) and mine.dtype == torch.float32
        torch.testing.assert_close(grads[0][1:], grads[1][1:], rtol=1e-5, atol=1e-5)
    assert not grads[0][0][3].requires_grad  # entropy is a metric


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3, 11, 16), torch.randn(V, 16), torch.randint(0, V, (3, 11))
    results = []
    for chunk in (head.CHUNK, 4 * V):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        s = head.scores(a, w, targets, chunk=chunk)
        (s.logprob.sum() + 0.1 * s.logz.square().sum() + s.mean_logprob.sum()).backward()
        results.append([*s, a.grad, w.grad])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary no product, forward or backward, may exceed the chunk, nor may one be kept in between."""
    B, T, D, big, chunk = 4, 64, 8, 50_000, 500_000
    sizes = []

    def linear(x: Tensor, w: Tensor) -> Tensor:
        z = x @ w.T
        sizes.append(z.numel())
        return z

    monkeypatch.setattr(head.F, "linear", linear)
    x, w = torch.randn(B, T, D, requires_grad=True), torch.randn(big, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        s = head.scores(x, w, torch.randint(0, big, (B, T)), chunk=chunk)
    forward = len(sizes)
    s.logprob.sum().backward()
    assert max(sizes) <= chunk and sum(sizes[:forward]) == B * T * big == sum(sizes[forward:])
    assert max(kept) <= w.numel()


def test_scores_under_autocast() -> None:
    """Products in bf16, all after them in fp32; gradients come in the parameters' dtype."""
    torch.manual_seed(0)
    x, w, targets = torch.randn(2, 9, 32, requires_grad=True), torch.randn(V, 32, requires_grad=True), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        s = head.scores(x, w, targets)
    s.logprob.sum().backward()
    rounded = naive(x.detach().bfloat16(), w.detach().bfloat16(), targets)
    torch.testing.assert_close(s.logprob, rounded[0])
    assert s.logprob.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    a, b = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    naive(a, b, targets)[0].sum().backward()
    for got, expected in ((x.grad, a.grad), (w.grad, b.grad)):
        assert (got - expected).norm() < 0.02 * expected.norm()


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("model", MODELS)
def test_no_token_sees_the_future(model: str) -> None:
    m, ids = made(model), tokens(1, 16)
    before = m(ids)
    for t in (1, 8, 15):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = m(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-3)


def test_documents_are_isolated() -> None:
    """Packed documents give the logits and gradients they give alone (RoPE is relative: no new positions needed)."""
    m = made("dense")
    lengths = [5, 1, 9, 3]
    ids, targets = tokens(1, sum(lengths)), tokens(1, sum(lengths), seed=5)
    doc_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    logits = m(ids, doc_ids=doc_ids)
    m(ids, targets=targets, doc_ids=doc_ids)[0].logprob.sum().backward()
    packed = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    for piece, target, expected in zip(ids.split(lengths, 1), targets.split(lengths, 1), logits.split(lengths, 1)):
        torch.testing.assert_close(m(piece), expected, rtol=1e-5, atol=1e-5)
        m(piece, targets=target)[0].logprob.sum().backward()
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.grad, packed[name], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(m(ids)[:, 5:], logits[:, 5:], atol=1e-2), "the mask had no effect"


def test_plain_training_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A (T, T) mask would keep every flash kernel away."""
    calls = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **how):
        calls.append((attn_mask, how["is_causal"]))
        return real(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for model in ("dense", "gpt"):
        m = made(model).train()
        m(tokens(), targets=tokens())[0].logprob.sum().backward()
    assert len(calls) == 4 and all(mask is None and causal for mask, causal in calls)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_against_a_loop(n_kv_heads: int | None, dtype: torch.dtype) -> None:
    """Query head h looks with key head h // (n_heads / n_kv_heads); head_dim need not be dim / n_heads."""
    torch.manual_seed(0)
    attn = gqa.GQA(
        24, 0, n_heads=4, n_kv_heads=n_kv_heads, head_dim=8, rope=None, rope_layers=None, window=None, qk_norm=False,
        norm_eps=1e-6, gate=False, bias=True, out_bias=True, dropout=0.0,
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 6, 24).to(dtype)
    kv = n_kv_heads or 4
    q, k, v = (f(x).float().view(2, 6, -1, 8) for f in (attn.q, attn.k, attn.v))
    assert k.shape[2] == kv and attn.cache_shape() == (kv, 8, 8)
    rows = torch.zeros(2, 6, 4, 8)
    for b, t, h in itertools.product(range(2), range(6), range(4)):
        g = h // (4 // kv)
        w = torch.softmax(k[b, : t + 1, g] @ q[b, t, h] / math.sqrt(8), 0)
        rows[b, t, h] = w @ v[b, : t + 1, g]
    expected = attn.out(rows.flatten(2).to(dtype))
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(attn(x), expected, **close)


def turn(x: Tensor, positions: Tensor | None, theta: float) -> Tensor:
    return rope(x, positions, Rope(theta=theta, dim=None, layout="half"))


def test_rope_turns_pairs_and_is_relative() -> None:
    """Against complex multiplication; inner products depend on the distance alone; given positions count."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 8)
    angle = torch.arange(10)[:, None] * 500.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(10, 4), angle.float())
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(turn(x, None, 500.0), expected)
    at = torch.arange(10)[None].expand(2, -1)
    torch.testing.assert_close(turn(x, at, 500.0), expected)
    a, b = (torch.randn(1, 1, 1, 8).expand(1, 1, 10, 8) for _ in range(2))
    near = (turn(a, at[:1], 1e4) * turn(b, at[:1] + 3, 1e4)).sum(-1)
    torch.testing.assert_close(near, near[..., :1].expand_as(near))
    with torch.inference_mode():
        turn(x[:, :, :7], None, 77.0)
    y = x[:, :, :7].clone().requires_grad_()
    turn(y, None, 77.0).sum().backward()  # the memoised table may come from inference mode


def test_positions_that_are_added() -> None:
    """Sinusoids as in the paper; both kinds follow the positions that are given."""
    found = parts.sinusoid(torch.arange(5), 6)
    for p, i in itertools.product(range(5), range(3)):
        angle = p / 10000 ** (2 * i / 6)
        assert found[p, 2 * i : 2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)
    for pos in ("learned", "sinusoidal"):
        m, ids = made("gpt", f"model.pos={pos}"), tokens(2, 8)
        where = torch.arange(8)[None].expand(2, -1)
        torch.testing.assert_close(m(ids, positions=where), m(ids))
        assert not torch.allclose(m(ids, positions=where + 3), m(ids), atol=1e-2)
        assert m.position_limit == (32 if pos == "learned" else None)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("norm_at", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("scales", [(1.0, None, None), (0.4, 3.0, 5.0)])
def test_the_stream_against_its_formula(norm_at: str, scales: tuple[float, float | None, float | None]) -> None:
    """Where norms are, what each part adds, the scaled embedding and the capped logits, written out; to 1e-5."""
    r, embed, cap = scales
    m, ids = made("dense", norm_at=norm_at, residual_scale=r, embed_scale=embed, logit_cap=cap), tokens()

    def norm(name: str, x: Tensor, at: nn.Module) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * getattr(at, name).weight

    x = m.embed.weight[ids] * (embed or 1.0)
    for b in m.blocks:
        for part, f in (("attn", lambda x, b=b: b.attn(x)), ("ffn", lambda x, b=b: b.ffn(x)[0])):
            match norm_at:
                case "pre":
                    x = x + r * f(norm(f"{part}_norm", x, b))
                case "post":
                    x = norm(f"{part}_out_norm", x + r * f(x), b)
                case "sandwich":
                    x = x + r * norm(f"{part}_post_norm", f(norm(f"{part}_norm", x, b)), b)
    x = x if norm_at == "post" else norm("norm", x, m)
    z = x @ m.embed.weight.T
    z = z if cap is None else cap * torch.tanh(z / cap)
    torch.testing.assert_close(m(ids), z, rtol=1e-5, atol=1e-5)
    scores, _ = m(ids, targets=tokens(seed=2))
    expected = z.log_softmax(-1).gather(-1, tokens(seed=2)[..., None])[..., 0]
    torch.testing.assert_close(scores.logprob, expected, rtol=1e-5, atol=1e-5)
    norms = sum("norm" in n for n, _ in m.named_parameters())
    assert norms == {"pre": 5, "post": 4, "sandwich": 9}[norm_at]


@pytest.mark.parametrize("cap", [0.5, 4.0, 30.0])
def test_capped_logits_and_their_gradients(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's scores are those of the capped logits, with gradients of every parameter, kept whole and in chunks;
    to 1e-5 of plain autograd's."""
    m, ids, targets = made("dense", logit_cap=cap, tied=False), tokens(), tokens(seed=2)
    targets[0, :7] = -100
    z = m(ids)
    assert z.abs().max() <= cap
    F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").backward()
    expected = {n: p.grad.clone() for n, p in m.named_parameters()}
    assert expected["head.weight"].norm() > 0.1
    real = head.scores
    for chunk in (head.CHUNK, 7 * V):
        monkeypatch.setattr(head, "scores", lambda *a, chunk=chunk: real(*a, chunk=chunk))
        m.zero_grad()
        (-m(ids, targets=targets)[0].logprob.sum()).backward()
        for name, p in m.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


# ---------------------------------------------------------------- dropout, activation checkpointing


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(100_003,), (3, 7, 5000)])
def test_dropout(p: float, shape: tuple[int, ...]) -> None:
    """Rate and expectation within 5 standard deviations, the backward mask is the forward one, nothing at evaluation."""
    torch.manual_seed(0)
    x = torch.full(shape, 2.0, requires_grad=True)
    y = parts.dropout(x, p, True)
    n = x.numel()
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 1e-5
    scale = 65536 / (65536 - round(p * 65536))
    torch.testing.assert_close(y.detach(), kept * 2.0 * scale)
    grad = torch.rand(shape)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad * kept * scale)
    neighbours = (kept.flatten()[1:] & kept.flatten()[:-1]).float().mean()
    assert abs(neighbours - (1 - p) ** 2) < 10 / math.sqrt(n), "neighbouring lanes are not independent"
    assert parts.dropout(x, p, False) is x and parts.dropout(x, 0.0, True) is x
    torch.manual_seed(0)
    assert torch.equal(parts.dropout(x, p, True), y)
    assert not torch.equal(parts.dropout(x, p, True), y)


def test_every_dropout_is_in_its_place() -> None:
    """Each of the three acts in training and alone; at evaluation none does."""
    ids = tokens()
    for name in ("model.dropout", "model.attn.dropout", "model.ffn.dropout"):
        for model in ("dense", "gpt", "moe"):
            m, plain = made(model, f"{name}=0.5"), made(model)
            torch.testing.assert_close(m(ids), plain(ids))
            m.train()
            torch.manual_seed(0)
            first = m(ids)
            torch.manual_seed(0)
            assert torch.equal(m(ids), first) and not torch.equal(m(ids), first), name


@pytest.mark.parametrize("model", ["dense", "gpt", "moe", "deepseek_v3"])
def test_activation_checkpointing_changes_nothing(model: str) -> None:
    """The forward that is done again must draw the same dropout."""
    drop = ["model.dropout=0.2", "model.attn.dropout=0.2"]
    drop += [f"model.ffn.{x}dropout=0.2" for x in (("dense.", "sparse.") if model == "deepseek_v3" else ("",))]
    found = []
    for on in ("false", "true"):
        m = made(model, f"model.checkpoint={on}", *drop).train()
        torch.manual_seed(7)
        s, _ = m(tokens(), targets=tokens(seed=2))
        s.logprob.sum().backward()
        found.append([s.logprob.detach(), *(p.grad for p in m.parameters() if p.requires_grad)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- of every model


def every_model() -> list[list[str]]:
    return [
        [model, f"model/ffn={ffn}", f"model/norm={norm}", f"model.tied={tied}"]
        for model, ffn, norm, tied in itertools.product(
            ("dense", "gpt"), ("swiglu", "mlp"), ("rmsnorm", "layernorm"), ("true", "false")
        )
    ]


def keep_the_rules(m: Transformer, tied: bool) -> None:
    """Nothing shared but tied embeddings; a plan for tensor parallelism of every weight."""
    names: dict[int, list[str]] = {}
    for name, p in m.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    shared = [n for n in names.values() if len(n) > 1]
    assert shared == ([["embed.weight", "head.weight"]] if tied else [])
    modules = [module for module in m.modules() if list(module.parameters(recurse=False))]
    assert len({id(module) for module in modules}) == len(modules)
    assert m.n_params() == sum(p.numel() for p in m.parameters())
    for name, module in m.named_modules():
        own = {n for n, child in module.named_children() if isinstance(child, nn.Linear)}
        if own:
            plan = module.tp_plan
            assert own <= plan.keys() and set(plan.values()) <= {"col", "row", "expert", "replicate"}, name
        if type(module).__module__.startswith("etude") and list(module.parameters(recurse=False)):
            assert {n for n, _ in module.named_parameters(recurse=False)} <= module.tp_plan.keys(), name


def fill_from_meta(empty: Transformer) -> None:
    """A model of the meta device, moved to memory full of NaN: init_weights leaves none, and logits are finite."""
    empty.to_empty(device="cpu")
    for p in empty.parameters():
        p.data.fill_(math.nan)
    empty.init_weights()
    assert all(p.isfinite().all() for p in empty.parameters())
    assert torch.isfinite(empty(tokens())).all()


@pytest.mark.parametrize("choice", every_model(), ids="-".join)
def test_rules_of_every_model(choice: list[str]) -> None:
    """Nothing shared but tied embeddings; a plan for tensor parallelism; every parameter initialised, from any device."""
    m = made(*choice)
    keep_the_rules(m, tied=choice[-1].endswith("true"))
    assert len({p.data_ptr() for p in m.parameters()}) == len(list(m.parameters()))
    with torch.device("meta"):
        empty = uninitialised(*choice)
    fill_from_meta(empty)


@functools.cache
def attention_nodes() -> dict[str, dict[str, Any]]:
    added = ["model.pos=learned"]  # to a model without rotary positions
    return {
        a: model_node(*small("dense", f"model/attn={a}", *(added if a == "mha" else [])))["attn"] for a in ATTENTIONS
    }


@functools.cache
def feed_forward_nodes() -> dict[str, dict[str, Any]]:
    return {f: model_node(*small("dense", f"model/ffn={f}"))["ffn"] for f in FEED_FORWARDS}


@pytest.mark.parametrize("model", MODELS)
def test_rules_of_every_combination(model: str) -> None:
    """Every model with every attention and every feed-forward part: the rules above, and a description of what was built
    that is the config it was built from."""
    node, checked = model_node(*small(model)), 0
    trunks = [{k: v for k, v in model_node(*small(m)).items() if k not in ("attn", "ffn")} for m in MODELS]
    seen = trunks.index(trunks[MODELS.index(model)]) < MODELS.index(
        model
    )  # with these parts, another model is this one
    own = [(node["attn"], node["ffn"])]
    for attn, ffn in own if seen else itertools.product(attention_nodes().values(), feed_forward_nodes().values()):
        if node["pos"] != "rope" and attn["rope"] is not None:
            continue
        whole = node | {"attn": attn, "ffn": ffn}
        with torch.device("meta"):
            m = build(whole, V)
        keep_the_rules(m, node["tied"])
        assert m.node == whole
        checked += 1
    assert checked == (1 if seen else len(FEED_FORWARDS) * (len(ATTENTIONS) if node["pos"] == "rope" else 1))


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_every_combination_is_initialised(attn: str) -> None:
    """Whatever the memory held before; with norms at each place, so that none is left out."""
    node = model_node(*small("gpt" if attn == "mha" else "dense"))
    for i, ffn in enumerate(feed_forward_nodes().values()):
        norm_at = ("pre", "post", "sandwich")[i % 3]
        with torch.device("meta"):
            empty = build(node | {"attn": attention_nodes()[attn], "ffn": ffn, "norm_at": norm_at}, V)
        fill_from_meta(empty)


@pytest.mark.parametrize("model", MODELS)
def test_the_description_is_the_config(model: str) -> None:
    """What was built says how to build it again, as JSON: lists over the layers, scaled positions and all; and building
    from it gives the same parameters."""
    node = model_node(*small(model, "model.residual_scale=0.5", "model.norm_at=sandwich"))
    node = node | {"attn": node["attn"] | {"window": [3, None]}}
    if node["attn"]["rope"] is not None:
        node["attn"] |= {"rope_layers": [True, False]}
        node["attn"]["rope"] = model_node("model=dense", "model/attn/rope=yarn")["attn"]["rope"]
    m = build(node, V)
    assert m.node == node and json.loads(json.dumps(m.node)) == node
    again = build(json.loads(json.dumps(m.node)), V)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in m.named_parameters()]
    assert repr(again) == repr(m) and again.node == m.node


def test_the_description_has_what_was_left_to_defaults() -> None:
    """A config may leave out an argument that has a default: the model is built, and described with it or without."""
    node = dict(model_node(*small("dense")))
    node["norm"] = {k: v for k, v in node["norm"].items() if k != "eps"}
    m = build(node, V)
    assert build(m.node, V).norm.eps == m.norm.eps == parts.RMSNorm(4).eps


def test_the_description_keeps_arguments_of_other_packages() -> None:
    """A part from elsewhere need not have keyword-only arguments: what the config gave it must not get lost."""
    node = model_node(*small("dense")) | {"norm": {"_target_": "torch.nn.RMSNorm", "_partial_": True, "eps": 0.25}}
    m = build(node, V)
    assert m.norm.eps == 0.25
    assert build(m.node, V).norm.eps == 0.25


@pytest.mark.parametrize("model", ["dense", "gpt", "moe", "deepseek_v3"])
def test_initialisation_is_the_table(model: str) -> None:
    """Standard deviations of what is drawn, by name; means 0; biases 0; norms 1. Experts' weights as any others: `out`
    writes into the residual stream, each expert has its own numbers."""
    node = model_node(f"model={model}", "model.dim=128", "model.n_layers=3", "model.attn.n_heads=4", "model.tied=false")
    for std, expected in ((None, 0.02 * math.sqrt(768 / 128)), (0.05, 0.05)):
        torch.manual_seed(0)
        m = build(node | {"init_std": std}, 500)
        m.init_weights()
        stacked = 0
        for name, p in m.named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all(), name
            elif "norm" in name:
                assert (p == 1).all(), name
            else:
                wanted = expected / math.sqrt(6) if name.removesuffix(".weight").endswith(".out") else expected
                for part in p if p.dim() == 3 else [p]:
                    assert part.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * part.numel()) + 0.005), name
                    assert abs(part.mean().item()) < 5 * wanted / math.sqrt(part.numel()), name
                stacked += p.dim() == 3
                assert p.dim() < 3 or len(p.flatten(1).unique(dim=0)) == len(p), name
        assert stacked == {"dense": 0, "gpt": 0, "moe": 6, "deepseek_v3": 4}[model]


def test_roles_of_parameters() -> None:
    """The table by which weights are drawn and rates are set, name by name; every parameter of every model has a role."""
    expected = {
        "embed.weight": "embedding",
        "head.weight": "head",
        "norm.weight": "vector",
        "blocks.1.attn_norm.weight": "vector",
        "blocks.1.attn.q_down.weight": "hidden",
        "blocks.1.attn.q_norm.weight": "vector",
        "blocks.1.attn.q_up.weight": "hidden",
        "blocks.1.attn.kv_down.weight": "hidden",
        "blocks.1.attn.kv_up.weight": "hidden",
        "blocks.1.attn.out.weight": "residual",
        "blocks.1.ffn.router.weight": "hidden",
        "blocks.1.ffn.bias": "vector",
        "blocks.1.ffn.gate_up": "hidden",
        "blocks.1.ffn.out": "residual",
        "blocks.1.ffn.shared.gate.weight": "hidden",
        "blocks.1.ffn.shared.out.weight": "residual",
    }
    found = {n: roles.role(n, p) for n, p in uninitialised("deepseek_v3").named_parameters()}
    assert expected.items() <= found.items()
    gpt = {n: roles.role(n, p) for n, p in uninitialised("gpt", "model.tied=false").named_parameters()}
    assert (gpt["pos_embed.weight"], gpt["blocks.0.attn.out.bias"], gpt["head.weight"]) == (
        "embedding",
        "vector",
        "head",
    )
    for model in MODELS:
        m = uninitialised(model, norm_at="sandwich")
        assert {roles.role(n, p) for n, p in m.named_parameters()} <= set(roles.ROLES)


def test_counts_by_hand() -> None:
    """Parameters and FLOPs of tiny models, written out."""
    ffn = 96  # 8/3 of 32, rounded up to a multiple of 32
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * ffn + 2 * 32
    attention = 12 * 32 * 20  # 12 H D_h T
    for tied in (True, False):
        m = made("dense", f"model.tied={str(tied).lower()}")
        n = V * 32 * (1 if tied else 2) + 2 * block + 32
        assert m.n_params() == n
        assert m.flops_per_token(20) == 6 * (V * 32 + 2 * block + 32) + 2 * attention
    m = made("gpt")
    block = 4 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32 + 4 * 32
    assert m.n_params() == V * 32 + 32 * 32 + 2 * block + 64
    assert m.flops_per_token(20) == 6 * (V * 32 + 2 * block + 64) + 2 * attention


def test_sizes_that_are_derived() -> None:
    ffn = {"activation": "silu", "bias": False, "dropout": 0.0}
    for dim, hidden in ((32, 96), (96, 256), (100, 288), (768, 2048)):
        assert mlp.GatedMLP(dim, 0, hidden=None, **ffn).up.out_features == hidden
    assert mlp.MLP(10, 0, hidden=None, **ffn).up.out_features == 40
    assert mlp.GatedMLP(10, 0, hidden=7, **ffn).up.out_features == 7


def test_norms_against_their_formulas() -> None:
    """Also for bf16, where the mean of squares would lose digits."""
    torch.manual_seed(0)
    x = torch.randn(4, 50) * 3 + 1
    rms, layer, bare = parts.RMSNorm(50, eps=1e-6), parts.LayerNorm(50, eps=1e-5), parts.LayerNorm(50, bias=False)
    for norm in (rms, layer, bare):
        norm.init_weights()
        norm.weight.data.uniform_(0.5, 2)
    layer.bias.data.uniform_(-1, 1)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight)
    centred = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), centred * layer.weight + layer.bias)
    torch.testing.assert_close(bare(x), centred * bare.weight)
    half = rms(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, rms(x.bfloat16().float()).bfloat16())


# Vocabulary and parameters as published; DeepSeek-V3 without its layer for further tokens.
PUBLISHED = {
    "gpt2/small": (50257, 124_439_808), "gpt2/medium": (50257, 354_823_168), "gpt2/large": (50257, 774_030_080),
    "gpt2/xl": (50257, 1_557_611_200), "llama/7b": (32000, 6_738_415_616), "llama/13b": (32000, 13_015_864_320),
    "llama/1b": (128256, 1_235_814_400), "llama/3b": (128256, 3_212_749_824), "llama/8b": (128256, 8_030_261_248),
    "llama/70b": (128256, 70_553_706_496), "llama/smollm2_135m": (49152, 134_515_008),
    "llama/smollm2_360m": (49152, 361_821_120), "llama/smollm2_1.7b": (49152, 1_711_376_384),
    "qwen3/0.6b": (151936, 596_049_920), "qwen3/1.7b": (151936, 1_720_574_976), "qwen3/4b": (151936, 4_022_468_096),
    "qwen3/8b": (151936, 8_190_735_360), "qwen3/14b": (151936, 14_768_307_200), "qwen3/32b": (151936, 32_762_123_264),
    "qwen3_moe/30b_a3b": (151936, 30_532_122_624), "qwen3_moe/235b_a22b": (151936, 235_093_634_560),
    "mixtral/8x7b": (32000, 46_702_792_704), "mixtral/8x22b": (32768, 140_630_071_296),
    "deepseek_v2/lite": (102400, 15_706_484_224), "deepseek_v2/236b": (102400, 235_741_434_880),
    "deepseek_v3/671b": (129280, 671_026_419_200),
}  # fmt: skip


def test_every_published_size_is_held_against_its_count() -> None:
    folders = [p for p in (CONF / "model").iterdir() if p.with_suffix(".yaml").exists() and p.is_dir()]
    assert {f"{f.name}/{p.stem}" for f in folders for p in f.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(size: str) -> None:
    vocab_size, expected = PUBLISHED[size]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = check(compose("train", overrides=[f"model={size}"]), "train")["model"]
    with torch.device("meta"):
        assert build(node, vocab_size).n_params() == expected

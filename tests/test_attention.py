"""Attention: rotary positions, windows, packed documents and latents, each against its formula written out."""

import functools
import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paged import Rows, cache_of
from test_model import MODELS, V, made, model_node, tokens, uninitialised
from torch import Tensor

from etude.config import CONF, build
from etude.errors import Refusal
from etude.infer.cache import PagedCache
from etude.infer.pages import PagePool
from etude.model import attention, gqa, mla
from etude.model.attention import BLOCK, Documents, attend
from etude.model.rope import LinearRope, Llama3Rope, NTKRope, Rope, YarnRope, rope
from etude.model.transformer import Transformer

CPU = torch.device("cpu")
ROPES = sorted(p.stem for p in (CONF / "model" / "attn" / "rope").glob("*.yaml"))


def close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


# ---------------------------------------------------------------- rotary positions

YARN: dict[str, Any] = {"factor": 40.0, "original_max_len": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
NO_SCALES: dict[str, Any] = {"mscale": None, "mscale_all_dim": None, "attention_factor": None}
LLAMA3: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_len": 8192}
SCALED: dict[str, tuple[type[Rope], dict[str, Any]]] = {
    "linear": (LinearRope, {"factor": 4.0}),
    "llama3": (Llama3Rope, LLAMA3),
    "llama3-32": (Llama3Rope, LLAMA3 | {"factor": 32.0, "original_max_len": 512, "high_freq_factor": 8.0}),
    "yarn": (YarnRope, YARN | NO_SCALES),
    "yarn-short": (
        YarnRope,
        YARN | NO_SCALES | {"factor": 4.0, "original_max_len": 16},
    ),  # both ends of its ramp cut off
    "yarn-long": (YarnRope, YARN | NO_SCALES | {"original_max_len": 10**8, "beta_fast": 5e5, "beta_slow": 0.5}),
    "yarn-betas": (YarnRope, YARN | NO_SCALES | {"beta_fast": 8.0, "beta_slow": 2.0}),
    "yarn-one": (YarnRope, YARN | NO_SCALES | {"factor": 1.0}),
    "yarn-mscale": (YarnRope, YARN | NO_SCALES | {"mscale": 1.0, "mscale_all_dim": 0.707}),
    "yarn-half-a-pair": (YarnRope, YARN | NO_SCALES | {"mscale": 0.707}),  # one of the two alone does nothing
    "yarn-attention": (YarnRope, YARN | NO_SCALES | {"attention_factor": 0.8, "mscale": 1.0, "mscale_all_dim": 0.5}),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dim,theta", [(64, 10000.0), (128, 500000.0), (16, 1000.0)])
def test_scaled_frequencies_are_hugging_faces(name: str, dim: int, theta: float) -> None:
    """Frequencies and magnitude to 1e-6 of the value."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, settings = SCALED[name]
    how = kind(theta=theta, dim=None, layout="half", **settings)
    theirs = {"original_max_len": "original_max_position_embeddings"}
    parameters = {theirs.get(k, k): v for k, v in settings.items() if v is not None}
    rope_type = name.split("-")[0]
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=163840,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta} | parameters,
    )  # fmt: skip
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope_type](config, CPU)
    torch.testing.assert_close(how.frequencies(dim, CPU), frequencies, rtol=1e-6, atol=0)
    assert how.magnitude == pytest.approx(magnitude, rel=1e-6)
    ratio = Rope(theta=theta, dim=None, layout="half").frequencies(dim, CPU) / how.frequencies(dim, CPU)
    assert (ratio[-1] > 1.1) == (name != "yarn-one"), "the slowest pair was not stretched"


@pytest.mark.parametrize("dim", [4, 16, 128])
def test_ntk_frequencies(dim: int) -> None:
    """theta times factor^(d / (d - 2)): the fastest pair as it was, the slowest slower by exactly the factor."""
    how, plain = NTKRope(theta=500.0, dim=None, layout="half", factor=8.0), Rope(theta=500.0, dim=None, layout="half")
    base = 500.0 * 8.0 ** (dim / (dim - 2))
    expected = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)])
    found = how.frequencies(dim, CPU)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ratio = plain.frequencies(dim, CPU) / found
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(8.0, rel=1e-5)
    assert how.magnitude == how.score_scale == 1.0


def every_rope(**common: Any) -> list[Rope]:
    kinds = [kind(**common, **settings) for kind, settings in SCALED.values()]
    return [Rope(**common), NTKRope(factor=4.0, **common), *kinds]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_turned_channels_against_complex_numbers(layout: Any) -> None:
    """Pair i times magnitude e^(j p f_i), for each kind of scaling, at positions that are given or counted."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 16)
    at = torch.randint(0, 300, (2, 9))
    first, second = (x[..., :8], x[..., 8:]) if layout == "half" else (x[..., ::2], x[..., 1::2])
    for how in every_rope(theta=100.0, dim=None, layout=layout):
        for positions in (None, at):
            p = torch.arange(9).expand(2, -1) if positions is None else positions
            angle = p[:, None, :, None].double() * how.frequencies(16, CPU).double()
            turned = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angle), angle)
            turned *= how.magnitude
            pairs = (turned.real, turned.imag)
            expected = torch.cat(pairs, -1) if layout == "half" else torch.stack(pairs, -1).flatten(-2)
            close(rope(x, positions, how), expected.float(), 1e-4, str(how))  # angles of up to 300 in fp32


def test_interleaved_is_half_with_the_channels_in_another_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 16)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    for half, mixed in zip(
        every_rope(theta=100.0, dim=None, layout="half"), every_rope(theta=100.0, dim=None, layout="interleaved")
    ):
        assert torch.equal(rope(x[..., order], None, half), rope(x, None, mixed)[..., order])
        assert not torch.allclose(rope(x, None, half), rope(x, None, mixed), atol=0.1)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_partial_rotary(layout: Any) -> None:
    """The first `dim` channels are turned as a head of that width would be, the others are left."""
    torch.manual_seed(0)
    x, at = torch.randn(2, 3, 9, 16), torch.randint(0, 50, (2, 9))
    for part, whole in zip(
        every_rope(theta=100.0, dim=6, layout=layout), every_rope(theta=100.0, dim=None, layout=layout)
    ):
        for positions in (None, at):
            y = rope(x, positions, part)
            assert torch.equal(y[..., 6:], x[..., 6:])
            assert torch.equal(y[..., :6], rope(x[..., :6], positions, whole))
    attn = attention_of(rope=Rope(theta=100.0, dim=4, layout=layout))
    close(attn(torch.ones(1, 5, 24)), by_hand(attn, torch.ones(1, 5, 24)), 1e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout: Any) -> None:
    """Also with scaled positions: the same query and key give the same product wherever they stand, to 2e-4 (angles of
    a thousand in fp32), and another one at another distance."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, 1000, 16) for _ in range(2))
    at = torch.arange(1000)[None]
    for how in every_rope(theta=100.0, dim=None, layout=layout):
        products = [(rope(q, at + d, how) * rope(k, at, how)).sum(-1) for d in (0, 3, 5)]
        for p in products:
            close(p, p[..., :1].expand_as(p), 2e-4, str(how))
        assert (products[1] - products[0]).abs().min() > 1e-3 and (products[2] - products[1]).abs().min() > 1e-3


def test_rope_keeps_the_dtype_and_computes_in_fp32() -> None:
    """In bf16, positions of a few hundred would be rounded."""
    torch.manual_seed(0)
    x, at = torch.randn(1, 2, 7, 8).bfloat16(), torch.arange(1000, 1007)[None]
    for how in every_rope(theta=100.0, dim=None, layout="half"):
        y = rope(x, at, how)
        assert y.dtype == torch.bfloat16 and torch.equal(y, rope(x.float(), at, how).bfloat16())


# ---------------------------------------------------------------- the kernel


def naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None, ids: Tensor | None = None
) -> Tensor:
    """Every score, masked: q (B, H, T, D), k, v (B, H_kv, T, D), documents by their ids (B, T)."""
    T, heads = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    seen = (behind >= 0) & (behind < (T if window is None else window))
    if ids is not None:
        first = torch.ones_like(ids)
        first[:, 1:] = (ids[:, 1:] != ids[:, :-1]).long()
        document = first.cumsum(1)
        seen = seen & (document[:, :, None] == document[:, None])[:, None]
    return z.masked_fill(~seen, -math.inf).softmax(-1) @ v


def same_with_gradients(f: Any, g: Any, inputs: tuple[Tensor, ...], tolerance: float, what: str) -> None:
    found = []
    for function in (f, g):
        xs = [x.clone().requires_grad_() for x in inputs]
        y = function(*xs)
        y.mul(torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        found.append([y.detach(), *(x.grad for x in xs)])
    for name, one, other in zip("yqkv", *found):
        scale = max(1.0, other.abs().max().item())
        close(one / scale, other / scale, tolerance, f"{name} {what}")


def lengths_about(window: int) -> list[int]:
    size = max(window, BLOCK)  # of the blocks
    return sorted({1, max(1, window - 1), window, window + 1, size + 1, 2 * size, 2 * size + 1, 3 * size, 5 * size - 9})


@pytest.mark.parametrize("window", [1, 5, 128, 200])
def test_windows_against_a_mask(window: int) -> None:
    """Below, at and above one window, two blocks and several, whole and not: outputs and gradients to 1e-5 of the
    largest. Two key heads for four query heads, values narrower than keys, a scale of its own."""
    torch.manual_seed(0)
    for T in lengths_about(window):
        shapes = ((2, 4, T, 6), (2, 2, T, 6), (2, 2, T, 3))
        q, k, v = (torch.randn(s) for s in shapes)
        same_with_gradients(
            lambda q, k, v: attend(q, k, v, None, 0.7, window),
            lambda q, k, v: naive(q, k, v, 0.7, window),
            (q, k, v), 1e-5, f"T={T} window={window}",
        )  # fmt: skip


@pytest.mark.parametrize("heads,kv,width", [(4, 4, 8), (4, 1, 8), (6, 2, 5), (4, 4, 3)])
def test_whole_attention_against_a_mask(heads: int, kv: int, width: int) -> None:
    """Without a window, and with one that is never reached; the default scale is 1/sqrt(D)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 37, 8), torch.randn(2, kv, 37, 8), torch.randn(2, kv, 37, width)
    for window in (None, 37, 1000):
        same_with_gradients(lambda *a, w=window: attend(*a, window=w), naive, (q, k, v), 1e-5, f"window={window}")
    assert attend(q, k, v).shape == (2, heads, 37, width)


def test_attention_in_bf16() -> None:
    """To 0.02 of fp32's, with and without a window, short rows (computed in fp32 on CPU) and long ones."""
    torch.manual_seed(0)
    for T, window in ((40, None), (40, 7), (600, None), (600, 7)):
        q, k, v = torch.randn(1, 4, T, 16), torch.randn(1, 2, T, 16), torch.randn(1, 2, T, 8)
        found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=window)
        assert found.dtype == torch.bfloat16
        close(found.float(), naive(q, k, v, window=window), 0.02, f"{T} {window}")


# ---------------------------------------------------------------- packed documents


def packed(*rows: list[tuple[int, int]]) -> Tensor:
    """doc_ids of rows of (id, length)."""
    return torch.stack([torch.cat([torch.full((n,), i) for i, n in row]) for row in rows])


def at_random(rng: random.Random, T: int, longest: int) -> list[tuple[int, int]]:
    """Documents of random lengths that fill T positions; neighbours have different ids, which come back."""
    row: list[tuple[int, int]] = []
    while T:
        n = min(T, rng.randint(1, longest))
        row.append((rng.choice([i for i in (3, 8, 900, 0) if not row or i != row[-1][0]]), n))
        T -= n
    return row


RNG = random.Random(0)
PACKED = {
    "random": packed(at_random(RNG, 24, 9), at_random(RNG, 24, 20), at_random(RNG, 24, 3)),
    "ones": packed([(i, 1) for i in range(24)], [(i % 2, 1) for i in range(24)]),
    "one a row": packed([(7, 24)], [(7, 24)], [(2, 24)]),
    "one and several": packed([(5, 24)], [(5, 23), (6, 1)], [(6, 1), (5, 23)]),
    "one more": packed([(5, 24)], [(5, 23), (6, 1)]),
    "come back": packed([(5, 8), (2, 8), (5, 8)], [(2, 3), (5, 1), (2, 20)]),
}


def pieces(doc_ids: Tensor) -> list[tuple[int, slice]]:
    """(row, where) of each document."""
    found = []
    for b, row in enumerate(doc_ids.tolist()):
        start = 0
        for _, run in itertools.groupby(row):
            n = len(list(run))
            found.append((b, slice(start, start + n)))
            start += n
    return found


def test_documents_are_runs_of_equal_ids() -> None:
    """Positions from 0 in each; an id that comes back, or that the row above ended with, begins a new document."""
    documents = Documents(PACKED["come back"])
    assert documents.positions.tolist() == [[*range(8)] * 3, [*range(3), 0, *range(20)]]
    assert documents.bounds.tolist() == [0, 8, 16, 24, 27, 28, 48] and documents.bounds.dtype == torch.int32
    for ids in PACKED.values():
        documents = Documents(ids)
        found = [documents.positions[b, s].tolist() for b, s in pieces(ids)]
        assert found == [list(range(s.stop - s.start)) for _, s in pieces(ids)]
        assert documents.bounds.tolist()[:-1] == [b * 24 + s.start for b, s in pieces(ids)]


@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_packed_attention_against_a_mask(window: int | None) -> None:
    """The kernel itself, with shared heads and narrow values: outputs and gradients to 1e-5 of the largest."""
    torch.manual_seed(0)
    rng = random.Random(1)
    cases = [*PACKED.values(), packed(at_random(rng, 700, 300), at_random(rng, 700, 40), [(1, 700)])]
    for ids in cases:
        B, T = ids.shape
        q, k, v = torch.randn(B, 4, T, 6), torch.randn(B, 2, T, 6), torch.randn(B, 2, T, 3)
        same_with_gradients(
            lambda q, k, v, ids=ids: attend(q, k, v, Documents(ids), 0.7, window),
            lambda q, k, v, ids=ids: naive(q, k, v, 0.7, window, ids),
            (q, k, v), 1e-5, f"T={T}",
        )  # fmt: skip


CHOICES = {
    **{m: [m] for m in ("dense", "gpt", "qwen3", "moe", "deepseek_v2", "deepseek_v3")},
    "mla": ["dense", "model/attn=mla"],
    "gated": ["dense", "model/attn=gated"],
    "local": ["dense", "model/attn=local", "model.attn.window=[4,4,null]"],
    "mla-window": ["dense", "model/attn=mla", "model.attn.window=3", "model/attn/rope=yarn"],
    "sinusoidal": ["gpt", "model.pos=sinusoidal"],
}


PATHS = ("dense", "mla", "local", "mla-window")  # all the ways in which attention deals with documents


@pytest.mark.parametrize(
    "case,choice", [(case, c) for case in PACKED for c in CHOICES if c in PATHS or case in ("random", "come back")]
)
def test_packed_documents_are_the_documents_alone(case: str, choice: str) -> None:
    """Logits to 1e-5 and gradients of every parameter to 1e-4, of the largest if that is above 1; every model with two
    kinds of rows, those whose attention differs with all."""
    m, doc_ids = made(*CHOICES[choice], n_layers=3), PACKED[case]
    ids, targets = tokens(*doc_ids.shape), tokens(*doc_ids.shape, seed=5)
    logits = m(ids, doc_ids=doc_ids)
    m(ids, targets=targets, doc_ids=doc_ids)[0].logprob.sum().backward()
    together = {n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}
    m.zero_grad()
    for b, s in pieces(doc_ids):
        alone = m(ids[b : b + 1, s])
        scale = max(1.0, alone.detach().abs().max().item())
        close(logits[b : b + 1, s] / scale, alone / scale, 1e-5, f"{b} {s}")
        m(ids[b : b + 1, s], targets=targets[b : b + 1, s])[0].logprob.sum().backward()
    for name, p in m.named_parameters():
        if p.requires_grad:
            alone = torch.zeros_like(p) if p.grad is None else p.grad
            scale = max(1.0, alone.abs().max().item())
            close(together[name] / scale, alone / scale, 1e-4, name)
    if case != "one a row":
        assert not torch.allclose(m(ids), logits, atol=1e-2), "documents saw each other"


@pytest.mark.parametrize("choice", CHOICES)
def test_packing_makes_no_square_mask(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask at all without a window; with one, at most a block by two; no call over as many as B T positions."""
    masks: list[tuple[int, ...] | None] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        assert q.shape[-2] <= T and how["is_causal"] == (attn_mask is None)
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return real(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    m, rng, T = made(*CHOICES[choice], max_len=700), random.Random(0), 700
    doc_ids = packed(at_random(rng, T, 400), [(1, 300), (2, 400)])
    m(tokens(2, T), targets=tokens(2, T), doc_ids=doc_ids)[0].logprob.sum().backward()
    assert masks
    if "window" not in str(CHOICES[choice]):
        assert set(masks) == {None}
    else:
        assert {len(s) for s in masks if s} == {2} and all(s[0] <= 2 * BLOCK and s[1] <= 2 * BLOCK for s in masks if s)


def test_positions_that_are_given_hold_in_documents() -> None:
    """Packed learned positions may be others than 0 onwards."""
    m, ids = made("gpt"), tokens(2, 24)
    doc_ids = PACKED["come back"]
    counted = Documents(doc_ids).positions
    torch.testing.assert_close(m(ids, positions=counted, doc_ids=doc_ids), m(ids, doc_ids=doc_ids))
    assert not torch.allclose(m(ids, positions=counted + 1, doc_ids=doc_ids), m(ids, doc_ids=doc_ids), atol=1e-2)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_what_the_variable_length_kernel_is_asked_for(
    window: int | None, kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that does what torch documents of it (positions flat, bounds cumulative, so many to the left) gives
    what the gathered way gives, to 1e-5."""
    from torch.nn.attention import varlen

    @functools.wraps(varlen.varlen_attn)
    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k) and window_size[1] == 0
        assert enable_gqa == (q.shape[1] != k.shape[1])
        lengths = (cu_q[1:] - cu_q[:-1]).tolist()
        assert max(lengths) <= max_q and max_k == max_q and sum(lengths) == len(q)
        left = None if window_size[0] < 0 else window_size[0] + 1
        parts = zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in (q, k, v)))
        return torch.cat([naive(*part, scale, left) for part in parts], 2)[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(0)
    for ids in PACKED.values():
        B, T = ids.shape
        q, k, v = (torch.randn(B, h, T, 8) for h in (4, kv, kv))
        documents = Documents(ids)
        flat = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        found = attention._varlen(*flat, documents.bounds, T, 0.3, window).unflatten(0, (B, T)).transpose(1, 2)
        close(found, attend(q, k, v, documents, 0.3, window), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's variable-length kernel runs on CUDA only")
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_variable_length_kernel_is_the_gathered_way(
    window: int | None, kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA: outputs and gradients of the kernel in bf16 within 0.02 of the largest of the gathered way's in fp32."""
    calls = []
    real = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *a: calls.append(1) or real(*a))
    for ids in (*PACKED.values(), packed(at_random(random.Random(1), 700, 300), at_random(random.Random(2), 700, 40))):
        B, T = ids.shape
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(1)
            xs = [torch.randn(B, h, T, 64).bfloat16().to("cuda", dtype).requires_grad_() for h in (4, kv, kv)]
            before = len(calls)
            y = attend(*xs, Documents(ids.cuda()), 0.2, window)
            wanted = dtype == torch.bfloat16 and len(pieces(ids)) > B
            wanted = wanted and (window is None or "window_size" in attention._varlen_keywords())
            assert len(calls) - before == wanted
            (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)).sum().backward()
            found.append([t.float().cpu() for t in (y.detach(), *(x.grad for x in xs))])
        for one, other in zip(*found):
            assert (one - other).abs().max() < 0.02 * max(1.0, other.abs().max().item())


# ---------------------------------------------------------------- the attention parts


def attention_of(layer: int = 0, dim: int = 24, **changes: Any) -> gqa.GQA:
    settings = {
        "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope": Rope(theta=50.0, dim=None, layout="half"), "rope_layers": None,
        "window": None, "qk_norm": False, "norm_eps": 1e-6, "gate": False, "bias": True, "out_bias": True, "dropout": 0.0,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    made = gqa.GQA(dim, layer, **settings)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(attn: gqa.GQA, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The whole part, in the order that its papers give: project, norm, turn, look, gate, project."""
    B, T, _ = x.shape
    q, k, v = (f(x).view(B, T, -1, attn.head_dim).transpose(1, 2) for f in (attn.q, attn.k, attn.v))
    if attn.q_norm is not None:
        q, k = normed(q, attn.q_norm.weight, attn.q_norm.eps), normed(k, attn.k_norm.weight, attn.k_norm.eps)
    if attn.rope is not None:
        q, k = rope(q, positions, attn.rope), rope(k, positions, attn.rope)
    y = naive(q, k, v, window=attn.window).transpose(1, 2).reshape(B, T, -1)
    if attn.gate is not None:
        y = y / (1 + torch.exp(-attn.gate(x)))
    return attn.out(y)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_gates_and_normed_heads_against_their_formulas(gate: bool, qk_norm: bool, window: int | None) -> None:
    """To 1e-5, with an eps that counts, at positions that are counted and given."""
    x, at = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2)), torch.arange(9).expand(2, -1) * 3
    attn = attention_of(gate=gate, qk_norm=qk_norm, window=window, norm_eps=0.1)
    for positions in (None, at):
        close(attn(x, positions), by_hand(attn, x, positions), 1e-5)


def test_what_gates_and_normed_heads_do() -> None:
    """A shut gate lets nothing through; with normed heads the size of a query does not count, that of the norm does."""
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    gated = attention_of(gate=True)
    assert gated.gate is not None and gated.gate.weight.shape == (32, 24)
    gated.gate.bias.data.fill_(-50)
    close(gated(x), gated.out.bias.expand(2, 9, 24), 1e-5)
    for qk_norm in (True, False):
        attn = attention_of(qk_norm=qk_norm, norm_eps=1e-9)
        before = attn(x)
        for p in attn.q.parameters():
            p.data *= 7
        assert torch.allclose(attn(x), before, atol=1e-4) == qk_norm
    normed_heads = attention_of(qk_norm=True)
    before = normed_heads(x)
    assert normed_heads.q_norm is not None
    normed_heads.q_norm.weight.data *= 7
    assert not torch.allclose(normed_heads(x), before, atol=0.1)


def test_patterns_repeat_over_the_layers() -> None:
    """window and rope_layers in lists, of GQA and of MLA."""
    lists = ["model.attn.window=[3,5,null]", "model.attn.rope_layers=[true,false]"]
    for choice in (["dense"], ["dense", "model/attn=mla"]):
        parts: list[Any] = uninitialised(*choice, *lists, n_layers=7).attentions()
        assert [a.window for a in parts] == [3, 5, None, 3, 5, None, 3]
        assert [a.rope is not None for a in parts] == [True, False] * 3 + [True]
        assert [a.flops_per_token(100) for a in parts[:3]] == [
            n * parts[2].flops_per_token(100) // 100 for n in (3, 5, 100)
        ]
    plain: list[Any] = uninitialised("dense", "model.attn.window=4", n_layers=3).attentions()
    assert [a.window for a in plain] == [4, 4, 4] and all(a.rope is not None for a in plain)


@pytest.mark.parametrize("choice", ["gqa", "mla"])
def test_a_token_reaches_as_far_as_the_windows_let_it(choice: str) -> None:
    """Through three layers of windows w: 3 (w - 1) positions on; and a global layer lets it reach the end."""
    ids = tokens(1, 24)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % V
    for windows, last in (("3", 4 + 3 * 2), ("[2,4,3]", 4 + 1 + 3 + 2), ("[3,3,null]", 23), ("1", 4)):
        m = made("dense", f"model/attn={choice}", f"model.attn.window={windows}", n_layers=3)
        different = (m(ids) - m(changed)).abs().amax(-1)[0]
        assert (different[:4] == 0).all() and (different[last + 1 :] == 0).all(), windows
        assert (different[4 : last + 1] > 1e-5).all(), windows


def test_a_layer_without_positions_ignores_them() -> None:
    """With and without documents; the layer before it does not."""
    x, at = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2)), torch.arange(9).expand(2, -1) ** 2
    for layer, heeds in ((0, True), (1, False), (2, True), (3, False)):
        attn = attention_of(layer, rope_layers=[True, False])
        assert torch.equal(attn(x, at), attn(x)) != heeds
        close(attn(x, at), by_hand(attn, x, at), 1e-5)
    shuffled = attention_of(rope=None)
    order = torch.tensor([3, 1, 0, 2, 4])
    one, other = shuffled(x[:, :5]), shuffled(x[:, order])
    close(one[:, -1], other[:, -1], 1e-5, "a set, not a sequence")


# ---------------------------------------------------------------- latents

LATENT = {
    "plain": [],
    "q_lora": ["model/attn=mla_q_lora"],
    "yarn": ["model/attn/rope=yarn", "model.attn.rope.mscale=1.0", "model.attn.rope.mscale_all_dim=0.8"],
    "yarn-q_lora": ["model/attn=mla_q_lora", "model/attn/rope=yarn", "model.attn.rope.original_max_len=8"],
    "window": ["model.attn.window=5"],
    "bias": ["model.attn.bias=true"],
    "no rope": ["model.attn.rope_layers=[false,true]"],
}


def latent_model(case: str) -> Transformer:
    return made(*dict.fromkeys(["dense", "model/attn=mla", *LATENT[case]]))


def latent_by_hand(a: mla.MLA, x: Tensor) -> Tensor:
    """DeepSeek-V2's equations 9 to 19, head by head."""
    q = a.q(x) if a.q_lora_rank is None else a.q_up(normed(a.q_down(x), a.q_norm.weight, a.q_norm.eps))
    latent, k_rope = a.kv_down(x).split((a.rank, a.rope_dim), -1)
    kv = normed(latent, a.kv_norm.weight, a.kv_norm.eps) @ a.kv_up.weight.T
    turned = (lambda t: t) if a.rope is None else (lambda t: rope(t[:, None], None, a.rope)[:, 0])
    scale = 1 / math.sqrt(a.nope_dim + a.rope_dim)
    if isinstance(a.rope, YarnRope) and a.rope.mscale_all_dim:
        scale *= (0.1 * a.rope.mscale_all_dim * math.log(a.rope.factor) + 1) ** 2
    heads = []
    for h in range(a.n_heads):
        q_h, q_r = q[..., h * 10 : (h + 1) * 10].split((6, 4), -1)
        k_h, v_h = kv[..., h * 14 : (h + 1) * 14].split((6, 8), -1)
        q_h, k_h = torch.cat((q_h, turned(q_r)), -1), torch.cat((k_h, turned(k_rope)), -1)
        heads.append(naive(q_h[:, None], k_h[:, None], v_h[:, None], scale, a.window)[:, 0])
    return a.out(torch.cat(heads, -1))


@pytest.mark.parametrize("case", LATENT)
def test_latent_attention_against_its_formula(case: str) -> None:
    """The form that is trained, to 1e-5."""
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2))
    for part in latent_model(case).attentions():
        assert (part.nope_dim, part.rope_dim, part.v_dim) == (6, 4, 8)
        close(part(x), latent_by_hand(part, x), 1e-5)


@pytest.mark.parametrize("case", LATENT)
@pytest.mark.parametrize("prefills", [[], [12], [1, 11], [5, 4, 6]], ids=str)
@torch.no_grad()
def test_absorbed_products_are_the_expanded_ones(case: str, prefills: list[int]) -> None:
    """Logits of a cached model, token by token, or several at a time and then one by one: to 1e-5 of the largest."""
    m, ids = latent_model(case), tokens(3, 20)
    expected = m(ids)
    scale = max(1.0, expected.abs().max().item())
    rows, at = Rows(m, 3, 20), 0
    for n in [*prefills, *[1] * (20 - sum(prefills))]:
        found = torch.stack(rows.logits(list(ids[:, at : at + n])))
        close(found / scale, expected[:, at : at + n] / scale, 1e-5, f"{at} to {at + n}")
        at += n


def memory(cache: PagedCache) -> int:
    """Bytes that the cache holds, each once."""
    held = [t.untyped_storage() for s in cache.layers for t in (s.k, s.v) if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


def test_what_a_latent_cache_holds() -> None:
    """The latent and the rotary key of each position, once: no head's keys or values. Beside it grouped heads."""
    rows, capacity, layers, size = 3, 48, 2, 4
    pool = PagePool(rows * capacity // 16, 16)
    for attn in ("mla", "mla_q_lora"):
        found = memory(cache_of(uninitialised("dense", f"model/attn={attn}"), pool))
        assert found == (12 + 4) * size * layers * capacity * rows
    for kv in (1, 2, 4):
        m = uninitialised("dense", f"model.attn.n_kv_heads={kv}")
        assert memory(cache_of(m, pool)) == 2 * kv * 8 * size * layers * capacity * rows
    # as conf/ has them, MLA's is less than a third of GQA's
    cached = {a: sum(math.prod(s) for s in shapes(a)) for a in ("mla", "gqa")}
    assert cached == {"mla": 64 + 16, "gqa": 2 * 4 * 32}


def shapes(attn: str) -> list[tuple[int, int]]:
    heads, k, v = uninitialised_at_full_size(attn).attentions()[0].cache_shape()
    return [(heads, k), (heads, v)]


def uninitialised_at_full_size(attn: str) -> Any:
    with torch.device("meta"):
        return build(model_node("model=dense", f"model/attn={attn}"), V)


def test_latent_counts_by_hand() -> None:
    """Parameters and FLOPs of one part, written out."""
    d, h, rank, nope, turned, v, q_rank = 32, 4, 12, 6, 4, 8, 10
    common = d * (rank + turned) + rank + rank * h * (nope + v) + h * v * d
    for attn, q in (
        ("mla", d * h * (nope + turned)),
        ("mla_q_lora", d * q_rank + q_rank + q_rank * h * (nope + turned)),
    ):
        part: Any = uninitialised("dense", f"model/attn={attn}").attentions()[0]
        assert sum(p.numel() for p in part.parameters()) == common + q
        assert part.flops_per_token(20) == 3 * 2 * h * (nope + turned + v) * 20  # forward once, backward twice
        part.window = 6
        assert part.flops_per_token(20) == 3 * 2 * h * (nope + turned + v) * 6


# ---------------------------------------------------------------- what is refused

BAD = [
    (["model.attn.rope.dim=5"], "rope.dim=5 should be even"),
    (["model.attn.rope.dim=64"], "model.attn.rope.dim=64 is more than the 32 channels of a head"),
    (["model.attn.head_dim=7"], "head_dim=7 is odd"),
    (["model.attn.window=0"], "model.attn.window=0 should be at least 1"),
    (["model.attn.window=[4,0]"], r"model.attn.window=\[4, 0\] should be at least 1"),
    (["model.attn.window=[]"], "repeated over the layers"),
    (["model.attn.rope_layers=[]"], "repeated over the layers"),
    (["model.attn.window=[a]"], "model.attn.window=.* should be a whole number"),
    (["model.attn.dropout=1"], "model.attn.dropout=1 should be"),
    (["model/attn=mla", "model.attn.v_head_dim=49"], "model.attn.v_head_dim=49 should be at most .* 48"),
    (["model/attn=mla", "model.attn.qk_rope_head_dim=3"], "model.attn.qk_rope_head_dim=3 should be even"),
    (["model/attn=mla", "model.attn.kv_lora_rank=0"], "model.attn.kv_lora_rank=0 should be at least 1"),
    (["model/attn=mla", "model.attn.rope.dim=8"], "model.attn.rope.dim=8: MLA"),
    (["model/attn=mla", "model.attn.window=0"], "model.attn.window=0 should be at least 1"),
    (["model.logit_cap=0"], "model.logit_cap=0 should be above 0"),
    (["model.norm_at=before"], "model.norm_at=before should be one of pre, post, sandwich"),
    *([[f"model/attn/rope={kind}", "model.attn.rope.theta=0"], "rope.theta=0 .*should be above 0"] for kind in ROPES),
    *([[f"model/attn/rope={kind}", "model.attn.rope.dim=3"], "rope.dim=3 should be even"] for kind in ROPES),
    (["model/attn/rope=ntk", "model.attn.rope.dim=2"], "rope.dim=2"),  # factor^(dim / (dim - 2))
]


@pytest.mark.parametrize("overrides,message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_settings_that_do_not_fit(overrides: list[str], message: str) -> None:
    """One line that names the setting, before anything is built; of every kind of rope, not of the plain one alone."""
    with pytest.raises(Refusal, match=message) as caught:
        model_node("model=dense", *overrides)
    assert "\n" not in str(caught.value)


def test_every_model_has_attention_that_can_be_cached() -> None:
    """A shape for each layer, and of the dtype and size that the cache is made with."""
    for model in MODELS:
        m = uninitialised(model)
        cache = cache_of(m, PagePool(2, 7))
        assert len(cache.layers) == 2 and all(s.k.shape[0] == 14 for s in cache.layers)

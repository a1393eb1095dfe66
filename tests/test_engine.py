"""The engine: whatever is computed together, in which chunks, from which pages, a sample is what the plain forward makes
of it alone, and nothing is left behind."""

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_model import ATTENTIONS, MODELS, V, gpt2, llama, made

from etude.errors import Refusal
from etude.infer import kernels
from etude.infer.engine import InferenceEngine, Settings
from etude.infer.request import EngineDead, Piece, QueueFull, Request
from etude.infer.sampling import Sampling
from etude.infer.text import Said
from etude.model.transformer import Transformer
from etude.text import tokenizer as tok

GREEDY = Sampling(temperature=0.0)
TOLD = Sampling(temperature=0.0, logprobs=0)
NATIVE = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")
BACKENDS = [pytest.param("native", marks=NATIVE), "views", "gather"]
TOKENIZER = tok.ids([], [], vocab_size=V)


def engine(m: Transformer, pages: int | None = None, context: int | None = None, **settings: Any) -> InferenceEngine:
    """Small pages and steps, so that chunks, runs and evictions abound; `pages` of them in all."""
    found = InferenceEngine(
        m, TOKENIZER, Settings(**({"page_size": 4, "step_tokens": 9, "cache_mb": 1} | settings)), context
    )
    if pages is not None:
        found.pool.__init__(pages, found.pool.page_size, found.pool.prefix_cache)  # type: ignore[misc]
    return found


def ragged(rng: random.Random, sizes: list[int]) -> list[list[int]]:
    return [[rng.randrange(V) for _ in range(n)] for n in sizes]


def mixed(rng: random.Random) -> list[list[int]]:
    """Prompts of many lengths, some with a beginning in common, one twice, one of a single token."""
    shared = ragged(rng, [11])[0]
    tails = ragged(rng, [0, 1, 6, 9])
    return [*ragged(rng, [5, 1, 19, 8]), *(shared + t for t in tails), shared + tails[2]]


@torch.no_grad()
def naive(model: Transformer, prompt: list[int], n: int, limit: int | None = None) -> list[int]:
    """nanoGPT's way: the last `limit` tokens through the whole model for every new one."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids[-limit:] if limit else ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def at_rest(e: InferenceEngine) -> None:
    """Nothing runs or waits, and every page is free or cached."""
    e.pool.check()
    found = e.stats()
    assert found["running"] == found["waiting"] == found["pages_used"] == 0
    assert found["pages_free"] + found["pages_cached"] == e.pool.n_pages


def choices() -> dict[str, list[str]]:
    """Every choice of conf/model and of conf/model/attn, and what a cache could get wrong beyond them: windows that are
    passed (after 3, 5 or 8 positions), scaled positions, learned ones, norms elsewhere, capped logits."""
    found = {m: [m] for m in MODELS}
    for attn in ATTENTIONS:
        found[f"attn={attn}"] = ["gpt" if attn == "mha" else "dense", f"model/attn={attn}"]
    window = "model.attn.window=[5,3,null]"
    found["attn=local"] = ["dense", "model/attn=local", window, "model.attn.rope_layers=[true,false,true]"]
    found["window"] = ["moe", "model.attn.window=8"]
    found["latent window"] = ["deepseek_v3", window]
    found["gated window"] = ["dense", "model/attn=gated", "model.attn.window=1"]
    found["gpt window"] = ["gpt", "model.attn.window=4"]
    for rope in ("linear", "llama3", "ntk", "yarn"):
        found[f"rope={rope}"] = ["dense", f"model/attn/rope={rope}"]
    found["partial rope"] = ["dense", "model.attn.rope.dim=4", "model.attn.rope.layout=interleaved"]
    found["sinusoidal"] = ["gpt", "model.pos=sinusoidal"]
    found["sandwich"] = ["moe", "model.norm_at=sandwich", "model.logit_cap=4.0", "model.embed_scale=3.0"]
    found["post"] = ["qwen3", "model.norm_at=post", "model.residual_scale=0.5"]
    return found


CHOICES = choices()

# ---------------------------------------------------------------- against the plain forward


def ways() -> list[Any]:
    """Every choice by the kernels and by torch's views, every model by the reference too."""
    _, *others = BACKENDS
    found = [pytest.param(c, "native", marks=NATIVE, id=f"{c}-native") for c in CHOICES]
    return found + [pytest.param(c, o, id=f"{c}-{o}") for c in CHOICES for o in others if o == "views" or c in MODELS]


@pytest.mark.parametrize("choice,attention", ways())
def test_greedy_is_the_uncached_forward(choice: str, attention: str) -> None:
    """Mixed lengths, shared beginnings, chunks of at most 9 tokens and a pool so small that samples are preempted. Equal
    tokens could hide logits that are a little off: each log-probability is the forward's, to 1e-4."""
    m = made(*CHOICES[choice], n_layers=3)
    prompts = mixed(random.Random(0))
    e = engine(m, pages=15, attention=attention)
    found = e.generate(prompts, sampling=TOLD, max_tokens=12)
    for prompt, c in zip(prompts, found, strict=True):
        assert c.ids == naive(m, prompt, 12) and c.finish == "length"
        with torch.no_grad():
            expected = m(torch.tensor([prompt + c.ids[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
        told = torch.tensor([t.logprob for t in c.tokens])
        torch.testing.assert_close(told, expected[range(12), c.ids], rtol=1e-4, atol=1e-4)
    assert e.window is not None or e.stats()["preemptions"] > 0  # what lies behind windows makes room
    assert e.stats()["prefix_hit_tokens"] > 0
    at_rest(e)


@pytest.mark.parametrize("attention", BACKENDS)
def test_a_long_shared_prefix(attention: str) -> None:
    """Long enough to be attended to once for all: 300 tokens before 6 samples that go on together."""
    m = made("dense", n_layers=2)
    rng = random.Random(1)
    shared = ragged(rng, [300])[0]
    prompts = [shared + p for p in ragged(rng, [1, 3, 2, 5, 4, 1])]
    e = engine(m, attention=attention, step_tokens=128, page_size=16)
    e.generate(prompts[:1], max_tokens=1)
    found = e.generate(prompts, sampling=GREEDY, max_tokens=10)
    assert [c.ids for c in found] == [naive(m, p, 10) for p in prompts]
    assert [c.cached_tokens for c in found[1:]] == [300] * 5 and found[0].cached_tokens == 300
    at_rest(e)


@pytest.mark.parametrize("model,reference", [("dense", llama), ("gpt", gpt2)])
def test_greedy_is_hugging_faces(model: str, reference) -> None:
    m = made(model, *(["model.ffn.activation=gelu_tanh"] if model == "gpt" else []))
    theirs, _ = reference(m)
    prompts = ragged(random.Random(2), [6, 6, 6])
    ids = torch.tensor(prompts)
    kept = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=kept, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert [c.ids for c in engine(m).generate(prompts, sampling=GREEDY, max_tokens=20)] == expected[:, 6:].tolist()


def test_bf16_is_near_the_bf16_forward() -> None:
    """The same weights in bf16: log-probabilities within what bf16 leaves of them."""
    m = made("dense").to(torch.bfloat16)
    prompts = ragged(random.Random(3), [7, 12])
    for c, prompt in zip(engine(m).generate(prompts, sampling=TOLD, max_tokens=8), prompts):
        with torch.no_grad():
            expected = m(torch.tensor([prompt + c.ids[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
        told = torch.tensor([t.logprob for t in c.tokens])
        torch.testing.assert_close(told, expected[range(8), c.ids], rtol=0.05, atol=0.1)


@NATIVE
@pytest.mark.parametrize("choice", ["dense", "moe", "deepseek_v3", "gpt"])
def test_int8_costs_little(choice: str) -> None:
    """Weights and activations in 8 bits: log-probabilities of given tokens within 0.15 on average, and not the same."""
    m = made(choice)
    prompts = ragged(random.Random(3), [30, 25])
    plain, small = (
        [
            t.logprob
            for c in engine(m, quant=q).generate(prompts, max_tokens=1, sampling=TOLD, prompt_logprobs=True)
            for t in c.prompt_tokens[1:]
        ]
        for q in (None, "int8")
    )
    off = (torch.tensor(plain) - torch.tensor(small)).abs()
    assert 0 < off.mean() < 0.15, off.mean()


def test_sequences_end_by_themselves() -> None:
    """At a stop token, which is told and not shown; the others go on as if alone."""
    m = made("dense")
    prompts = ragged(random.Random(3), [5, 2, 9])
    free = [naive(m, p, 20) for p in prompts]
    stop = free[1][3]
    expected = [f[: f.index(stop) + 1] if stop in f else f for f in free]
    e = engine(m)
    found = e.generate(prompts, sampling=GREEDY, max_tokens=20, stop_ids=frozenset({stop}))
    assert [c.ids for c in found] == expected and len({len(e) for e in expected}) > 1
    assert [(c.finish, c.stop) for c in found] == [
        ("stop", stop) if x[-1] == stop else ("length", None) for x in expected
    ]
    assert [c.text for c in found] == [
        TOKENIZER.decode(x[:-1] if x[-1] == stop else x, skip_special=True) for x in expected
    ]
    at_rest(e)


@pytest.mark.parametrize("sizes", [[30, 3], [32, 10], [40, 3], [31], [32], [5]], ids=str)
def test_learned_positions_see_the_last_window(sizes: list[int]) -> None:
    """Up to the last embedding from the cache, beyond it nanoGPT's cropping; where a context is given, it ends there."""
    m = made("gpt")
    prompts = ragged(random.Random(4), sizes)
    e = engine(m)
    assert [c.ids for c in e.generate(prompts, sampling=GREEDY, max_tokens=12)] == [
        naive(m, p, 12, 32) for p in prompts
    ]
    at_rest(e)
    strict = engine(m, context=32)
    if sizes == [40, 3]:
        with pytest.raises(Refusal, match="40 tokens and max_tokens=12 are more than the context of 32"):
            strict.generate(prompts, max_tokens=12)


def test_rotary_models_go_beyond_their_length() -> None:
    m = made("dense")
    prompts = ragged(random.Random(5), [30, 4])
    assert [c.ids for c in engine(m).generate(prompts, sampling=GREEDY, max_tokens=20)] == [
        naive(m, p, 20) for p in prompts
    ]


def test_an_attention_that_cannot_cache() -> None:
    """A part of somebody's own, without cache_shape, generates all the same."""
    m = made("dense")
    for block in m.blocks:
        block.attn.__class__ = type("Own", (type(block.attn),), {"cache_shape": property(lambda self: self.nothing)})
    assert not hasattr(m.blocks[0].attn, "cache_shape")
    assert InferenceEngine(m, TOKENIZER).pool.n_pages == 1  # of nothing
    assert InferenceEngine(made("dense"), TOKENIZER).pool.n_pages <= 2**22 // 32
    prompts = ragged(random.Random(5), [7, 3])
    e = engine(m)
    assert [c.ids for c in e.generate(prompts, sampling=GREEDY, max_tokens=9)] == [naive(m, p, 9) for p in prompts]
    at_rest(e)


def test_pages_behind_a_window_are_given_back() -> None:
    """With windows in every layer a long sample holds a few pages only."""
    m = made("gpt", "model.attn.window=4", max_len=200)
    e = engine(m, prefix_cache=False)
    most = 0
    e.add_request(Request(prompt=[1, 2, 3], max_tokens=150, sampling=GREEDY, ignore_stop_ids=True))
    while e.has_work():
        e.step()
        most = max(most, e.stats()["pages_used"])
    assert most <= 4


def test_prompt_logprobs() -> None:
    """Those of each prompt token, chunk by chunk, though a part of the prompt is cached."""
    m = made("dense")
    (prompt,) = ragged(random.Random(6), [25])
    e = engine(m)
    e.generate([prompt], max_tokens=1)
    (c,) = e.generate([prompt], max_tokens=2, sampling=Sampling(temperature=0.0, logprobs=3), prompt_logprobs=True)
    with torch.no_grad():
        expected = m(torch.tensor([prompt]))[0].log_softmax(-1)
    assert [t.id for t in c.prompt_tokens] == prompt and c.prompt_tokens[0].logprob is None and c.cached_tokens == 0
    for at, t in enumerate(c.prompt_tokens[1:]):
        assert t.logprob == pytest.approx(float(expected[at, t.id]), abs=1e-4)
        assert [i for i, _ in t.top] == expected[at].topk(3).indices.tolist()


def test_samples_of_one_prompt() -> None:
    """They share what was computed of it, and are those that n requests with their choices would make."""
    m = made("dense")
    (prompt,) = ragged(random.Random(7), [21])
    s = Sampling(temperature=1.0, seed=5)
    e = engine(m)
    found = e.generate([prompt], n=4, max_tokens=10, sampling=s)
    assert [c.choice for c in found] == [0, 1, 2, 3] and len({tuple(c.ids) for c in found}) == 4
    assert found[0].cached_tokens == 0 and all(c.cached_tokens >= 20 for c in found[1:])
    assert [c.ids for c in engine(m, prefix_cache=False).generate([prompt], n=4, max_tokens=10, sampling=s)] == [
        c.ids for c in found
    ]
    at_rest(e)


# ---------------------------------------------------------------- the same bits


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "choice", ["dense", "moe", "deepseek_v3", "gpt", "attn=local", "window", "attn=gated", "sandwich"]
)
def test_bits_depend_on_the_request_alone(choice: str, dtype: torch.dtype) -> None:
    """deterministic=true: tokens and log-probabilities of a request alone, in a batch, in another order, in other chunks,
    preempted, with and without cached beginnings, are equal to the bit."""
    m = made(*CHOICES[choice], n_layers=3).to(dtype)
    prompts = mixed(random.Random(8))
    s = Sampling(temperature=1.0, top_p=0.9, seed=3, logprobs=2)

    def run(order: list[int], pages: int | None, one_by_one: bool = False, **settings: Any) -> dict[int, list]:
        e = engine(m, pages, deterministic=True, **settings)
        asked = [[i] for i in order] if one_by_one else [order]
        made = [c for some in asked for c in e.generate([prompts[i] for i in some], sampling=s, max_tokens=12)]
        at_rest(e)
        return {i: c.tokens for i, c in zip(order, made)}

    order = list(range(len(prompts)))
    alone = run(order, None, one_by_one=True, prefix_cache=False, step_tokens=512)
    assert run(order, 15) == alone  # preempted
    assert run(order[::-1], None, step_tokens=31) == alone
    assert run(order + order[:0], None, page_size=16, step_tokens=3) == alone
    assert run(random.Random(1).sample(order, len(order)), 40, one_by_one=True, step_tokens=64) == alone  # cached


def test_scores_are_the_trainers() -> None:
    """engine.score is the very forward that a training step makes: equal to the bit, packed too."""
    for name in ("dense", "moe", "deepseek_v3"):
        m = made(name).train()
        ids = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(0))
        docs = torch.arange(20).expand(3, -1) // 7
        e = engine(m)
        with torch.no_grad():
            assert torch.equal(e.score(ids), m(ids[:, :-1], targets=ids[:, 1:])[0].logprob)
            packed = m(ids[:, :-1], targets=ids[:, 1:], doc_ids=docs[:, :-1])[0].logprob
        assert torch.equal(e.score(ids, docs), packed) and m.training
        assert torch.equal(e.score(ids[0].tolist()), e.score(ids[:1]))


def test_weights_that_change() -> None:
    """The engine computes with the weights of its last refresh, forgets what was cached with others and says which it
    used; the model that it wraps stays as it was, and is trained on."""
    m = made("dense")
    names = [n for n, _ in m.named_parameters()]
    prompts = ragged(random.Random(9), [9, 13])
    e = engine(m)
    before = e.generate(prompts, sampling=GREEDY, max_tokens=10)
    assert [c.version for c in before] == [0, 0] and [n for n, _ in m.named_parameters()] == names
    e.add_request(Request(prompt=prompts[0], sampling=GREEDY, max_tokens=10))
    pieces = [p for _ in range(4) for p in e.step()]
    optimizer = torch.optim.SGD(m.parameters(), lr=3.0)
    m.train()
    (-m(torch.tensor([prompts[1]])[:, :-1], targets=torch.tensor([prompts[1]])[:, 1:])[0].logprob.sum()).backward()
    optimizer.step()
    m.eval()
    e.refresh()
    while e.has_work():
        pieces += e.step()
    assert {p.version for p in pieces} == {0, 1} and len(pieces) == 10
    kept = [t.id for p in pieces if p.version == 0 for t in p.tokens]
    late = [t.id for p in pieces if p.version == 1 for t in p.tokens]
    assert kept == before[0].ids[: len(kept)] and late == naive(m, prompts[0] + kept, len(late))
    after = e.generate(prompts, sampling=GREEDY, max_tokens=10)
    assert [c.ids for c in after] == [naive(m, p, 10) for p in prompts] != [c.ids for c in before]
    assert [c.version for c in after] == [1, 1]
    at_rest(e)


# ---------------------------------------------------------------- requests that come and go


@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_any_moment(seed: int) -> None:
    """Requests come and are cut off at random, over a small pool: those that end are right, and nothing is left."""
    rng = random.Random(seed)
    m = made("dense")
    e = engine(m, pages=20, max_running=5)
    prompts = mixed(rng)
    expected = [naive(m, p, 10) for p in prompts]
    unfinished: dict[str, tuple[int, list[int]]] = {}
    done = 0
    for _ in range(400):
        if rng.random() < 0.25 and len(unfinished) < 12:
            i = rng.randrange(len(prompts))
            request = Request(prompt=prompts[i], sampling=GREEDY, max_tokens=10, priority=rng.randrange(2))
            unfinished[e.add_request(request)] = i, []
        if rng.random() < 0.05 and unfinished:
            name = rng.choice(list(unfinished))
            assert [p.finish for p in e.abort(name)] == ["abort"]
            del unfinished[name]
        for piece in e.step():
            i, ids = unfinished[piece.request]
            ids += [t.id for t in piece.tokens]
            if piece.finish:
                assert ids == expected[i]
                del unfinished[piece.request]
                done += 1
        e.pool.check()
    assert done > 20 and e.abort("nobody") == []
    for name in list(unfinished):
        e.abort(name)
    at_rest(e)


def test_first_come_first_served_and_priorities() -> None:
    m = made("dense")
    e = engine(m, max_running=1)
    names = [
        e.add_request(Request(prompt=[i], max_tokens=2, sampling=GREEDY, priority=p)) for i, p in enumerate([1, 1, 0])
    ]
    ended = []
    while e.has_work():
        ended += [p.request for p in e.step() if p.finish]
    assert ended == [names[2], names[0], names[1]]


def test_limits() -> None:
    """What can never fit is refused at once, a full queue says so, and time runs out in the queue and in the middle."""
    m = made("dense")
    e = engine(m, pages=5, max_waiting=2)
    with pytest.raises(Refusal, match="21 tokens need more than the 5 pages of 4 positions"):
        e.add_request(Request(prompt=[1] * 11, max_tokens=10))
    with pytest.raises(Refusal, match="token ids outside of 0..60"):
        e.add_request(Request(prompt=[61]))
    for wrong in (
        {"prompt": []},
        {"prompt": [1], "n": 0},
        {"prompt": [1], "max_tokens": 0},
        {"prompt": [1], "timeout": 0.0},
    ):
        with pytest.raises(Refusal):
            Request(**wrong)  # type: ignore[arg-type]
    for _ in range(2):
        e.add_request(Request(prompt=[1], max_tokens=5, timeout=0.05))
    with pytest.raises(QueueFull):
        e.add_request(Request(prompt=[1]))
    e.step()
    e.add_request(Request(prompt=[2], max_tokens=5, timeout=0.05))
    time.sleep(0.06)
    assert [p.finish for p in e.step()] == ["timeout"] * 3
    at_rest(e)
    for wrong in ({"page_size": 3}, {"step_tokens": 0}, {"max_running": 0}):
        with pytest.raises(ValueError):
            Settings(**wrong)  # type: ignore[arg-type]


def test_a_nan_fails_its_own_request() -> None:
    """A token whose embedding is damaged: requests that hold it fail with a line that says so, the others are right."""
    m = made("dense", "model.tied=false")
    prompts = ragged(random.Random(10), [6, 9, 4])
    for p in prompts:
        p[:] = [t if t != 7 else 8 for t in p]
    expected = [naive(m, p, 8) for p in prompts]
    if any(7 in x for x in expected):
        m.head.weight.data[7] -= 100.0
        expected = [naive(m, p, 8) for p in prompts]
    m.embed.weight.data[7] = float("nan")
    e = engine(m)
    found = e.generate([*prompts, [3, 7, 5], *prompts], sampling=GREEDY, max_tokens=8)
    assert [c.ids for c in found[:3]] == [c.ids for c in found[4:]] == expected
    assert found[3].finish == "error" and "NaN" in str(found[3].error) and found[3].ids == []
    at_rest(e)


class Even:
    """A rule of somebody's own: even tokens only, and none twice."""

    def __init__(self) -> None:
        self.left = torch.arange(V) % 2 == 0

    def mask(self) -> torch.Tensor:
        return self.left

    def push(self, token: int) -> None:
        self.left[token] = False


def test_a_rule_of_ones_own() -> None:
    """Request.allowed hides tokens, of each sample by itself, also where it is preempted; with no token left it ends in an
    error that says so."""
    m = made("dense")
    e = engine(m, pages=9)
    found = e.generate([[1, 2], [3]], n=2, max_tokens=14, sampling=Sampling(temperature=1.0), allowed=Even)
    assert all(len(set(c.ids)) == 14 and not any(i % 2 for i in c.ids) for c in found)
    assert e.stats()["preemptions"] > 0
    (c,) = engine(m).generate([[1]], max_tokens=V, sampling=GREEDY, allowed=Even)
    assert len(c.ids) == (V + 1) // 2 and c.finish == "error" and "no token may come next" in str(c.error)
    with pytest.raises(Refusal, match="guide and allowed both"):
        Request(prompt=[1], guide={"json": True}, allowed=Even)


def test_stray_pieces_are_not_lost() -> None:
    """A request added by hand while `generate` runs gets its pieces at the next step."""
    m = made("dense")
    e = engine(m)
    name = e.add_request(Request(prompt=[1, 2], max_tokens=3, sampling=GREEDY))
    e.generate([[5]], max_tokens=8)
    assert [t.id for p in e.step() if p.request == name for t in p.tokens] == naive(m, [1, 2], 3)


# ---------------------------------------------------------------- its own thread


@pytest.fixture
def served() -> Iterator[InferenceEngine]:
    e = engine(made("dense"), context=64)
    e.start()
    yield e
    e.shutdown()


async def collect(e: InferenceEngine, request: Request) -> list[Piece]:
    return [piece async for piece in e.generate_async(request)]


def settled(e: InferenceEngine) -> None:
    deadline = time.monotonic() + 10
    while (e.has_work() or not e._worker.inbox.empty()) and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    at_rest(e)


def test_many_callers_at_once(served: InferenceEngine) -> None:
    """Asked from one event loop at the same time, a third of them going away in the middle."""
    prompts = mixed(random.Random(11)) * 4
    expected = [naive(served.model, p, 12) for p in prompts[:9]] * 4

    async def one(i: int) -> list[int] | None:
        request = Request(prompt=prompts[i], max_tokens=12, sampling=GREEDY)
        if i % 3 == 0:
            stream = served.generate_async(request)
            async for _ in stream:
                await stream.aclose()
            return None
        return [t.id for p in await collect(served, request) for t in p.tokens]

    async def main() -> list[list[int] | None]:
        return await asyncio.gather(*(one(i) for i in range(len(prompts))))

    found = asyncio.run(main())
    assert all(f is None or f == x for f, x in zip(found, expected)) and sum(f is None for f in found) == 12
    assert served.alive
    settled(served)


@NATIVE
def test_two_engines_in_two_threads() -> None:
    """Each makes what it makes alone, and torch has its threads back afterwards."""
    models = [made("dense", seed=s) for s in (0, 1)]
    prompts = ragged(random.Random(12), [5, 9, 3])
    expected = [[naive(m, p, 40) for p in prompts] for m in models]
    torch.set_num_threads(2)
    try:
        engines = [engine(m, context=64) for m in models]

        async def one(e: InferenceEngine) -> list[list[int]]:
            asked = [Request(prompt=p, max_tokens=40, sampling=GREEDY) for p in prompts]
            pieces = await asyncio.gather(*(collect(e, r) for r in asked))
            return [[t.id for p in some for t in p.tokens] for some in pieces]

        async def both() -> list[list[list[int]]]:
            return await asyncio.gather(*(one(e) for e in engines))

        for e in engines:
            e.start()
        for _ in range(3):
            assert asyncio.run(both()) == expected
        for e in engines:
            e.shutdown()
        engines[0].generate(prompts, max_tokens=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_refusals_reach_the_caller(served: InferenceEngine) -> None:
    with pytest.raises(Refusal, match="more than the context of 64"):
        asyncio.run(collect(served, Request(prompt=[1] * 60, max_tokens=10)))
    settled(served)


def test_a_full_queue(served: InferenceEngine) -> None:
    served.settings = dataclasses.replace(served.settings, max_waiting=3)
    served.scheduler.max_running = 1

    async def main() -> list[Any]:
        each = [collect(served, Request(prompt=[1, 2], max_tokens=30)) for _ in range(12)]
        return await asyncio.gather(*each, return_exceptions=True)

    found = asyncio.run(main())
    assert any(isinstance(f, QueueFull) for f in found) and any(isinstance(f, list) for f in found)
    settled(served)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_reaches_those_who_wait(served: InferenceEngine, capsys: pytest.CaptureFixture) -> None:
    """Within a second, and those who come later."""

    served.step = lambda: 1 / 0  # type: ignore[assignment, return-value]

    async def main() -> None:
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(EngineDead, match="ZeroDivisionError"):
                await collect(served, Request(prompt=[1], max_tokens=50))
            assert time.monotonic() - begun < 1.5

    asyncio.run(main())
    assert not served.alive


def test_a_hang_is_noticed(served: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step for longer than HANG, with work to do."""
    from etude.infer import engine as module

    monkeypatch.setattr(module, "HANG", 0.3)
    go = threading.Event()
    served.step = lambda: go.wait(20) and []  # type: ignore[assignment, return-value]

    async def main() -> None:
        with pytest.raises(EngineDead, match="no step for"):
            await collect(served, Request(prompt=[1], max_tokens=5))

    asyncio.run(main())
    assert not served.alive
    go.set()


def test_shutdown_ends_all() -> None:
    e = engine(made("dense"), context=5000)
    e.start()

    async def main() -> None:
        waiting = asyncio.create_task(collect(e, Request(prompt=[1], max_tokens=4000)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(e.shutdown)
        with pytest.raises(EngineDead):
            await waiting

    asyncio.run(main())
    at_rest(e)
    assert not e.alive


# ---------------------------------------------------------------- text


def first_cut(text: str, stops: list[str]) -> str:
    """What is left of `text` when it comes character by character and the first stop text that is complete cuts it."""
    for end in range(len(text) + 1):
        found = [i for s in stops if (i := text[:end].find(s)) >= 0]
        if found:
            return text[: min(found)]
    return text


def test_stop_texts_are_never_shown() -> None:
    """Random text over few letters, so that beginnings of stop texts abound and overlap: shown is exactly what is before
    the first one, at every moment a beginning of it, and nothing is held back without need."""
    rng, tokenizer = random.Random(0), tok.byte([], [])
    cut_some = 0
    for _ in range(400):
        text = "".join(rng.choices("aab\né👍", k=rng.randint(1, 25)))
        stops = ["".join(rng.choices("ab\né👍", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        expected = first_cut(text, stops)
        said, shown = Said(tokenizer, tuple(stops)), ""
        for token in tokenizer.encode(text):
            shown += said.push(token)
            assert expected.startswith(shown), (text, stops)
            if said.stopped is not None:
                break
        shown += said.flush()
        assert shown == expected and (said.stopped in stops) == (expected != text), (text, stops)
        cut_some += expected != text
    assert 100 < cut_some < 300
    free = Said(tokenizer, ("xyz", ""))
    assert [free.push(token) for token in b"abxab"] == ["a", "b", "", "xa", "b"]


def test_stop_texts_in_a_batch() -> None:
    """The sample that met its stop text ends; its neighbours are those of a run without; pieces add up to the text."""
    tokenizer = tok.byte([], [])
    m = made("dense", vocab_size=tokenizer.vocab_size)
    e = InferenceEngine(m, tokenizer)
    s, prompts = Sampling(temperature=1.0, top_k=20, seed=2), ["ab", "cd", "日本"]
    free = e.generate(prompts, sampling=s, max_tokens=40)
    stop = free[1].text[5:7]
    cut = e.generate(prompts, sampling=s, max_tokens=40, stop=(stop,))
    for f, c in zip(free, cut):
        assert c.text == first_cut(f.text, [stop])
    assert (cut[1].finish, cut[1].stop) == ("stop", stop) and len(cut[1].tokens) < 40
    pieces = list(e.stream("cd", sampling=s, max_tokens=40, stop=(stop,)))
    assert "".join(p.text for p in pieces) == cut[1].text and len(pieces) > 3
    assert (
        all("\ufffd" not in p.text for p in e.stream("日本語", sampling=s, max_tokens=40)) or "\ufffd" in free[2].text
    )
    at_rest(e)

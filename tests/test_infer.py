"""Generation: the cache changes nothing, sampling is the distribution, and no part of a stop string is shown."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import varied_text
from test_model import ATTENTIONS, MODELS, V, gpt2, llama, made, model_node, small, uninitialised

from etude import checkpoint
from etude.config import build
from etude.errors import NonFinite, Refusal
from etude.infer.generate import Row, TextRow, complete, decode, encode_prompt
from etude.infer.load import fuse, load
from etude.infer.sampling import Sampling, distribution, draw, penalize
from etude.model import weights
from etude.text import tokenizer as tok

GREEDY = Sampling(temperature=0)


def ragged(rng: random.Random, sizes: list[int]) -> list[list[int]]:
    return [[rng.randrange(V) for _ in range(n)] for n in sizes]


def outs(
    model, prompts: list[list[int]], n: int, sampling: Sampling = GREEDY, stop: frozenset[int] = frozenset(), **how
) -> list[list[int]]:
    rows = [Row(list(p)) for p in prompts]
    for _ in decode(model, rows, sampling, n, set(stop), **how):
        pass
    return [r.out for r in rows]


@torch.no_grad()
def naive(model, prompt: list[int], n: int, limit: int | None = None) -> list[int]:
    """nanoGPT's way: the last `limit` tokens through the whole model for every new one."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids[-limit:] if limit else ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("model", ["dense", "gpt"])
@pytest.mark.parametrize("sizes", [[5, 1, 9, 3], [4, 4, 4], [7]], ids=str)
def test_cached_tokens_are_the_uncached_ones(model: str, sizes: list[int]) -> None:
    """Rows of any lengths together, with and without the cache, against each alone through the plain forward."""
    m = made(model, seed=4)  # whose greedy text is not one token again and again
    prompts = ragged(random.Random(0), sizes)
    expected = [naive(m, p, 20) for p in prompts]
    assert outs(m, prompts, 20) == expected
    assert outs(m, prompts, 20, use_cache=False) == expected
    assert len({tuple(e) for e in expected}) == len(prompts) and max(len(set(e)) for e in expected) > 2


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


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("sizes", [[6, 2, 11], [9, 9], [1]], ids=str)
def test_cached_logits_are_the_uncached_ones(choice: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal tokens could hide logits that are a little off, so the tokens are given here, different ones at every step.
    Rows of any lengths, in one batch; logits of each step to 1e-4 of the largest."""
    from etude.infer import generate

    seen: list[torch.Tensor] = []
    given = torch.randint(0, V, (2, 18, len(sizes)), generator=torch.Generator().manual_seed(0))[0]

    def forced(logits: torch.Tensor, *a: object) -> torch.Tensor:
        seen.append(logits)
        return given[(len(seen) - 1) % 18]

    monkeypatch.setattr(generate, "draw", forced)
    m, prompts = made(*CHOICES[choice], n_layers=3), ragged(random.Random(1), sizes)
    found = outs(m, prompts, 18)
    assert found == outs(m, prompts, 18, use_cache=False) == given.T.tolist()
    for cached, whole in zip(seen[:18], seen[18:], strict=True):
        scale = max(1.0, whole.abs().max().item())
        torch.testing.assert_close(cached / scale, whole / scale, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # and both are the plain forward's
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + given[:, row].tolist()])
            expected = m(ids)[0, len(prompt) - 1 : -1]
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(torch.stack(seen[:18])[:, row] / scale, expected / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model,reference", [("dense", llama), ("gpt", gpt2)])
def test_greedy_is_hugging_faces(model: str, reference) -> None:
    m = made(model, *(["model.ffn.activation=gelu_tanh"] if model == "gpt" else []))
    theirs, _ = reference(m)
    prompts = ragged(random.Random(2), [6, 6, 6])
    ids = torch.tensor(prompts)
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert outs(m, prompts, 20) == found[:, 6:].tolist()


def test_rows_that_end_early_leave_the_others_alone() -> None:
    """A row ends at its stop token, which it keeps; the others go on as if alone."""
    m = made("dense")
    prompts = ragged(random.Random(3), [5, 2, 9])
    free = [naive(m, p, 20) for p in prompts]
    stop = free[1][3]
    expected = [f[: f.index(stop) + 1] if stop in f else f for f in free]
    assert len({len(e) for e in expected}) > 1
    for use_cache in (True, False):
        rows = [Row(list(p)) for p in prompts]
        steps = list(decode(m, rows, GREEDY, 20, {stop}, use_cache))
        assert [r.out for r in rows] == expected
        assert [r.finish for r in rows] == ["stop" if e[-1] == stop else "length" for e in expected]
        assert len(steps) == max(map(len, expected))
    assert outs(m, prompts[1:2], 20, stop=frozenset({stop})) == [expected[1]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sizes", [[30, 3], [32, 10], [40, 3], [31], [32], [5]], ids=str)
def test_learned_positions_see_the_last_window(use_cache: bool, sizes: list[int]) -> None:
    """Up to the last embedding from the cache, beyond it nanoGPT's cropping; said once, and only where it happens."""
    m = made("gpt")
    prompts = ragged(random.Random(4), sizes)
    said: list[int] = []
    found = outs(m, prompts, 12, use_cache=use_cache, on_crop=said.append)
    assert found == [naive(m, p, 12, limit=32) for p in prompts]
    assert said == ([32] if max(sizes) + 11 > 32 else [])


def test_rotary_models_go_beyond_their_length() -> None:
    m, said = made("dense"), []
    prompts = ragged(random.Random(5), [30, 4])
    assert outs(m, prompts, 20, on_crop=said.append) == [naive(m, p, 20) for p in prompts] and said == []


# ---------------------------------------------------------------- sampling


def naive_distribution(logits: list[float], s: Sampling) -> list[float]:
    """One row, one rule after another, on plain numbers; -> probabilities by token."""
    z = [v / s.temperature for v in logits]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    order = order[: s.top_k] if s.top_k else order
    weights = {i: math.exp(z[i] - z[order[0]]) for i in order}
    total = sum(weights.values())
    p = {i: w / total for i, w in weights.items()}
    if s.top_p is not None:
        before, keep = 0.0, {}
        for i in order:
            if before < s.top_p:
                keep[i] = p[i]
            before += p[i]
        p = keep
    if s.min_p is not None:
        p = {i: v for i, v in p.items() if v >= s.min_p * max(p.values())}
    total = sum(p.values())
    return [p.get(i, 0.0) / total for i in range(len(z))]


def by_token(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    p, ids = distribution(logits, s)
    assert p.dtype == torch.float64
    full = p if ids is None else torch.zeros(logits.shape, dtype=p.dtype).scatter(1, ids, p)
    return full / full.sum(-1, keepdim=True)


SETTINGS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.5, 1.0, 3.0)
    for k in (None, 1, 5, 100)
    for p in (None, 0.3, 0.9, 1.0)
    for m in (None, 0.0, 0.2, 1.0)
]


def test_distribution_against_plain_numbers() -> None:
    """Every combination of temperature, top-k, top-p and min-p, in this order."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 2
    for s in SETTINGS:
        expected = torch.tensor([naive_distribution(row, s) for row in logits.double().tolist()], dtype=torch.float64)
        torch.testing.assert_close(by_token(logits, s), expected, rtol=1e-5, atol=1e-7, msg=lambda m, s=s: f"{s}: {m}")


@pytest.mark.parametrize(
    "s", [Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, top_k=8, seed=4), Sampling(temperature=1.5, top_p=0.8, min_p=0.05, seed=5)]
)  # fmt: skip
def test_draws_have_the_distribution(s: Sampling) -> None:
    """Chi-square over 20,000 positions, and no token that was filtered out."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 1.5
    p, n = by_token(logits, s)[0], 20_000
    for choices, positions in (([0] * n, list(range(n))), (list(range(n)), [7] * n)):
        found = torch.bincount(draw(logits.expand(n, -1), s, choices, positions), minlength=20).double()
        assert (found[p == 0] == 0).all()
        there = p > 0
        chi = ((found[there] - n * p[there]) ** 2 / (n * p[there])).sum().item()
        degrees = int(there.sum()) - 1
        assert chi < degrees + 5 * math.sqrt(2 * degrees)


def test_draws_are_keyed_by_choice_and_position_alone() -> None:
    """A row draws the same with other neighbours, in another order, alone; other choices and seeds draw otherwise."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    s = Sampling(temperature=1.0, seed=1)
    choices, positions = [0, 1, 2, 0, 1, 2], [5, 5, 5, 9, 9, 9]
    whole = draw(logits, s, choices, positions)
    perm = [3, 0, 5, 1, 4, 2]
    assert (
        draw(logits[perm], s, [choices[i] for i in perm], [positions[i] for i in perm]).tolist() == whole[perm].tolist()
    )
    assert [
        int(draw(logits[i : i + 1], s, choices[i : i + 1], positions[i : i + 1])[0]) for i in range(6)
    ] == whole.tolist()
    flat = torch.zeros(400, 1000)
    drawn = [
        tuple(draw(flat, Sampling(temperature=1.0, seed=seed), [c] * 400, list(range(400))).tolist())
        for seed, c in ((1, 0), (2, 0), (1, 1))
    ]
    assert all(
        sum(a == b for a, b in zip(x, y)) < 10
        for x, y in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2]))
    )


def test_draw_at_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of [0, 1) never give a token of probability 0; minus infinity is never drawn; NaN is told."""
    from etude.infer import sampling

    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]])
    s = Sampling(temperature=1.0)
    for key, expected in ((0, 1), (2**64 - 1, 3)):
        monkeypatch.setattr(sampling, "mix", lambda *k, key=key: np.array([key], dtype=np.uint64))
        assert draw(logits, s, [0], [0]).tolist() == [expected]
        assert draw(logits, Sampling(temperature=1.0, top_p=0.99), [0], [0]).tolist() == ([3] if key == 0 else [1])
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), GREEDY, [0], [0]).tolist() == [1]
    for t in (0.0, 1.0):
        with pytest.raises(NonFinite, match="logits are NaN"):
            draw(torch.tensor([[0.0, math.nan]]), Sampling(temperature=t), [0], [0])


def test_repetition_penalty() -> None:
    """CTRL's rule on prompt and output, and nothing at 1."""
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    found = penalize(logits, seen, 1.7)
    for b in range(2):
        for v in range(12):
            z = logits[b, v].item()
            assert found[b, v].item() == pytest.approx((z / 1.7 if z > 0 else z * 1.7) if seen[b, v] else z)
    m, prompts = made("dense"), ragged(random.Random(6), [4, 7])
    for row, prompt in zip(outs(m, prompts, 10, Sampling(temperature=0, repetition_penalty=1e9)), prompts):
        assert len({*row, *prompt}) == 10 + len(set(prompt)), "a token came twice"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(Refusal, match=next(iter(wrong))):
        Sampling(**wrong)


# ---------------------------------------------------------------- text


def byte_model():
    tokenizer = tok.byte([], [])
    return made("dense", vocab_size=tokenizer.vocab_size), tokenizer


def test_same_seed_same_text() -> None:
    """However the samples are batched, and streamed text adds up to the text."""
    m, tokenizer = byte_model()
    prompts = [encode_prompt(tokenizer, p) for p in ("a", "def f", "日本")]
    s = Sampling(temperature=1.0, seed=9)
    streamed: dict[int, str] = {}
    first = complete(
        m, tokenizer, prompts, s, 15, n=2, on_text=lambda i, new: streamed.update({i: streamed.get(i, "") + new})
    )
    assert [r.row.choice for r in first] == [0, 1] * 3
    assert (
        [streamed.get(i, "") for i in range(6)]
        == [r.text for r in first]
        == [tokenizer.decode(r.row.out, skip_special=True) for r in first]
    )
    again = complete(m, tokenizer, prompts, s, 15, n=2, batch_size=1, use_cache=False)
    assert [r.row.out for r in again] == [r.row.out for r in first]
    other = complete(m, tokenizer, prompts, Sampling(temperature=1.0, seed=10), 15, n=2)
    assert all(a.row.out != b.row.out for a, b in zip(first, other)) and first[0].row.out != first[1].row.out


def first_cut(text: str, stops: list[str]) -> str:
    """What is left of `text` when it comes character by character and the first stop string that is complete cuts it."""
    for end in range(len(text) + 1):
        found = [i for s in stops if (i := text[:end].find(s)) >= 0]
        if found:
            return text[: min(found)]
    return text


def test_stop_strings_are_never_shown() -> None:
    """Random text over few letters, so that beginnings of stop strings abound and overlap: shown is exactly what is
    before the first one, at every moment a beginning of it, and nothing is held back without need."""
    rng, tokenizer = random.Random(0), tok.byte([], [])
    cut_some = 0
    for _ in range(400):
        text = "".join(rng.choices("aab\né👍", k=rng.randint(1, 25)))
        stops = ["".join(rng.choices("ab\né👍", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        ids, expected = tokenizer.encode(text), first_cut(text, stops)
        by_eos = rng.random() < 0.5
        if by_eos:
            ids.append(tokenizer.eos)
        row = Row([0])
        t, shown = TextRow(row, tokenizer, stops), ""
        for i, token in enumerate(ids):
            row.out.append(token)
            if i == len(ids) - 1:
                row.finish = "stop" if by_eos else "length"
            shown += t.push({tokenizer.eos})
            assert expected.startswith(shown), (text, stops)
            if row.finish is not None:
                break
        assert shown == t.text == expected, (text, stops)
        assert row.finish == ("stop" if by_eos or expected != text else "length")
        cut_some += expected != text
    assert 100 < cut_some < 300
    free = TextRow(row := Row([0]), tokenizer, ["xyz", ""])
    pieces = []
    for token in b"abxab":
        row.out.append(token)
        pieces.append(free.push(set()))
    assert pieces == ["a", "b", "", "xa", "b"]


def test_stop_strings_in_a_batch() -> None:
    """The row that met its stop string ends; its neighbours are those of a run without."""
    m, tokenizer = byte_model()
    s, prompts = Sampling(temperature=1.0, top_k=20, seed=2), [encode_prompt(tokenizer, p) for p in ("ab", "cd", "e")]
    free = complete(m, tokenizer, prompts, s, 40)
    stop = free[1].text[5:7]
    shown: dict[int, str] = {}
    cut = complete(
        m,
        tokenizer,
        prompts,
        s,
        40,
        stop=[stop],
        on_text=lambda i, new: shown.update({i: shown.get(i, "") + new}),
    )
    for i, (f, c) in enumerate(zip(free, cut)):
        assert c.text == shown.get(i, "") == first_cut(f.text, [stop])
    assert cut[1].row.finish == "stop" and len(cut[1].row.out) < 40


def test_prompts_that_are_empty() -> None:
    """They begin where documents begin."""
    byte = tok.byte([], [])
    assert encode_prompt(byte, "") == [byte.eos] and encode_prompt(byte, "a") == [97]
    char = tok.char(["ab\n"], ["ab\n"], unknown="error")
    assert encode_prompt(char, "") == char.encode("\n")
    assert encode_prompt(tok.char(["ab"], ["ab"], unknown="error"), "") == [0]


# ---------------------------------------------------------------- from a folder


@pytest.mark.parametrize("model", ["dense", "gpt"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_materialize_keeps_ties(model: str, tied: str) -> None:
    """A model from the meta device with loaded tensors: the same logits, one tensor for tied weights, names checked."""
    original = made(model, f"model.tied={tied}")
    tensors = {n: t.clone() for n, t in weights.model_tensors(original).items()}
    assert ("head.weight" in tensors) == (tied == "false")
    with torch.device("meta"):
        m = uninitialised(model, f"model.tied={tied}").eval()
    weights.materialize(m, tensors)
    assert (m.head.weight is m.embed.weight) == (tied == "true")
    assert all(p.device.type == "cpu" and isinstance(p, torch.nn.Parameter) for p in m.parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(m(ids), original(ids))
    with torch.device("meta"):
        fresh = uninitialised(model, f"model.tied={tied}")
    for change in ({"extra": torch.zeros(1)}, {"embed.weight": torch.zeros(2, 2)}):
        with pytest.raises(Refusal, match="the weights do not fit the model"):
            weights.materialize(fresh, tensors | change)
    with pytest.raises(Refusal, match="norm.weight"):
        weights.materialize(fresh, {n: t for n, t in tensors.items() if n != "norm.weight"})


def test_load_needs_the_folder_alone(tmp_path: Path) -> None:
    """Weights, config and tokenizer from an export; a foreign target in it is refused before it is imported."""
    tokenizer = tok.bpe([varied_text(3000)], [], vocab_size=300)
    node = model_node(*small("dense"))
    torch.manual_seed(0)
    original = build(node, tokenizer.vocab_size)
    original.init_weights()
    config = {"format": 2, "step": 3, "vocab_size": tokenizer.vocab_size, "model": node, "seq_len": 32}
    files = {
        "model.safetensors": weights.model_tensors(original),
        "config.json": config,
        "tokenizer.json": tokenizer.to_json(),
    }
    folder = checkpoint.save(tmp_path / "export", files)
    state = torch.get_rng_state()
    for dtype, exact in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        m, t = load(str(folder), "cpu", dtype, ["etude"])
        assert not m.training and t.sha256() == tokenizer.sha256() and weights.read_config(folder) == config
        assert {p.dtype for p in m.parameters()} == {exact}
        assert m.head.weight is m.embed.weight
        if dtype == "fp32":
            assert torch.equal(m(torch.arange(9)[None]), original.eval()(torch.arange(9)[None]))
    assert torch.equal(state, torch.get_rng_state()), "loading initialised the model at random"
    evil = config | {"model": node | {"_target_": "antigravity.fly"}}
    (tmp_path / "evil").mkdir()
    for name in files:
        (tmp_path / "evil" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "evil" / "config.json").write_text(json.dumps(evil))
    with pytest.raises(Refusal, match="antigravity.fly is outside trusted"):
        load(str(tmp_path / "evil"), "cpu", "fp32", ["etude"])
    with pytest.raises(Refusal, match="ckpt=.*nothing does not exist"):
        load(str(tmp_path / "nothing"), "cpu", "fp32", ["etude"])


@pytest.mark.parametrize("name", CHOICES)
def test_fused_layers_give_the_same_logits_without_a_copy(name: str) -> None:
    """One product for q, k and v (and gate and up, and the ways into latents) changes no value, and the parameters still
    are the weights."""
    m = made(*CHOICES[name])
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    before, names = m(ids), [n for n, _ in m.named_parameters()]
    held = sum(p.numel() for p in m.parameters())
    fuse(m)
    scale = max(1.0, before.detach().abs().max().item())
    torch.testing.assert_close(m(ids) / scale, before / scale, rtol=1e-5, atol=5e-6)
    assert [n for n, _ in m.named_parameters()] == names
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in m.parameters()}
    assert sum(storages.values()) == 4 * held, "the weights are there twice"
    part = m.blocks[0].attn
    for leaf in part.side_by_side:
        if part.window == 1 and leaf in ("q", "k"):
            continue  # a position that sees itself alone has nothing to weigh
        layer = part.get_submodule(leaf)
        kept = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.zero_()
            assert not torch.allclose(m(ids), before, atol=1e-4), leaf
            layer.weight.copy_(kept)
    torch.testing.assert_close(m(ids) / scale, before / scale, rtol=1e-5, atol=5e-6)


def test_fused_models_can_be_saved(tmp_path: Path) -> None:
    """Weights that are views of one matrix are written as what they are."""
    for name in ("gpt", "deepseek_v3"):
        m = made(name)
        ids = torch.arange(9)[None]
        expected = m(ids)
        fuse(m).save_pretrained(tmp_path / name)
        assert torch.equal(weights.from_pretrained(tmp_path / name, "cpu", None, ["etude"])(ids), expected)

"""Layouts of sequences: packed and with shared prompts, they give what they give one a row."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_loader import node, reader, ready
from test_model import V, made
from torch import Tensor

from etude.loop import n_inputs
from etude.model.attention import BLOCK, Documents, attend
from etude.model.transformer import Transformer
from etude.strategy.layout import Layout, Row, arrange, rows_of, take

HOW: tuple[Layout, ...] = ("rows", "packed", "shared")
RNG = random.Random(0)


def ids(n: int) -> list[int]:
    return [RNG.randrange(V) for _ in range(n)]


def row(*turns: tuple[list[int], bool]) -> Row:
    """A sequence of (ids, whether they are learned)."""
    return Row(
        torch.tensor([i for turn, _ in turns for i in turn]),
        torch.tensor([learned for turn, learned in turns for _ in turn]),
    )


def answered(prompt: list[int], *lengths: int) -> list[Row]:
    """A prompt with answers of so many random tokens."""
    return [row((prompt, False), (ids(n), True)) for n in lengths]


# ---------------------------------------------------------------- attention with branches, written out


def branching(*lines: list[int | tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """doc_ids and branches of rows, each a list of documents: its length, or (trunk, branch, branch, ...); negative:
    padding."""
    doc_ids, branches = [], []
    for line in lines:
        doc_ids.append(
            [d if not isinstance(x, int) or x > 0 else -1 for d, x in enumerate(line) for _ in range(size(x))]
        )
        branches.append(
            [k for x in line for k, n in enumerate((abs(x),) if isinstance(x, int) else x) for _ in range(n)]
        )
    return torch.tensor(doc_ids), torch.tensor(branches)


def size(x: int | tuple[int, ...]) -> int:
    return abs(x) if isinstance(x, int) else sum(x)


def by_hand(doc_ids: Tensor, branches: Tensor) -> tuple[list[list[int]], Tensor]:
    """Positions and which token sees which (B, T, T), each from its definition alone."""
    B, T = doc_ids.shape
    positions, sees = [], torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        d, k = doc_ids[b].tolist(), branches[b].tolist()
        counted: list[int] = []
        for t in range(T):
            begin = t  # of the document
            while begin and d[begin - 1] == d[t]:
                begin -= 1
            seen = [s for s in range(begin, t + 1) if k[s] in (0, k[t])]
            sees[b, t, seen] = True
            counted.append(len(seen) - 1 if d[t] >= 0 else 0)
        positions.append(counted)
    return positions, sees


BRANCHING = {
    "one": branching([(5, 3, 1, 4)]),
    "several": branching([(5, 3, 4), 6, (1, 2, 2), (2, 1), 3], [7, (4, 4, 4, 4), -6]),
    "no trunk": branching([(0, 3, 4), (2, 3), 1]),
    "padding": branching([(3, 5, 5), -3], [4, -12], [-16]),
    "none": branching([4, 12], [16]),
    "long": branching([(300, 40, 290), (20, 330), -20]),
}


@pytest.mark.parametrize("case", BRANCHING)
def test_positions_of_branches(case: str) -> None:
    """They go on from the trunk, padding has 0, and without branches nothing changes."""
    doc_ids, branches = BRANCHING[case]
    assert Documents(doc_ids, branches).positions.tolist() == by_hand(doc_ids, branches)[0]
    plain = Documents(doc_ids, torch.zeros_like(branches))
    assert plain.positions.tolist() == by_hand(doc_ids, torch.zeros_like(branches))[0]
    assert torch.equal(plain.bounds, Documents(doc_ids).bounds) and torch.equal(plain.begins, Documents(doc_ids).begins)


@pytest.mark.parametrize("case", BRANCHING)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 130, 400])
def test_attention_of_branches_against_a_mask(case: str, window: int | None) -> None:
    """Shared key heads, values narrower than keys, a scale: outputs and gradients to 1e-5 of the largest, wherever there is
    text."""
    doc_ids, branches = BRANCHING[case]
    B, T = doc_ids.shape
    positions, sees = by_hand(doc_ids, branches)
    at = torch.tensor(positions)
    if window is not None:
        sees = sees & (at[:, :, None] - at[:, None] < window)
    text = (doc_ids >= 0)[:, None, :, None]
    torch.manual_seed(0)
    inputs = torch.randn(B, 4, T, 6), torch.randn(B, 2, T, 6), torch.randn(B, 2, T, 3)
    dy = torch.randn(B, 4, T, 3) * text
    found = []
    for ours in (True, False):
        q, k, v = xs = [x.clone().requires_grad_() for x in inputs]
        if ours:
            y = attend(q, k, v, Documents(doc_ids, branches), 0.7, window)
        else:
            z = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
            y = z.masked_fill(~(sees | torch.eye(T, dtype=torch.bool))[:, None], -torch.inf).softmax(-1)
            y = y @ v.repeat_interleave(2, 1)
        y.backward(dy)
        found.append([(y * text).detach(), *(x.grad for x in xs)])
    for name, one, other in zip("yqkv", *found):
        scale = max(1.0, other.abs().max().item())
        assert (one - other).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("window", [None, 30])
def test_branches_make_no_square_mask(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a branch against its trunk and itself alone; with a window, of blocks by two or a branch by the window."""
    masks: list[tuple[int, ...]] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        masks.extend([] if attn_mask is None else [tuple(attn_mask.shape)])
        return real(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    documents = Documents(*branching([(500, 40, 60), (700, 600)]))
    attend(*(torch.randn(1, 2, 1900, 4) for _ in range(3)), documents, None, window)
    if window is None:
        assert sorted(masks) == [(40, 540), (60, 560), (600, 1300)]
    else:
        assert {(40, 69), (60, 89)} <= set(masks) and all(max(m) <= 2 * BLOCK for m in masks)


# ---------------------------------------------------------------- where sequences lie


def read_back(made: dict[str, Tensor], n: int) -> tuple[list[int], list[int]]:
    """What sequence n, which has learned tokens, is in a layout: its inputs and targets, found by its slots alone."""
    slot = int(made["slots"][n, 0])
    b, t = divmod(slot, made["tokens"].shape[1])
    d, k = made["doc_ids"][b].tolist(), made.get("branches", torch.zeros_like(made["tokens"]))[b].tolist()
    begin = end = t
    while begin and d[begin - 1] == d[t]:
        begin -= 1
    while end < len(d) and d[end] == d[t]:
        end += 1
    where = [s for s in range(begin, end) if k[s] in (0, k[t])]
    return made["tokens"][b, where].tolist(), made["targets"][b, where].tolist()


def inputs_and_targets(r: Row) -> tuple[list[int], list[int]]:
    pairs = list(zip(r.ids.tolist(), r.learned.tolist()))
    return [i for i, _ in pairs[:-1]], [i if learned else -100 for i, learned in pairs[1:]]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("limit", [None, 20, 64])
def test_each_sequence_lies_somewhere_whole(how: Layout, limit: int | None) -> None:
    """Random sequences of few different tokens, in groups: inputs and targets are read back, `take` finds the learned
    tokens, and nothing else is there."""
    rng = random.Random(5)
    for trial in range(60):
        group = rng.randint(1, 4)
        rows = []
        for _ in range(group * rng.randint(1, 5)):
            n = rng.randint(2, 20)
            learned = [False, *(rng.random() < 0.3 for _ in range(n - 1))]
            learned[rng.randrange(1, n)] = True
            rows.append(Row(torch.tensor([rng.randrange(3) // 2 for _ in range(n)]), torch.tensor(learned)))
        made = arrange(rows, group, how, limit)
        shape, slots = made["tokens"].shape, made["slots"]
        assert shape == made["targets"].shape == made["doc_ids"].shape and ("branches" in made) == (how == "shared")
        assert shape[0] == len(rows) if how == "rows" else limit is not None or shape[0] == 1
        for n, r in enumerate(rows):
            assert read_back(made, n) == inputs_and_targets(r), (trial, n)
        got = take(made["targets"], slots)
        assert [g[s >= 0].tolist() for g, s in zip(got, slots)] == [r.ids[r.learned].tolist() for r in rows]
        assert (got[slots < 0] == 0).all() and (slots[:, 0] >= 0).all() and (slots.diff() < 0).sum(1).max() <= 1
        used = slots[slots >= 0]
        assert sorted(used.tolist()) == (made["targets"].flatten() >= 0).nonzero()[:, 0].tolist()
        assert (made["targets"][made["doc_ids"] < 0] == -100).all()
        inputs = sum(len(r.ids) - 1 for r in rows)
        assert (made["doc_ids"] >= 0).sum() == inputs if how != "shared" else (made["doc_ids"] >= 0).sum() <= inputs


SHARED: dict[str, tuple[list[Row], int]] = {
    "a prompt": (answered(ids(9), 4, 7, 1), 8),
    "one token": (answered([5], 4, 6), 0),
    "nothing": ([row(([1, 2], False), ([3], True)), row(([2, 2], False), ([3], True))], 0),
    "no second token": ([row(([1, 2], False), ([3], True)), row(([1, 4], False), ([3], True))], 0),
    "two tokens": (answered([5, 6], 4, 6), 1),
    "a learned turn": (2 * [row(([1, 2, 3], False), ([4, 5], True), ([6, 7], False), ([8], True))], 2),
    "learned by one": ([row(([1, 2, 3, 4], False), ([5], True)), row(([1, 2, 3], False), ([4, 5], True))], 2),
    "another prompt": ([row(([1, 2, 3, 4], False), ([5], True)), row(([1, 2, 3, 9, 9], False), ([5], True))], 2),
    "one begins the other": ([row(([1, 2, 3, 4, 5], False)), row(([1, 2, 3], False), ([4], True))], 2),
    "the same without a target": (2 * [row(([1, 2, 3, 4], False))], 2),  # the last id is no input
}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_shared(case: str) -> None:
    """The trunk ends before the last token that all have in common and none learns, so that each branch begins with it;
    without a trunk each is a document by itself."""
    rows, trunk = SHARED[case]
    made = arrange(rows, len(rows), "shared", None)
    branch, lengths = torch.unique_consecutive(made["branches"][made["doc_ids"] >= 0], return_counts=True)
    own = [len(r.ids) - 1 - trunk for r in rows]
    if trunk:
        assert branch.tolist() == list(range(len(rows) + 1)) and lengths.tolist() == [trunk, *own]
        starts = made["tokens"][0, torch.tensor([trunk, *own]).cumsum(0)[:-1]]
        assert (starts == rows[0].ids[trunk]).all()
    else:
        assert not branch.any() and lengths.tolist() == [sum(own)]
        assert len(made["doc_ids"][made["doc_ids"] >= 0].unique()) == len(rows)


def test_tokens_saved() -> None:
    """Eight answers of 7 or 8 tokens to a prompt of 40: 372 inputs become 39 + 8 + 7 or so each."""
    rows = answered(ids(40), 7, 8, 7, 8, 7, 8, 7, 8)
    counts = [int((arrange(rows, 8, how, None)["doc_ids"] >= 0).sum()) for how in HOW]
    assert counts == [372, 372, 39 + 60]


@pytest.mark.parametrize(
    "how,limit,shape",
    [
        ("rows", None, (6, 64)),
        ("rows", 40, (6, 40)),
        ("rows", 200, (6, 64)),
        ("packed", None, (1, 224)),  # 35 + 4 * 30 + 40 = 195
        ("packed", 75, (3, 75)),  # 40 + 35, 30 + 30, 30 + 30
        ("packed", 100, (3, 96)),  # 40 + 35, 30 + 30 + 30, 30
        ("packed", 10, (6, 40)),
        ("shared", None, (1, 192)),  # 39 + 4 - 3, 34 + 4 - 3 shorter than 195 by 3 * 3 tokens of trunks of 3
        ("shared", 200, (1, 192)),
        ("shared", 72, (3, 72)),
    ],
)
def test_widths(how: Layout, limit: int | None, shape: tuple[int, int]) -> None:
    """Of sequences of 40, 35 and four times 30 inputs, in pairs that share three: a multiple of 32 within the limit, which
    only a document that is longer itself exceeds."""
    prompts = [[i, i + 1, i + 2, i + 3] for i in range(3)]
    rows = [r for p, ns in zip(prompts, ((37, 32), (27, 27), (27, 27))) for r in answered(p, *ns)]
    assert [len(r.ids) - 1 for r in rows] == [40, 35, 30, 30, 30, 30]
    assert arrange(rows, 2, how, limit)["tokens"].shape == shape


def test_layouts_of_little() -> None:
    """One sequence, groups of one, a sequence without a target or of one token, and none at all."""
    for how in HOW:
        one = arrange(answered([1, 2], 3), 1, how, None)
        assert one["slots"].tolist() == [[1, 2, 3]] and one["tokens"].shape == (1, 32)
        assert not one.get("branches", torch.zeros(1)).any()
        silent = arrange([row(([1, 2, 3], False)), row(([1], False)), *answered([4], 1)], 1, how, None)
        assert (silent["slots"] >= 0).sum(1).tolist() == [0, 0, 1]
        assert take(torch.ones(silent["tokens"].shape), silent["slots"]).tolist() == [[0], [0], [1]]
        none = arrange([], 4, how, None)
        assert none["slots"].shape == (0, 0) and (none["doc_ids"] == -1).all()
        scores, _ = made("dense")(none["tokens"], targets=none["targets"], doc_ids=none["doc_ids"])
        take(scores.logprob, none["slots"]).sum().backward()
    with pytest.raises(ValueError, match="no groups of 2"):
        arrange(answered([1], 1, 1, 1), 2, "shared", None)


def test_rows_of_a_loaders_batch(tmp_path: Path) -> None:
    """Pairs and packed chats, as they are read from files: arranged one a row, or packed, the same inputs and targets."""
    pairs = [{"prompt": "p" * n, "chosen": "yes" * n, "rejected": "no" * (n % 3 + 1)} for n in range(1, 12)]
    chats = [
        {"messages": [{"role": r, "content": r * (n % 4) + str(n)} for r in ("user", "assistant")]} for n in range(30)
    ]
    for kind, lines in (("pairs", pairs), ("chats", chats)):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = node(kind, path, seq_len=256)
        batch = next(reader(data, ready(tmp_path, data)).train.whole(64))
        rows = rows_of(batch)
        whole = [
            (t[d == i].tolist(), y[d == i].tolist())
            for t, y, d in zip(batch["tokens"], batch["targets"], batch["doc_ids"])
            for i in range(int(d.max()) + 1)
        ]
        assert [inputs_and_targets(r) for r in rows] == whole and len(whole) > 5
        assert not any(r.learned[0] for r in rows)
        if kind == "chats":
            assert len(rows) > len(batch["tokens"])  # several documents a row
            continue
        again, text = arrange(rows, 2, "rows", data.seq_len), batch["doc_ids"] >= 0
        assert torch.equal(again["targets"], batch["targets"]) and torch.equal(again["doc_ids"], batch["doc_ids"])
        assert torch.equal(again["tokens"] * text, batch["tokens"] * text)
        shared = arrange(rows, 2, "shared", data.seq_len)
        assert shared["branches"].max() == 2 and (shared["doc_ids"] >= 0).sum() < text.sum()
    text = {"tokens": torch.tensor([[1, 2, 3]]), "targets": torch.tensor([[2, 3, -100]])}
    (only,) = rows_of(text)
    assert only.ids.tolist() == [1, 2, 3, 0] and only.learned.tolist() == [False, True, True, False]


def test_gradient_of_take() -> None:
    """Each slot's own, nothing elsewhere, also where what is not taken is no number; and a take that mixes up sequences
    or drops the mask is seen."""
    made = arrange(answered(ids(6), 3, 1, 4), 3, "shared", None)
    slots, weights = made["slots"], torch.arange(1.0, 13.0).view(3, 4)
    x = torch.randn(made["tokens"].shape)
    x[made["targets"] < 0] = torch.nan
    expected = torch.zeros_like(x)
    for n, line in enumerate(slots.tolist()):
        for at, slot in enumerate(line):
            if slot >= 0:
                expected.view(-1)[slot] = weights[n, at]

    def gradient(taken: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (weights * taken(leaf, slots)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(take), expected) and expected.count_nonzero() == 8
    assert not torch.equal(gradient(lambda x, s: take(x, s.roll(1, 0))), expected)
    assert not torch.equal(gradient(lambda x, s: take(x, s.clamp_min(0))), expected)
    assert not torch.equal(gradient(lambda x, s: take(x.detach().requires_grad_(), s) + 0 * x.nansum()), expected)


# ---------------------------------------------------------------- models


SPARSE = ["model.ffn.aux_loss=0.5", "model.ffn.z_loss=0.1"]
MODELS = {
    "dense": ["dense"],
    "moe": ["moe", *SPARSE],
    "mla": ["dense", "model/attn=mla"],
    "deepseek_v3": ["deepseek_v3", "model.ffn.sparse.aux_loss=0.5", "model.ffn.sparse.z_loss=0.1"],
    "gpt": ["gpt"],
    "sinusoidal": ["gpt", "model.pos=sinusoidal"],
    "local": ["dense", "model/attn=local", "model.attn.window=[4,7,null]"],
    "mla-window": ["moe", "model/attn=mla", "model.attn.window=5", *SPARSE],
}
GROUPS: list[Row] = [
    *answered(ids(12), 9, 2, 17),
    *3 * answered(ids(5), 6),  # identical
    *answered([7], 3, 8, 5),  # there is no trunk
    *(row(([first, 4, 4], False), (ids(6), True)) for first in (1, 2, 3)),  # nothing in common
    *(row(([9, 8, 7], False), (ids(3), True), (ids(4), False), (ids(5), True)) for _ in range(3)),  # several turns
    *answered([*range(20, 31)], 7, 3),
    row(
        ([*range(20, 26)], False), ([1, 2], True), (ids(9), False)
    ),  # differs sooner, and ends with what is not learned
    *answered(ids(25), 1, 7, 4),
]


def outcome(m: Transformer, rows: list[Row], group: int, how: Layout, weigh: Tensor) -> dict[str, Any]:
    """What losses may see, and the gradients of a loss of all of it."""
    m.zero_grad()
    b = arrange(rows, group, how, None)
    scores, aux = m(b["tokens"], targets=b["targets"], doc_ids=b["doc_ids"], branches=b.get("branches"))
    found: dict[str, Any] = {n: take(getattr(scores, n), b["slots"]) for n in ("logprob", "logz", "entropy")}
    loss = (found["logprob"] * weigh + 0.01 * found["logz"].square()).sum()
    if aux is not None:
        found["aux"] = take(aux.loss, b["slots"])
        loss = loss + (found["aux"] * weigh).sum()
        mask = b["targets"] >= 0
        found["load"] = aux.load
        found["entropy of routers"] = take(aux.entropy, b["slots"])
        found["said"] = torch.stack([s / n for s, n in (v for k, v in aux.metrics(mask).items() if "load" not in k)])
    loss.backward()
    found = {k: v.detach() for k, v in found.items()}
    return found | {"grads": {n: p.grad for n, p in m.named_parameters() if p.grad is not None}}


def same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Values to 2e-6 of the largest if that is above 1, gradients to 1e-5 of their norm, loads exactly."""
    assert found.keys() == expected.keys() and found["grads"].keys() == expected["grads"].keys()
    for name, value in expected.items():
        if name == "load":
            assert torch.equal(found[name], value), what
        elif name != "grads":
            gap = (found[name] - value).abs().max() / max(1.0, value.abs().max())
            assert gap <= 2e-6, f"{what} {name} {gap}"
    for name, grad in expected["grads"].items():
        gap = (found["grads"][name] - grad).norm() / grad.norm().clamp_min(1.0)  # that of a key's bias is none
        assert gap <= 1e-5, f"{what} gradient of {name} {gap}"


def weights_for(rows: list[Row]) -> Tensor:
    longest = max(int(r.learned.sum()) for r in rows)
    return torch.randn(len(rows), longest, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model", MODELS)
def test_layouts_are_separate_rows(model: str) -> None:
    """Scores, auxiliary losses, routers' statistics and gradients of every parameter, of groups of all sorts in one batch,
    and of each group alone."""
    m = made(*MODELS[model], n_layers=3)
    assert model != "gpt" or m.max_len == max(len(r.ids) for r in GROUPS) - 1 + 1, "a table with no room to spare"
    weigh = weights_for(GROUPS)
    expected = outcome(m, GROUPS, 3, "rows", weigh)
    assert ("aux" in expected) == ("moe" in str(MODELS[model]) or model == "deepseek_v3")
    for how in ("packed", "shared"):
        same(outcome(m, GROUPS, 3, how, weigh), expected, how)
    if model in ("dense", "moe"):
        for i in range(0, len(GROUPS), 3):
            rows = GROUPS[i : i + 3]
            for group in (1, 3):
                found = (outcome(m, rows, group, how, weights_for(rows)) for how in ("shared", "rows"))
                same(*found, f"{i} {group}")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_branches_do_not_see_each_other(model: str) -> None:
    """Another answer, and another prompt token: what changes and what does not."""
    m, prompt = made(*MODELS[model]), ids(9)
    rows = answered(prompt, 5, 6)

    def logprobs(rows: list[Row]) -> Tensor:
        b = arrange(rows, 2, "shared", None)
        assert b["branches"].max() == 2
        return take(
            m(**{k: b[k] for k in ("tokens", "targets", "doc_ids", "branches")})[0].logprob, b["slots"]
        ).detach()

    before = logprobs(rows)
    other = logprobs([rows[0], *answered(prompt, 6)])
    torch.testing.assert_close(other[0], before[0], rtol=2e-6, atol=2e-6)
    assert not torch.allclose(other[1], before[1], atol=1e-2)
    rows = [Row(r.ids.clone().index_fill_(0, torch.tensor([0]), (prompt[0] + 1) % V), r.learned) for r in rows]
    moved = logprobs(rows)
    assert ((moved - before).abs().amax(1) > 1e-3).all()


def test_checkpointing_with_branches() -> None:
    """What is computed again is the same."""
    weigh = weights_for(GROUPS)
    found = [outcome(made(*MODELS["moe"], checkpoint=on).train(), GROUPS, 3, "shared", weigh) for on in (False, True)]
    for name, value in found[0]["grads"].items():
        assert torch.equal(found[1]["grads"][name], value), name


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of tensors that it looks at
def test_compiled_blocks_with_branches() -> None:
    """Traced by torch.compile as a run with compile=true does; for other lengths too."""
    m = made(*MODELS["dense"], n_layers=1)
    cut = [GROUPS[:9], GROUPS[6:]]
    expected = [outcome(m, rows, 3, "shared", weights_for(rows)) for rows in cut]
    for block in m.blocks:
        block.compile(backend="eager")
    for rows, value in zip(cut, expected):
        same(outcome(m, rows, 3, "shared", weights_for(rows)), value, "compiled")


def test_branches_without_documents_are_refused() -> None:
    """Rather than ignored."""
    with pytest.raises(ValueError, match="give doc_ids too"):
        made("dense")(torch.zeros(1, 4, dtype=torch.int64), branches=torch.tensor([[0, 0, 1, 2]]))


def test_tokens_are_counted_alike_in_every_layout() -> None:
    """What a step has seen does not depend on how it lay in memory: groups with a prompt, and one without, among them."""
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 6, 7], [9, 6, 7], [3], [4]]
    rows = [row((p, False), ([11] * n, True)) for p, n in zip(prompts, (2, 3, 4, 1, 2, 3))]
    found = {how: n_inputs(arrange(rows, 2, how, None)) for how in ("rows", "packed", "shared")}
    assert set(found.values()) == {sum(len(r.ids) - 1 for r in rows)}

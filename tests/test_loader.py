"""From ids to batches: packing, documents in rows, exact mixtures, and the same batches however they are read."""

import collections
import fractions
import functools
import itertools
import json
import math
import multiprocessing
import random
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import varied_text
from test_model import made
from torch import Tensor, nn

from etude.data import stored as stored_module
from etude.data.base import Data, Maker
from etude.data.journal import Workers
from etude.data.loader import IGNORED, Batch, Batches, Chain, Documents, Windows
from etude.data.mixture import Mixture
from etude.data.order import Mixed, Order, proportions
from etude.data.pack import pack
from etude.data.prepare import Preparation, Prepared, cached, open_prepared, prepare
from etude.data.rows import Chats, Groups, Labelled, Pairs, Prompts
from etude.data.store import Memory
from etude.data.stored import H5, Bin
from etude.data.text import Stdlib, Text
from etude.errors import Refusal
from etude.loop import batch_hash
from etude.strategy.seq import Seq
from etude.text import tokenizer as tok

CPU = torch.device("cpu")
BYTE = Maker("byte", tok.byte)
LOADING = dict(seq_len=48, stride=None, isolate_documents=False, drop_last=False, workers=0, prefetch=2)
ROWS = dict(val_fraction=0.2, format="auto", rename={}, on_error="raise", duplicates="keep", split="hash")
PLAIN = dict(layout="windows", overlong="split", order="random", separator=None)
MADE = dict(n=1, rows_seed=0, task="mixed", digits=None, operations=None)
NODES: dict[str, tuple[type, dict[str, Any]]] = {
    "text": (Text, PLAIN),
    "chats": (Chats, MADE | dict(layout="packed", overlong="right", order="shuffle", train_on="assistant")),
    "pairs": (Pairs, MADE | dict(layout="documents", overlong="right", order="shuffle")),
    "labelled": (Labelled, MADE | dict(layout="documents", overlong="right", order="shuffle")),
    "prompts": (Prompts, MADE | dict(layout="documents", overlong="drop", order="shuffle")),
    "groups": (Groups, MADE | dict(layout="documents", overlong="drop", order="shuffle")),
}


def node(kind: str, path: Any, **settings: Any) -> Any:
    """A data node as conf/data/<kind>.yaml describes it, with `settings`."""
    made, usual = NODES[kind]
    return made(path=str(path), **(LOADING | ROWS | usual | settings))


def reader(data: Any, prepared: list[Prepared], **cut: int) -> Batches:
    sampler = {"batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1} | cut
    return Batches(data, prepared, sampler, 1, CPU)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(rng: random.Random, longest: int) -> str:
    return varied_text(rng.randint(3, longest), rng.randrange(10**6)).strip() or "x"


def conversation(rng: random.Random, longest: int = 60) -> dict:
    roles = ["user", "assistant"] * rng.randint(1, 3)
    return {"messages": [{"role": role, "content": sentences(rng, longest)} for role in roles]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind: a text, texts, chats, preferences, labelled answers, prompts and groups."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "text.txt").write_text("\n\n".join(varied_text(400, i) for i in range(40)))
    lines(folder / "texts.jsonl", [{"text": sentences(rng, 90)} for _ in range(150)])
    lines(folder / "chats.jsonl", [conversation(rng) for _ in range(300)])
    pair = ("prompt", "chosen", "rejected")
    lines(folder / "pairs.jsonl", [{k: sentences(rng, 25) + k for k in pair} for _ in range(120)])
    other, one = random.Random(1), ("prompt", "completion")
    judged = [{k: sentences(other, 25) + k for k in one} | {"label": other.random() < 0.5} for _ in range(120)]
    lines(folder / "labelled.jsonl", judged)
    prompts = [{"prompt": sentences(rng, 40), "answer": i, "more": {"é": [None, 0.5]}} for i in range(90)]
    lines(folder / "prompts.jsonl", prompts)
    lines(folder / "groups.jsonl", [group(rng, sentences(rng, 25)) for _ in range(90)])
    return folder


def group(rng: random.Random, prompt: str) -> dict:
    n = rng.randint(2, 5)
    rewards = [rng.choice((0, 1, -0.1, 1e-3)), *rng.choices((None, 0.5, 2), k=n - 1)]
    return {"prompt": prompt, "completions": [sentences(rng, 30) for _ in range(n)], "rewards": rewards}


def ready(folder: Path, data: Any) -> list[Prepared]:
    return prepare(data, BYTE, str(folder / "cache"))


# ---------------------------------------------------------------- packing


def best_fit(lengths: list[int], capacity: int) -> int:
    """Bins that best-fit decreasing needs, by looking at every bin for every item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


def test_packing_is_best_fit_decreasing() -> None:
    """Every item once, no bin too full, as few bins as the definition makes, and the same ones at every call."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        capacity = int(rng.integers(1, 200))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 300)))
        if trial % 3:  # short ones, of which many fit
            lengths = np.minimum(lengths, rng.integers(1, capacity // 4 + 2, len(lengths)))
        items, ends = pack(lengths, capacity)
        assert sorted(items.tolist()) == list(range(len(lengths)))
        bins = np.split(items, ends[:-1])
        assert ends[-1] == len(items) and all(len(b) and lengths[b].sum() <= capacity for b in bins)
        assert len(bins) == best_fit(lengths.tolist(), capacity) <= 11 / 9 * -(-lengths.sum() // capacity) + 4
        assert all(np.array_equal(a, b) for a, b in zip(pack(lengths, capacity), (items, ends)))
    assert [len(a) for a in pack(np.array([], dtype=np.int64), 8)] == [0, 0]


@pytest.mark.parametrize("capacity", [512, 32768])
def test_packing_is_quick(capacity: int) -> None:
    """100,000 documents take 0.1 to 0.5 s, and leave hardly any room over."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64).clip(1, capacity)
    begun = time.process_time()
    _, ends = pack(lengths, capacity)
    assert time.process_time() - begun < 5
    assert lengths.sum() / (len(ends) * capacity) > 0.97


def test_standard_library_packs_well(tmp_path: Path) -> None:
    """The default corpus in whole documents: over 97 % of each row is text, whatever the row's length."""

    def few(train: Any, corpus: Any) -> tok.Tokenizer:
        return tok.bpe(itertools.islice(train, 40), [], vocab_size=1024)

    def stdlib(seq_len: int) -> Stdlib:
        settings = LOADING | dict(layout="packed", overlong="split", order="shuffle", val_fraction=0.1)
        return Stdlib(**(settings | dict(seq_len=seq_len)))

    (found,) = prepare(stdlib(128), Maker("few", few), str(tmp_path))
    for seq_len in (128, 512, 2048):
        batches = reader(stdlib(seq_len), [found])
        data = batches.train
        assert isinstance(data, Documents) and data.efficiency > 0.97
        sample = data.__getitems__(list(range(0, len(data), len(data) // 50)))
        assert sample["tokens"].shape[1] == seq_len and (sample["doc_ids"] >= 0).float().mean() > 0.97
        assert data.tokens_per_sample == pytest.approx(data.efficiency * seq_len)
        assert f"{data.efficiency:.1%} full" in batches.accounts()[0]


# ---------------------------------------------------------------- documents in rows


def handmade(
    kind: str,
    documents: list[list[int]],
    masks: list[list[int]] | None = None,
    fields: list[Any] | None = None,
    rewards: list[list[float]] | None = None,
    labels: list[int] | None = None,
) -> Prepared:
    """Documents of these ids, of which `masks` says what are targets, as both splits; `rewards` are a list for each group,
    `labels` a number for each document. Id 0 is the end token."""
    arrays: dict[str, Any] = {
        "tokens": np.array(list(itertools.chain(*documents)), dtype=np.uint32),
        "ends": np.cumsum([len(d) for d in documents], dtype=np.int64),
    }
    if masks is not None:
        arrays["targets"] = np.array(list(itertools.chain(*masks)), dtype=np.uint8)
    if fields is not None:
        texts = [json.dumps(f, ensure_ascii=False).encode() for f in fields]
        arrays["fields"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        arrays["fields_ends"] = np.cumsum([len(t) for t in texts], dtype=np.int64)
    if rewards is not None:
        arrays["rewards"] = np.array(list(itertools.chain(*rewards)), dtype=np.float32)
        arrays["groups_ends"] = np.cumsum([len(r) for r in rewards], dtype=np.int64)
    if labels is not None:
        arrays["labels"] = np.array(labels, dtype=np.uint8)
    meta = {"kind": kind, "source": "by hand", "files": 1, "vocab_size": 10**6, "eos": 0, "dropped": {}}
    meta |= {f"{split}_tokens": len(arrays["tokens"]) for split in ("train", "val")}
    store = Memory({f"{split}/{name}": [a] for split in ("train", "val") for name, a in arrays.items()})
    return Prepared(store, meta, {})


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which no id stands twice: the following number is the following id."""
    ends = list(itertools.accumulate(lengths))
    return [list(range(end - n + 1, end + 1)) for n, end in zip(lengths, ends)]


def random_masks(documents: list[list[int]], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[int(rng.random() < share) for _ in d] for d in documents for share in [rng.choice((0.0, 0.05, 0.4, 1.0))]]


def unpacked(batch: Batch) -> list[list[tuple[list[int], list[int]]]]:
    """The documents of each row as (inputs, targets). They are numbered from 0 on, and padding lies behind them."""
    rows = []
    for tokens, targets, docs in zip(*(batch[k].tolist() for k in ("tokens", "targets", "doc_ids"))):
        n = sum(d >= 0 for d in docs)
        assert docs[n:] == [-1] * (len(docs) - n) and targets[n:] == [-100] * (len(docs) - n)
        assert [d for d, _ in itertools.groupby(docs[:n])] == list(range(docs[n - 1] + 1))
        at = [[t for t in range(n) if docs[t] == d] for d in range(docs[n - 1] + 1)]
        rows.append([([tokens[t] for t in d], [targets[t] for t in d]) for d in at])
    return rows


def cut(document: list[int], mask: list[int], room: int, overlong: str) -> list[tuple[list[int], list[int]]]:
    """The pieces of one document as (inputs, targets): what the data set should make of it, one id at a time."""
    if len(document) > room + 1:
        if overlong == "drop":
            return []
        if overlong in ("right", "left"):
            kept = slice(room + 1) if overlong == "right" else slice(len(document) - room - 1, None)
            document, mask = document[kept], mask[kept]
    inputs = document[:-1]
    targets = [i if m else -100 for i, m in zip(document[1:], mask[1:])]
    pieces = [(inputs[i : i + room], targets[i : i + room]) for i in range(0, len(inputs), room)]
    return [(x, y) for x, y in pieces if any(t >= 0 for t in y)]


@pytest.mark.parametrize("overlong", ["split", "right", "left", "drop"])
@pytest.mark.parametrize("layout", ["packed", "documents"])
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_documents_are_cut_and_counted(kind: str, layout: str, overlong: str) -> None:
    """Each row's ids, targets and document numbers against a plain loop, and how many documents met which fate."""
    rng = random.Random(1)
    lengths = [rng.choice((1, 2, 3, 20, 31, 32, 33, 34, 35, 64, 65, 66, rng.randint(1, 150))) for _ in range(250)]
    documents = numbered(lengths)
    masks = random_masks(documents) if kind == "chats" else [[1] * n for n in lengths]
    prepared = handmade(kind, documents, masks if kind == "chats" else None)
    data = Documents(prepared, "train", node(kind, "unused", seq_len=32, layout=layout, overlong=overlong))
    expected = [piece for d, m in zip(documents, masks) for piece in cut(d, m, 32, overlong)]
    batches = list(data.whole(7))
    assert all(b["tokens"].shape == b["targets"].shape == b["doc_ids"].shape for b in batches)
    assert all(b["tokens"].shape[1] <= 32 and b["tokens"].dtype == torch.int64 for b in batches)
    rows = [row for b in batches for row in unpacked(b)]
    found = [piece for row in rows for piece in row]
    assert sorted(found) == sorted(expected)
    if layout == "documents":
        assert found == expected and len(data) == len(expected)
    else:
        assert len(rows) == best_fit([len(x) for x, _ in expected], 32) and {b["tokens"].shape[1] for b in batches} == {
            32
        }
    inputs = sum(len(x) for x, _ in expected)
    assert data.tokens_per_sample == pytest.approx(inputs / len(rows))
    assert data.efficiency == pytest.approx(inputs / len(rows) / 32)

    long = sum(n > 33 for n in lengths)
    name = {"split": ", split", "right": ", cut on the right", "left": ", cut on the left", "drop": ""}[overlong]
    pieces = sum(max(1, -(-(n - 1) // 32)) for n in lengths) if overlong == "split" else len(lengths)
    hopeless = pieces - len(expected) - (long if overlong == "drop" else 0)
    assert long and hopeless and data.dropped == {f"overlong{name}": long, "no target": hopeless}


@pytest.mark.parametrize("layout", ["packed", "documents"])
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_every_target_stands_once_and_follows_its_input(kind: str, layout: str) -> None:
    """With overlong=split: none lost at a cut, none twice, and none that is the beginning of another document."""
    rng = random.Random(2)
    documents = numbered([rng.randint(1, 200) for _ in range(200)])
    masks = random_masks(documents) if kind == "chats" else [[1] * len(d) for d in documents]
    prepared = handmade(kind, documents, masks if kind == "chats" else None)
    owner = {i: n for n, d in enumerate(documents) for i in d}
    wanted = [i for d, m in zip(documents, masks) for i, is_target in zip(d[1:], m[1:]) if is_target]
    for seq_len in (1, 17, 64):
        data = Documents(prepared, "val", node(kind, "unused", seq_len=seq_len, layout=layout, overlong="split"))
        seen = []
        for batch in data.whole(16):
            valid = batch["targets"] >= 0
            assert torch.equal(batch["targets"][valid], batch["tokens"][valid] + 1)
            seen += batch["targets"][valid].tolist()
            for row in unpacked(batch):
                assert all(len({owner[i] for i in inputs}) == 1 for inputs, _ in row)
                assert all(owner[t] == owner[inputs[0]] for inputs, targets in row for t in targets if t >= 0)
        assert sorted(seen) == wanted


@pytest.mark.parametrize("overlong", ["right", "left", "drop"])
def test_pairs_are_rows_chosen_then_rejected(overlong: str) -> None:
    """A pair goes when one of its answers does, and the order of rows is that of the strategies."""
    rng = random.Random(3)
    documents = numbered([rng.choice((1, 5, 16, 17, 18, 40)) for _ in range(200)])
    masks = random_masks(documents)
    data = Documents(
        handmade("pairs", documents, masks), "train", node("pairs", "unused", seq_len=16, overlong=overlong)
    )
    every = [cut(d, m, 16, overlong) for d, m in zip(documents, masks)]
    expected = [pair for pair in zip(every[::2], every[1::2]) if all(pair)]
    found = [row for batch in data.whole(3) for row in unpacked(batch)]
    assert len(data) == len(expected) and found == [answer for pair in expected for answer in pair]
    long = [len(d) > 17 for d in documents]
    either = sum(a or b for a, b in zip(long[::2], long[1::2]))
    hopeless = len(every) // 2 - len(expected) - (either if overlong == "drop" else 0)
    name = {"right": ", cut on the right", "left": ", cut on the left", "drop": ""}[overlong]
    assert data.dropped == {f"overlong{name}": either if overlong == "drop" else sum(long), "no target": hopeless}
    assert data.tokens_per_sample == pytest.approx(sum(len(x) for row in found for x, _ in row) / len(expected))
    some = data.__getitems__([5, 0])
    assert unpacked(some) == [*expected[5], *expected[0]]


@pytest.mark.parametrize("overlong", ["right", "left", "drop"])
def test_groups_stay_together(overlong: str) -> None:
    """A group of any size is a sample: its completions in rows behind each other, each with its reward; it goes when one of
    them does, and the numbers of groups begin at 0 in every batch."""
    rng = random.Random(6)
    sizes = [rng.randint(2, 6) for _ in range(80)]
    documents = numbered(
        [rng.choice((3, 5, 9, 16, 17, 18) if rng.random() < 0.9 else (40,)) for _ in range(sum(sizes))]
    )
    masks = [[0, 0, *([1] * (len(d) - 2))] for d in documents]
    for i in rng.sample(range(len(masks)), 8):
        masks[i] = [1] + [0] * (len(masks[i]) - 1)
    rewards = [[math.nan if rng.random() < 0.2 else rng.random() for _ in range(n)] for n in sizes]
    prepared = handmade("groups", documents, masks, rewards=rewards)
    data = Documents(prepared, "train", node("groups", "unused", seq_len=16, overlong=overlong))
    every = iter([cut(d, m, 16, overlong) for d, m in zip(documents, masks)])
    groups = [([next(every) for _ in range(n)], given) for n, given in zip(sizes, rewards)]
    expected = [([c[0] for c in several], given) for several, given in groups if all(several)]
    assert 20 < len(data) == len(expected) < 80

    def found(batch: Batch) -> list[tuple[list, list[float]]]:
        assert batch.keys() == {"tokens", "targets", "doc_ids", "group", "rewards"}
        assert batch["group"].dtype == torch.int64 and batch["rewards"].dtype == torch.float32
        assert not (batch["doc_ids"] > 0).any(), "one completion a row"
        numbers, rows = batch["group"].tolist(), [row[0] for row in unpacked(batch)]
        assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))
        at = [[r for r, n in enumerate(numbers) if n == g] for g in range(numbers[-1] + 1)]
        return [([rows[r] for r in g], [batch["rewards"][r].item() for r in g]) for g in at]

    same = lambda a, b: a[0] == b[0] and np.allclose(a[1], b[1], equal_nan=True)  # noqa: E731
    whole = [g for batch in data.whole(3) for g in found(batch)]
    assert all(map(same, whole, expected)) and len(whole) == len(expected)
    some = found(data.__getitems__([7, 0, 7]))
    assert len(some) == 3 and all(map(same, some, [expected[i] for i in (7, 0, 7)]))
    estimate = [g for batch in data.fixed(5, 2) for g in found(batch)]
    assert len(estimate) == 5 and same(estimate[0], expected[0]) and same(estimate[-1], expected[-1])
    assert data.tokens_per_sample == pytest.approx(sum(len(x) for rows, _ in whole for x, _ in rows) / len(whole))
    assert data.prompts(2) == [
        rows[0][0][: next(t for t, y in enumerate(rows[0][1]) if y >= 0) + 1] for rows, _ in expected[:2]
    ]

    lengths = iter([len(d) > 17 for d in documents])
    long = [[next(lengths) for _ in range(n)] for n in sizes]
    cuts = sum(map(any, long)) if overlong == "drop" else sum(map(sum, long))
    name = {"right": ", cut on the right", "left": ", cut on the left", "drop": ""}[overlong]
    hopeless = 80 - len(expected) - (cuts if overlong == "drop" else 0)
    assert data.dropped == {f"overlong{name}": cuts, "no target": hopeless} and hopeless


def test_a_prompt_that_fills_the_window_leaves_no_group() -> None:
    """Cut on the right nothing is left of any completion: the group goes, and is counted."""
    documents, masks = (
        numbered([20, 22, 9, 8]),
        [[0] * 17 + [1] * 3, [0] * 17 + [1] * 5, [0, 1] + [1] * 7, [0, 1] + [1] * 6],
    )
    prepared = handmade("groups", documents, masks, rewards=[[1.0, 0.0], [math.nan, 2.0]])
    batches = reader(
        node("groups", "unused", seq_len=16, overlong="right"), [prepared], batch_size=1, micro_batch_size=1
    )
    assert batches.train.dropped == {"overlong, cut on the right": 2, "no target": 1}
    assert batches.train.__getitems__([0])["rewards"].tolist() == pytest.approx([math.nan, 2.0], nan_ok=True)
    assert batches.accounts() == [
        "1 rows in 1 samples of 2 to 2 completions, 1 without signal (rewards all alike); 2 overlong, cut on the right; 1 no target"
    ]
    with pytest.raises(Refusal, match=r"no usable row is left in the train split of by hand \(2 overlong\)"):
        Documents(prepared, "train", node("groups", "unused", seq_len=6, overlong="drop"))
    with pytest.raises(Refusal, match="document 1 of the train split has 20 tokens and data.seq_len=16"):
        Documents(prepared, "train", node("groups", "unused", seq_len=16, overlong="error"))


@pytest.mark.parametrize("overlong", ["right", "left", "drop"])
def test_answers_keep_their_labels(overlong: str) -> None:
    """Also where others are dropped: those without a target, and overlong ones."""
    documents = numbered([5, 30, 4, 9, 12, 3])
    masks = [[0] + [1] * (len(d) - 1) for d in documents]
    masks[2] = [0] * 4
    labels = [1, 0, 1, 1, 0, 0]
    data = Documents(
        handmade("labelled", documents, masks, labels=labels), "train", node("labelled", "unused", seq_len=16, overlong=overlong)
    )  # fmt: skip
    kept = [i for i in range(6) if i != 2 and not (i == 1 and overlong == "drop")]
    assert len(data) == len(kept) and data.dropped["no target"] == 1
    batch = data.__getitems__(list(range(len(data))))
    assert batch["labels"].tolist() == [bool(labels[i]) for i in kept]
    assert [row[0].item() for row in batch["tokens"]][2:] == [documents[i][0] for i in kept][2:]
    good = sum(labels[i] for i in kept)
    assert data.spread() == f": {good} desirable, {len(kept) - good} undesirable"


def test_groups_that_do_not_fit_the_documents_are_refused() -> None:
    """A file that somebody made by hand: rewards for other documents than there are."""
    for rewards in ([[1.0, 0.0], [1.0, 0.0, 2.0]], [[1.0, 0.0]]):
        prepared = handmade("groups", numbered([5] * 4), [[1] * 5] * 4, rewards=rewards)
        with pytest.raises(Refusal, match="by hand: the groups of the train split are damaged: make them again"):
            Documents(prepared, "train", node("groups", "unused"))


def test_prompts_keep_their_fields() -> None:
    """Whole prompts without targets, beside each its row's other keys, also where some are left out."""
    rng = random.Random(4)
    documents = numbered([rng.choice((1, 7, 32, 33, 90)) for _ in range(60)])
    fields = [{"answer": i, "é": "日本" * (i % 5), "nested": [None, {"x": 0.5}]} for i in range(60)]
    prepared = handmade("prompts", documents, fields=fields)
    data = Documents(prepared, "train", node("prompts", "unused", seq_len=32))
    kept = [i for i, d in enumerate(documents) if len(d) <= 32]
    assert len(data) == len(kept) and data.dropped == {"overlong": 60 - len(kept)}
    assert data.tokens_per_sample == pytest.approx(sum(len(documents[i]) for i in kept) / len(kept))
    chosen = [3, 0, len(kept) - 1]
    for indices, batch in [(list(range(len(kept))), next(data.whole(100))), (chosen, data.__getitems__(chosen))]:
        assert batch.keys() == {"tokens", "doc_ids", "fields"}
        assert batch["fields"] == [fields[kept[i]] for i in indices]
        for i, tokens, docs in zip(indices, batch["tokens"].tolist(), batch["doc_ids"].tolist()):
            n = len(documents[kept[i]])
            assert tokens[:n] == documents[kept[i]] and docs == [0] * n + [-1] * (len(docs) - n)
    assert data.prompts(2) == [documents[i] for i in kept[:2]]
    for overlong, wanted in (("right", slice(32)), ("left", slice(-32, None))):
        data = Documents(prepared, "train", node("prompts", "unused", seq_len=32, overlong=overlong))
        for i, (tokens, docs) in enumerate(zip(*(next(data.whole(60))[k].tolist() for k in ("tokens", "doc_ids")))):
            assert [t for t, d in zip(tokens, docs) if d >= 0] == documents[i][wanted]


def test_rows_are_no_longer_than_seq_len() -> None:
    """Learned positions go no further, and memory was planned for so many. Packed rows all have one width: one shape."""
    short = Documents(handmade("text", numbered([9])), "train", node("text", "unused", seq_len=100, layout="packed"))
    assert short.__getitems__([0])["tokens"].shape == (1, 100)
    documents = numbered([41, 2, 12])
    for kind, lengths in (("text", [40, 1, 11]), ("prompts", [38, 2, 12])):
        given = [d[:38] for d in documents] if kind == "prompts" else documents
        prepared = handmade(kind, given, fields=[{}] * 3 if kind == "prompts" else None)
        data = Documents(prepared, "train", node(kind, "unused", seq_len=40, layout="documents"))
        batch = next(data.whole(3))
        assert (batch["doc_ids"] >= 0).sum(1).tolist() == lengths
        assert batch["tokens"].shape[1] <= 40, kind


def test_estimates_take_samples_spread_evenly() -> None:
    """Of rows as of windows: the same at every call, from the first to the last, none twice."""
    documents = numbered([9] * 50)
    data = Documents(handmade("text", documents), "val", node("text", "unused", seq_len=8, layout="documents"))
    first = [b["tokens"].tolist() for b in data.fixed(7, 3)]
    assert first == [b["tokens"].tolist() for b in data.fixed(7, 3)] and [len(b) for b in first] == [3, 3, 1]
    beginnings = [row[0] for b in first for row in b]
    assert beginnings[0] == 1 and beginnings[-1] == documents[-1][0]
    assert all(40 < b - a < 100 for a, b in itertools.pairwise(beginnings))
    assert [row[0] for b in data.fixed(10**6, 64) for row in b["tokens"].tolist()] == [d[0] for d in documents]


def test_prompts_of_chats_end_where_the_answer_begins() -> None:
    documents = numbered([8, 8, 8])
    masks = [[0, 0, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    data = Documents(handmade("chats", documents, masks), "train", node("chats", "unused"))
    assert data.prompts(2) == [[1, 2, 3], [9]] and len(data.prompts(9)) == 3
    pairs = Documents(handmade("pairs", documents[:2], masks[:2]), "train", node("pairs", "unused"))
    assert pairs.prompts(2) == [[1, 2, 3]], "the chosen answer's"
    texts = Documents(handmade("text", documents), "train", node("text", "unused", layout="packed"))
    assert texts.prompts(2) == []


def test_unusable_rows_are_refused() -> None:
    """What cannot be cut as the config says, in a line with what to set."""
    long, short = numbered([5, 30, 5, 5]), numbered([5, 5])
    ones = [[1] * len(d) for d in long]
    with pytest.raises(
        Refusal, match="document 2 of the val split has 30 tokens and data.seq_len=8: raise it, or set data.overlong"
    ):
        Documents(handmade("text", long), "val", node("text", "unused", seq_len=8, layout="packed", overlong="error"))
    Documents(handmade("text", short), "val", node("text", "unused", seq_len=4, layout="packed", overlong="error"))
    with pytest.raises(Refusal, match="document 1 of the train split has 30 tokens"):  # the pair's number
        data = node("pairs", "unused", seq_len=8, overlong="error")
        Documents(handmade("pairs", long, ones), "train", data)
    for kind in ("pairs", "prompts", "groups"):
        prepared = handmade(kind, long, ones, [{}] * 4 if kind == "prompts" else None, [[1.0, 0.0]] * 2)
        with pytest.raises(Refusal, match=f"{kind} cannot be split: set data.overlong to right, left or drop"):
            Documents(prepared, "train", node(kind, "unused", seq_len=8, overlong="split"))
        for layout, message in (
            ("packed", "row by row: set data.layout=documents"),
            ("windows", "is for text and these are"),
        ):
            with pytest.raises(Refusal, match=message):
                reader(node(kind, "unused", layout=layout), [prepared])
    masks = [[0] * 5, [1] + [0] * 4]
    with pytest.raises(
        Refusal, match=r"no usable row is left in the train split of by hand \(2 no target\); raise data.seq_len"
    ):
        Documents(handmade("chats", short, masks), "train", node("chats", "unused"))
    with pytest.raises(Refusal, match=r"no usable row.* \(1 overlong, 1 no target\)"):
        Documents(
            handmade("text", numbered([9, 1])),
            "train",
            node("text", "unused", seq_len=4, layout="packed", overlong="drop"),
        )
    for name, value, shown in (("stride", 4, "4"), ("isolate_documents", True, "true")):
        with pytest.raises(Refusal, match=f"data.{name}={shown} is for data.layout=windows"):
            node("chats", "unused", **{name: value})


def test_ids_outside_the_vocabulary_are_refused() -> None:
    """Named with source and row before the model sees them, also where one is only ever a target."""
    for document in ([1, 2, 10**6, 4], [1, 2, 3, 10**6]):
        prepared = handmade("text", [[1, 2, 3, 4], document])
        for data in (node("text", "unused", seq_len=7), node("text", "unused", seq_len=7, layout="packed")):
            with pytest.raises(Refusal, match="by hand, row .* of train .*token id 1000000 is outside the vocabulary"):
                next(reader(data, [prepared]).steps(0, 1))


def test_what_a_worker_refuses_is_one_line() -> None:
    """As it would be without workers: not the traceback of another process."""
    prepared = handmade("text", [[1, 2, 3, 4], [1, 10**6, 2, 4]])
    said = []
    for workers in (0, 1):
        with pytest.raises(Refusal) as refused:
            next(reader(node("text", "unused", seq_len=6, workers=workers), [prepared]).steps(0, 1))
        said.append(str(refused.value))
    assert said[1] == said[0] and "\n" not in said[0]


def test_accounts_say_what_became_of_the_rows() -> None:
    documents = numbered([5, 30, 9, 1])
    prepared = handmade("text", documents)
    prepared.meta["dropped"] = {"the line is empty": 3}
    batches = reader(node("text", "unused", seq_len=8, layout="packed", overlong="right"), [prepared])
    assert batches.accounts() == [
        "3 rows in 3 samples, 83.3% full; 3 left out: the line is empty; 1 overlong, cut on the right; 1 no target"
    ]
    batches = reader(node("text", "unused", seq_len=8), [prepared])
    assert batches.accounts() == ["37 samples; 3 left out: the line is empty"]


# ---------------------------------------------------------------- packed training is training on each document alone


def trained(model: nn.Module, batches: Iterator[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The summed loss over all targets, and its gradients."""
    strategy, total = Seq(label_smoothing=0.0, z_loss=0.0), 0.0
    model.zero_grad()
    for batch in batches:
        loss, _ = strategy.loss(model, None, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(data: Documents) -> Iterator[Batch]:
    """Each document without padding and without a word about documents."""
    for batch in data.whole(1):
        n = int((batch["doc_ids"] >= 0).sum())
        yield {"tokens": batch["tokens"][:, :n], "targets": batch["targets"][:, :n]}


@pytest.mark.parametrize(
    "model,kind",
    [
        (("dense",), "chats"),
        (("dense",), "text"),
        (("gpt",), "chats"),
        (("moe", "model.ffn.aux_loss=0.1", "model.ffn.z_loss=0.01"), "chats"),
        (("dense", "model/attn=mla"), "chats"),
        (("dense", "model/attn=local", "model.attn.window=[7,20]"), "chats"),
    ],
    ids=lambda value: "-".join(v.split("=")[-1] for v in value) if isinstance(value, tuple) else value,
)
def test_packed_documents_train_as_each_alone(model: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    """Loss and every parameter's gradient to 1e-5 of its largest value: packed, padded one a row, and alone. Some
    documents are longer than two of the blocks in which windows are computed."""
    rng = random.Random(5)
    rows = [conversation(rng, longest) for longest in [10] * 20 + [70] * 6 + [220] * 2]
    if kind == "text":
        rows = [{"text": "".join(m["content"] for m in row["messages"])} for row in rows]
    path = lines(tmp_path / "rows.jsonl", rows)
    (prepared,) = prepare(node(kind, path), BYTE, str(tmp_path / "cache"))
    packed, apart = (
        Documents(prepared, "train", node(kind, path, seq_len=700, layout=layout, overlong="error"))
        for layout in ("packed", "documents")
    )
    assert len(packed) < len(apart) / 3 and (apart.end - apart.begin).max() > 2 * 128
    m = made(*model, vocab_size=prepared.meta["vocab_size"], max_len=700)
    loss, gradients = trained(m, alone(apart))
    for data in (packed, apart):
        found, mine = trained(m, data.whole(2))
        assert found == pytest.approx(loss, rel=1e-5) and mine.keys() == gradients.keys()
        for name, expected in gradients.items():
            # What is added to every key changes no attention: a key bias has gradients of rounding alone.
            scale = gradients[name.replace("attn.k.bias", "attn.q.bias")].abs().max()
            error = (mine[name] - expected).abs().max() / scale
            assert error < 1e-5, f"{name}: {error:.1e}"


# ---------------------------------------------------------------- the same batches however they are read


def mixture(sources: dict[str, Any], weights: dict[str, float] | None = None, **settings: Any) -> Mixture:
    one = next(iter(sources.values()))
    given = dict(temperature=1.0, seq_len=one.seq_len, workers=one.workers, prefetch=one.prefetch)
    return Mixture(sources=sources, weights=weights, **(given | settings))


def windows(folder: Path, **settings: Any) -> Text:
    return node("text", folder / "text.txt", separator="\n\n", isolate_documents=True, split="position", **settings)


def packed(folder: Path, **settings: Any) -> Chats:
    return node("chats", folder / "chats.jsonl", **settings)


def preferences(folder: Path, **settings: Any) -> Pairs:
    return node("pairs", folder / "pairs.jsonl", **settings)


def judged(folder: Path, **settings: Any) -> Groups:
    return node("groups", folder / "groups.jsonl", **settings)


def mixed(folder: Path, **settings: Any) -> Mixture:
    """Windows without documents, packed ones, and padded ones, whose rows have several widths."""
    sources = {
        "text": node("text", folder / "text.txt", split="position", **settings),
        "chats": packed(folder, **settings),
        "texts": node("text", folder / "texts.jsonl", layout="documents", order="shuffle", **settings),
    }
    return mixture(sources, {"text": 2.0, "chats": math.pi, "texts": 1.5})


def rows_of(batch: Batch) -> list[int]:
    """Of each row what counts: ids, targets and document numbers where there is no padding."""
    docs = batch.get("doc_ids", torch.zeros_like(batch["tokens"]))
    columns = [batch["tokens"], batch["targets"], docs]
    if "rewards" in batch:  # and the size of the group
        size = torch.bincount(batch["group"])[batch["group"]]
        columns.append(
            torch.stack([batch["rewards"].view(torch.int32), size], 1).repeat_interleave(len(docs[0]), 1)[
                :, : len(docs[0])
            ]
        )
    assert bool((batch["targets"][docs < 0] == IGNORED).all())
    return [zlib.crc32(torch.stack(row)[:, row[2] >= 0].numpy().tobytes()) for row in zip(*columns)]


WORLD = types.SimpleNamespace(sum=lambda values: values)
STEPS = 100  # more than an epoch of each


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("make", [windows, packed, preferences, judged, mixed])
def test_batches_are_the_same_however_they_are_read(make: Callable[..., Any], folder: Path) -> None:
    """Ranks, micro-batches and loader workers cut up one sequence of samples; a resume goes on in it and an evaluation
    leaves it alone."""
    data = make(folder)
    prepared = ready(folder, data)
    plain = reader(data, prepared)
    reference, numbers = [], []
    for step in plain.steps(0, STEPS):
        reference.append([h for batch in step for h in rows_of(batch)])
        numbers.append(sum(batch_hash([batch], WORLD) for batch in step))
    assert len(reference) == STEPS and len({tuple(rows) for rows in reference}) == STEPS

    for world_size, micro, workers in ((1, 2, 1), (2, 4, 0), (4, 1, 0), (4, 2, 3)):
        one = make(folder, workers=workers)
        cut = {"micro_batch_size": micro, "world_size": world_size}
        ranks = [reader(one, prepared, rank=r, **cut) for r in range(world_size)]
        assert {r.micro_batches for r in ranks} == {8 // world_size // micro}
        steps = 0
        for step, parts in enumerate(zip(*(r.steps(0, STEPS) for r in ranks), strict=True)):
            assert [h for part in parts for batch in part for h in rows_of(batch)] == reference[step], (cut, step)
            assert sum(batch_hash(part, WORLD) for part in parts) == numbers[step]
            steps += 1
        assert steps == STEPS

    for start in (1, 37, 60, STEPS - 1):
        fresh = reader(make(folder, workers=start % 2), prepared, micro_batch_size=4)
        state = json.loads(json.dumps(plain.sampler.state_dict() | {"step": start}))
        fresh.sampler.load_state_dict(state)
        again = fresh.steps(fresh.sampler.step, min(start + 40, STEPS))
        assert [[h for b in step for h in rows_of(b)] for step in again] == reference[start : start + 40]

    evaluated = []
    for step, batches in enumerate(plain.steps(0, 60)):
        assert [h for b in batches for h in rows_of(b)] == reference[step]
        if step % 20 == 3:
            evaluated.append([rows_of(b) for b in [*plain.fixed("val", 2, 4), *plain.whole("val", 5)]])
    assert evaluated[0] == evaluated[1] == evaluated[2]


# ---------------------------------------------------------------- mixtures

WEIGHTS: dict[str, list[float]] = {
    "70:30": [0.7, 0.3],
    "thirds": [1 / 3, 1 / 3, 1 / 3],
    "four": [0.5, 0.3, 0.15, 0.05],
    "tiny": [0.999, 0.001],
    "one": [3.0],
    "tokens": [1_000_003, 77_777, 12_345],
    "irrational": [math.sqrt(2), math.pi, math.e, 0.01 * math.sqrt(3)],
    "temperature": [w ** (1 / 3) for w in (1_000_000, 20_000, 300)],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_proportions_hold_for_every_prefix(name: str) -> None:
    """Of the first N samples each source has less than one more or fewer than its share, for every N of two periods."""
    weights = WEIGHTS[name]
    order = Mixed([Order(1000 + i, seed=i, kind="shuffle") for i in range(len(weights))], weights)
    period = len(order.table)
    assert sum(order.counts) == period <= Mixed.PERIOD and min(order.counts) >= 1
    total = sum(fractions.Fraction(str(w)) for w in weights)
    shares = [fractions.Fraction(str(w)) / total for w in weights]
    if name in ("70:30", "thirds", "four", "tiny", "one"):
        assert [fractions.Fraction(c, period) for c in order.counts] == shares and period == math.lcm(
            *(s.denominator for s in shares)
        )
    else:
        assert period == Mixed.PERIOD and all(abs(c - s * period) < 1 for c, s in zip(order.counts, shares))
    source = np.searchsorted(order.starts, order.sample(np.arange(2 * period)), side="right") - 1
    first = np.arange(1, 2 * period + 1)
    for i, count in enumerate(order.counts):
        found = np.cumsum(source == i)
        assert np.abs(found * period - first * count).max() < period
        assert found[-1] == 2 * count


def test_rare_sources_keep_a_place() -> None:
    """A weight below one sample of a period is no weight of zero."""
    for weights in ([1.0, 1e-9], [1.0] + [1e-12] * 50, [1e300, 1e-300, 1.0]):
        counts = proportions(weights, 1000)
        assert min(counts) == 1 and sum(counts) <= 1000 + len(weights) and counts[0] > 900
        assert len(set(Mixed([Order(5, seed=0, kind="random")] * len(weights), weights).table.tolist())) == len(weights)


def test_mixed_order_is_a_function_of_the_number() -> None:
    """Random access is sequential access, and each source goes through its own epochs."""
    sizes, kinds = [37, 100, 11, 5], ["shuffle", "sequential", "shuffle", "random"]
    orders = [Order(n, seed=7 + i, kind=k) for i, (n, k) in enumerate(zip(sizes, kinds))]
    order = Mixed(orders, [0.5, 0.3, 0.15, 0.05])
    numbers = np.arange(1000)
    stream = order.sample(numbers)
    assert order.n == sum(sizes) and stream.min() >= 0 and stream.max() < order.n
    assert np.array_equal(np.concatenate([order.sample(numbers[i : i + 8]) for i in range(0, 1000, 8)]), stream)
    at = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(order.sample(at), stream[at])
    assert np.array_equal(order.sample(numbers + 10**12)[:500], order.sample(numbers[:500] + 10**12))
    for i, (n, kind) in enumerate(zip(sizes, kinds)):
        own = stream[(stream >= order.starts[i]) & (stream < order.starts[i + 1])] - order.starts[i]
        assert np.array_equal(own, orders[i].sample(np.arange(len(own))))
        if kind != "random":
            epochs = [own[e : e + n].tolist() for e in range(0, len(own) - n + 1, n)]
            assert len(epochs) > 2 and all(sorted(e) == list(range(n)) for e in epochs)
            assert len({tuple(e) for e in epochs}) == (len(epochs) if kind == "shuffle" else 1)


def test_an_epoch_sees_every_source_once(folder: Path) -> None:
    """As many samples as the source that lasts longest needs; the others have begun anew by then."""
    data = mixed(folder)
    for part in data.sources.values():
        part.order = "shuffle"
    batches = reader(data, ready(folder, data))
    train = batches.train
    assert isinstance(train, Chain)
    indices = batches.order.sample(np.arange(batches.epoch_samples))
    seen = np.bincount(np.searchsorted(train.starts, indices, side="right") - 1)
    rounds = [n / len(s) for n, s in zip(seen, train.sets)]
    assert min(rounds) == pytest.approx(1, abs=1 / min(map(len, train.sets)))
    assert max(rounds) > 1.2
    longest = int(np.argmin(rounds))
    own = indices[(indices >= train.starts[longest]) & (indices < train.starts[longest + 1])]
    assert len(set(own.tolist())) >= len(train.sets[longest]) - 1


def test_an_epoch_of_random_windows_has_as_many_tokens_as_the_text(folder: Path) -> None:
    """max_epochs=1 of a mixture of one source is max_epochs=1 of that source."""
    part = node("text", folder / "text.txt", split="position")
    prepared = ready(folder, part)
    single, whole = reader(part, prepared), reader(mixture({"text": part}, {"text": 1.0}), prepared)
    assert single.epoch_samples == prepared[0].meta["train_tokens"] // 48
    assert whole.epoch_samples == single.epoch_samples


def test_shares_are_weights_to_the_power_of_one_over_temperature(folder: Path) -> None:
    """Null weights are the sources' training tokens."""
    data = mixed(folder)
    prepared = ready(folder, data)
    tokens = [p.meta["train_tokens"] for p in prepared]
    assert len(set(tokens)) == 3
    for weights, plain in ((data.weights, [2.0, math.pi, 1.5]), (None, tokens)):
        for temperature in (1.0, 2.0, 5.0, 0.5):
            found = mixture(data.sources, weights, temperature=temperature).shares(prepared)
            expected = [w ** (1 / temperature) for w in plain]
            assert [f / sum(found) for f in found] == pytest.approx([e / sum(expected) for e in expected])
    even = reader(mixture(data.sources, temperature=1e9), prepared).order
    assert isinstance(even, Mixed) and max(even.counts) / min(even.counts) < 1.001


def test_low_temperatures_leave_one_source(folder: Path) -> None:
    data = mixed(folder)
    order = reader(mixture(data.sources, temperature=0.01), ready(folder, data)).order
    assert isinstance(order, Mixed) and max(order.counts) / sum(order.counts) > 0.99


def test_samples_of_several_sources_in_one_batch(folder: Path) -> None:
    """Each as it comes from its own source alone, in the order asked for, padded to the widest."""
    data = mixed(folder, seq_len=100)
    train = reader(data, ready(folder, data)).train
    assert isinstance(train, Chain)
    rng = random.Random(0)
    for _ in range(30):
        indices = [rng.randrange(len(train)) for _ in range(6)]
        batch = train.__getitems__(indices)
        widths, several = [], 0
        for row, index in enumerate(indices):
            source = int(np.searchsorted(train.starts, index, side="right")) - 1
            single = train.sets[source].__getitems__([index - int(train.starts[source])])
            width = single["tokens"].shape[1]
            widths.append(width)
            several |= 1 << source
            for name in ("tokens", "targets"):
                assert batch[name][row, :width].tolist() == single[name][0].tolist()
            if "doc_ids" in batch:
                alone = single.get("doc_ids", torch.zeros(1, width))[0].tolist()
                assert batch["doc_ids"][row].tolist() == alone + [-1] * (batch["doc_ids"].shape[1] - width)
            assert set(batch["targets"][row, width:].tolist()) <= {-100}
        assert batch["tokens"].shape[1] == max(widths)
        assert ("doc_ids" in batch) == (several != 1)
    assert "doc_ids" not in train.__getitems__([0, 1])


@pytest.mark.parametrize("kind", ["pairs", "labelled", "prompts", "groups"])
def test_mixed_rows_stay_together(kind: str, folder: Path) -> None:
    """A pair's two rows, a group's completions and rewards, and a prompt's fields, where a batch has samples of several
    sources."""
    parts = {name: node(kind, folder / f"{kind}.jsonl", val_fraction=f) for name, f in (("a", 0.2), ("b", 0.5))}
    train = reader(
        mixture(parts, {"a": 1.0, "b": 1.0}),
        cached([p.source(folder) for p in parts.values()], tok.byte, "byte", folder / "cache"),
    ).train
    assert isinstance(train, Chain)
    n = len(train.sets[0])
    indices = [n + 3, 0, n, 5, 1]
    batch = train.__getitems__(indices)
    singles = [train.sets[i >= n].__getitems__([i - n if i >= n else i]) for i in indices]
    if kind == "prompts":
        assert batch["fields"] == [s["fields"][0] for s in singles] and all(f["more"] for f in batch["fields"])
    sizes = [len(single["tokens"]) for single in singles]
    assert len(batch["tokens"]) == sum(sizes) and (kind == "groups" or set(sizes) == {2 if kind == "pairs" else 1})
    at = 0
    for i, single in enumerate(singles):
        for r in range(sizes[i]):
            valid = single["doc_ids"][r] >= 0
            if kind == "labelled":
                assert batch["labels"][at] == single["labels"][r]
            for name in batch.keys() - {"fields", "group", "rewards", "labels"}:
                row = batch[name][at]
                assert row[: len(valid)][valid].tolist() == single[name][r][valid].tolist()
            assert int((batch["doc_ids"][at] >= 0).sum()) == int(valid.sum())
            if kind == "groups":
                assert batch["group"][at] == i and batch["rewards"][at : at + 1].tolist() == pytest.approx(
                    single["rewards"][r : r + 1].tolist(), nan_ok=True
                )
            at += 1


def test_mixtures_that_make_no_sense_are_refused(folder: Path) -> None:
    """Before anything is read, in a line with what to set."""

    def part(kind: str = "text", **settings: Any) -> Data:
        return node(kind, folder / f"{kind}.jsonl", **settings)

    a, b = part(), part("chats")
    cases: list[tuple[dict[str, Any], dict[str, float] | None, dict[str, Any], str]] = [
        ({}, None, {}, "data.sources is empty"),
        ({"a": a, "b": b}, {"a": 1.0}, {}, "data.weights and data.sources differ in b: give every source a weight"),
        ({"a": a}, {"a": 1.0, "books": 1.0}, {}, "data.weights and data.sources differ in books"),
        ({"a": a, "b": b}, {"a": 1.0, "b": 0.0}, {}, r"data.weights.b=0.0 should be a number above 0; .*~data.sources.b"),
        ({"a": a, "b": b}, {"a": -1.0, "b": 1.0}, {}, "data.weights.a=-1.0 should be a number above 0"),
        ({"a": a, "p": part("pairs")}, None, {}, "holds pairs and text, which one strategy cannot train on together"),
        ({"b": b, "p": part("prompts")}, None, {}, "holds prompts and text"),
        ({"g": part("groups"), "p": part("prompts")}, None, {}, "holds groups and prompts, which one strategy cannot"),
        ({"a": a, "b": part(seq_len=32)}, None, {}, "data.sources.b.seq_len=32 and data.seq_len=48 should be the same"),
        ({"a": a, "b": part(workers=1)}, None, {}, "data.sources.b.workers=1 and data.workers=0"),
        ({"a": a, "b": part(order="shuffle", drop_last=True)}, None, {}, "data.sources.b.drop_last=true has no meaning"),
        ({"a": a}, None, {"temperature": 0.0}, "data.temperature=0.0 should be a number above 0"),
        ({"a": a}, None, {"temperature": -1.0}, "data.temperature=-1.0 should be a number above 0"),
        ({"a": a, "h": H5(path="x", layout=None, overlong=None, order=None, **LOADING)}, None, {}, "data.sources.h is of a kind that cannot be mixed"),
    ]  # fmt: skip
    for sources, weights, settings, message in cases:
        with pytest.raises(Refusal, match=message):
            Mixture(
                **(
                    dict(sources=sources, weights=weights, temperature=1.0, seq_len=48, workers=0, prefetch=2)
                    | settings
                )
            )
    assert mixture({"a": a, "b": b}).kind == "text" and mixture({"b": b}).kind == "chats"


@pytest.mark.parametrize("weight,temperature", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_weights_that_are_no_numbers_are_refused(weight: float, temperature: float, folder: Path) -> None:
    """nan is not at most 0 either."""
    parts = {"a": node("text", folder / "text.txt"), "b": node("chats", folder / "chats.jsonl")}
    with pytest.raises(Refusal, match="data.weights.a=|data.temperature="):
        mixture(parts, {"a": weight, "b": 1.0}, temperature=temperature)


def test_many_sources_are_not_shuffled_anew_each_batch() -> None:
    """A permutation of a million samples takes longer than a small model's step."""
    orders = [Order(1000, seed=i, kind="shuffle") for i in range(12)]
    order = Mixed(orders, [1.0] * 12)
    for step in range(50):
        order.sample(np.arange(24 * step, 24 * step + 24))
    assert [o._permutation.cache_info().misses for o in orders] == [1] * 12


# ---------------------------------------------------------------- ids that lie ready


def bin_node(path: Path, **settings: Any) -> Bin:
    given = LOADING | dict(layout="windows", overlong="split", order="random", dtype="uint16")
    return Bin(path=str(path), **(given | settings))


def ids_of(vocab_size: int) -> Maker:
    return Maker(f"ids{vocab_size}", functools.partial(tok.ids, vocab_size=vocab_size))


@pytest.mark.parametrize("dtype,largest", [("uint16", 50_256), ("uint32", 150_000)])
def test_nanogpts_files_are_read_as_they_are(dtype: str, largest: int, tmp_path: Path) -> None:
    """Windows are slices of the file, wherever they begin."""
    rng = np.random.default_rng(0)
    ids = {split: rng.integers(0, largest + 1, n).astype(dtype) for split, n in (("train", 5000), ("val", 700))}
    ids["train"][17] = largest
    for split, array in ids.items():
        array.tofile(tmp_path / f"{split}.bin")
    data = bin_node(tmp_path, dtype=dtype)
    prepared = prepare(data, ids_of(largest + 1), str(tmp_path / "cache"))
    meta = prepared[0].meta
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (5000, 700, largest + 1)
    assert math.isfinite(meta["bigram_loss"]) and prepared[0].tokenizer.decode([5, 17]).split() == ["5", "17"]
    batches = reader(data, prepared)
    train = batches.train
    assert isinstance(train, Windows) and len(train) == 5000 - 48
    for step, (batch,) in enumerate(batches.steps(0, 20)):
        for row, start in enumerate(batches.sampler.micro_batches(step)[0].tolist()):
            assert np.array_equal(batch["tokens"][row].numpy(), ids["train"][start : start + 48])
            assert np.array_equal(batch["targets"][row].numpy(), ids["train"][start + 1 : start + 49])
    whole = [b["targets"][b["targets"] >= 0] for b in batches.whole("val", 4)]
    assert torch.cat(whole).tolist() == ids["val"][1:].tolist()
    again = prepare(data, ids_of(largest + 1), str(tmp_path / "cache"))
    assert again[0].meta == meta
    ids["val"][3] ^= 1
    ids["val"].tofile(tmp_path / "val.bin")
    assert prepare(data, ids_of(largest + 1), str(tmp_path / "cache"))[0].meta["sha256"] != meta["sha256"]


def test_unusable_bin_files_are_refused(tmp_path: Path) -> None:
    """In a line with the file and what to set."""
    cache = str(tmp_path / "cache")
    good = np.arange(1000, dtype=np.uint16)
    maker = ids_of(1000)

    def given(name: str, train: bytes | None, val: bytes | None) -> Path:
        (tmp_path / name).mkdir()
        for split, content in (("train", train), ("val", val)):
            if content is not None:
                (tmp_path / name / f"{split}.bin").write_bytes(content)
        return tmp_path / name

    fine = given("fine", good.tobytes(), good.tobytes())
    prepare(bin_node(fine), maker, cache)
    cases = [
        (bin_node(given("no_val", good.tobytes(), None)), maker, "there is no .*no_val/val.bin; data.path should be a folder"),
        (bin_node(tmp_path / "nowhere"), maker, "there is no .*nowhere/train.bin"),
        (bin_node(fine / "train.bin"), maker, "there is no .*train.bin/train.bin"),
        (bin_node(given("empty", b"", good.tobytes())), maker, "empty/train.bin has 0 bytes"),
        (bin_node(given("odd", good.tobytes() + b"x", good.tobytes())), maker, "odd/train.bin has 2001 bytes, which is no whole number of uint16"),
        (bin_node(given("two", good.tobytes(), good.tobytes()[:-2]), dtype="uint32"), maker, "two/val.bin has 1998 bytes.*uint32"),
        (bin_node(fine, dtype="int8"), maker, "uint16 or uint32, not int8"),
        (bin_node(fine), ids_of(999), "has token id 999 and the tokenizer 999 ids"),
        (bin_node(fine), Maker(None, tok.stored), "bring no tokenizer: choose tokenizer=ids, or tokenizer=file"),
        (bin_node(fine, layout="packed"), maker, "have no documents: data.layout=packed should be windows"),
    ]  # fmt: skip
    for data, made_by, message in cases:
        with pytest.raises(Refusal, match=message):
            prepare(data, made_by, cache)
    with pytest.raises(Refusal, match="the train split has 10 tokens and a sample needs 49"):
        data = bin_node(given("short", good[:10].tobytes(), good.tobytes()))
        reader(data, prepare(data, maker, cache))
    with pytest.raises(Refusal, match="isolate_documents=true needs a tokenizer with an end token"):
        data = bin_node(fine, isolate_documents=True)
        reader(data, prepare(data, maker, cache))


def test_ids_of_another_width_are_refused_before_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's ids read as uint32 go up to 3.3 billion: counting those would take tens of GB."""
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")

    def counting(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
        assert vocab_size <= 100
        return {}

    monkeypatch.setattr(stored_module, "baseline", counting)
    with pytest.raises(Refusal, match=r"has token id \d{7} and the tokenizer 100 ids: .*is data.dtype=uint32 wrong"):
        prepare(bin_node(tmp_path, dtype="uint32"), ids_of(100), str(tmp_path / "cache"))


def prepared_file(data: Any, target: Path) -> Path:
    """What prepare.py makes of a node's files."""
    with Workers(1) as workers:
        preparation = Preparation(data.source(target.parent), target, workers, "byte")
        preparation.scan()
        preparation.encode(tok.byte([], []))
    return target


def stored(path: Path, **settings: Any) -> H5:
    return H5(path=str(path), **(LOADING | dict(layout=None, overlong=None, order=None) | settings))


def alike(a: Any, b: Any) -> bool:
    return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("kind", ["text", "chats", "pairs", "labelled", "prompts", "groups"])
def test_prepared_file_gives_the_batches_of_the_rows(kind: str, folder: Path, tmp_path: Path) -> None:
    """data=h5 of a file made by prepare.py is training on what it was made of, down to the order."""
    direct = windows(folder) if kind == "text" else node(kind, folder / f"{kind}.jsonl")
    file = prepared_file(direct, tmp_path / "corpus.h5")
    data = stored(file, isolate_documents=kind == "text")
    none = Maker(None, tok.stored)
    (found,), (expected,) = prepare(data, none, str(tmp_path / "cache")), ready(folder, direct)
    assert data.kind == kind and (data.layout, data.overlong, data.order) == (
        direct.layout,
        direct.overlong,
        direct.order,
    )
    assert found.tokenizer.to_json() == expected.tokenizer.to_json() and data.step_between == direct.step_between
    for split in ("train", "val"):
        assert np.array_equal(found.ids(split)[:], expected.ids(split)[:])
    one, two = reader(data, [found]), reader(direct, [expected])
    for a, b in zip(one.steps(0, 30), two.steps(0, 30), strict=True):
        assert a[0].keys() == b[0].keys()
        assert all(alike(a[0][k], b[0][k]) for k in a[0])
    for a, b in zip(one.whole("val", 4), two.whole("val", 4), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])
    with pytest.raises(Refusal, match="was encoded by the tokenizer that lies in it"):
        prepare(stored(file), BYTE, str(tmp_path / "cache"))


def test_settings_of_windows_are_refused_where_the_file_has_rows(folder: Path, tmp_path: Path) -> None:
    """The layout is known only when the file is open: what would be ignored is refused then."""
    file = prepared_file(packed(folder), tmp_path / "chats.h5")
    for setting in ({"stride": 5}, {"isolate_documents": True}):
        with pytest.raises(Refusal, match=f"data.{next(iter(setting))}=.* is for data.layout=windows"):
            data = stored(file, **setting)
            reader(data, prepare(data, Maker(None, tok.stored), str(tmp_path / "cache")))


def compressed(file: Path, target: Path) -> Path:
    """The same file with its arrays in compressed chunks, which h5py reads and no memory map can."""
    with h5py.File(file) as old, h5py.File(target, "w", libver="latest") as new:

        def copy(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[:], chunks=(min(64, len(item)),), compression="gzip")

        old.visititems(copy)
        for name in old.attrs:
            value = old.attrs[name]
            new.attrs.create(name, np.bytes_(value) if isinstance(value, bytes) else value)
    return target


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("way", ["mapped", "chunked"])
def test_workers_read_a_file_that_the_parent_has_open(way: str, folder: Path, tmp_path: Path) -> None:
    """A fork shares h5py's file handle and may share its place in the file: each process opens its own. Parent and workers
    read at once."""
    file = prepared_file(packed(folder), tmp_path / "chats.h5")
    if way == "chunked":
        file = compressed(file, tmp_path / "compressed.h5")
    prepared = open_prepared(file)
    assert isinstance(prepared.store["train/tokens"][0], np.ndarray) == (way == "mapped")
    data = stored(file, layout="packed", overlong="right", order="shuffle", workers=3)
    batches = reader(data, [prepared], micro_batch_size=2)
    expected = [
        rows_of(batches.train.__getitems__(m.tolist())) for s in range(60) for m in batches.sampler.micro_batches(s)
    ]
    whole = prepared.ids("train")[:].tolist()
    found = []
    for step, several in enumerate(batches.steps(0, 60)):
        found += [rows_of(b) for b in several]
        begin = step * 97 % (len(whole) - 500)
        assert prepared.ids("train").read(begin, begin + 500).tolist() == whole[begin : begin + 500]
    assert found == expected
    assert len(whole) > 4000 and len(collections.Counter(whole)) > 30

    fork, here = multiprocessing.get_context("fork"), prepared.store.segments()
    answers = fork.SimpleQueue()
    child = fork.Process(
        target=lambda: answers.put((prepared.ids("train")[:].tolist() == whole, prepared.store.segments() is here))
    )
    child.start()
    child.join(30)
    assert answers.get() == (True, False) and prepared.store.segments() is here

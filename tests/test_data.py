"""From files to batches: the split, the cache, the order, and what is refused."""

import collections
import functools
import hashlib
import http.client
import io
import math
import os
import random
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import varied_text

from etude.data import source
from etude.data.base import Maker
from etude.data.loader import Batches, Windows
from etude.data.order import Order, ResumableDistributedSampler, mix
from etude.data.prepare import Prepared, bigram_loss, prepare
from etude.data.text import Shakespeare, Stdlib, Text
from etude.errors import Refusal, StorageFault
from etude.text import tokenizer as tok

CHAR = functools.partial(tok.char, unknown="error")
SETTINGS = dict(
    val_fraction=0.1,
    seq_len=16,
    layout="windows",
    stride=None,
    isolate_documents=False,
    overlong="split",
    order="random",
    drop_last=False,
    workers=0,
    prefetch=2,
)
ROWS = dict(separator=None, format="auto", rename={}, on_error="raise", duplicates="keep", split="position")


def corpus(path: Path, **settings) -> Text:
    return Text(path=str(path), **(SETTINGS | ROWS | settings))


def prepared(path: Path, tmp_path: Path, make=tok.byte, key: str = "byte", **settings) -> tuple[Text, Prepared]:
    data = corpus(path, **settings)
    (ready,) = prepare(data, Maker(key, make), str(tmp_path / "cache"))
    return data, ready


def batches(path: Path, tmp_path: Path, cut: dict | None = None, make=tok.byte, key="byte", **settings) -> Batches:
    data, ready = prepared(path, tmp_path, make, key, **settings)
    sampler = {"batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1} | (cut or {})
    return Batches(data, [ready], sampler, 1, torch.device("cpu"))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------- split and cache


@pytest.mark.parametrize("n", [1000, 1003, 1115, 9999])
def test_split_is_nanogpts(tmp_path: Path, n: int) -> None:
    """data[:int(n*0.9)] in characters: another split would make losses incomparable."""
    text = varied_text(n - 3) + "é☃é"
    _, ready = prepared(write(tmp_path / "a.txt", text), tmp_path, CHAR, "char")
    characters = sorted(set(text))
    for split, part in (("train", text[: int(n * 0.9)]), ("val", text[int(n * 0.9) :])):
        assert ready.ids(split)[:].tolist() == [characters.index(c) for c in part]
        assert ready.meta[f"{split}_tokens"] == len(part) and ready.meta[f"{split}_bytes"] == len(part.encode())
    assert ready.tokenizer.decode(ready.ids("val")[:].tolist()) == text[int(n * 0.9) :]


def test_several_documents_are_cut_at_one_position(tmp_path: Path) -> None:
    """Files in the order of their names, an end token behind each, none lost at the cut."""
    texts = {"b/2.txt": varied_text(3000, 1), "a.txt": varied_text(500, 2), "b/10.txt": varied_text(1500, 3)}
    for name, text in texts.items():
        write(tmp_path / "d" / name, text)
    write(tmp_path / "d" / ".hidden" / "x.txt", "no")
    write(tmp_path / "d" / "image.bin", b"\x89PNG\0\0")
    write(tmp_path / "d" / "empty.txt", "")
    _, ready = prepared(tmp_path / "d", tmp_path)
    whole = [texts[n] for n in sorted(texts)]
    cut = 4500 - 500 - 1500
    eos = [ready.meta["eos"]]
    expected = [b for t in [whole[0], whole[1], whole[2][:cut]] for b in [*t.encode(), *eos]]
    assert ready.ids("train")[:].tolist() == expected
    assert ready.ids("val")[:].tolist() == list(whole[2][cut:].encode())
    _, globbed = prepared(tmp_path / "d" / "**" / "*0.txt", tmp_path)
    assert globbed.meta["files"] == 1 and globbed.ids("train")[:].tolist() == list(texts["b/10.txt"][:1350].encode())


def test_long_documents_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a long text for the encoder's memory must not lose or change a character, nor a token where it has lines."""
    monkeypatch.setattr(source, "PIECE", 100)
    text = varied_text(3000) + "x" * 350 + "\n \n\n" + varied_text(1646, 5)
    for blocks in ([text], [text[i : i + 7] for i in range(0, 5000, 7)]):
        found = list(source._pieces(iter(blocks), None))
        assert "".join(piece for piece, _ in found) == text
        assert all(0 < len(piece) <= 100 for piece, _ in found) and len(found) >= 50
        assert [final for _, final in found] == [False] * (len(found) - 1) + [True]
    _, ready = prepared(write(tmp_path / "a.txt", text), tmp_path)
    assert bytes(ready.ids("train")[:].tolist()).decode() == text[:4500]

    monkeypatch.setattr(source, "PIECE", 200)  # longer than any line
    lines = "\n\n".join(varied_text(300, i) + "\t \n  x = 'y' \r\n" for i in range(20))
    make = functools.partial(tok.bpe, vocab_size=400)
    _, ready = prepared(write(tmp_path / "lines.txt", lines), tmp_path, make, "bpe")
    cut = int(len(lines) * 0.9)
    whole = make([lines[:cut]], [lines])
    assert len(list(source._pieces(iter([lines]), None))) > 30 and ready.tokenizer.to_json() == whole.to_json()
    for split, part in (("train", lines[:cut]), ("val", lines[cut:])):
        assert ready.ids(split)[:].tolist() == whole.encode(part)


def test_second_start_finds_the_work_done(tmp_path: Path) -> None:
    """The tokenizer is made once a content; a touched file is read again, not encoded again; new content is new work."""
    calls = []

    def make(train, texts):
        calls.append(1)
        return tok.byte(train, texts)

    path = write(tmp_path / "a.txt", varied_text(2000))
    _, first = prepared(path, tmp_path, make)
    _, again = prepared(path, tmp_path, make)
    assert (again.store.path, again.meta, len(calls)) == (first.store.path, first.meta, 1)
    os.utime(path, ns=(1, 1))
    assert prepared(path, tmp_path, make)[1].store.path == first.store.path and len(calls) == 1
    moved = write(tmp_path / "other" / "a.txt", path.read_bytes())
    assert prepared(moved, tmp_path, make)[1].store.path == first.store.path and len(calls) == 1
    text = path.read_text()
    path.write_text("Q" + text[1:])  # same size
    changed = prepared(path, tmp_path, make)[1]
    assert changed.store.path != first.store.path and changed.meta["sha256"] != first.meta["sha256"] and len(calls) == 2
    assert chr(changed.ids("train")[:1][0]) == "Q"
    others = [prepared(path, tmp_path, make, val_fraction=0.2)[1], prepared(path, tmp_path, make, key="other")[1]]
    assert len({p.store.path for p in (first, changed, *others)}) == 4 and len(calls) == 4


def test_failure_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-made file would be taken for a whole one at the next start. What work is done may stay, until it is used."""
    path = write(tmp_path / "a.txt", varied_text(1000))

    def fail(train, texts):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):  # Red: Journal's files are not closed when something is raised (ResourceWarning)
        prepared(path, tmp_path, fail)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(tok.Tokenizer, "encode_many", lambda self, texts: fail(texts, texts))
        prepared(path, tmp_path)
    assert not [p for p in (tmp_path / "cache").glob("tokens/*") if not p.name.endswith(".building")]
    _, ready = prepared(path, tmp_path)
    assert ready.meta["train_tokens"] == 900 and bytes(ready.ids("train")[:].tolist()) == path.read_bytes()[:900]
    assert list((tmp_path / "cache").glob("tokens/*")) == [ready.store.path]


def test_stdlib_is_there() -> None:
    """The default data: on every machine, without tests, vendored packages and this build's tables."""
    root, names = Stdlib(**SETTINGS).files(Path("unused"))
    assert "json/decoder.py" in names and list(names) == sorted(names) and len(names) > 300
    assert not any(set(Path(n).parts) & {"test", "tests", "site-packages", "_vendor"} for n in names)
    assert sum((root / n).stat().st_size for n in names) > 5_000_000


def naive_bigram(train: list[int], val: list[int], vocab_size: int) -> float:
    one, two = collections.Counter(train), collections.Counter(zip(train, train[1:]))
    before = collections.Counter(train[:-1])
    loss = 0.0
    for a, b in zip(val, val[1:]):
        unigram = (one[b] + 1) / (len(train) + vocab_size)
        loss -= math.log((two[a, b] + unigram) / (before[a] + 1))
    return loss / (len(val) - 1)


def test_bigram_loss() -> None:
    """The line that a model has to get under: against dictionaries, with tokens that training never saw."""
    rng = np.random.default_rng(0)
    for vocab_size, n, m in ((5, 400, 50), (300, 500, 200), (70000, 300, 100)):
        train, val = rng.integers(0, max(2, vocab_size // 2), n), rng.integers(0, vocab_size, m)
        assert bigram_loss(train, val, vocab_size) == pytest.approx(
            naive_bigram(train.tolist(), val.tolist(), vocab_size)
        )


# ---------------------------------------------------------------- order


def sampler(n: int = 1000, **settings) -> ResumableDistributedSampler:
    cut = dict(batch_size=8, micro_batch_size=8, rank=0, world_size=1) | settings
    seed, kind = cut.pop("seed", 3), cut.pop("order", "shuffle")
    order = Order(n, seed=seed, kind=kind, drop_last=cut["batch_size"] if cut.pop("drop_last", False) else 1)
    return ResumableDistributedSampler(order, **cut)


@pytest.mark.parametrize("order", ["random", "shuffle", "sequential"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_order_is_the_same_for_any_layout(order: str, drop_last: bool) -> None:
    """Ranks and micro-batches cut up one sequence of samples; they do not choose it."""
    for n in (7, 8, 101, 1000):
        one = sampler(n, order=order, drop_last=drop_last)
        steps = [0, 1, 2, 11, 12, 13, 126, 10**6]
        whole = {s: np.concatenate(one.micro_batches(s)).tolist() for s in steps}
        for world_size, micro in ((1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
            ranks = [
                sampler(n, order=order, drop_last=drop_last, world_size=world_size, rank=r, micro_batch_size=micro)
                for r in range(world_size)
            ]
            for s in reversed(steps):
                parts = [r.micro_batches(s) for r in ranks]
                assert {len(m) for p in parts for m in p} == {micro}
                assert [i for p in parts for m in p for i in m.tolist()] == whole[s]
        assert all(0 <= i < n for w in whole.values() for i in w)


def test_shuffle_covers_every_window_once_an_epoch() -> None:
    for n, drop_last in ((96, False), (100, False), (100, True)):
        order = sampler(n, drop_last=drop_last)
        size = 96 if drop_last else n
        assert order.order.epoch_size == size
        stream = np.concatenate([np.concatenate(order.micro_batches(s)) for s in range(4 * size // 8)])
        epochs = [stream[i : i + size].tolist() for i in range(0, 3 * size, size)]
        assert all(len(set(e)) == size for e in epochs) and len({tuple(e) for e in epochs}) == 3
        assert epochs[0] != sorted(epochs[0])
        if not drop_last:
            assert sorted(epochs[1]) == list(range(n))
    other = sampler(96, seed=4)
    assert np.concatenate(other.micro_batches(0)).tolist() != np.concatenate(sampler(96).micro_batches(0)).tolist()


def test_sequential_goes_round() -> None:
    order = sampler(20, order="sequential")
    assert [i for s in range(3) for m in order.micro_batches(s) for i in m.tolist()] == [*range(20), 0, 1, 2, 3]
    order = sampler(20, order="sequential", drop_last=True)
    assert [i for s in range(3) for m in order.micro_batches(s) for i in m.tolist()] == [*range(16), *range(8)]


def test_random_windows_are_uniform() -> None:
    """Chi-square over 50 classes: 49 degrees of freedom, 5 standard deviations."""
    for seed in range(3):
        found = np.bincount(Order(1000, seed=seed, kind="random").sample(np.arange(50_000)) // 20, minlength=50)
        assert ((found - 1000) ** 2 / 1000).sum() < 49 + 5 * math.sqrt(98)
    first, other = (Order(10**9, seed=seed, kind="random").sample(np.arange(1000)) for seed in (0, 1))
    assert len(set(first.tolist()) & set(other.tolist())) == 0


def test_mix_is_splitmix64() -> None:
    """The published generator from seed 0: Vigna's splitmix64.c begins 0xE220A8397B1DCDAF, and no bit is stuck."""
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    assert mix(1, np.arange(5)).tolist() == [int(mix(1, i)[0]) for i in range(5)]
    assert len({int(mix(a, b)[0]) for a in range(50) for b in range(50)}) == 2500
    bits = np.unpackbits(mix(7, np.arange(4000)).view(np.uint8).reshape(-1, 8), axis=1).mean(0)
    assert abs(bits - 0.5).max() < 0.05


def test_state_is_the_next_step() -> None:
    order = sampler(100)
    order.step = 13
    state = order.state_dict()
    assert (state["step"], state["epoch"], state["iter"]) == (13, 1, 0)
    fresh = sampler(100, world_size=2, micro_batch_size=2)
    fresh.load_state_dict(state)
    assert next(iter(fresh)) == fresh.micro_batches(13)[0].tolist()
    for changed in ({"seed": 9}, {"n": 99}, {"order": "random"}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            sampler(**({"n": 100} | changed)).load_state_dict(state)


def digest(micro_batches: list[dict]) -> str:
    return hashlib.sha256(
        b"".join(b[k].numpy().tobytes() for k in ("tokens", "targets") for b in micro_batches)
    ).hexdigest()


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_batches_do_not_depend_on_workers_or_where_one_starts(tiny_text: Path, tmp_path: Path, order: str) -> None:
    """50 steps read ahead by two processes, in micro-batches, and resumed in the middle: the same bytes."""
    plain = batches(tiny_text, tmp_path, order=order)
    reference = [digest(step) for step in plain.steps(0, 50)]
    assert len(set(reference)) == 50
    small = batches(tiny_text, tmp_path, {"micro_batch_size": 2}, order=order)
    assert [digest(step) for step in small.steps(0, 50)] == reference and small.micro_batches == 2
    ahead = batches(tiny_text, tmp_path, order=order, workers=2)
    assert [digest(step) for step in ahead.steps(0, 50)] == reference
    for start in (1, 23, 49):
        assert [digest(step) for step in plain.steps(start, 50)] == reference[start:]
    ranks = [
        batches(tiny_text, tmp_path, {"micro_batch_size": 1, "rank": r, "world_size": 2}, order=order) for r in (0, 1)
    ]
    both = [[*a, *b] for a, b in zip(*(r.steps(10, 20) for r in ranks))]
    assert [digest(step) for step in both] == reference[10:20]


def test_reading_draws_nothing_from_the_global_generator(tiny_text: Path, tmp_path: Path) -> None:
    """Else dropout would depend on when an evaluation or a resume made a loader."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = batches(tiny_text, tmp_path)
    next(stream.steps(0, 5))
    next(stream.fixed("val", 2, 4))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- windows


def test_windows(tiny_text: Path, tmp_path: Path) -> None:
    """Targets are the inputs shifted by one; the last window ends with the last token."""
    data, ready = prepared(tiny_text, tmp_path)
    ids = ready.ids("train")[:]
    for stride in (1, 7, 16):
        windows = Windows(ready, "train", 16, stride)
        last = len(windows) - 1
        batch = windows.__getitems__([0, 3, last])
        for row, i in enumerate((0, 3, last)):
            assert batch["tokens"][row].tolist() == ids[i * stride :][:16].tolist()
            assert batch["targets"][row].tolist() == ids[i * stride + 1 :][:16].tolist()
        assert last * stride + 17 <= len(ids) < (last + 1) * stride + 17
    assert corpus(tiny_text).step_between == 1 and corpus(tiny_text, order="shuffle").step_between == 16
    assert corpus(tiny_text, order="shuffle", stride=5).step_between == 5


def test_whole_takes_every_token_as_a_target_once(tmp_path: Path) -> None:
    """For lengths that do and do not fill the last window and the last batch."""
    for n in (170, 1609, 1610, 1611, 1770):
        stream = batches(write(tmp_path / f"{n}.txt", varied_text(n)), tmp_path)
        ids = stream.prepared[0].ids("val")[:].tolist()
        seen, inputs = [], []
        for batch in stream.whole("val", 3):
            valid = batch["targets"] >= 0
            seen += batch["targets"][valid].tolist()
            inputs += batch["tokens"][valid].tolist()
            assert batch["tokens"].shape[1] == 16 and len(batch["tokens"]) <= 3
        assert seen == ids[1:] and inputs == ids[:-1]


def test_fixed_windows_are_the_same_at_every_call(tiny_text: Path, tmp_path: Path) -> None:
    stream = batches(tiny_text, tmp_path)
    first, second = (list(stream.fixed("val", 3, 4)) for _ in range(2))
    assert len(first) == 3 and [digest([b]) for b in first] == [digest([b]) for b in second]
    ids = stream.prepared[0].ids("val")[:].tolist()
    assert first[0]["tokens"][0].tolist() == ids[:16] and first[-1]["targets"][-1].tolist() == ids[-16:]
    assert sum(len(b["tokens"]) for b in stream.fixed("val", 10**6, 64)) == len(ids) - 16, "no window twice"


def test_documents_are_numbered(tmp_path: Path) -> None:
    """An end token belongs to the document that it ends; without isolate_documents nothing is numbered."""
    for i in range(60):
        write(tmp_path / "d" / f"{i:02}.txt", varied_text(random.Random(i).randint(1, 60), i))
    stream = batches(tmp_path / "d", tmp_path, isolate_documents=True, seq_len=50)
    eos = stream.prepared[0].meta["eos"]
    assert eos is not None
    for batch in [next(stream.steps(0, 1))[0], *stream.whole("train", 4), *stream.fixed("val", 1, 2)]:
        tokens, found = batch["tokens"].tolist(), batch["doc_ids"].tolist()
        for row, docs in zip(tokens, found):
            assert docs == [row[:t].count(eos) for t in range(len(row))]
    assert max(map(max, next(stream.steps(0, 1))[0]["doc_ids"].tolist())) > 0
    assert "doc_ids" not in next(batches(tmp_path / "d", tmp_path).steps(0, 1))[0]
    with pytest.raises(Refusal, match="isolate_documents=true needs a tokenizer with an end token"):
        batches(tmp_path / "d", tmp_path, make=CHAR, key="char", isolate_documents=True)


# ---------------------------------------------------------------- what is refused


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    """One line each, with the path, and with the byte where that is what helps."""
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "x.bin", b"\0\1\2")
    text = varied_text(1000)
    cases = {
        write(tmp_path / "empty.txt", ""): "empty.txt is empty",
        write(
            tmp_path / "latin.txt", text.encode() + b"caf\xe9 and on"
        ): "latin.txt is not UTF-8 text: byte 1003 is 0xe9",
        tmp_path / "folder": "folder is a folder without text, JSONL or Parquet files",
        tmp_path / "nowhere.txt": "nowhere.txt does not exist",
        tmp_path / "*.md": "matches no file",
        write(tmp_path / "short.txt", "short"): "the train split has 4 tokens and a sample needs 17",
        write(
            tmp_path / "short_val.txt", text[:160]
        ): "the val split has 16 tokens and a sample needs 17: lower data.seq_len",
    }
    for path, message in cases.items():
        with pytest.raises(Refusal, match=message.replace("*", r"\*")):
            batches(path, tmp_path)
    for settings in (
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"seq_len": 0},
        {"stride": 0},
        {"workers": -1},
        {"prefetch": 0},
    ):
        with pytest.raises(Refusal, match=f"data.{next(iter(settings))}="):
            corpus(tmp_path, **settings)


def test_unusable_cache_is_a_storage_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", varied_text(1000))
    with pytest.raises(StorageFault, match=r"in_the_way.*cache_dir=FOLDER"):
        prepare(corpus(path), Maker("byte", tok.byte), str(write(tmp_path / "in_the_way", "a file")))


class Dropped(io.BytesIO):
    def read(self, *_):
        raise http.client.IncompleteRead(b"First Cit", 1_115_385)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified before it is kept; offline, cut off or altered it is refused with what to do, and tried again next time."""
    text, answers = varied_text(3000).encode(), []

    def urlopen(url, timeout):
        assert url == Shakespeare.url
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, io.BytesIO) else io.BytesIO(answer)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    data, maker = Shakespeare(path=None, **SETTINGS), Maker("byte", tok.byte)
    answers.append(text)
    with pytest.raises(Refusal, match=f"sha256 {hashlib.sha256(text).hexdigest()} instead of 86c4e6aa.*data.path=FILE"):
        prepare(data, maker, str(tmp_path))
    monkeypatch.setattr(Shakespeare, "sha256", hashlib.sha256(text).hexdigest())
    for fault, why in (
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (Dropped(), "9 bytes read"),
    ):
        answers.append(fault)
        with pytest.raises(Refusal, match=f"could not download tiny Shakespeare .*{why}.*data.path=FILE"):
            prepare(data, maker, str(tmp_path))
    assert not list(tmp_path.glob("downloads/*"))
    answers.append(text)
    (ready,) = prepare(data, maker, str(tmp_path))
    assert bytes(ready.ids("train")[:].tolist()) == text[:2700]
    prepare(data, maker, str(tmp_path))  # no answer left: the copy is used
    given = Shakespeare(path=str(write(tmp_path / "mine.txt", text)), **SETTINGS)
    assert prepare(given, maker, str(tmp_path))[0].meta["train_tokens"] == 2700

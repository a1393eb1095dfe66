"""From files of any kind to one HDF5 file: what is read, split and counted, what is refused, and what survives a kill."""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import h5py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT, varied_text
from running import environment
from tokenizers import Tokenizer as Backend

from etude.data import journal, source, store
from etude.data import prepare as preparation
from etude.data.formats import STRATEGIES
from etude.data.journal import Workers
from etude.data.prepare import Preparation, Prepared, Texts, open_prepared
from etude.data.source import Source, find, units
from etude.errors import Refusal
from etude.text import tokenizer as tok

BPE = functools.partial(tok.bpe, vocab_size=320)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def texts(n: int, seed: int = 0, longest: int = 300) -> list[str]:
    """Different documents of varied length, with characters of one to four bytes and line ends of all kinds."""
    rng = random.Random(seed)
    body = varied_text(20_000, seed)
    ends = ["", "\n", "\r\n", " é", " 日本", " 👍", "\t\u2028", '"\\']
    found = []
    for i in range(n):
        at = rng.randint(0, 15_000)
        found.append(f"{seed}.{i} {body[at : at + rng.randint(1, longest)]}{rng.choice(ends)}.")
    return found


def chats(n: int) -> list[dict]:
    turns = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
    return [{"messages": turns(f"what is {i}?", f"it is {i}é.") * (1 + i % 2)} for i in range(n)]


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(n)]


def labelled(n: int) -> list[dict]:
    return [{"prompt": f"say {i}", "completion": f"yes {i}", "label": i % 3 == 0} for i in range(n)]


def prompts(n: int) -> list[dict]:
    return [{"prompt": f"what is {i} + 1?", "answer": f"{i + 1}", "level": i % 3} for i in range(n)]


def groups(n: int) -> list[dict]:
    """Of two or three completions; their rewards are any number, or null."""
    rewards = [[-2.25, None], [0.5, None, 1], [None, 3]]
    completions = [[f"{w} {i}" for w in ("yes", "no", "perhaps")][: len(rewards[i % 3])] for i in range(n)]
    return [{"prompt": f"say {i}", "completions": completions[i], "rewards": rewards[i % 3]} for i in range(n)]


def n_documents(rows: list[dict]) -> int:
    return sum(len(row["rewards"]) if "rewards" in row else 2 if "chosen" in row else 1 for row in rows)


ROWS: dict[str, Callable[[int], list[dict]]] = {
    "text": lambda n: [{"text": t} for t in texts(n)],
    "chats": chats,
    "pairs": pairs,
    "labelled": labelled,
    "prompts": prompts,
    "groups": groups,
}


def source_of(path: Path, kind: str = "text", **settings: Any) -> Source:
    root, names = find(str(path), "from")
    return Source(kind=kind, root=root, names=names, key="", **({"val_fraction": 0.1, "split": "hash"} | settings))


def prepared(
    path: Path, target: Path, make: Callable = tok.byte, processes: int = 1, key: str | None = "key", **settings: Any
) -> Prepared:
    """As prepare.py does it, in this process."""
    with Workers(processes) as workers:
        whole = Preparation(source_of(path, **settings), target, workers, key)
        try:
            whole.scan()
            whole.encode(whole.tokenizer or make(Texts([whole], "train"), Texts([whole], None)))
        finally:
            whole.journal.close()
    return open_prepared(target)


def arrays(ready: Prepared) -> dict[str, list]:
    """Everything but the tokenizer's files, and the attributes."""
    flat = {k: store.Flat(ready.store, k)[:] for k in ready.store.keys if not k.startswith("tokenizer")}
    return {k: (a.view("uint32") if a.dtype == "float32" else a).tolist() for k, a in flat.items()}  # NaN is not NaN


def documents(ready: Prepared, split: str) -> list[str]:
    """The text of each document of one split, without the end token."""
    ids, ends = ready.ids(split)[:].tolist(), store.Flat(ready.store, f"{split}/ends")[:].tolist()
    tokenizer = ready.tokenizer
    eos = tokenizer.eos
    return [tokenizer.decode([i for i in ids[a:b] if i != eos]) for a, b in zip([0, *ends], ends)]


def everything(ready: Prepared) -> list[str]:
    return documents(ready, "train") + documents(ready, "val")


# ---------------------------------------------------------------- scripts as processes


@dataclass
class Done:
    code: int
    out: str
    err: str
    seconds: float  # by the clock
    cpu: float  # seconds of it and of its children
    peak: float  # MB, without its children


def run(name: str, *overrides: object) -> Done:
    """train.py or prepare.py. Its `cpu` is without what Python needs to import torch, its `peak` not measured."""
    began = time.monotonic()
    process = forked.Forked([str(ROOT / name), *map(str, overrides)], ROOT, environment())
    try:
        out, err = process.communicate(120)
    finally:
        process.kill()
    return Done(process.wait(), out, err, time.monotonic() - began, process.cpu, 0.0)


def run_fresh(name: str, *overrides: object, program: str | None = None, timeout: float = 120) -> Done:
    """The same as a user starts it; or `program`, which may set something first."""
    command = [sys.executable, *(["-c", program] if program else [str(ROOT / name)]), *map(str, overrides)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        code, usage, peak = wait(process, timeout)
        seconds = time.monotonic() - began
        out.seek(0), err.seek(0)
        return Done(code, out.read(), err.read(), seconds, usage.ru_utime + usage.ru_stime, peak)


def wait(process: subprocess.Popen, timeout: float) -> Any:
    """-> (exit code, resources used, largest resident MB; getrusage's begins with this process's)."""
    until, peak = time.monotonic() + timeout, 0
    while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            process.kill()
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else peak
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(found[1])
    return process.returncode, found[2], peak / 1024


def refused(done: Done, *words: str, code: int = 2) -> None:
    assert done.code == code, done.out + done.err
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: "), done.err
    assert len(done.err) < 1000 and all(w in done.err for w in words), (words, done.err)


def starting(*settings: str) -> str:
    """A program that is prepare.py with some constants changed."""
    return "\n".join(
        [
            "import runpy, sys",
            "from etude.data import journal, prepare, source",
            *settings,
            "sys.argv[0] = 'prepare.py'",
        ]
        + ["runpy.run_path('prepare.py', run_name='__main__')"]
    )


def left_beside(target: Path) -> list[str]:
    """What a preparation has left in its target's folder, whose name begins with a dot."""
    return sorted(p.name for p in target.parent.iterdir() if p.name.startswith("."))


def checked_hashes(path: Path) -> dict[str, str]:
    """The sha256 of every data set, each the one that is written beside it."""
    found = {}
    with h5py.File(path, "r") as f:
        assert f.attrs["complete"]

        def see(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                found[name] = hashlib.sha256(node[:].tobytes()).hexdigest()
                assert found[name] == node.attrs["sha256"].decode(), name

        f.visititems(see)
    return found


# ---------------------------------------------------------------- 1. what is read


def zst(content: bytes, frames: int = 3) -> bytes:
    cuts = [len(content) * i // frames for i in range(frames + 1)]
    return b"".join(zstandard.ZstdCompressor().compress(content[a:b]) for a, b in zip(cuts, cuts[1:]))


def parquet(rows: list[dict], row_group_size: int = 7) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=row_group_size)
    return out.getvalue()


def containers(rows: list[dict]) -> dict[str, bytes]:
    """The same rows in every way of writing them."""
    lines, compact = jsonl(rows), [json.dumps(row) for row in rows]
    return {
        "plain.jsonl": lines,
        "other.ndjson": lines,
        "packed.jsonl.gz": gzip.compress(lines[:99]) + gzip.compress(lines[99:]),
        "packed.jsonl.zst": zst(lines),
        "crlf.jsonl": lines.replace(b"\n", b"\r\n"),
        "open_end.jsonl": lines.removesuffix(b"\n"),
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "blank.jsonl": b"\n \n" + lines.replace(b"\n", b"\n\t\r\n\n") + b"\n",
        "a_line.json": ("[" + ",".join(compact) + "]").encode(),
        "lines.json": ("[\n" + ",\n".join(compact) + "\n]\n").encode(),
        "pretty.json": b"\xef\xbb\xbf \r\n" + json.dumps(rows, indent=3, ensure_ascii=False).encode(),
        "packed.json.gz": gzip.compress(json.dumps(rows, indent=1).encode()),
        "packed.json.zst": zst(json.dumps(rows).encode()),
        "groups.parquet": parquet(rows),
        "whole.parquet": parquet(rows, 10**6),
    }


@pytest.mark.parametrize("kind", ROWS)
def test_every_container_gives_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines, arrays and tables, packed or not, however blocks and lines are cut: ids, ends, targets, fields to the byte."""
    monkeypatch.setattr(source, "READ", 1000)
    rows, expected = ROWS[kind](150), None
    files = containers(rows)
    if kind == "text":
        plain = "<|e|>".join(row["text"] for row in rows).encode()
        files |= {"plain.txt": plain, "twice<|e|>.txt": plain.replace(b"<|e|>", b"<|e|><|e|>") + b"<|e|>"}
        files |= {"no_ending": plain, "packed.txt.gz": gzip.compress(plain), "packed.txt.zst": zst(plain)}
    for name, content in files.items():
        path = write(tmp_path / name, content)
        ready = prepared(path, tmp_path / f"{name}.h5", kind=kind, separator="<|e|>")
        found = arrays(ready)
        expected = expected or found
        assert found == expected, name
        counts = ready.meta["train_documents"] + ready.meta["val_documents"]
        assert counts == n_documents(rows) and ready.meta["dropped"] == {}, name
    if kind == "text":
        assert sorted(everything(ready)) == sorted(row["text"] for row in rows)


def test_a_json_file_that_is_no_array_is_text(tmp_path: Path) -> None:
    content = '{"a": [1, 2],\n "text": "not a row"}' * 30
    ready = prepared(write(tmp_path / "a.json", content), tmp_path / "a.h5", split="position")
    assert "".join(everything(ready)) == content


def test_a_folder_of_everything(tmp_path: Path) -> None:
    """All kinds of files at once, by the names' order; hidden and binary ones left out; a glob takes what it matches."""
    groups = [[{"text": t} for t in texts(20, seed)] for seed in range(6)]
    folder = tmp_path / "d"
    write(folder / "a.jsonl", jsonl(groups[0]))
    write(folder / "b/c.json", json.dumps(groups[1], indent=1))
    write(folder / "b/d.parquet", parquet(groups[2]))
    write(folder / "b/e.jsonl.gz", gzip.compress(jsonl(groups[3])))
    write(folder / "f.txt", "<|e|>".join(row["text"] for row in groups[4]))
    write(folder / "g.jsonl.zst", zst(jsonl(groups[5])))
    for name in (".hidden.jsonl", ".git/x.txt", "b/.cache/y.jsonl"):
        write(folder / name, jsonl([{"text": "hidden"}]))
    write(folder / "image.png", b"\x89PNG\r\n\0\0\0")
    write(folder / "nothing.txt", b"")
    wanted = [row["text"] for group in groups for row in group]
    ready = prepared(folder, tmp_path / "all.h5", split="position", val_fraction=0.3, separator="<|e|>")
    names = [f["name"] for f in ready.meta["sources"]]
    assert names == ["a.jsonl", "b/c.json", "b/d.parquet", "b/e.jsonl.gz", "f.txt", "g.jsonl.zst"]
    train, val = documents(ready, "train"), documents(ready, "val")
    assert [*train[:-1], train[-1] + val[0], *val[1:]] == wanted, "the cut goes through one document"
    some = prepared(folder / "**" / "*.json*", tmp_path / "some.h5", duplicates="drop")
    assert sorted(everything(some)) == sorted(wanted[:40] + wanted[60:80] + wanted[100:])


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "é", "aab"])
def test_separators_fall_where_they_like(separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across blocks and beside each other, in long documents and empty ones: what str.split gives, but the empty ones."""
    rng = random.Random(0)
    parts = ["", "a", "aa", "ab", "é", "\n", "line\n" * 9, separator[:-1], separator, separator * 3, "x" * 40]
    text = "".join(rng.choices(parts, k=400)) + separator[: len(separator) // 2]
    expected = [part for part in text.split(separator) if part]
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(source, "PIECE", 16)
    for block in (1, 2, 3, 7, 64, 10**6):
        monkeypatch.setattr(source, "READ", block)
        found, open_document = [], ""
        for unit in units(source_of(path, separator=separator)):
            for entry in unit.entries:
                assert 0 < len(entry.content) <= 16
                open_document += entry.content
                if entry.final:
                    found.append(open_document)
                    open_document = ""
        assert found == expected and not open_document, block


@pytest.mark.parametrize("name", [*containers([{"a": 1}]), "a.txt", "a.txt.zst"])
def test_reading_goes_on_at_any_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken up behind any entry, the rest comes, and nothing else: else a preparation that was killed loses rows."""
    monkeypatch.setattr(source, "UNIT", 1)
    rows = [{"text": t} for t in texts(700, longest=30)]
    plain = "<|e|>".join(row["text"] for row in rows).encode()
    files = containers(rows) | {"a.txt": plain, "a.txt.zst": zst(plain), "groups.parquet": parquet(rows, 300)}
    folder = tmp_path / "d"
    write(folder / f"1{name}", files[name])
    write(folder / f"2{name}", files[name])
    given = source_of(folder, separator="<|e|>")
    whole = list(units(given))
    assert len(whole) == 1400
    for i in (0, 1, 254, 255, 256, 299, 300, 301, 600, 698, 699, 700, 960, 1398, 1399):
        rest = [unit.entries[0] for unit in units(given, whole[i].then)]
        assert rest == [unit.entries[0] for unit in whole[i + 1 :]], i


def array_rows(path: Path) -> list[Any]:
    return [entry.content for unit in units(source_of(path)) for entry in unit.entries]


@pytest.mark.parametrize(
    "text,line,word",
    [
        ('[{"text": "a"}\n', 2, "no ] at its end"),
        ('[{"text": "a"},\n', 2, "no ] at its end"),
        ("[\n\n", 3, "no ] at its end"),
        ('[\n{"text": "a"},\n{"text": "b', 3, "not JSON"),
        ('[\n{"text": "a"},\n{"text": "b",\n "x": oops},\n{"text": "c"}]', 4, "not JSON"),
        ('[\n{"text": "a"},\n{"text": "b"\n "x": 1},\n{"text": "c"}]', 4, "not JSON"),
        ('[\n{"text": "a"},\n{"text": "b", "x": NaN},\n{"text": "c"}]', 3, "NaN"),
        ('[\n{"text": "a"},\n{"text": "b", "x": ' + "1" * 5000 + '},\n{"text": "c"}]', 3, "integer"),
        ('[{"text": "a"},\n{"text": "b", "x": ' + "[" * 100_000, 2, ""),
        ('[{"text": "a"},\n' + '{"x":' * 100_000, 2, ""),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "comma"),
        ('[{"text": "a"},\n,{"text": "b"}]', 2, "not JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', 2, ""),
        ('[{"text": "a"}]\n{"text": "b"}\n', 2, ""),
        ('[{"text": "a"}]\n oops', 2, ""),
        ('[\n{"text": "' + "x" * (source.MAX_ROW + 3 * source.READ) + '"}]', 2, "more than"),
    ],
)
def test_arrays_that_are_none(text: str, line: int, word: str, tmp_path: Path) -> None:
    """Refused with the line of the mistake, in one line, without a word twice; nothing is left out in silence."""
    path = write(tmp_path / "a.json", text)
    with pytest.raises(Refusal) as caught:
        array_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and word in message and "\n" not in message, message
    assert message.count("not JSON") <= 1 and "sys.set_int" not in message and len(message) < 300, message


def test_arrays_that_are_odd_but_right(tmp_path: Path) -> None:
    """Nested and empty ones, what is no object (each a bad row), a comma at the end; rows know their lines."""
    assert array_rows(write(tmp_path / "e.json", "[]")) == [] == array_rows(write(tmp_path / "s.json", " [ \n] \n"))
    deep = {"text": "a", "x": [[{"y": [None, True, -1.5e3, "é\n\\"]}]]}
    path = write(tmp_path / "n.json", "[\n" + json.dumps(deep) + ',\n 12,\n"s", [1], null , {"text": "b"}\n\n]')
    assert array_rows(path) == [deep, 12, "s", [1], None, {"text": "b"}]
    assert [entry.row for unit in units(source_of(path)) for entry in unit.entries] == [2, 3, 4, 4, 4, 4]
    rows = [{"text": f"{i} and on"} for i in range(100)] + [[1], "s", 5, None]
    path = write(tmp_path / "bad.json", json.dumps(rows, indent=0))
    ready = prepared(path, tmp_path / "bad.h5", on_error="skip")
    assert sum(ready.meta["dropped"].values()) == 4 and len(everything(ready)) == 100


@pytest.mark.parametrize("mistake", ['{"text": oops}', '{"text": "a\\q"}', '{"text" "a"}', "{'text': 'a'}"])
def test_a_mistake_in_a_large_array_is_the_one_that_is_named(mistake: str, tmp_path: Path) -> None:
    """Not the size of what follows it."""
    more = ",\n".join(['{"text": "' + "x" * 1000 + '"}'] * 20_000)
    path = write(tmp_path / "a.json", f"[\n{mistake},\n{more}]")
    with pytest.raises(Refusal, match="a.json:2: not JSON"):
        array_rows(path)


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_reading_takes_time_by_size_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small rows in a block: a block of thirty times the size does not take each row thirty times as long."""
    short = [f"{i} and some words" for i in range(40_000)]
    content = json.dumps([{"text": t} for t in short], indent=0) if name == "a.json" else "<|e|>".join(short)
    given = source_of(write(tmp_path / name, content), separator="<|e|>")

    def seconds(block: int) -> float:
        monkeypatch.setattr(source, "READ", block)
        began = time.process_time()
        assert sum(len(unit.entries) for unit in units(given)) == 40_000
        return time.process_time() - began

    seconds(1 << 15)
    rounds = [(seconds(1 << 15), seconds(1 << 20)) for _ in range(3)]  # the least of each: neighbours only add time
    small, large = (min(times) for times in zip(*rounds))
    assert large < 5 * small + 0.05, (small, large)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_units_are_as_large_as_they_say(name: str, tmp_path: Path) -> None:
    """Several are in memory at once, and travel between processes: long rows make small units."""
    rows = [{"text": f"{i} " + "word " * 20_000} for i in range(200)]
    content = {"a.jsonl": jsonl, "a.json": lambda r: json.dumps(r, indent=0).encode(), "a.parquet": parquet}[name](rows)
    for unit in units(source_of(write(tmp_path / name, content))):
        size = sum(len(e.content if isinstance(e.content, bytes) else e.content["text"]) for e in unit.entries)
        assert size < 4 * source.UNIT, (size, unit.size)


# ---------------------------------------------------------------- 2. determinism


def test_processes_and_units_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2 and 3 processes, units of a row, of a few and of all: every array, and so the tokenizer, to the byte."""
    rows = ROWS["text"](400)
    rows[230]["text"] = varied_text(40_000, 3) * 7  # in two pieces where it is text
    write(tmp_path / "d" / "1.jsonl", jsonl(rows[:200]))
    write(tmp_path / "d" / "2.txt", "<|e|>".join(row["text"] for row in rows[150:]))
    write(tmp_path / "d" / "3.parquet", parquet(rows[380:] + ROWS["text"](300)))
    usual = dict(separator="<|e|>", duplicates="drop", val_fraction=0.2)
    for settings in (usual, usual | {"split": "position"}):
        whole = prepared(tmp_path / "d", tmp_path / "0.h5", BPE, **settings)
        (tmp_path / "0.h5").rename(tmp_path / f"{settings.get('split', 'hash')}.h5")
        whole = open_prepared(tmp_path / f"{settings.get('split', 'hash')}.h5")
        for i, (processes, unit) in enumerate([(1, 1), (2, 1_000), (3, 700)] if "split" in settings else [(2, 3_000)]):
            with monkeypatch.context() as patch:
                patch.setattr(source, "UNIT", unit)
                target = tmp_path / settings.get("split", "hash") / f"{i}.h5"
                target.parent.mkdir(exist_ok=True)
                found = prepared(tmp_path / "d", target, BPE, processes, **settings)
            assert arrays(found) == arrays(whole) and found.files == whole.files, (processes, unit)
            assert found.meta == whole.meta and left_beside(target) == []


@pytest.mark.parametrize("kind", ["chats", "pairs", "labelled", "prompts", "groups"])
def test_processes_and_units_change_no_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets, fields and rewards too, with rows that fall out in either pass."""
    bad = {
        "chats": {"messages": []},
        "pairs": {"chosen": "a", "rejected": "a"},
        "labelled": {"prompt": "a", "completion": "b", "label": 1},
        "prompts": {"prompt": ""},
        "groups": {"prompt": "a", "completions": ["a"], "rewards": [1]},
    }[kind]
    rows = ROWS[kind](300) + [bad] * 3
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    whole = prepared(path, tmp_path / "0.h5", BPE, kind=kind, on_error="skip")
    assert sum(whole.meta["dropped"].values()) == 3
    monkeypatch.setattr(source, "UNIT", 2_000)
    found = prepared(path, tmp_path / "2.h5", BPE, 2, kind=kind, on_error="skip")
    assert arrays(found) == arrays(whole) and found.files == whole.files and found.meta == whole.meta


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.txt", "a.txt.zst"])
def test_stopped_after_any_commit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written behind the last commit is cut off, the rest comes: at each commit of both passes, every container."""
    monkeypatch.setattr(source, "UNIT", 20_000)
    monkeypatch.setattr(source, "PIECE", 1_000)
    rows = [{"text": t} for t in texts(600, longest=1_500)]
    if "txt" in name:
        content = "<|e|>".join(row["text"] for row in rows).encode()
    else:
        content = containers(rows).get("plain.jsonl" if "jsonl" in name else "lines.json", b"")
    pack = {".gz": gzip.compress, ".zst": zst, ".parquet": lambda _: parquet(rows, 10**6)}
    path = write(tmp_path / name, pack.get(Path(name).suffix, bytes)(content))
    settings = dict(separator="<|e|>", val_fraction=0.3, split="position")
    whole = prepared(path, tmp_path / "whole.h5", BPE, **settings)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    commit, stops = journal.Journal.commit, []

    def stopping(self: Any, then: Any, stage: str | None = None) -> None:
        for i, f in enumerate(self.out.values()):
            if len(stops) % 3 == i % 3:
                f.flush()  # some of it reaches the disk
        if len(stops) % 2:
            raise Stopped
        commit(self, then, stage)
        if stage is None:
            raise Stopped

    monkeypatch.setattr(journal.Journal, "commit", stopping)
    while len(stops) < 300:
        try:
            found = prepared(path, tmp_path / "b.h5", BPE, **settings)
            break
        except Stopped:
            stops.append(1)
    assert len(stops) > 40
    assert arrays(found) == arrays(whole) and found.meta == whole.meta and found.files == whole.files
    assert left_beside(tmp_path / "b.h5") == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 MB of JSONL, with duplicates and bad rows."""
    return made_up(tmp_path_factory.mktemp("corpus"), 4_000)


def made_up(folder: Path, n: int) -> Path:
    rng = random.Random(5)
    lines = varied_text(60_000, 7).split("\n")
    with (folder / "a.jsonl").open("w") as f:
        for i in range(n):
            text = "\n".join(rng.choices(lines, k=rng.randint(2, 40)))
            f.write(
                json.dumps({"text": text}) + "\n" * (i % 100 < 98) if i % 500 else '{"text": 5}\n{"text": "again"}\n'
            )
            f.write("\n" * (i % 100 >= 98))
    return folder / "a.jsonl"


SETTINGS = ["on_error=skip", "tokenizer.vocab_size=400", "progress=none"]
FAST = starting("journal.COMMIT_SECONDS, source.UNIT = 0, 1 << 16")
SLOW_END = starting(
    "journal.COMMIT_SECONDS, source.UNIT = 0, 1 << 16",
    "import time",
    "add_file = prepare.store.Writer.add_file",
    "prepare.store.Writer.add_file = lambda *given: (add_file(*given), time.sleep(0.1))",
)


@pytest.fixture(scope="module")
def unbroken(corpus: Path) -> Path:
    return prepared_whole(corpus)


def prepared_whole(corpus: Path) -> Path:
    target = corpus.parent / "whole.h5"
    done = run("prepare.py", f"from={corpus}", f"to={target}", *SETTINGS, "processes=1")
    assert done.code == 0 and done.out == "", done.err
    return target


def same_file(target: Path, unbroken: Path) -> None:
    assert checked_hashes(target) == checked_hashes(unbroken)
    assert open_prepared(target).meta == open_prepared(unbroken).meta
    assert left_beside(target) == []


def state_of(target: Path) -> dict:
    """What a preparation has committed; empty where it has not."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((target.parent / f".{target.name}.building" / "state.json").read_text())
    return {}


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts prepare.py in a session of its own, as a terminal does; what is left of it and its workers is ended."""
    begun: list[subprocess.Popen] = []

    def start(*overrides: object, program: str | None = None) -> subprocess.Popen:
        command = [sys.executable, *(["-c", program] if program else ["prepare.py"]), *map(str, overrides)]
        pipe, env = subprocess.PIPE, environment() | {"OMP_NUM_THREADS": "2"}  # a thread that may take signals too
        begun.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return begun[-1]

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(process: subprocess.Popen, true: Callable[[], bool]) -> bool:
    """Waits for something, or the process's end; -> whether it runs on."""
    while process.poll() is None and not true():
        time.sleep(0.001)
    return process.poll() is None


class Moment:
    """Is due when the work has committed `commits` times more, has come to the end of the first pass, or, `writing`, writes
    the file."""

    def __init__(self, target: Path, commits: int, writing: bool):
        self.target, self.commits, self.before = target, commits, state_of(target).get("stage")
        self.file = target.with_name(f".{target.name}.writing") if writing else None
        self.seen: set[str] = set()

    def __call__(self) -> bool:
        state = state_of(self.target)
        self.seen.add(json.dumps(state))
        to_tokenizer = self.before == "scan" and state.get("stage") == "scanned"
        return to_tokenizer or len(self.seen) > self.commits or (self.file is not None and self.file.exists())


def test_killed_again_and_again(corpus: Path, unbroken: Path, tmp_path: Path, begin: Callable) -> None:
    """SIGKILL in both passes, in the tokenizer's training and in the writing of the file: the unbroken run's arrays."""
    target, rng, kills = tmp_path / "b.h5", random.Random(3), Counter()
    for attempt in range(60):
        process = begin(f"from={corpus}", f"to={target}", *SETTINGS, f"processes={1 + attempt % 2}", program=SLOW_END)
        if not until(process, Moment(target, rng.randint(4, 20), kills["writing"] < 2)):
            break
        time.sleep(rng.random() * 0.05)
        writing = target.with_name(".b.h5.writing").exists()
        kills["writing" if writing else state_of(target).get("stage", "nothing")] += 1
        end_group(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert all(kills[stage] for stage in ("scan", "scanned", "encode", "writing")), kills
    same_file(target, unbroken)


def test_the_script_is_killed(corpus: Path, unbroken: Path, tmp_path: Path, begin: Callable) -> None:
    """The same of prepare.py itself, whose commits are seconds apart: what it has written behind the last one is cut off."""
    target, kills = tmp_path / "out" / "b.h5", Counter[str]()
    building, writing = tmp_path / "out" / ".b.h5.building", tmp_path / "out" / ".b.h5.writing"

    def uncommitted() -> bool:
        state = state_of(target)
        return state.get("stage") == "encode" and any(
            f.stat().st_size > state["sizes"].get(f.name, 0) for f in building.glob("*") if f.name[:5] != "state"
        )

    moments: dict[str, Callable[[], bool]] = {
        "begun": building.exists,
        "scanned": lambda: state_of(target).get("stage") == "scanned",
        "uncommitted": uncommitted,
        "writing": writing.exists,
        "never": lambda: False,
    }
    for name, moment in moments.items():
        process = begin(f"from={corpus}", f"to={target}", *SETTINGS, "processes=2")
        if not until(process, moment):
            break
        kills[name] += 1
        end_group(process)
    assert process.wait(60) == 0 and kills["begun"] and kills.total() >= 3, kills
    same_file(target, unbroken)


def test_a_killed_parent_leaves_no_workers(corpus: Path, tmp_path: Path, begin: Callable) -> None:
    """They would hold memory for ever."""
    process = begin(f"from={corpus}", f"to={tmp_path / 'b.h5'}", *SETTINGS, "processes=2")
    assert until(process, lambda: bool(state_of(tmp_path / "b.h5")))
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_a_killed_worker_ends_the_preparation(corpus: Path, unbroken: Path, tmp_path: Path, begin: Callable) -> None:
    """By the system, for its memory: one line, not a hang and not a traceback; and the work goes on."""
    target = tmp_path / "b.h5"
    process = begin(f"from={corpus}", f"to={target}", *SETTINGS, "processes=2", program=FAST)
    assert until(process, lambda: len(children(process.pid)) >= 3 and bool(state_of(target)))
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, 2) and "Traceback" not in err and len(err.splitlines()) == 1, err
    assert run("prepare.py", f"from={corpus}", f"to={target}", *SETTINGS, "processes=1").code == 0
    same_file(target, unbroken)


@pytest.mark.parametrize(
    "processes,moment", [(1, "scan"), (2, "begun"), (2, "begun, all"), (2, "scan"), (2, "scanned"), (2, "encode")]
)
def test_interrupted(
    processes: int, moment: str, corpus: Path, unbroken: Path, tmp_path: Path, begin: Callable
) -> None:
    """Ctrl-C, which a terminal sends to the workers too: exit code 3, one line, and the same command goes on."""
    target = tmp_path / "b.h5"
    command = (f"from={corpus}", f"to={target}", *SETTINGS, f"processes={processes}")
    process = begin(*command, program=FAST)
    if moment.startswith("begun"):  # when the first worker, or the second, is there beside the tracker
        assert until(process, lambda: len(children(process.pid)) >= (3 if "all" in moment else 2))
    else:
        assert until(process, lambda: state_of(target).get("stage") == moment)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, ""), err
    assert len(err.splitlines()) == 1 and err.startswith("stopped: ") and "the same command" in err, err
    if moment == "encode":
        process = begin(*command)
        assert process.wait(60) == 0
        same_file(target, unbroken)


# ---------------------------------------------------------------- 3. splits and duplicates


def validation(path: Path, target: Path, **settings: Any) -> set[str]:
    ready = prepared(path, target, **settings)
    train, val = documents(ready, "train"), documents(ready, "val")
    assert not set(train) & set(val)
    return set(val)


def test_a_document_keeps_its_side(tmp_path: Path) -> None:
    """By its content alone: whatever else is there, in which order, in which files; a larger share keeps the smaller one."""
    given = texts(3000)
    many = validation(write(tmp_path / "a.jsonl", jsonl([{"text": t} for t in given])), tmp_path / "a.h5")
    assert abs(len(many) - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5
    some = random.Random(1).sample(given, 1000)
    write(tmp_path / "d/z.json", json.dumps([{"text": t, "id": i} for i, t in enumerate(some[:300])]))
    write(tmp_path / "d/b.txt", "<|e|>".join(some[300:700] + texts(500, seed=9)))
    write(tmp_path / "d/c.parquet", parquet([{"n": 1, "text": t} for t in some[700:]]))
    few = validation(tmp_path / "d", tmp_path / "d.h5", separator="<|e|>")
    assert few & set(some) == many & set(some) and len(few) > len(few & set(some))
    smaller = validation(tmp_path / "a.jsonl", tmp_path / "s.h5", val_fraction=0.03)
    assert smaller < many < validation(tmp_path / "a.jsonl", tmp_path / "l.h5", val_fraction=0.3)


def sides(path: Path, kind: str, split: str) -> tuple[set[str], set[str]]:
    """What is asked in the training split, and in the validation split."""
    ready = prepared(path, path.with_suffix(f".{kind}.{split}.h5"), kind=kind, split=split, val_fraction=0.3)
    first = re.compile(r"say \d+")
    return tuple({m[0] for d in documents(ready, s) if (m := first.search(d))} for s in ("train", "val"))  # type: ignore[return-value]


def test_a_question_keeps_its_side(tmp_path: Path) -> None:
    """With split=prompt rows that ask the same are on one side, whatever they are answered and whatever kind of rows they
    are: what is validation for one strategy was not trained on with another. With split=hash they are not."""
    asks = [f"say {i % 100}" for i in range(400)]
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    files: dict[str, list[dict]] = {
        "chats": [{"messages": [turn("user", q), turn("assistant", f"a{i}"), turn("user", "b"), turn("assistant", "c")]} for i, q in enumerate(asks)],
        "pairs": [{"prompt": [turn("user", q)], "chosen": f"a{i}", "rejected": "b"} for i, q in enumerate(asks)],
        "prompts": [{"messages": [turn("user", q)], "answer": i} for i, q in enumerate(asks)],
        "groups": [{"prompt": [turn("user", q)], "completions": [f"a{i}", "b"], "rewards": [1, 0]} for i, q in enumerate(asks)],
    }  # fmt: skip
    found = []
    for kind, rows in files.items():
        path = write(tmp_path / f"{kind}.jsonl", jsonl(rows))
        train, val = sides(path, kind, "prompt")
        assert not train & val and len(train | val) == 100 and 15 < len(val) < 45
        found.append(val)
        train, val = sides(path, kind, "hash")
        assert train & val, "the same question on both sides"
    implicit = [{"chosen": [turn("user", q), turn("assistant", f"a{i}")], "rejected": [turn("user", q), turn("assistant", "b")]} for i, q in enumerate(asks)]  # fmt: skip
    completion = [{"prompt": [turn("user", q)], "completion": f"a{i}"} for i, q in enumerate(asks)]
    for kind, rows in (("pairs", implicit), ("chats", completion)):
        found.append(sides(write(tmp_path / f"other {kind}.jsonl", jsonl(rows)), kind, "prompt")[1])
    assert all(val == found[0] for val in found)
    again = write(tmp_path / "again.jsonl", jsonl(files["groups"] + files["groups"][:9]))
    assert (
        prepared(again, tmp_path / "again.h5", kind="groups", split="prompt", duplicates="drop").meta["duplicates"] == 9
    )
    # What asks nothing goes by its content.
    plain = write(tmp_path / "plain.jsonl", jsonl([{"text": f"say {i}"} for i in range(100)]))
    for kind in ("text", "chats"):
        assert sides(plain, kind, "prompt") == sides(plain, kind, "hash")


def test_a_long_document_keeps_its_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a text file gives it in pieces and a row as one, and as a duplicate of that."""
    monkeypatch.setattr(source, "PIECE", 100)
    given = [f"{i}\n" + "\n".join(texts(4, i)) for i in range(100)]
    row = validation(
        write(tmp_path / "a.jsonl", jsonl([{"text": t} for t in given])), tmp_path / "a.h5", val_fraction=0.3
    )
    write(tmp_path / "d/a.txt", "<|e|>".join(given))
    piece = validation(tmp_path / "d", tmp_path / "d.h5", val_fraction=0.3, separator="<|e|>")
    assert piece == row and 10 < len(row) < 50
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "d")
    both = prepared(tmp_path / "d", tmp_path / "both.h5", separator="<|e|>", duplicates="drop")
    assert both.meta["duplicates"] == 100 and len(everything(both)) == 100


@pytest.mark.parametrize("kind", ROWS)
def test_duplicates(kind: str, tmp_path: Path) -> None:
    """The first stays, in its place; or all, on one side; both ways they are counted."""
    rows = ROWS[kind](200)
    again = rows[:150] + rows[30:60] + rows[150:] + rows[:5]
    path, once = write(tmp_path / "a.jsonl", jsonl(again)), write(tmp_path / "once.jsonl", jsonl(rows))
    drop = prepared(path, tmp_path / "drop.h5", kind=kind, duplicates="drop")
    assert arrays(drop) == arrays(prepared(once, tmp_path / "once.h5", kind=kind))
    assert drop.meta["duplicates"] == 35
    keep = prepared(path, tmp_path / "keep.h5", kind=kind, duplicates="keep")
    assert keep.meta["duplicates"] == 35 and keep.meta["dropped"] == {}
    assert keep.meta["train_documents"] + keep.meta["val_documents"] == n_documents(again)
    assert not set(documents(keep, "train")) & set(documents(keep, "val"))
    if kind in ("prompts", "groups"):  # with another answer, or other rewards, it is another row
        others = {"prompts": {"answer": "none"}, "groups": {"completions": ["a", "b"], "rewards": [8, 9]}}[kind]
        other = write(tmp_path / "other.jsonl", jsonl(rows + [row | others for row in rows[:7]]))
        assert prepared(other, tmp_path / "other.h5", kind=kind).meta["duplicates"] == 0


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_the_last_characters(fraction: float, tmp_path: Path) -> None:
    """split=position of rows: as one text with its rows' borders, cut at int(n * (1 - fraction)) characters."""
    given = texts(60)
    whole = "".join(given)
    cut = int(len(whole) * (1 - fraction))
    ready = prepared(
        write(tmp_path / "a.jsonl", jsonl([{"text": t} for t in given])),
        tmp_path / "a.h5", split="position", val_fraction=fraction,
    )  # fmt: skip
    train, val = documents(ready, "train"), documents(ready, "val")
    assert "".join(train) == whole[:cut] and "".join(val) == whole[cut:]
    assert train[:-1] + val[1:] == given[: len(train) - 1] + given[len(train) :]
    assert ready.meta["train_characters"] == cut and ready.meta["val_characters"] == len(whole) - cut


@pytest.mark.parametrize("sizes", [[1000], [700, 300], [100, 600, 300], [150, 450, 400], [200, 200, 200, 400]])
def test_a_cut_at_the_border_of_a_piece(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut between two pieces ends a document of training all the same."""
    monkeypatch.setattr(source, "PIECE", 100)
    parts = ["abcdefgh"[i] * n for i, n in enumerate(sizes)]
    path = write(tmp_path / "a.txt", "<|e|>".join(parts))
    ready = prepared(path, tmp_path / "a.h5", split="position", val_fraction=0.5, separator="<|e|>")
    expected: tuple[list[str], list[str]] = ([], [])
    at = 0
    for part in parts:
        for side, piece in enumerate((part[: max(500 - at, 0)], part[max(500 - at, 0) :])):
            expected[side].extend([piece] * bool(piece))
        at += len(part)
    if len(expected[0]) == 1:  # nothing behind one text: no end token, and no end
        assert bytes(ready.ids("train")[:].tolist()).decode() == expected[0][0]
    assert (documents(ready, "train"), documents(ready, "val")) == expected


def test_rows_are_not_cut(tmp_path: Path) -> None:
    """split=position of all but text: whole rows, the last ones by their characters."""
    for kind in ("chats", "pairs", "labelled", "prompts", "groups"):
        path = write(tmp_path / f"{kind}.jsonl", jsonl(ROWS[kind](100)))
        ready = prepared(path, tmp_path / f"{kind}.h5", kind=kind, split="position", val_fraction=0.2)
        every = n_documents(ROWS[kind](100))
        assert abs(ready.meta["val_documents"] - every / 5) <= 6
        assert ready.meta["train_documents"] + ready.meta["val_documents"] == every


def test_a_split_that_would_be_empty(tmp_path: Path) -> None:
    """Refused with what can be changed, before a tokenizer is made."""
    cases = [([{"text": "one alone"}], {}), ([{"text": f"row {i}"} for i in range(5)], {"val_fraction": 0.0001})]
    for rows, settings in cases:
        with pytest.raises(Refusal) as caught:
            prepared(write(tmp_path / "a.jsonl", jsonl(rows)), tmp_path / "a.h5", make=None, **settings)  # type: ignore[arg-type]
        words = (
            "a.jsonl",
            f"none of {len(rows)} document",
            "split",
            "val_fraction",
            "split=position",
            "more documents",
        )
        assert all(w in str(caught.value) for w in words) and "data." not in str(caught.value)
    with pytest.raises(Refusal, match="val_fraction") as caught:
        prepared(write(tmp_path / "b.txt", "ab"), tmp_path / "b.h5", split="position", val_fraction=0.99, make=None)  # type: ignore[arg-type]
    assert "split=position" not in str(caught.value)
    one = write(tmp_path / "c.jsonl", jsonl([{"text": "hello world, this is text"}]))
    assert len(everything(prepared(one, tmp_path / "c.h5", split="position"))) == 2


# ---------------------------------------------------------------- 4. what is counted


def percentile(lengths: list[int], q: int) -> int:
    lengths = sorted(lengths)
    at = q / 100 * (len(lengths) - 1)
    low, high = lengths[int(at)], lengths[min(int(at) + 1, len(lengths) - 1)]
    return int(low + (high - low) * (at - int(at)))


def naive(lengths: list[int], characters: int) -> dict[str, Any]:
    return {
        "tokens": sum(lengths),
        "documents": len(lengths),
        "characters": characters,
        "lengths": {str(q): percentile(lengths, q) for q in (0, 5, 50, 95, 100)},
    }


def test_statistics_of_text(tmp_path: Path) -> None:
    """Against the tokenizers library and sums over the documents: nothing dropped is counted, nothing kept is not."""
    given = texts(500) + [varied_text(7_000)]
    rows: list[Any] = [{"text": t} for t in given]
    rows[100:100] = [{"text": ""}, {"text": None}, 5, {"text": 5}, {"text": 6}, {"txt": "a"}, rows[0], rows[1], rows[0]]
    path = write(tmp_path / "a.jsonl", jsonl(rows) + b"{oops\n\xff\n")
    ready = prepared(path, tmp_path / "a.h5", BPE, on_error="skip", duplicates="drop", val_fraction=0.2)
    meta = ready.meta
    assert (
        meta["duplicates"] == 3
        and sum(meta["dropped"].values()) == 8
        and meta["dropped"]["text is a number, not a string"] == 2
    )
    assert sorted(everything(ready)) == sorted(given)
    backend = Backend.from_str(ready.files["tokenizer.json"])
    for split in ("train", "val"):
        parts = documents(ready, split)
        lengths = [len(backend.encode(t).ids) + 1 for t in parts]
        wanted = naive(lengths, sum(map(len, parts))) | {"bytes": sum(len(t.encode()) for t in parts)}
        assert {k: meta[f"{split}_{k}"] for k in wanted} == wanted
        ids = [i for t in parts for i in [*backend.encode(t).ids, ready.tokenizer.eos]]
        assert ready.ids(split)[:].tolist() == ids


def test_statistics_of_rows(tmp_path: Path) -> None:
    """Rows that fall out only when they are encoded are in no number but the dropped ones."""
    known = tok.char(
        [varied_text(5000) + "what is it?"], [varied_text(5000) + "what is it?0123456789 +."], unknown="error"
    )
    rows: list[dict] = [{"prompt": f"what is {i}?", "completion": f"it is {i}."} for i in range(200)]
    for i in range(0, 200, 10):
        rows[i]["completion"] = "日本" * 50  # no such character: unusable in the second pass
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    ready = prepared(path, tmp_path / "a.h5", lambda *_: known, kind="chats", on_error="skip", val_fraction=0.3)
    assert ready.meta["dropped"] == {"the row has characters that the tokenizer does not know": 20}
    for split in ("train", "val"):
        parts = documents(ready, split)
        wanted = naive([len(p) for p in parts], sum(map(len, parts)))
        assert {k: ready.meta[f"{split}_{k}"] for k in wanted} == wanted
    assert ready.meta["train_documents"] + ready.meta["val_documents"] == 180
    with pytest.raises(Refusal, match=r"a.jsonl:1: the row has characters .*U\+65E5"):
        prepared(path, tmp_path / "b.h5", lambda *_: known, kind="chats")


def test_a_piece_that_falls_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document whose last piece cannot be encoded does not grow together with the next one."""
    monkeypatch.setattr(source, "PIECE", 100)
    known = tok.char(["abc\n"], ["abc\n"], unknown="error")
    parts = ["abc\n" * 60, "abc\n" * 50 + "Z", "cba\n" * 10] * 20
    path = write(tmp_path / "a.txt", "<|e|>".join(parts))
    settings: dict = {"separator": "<|e|>", "on_error": "skip", "split": "position"}
    found = everything(prepared(path, tmp_path / "a.h5", lambda *_: known, **settings))
    assert {"abc\n" * 60, "cba\n" * 10} <= set(found) and not any(
        "cba" in d and "abc" in d.replace("cba", "") for d in found
    )


def test_attributes(tmp_path: Path) -> None:
    """Everything that says what the file was made of, in the file; checksums of every data set, and they hold."""
    path = write(tmp_path / "d/b.jsonl", jsonl(ROWS["chats"](50)))
    write(tmp_path / "d/a.jsonl.gz", gzip.compress(jsonl(ROWS["chats"](150)[50:])))
    target = tmp_path / "a.h5"
    settings = {"rename": (("messages", "messages"),), "train_on": "completion", "val_fraction": 0.2}
    ready = prepared(tmp_path / "d", target, BPE, kind="chats", key="made so", **settings)
    meta, files = ready.meta, [tmp_path / "d/a.jsonl.gz", path]
    hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    assert [(f["name"], f["bytes"], f["sha256"]) for f in meta["sources"]] == [
        (f.name, f.stat().st_size, h) for f, h in zip(files, hashes)
    ]
    assert meta["tokenizer_sha256"] == hashlib.sha256(ready.files["tokenizer.json"].encode()).hexdigest()
    assert meta["tokenizer_key"] == "made so" and meta["files"] == 2 and meta["vocab_size"] == 320
    wanted = {"kind": "chats", "split": "hash", "train_on": "completion", "val_fraction": 0.2, "on_error": "raise"}
    assert wanted.items() <= meta["settings"].items() and meta["settings"]["rename"] == [["messages", "messages"]]
    assert meta["source"] == str(tmp_path / "d") and meta["kind"] == "chats"
    assert len(checked_hashes(target)) == len(ready.store.keys)
    store.verify(target)
    assert preparation.content_hash(source_of(tmp_path / "d", kind="chats")) == meta["sha256"]
    moved = Path(shutil.copytree(tmp_path / "d", tmp_path / "elsewhere"))
    assert preparation.content_hash(source_of(moved, kind="chats")) == meta["sha256"]


# ---------------------------------------------------------------- 5. the script


def test_a_second_run(tmp_path: Path) -> None:
    """The same command says that the work is done; another one does not replace the file."""
    path = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300)))
    tokenizer = write(tmp_path / "t" / "tokenizer.json", tok.byte([], []).to_json())
    target = tmp_path / "new" / "a.h5"
    command = (
        f"from={path}",
        f"to={target}",
        f"tokenizer.path={tokenizer.parent}",
        "tokenizer=file",
        "val_fraction=0.1",
    )
    first = run("prepare.py", *command)
    assert first.code == 0 and first.err == "" and f"train.py data=h5 data.path={target}" in first.out
    for word in ("documents", "tokens", "duplicates 0", "bad rows   0"):
        assert word in first.out
    before = (target.read_bytes(), target.stat().st_mtime_ns)
    again = run("prepare.py", *command, "processes=1")
    assert again.code == 0 and "is there already, made of the same files" in again.out and again.err == ""
    assert again.out.splitlines()[1:] == first.out.splitlines()[-len(again.out.splitlines()) + 1 :]
    for change in ("val_fraction=0.2", "tokenizer=byte"):
        without = [c for c in command if not (change == "tokenizer=byte" and c.startswith("tokenizer"))]
        refused(run("prepare.py", *without, change), str(target), "choose another name, or delete it")
    tokenizer.write_text(tok.bpe(["abc"] * 9, [], vocab_size=262).to_json())
    refused(run("prepare.py", *command), "choose another name")
    tokenizer.write_text(tok.byte([], []).to_json())
    path.write_bytes(path.read_bytes().replace(b"0.7 ", b"0.8 "))
    refused(run("prepare.py", *command), "made of other files")
    assert before == (target.read_bytes(), target.stat().st_mtime_ns) and left_beside(target) == []


def test_killed_between_the_file_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its name and the work's folder is still there: the same command takes it away."""
    path, target = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300))), tmp_path / "out" / "a.h5"
    command = (f"from={path}", f"to={target}", "tokenizer=byte", "progress=none", "processes=1")
    program = starting(
        "import os",
        "real = prepare.shutil.rmtree",
        "prepare.shutil.rmtree = lambda path, **kwargs: real(path, **kwargs) if kwargs else os._exit(9)",
    )
    assert run_fresh("prepare.py", *command, program=program).code == 9
    assert target.exists() and left_beside(target) != []
    assert run("prepare.py", *command).code == 0
    assert left_beside(target) == []


@pytest.mark.parametrize(
    "overrides,words",
    [
        ({"from": None}, ["from"]),
        ({"to": None}, ["to"]),
        ({"from": "{tmp}/nowhere.jsonl"}, ["nowhere.jsonl does not exist", "from="]),
        ({"from": "{tmp}/*.md"}, ["matches no file"]),
        ({"to": "{tmp}"}, ["is a folder", "corpus.h5"]),
        ({"frm": "x"}, ["unknown key frm", "did you mean from"]),
        ({"format": "shargpt"}, ["format=shargpt", "sharegpt"]),
        ({"format": "messages"}, ["format=messages", "kind=chats"]),
        ({"on_error": "ignore"}, ["on_error", "skip"]),
        ({"val_fraction": "1"}, ["val_fraction=1"]),
        ({"separator": ""}, ["separator is empty"]),
        ({"processes": "0"}, ["processes=0"]),
        ({"tokenizer": "stored"}, ["tokenizer=bpe"]),
        ({"tokenizer.vocab_size": "100"}, ["vocab_size=100 is too small"]),
        ({"tokenizer": "file", "tokenizer.path": "{tmp}/none"}, ["there is no tokenizer file"]),
    ],
)
def test_what_is_mistyped(overrides: dict[str, str | None], words: list[str], tmp_path: Path) -> None:
    """One line that says what to type, before anything is read: nothing is left of the attempt."""
    path = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300)))
    typed = {"from": str(path), "to": f"{tmp_path}/out.h5"} | overrides
    done = run("prepare.py", *(f"{k}={v.format(tmp=tmp_path)}" for k, v in typed.items() if v is not None))
    refused(done, *words)
    for option in ("data.", "data=", "strategy="):
        assert option not in done.err, "prepare.py has no such keys"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    """In use by another process: exit code 2. No place for a file: 4, with the path."""
    import fcntl

    path = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](50)))
    with (tmp_path / ".busy.h5.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):  # the first one that is refused leaves the lock in its place
            done = run("prepare.py", f"from={path}", f"to={tmp_path}/busy.h5", "processes=1")
            refused(done, "busy.h5", "another process")
    refused(run("prepare.py", f"from={path}", f"to={path}/x.h5", "processes=1"), str(path), code=4)
    refused(run("prepare.py", f"from={path}", "to=/proc/nothing/x.h5", "processes=1"), "/proc/nothing", code=4)


def test_a_full_disk(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: 4 at each stage, what was done is kept, and with room it ends well."""
    target = tmp_path / "b.h5"
    command = (f"from={corpus}", f"to={target}", *SETTINGS, "processes=1")
    ids = len(open_prepared(unbroken).ids("train")) * 2
    stages = {60_000: "scan", ids // 2: "encode", ids + 50_000: "encoded"}  # bytes: what the limit stops
    for limit, stage in stages.items():
        limited = starting(
            "import resource, signal", "journal.COMMIT_SECONDS, source.UNIT = 0, 1 << 17",
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)", f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)",
        )  # fmt: skip
        refused(run_fresh("prepare.py", *command, program=limited), str(target), "File too large", code=4)
        assert state_of(target)["stage"] == stage and not target.exists()
    began = time.monotonic()
    assert run("prepare.py", *command).code == 0 and time.monotonic() - began < 30
    same_file(target, unbroken)


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    """Between the passes: what was counted is not what is encoded, and the checksum not that of what was read."""
    path = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300)))
    with Workers(1) as workers:
        whole = Preparation(source_of(path), tmp_path / "a.h5", workers, "key")
        whole.scan()
        write(path, jsonl([{"text": t} for t in texts(250, seed=4)]))
        with pytest.raises(Refusal, match="a.jsonl.*changed"):
            whole.encode(tok.byte([], []))
        whole.journal.close()


def test_a_journal_that_is_none(tmp_path: Path) -> None:
    """Empty or torn after a power cut: the work begins anew."""
    path = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300)))
    for i, content in enumerate((b"", b'{"key": "', b"[]", b"\0" * 100)):
        write(tmp_path / f".{i}.h5.building" / "state.json", content)
        assert len(everything(prepared(path, tmp_path / f"{i}.h5"))) == 300


# ---------------------------------------------------------------- 6. train.py on what people bring


def overrides(tmp_path: Path, **changes: object) -> list[str]:
    settings = {
        "tokenizer": "byte", "model.dim": 16, "model.n_layers": 1, "model.attn.n_heads": 2, "model.attn.n_kv_heads": 1, "model.max_len": 64,
        "batch_size": 4, "max_steps": 2, "eval_iters": 1, "sample_tokens": 2, "threads": 1, "progress": "lines", "tracker": "jsonl",
        "runs_dir": tmp_path / "runs", "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    return [f"{k}={v}" for k, v in {**settings, **changes}.items()]


def in_cache(tmp_path: Path) -> Prepared:
    (path,) = (tmp_path / "cache" / "tokens").glob("*.h5")
    return open_prepared(path)


@pytest.mark.parametrize(
    "kind,strategy,name,targets",
    [
        ("text", "seq", "packed.jsonl.gz", None),
        ("chats", "sft", "groups.parquet", "⟦it is {i}é.<|im▁end|>⟧"),
        ("pairs", "dpo", "pretty.json", "⟦yes {i}<|end▁of▁sentence|>⟧"),
        ("labelled", "kto", "pretty.json", "⟦yes {i}<|end▁of▁sentence|>⟧"),
        ("prompts", "grpo", "packed.jsonl.zst", "what is {i} + 1?"),
        ("groups", "grpo", "packed.json.gz", "⟦no {i}<|end▁of▁sentence|>⟧"),
    ],
)
def test_dry_run(kind: str, strategy: str, name: str, targets: str | None, tmp_path: Path) -> None:
    """What would be trained on, with targets in ⟦⟧ where there are no colours; nothing but the cache is written."""
    rows = ROWS[kind](200)
    bad: list[Any] = [{"x": 1}, {"x": 2}, {"y": "word"}] if "parquet" not in name else []
    path = write(tmp_path / name, containers(rows + bad)[name])
    done = run(
        "train.py",
        f"data={kind}",
        f"strategy={strategy}",
        f"data.path={path}",
        "data.on_error=skip",
        "dry_run=true",
        *overrides(tmp_path),
    )
    assert (done.code, done.err) == (0, "") and not (tmp_path / "runs").exists()
    if targets:
        assert any(targets.format(i=i) in done.out for i in range(200)), done.out
        assert ("⟦" in done.out) == (kind != "prompts") and "fields: {" in done.out or kind != "prompts"
    assert "\x1b" not in done.out and f"{kind} from {tmp_path}, 1 file" in done.out
    meta = in_cache(tmp_path).meta
    assert sum(meta["dropped"].values()) == len(bad)
    if bad:
        assert f"{len(bad)} left out: the row lacks keys for data={kind}" in done.out
    if kind == "labelled":
        assert re.search(r"sample 0, (un)?desirable, document 0: \d+ tokens", done.out)
        n = [int(x) for x in re.findall(r"(\d+) (?:un)?desirable", done.out.rpartition("rows  ")[2])]
        assert sum(n) == meta["train_documents"] and n[0] < n[1]
    if kind == "groups":
        assert re.search(r"sample 0, completion 0, (reward (-2.25|0.5)|no reward), document 0: \d+ tokens, ", done.out)
        assert re.search(r"sample 1, completion 1, (reward 3|no reward), document 0: ", done.out)
        assert "samples of 2 to 3 completions, " in done.out and " without signal (rewards all alike)" in done.out
    cut = kind == "text"  # the last characters are validation: of one document too
    assert meta["train_documents"] + meta["val_documents"] == n_documents(rows) + cut
    assert f"in {meta['train_documents']:,} documents" in done.out


def test_rows_that_fall_out_are_counted(tmp_path: Path) -> None:
    """On the screen and in the file: rows that cannot be used, those that are cut, those that have no target left, the end
    token that a cut takes (it is the cut that is counted)."""
    rows = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i}."}]}
        for i in range(300)
    ]
    rows[10]["messages"][1]["content"] = None  # type: ignore[typeddict-item]
    rows[11]["messages"][0]["content"] = None  # type: ignore[typeddict-item]
    rows[12] = {"messages": []}
    rows[13]["messages"][1]["role"] = "asistant"
    for i in range(20, 30):
        rows[i]["messages"][0]["content"] = f"{i} " + "long " * 50  # the prompt fills the window
    for i in range(30, 40):
        rows[i]["messages"][1]["content"] = f"{i} " + "long " * 50  # the end token is cut off
    path = write(tmp_path / "a.jsonl", jsonl(rows) + b'{"messages": NaN}\n')
    shown = run(
        "train.py",
        "strategy=sft",
        f"data.path={path}",
        "data.on_error=skip",
        "data.split=position",
        "dry_run=true",
        *overrides(tmp_path),
    )
    ran = run(
        "train.py",
        "strategy=sft",
        f"data.path={path}",
        "data.on_error=skip",
        "data.split=position",
        *overrides(tmp_path),
    )
    assert (shown.code, ran.code) == (0, 0), shown.err + ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("rows ")]
    assert (
        line.split(maxsplit=1)[1]
        == next(s for s in shown.out.splitlines() if s.startswith("rows ")).split(maxsplit=1)[1]
    )
    dropped = in_cache(tmp_path).meta["dropped"]
    assert (
        dropped["messages[N].content is null"] == 2 and dropped["messages is empty"] == 1 and sum(dropped.values()) == 5
    )
    for words in (
        "2 left out: messages[N].content is null",
        "1 left out: messages is empty",
        "20 overlong, cut on the right",
        "10 no target",
    ):
        assert words in line, line
    (run_folder,) = (tmp_path / "runs").glob("2*")
    noted = json.loads((run_folder / "meta" / "data.json").read_text())
    assert noted["dropped"] == dropped


def test_keys_by_another_name(tmp_path: Path) -> None:
    """rename and format, of train.py and prepare.py; what prepare.py made is trained on."""
    rows = [{"frage": f"was ist {i}?", "antwort": f"es ist {i}."} for i in range(100)]
    path = write(tmp_path / "a.parquet", parquet(rows))
    refused(
        run("train.py", "strategy=sft", f"data.path={path}", *overrides(tmp_path)),
        "a.parquet:1: ",
        "keys found: frage, antwort",
        "data.rename={",
    )
    rename = "rename={prompt: frage, completion: antwort}"
    done = run(
        "train.py",
        "strategy=sft",
        f"data.path={path}",
        f"data.{rename}",
        "data.format=completion",
        "dry_run=true",
        *overrides(tmp_path),
    )
    assert done.code == 0 and "⟦es ist " in done.out and "was ist " in done.out.replace("⟦", "")
    target = tmp_path / "a.h5"
    made = run(
        "prepare.py",
        f"from={path}",
        f"to={target}",
        "kind=chats",
        rename,
        "tokenizer=byte",
        "val_fraction=0.2",
        "processes=1",
    )
    assert made.code == 0 and f"python train.py data=h5 data.path={target} strategy=sft" in made.out, made.err
    typed = [o for o in overrides(tmp_path) if not o.startswith("tokenizer")]
    trained = run("train.py", "data=h5", f"data.path={target}", "strategy=sft", *typed)
    assert trained.code == 0 and "rows" in trained.out, trained.err
    # The example line of the kind that was not asked for is what to type.
    refused(run("prepare.py", f"from={path}", f"to={tmp_path}/b.h5", "kind=chats", "processes=1"), "rename={")


# ---------------------------------------------------------------- 7. malformed files

SYNTAX: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"text": "a', "not JSON"),
    "single quotes": (b"{'text': 'a'}", "not JSON"),
    "a comma too many": (b'{"text": "a",}', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "not JSON at all": (b"once upon a time", "not JSON"),
    "NUL behind": (b'{"text": "a"}\0\0', "not JSON"),
    "NUL inside": (b'{"text": "a\0b"}', "not JSON"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN"),
    "Infinity": (b'{"text": "a", "x": [Infinity]}', "Infinity"),
    "-Infinity": (b'{"text": "a", "x": -Infinity}', "-Infinity"),
    "1e999": (b'{"text": "a", "x": 1e999}', "too large"),
    "too many digits": (b'{"text": "a", "x": ' + b"7" * 5000 + b"}", "too long"),
    "deep arrays": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "deep objects": (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "an array": (b'["a"]', "an array"),
    "a string": (b'"a"', "a string"),
    "a number": (b"5", "a number"),
    "null": (b"null", "null"),
    "latin-1": ('{"text": "café"}'.encode("latin-1"), "not UTF-8"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-be"), "not JSON"),
    "too long": (b'{"text": "' + b"x" * source.MAX_ROW + b'"}', "more than 16,777,216"),
}  # fmt: skip

USELESS: dict[str, dict[str, tuple[dict, str]]] = {
    "text": {
        "lone surrogate": ({"text": "a\ud800b"}, "surrogate"),
        "null": ({"text": None}, "null"),
        "a list": ({"text": ["a"]}, "an array"),
        "empty": ({"text": ""}, "empty"),
        "white space": ({"text": " \n\t"}, "white space"),
        "another key": ({"content": "a word"}, "rename={text: content}"),
        "a chat": ({"messages": [{"role": "user", "content": "a"}]}, "=chats"),
        "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "=pairs"),
    },
    "chats": {
        "content null": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "messages[1].content is null"),
        "unknown role": ({"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}, "robot"),
        "no role": ({"messages": [{"content": "a"}]}, "role"),
        "empty": ({"messages": []}, "messages is empty"),
        "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        "a string": ({"messages": "hello"}, "a string"),
        "strings": ({"messages": ["hello"]}, "messages[0]"),
        "who": ({"conversations": [{"from": "someone", "value": "a"}]}, "someone"),
        "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        "completion null": ({"prompt": "a", "completion": None}, "null"),
        "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "=pairs"),
        "a group": ({"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]}, "=groups"),
        "labelled": ({"prompt": "a", "completion": "b", "label": False}, "format=completion"),
    },
    "pairs": {
        "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        "the same chats": ({"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "b"}]}, "the same"),
        "one missing": ({"prompt": "a", "chosen": "b"}, "rejected"),
        "null": ({"prompt": "a", "chosen": "b", "rejected": None}, "null"),
        "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
        "a text": ({"text": "a"}, "=text"),
    },
    "prompts": {
        "empty": ({"prompt": ""}, "prompt is empty"),
        "null": ({"prompt": None, "answer": "5"}, "null"),
        "answered": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "nothing to answer"),
        "surrogate beside": ({"prompt": "a", "answer": "\udfff"}, "surrogate"),
        "another key": ({"task": "a", "answer": "b"}, "rename={prompt: "),
    },
    "groups": {
        "another number": ({"prompt": "a", "completions": ["a", "b"], "rewards": [1]}, "completions and rewards differ in number: 2 and 1"),
        "one alone": ({"prompt": "a", "responses": ["a"], "rewards": [1]}, "responses has fewer than two"),
        "no reward": ({"prompt": "a", "completions": ["a", "b"], "rewards": [None, None]}, "rewards are all null"),
        "a string": ({"prompt": "a", "completions": ["a", "b"], "rewards": [1, "0"]}, "rewards[1] is a string"),
        "too large": ({"prompt": "a", "completions": ["a", "b"], "rewards": [1, 1e300]}, "rewards[1] is not finite"),
        "empty": ({"prompt": "a", "completions": ["a", ""], "rewards": [1, 0]}, "completions[1] is empty"),
        "unknown role": ({"prompt": "a", "completions": ["a", [{"role": "robot", "content": "b"}]], "rewards": [1, 0]}, "robot"),
        "answered": ({"prompt": [{"role": "assistant", "content": "b"}], "completions": ["a", "b"], "rewards": [1, 0]}, "nothing to answer"),
        "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "=pairs"),
    },
}  # fmt: skip
LINES = [("text", name, line, word) for name, (line, word) in SYNTAX.items()]
LINES += [(kind, n, json.dumps(row).encode(), w) for kind, rows in USELESS.items() for n, (row, w) in rows.items()]


@pytest.mark.parametrize("kind,name,line,word", LINES, ids=[f"{k}-{n}" for k, n, _, _ in LINES])
def test_a_bad_line(kind: str, name: str, line: bytes, word: str, tmp_path: Path) -> None:
    """Among good ones: refused with file and line; or left out and counted, and nothing else is lost."""
    good = jsonl(ROWS[kind](80)).splitlines(keepends=True)
    path = write(tmp_path / "a.jsonl", b"".join(good[:40]) + line + b"\n" + b"".join(good[40:]))
    with pytest.raises(Refusal) as caught:
        prepared(path, tmp_path / "a.h5", kind=kind)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}:41: ")
        and word in message
        and message.endswith("on_error=skip leaves such rows out and counts them")
    )
    assert "\n" not in message and message.isprintable() and len(message) < 700
    for option in ("data.", "data=", "strategy="):
        assert option not in message, "prepare.py has no such keys"
    ready = prepared(path, tmp_path / "b.h5", kind=kind, on_error="skip")
    clean = prepared(write(tmp_path / "clean.jsonl", b"".join(good)), tmp_path / "c.h5", kind=kind)
    assert sum(ready.meta["dropped"].values()) == 1 and arrays(ready) == arrays(clean)


def damaged_h5(name: str, whole: Path, path: Path) -> Path:
    """A copy of a prepared file with something wrong."""
    content = whole.read_bytes()
    if name == "cut":
        return write(path, content[: len(content) // 2])
    if name == "flipped":
        with h5py.File(whole, "r") as f:
            at = f["train/tokens/00000"].id.get_offset() + 5
        return write(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    shutil.copy(whole, path)
    with h5py.File(path, "r+", libver=("v108", "v108")) as f:
        group = f["train/tokens"]
        del group["00000"]
        if name == "external link":
            group["00000"] = h5py.ExternalLink("/etc/passwd", "/x")
        elif name == "absurd shape":
            group.create_dataset("00000", (1 << 50,), "uint16")
        elif name == "absurd chunks":
            group.create_dataset("00000", (1 << 50,), "uint16", chunks=(1 << 20,))
    return path


FILES: dict[str, tuple[str, str | Callable[[Path], Any], list[str]]] = {
    # what: (file's name, content or what makes it, words of the message)
    "missing": ("a.jsonl", lambda p: None, ["a.jsonl does not exist"]),
    "empty": ("a.jsonl", "", ["a.jsonl is empty"]),
    "blank lines": ("a.jsonl", "\n \n\r\n", ["a.jsonl", "no usable row"]),
    "an empty array": ("a.json", "[]", ["a.json", "no usable row"]),
    "a folder of nothing": ("d", lambda p: write(p / "x.bin", b"\0\1\2"), ["without text"]),
    "latin-1": ("a.txt", lambda p: write(p, ("a" * 5000 + "é").encode("latin-1")), ["a.txt", "byte 5000 is 0xe9"]),
    "utf-16": ("a.txt", lambda p: write(p, "hello".encode("utf-16")), ["a.txt is not UTF-8"]),
    "a cut character": ("a.txt", lambda p: write(p, "aaé".encode()[:-1]), ["a.txt is not UTF-8"]),
    "cut gz": ("a.jsonl.gz", lambda p: write(p, gzip.compress(jsonl(ROWS["text"](500)))[:-20]), ["a.jsonl.gz is damaged or cut off"]),
    "no gz": ("a.jsonl.gz", lambda p: write(p, jsonl(ROWS["text"](5))), ["a.jsonl.gz is damaged or cut off"]),
    "flipped gz": ("a.txt.gz", lambda p: write(p, gzip.compress(b"abc" * 999)[:-6] + b"\0" * 6), ["a.txt.gz is damaged"]),
    "cut zst": ("a.jsonl.zst", lambda p: write(p, zst(jsonl(ROWS["text"](500)))[:-20]), ["a.jsonl.zst is damaged or cut off"]),
    "cut between": ("a.jsonl.zst", lambda p: write(p, zst(jsonl(ROWS["text"](500)), 1) + zst(b"{}", 1)[:3]), ["is damaged or cut off"]),
    "no zst": ("a.json.zst", "[]", ["a.json.zst is damaged or cut off"]),
    "cut parquet": ("a.parquet", lambda p: write(p, parquet(ROWS["text"](500))[:-50]), ["a.parquet is not a Parquet file"]),
    "no parquet": ("a.parquet", "once upon a time", ["a.parquet is not a Parquet file"]),
    "flipped parquet": ("a.parquet", lambda p: write(p, b"PAR1" + b"\xff" * 900 + parquet(ROWS["text"](500))[904:]), ["a.parquet"]),
    "parquet of numbers": ("a.parquet", lambda p: write(p, parquet([{"text": 5}] * 10)), ["a.parquet:1: text is a number"]),
    "parquet without text": ("a.parquet", lambda p: write(p, parquet([{"body": "abc"}] * 10)), ["a.parquet:1: ", "rename={text: body}"]),
    "parquet of bytes": ("a.parquet", lambda p: write(p, parquet([{"text": b"abc"}] * 10)), ["a.parquet:1: text is bytes"]),
    "cut array": ("a.json", '[{"text": "a"},\n{"text": "b"}', ["a.json:2: the array is cut off"]),
    "array of text": ("a.json", '[{"text": "abc"},\n"b"]', ["a.json:2: ", "a string"]),
    "array with a mistake": ("a.json", '[{"text": "abc"},\n{"text": oops}]', ["a.json:2: not JSON"]),
}  # fmt: skip
H5 = {
    "cut": "a.h5",
    "flipped": "train/tokens",
    "external link": "leads elsewhere",
    "absurd shape": "never written",
    "absurd chunks": "train/tokens",
}


def quick(name: str, done: Done, cpu: float = 1) -> None:
    """Under a second of this machine's time, whatever else it does meanwhile; two with a Python that has to start."""
    assert done.cpu < cpu and done.seconds < 8, (name, done.cpu, done.seconds)


def run_quickly(name: str, fresh: bool, *overrides: object) -> Done:
    """A refusal, which comes at once. `fresh` counts what it takes to start too."""
    done = (run_fresh if fresh else run)(name, *overrides)
    quick(" ".join(map(str, (name, *overrides))), done, 2 if fresh else 1)
    return done


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name: str, tmp_path: Path) -> None:
    """Refused by the scripts, in one line, at once; on_error=skip does not make a file whole."""
    file, content, words = FILES[name]
    path = tmp_path / file
    write(path, content) if isinstance(content, str) else content(path)
    at = list(FILES).index(name)
    if at % 2:
        done = run_quickly("train.py", at == 1, "data=text", f"data.path={path}", *overrides(tmp_path))
    else:
        done = run_quickly("prepare.py", at == 0, f"from={path}", f"to={tmp_path}/out.h5", "processes=1")
    refused(done, *words)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out.h5").exists()
    if "rows" not in name and file != "d" and "parquet " not in name and name != "array of text":
        with pytest.raises(Refusal):
            prepared(path, tmp_path / "skip.h5", on_error="skip")


@pytest.mark.parametrize("name", ["cut", "flipped", "external link", "absurd shape", "absurd chunks"])
def test_a_bad_h5(name: str, tmp_path: Path) -> None:
    """Links that lead to other files, shapes that fill the memory, damage: refused before anything is read."""
    made = write(tmp_path / "a.jsonl", jsonl(ROWS["text"](300)))
    prepared(made, tmp_path / "whole.h5")
    path = damaged_h5(name, tmp_path / "whole.h5", tmp_path / "a.h5")
    typed = [o for o in overrides(tmp_path) if not o.startswith("tokenizer")]
    done = run_quickly("train.py", name == "cut", "data=h5", f"data.path={path}", *typed)
    refused(done, str(path), H5[name])


PICKED = [
    "text-deep arrays",
    "text-too long",
    "chats-unknown role",
    "pairs-the same",
    "prompts-answered",
    "groups-another number",
]


@pytest.mark.parametrize("case", [c for c in LINES if f"{c[0]}-{c[1]}" in PICKED], ids=PICKED)
def test_a_bad_line_of_train(case: tuple[str, str, bytes, str], tmp_path: Path) -> None:
    """train.py too ends at once, with the line."""
    kind, name, line, word = case
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[kind](40)) + line + b"\n")
    strategy = STRATEGIES[kind]
    settings = (f"data={kind}", f"strategy={strategy}", f"data.path={path}", *overrides(tmp_path))
    done = run_quickly("train.py", name == "deep arrays", *settings)
    refused(done, f"{path}:41: ", word, "data.on_error=skip")


def test_only_bad_rows(tmp_path: Path) -> None:
    """With on_error=skip nothing is left: refused with the count and the reasons."""
    path = write(tmp_path / "a.jsonl", jsonl([{"text": i} for i in range(7)] + [{"text": ""}] * 3) + b"oops\n")
    done = run("prepare.py", f"from={path}", f"to={tmp_path}/out.h5", "on_error=skip")
    refused(done, "no usable row", "11 dropped", "7 text is a number", "3 text is empty", "1 the line is not JSON")


def test_row_100000(tmp_path: Path) -> None:
    """Far down a file, behind lines that count: named, or skipped alone."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as f:
        for i in range(1, 100_101):
            f.write('{"text": oops}\n' if i == 100_000 else "\n" if i % 1000 == 7 else f'{{"text": "row {i}"}}\n')
    done = run_fresh("prepare.py", f"from={path}", f"to={tmp_path}/out.h5", "tokenizer=byte")
    refused(done, f"{path}:100000: the line is not JSON")
    assert done.cpu < 8, done.cpu
    ready = prepared(path, tmp_path / "b.h5", on_error="skip")
    assert sum(ready.meta["dropped"].values()) == 1
    assert ready.meta["train_documents"] + ready.meta["val_documents"] == 100_100 - 1 - 101


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_line_of_100_mb(name: str, tmp_path: Path) -> None:
    """Refused or left out without ever being held: memory as with a small file."""
    block = b"x" * 1_000_000
    opener = gzip.open if name.endswith("gz") else open
    with opener(tmp_path / name, "wb", **({"compresslevel": 1} if name.endswith("gz") else {})) as f:  # type: ignore[operator]
        f.write(b"[" if name == "a.json" else jsonl(ROWS["text"](50)))
        f.write(b'{"text": "')
        for _ in range(100):
            f.write(block)
        f.write(b'"}]' if name == "a.json" else b'"}\n' + jsonl([{"text": "the end"}]))
    command = (
        "prepare.py",
        f"from={tmp_path / name}",
        f"to={tmp_path}/out.h5",
        "processes=1",
        "tokenizer=byte",
        "val_fraction=0.2",
    )
    done = run_fresh(*command)
    refused(done, f"{name}:{1 if name == 'a.json' else 51}: ", "more than 16,777,216")
    assert done.peak < 250, done.peak
    quick(f"100 MB line, {name}, {done.peak:.0f} MB", done, 2)
    if name == "a.jsonl":
        skipped = run_fresh(*command, "on_error=skip")
        assert skipped.code == 0 and "bad rows   1, 1 the row has N bytes" in skipped.out and skipped.peak < 250
        assert "the end" in everything(open_prepared(tmp_path / "out.h5"))

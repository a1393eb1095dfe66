"""What is done to one unit of a source: hashes and lengths in the first pass, ids and targets in the second."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from etude.data.encode import encode, words
from etude.data.formats import BadRow, Example, normalise, parse
from etude.data.source import Source, Unit, cut
from etude.errors import Refusal
from etude.text import tokenizer as tok
from etude.text.chat import Message

DROP, TRAIN, VAL, CUT = 0, 1, 2, 3  # what becomes of an entry
SPLITS = {TRAIN: "train", VAL: "val"}

Arrays = dict[str, list[np.ndarray]]


def parts(kind: str) -> dict[str, str]:
    """The arrays of a split by name, with their types ("ids": as wide as the vocabulary needs). `ends` are the places in
    `tokens` where documents end; `targets` marks the tokens to be predicted; `fields` are a row's other keys as JSON;
    `labels` say of each document whether it is good (1); `rewards` are each document's, NaN where there is none, and
    `groups_ends` the places among the documents where groups end."""
    targets = {"targets": "uint8"}
    more = {
        "text": {},
        "chats": targets,
        "pairs": targets,
        "labelled": targets | {"labels": "uint8"},
        "prompts": {"fields": "uint8", "fields_ends": "int64"},
        "groups": targets | {"rewards": "float32", "groups_ends": "int64"},
    }
    return {"tokens": "ids", "ends": "int64"} | more[kind]


def scan_unit(source: Source, unit: Unit) -> list[tuple[bytes, int] | BadRow]:
    """(hash, characters) of each entry, or what is wrong with it. The first 8 bytes of the hash decide on which side a
    document is: with split=prompt they are the prompt's."""
    found: list[tuple[bytes, int] | BadRow] = []
    for entry in unit.entries:
        try:
            if entry.row == 0:
                found.append((text_hash([entry.content]), len(entry.content)))
                continue
            texts = list(words(example := example_of(source, entry.content)))
            if source.kind == "text":
                found.append((text_hash(cut(texts[0])), len(texts[0])))
            else:
                whole = json.dumps([example.prompt, example.answers, example.fields], sort_keys=True)
                digest = text_hash([whole])
                if source.split == "prompt" and (prompt := asked(example)):
                    digest = text_hash([json.dumps(prompt, sort_keys=True)])[:8] + digest[8:]
                found.append((digest, sum(map(len, texts))))
        except BadRow as error:
            found.append(error)
    return found


def asked(example: Example) -> str | list[Message]:
    """What stands before the first answer, the same for a chat, a prompt and a pair that ask the same; "" or [] for what
    begins with one."""
    if example.prompt or not example.answers or isinstance(example.answers[0], str):
        return example.prompt
    return list(itertools.takewhile(lambda m: m["role"] != "assistant", example.answers[0]))


def without_data(text: str) -> str:
    """A hint for train.py as one for prepare.py, whose settings are no part of a data node."""
    return re.sub(r" strategy=\w+|data\.", "", text).replace("data=", "kind=")


def text_hash(pieces: Iterable[str], before: bytes = b"") -> bytes:
    """Of a text, from its pieces' hashes: the same whether a file gives it in pieces or a row whole."""
    for piece in pieces:
        before = chained(before, hashlib.blake2b(piece.encode(), digest_size=16).digest())
    return before


def chained(before: bytes, digest: bytes) -> bytes:
    return hashlib.blake2b(before + digest, digest_size=16).digest() if before else digest


def example_of(source: Source, content: Any) -> Example:
    """The example that a row is. Raises BadRow."""
    if isinstance(content, BadRow):
        raise content
    row = parse(content) if isinstance(content, bytes) else content
    return normalise(row, source.kind, source.format, dict(source.rename))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to become of a unit's entries: DROP, TRAIN, VAL, or CUT, where a text's first `cut` characters are the last
    of training and the rest is validation. `begins`: which of them begin a document."""

    fate: np.ndarray
    begins: np.ndarray
    cut: int
    ends: tuple[bool, bool]  # whether an end token stands behind each document of (train, val)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> tok.Tokenizer:
    return tok.load(folder)


def encode_unit(source: Source, folder: Path, unit: Unit, plan: Plan) -> tuple[Arrays, list[tuple[int, BadRow]]]:
    """-> the arrays of `parts` by "<split>/<name>", with lengths instead of ends and "<split>/bytes" of text; and
    (entry, what is wrong with it). `folder` has the tokenizer's files."""
    tokenizer = _tokenizer(folder)
    out: Arrays = collections.defaultdict(list)
    bad: list[tuple[int, BadRow]] = []
    if source.kind == "text":
        _encode_texts(source, tokenizer, unit, plan, out, bad)
        return out, bad
    at = np.flatnonzero(plan.fate != DROP)
    examples = [example_of(source, unit.entries[i].content) for i in at]
    for i, example, documents in zip(at, examples, encode(examples, tokenizer, source.kind, source.train_on)):
        if isinstance(documents, BadRow):
            bad.append((int(i), documents))
            continue
        split = SPLITS[plan.fate[i]]
        out[f"{split}/characters"].append(np.array([sum(map(len, words(example)))]))
        for document in documents:
            out[f"{split}/tokens"].append(document.ids)
            out[f"{split}/ends"].append(np.array([len(document.ids)]))
            if source.kind != "prompts":
                out[f"{split}/targets"].append(document.targets.astype(np.uint8))
        if source.kind == "labelled":
            out[f"{split}/labels"].append(np.array(example.fields["labels"], dtype=np.uint8))
        if source.kind == "groups":
            rewards = [math.nan if r is None else r for r in example.fields["rewards"]]
            out[f"{split}/rewards"].append(np.array(rewards, dtype=np.float32))
            out[f"{split}/groups_ends"].append(np.array([len(rewards)]))
        if source.kind == "prompts":
            fields = np.frombuffer(json.dumps(example.fields, ensure_ascii=False).encode(), dtype=np.uint8)
            out[f"{split}/fields"].append(fields)
            out[f"{split}/fields_ends"].append(np.array([len(fields)]))
    return out, bad


def _encode_texts(
    source: Source, tokenizer: tok.Tokenizer, unit: Unit, plan: Plan, out: Arrays, bad: list[tuple[int, BadRow]]
) -> None:
    pieces: list[tuple[int, str, bool]] = []
    for i, (entry, fate) in enumerate(zip(unit.entries, plan.fate)):
        if fate == DROP:
            continue
        text = entry.content if entry.row == 0 else str(example_of(source, entry.content).answers[0])
        try:
            tokenizer.check(text, "the text")
        except Refusal as error:
            bad.append((i, BadRow(str(error))))
            if plan.begins[i] and entry.final:
                continue
            text = ""  # the document goes on, or ends here, without it
        sides = [(TRAIN, text[: plan.cut], True), (VAL, text[plan.cut :], entry.final)]
        for side, part, final in sides if fate == CUT else [(fate, text, entry.final)]:
            *first, last = cut(part)
            pieces += [*((side, piece, False) for piece in first), (side, last, final)]
    end = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype=np.uint32)
    for (fate, text, final), ids in zip(pieces, tokenizer.encode_many([text for _, text, _ in pieces])):
        split = SPLITS[fate]
        out[f"{split}/bytes"].append(np.array([len(text.encode())]))
        out[f"{split}/characters"].append(np.array([len(text)]))
        if final and plan.ends[fate - TRAIN]:
            ids = np.concatenate([ids, end])
        out[f"{split}/tokens"].append(ids)
        # A piece that does not end its document has a negative length: the next one goes on.
        out[f"{split}/ends"].append(np.array([len(ids) if final else -len(ids) - 1]))

"""Built-in rows: their answers are right by a second computation, and row i is the same whatever is asked for."""

import ast
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from etude.data import synthetic
from etude.data.formats import normalise

STREAMS = {
    "chats": synthetic.chats,
    "pairs": synthetic.pairs,
    "prompts": synthetic.prompts,
    "texts": synthetic.texts,
}
N = 2000
OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def value(terms: str) -> int:
    """Arithmetic by Python's own grammar."""

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return node.value

    return of(ast.parse(terms, mode="eval").body)


def solve(question: str, before: int | None = None) -> str:
    """The answer to a question, read from its words alone; `before` is the number that it may go on from."""
    if found := re.search(r"\d+( [-+*] \d+)+", question):
        return str(value(found[0]))
    if found := re.fullmatch(r"Now (add|take away) (\d+)\.", question):
        assert before is not None, question
        return str(before + int(found[2]) * (1 if found[1] == "add" else -1))
    if found := re.fullmatch(r"Which is (larger|smaller), (\d+) or (\d+)\?", question):
        a, b = int(found[2]), int(found[3])
        return str(a if (a > b) == (found[1] == "larger") else b)
    quoted = re.findall(r'"([a-z ]+)"', question)
    if "backwards" in question or question.startswith("Reverse") or "from the last letter" in question:
        return "".join(reversed(quoted[0]))
    if "upper case" in question or "capital letters" in question:
        return "".join(c if c == " " else chr(ord(c) - 32) for c in quoted[0])
    if "the letter" in question:
        return str(sum(c == quoted[0] for c in quoted[1]))
    if "How many letters" in question:
        return str(sum(len(w) for w in quoted))
    if found := re.fullmatch(r'Say ".*" (\d) times\.', question):
        return (quoted[0] + " ") * (int(found[1]) - 1) + quoted[0]
    head, _, tail = question.rpartition(":")
    listed = tail.strip(" .?").split(", ")
    if "these numbers in order" in head:
        return ", ".join(sorted(listed, key=lambda n: int(n) if "smallest first" in head else -int(n)))
    if "alphabet" in head:
        return ", ".join(sorted(listed))
    if found := re.search(r"Join the (first|last) letters", head):
        return "".join(w[: 1 if found[1] == "first" else None][-1] for w in listed)
    if found := re.search(r"the (longest|shortest)$", head):
        lengths = [len(w) for w in listed]
        most = max(lengths) if found[1] == "longest" else min(lengths)
        assert lengths.count(most) == 1, question
        return listed[lengths.index(most)]
    if found := re.search(r"the (first|second|third|fourth) word of this list$", head):
        return listed[["first", "second", "third", "fourth"].index(found[1])]
    raise AssertionError(f"no such question is known: {question}")


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_rows_are_a_function_of_seed_and_number(make: Callable[[int, int], Iterator[dict[str, Any]]]) -> None:
    """More rows begin with the fewer; another seed gives others; they are made as they are asked for."""
    few, many = list(make(20, 7)), list(make(60, 7))
    assert many[:20] == few and len(many) == 60
    assert not {json.dumps(r) for r in many} & {json.dumps(r) for r in make(60, 8)}
    assert list(itertools.islice(make(10**12, 7), 5)) == few[:5]
    assert list(make(0, 7)) == []


def test_these_rows_stay() -> None:
    """Runs are repeated with the rows that they had: a change of what is made needs another VERSION."""
    assert synthetic.VERSION == 1
    assert [p["answer"] for p in synthetic.prompts(6, 0)] == ["rtd", "26", "SUMMER BRIDGE", "147", "6", "540"]


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_few_rows_stand_there_twice(make: Callable[[int, int], Iterator[dict[str, Any]]]) -> None:
    """At most one in a hundred of 2,000."""
    rows = [json.dumps(r) for r in make(N, 0)]
    assert len(set(rows)) >= 0.99 * N


def test_prompts() -> None:
    """Every task is there, and every answer right; a prompt has one answer, so that it can be judged."""
    tasks: Counter[str] = Counter()
    for row in synthetic.prompts(N, 3):
        assert row.keys() == {"prompt", "answer", "task"}
        (message,) = row["prompt"]
        assert message["role"] == "user" and row["answer"] == solve(message["content"]), row
        tasks[row["task"]] += 1
    assert tasks.keys() == {f.__name__ for f in (*synthetic.ARITHMETIC, *synthetic.TEXT)}
    assert min(tasks.values()) > N / 50
    assert sum(tasks[f.__name__] for f in synthetic.ARITHMETIC) == pytest.approx(N / 2, rel=0.1)


def test_chats() -> None:
    """Right answers in every turn, also where one goes on from the last; system messages and sentences are there."""
    turns: Counter[int] = Counter()
    seen: Counter[str] = Counter()
    for row in synthetic.chats(N, 3):
        messages = list(row["messages"])
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        seen["system"] += system is not None
        before: int | None = None
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            expected = solve(question["content"], before)
            seen["goes on"] += question["content"].startswith("Now ")
            before = int(expected) if re.fullmatch(r"-?\d+", expected) else None
            assert before is None or before >= 0
            if system is not None and "sentence" in system:
                seen["sentence"] += 1
                expected = f"The answer is {expected}."
            assert answer["content"] == expected, row
        turns[len(messages) // 2] += 1
    assert turns.keys() == {1, 2, 3} and min(turns.values()) > N / 10
    assert seen["system"] == pytest.approx(N / 3, rel=0.15) and min(seen["goes on"], seen["sentence"]) > N / 20


def test_pairs() -> None:
    """The chosen answer is right. The rejected one is wrong, or right in many more words."""
    wordy = 0
    for row in synthetic.pairs(N, 3):
        question = row["prompt"][-1]
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        right = solve(question["content"])
        assert question["role"] == "user" and chosen == {"role": "assistant", "content": right}
        assert rejected["role"] == "assistant" and rejected["content"] != right
        if len(rejected["content"]) > 120:
            assert f" {right}." in rejected["content"]
            wordy += 1
        else:
            assert len(rejected["content"]) <= 2 * len(right) + 2, "a mistake is of the answer's kind"
    assert wordy == pytest.approx(N / 3, rel=0.15)


def test_texts() -> None:
    """Every line is true."""
    kinds: Counter[str] = Counter()
    for row in synthetic.texts(N, 3):
        assert row.keys() == {"text"} and row["text"].endswith("\n")
        for line in row["text"].splitlines():
            quoted = re.findall(r'"([A-Za-z]+)"', line)
            if " = " in line:
                terms, _, result = line.partition(" = ")
                assert value(terms) == int(result)
                kinds[terms.split()[1]] += 1
            elif found := re.search(r"has (\d+) letters", line):
                assert sum(c.islower() for c in quoted[0]) == int(found[1])
                kinds["letters"] += 1
            elif "begins" in line:
                assert re.fullmatch(f"{quoted[1]}.*{quoted[2]}", quoted[0]) and len(quoted[1]) == len(quoted[2]) == 1
                kinds["ends"] += 1
            elif "Backwards" in line:
                assert "".join(reversed(quoted[1])) == quoted[0]
                kinds["backwards"] += 1
            else:
                assert "capital" in line and quoted[1].lower() == quoted[0] and quoted[1].isupper()
                kinds["capital"] += 1
    assert len(kinds) == 7 and min(kinds.values()) > N / 4


@pytest.mark.parametrize(
    "kind, stream", [("chats", "chats"), ("pairs", "pairs"), ("prompts", "prompts"), ("text", "texts")]
)
def test_rows_are_read_as_they_are_meant(kind: str, stream: str) -> None:
    """The reader of users' rows takes them for what they are, without being told."""
    for row in STREAMS[stream](100, 1):
        example = normalise(row, kind, "auto", {})
        if kind == "pairs":
            assert [a[-1]["content"] for a in example.answers] == [row[k][0]["content"] for k in ("chosen", "rejected")]
        if kind == "prompts":
            assert example.fields == {"answer": row["answer"], "task": row["task"]}


def test_words() -> None:
    """Plain, lower case, each once; none so short that its letters cannot change places."""
    assert len(set(synthetic.WORDS)) == len(synthetic.WORDS) > 300
    assert all(re.fullmatch("[a-z]{3,10}", w) for w in synthetic.WORDS)

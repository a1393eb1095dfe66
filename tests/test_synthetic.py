"""Built-in rows: their answers are right by a second computation, and row i is the same whatever is asked for."""

import ast
import functools
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etude.data import synthetic
from etude.data.base import Maker
from etude.data.formats import normalise
from etude.data.loader import Documents
from etude.data.prepare import prepare
from etude.data.rows import Chats, Groups, Prompts
from etude.errors import Refusal
from etude.signature import check_method
from etude.text import chat
from etude.text import tokenizer as tok

STREAMS = {
    "chats": synthetic.chats,
    "pairs": synthetic.pairs,
    "labelled": synthetic.labelled,
    "prompts": synthetic.prompts,
    "groups": synthetic.groups,
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


def test_labelled_answers() -> None:
    """The label says whether the answer is the one that a second computation finds; half are good."""
    right = 0
    for row in synthetic.labelled(N, 3):
        answer = row["completion"][0]["content"]
        assert row["label"] == (answer == solve(row["prompt"][-1]["content"])), row
        right += row["label"]
    assert 0.45 < right / N < 0.55


def test_groups() -> None:
    """Three to six completions, the right ones with reward 1 and the wrong ones with 0, both in every group."""
    sizes: Counter[int] = Counter()
    for row in synthetic.groups(N, 3):
        assert row.keys() == {"prompt", "completions", "rewards"}
        right = solve(row["prompt"][0]["content"])
        assert row["rewards"] == [float(c == right) for c in row["completions"]] and set(row["rewards"]) == {0.0, 1.0}
        sizes[len(row["completions"])] += 1
    assert sizes.keys() == {3, 4, 5, 6} and min(sizes.values()) > N / 6


# ---------------------------------------------------------------- task=arithmetic

ALL = ["add", "subtract", "multiply"]


@pytest.mark.parametrize("digits, operations", [(1, ["add"]), (2, ["subtract"]), (2, ALL), (3, ["multiply", "add"])])
def test_questions_of_arithmetic_come_once(digits: int, operations: list[str]) -> None:
    """Every question that there is comes once, in mixed order, and its answer is right; more rows begin with the fewer."""
    total = synthetic.n_questions(digits, operations)
    rows = list(synthetic.arithmetic("prompts", min(total, 16_000), 5, digits, operations))
    questions = [row["prompt"][0]["content"] for row in rows]
    assert len(set(questions)) == len(rows)
    for question, row in zip(questions, rows):
        terms = re.fullmatch(r"What is ((\d+) ([-+*]) (\d+))\?", question)
        assert terms is not None and max(map(len, terms.group(2, 4))) <= digits
        assert row["answer"] == str(value(terms[1])) == solve(question) and int(row["answer"]) >= 0
        assert row["task"] == {"+": "add", "-": "subtract", "*": "multiply"}[terms[3]]
        assert terms[3] != "*" or 2 <= int(terms[4]) <= 9
    if len(rows) == total and digits == 2 and len(operations) == 3:
        assert Counter(r["task"] for r in rows) == {"add": 100**2, "subtract": 100 * 101 // 2, "multiply": 100 * 8}
    first = Counter(r["task"] for r in rows[: len(rows) // 4])
    every = Counter(r["task"] for r in rows)
    assert all(first[t] == pytest.approx(n / 4, rel=0.2, abs=12) for t, n in every.items()), "in mixed order"
    assert list(synthetic.arithmetic("prompts", 20, 5, digits, operations)) == rows[:20]
    assert list(synthetic.arithmetic("prompts", 20, 6, digits, operations)) != rows[:20]


def test_kinds_ask_the_same() -> None:
    """Row i of each kind is about one question; what is right is the answer that the reward looks for."""
    kinds = ("chats", "pairs", "labelled", "prompts", "groups")
    made = [list(synthetic.arithmetic(kind, 200, 1, 2, ALL)) for kind in kinds]
    for talk, pair, one, prompt, group in zip(*made):
        assert talk["prompt"] == pair["prompt"] == one["prompt"] == prompt["prompt"] == group["prompt"]
        assert one["label"] == (one["completion"][0]["content"] == prompt["answer"])
        answer = [{"role": "assistant", "content": prompt["answer"]}]
        assert talk["completion"] == pair["chosen"] == answer != pair["rejected"]
        assert group["rewards"] == [float(c == prompt["answer"]) for c in group["completions"]]
        assert set(group["rewards"]) == {0.0, 1.0}
    assert 70 < sum(one["label"] for one in made[2]) < 130


def test_these_questions_stay() -> None:
    """As test_these_rows_stay."""
    rows = synthetic.arithmetic("prompts", 4, 0, 2, ["add", "subtract"])
    assert [r["prompt"][0]["content"][8:-1] for r in rows] == ["11 + 7", "36 + 56", "59 + 13", "81 - 2"]
    assert [r["completions"] for r in synthetic.groups(2, 0)] == [["683", "682", "683"], ["136", "126", "128", "126", "126", "125"]]  # fmt: skip


LOADING = dict(
    stride=None, isolate_documents=False, drop_last=False, workers=0, prefetch=2, order="shuffle", seq_len=48
)
ROWS = dict(path=None, rows_seed=0, format="auto", rename=None, on_error="raise", duplicates="keep", split="prompt")


def built_in(kind: type, n: int = 2000, **settings: Any) -> Any:
    """A data node of built-in arithmetic."""
    cut = {"layout": "documents", "overlong": "error", "val_fraction": 0.1}
    cut |= {"task": "arithmetic", "digits": None, "operations": None} | settings
    return kind(n=n, **({"train_on": "assistant"} if kind is Chats else {}), **(LOADING | ROWS | cut))


@pytest.mark.parametrize("make", [tok.byte, tok.bpe], ids=["byte", "bpe"])
def test_what_is_held_out_was_never_trained_on(make: Callable, tmp_path: Path) -> None:
    """For experiment=arithmetic_sft, then arithmetic_grpo: the prompts of the second are, token for token, what stands before
    the targets of the first, with the tokenizer as it comes back from a run's folder too; and no held-out one was in the
    training split of either. What is learnt ends with the token that ends an answer."""
    maker = Maker(make.__name__, functools.partial(make, vocab_size=300) if make is tok.bpe else make)
    (sft,) = prepare(built_in(Chats), maker, str(tmp_path))
    tokenizer = tok.from_files(sft.tokenizer.files())
    (grpo,) = prepare(built_in(Prompts, val_fraction=0.04), Maker("init_from", lambda *_: tokenizer), str(tmp_path))
    (groups,) = prepare(built_in(Groups), Maker("init_from", lambda *_: tokenizer), str(tmp_path))
    stops = tokenizer.stop_ids | chat.end_of_turn(tokenizer)
    asked: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for name, prepared, node in (
        ("sft", sft, built_in(Chats)),
        ("grpo", grpo, built_in(Prompts)),
        ("groups", groups, built_in(Groups)),
    ):
        asked[name] = {}
        for split in ("train", "val"):
            data = Documents(prepared, split, node)
            asked[name][split] = set(map(tuple, data.prompts(10**6) if name != "grpo" else prompts_of(data)))
            if name == "sft":
                assert len(asked[name][split]) == len(data), "no question comes twice"
                for batch in data.whole(500):
                    for row in batch["targets"].tolist():
                        said = [t for t in row if t >= 0]
                        assert said[-1] in stops and not stops & set(said[:-1])
                        assert re.fullmatch(r"\d+", tokenizer.decode(said[:-1]))
    whole = asked["sft"]["train"] | asked["sft"]["val"]
    for name, splits in asked.items():
        assert not splits["train"] & splits["val"] and splits["train"] | splits["val"] == whole, name
    assert asked["grpo"]["val"] < asked["sft"]["val"] == asked["groups"]["val"]
    assert len(whole) == 2000 and 40 < len(asked["grpo"]["val"]) < 120 < len(asked["sft"]["val"]) < 280
    if make is tok.byte:
        assert {len(p) for p in whole} == {33, 34, 35}


def prompts_of(data: Documents) -> Iterator[list[int]]:
    for batch in data.whole(100):
        yield from (row[ids >= 0].tolist() for row, ids in zip(batch["tokens"], batch["doc_ids"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "mixed", "digits": 2}, "data.digits is for data.task=arithmetic: type that too, or leave it out"),
        ({"task": "mixed", "operations": ["add"]}, "data.operations is for data.task=arithmetic: type that too, or leave"),
        ({"path": "x.jsonl"}, "data.task=arithmetic makes rows and data.path brings them: leave one of the two out"),
        ({"digits": 0}, "data.digits=0 should lie between 1 and 9"),
        ({"digits": 10}, "data.digits=10 should lie between 1 and 9"),
        ({"operations": ["add", "divide"]}, "data.operations has divide; there is: add, subtract, multiply"),
        ({"operations": []}, "data.operations should name one operation at least, and none twice"),
        ({"operations": ["add", "add"]}, "data.operations should name one operation at least, and none twice"),
        ({"digits": 1, "n": 156}, "data.n=156 is more than the 155 questions that there are with data.digits=1: lower data.n, or raise data.digits"),
        ({"n": 15_051}, "data.n=15051 is more than the 15050 questions that there are with data.digits=2"),
        ({"n": 0}, "data.n=0 should be at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    """Refused with what to type, by the class and, before anything is imported, by its `check`."""
    with pytest.raises(Refusal) as refused:
        built_in(Prompts, **({"n": 10} | settings))
    assert str(refused.value).startswith(message)
    before = check_method("etude.data.rows.Groups")
    assert before is not None
    given = {"path": None, "n": 10, "task": "arithmetic", "digits": None, "operations": None} | settings
    with pytest.raises(ValueError) as error:
        before(**given)
    assert str(error.value) == str(refused.value)


def test_sizes_are_those_that_the_check_knows() -> None:
    """What is refused is what cannot be made."""
    for digits, operations in ((1, ["add"]), (1, ["subtract", "multiply"]), (2, ALL), (3, ["multiply"])):
        total = synthetic.n_questions(digits, operations)
        built_in(Chats, total, digits=digits, operations=operations)
        with pytest.raises(Refusal, match=f"more than the {total} questions"):
            built_in(Chats, total + 1, digits=digits, operations=operations)


def test_shuffled_is_a_permutation() -> None:
    for n in (*range(1, 40), 1000, 15_050):
        assert sorted(synthetic.shuffled(i, n, n) for i in range(n)) == list(range(n))
    order = [synthetic.shuffled(i, 10**12, 0) for i in range(2000)]
    assert len(set(order)) == 2000 and sum(order) / 2000 == pytest.approx(5e11, rel=0.1)


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
    "kind, stream",
    [(k, k) for k in ("chats", "pairs", "labelled", "prompts", "groups")] + [("text", "texts")],
)
def test_rows_are_read_as_they_are_meant(kind: str, stream: str) -> None:
    """The reader of users' rows takes them for what they are, without being told."""
    for row in STREAMS[stream](100, 1):
        example = normalise(row, kind, "auto", {})
        if kind == "pairs":
            assert [a[-1]["content"] for a in example.answers] == [row[k][0]["content"] for k in ("chosen", "rejected")]
        if kind == "labelled":
            assert example.fields == {"labels": [row["label"]]}
        if kind == "prompts":
            assert example.fields == {"answer": row["answer"], "task": row["task"]}


def test_words() -> None:
    """Plain, lower case, each once; none so short that its letters cannot change places."""
    assert len(set(synthetic.WORDS)) == len(synthetic.WORDS) > 300
    assert all(re.fullmatch("[a-z]{3,10}", w) for w in synthetic.WORDS)

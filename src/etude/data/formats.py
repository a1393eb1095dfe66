"""Rows that people bring, in the formats that are usual, each made one Example.

What a kind of data takes, in the order in which format "auto" looks for a row's keys (a key that is null counts only
where no other format is found):

    text     text
    chats    messages · conversations or conversation (ShareGPT) · prompt + completion, prompt + response or
             question + answer · instruction + output (Alpaca) · text
    pairs    chosen + rejected, with or without prompt
    labelled prompt + completion + label, prompt + response + label; chosen + rejected, which is two of them
    prompts  prompt, question or messages that end in a user's turn; the other keys are kept
    groups   prompt + completions + rewards, prompt + responses + rewards
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any, NoReturn

from etude.errors import Refusal
from etude.signature import did_you_mean
from etude.text.chat import Message

# The keys that show a format; where there are several sets, the first one that the row has counts.
KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("messages",),),
    "sharegpt": (("conversations",), ("conversation",)),
    "alpaca": (("instruction", "output"),),
    "completion": (("prompt", "completion"), ("prompt", "response"), ("question", "answer")),
    "preference": (("chosen", "rejected"),),
    "labelled": (("prompt", "completion", "label"), ("prompt", "response", "label")),
    "prompt": (("prompt",), ("question",), ("messages",)),
    "group": (("prompt", "completions", "rewards"), ("prompt", "responses", "rewards")),
}
FORMATS = ("auto", *KEYS)
TAKES = {
    "text": ("text",),
    "chats": ("messages", "sharegpt", "completion", "alpaca", "text"),
    "pairs": ("preference",),
    "labelled": ("labelled", "preference"),
    "prompts": ("prompt",),
    "groups": ("group",),
}
KINDS = tuple(TAKES)
STRATEGIES = {
    "text": "seq",
    "chats": "sft",
    "pairs": "dpo",
    "labelled": "kto",
    "prompts": "grpo",
    "groups": "grpo",
}
CALLED = {
    "group": "a group of completions with rewards",
    "preference": "a preference row",
    "labelled": "a labelled completion",
    "messages": "a chat",
    "sharegpt": "a ShareGPT chat",
    "completion": "a prompt with a completion",
    "alpaca": "an Alpaca row",
    "text": "plain text",
    "prompt": "a prompt without an answer",
}
ROLES = {r: r for r in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
}
LARGEST = 3.4e38  # of a reward: they are kept as float32
PASSED_ON = ("name", "reasoning_content")  # keys of a message that templates know beside role and content


class BadRow(ValueError):
    """A row that cannot be used: one line with what is wrong and what to do, without the file and line. What is this row's
    own comes behind the first ":" or ";"."""

    @property
    def reason(self) -> str:
        """What is wrong in a few words, the same for all rows with that mistake: to count them by."""
        return re.sub(r"\d[\d,]*", "N", re.split("[:;]", str(self), maxsplit=1)[0])


@dataclass(frozen=True, slots=True)
class Example:
    """`prompt` is "" or [] where there is none. `answers`: of text the text; of a chat all its messages; of a prompt with a
    completion that; of a preference (chosen, rejected); of a prompt nothing; of a group its completions. `fields`, which can
    be written as JSON, are a prompt's other keys, of a group {"rewards": [a number or None for each completion]}, and of
    labelled answers {"labels": [whether each is good]}."""

    prompt: str | list[Message]
    answers: list[str | list[Message]]
    fields: dict[str, Any] = field(default_factory=dict)


def check_format(format: str, kind: str | None = None) -> None:
    """Raises Refusal for a format that there is not, or that a kind of data does not take."""
    if format not in FORMATS:
        raise Refusal(f"data.format={format} is unknown{did_you_mean(format, list(FORMATS))}")
    if kind is not None and format != "auto" and format not in TAKES[kind]:
        home = next(k for k, formats in TAKES.items() if format in formats)
        raise Refusal(
            f"data.format={format} is not for data={kind}, which takes {', '.join(TAKES[kind])}: "
            f"leave it out, or use data={home} strategy={STRATEGIES[home]}"
        )


# ---------------------------------------------------------------- a line of JSONL


def parse(line: bytes | str) -> dict[str, Any]:
    """The object in one line. Raises BadRow for anything else, however deep or long."""
    if isinstance(line, bytes):
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow(f"the line is not UTF-8: its byte {error.start} is 0x{line[error.start]:02x}") from None
    line = line.removeprefix("\ufeff")
    try:
        row = _decoder.decode(line)
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        what = "the line is empty" if not line.strip() else "the line is not JSON"
        raise BadRow(f"{what}: {error.msg} in column {error.colno}; one object a line is expected") from None
    except RecursionError:
        raise BadRow("the line is nested too deep for the JSON parser") from None
    except ValueError:
        raise BadRow("the line has an integer that is too long; write it as a string") from None
    _check_object(row)
    return row


def refuse_constant(name: str) -> NoReturn:
    """For json's parse_constant: NaN, Infinity and -Infinity, which JSON does not have."""
    raise BadRow(f"the line is not JSON: it has the number {name}; write null or leave the key out")


def _float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise BadRow(f"the line has a number that is too large: {digits[:40]}")
    return number


_decoder = json.JSONDecoder(parse_constant=refuse_constant, parse_float=_float)


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise BadRow(f"the row is {_what(row)}, not an object; one object a line is expected")


# ---------------------------------------------------------------- a row


def normalise(row: dict[str, Any], kind: str, format: str = "auto", rename: Mapping[str, str] | None = None) -> Example:
    """The Example that a row is for a kind of data (see the head of this file). `rename` maps a key that is known here to
    the row's, {"text": "content"}. Raises BadRow."""
    check_format(format, kind)
    _check_object(row)
    given = row
    if rename:
        theirs = set(rename.values())
        row = {k: v for k, v in given.items() if k not in theirs} | {
            o: given[t] for o, t in rename.items() if t in given
        }
    format, keys = _recognise(row, given, kind, format, rename or {})
    match format:
        case "text":
            return Example("", [_text(row, "text")])
        case "messages" | "sharegpt":
            return Example([], [_said(_conversation(row[keys[0]], keys[0]), keys[0])])
        case "alpaca":
            return Example([], [_alpaca(row)])
        case "completion":
            prompt, answers = _answered(row, keys[0], keys[1:])
            return Example(prompt, answers)
        case "labelled":
            prompt, answers = _answered(row, keys[0], keys[1:2])
            return Example(prompt, answers, {"labels": [_label(row["label"])]})
        case "preference" if kind == "labelled":
            return replace(_preference(row), fields={"labels": [True, False]})
        case "preference":
            return _preference(row)
        case "group":
            return _group(row, keys[1])
        case _:
            return Example(_prompt(row, keys[0]), [], _fields(row, keys[0]))


def _recognise(
    row: dict[str, Any], given: dict[str, Any], kind: str, format: str, rename: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """-> (format, the keys that show it). `given` is the row before its keys were renamed."""
    formats = TAKES[kind] if format == "auto" else (format,)
    for counts in (lambda k: row.get(k) is not None, lambda k: k in row):
        for candidate in formats:
            for keys in KEYS[candidate]:
                if all(map(counts, keys)):
                    if candidate == "completion" and format == "auto" and _labelled(row):
                        raise BadRow(
                            "label says whether the completion is good: use data=labelled strategy=kto, or train on all of them alike with data.format=completion"
                        )
                    return candidate, keys
    wanted = [keys for f in formats for keys in KEYS[f]]
    expected = ", ".join(" + ".join(keys) for keys in wanted)
    absent = ", ".join(f"{o}: {t}" for o, t in rename.items() if t not in given)
    if absent:
        hint = f"data.rename={{{absent}}} names keys that are not there"
    else:
        other = _other_kind(row, kind)
        clear = CALLED["group"] in other or CALLED["labelled"] in other  # completions are no completion
        misspelt = "" if clear else _misspelt(given, wanted)
        hint = misspelt or other + f"name the keys with data.rename={{{_example(given, wanted)}}}"
    raise BadRow(f"the row lacks keys for data={kind}; keys found: {_names(given)}; keys expected: {expected}; {hint}")


def _labelled(row: Mapping[str, Any]) -> bool:
    """A row for KTO (Ethayarajh et al. 2024): other labels say something else."""
    return isinstance(row.get("label"), bool) and any(
        all(row.get(k) is not None for k in keys) for keys in KEYS["labelled"]
    )


def _misspelt(row: dict[Any, Any], wanted: list[tuple[str, ...]]) -> str:
    missing = list(dict.fromkeys(k for keys in wanted for k in keys if k not in row))
    for key in _simple(row):
        if close := difflib.get_close_matches(key.lower(), missing, n=1, cutoff=0.8):
            return f"did you mean {close[0]}? Type data.rename={{{close[0]}: {key}}}"
    return ""


def _other_kind(row: dict[str, Any], kind: str) -> str:
    for format, name in CALLED.items():
        if format == "labelled" and not _labelled(row):
            continue
        if any(all(row.get(k) is not None for k in keys) for keys in KEYS[format]):
            if format in TAKES[kind]:
                return f"this is {name}: leave data.format out, or "
            home = next(k for k, formats in TAKES.items() if format in formats)
            return f"this is {name}: use data={home} strategy={STRATEGIES[home]}, or "
    return ""


def _example(row: dict[Any, Any], wanted: list[tuple[str, ...]]) -> str:
    """What data.rename might be, with one of the row's own keys if its value has the right type."""
    for keys in wanted:
        type = list if keys[0] in ("messages", "conversations", "conversation") else str
        if len(keys) == 1 and (fitting := [k for k in _simple(row) if isinstance(row[k], type)]):
            return f"{keys[0]}: {fitting[0]}"
    return ", ".join(f"{k}: ..." for k in wanted[0])


def _simple(row: dict[Any, Any]) -> list[str]:
    """The keys that can be typed without quotes."""
    return [k for k in list(row)[:100] if isinstance(k, str) and re.fullmatch(r"\w[\w-]{0,40}", k, re.ASCII)]


def _names(row: Iterable[Any], most: int = 12) -> str:
    """A row's keys in one line of bounded length."""
    names = [k if k in _simple({k: None}) else repr(k[:40]) if isinstance(k, str) else _what(k) for k in row]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


# ---------------------------------------------------------------- formats


def _alpaca(row: dict[str, Any]) -> list[Message]:
    parts = [_text(row, k, empty=True) if row.get(k) is not None else "" for k in ("instruction", "input")]
    asked = "\n\n".join(p for p in parts if p.strip())
    if not asked:
        raise BadRow("instruction is empty")
    given = _text(row, "system", empty=True) if row.get("system") is not None else ""
    system = [{"role": "system", "content": given}] if given.strip() else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, "output")}]


def _answered(
    row: dict[str, Any], prompt_key: str, keys: tuple[str, ...]
) -> tuple[str | list[Message], list[str | list[Message]]]:
    """A prompt and the answers to it: strings if all of them are, else messages. A string beside messages is a user's
    prompt or an assistant's answer; an answer that repeats the messages of the prompt is cut."""
    prompt = row.get(prompt_key)
    if isinstance(prompt, str) and all(isinstance(row[k], str) for k in keys):
        return _text(row, prompt_key, empty=True), [_text(row, k) for k in keys]
    asked: list[Message] = []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": _text(row, prompt_key, empty=True)}] if prompt.strip() else []
    elif not isinstance(prompt, list) or prompt:
        asked = _conversation(prompt, prompt_key)
    answers: list[str | list[Message]] = []
    for key in keys:
        answer = _answer(row, key)
        repeated = len(answer) > len(asked) and answer[: len(asked)] == asked
        answers.append(_said(answer[len(asked) :] if repeated else answer, key))
    return asked, answers


def _answer(row: dict[str, Any], key: str) -> list[Message]:
    if isinstance(row[key], str):
        return [{"role": "assistant", "content": _text(row, key)}]
    return _conversation(row[key], key)


def _preference(row: dict[str, Any]) -> Example:
    """Explicit: prompt, chosen, rejected. Implicit: the common beginning is the prompt. Strings are cut in front of white
    space, so that no word is. A string prompt beside two whole conversations is a part of both."""
    keys = ("chosen", "rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    whole = all(isinstance(row[k], list) and _first_role(row[k]) != "assistant" for k in keys)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        texts = [_text(row, k) for k in keys]
        _check_differ(*texts)
        common = commonprefix(texts)
        spaces = list(re.finditer(r"\s+", common))
        at = spaces[-1].start() if spaces else 0
        rest = {k: t[at:] for k, t in zip(keys, texts)}
        return Example(common[:at], [_text(rest, k) for k in keys])
    if prompt is None and isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(f"chosen is {_what(chosen)} and rejected is {_what(rejected)}, and there is no prompt")
    if prompt is None or (isinstance(prompt, str) and whole):
        a, b = (_answer(row, k) for k in keys)
        _check_differ(a, b)
        n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return Example(a[:n], [_said(m[n:], k) for m, k in zip((a, b), keys)])
    prompt, answers = _answered(row, "prompt", keys)
    _check_differ(*answers)
    return Example(prompt, answers)


def _first_role(messages: list[Any]) -> str | None:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    role = first.get("role", first.get("from"))
    return ROLES.get(role) if isinstance(role, str) else None


def _check_differ(chosen: str | list[Message], rejected: str | list[Message]) -> None:
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same: there is nothing to prefer")


def _group(row: dict[str, Any], key: str) -> Example:
    """A prompt, its completions and their rewards, in the same order."""
    given, rewards = row[key], row["rewards"]
    for name, value in ((key, given), ("rewards", rewards)):
        if not isinstance(value, list):
            raise BadRow(f"{name} is {_what(value)}, not a list")
    if len(given) != len(rewards):
        raise BadRow(f"{key} and rewards differ in number: {len(given)} and {len(rewards)}; give each completion one")
    if len(given) < 2:
        raise BadRow(f"{key} has fewer than two: completions are compared with each other")
    numbers = [_reward(r, f"rewards[{i}]") for i, r in enumerate(rewards)]
    if all(n is None for n in numbers):
        raise BadRow("rewards are all null: there is nothing to learn")
    each = {f"{key}[{i}]": completion for i, completion in enumerate(given)}
    _prompt(row, "prompt")
    prompt, answers = _answered({"prompt": row["prompt"]} | each, "prompt", tuple(each))
    return Example(prompt, answers, {"rewards": numbers})


def _label(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRow(f"label is {_what(value)}; it should be true where the completion is good, else false")
    return value


def _reward(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{place} is {_what(value)}, not a number or null")
    if not -LARGEST < value < LARGEST:  # also nan, which JSON does not have
        raise BadRow(f"{place} is not finite: {str(value)[:40]}; write null where there is none")
    return float(value)


def _prompt(row: dict[str, Any], key: str) -> str | list[Message]:
    if isinstance(row[key], str) and key != "messages":
        return _text(row, key)
    messages = _conversation(row[key], key)
    if (last := messages[-1]["role"]) not in ("user", "tool"):
        raise BadRow(
            f"{key} ends with a turn of the {last}, so there is nothing to answer; it should end with the user's"
        )
    return messages


def _fields(row: dict[str, Any], used: str) -> dict[str, Any]:
    fields = {k: v for k, v in row.items() if k != used}
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRow(f"a key beside {used} has a lone surrogate, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadRow(f"the keys beside {used} cannot be kept as JSON: {why}; leave them out of the file") from None
    return fields


# ---------------------------------------------------------------- messages and texts


def _conversation(value: Any, place: str) -> list[Message]:
    """A list of messages, or a single one."""
    if isinstance(value, dict):
        return [_message(value, place)]
    if not isinstance(value, list):
        raise BadRow(f"{place} is {_what(value)}, not a list of messages")
    if not value:
        raise BadRow(f"{place} is empty: it should have a message at least")
    return [_message(m, f"{place}[{i}]") for i, m in enumerate(value)]


def _said(messages: list[Message], place: str) -> list[Message]:
    """The messages, if an assistant says something in them."""
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow(f"{place} has no turn of the assistant{' of its own' * (not messages)}: there is nothing to learn")
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {_what(value)}, not an object with role and content")
    role_key, key = ("role", "content") if "role" in value else ("from", "value")
    if role_key not in value:
        raise BadRow(f"{place} has no role; keys found: {_names(value)}; keys expected: role + content, from + value")
    if not isinstance(value[role_key], str):
        raise BadRow(f"{place}.{role_key} is {_what(value[role_key])}, not a string")
    if (role := ROLES.get(value[role_key])) is None:
        given = repr(value[role_key][:40])
        close = did_you_mean(value[role_key][:40], list(ROLES))
        known = "" if "there is:" in close else f"; there is: {', '.join(sorted(ROLES))}"
        raise BadRow(f"{place}.{role_key} is unknown: {given}{close}{known}")
    if value.get("tool_calls") or value.get("function_call"):
        raise BadRow(f"{place} has tool calls, which are not supported here: leave such chats out")
    if role == "assistant" and value.get("weight", 1) not in (None, 1):
        raise BadRow(f"{place}.weight is not 1, which is not supported here: every turn of the assistant counts")
    if key not in value:
        raise BadRow(f"{place} has no {key}; keys found: {_names(value)}; keys expected: {role_key} + {key}")
    parts = value[key]
    content = _joined(parts, f"{place}.{key}") if isinstance(parts, list) else _string(parts, f"{place}.{key}")
    if role == "assistant" and not content.strip():
        raise BadRow(f"{place}.{key} is empty: an assistant that says nothing teaches silence")
    passed = {k: _string(value[k], f"{place}.{k}") for k in PASSED_ON if value.get(k) is not None}
    return {"role": role, "content": content} | passed


def _joined(parts: list[Any], place: str) -> str:
    """OpenAI's content in parts, all of which have to be text."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise BadRow(f"{place}[{i}] is {_what(part)}, not an object with type and text")
        if (type := part.get("type")) != "text":
            given = repr(type[:40]) if isinstance(type, str) else _what(type)
            raise BadRow(f"{place}[{i}] is no text: its type is {given}, and only text is supported")
        texts.append(_string(part.get("text"), f"{place}[{i}].text"))
    return "".join(texts)


def _text(row: Mapping[str, Any], key: str, empty: bool = False) -> str:
    """row[key], a string with more than white space in it, if it need not be `empty`."""
    text = _string(row[key], key)
    if not empty and not text.strip():
        raise BadRow(f"{key} is {'only white space' if text else 'empty'}")
    return text


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{place} is {_what(value)}{'' if value is None else ', not a string'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise BadRow(
            f"{place} has a lone surrogate, which is no character: U+{ord(value[at]):04X} at character {at}"
        ) from None
    return value


def _what(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    words = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "an array"}
    words |= {dict: "an object", bytes: "bytes", bytearray: "bytes", tuple: "an array"}
    return words.get(type(value), f"a {type(value).__name__}")

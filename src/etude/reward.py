"""Rewards: functions of a completion and its prompt's fields; conf/reward has one file for each.

    name(completion, fields, *, weight, your settings) -> a number, or None where the completion cannot be judged

`fields` are the row's other keys (the answer, the task). A function that raises counts as one that returns None, but a
Refusal, which the user can act on, stops the run. One that has an attribute `of_rows` judges many at once:

    name(rows, tokenizer, *, weight, your settings) -> a number or None for each

rows being strategy.layout.Row: the ids of a prompt and its completion, and which of them are the completion's."""

import ast
import functools
import re
import textwrap
import warnings
from fractions import Fraction
from typing import Any

from etude.errors import Refusal

# A sign counts where it does not subtract: "10-3" ends in 3, "= -3" in -3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+\u2212])?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d{1,3})(?!\d))?(?:/(\d+))?"
)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
LONGEST = 100  # digits: longer ones are no answer, and cost time


def number(completion: str, fields: dict[str, Any], *, field: str, weight: float) -> float | None:
    """`weight` where the completion's final number equals that of fields[field] exactly, 1.0 being 1; else 0. None where
    the field holds no number."""
    right = final_number(str(_value(fields, field)))
    return None if right is None else weight * (final_number(completion) == right)


def exact(completion: str, fields: dict[str, Any], *, field: str, weight: float) -> float:
    """`weight` where the completion is fields[field], white space around both aside; else 0."""
    return weight * (completion.strip() == str(_value(fields, field)).strip())


def length(completion: str, fields: dict[str, Any], *, limit: int, weight: float) -> float:
    """0 up to `limit` characters, from there on falling in a line to -weight at twice as many, and no further."""
    return -weight * min(1.0, max(0.0, len(completion) / limit - 1))


def check_length(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit={limit} of a length reward should be at least 1 character")


def format(completion: str, fields: dict[str, Any], *, tags: list[str], weight: float) -> float:
    """`weight` where the completion is <tag>...</tag> for each of the tags, in their order, once, with nothing but white
    space around them; else 0."""
    rest = completion.lstrip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        inside, closed, after = rest.removeprefix(opening).partition(closing)
        if not rest.startswith(opening) or not closed or opening in inside:
            return 0.0
        rest = after.lstrip()
    again = any(
        f"<{slash}{tag}>" in inner for tag in tags for slash in ("", "/") for inner in _between(completion, tags)
    )
    return 0.0 if rest or again else weight


def _between(completion: str, tags: list[str]) -> list[str]:
    """What stands inside each of the tags."""
    return [completion.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in tags]


def check_format(tags: list) -> None:
    bad = [t for t in tags if not isinstance(t, str) or not t or set(t) & set("<>/ ")]
    if not tags or bad or len(set(tags)) < len(tags):
        raise ValueError(f"tags={tags} of a format reward should be different names without brackets: [think, answer]")


def regex(completion: str, fields: dict[str, Any], *, pattern: str, weight: float) -> float:
    """`weight` where the pattern (Python's) is found in the completion; else 0."""
    return weight * (re.search(pattern, completion) is not None)


def check_regex(pattern: str) -> None:
    import re

    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern} of a regex reward is no regular expression: {error}") from None


def python(completion: str, fields: dict[str, Any], *, weight: float) -> float:
    """`weight` where the completion is Python by its syntax; else 0. Of a text with fenced blocks, all those that are Python
    or do not say what they are. Nothing is run."""
    fenced = FENCE.findall(completion)
    blocks = (
        [code for name, code in fenced if name.lower() in ("", "py", "python", "python3")] if fenced else [completion]
    )
    return weight * (bool(blocks) and all(map(_parses, blocks)))


def _parses(code: str) -> bool:
    """Whether it has a statement and all are well-formed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a string is frowned upon
            return bool(ast.parse(textwrap.dedent(code)).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deeply
        return False


def model(
    rows: list[Any], tokenizer: Any, *, ckpt: str, weight: float, device: str, trusted: list[str]
) -> list[float | None]:
    """`weight` times what a reward model says of each completion behind its prompt. It is read once."""
    from etude.strategy.reward_model import end_token, judged

    found, sha256 = _judge(ckpt, device, tuple(trusted))
    if sha256 != tokenizer.sha256():
        raise Refusal(
            f"the reward model {ckpt} has another tokenizer than the policy: train it with init_from=<the run that the policy begins with>"
        )
    return [weight * r for r in judged(found, rows, end_token(tokenizer)).tolist()]


model.of_rows = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4)
def _judge(ckpt: str, device: str, trusted: tuple[str, ...]) -> tuple[Any, str]:
    """A reward model and its tokenizer's sha256. Raises Refusal for a run that trained something else."""
    from etude import checkpoint
    from etude.model import weights
    from etude.parallel import pick_device
    from etude.text import tokenizer as tok

    folder = checkpoint.find(ckpt)
    trained = next(
        (p for up in folder.resolve().parents[:3] if (p := up / "meta" / "full_config.json").is_file()), None
    )
    if trained is not None and not weights.read_json(trained.parent, trained.name)["strategy"]["_target_"].endswith(
        ".RewardModel"
    ):
        raise Refusal(f"{ckpt} is no reward model; train one with: python train.py strategy=reward_model")
    made = weights.from_pretrained(folder, pick_device(device), None, list(trusted))
    return made, tok.load(folder).sha256()


def final_number(text: str) -> Fraction | None:
    r"""The number that an answer ends in: the first one after the last "####" (GSM8K, Cobbe et al. 2021), else the last one
    in the last \boxed{}, else the last one of all. 1,234.50, $5, -3, 2/3 and 1e-3 are numbers."""
    _, mark, marked = text.rpartition("####")
    boxed = BOXED.findall(text)
    numbers = list(NUMBER.finditer(marked if mark else boxed[-1] if boxed else text))
    if not numbers:
        return None
    found = numbers[0 if mark else -1]
    digits, exponent, divisor = found[1].replace(",", ""), found[2] or "0", found[3] or "1"
    if len(digits) > LONGEST or len(divisor) > LONGEST or not int(divisor):
        return None
    value = Fraction(digits) * Fraction(10) ** int(exponent) / int(divisor)
    return -value if found[0][0] in "-\u2212" else value


def _value(fields: dict[str, Any], field: str) -> Any:
    if field not in fields:
        raise Refusal(
            f"a reward looks at the field {field}, and the row has {', '.join(fields) or 'none'}: set field= of that reward in strategy.rewards"
        )
    return fields[field]

"""Rewards: functions of a completion and its prompt's fields, chosen in conf/strategy/grpo.yaml.

    name(completion, fields, *, weight, your settings) -> a number, or None where the completion cannot be judged

`fields` are the row's other keys (the answer, the task). A function that raises counts as one that returns None, but a
Refusal, which the user can act on, stops the run."""

import re
from fractions import Fraction
from typing import Any

from etude.errors import Refusal

# A sign counts where it does not subtract: "10-3" ends in 3, "= -3" in -3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+\u2212])?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE]([-+]?\d{1,3})(?!\d))?(?:/(\d+))?"
)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
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

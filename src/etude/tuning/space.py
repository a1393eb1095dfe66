"""Search spaces: from YAML and Hydra's override syntax to Optuna's distributions, and values back to overrides."""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from etude.errors import Refusal
from etude.signature import did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

Space = dict[str, "BaseDistribution"]
RANGE = ["low", "high", "step", "log"]


def parse(params: dict[str, Any], arguments: list[str], parser: "OverridesParser") -> tuple[list[str], Space]:
    """`params` of the config and the command line's overrides -> (overrides of every trial, what is searched over).
    Where both name a key, the command line's counts. Raises Refusal."""
    from hydra.errors import HydraException

    fixed: dict[str, str] = {}
    space: Space = {}
    for key, value in params.items():
        if isinstance(value, dict):
            space[key] = from_yaml(key, value, parser)
            continue
        line = f"{key}={value if isinstance(value, str) else text(value)}"
        try:
            override = parser.parse_override(line)
        except HydraException:
            raise Refusal(f"hydra.sweeper.params: {line} is no override; quote the value as Hydra wants it") from None
        _sort_in(override, line, fixed, space)
    for line, override in zip(arguments, parser.parse_overrides(arguments)):
        _sort_in(override, line, fixed, space)
    return list(fixed.values()), space


def _sort_in(override: "Override", line: str, fixed: dict[str, str], space: Space) -> None:
    key = override.get_key_element()
    fixed.pop(key, None)
    space.pop(key, None)
    if override.is_sweep_override():
        space[key] = from_override(key, override)
    else:
        fixed[key] = line


def from_yaml(key: str, node: dict[str, Any], parser: "OverridesParser") -> "BaseDistribution":
    """{low, high[, step][, log]}, whole numbers where low, high and step are; or {choices: [...]}. Raises Refusal."""
    from optuna.distributions import CategoricalDistribution

    where = f"hydra.sweeper.params.{key}"
    if "choices" in node:
        if list(node) != ["choices"] or not isinstance(node["choices"], list) or not node["choices"]:
            raise Refusal(f"{where} should be {{choices: [one, two]}}")
        return CategoricalDistribution([_choice(c, parser) for c in node["choices"]])
    for name in node:
        if name not in RANGE:
            raise Refusal(f"unknown key {where}.{name}{did_you_mean(str(name), [*RANGE, 'choices'])}")
    if "low" not in node or "high" not in node:
        raise Refusal(f"{where} should be {{low: 1e-4, high: 1e-2, log: true}} or {{choices: [one, two]}}")
    return _range(where, node["low"], node["high"], node.get("step"), node.get("log", False))


def from_override(key: str, override: "Override") -> "BaseDistribution":
    """a,b  choice(a,b)  glob(*)  range(start,stop,step), which is without its stop  interval(low,high)
    int(interval(low,high)); the last two also in tag(log,...). Raises Refusal."""
    from hydra.core.override_parser.types import IntervalSweep, QuotedString, RangeSweep, Sweep
    from optuna.distributions import CategoricalDistribution

    sweep = override.value()
    tags = sweep.tags if isinstance(sweep, Sweep) else set()
    if tags - {"log"}:
        raise Refusal(f"{key}: there is no tag {', '.join(sorted(tags - {'log'}))}; the one that counts is log")
    if isinstance(sweep, IntervalSweep):
        return _range(key, sweep.start, sweep.end, None, "log" in tags)
    if isinstance(sweep, RangeSweep):
        values = list(override.sweep_iterator())
        if not values:
            raise Refusal(f"{key}={override.get_value_string()} is empty")
        assert all(isinstance(v, (int, float)) for v in values)
        return _range(key, min(values), max(values), abs(sweep.step), "log" in tags)  # type: ignore[type-var]
    if any(isinstance(v, Sweep) for v in override.sweep_iterator()):
        raise Refusal(f"{key} is a range and a choice at once; a choice holds single values")
    return CategoricalDistribution(
        [v.with_quotes() if isinstance(v, QuotedString) else _scalar(v) for v in override.sweep_iterator()]
    )


def _range(where: str, low: Any, high: Any, step: Any, log: Any) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    given = {"low": low, "high": high} | ({} if step is None else {"step": step})
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refusal(f"{where}.{name}={value} should be a number")
    if not isinstance(log, bool):
        raise Refusal(f"{where}.log={log} should be true or false")
    if log and step is not None and not (step == 1 and isinstance(low, int)):
        raise Refusal(f"{where} is either log or in steps; leave out one of them")
    if step is not None and step > 0 and abs((high - low) / step - (steps := round((high - low) / step))) > 1e-8:
        nearest = low + steps * step
        raise Refusal(f"{where}: steps of {step} from {low} do not come to {high}; set high to {nearest:.12g}")
    try:
        if all(isinstance(v, int) for v in given.values()):
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:
        raise Refusal(f"{where}: {str(error).rstrip('.')}") from None


def _choice(value: Any, parser: "OverridesParser") -> Any:
    """A choice written in YAML, as Optuna can keep it: scalars as they are, text and the rest as the override's text."""
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    if not isinstance(value, str):
        return _scalar(value)
    try:
        override = parser.parse_override(f"key={value}")
        if not override.is_sweep_override() and override.value() == value:
            return value
    except HydraException:
        pass
    return QuotedString(value, Quote.single).with_quotes()


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else text(value)


def text(value: Any) -> str:
    """A value as the right side of an override. A string is one already."""
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else repr(value)


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={text(value)}" for key, value in values.items()]


def values_of(distribution: "BaseDistribution") -> list[Any] | None:
    """All values of a discrete distribution, None for a continuous one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return None
    n = round((distribution.high - distribution.low) / distribution.step)
    return [min(distribution.low + i * distribution.step, distribution.high) for i in range(n + 1)]  # as Optuna rounds


def size(space: Space) -> int | None:
    """The number of combinations; None where it is not finite."""
    each = [values_of(d) for d in space.values()]
    return None if any(v is None for v in each) else math.prod(len(v) for v in each if v is not None)


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination, the last parameter fastest. Raises Refusal for a parameter without end."""
    each = []
    for key, distribution in space.items():
        values = values_of(distribution)
        if values is None:
            raise Refusal(
                f"{key} has no end of values: give it a step or choices, or use hydra/sweeper/sampler=tpe or random"
            )
        each.append(values)
    for point in itertools.product(*each):
        yield dict(zip(space, point))


def probes(space: Space) -> Iterator[dict[str, Any]]:
    """Points that between them have every choice and both ends of every range: what has to be a config at all."""
    from optuna.distributions import CategoricalDistribution

    choices = {k: list(d.choices) for k, d in space.items() if isinstance(d, CategoricalDistribution)}
    first = {k: choices[k][0] if k in choices else vars(d)["low"] for k, d in space.items()}
    yield first
    yield {k: v if k in choices else vars(space[k])["high"] for k, v in first.items()}
    for key, values in choices.items():
        for value in values[1:]:
            yield first | {key: value}


def describe(distribution: "BaseDistribution") -> str:
    """1e-05..0.01 log   2..8 by 2   gqa,mla"""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return ",".join(map(text, distribution.choices))
    d = vars(distribution)
    step = "" if d["step"] is None or d["log"] else f" by {d['step']}"
    return f"{d['low']}..{d['high']}{step}" + (" log" if d["log"] else "")

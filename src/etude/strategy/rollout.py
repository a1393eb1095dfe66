"""What a policy writes and what it is worth: completions drawn with the in-process engine, judged by rewards, and compared
within their groups. Shapes: P groups, N completions, those of a group behind one another."""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from etude.errors import EtudeError, NonFinite, Refusal
from etude.infer.engine import InferenceEngine, Settings
from etude.infer.request import Completion, Request
from etude.infer.sampling import Sampling
from etude.parallel import World
from etude.strategy.layout import Row
from etude.strategy.seq import Metrics
from etude.text.tokenizer import Tokenizer

EPS = 1e-4  # beside the standard deviation of rewards
Reward = Callable[..., Any]  # see reward.py


class Rollout(NamedTuple):
    """Completions behind their prompts, with what they are worth."""

    rows: list[Row]
    group: Tensor  # (N,) int64: 0 for the first group's, 1 for the next one's ...
    rewards: Tensor  # (N,) fp64, NaN where there is none
    truncated: Tensor  # (N,) bool: cut off before they came to an end
    sampled: (
        list[Tensor] | None
    )  # log-probabilities of each row's learned tokens when they were drawn; None: nobody said
    metrics: Metrics


# ---------------------------------------------------------------- drawing


def draw(
    model: Any,
    tokenizer: Tokenizer,
    engine: Settings,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    n: int,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> list[Completion]:
    """n completions of each prompt, those of prompt 0 first; each prompt's are keyed by its seed. The `logprob` of their
    tokens is at the temperature and over the whole vocabulary, also where top_k or top_p narrow what is drawn: what a
    training forward gives. Raises Refusal for prompts that are empty or too long, NonFinite for logits that are none."""
    if not prompts:
        return []
    if not all(prompts):
        raise Refusal("a prompt has no tokens, so nothing predicts a completion's first one; leave empty prompts out")
    limit, longest = model.position_limit, max(map(len, prompts))
    if limit is not None and longest + max_tokens > limit:
        raise Refusal(
            f"a prompt of {longest} tokens and strategy.max_completion={max_tokens} are more than the model's {limit} positions; lower strategy.max_completion or data.seq_len, or raise model.max_len"
        )
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None  # as it is trained
    made = InferenceEngine(model, tokenizer, engine, context=longest + max_tokens, dtype=dtype)
    temperature = sampling.temperature
    if temperature:  # of the logits themselves, or the engine's `logprob` would be at temperature 1
        plain = made.twin.logits
        made.twin.logits = lambda x: plain(x) / temperature
        sampling = dataclasses.replace(sampling, temperature=1.0)
    rows = made.generate(
        [
            Request(
                prompt=prompt,
                n=n,
                max_tokens=max_tokens,
                sampling=dataclasses.replace(sampling, seed=seed, logprobs=0),
                stop_ids=stop_ids,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )
    if failed := next((r.error for r in rows if r.error), None):
        raise NonFinite(failed)
    return rows


def row_of(completion: Completion) -> Row:
    """A completion behind its prompt: all of it is learned."""
    ids = torch.tensor(completion.prompt + completion.ids)
    return Row(ids, torch.arange(len(ids)) >= len(completion.prompt))


def text_of(row: Row, truncated: bool, tokenizer: Tokenizer) -> str:
    """A completion as rewards are given it to judge: without the token that ended it and other special ones."""
    ids = row.ids[row.learned].tolist()
    return tokenizer.decode(ids if truncated else ids[:-1], skip_special=True)


def told(row: Row, truncated: bool, reward: float, tokenizer: Tokenizer) -> str:
    """A completion behind its prompt, for a reader."""
    prompt = tokenizer.decode(row.ids[~row.learned].tolist(), skip_special=True)
    worth = "no reward" if math.isnan(reward) else f"reward {reward:.4g}"
    return f"{prompt} -> {text_of(row, truncated, tokenizer)} ({worth})"


def lengths(rows: list[Row], truncated: Tensor) -> Metrics:
    count = torch.tensor(len(rows))
    return {
        "completion/length": (torch.tensor(sum(int(row.learned.sum()) for row in rows)), count),
        "completion/truncated": (truncated.sum(), count),
    }


# ---------------------------------------------------------------- judging


class Judge:
    """Rewards by name. One that returns None, raises, or returns what is no finite number has failed; the first exception
    of each is shown. A Refusal, which the user can act on, goes through."""

    def __init__(self, rewards: dict[str, Reward], tokenizer: Tokenizer):
        self.rewards, self.tokenizer = rewards, tokenizer
        self.told: set[str] = set()

    def __call__(self, rows: list[Row], texts: list[str], fields: list[dict[str, Any]]) -> dict[str, Tensor]:
        """-> each reward of each completion (N,) fp64, NaN where it failed."""
        judged = {}
        for name, reward in self.rewards.items():
            if getattr(getattr(reward, "func", reward), "of_rows", False):
                found = self.tried(name, together, reward, rows, self.tokenizer) or [None] * len(rows)
            else:
                found = [self.tried(name, reward, t, f) for t, f in zip(texts, fields)]
            numbers = [self.tried(name, number, value) for value in found]
            judged[name] = torch.tensor([math.nan if n is None else n for n in numbers], dtype=torch.float64)
        return judged

    def tried(self, name: str, judge: Callable[..., Any], *given: Any) -> Any:
        """What it returns, None where it raises."""
        try:
            return judge(*given)
        except EtudeError:
            raise
        except Exception as error:  # a reward is somebody's program: it may fail in any way
            if name not in self.told:
                self.told.add(name)
                print(
                    f"warning: reward {name} raised {type(error).__name__}: {error}; such completions teach nothing and are counted in reward/failed",
                    file=sys.stderr,
                )
            return None


def together(reward: Reward, rows: list[Row], tokenizer: Tokenizer) -> list[Any]:
    found = list(reward(rows, tokenizer))
    if len(found) != len(rows):
        raise ValueError(f"{len(found)} numbers for {len(rows)} completions")
    return found


def number(value: Any) -> float:
    """A reward, NaN where it is no finite number."""
    value = math.nan if value is None else float(value)
    return value if math.isfinite(value) else math.nan


def verdict(judged: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
    """Each reward of each completion -> their sum (N,), NaN where one failed, and metrics."""
    rewards = torch.stack(list(judged.values())).sum(0)
    metrics = {f"reward/{name}": (r.nansum(), (~r.isnan()).sum()) for name, r in judged.items()}
    return rewards, metrics | overall(rewards)


def overall(rewards: Tensor) -> Metrics:
    missing = rewards.isnan()
    return {
        "reward/mean": (rewards.nansum(), (~missing).sum()),
        "reward/failed": (missing.sum(), torch.tensor(len(rewards))),
    }


# ---------------------------------------------------------------- comparing


class Moments(NamedTuple):
    """Of the rewards of each group (P,), those that are NaN left out."""

    n: Tensor
    mean: Tensor  # NaN of none
    std: Tensor  # unbiased; 0 of one or none
    silent: Tensor  # bool: all are equal, or there is none: nothing to learn from

    @staticmethod
    def of(rewards: Tensor, group: Tensor) -> "Moments":
        P = int(group.max()) + 1 if len(group) else 0
        given = ~rewards.isnan()
        group, rewards = group[given], rewards[given]

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(P).index_add(0, group, x)

        n = total(torch.ones_like(rewards))
        mean = total(rewards) / n
        std = (total((rewards - mean[group]).square()) / (n - 1).clamp_min(1)).sqrt()
        ends = (
            rewards.new_full((P,), sign * math.inf).scatter_reduce(0, group, rewards, how)
            for how, sign in (("amin", 1), ("amax", -1))
        )
        lowest, highest = ends
        return Moments(n, mean, std, lowest >= highest)


def deviation(rewards: Tensor, world: World) -> float:
    """Unbiased standard deviation of the rewards of all ranks, those that are NaN left out; 0 of one or none. Every rank
    calls it at the same time."""
    rewards = rewards[~rewards.isnan()]
    count, total = world.sum([float(len(rewards)), float(rewards.sum())])
    (squares,) = world.sum([float((rewards - total / max(count, 1)).square().sum())])
    return math.sqrt(squares / max(count - 1, 1))


def advantages(
    rewards: Tensor, group: Tensor, scale: Literal["group", "batch", "none"], spread: float | None = None
) -> Tensor:
    """rewards (N,) fp64, NaN where there is none, group (N,) -> how much better each is than its group's mean (N,): over the
    group's standard deviation, over that of all (`spread`), or as it is (Liu et al. 2025). 0 where there is no reward."""
    moments = Moments.of(rewards, group)
    centred = rewards - moments.mean[group]
    if scale == "group":
        centred = centred / (moments.std[group] + EPS)
    elif scale == "batch":
        assert spread is not None
        centred = centred / (spread + EPS)
    return centred.nan_to_num(0.0)

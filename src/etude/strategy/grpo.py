"""Group-relative policy optimisation (Shao et al. 2024), online: several completions of each prompt, each judged against
the others, and one update with them. Shapes: P prompts, G completions of each, N = P G, T positions."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from etude.errors import EtudeError, NonFinite, Refusal
from etude.infer.engine import InferenceEngine, Settings
from etude.infer.request import Completion, Request
from etude.infer.sampling import Sampling
from etude.strategy.seq import Metrics
from etude.text import chat
from etude.text.tokenizer import Tokenizer

ROUND = 32  # rows are padded to a multiple of so many tokens: every new shape costs a compilation on CPU
ROLLOUT = Settings(step_tokens=2048)  # many short prompts at once
EPS = 1e-4  # beside the standard deviation of rewards


class Reduction(NamedTuple):
    """How tokens' losses x (N, T), 0 outside of completions of n (N,) tokens, at most `limit`, become one."""

    total: Callable[[Tensor, Tensor], Tensor]  # (x, n) -> sum
    weight: Callable[[Tensor, int], int]  # (n, limit) -> what the sums of a step are divided by, summed


REDUCTIONS = {
    "grpo": Reduction(lambda x, n: (x.sum(1) / n).sum(), lambda n, limit: len(n)),  # mean over sequences of means
    "bnpo": Reduction(lambda x, n: x.sum() / n.sum(), lambda n, limit: 1),  # mean over the tokens of a micro-batch
    "dr_grpo": Reduction(lambda x, n: x.sum(), lambda n, limit: len(n) * limit),  # Liu et al. 2025
    "dapo": Reduction(lambda x, n: x.sum(), lambda n, limit: int(n.sum())),  # all tokens alike (Yu et al. 2025)
}


class GRPO:
    """Per token -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old, plus `beta` times an estimate of
    the divergence from the reference.

    A completion's advantage A is its reward (the sum of `rewards`) less the mean of its group, divided by the standard
    deviation over the `scale`: its group, or all completions of the forward ("batch"). One whose reward failed is left out
    of mean and deviation and has A = 0. pi and pi_old are at `temperature`, without dropout in pi_old; top_k and top_p
    narrow what is drawn, not what is learnt."""

    kinds = ("prompts",)
    goal = ("reward/mean", -1)  # the loss of completions that were just drawn says little

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        group_size: int,
        max_completion: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        clip_low: float,
        clip_high: float,
        beta: float,
        scale: Literal["group", "batch", "none"],
        reduction: Literal["grpo", "bnpo", "dr_grpo", "dapo"],
        rewards: dict[str, Any],
    ):
        self.check(group_size, max_completion, temperature, top_k, top_p, clip_low, clip_high, beta, rewards)
        self.tokenizer, self.stop_ids = tokenizer, tokenizer.stop_ids | chat.end_of_turn(tokenizer)
        self.group_size, self.max_completion = group_size, max_completion
        self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self.clip_low, self.clip_high, self.beta = clip_low, clip_high, beta
        self.scale, self.reduction, self.rewards = scale, REDUCTIONS[reduction], rewards
        self.needs_reference = beta > 0
        self.told: set[str] = set()  # rewards whose first exception was shown

    @staticmethod
    def check(
        group_size: int,
        max_completion: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        clip_low: float,
        clip_high: float,
        beta: float,
        rewards: dict,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if group_size < 2:
            raise ValueError(
                f"strategy.group_size={group_size} should be at least 2: completions are compared in a group"
            )
        if max_completion < 1:
            raise ValueError(f"strategy.max_completion={max_completion} should be at least 1")
        if not temperature > 0:
            raise ValueError(f"strategy.temperature={temperature} should be above 0: at 0 a group is one completion")
        if top_k is not None and top_k < 1:
            raise ValueError(f"strategy.top_k={top_k} should be at least 1, or null for all")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"strategy.top_p={top_p} should be above 0 and at most 1, or null for all")
        if not 0 < clip_low <= 1 or not clip_high > 0:
            raise ValueError(
                f"strategy.clip_low={clip_low} should be above 0 and at most 1, strategy.clip_high={clip_high} above 0"
            )
        if not beta >= 0:
            raise ValueError(f"strategy.beta={beta} should be at least 0 (0: no reference)")
        if not rewards:
            raise ValueError("strategy.rewards is empty: there is nothing to learn from; see conf/strategy/grpo.yaml")
        if taken := {"mean", "std", "failed"} & set(rewards):
            raise ValueError(
                f"strategy.rewards.{min(taken)}: reward/{min(taken)} is a metric of all; choose another name"
            )

    # ------------------------------------------------------------ rollouts

    def collect(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """tokens, doc_ids (P, T) and fields of prompts -> tokens, targets, doc_ids, old_logprob (N, T), advantages (N,) and
        metrics. The completions are drawn with torch's generator."""
        bare: Any = getattr(model, "module", model)
        prompts = [row[ids >= 0].tolist() for row, ids in zip(batch["tokens"], batch["doc_ids"])]
        training = bare.training
        bare.eval()
        try:
            rows = self.roll_out(bare, prompts)
            made = assemble([r.prompt for r in rows], [r.ids for r in rows], bare.position_limit)
            made = {name: t.to(batch["tokens"].device) for name, t in made.items()}
            with torch.no_grad(), tempered(bare, self.sampling.temperature):
                made["old_logprob"] = bare(made["tokens"], targets=made["targets"], doc_ids=made["doc_ids"])[0].logprob
        finally:
            bare.train(training)
        texts = [self.text(row) for row in rows]
        judged = self.judge(texts, [f for f in batch["fields"] for _ in range(self.group_size)])
        rewards = torch.stack(list(judged.values())).sum(0)
        made["advantages"] = advantages(rewards, self.group_size, self.scale).to(made["old_logprob"])
        return made | {"metrics": row_metrics(rows) | self.reward_metrics(judged, rewards)}

    def roll_out(self, model: Any, prompts: list[list[int]]) -> list[Completion]:
        """group_size completions of each prompt, those of prompt 0 first."""
        if not all(prompts):
            raise Refusal(
                "a prompt has no tokens, so nothing predicts a completion's first one; leave empty prompts out"
            )
        limit, longest = model.position_limit, max(map(len, prompts))
        if limit is not None and longest + self.max_completion > limit:
            raise Refusal(
                f"a prompt of {longest} tokens and strategy.max_completion={self.max_completion} are more than the model's {limit} positions; lower strategy.max_completion or data.seq_len, or raise model.max_len"
            )
        requests = [
            Request(
                prompt=p,
                n=self.group_size,
                max_tokens=self.max_completion,
                sampling=dataclasses.replace(self.sampling, seed=int(torch.randint(2**63 - 1, ()))),
                stop_ids=frozenset(self.stop_ids),
            )
            for p in prompts
        ]
        rows = InferenceEngine(model, self.tokenizer, ROLLOUT).generate(requests)
        if failed := next((r.error for r in rows if r.error), None):
            raise NonFinite(failed)
        return rows

    def text(self, row: Completion) -> str:
        """What rewards are given to judge: without the token that ended it and other special ones."""
        return self.tokenizer.decode(row.ids[:-1] if row.finish == "stop" else row.ids, skip_special=True)

    def judge(self, texts: list[str], fields: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Each reward of each text (N,), NaN where there is none."""
        return {
            name: torch.tensor([self.one(name, reward, t, f) for t, f in zip(texts, fields)], dtype=torch.float64)
            for name, reward in self.rewards.items()
        }

    def one(self, name: str, reward: Callable[[str, dict], float | None], text: str, fields: dict[str, Any]) -> float:
        try:
            value = reward(text, fields)
            value = math.nan if value is None else float(value)
            return value if math.isfinite(value) else math.nan
        except EtudeError:
            raise
        except Exception as error:  # a reward is somebody's program: it may fail in any way
            if name not in self.told:
                self.told.add(name)
                print(
                    f"warning: reward {name} raised {type(error).__name__}: {error}; such completions teach nothing and are counted in reward/failed",
                    file=sys.stderr,
                )
            return math.nan

    def reward_metrics(self, judged: dict[str, Tensor], rewards: Tensor) -> Metrics:
        groups = rewards.view(-1, self.group_size)
        found = ~groups.isnan()
        lowest, highest = groups.nan_to_num(math.inf).amin(1), groups.nan_to_num(-math.inf).amax(1)
        silent = (lowest >= highest).sum()  # also where no reward or one alone was given
        metrics = {f"reward/{name}": (r.nansum(), (~r.isnan()).sum()) for name, r in judged.items()}
        return metrics | {
            "reward/mean": (rewards.nansum(), found.sum()),
            "reward/std": (deviation(groups, 1).sum(), (found.sum(1) > 1).sum()),  # within a group
            "reward/failed": ((~found).sum(), torch.tensor(found.numel())),
            "groups/no_signal": (silent, torch.tensor(len(groups))),
        }

    # ------------------------------------------------------------ the loss

    def weight(self, batch: dict[str, Any]) -> int:
        """What the sum of losses is divided by, over the whole step."""
        return self.reduction.weight((batch["targets"] >= 0).sum(1), self.max_completion)

    def loss(self, model: nn.Module, ref: nn.Module | None, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """-> the loss of a collected batch, summed as the reduction says, and metrics as (sum, count)."""
        tokens, targets, doc_ids = batch["tokens"], batch["targets"], batch["doc_ids"]
        mask = targets >= 0
        with tempered(model, self.sampling.temperature):
            scores, aux = model(tokens, targets=targets, doc_ids=doc_ids)
        A = batch["advantages"][:, None]
        rho = (scores.logprob - batch["old_logprob"]).exp()
        clipped = rho.clamp(1 - self.clip_low, 1 + self.clip_high)
        x = -torch.minimum(rho * A, clipped * A)
        metrics: Metrics = {}
        n = mask.sum(1)
        count = n.sum()
        if self.needs_reference:
            assert ref is not None
            with torch.no_grad(), tempered(ref, self.sampling.temperature):
                before = ref(tokens, targets=targets, doc_ids=doc_ids)[0].logprob
            gap = before - scores.logprob
            kl = rho * (gap.exp() - gap - 1)  # k3 (Schulman 2020), of what pi would draw and not pi_old
            x = x + self.beta * kl
            metrics["kl"] = (kl.detach() * mask).sum(), count
        loss = self.reduction.total(x * mask, n)
        metrics |= {
            "loss": (loss.detach(), torch.tensor(self.weight(batch))),
            "clip/low": (((rho < 1 - self.clip_low) & (A < 0) & mask).sum(), count),
            "clip/high": (((rho > 1 + self.clip_high) & (A > 0) & mask).sum(), count),
            "entropy": (scores.entropy.sum(), count),
        }
        if aux is not None:
            loss = loss + self.reduction.total(aux.loss * mask, n)
            metrics |= aux.metrics(mask)
        return loss, metrics | batch["metrics"]


def row_metrics(rows: list[Completion]) -> Metrics:
    count = torch.tensor(len(rows))
    return {
        "completion/length": (torch.tensor(sum(len(r.tokens) for r in rows)), count),
        "completion/truncated": (torch.tensor(sum(r.finish == "length" for r in rows)), count),
    }


def assemble(prompts: list[list[int]], completions: list[list[int]], limit: int | None) -> dict[str, Tensor]:
    """Rows of a prompt and its completion, padded on the right to a multiple of ROUND or to `limit` -> tokens, targets
    (-100 but for the completion's tokens), doc_ids (0, and -1 for padding), each (N, T)."""
    widest = max(len(p) + len(c) - 1 for p, c in zip(prompts, completions))
    rounded = -(-widest // ROUND) * ROUND
    shape = len(prompts), rounded if limit is None else min(rounded, limit)
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    doc_ids = torch.full(shape, -1)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        n = len(p) + len(c) - 1  # the last one is no input
        tokens[i, :n] = torch.tensor(p + c)[:-1]
        targets[i, len(p) - 1 : n] = torch.tensor(c)
        doc_ids[i, :n] = 0
    return {"tokens": tokens, "targets": targets, "doc_ids": doc_ids}


def advantages(rewards: Tensor, group_size: int, scale: str) -> Tensor:
    """rewards (N,), groups one after another, NaN where one failed -> advantages (N,)."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    return (centred / SCALES[scale](groups)).nan_to_num(0.0).flatten()


def deviation(x: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of the numbers that are not NaN, 0 of a single one."""
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim)
    return (squares / ((~x.isnan()).sum(dim) - 1).clamp_min(1)).sqrt()


# Rewards (P, G) -> what their distances from the mean are divided by.
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda groups: deviation(groups, 1)[:, None] + EPS,
    "batch": lambda groups: deviation(groups.flatten(), 0) + EPS,
    "none": lambda groups: torch.ones(()),  # Liu et al. 2025
}


@contextlib.contextmanager
def tempered(model: Any, temperature: float) -> Iterator[None]:
    """The model's logits divided by `temperature`, also where it gives scores instead of them: the states before its head
    are divided, and a cap c of logits, because c tanh(z / c) / t is c' tanh((z / t) / c') with c' = c / t."""
    bare = getattr(model, "module", model)
    cap = bare.logit_cap
    hook = bare.norm.register_forward_hook(lambda module, inputs, x: x / temperature)
    bare.logit_cap = None if cap is None else cap / temperature
    try:
        yield
    finally:
        hook.remove()
        bare.logit_cap = cap

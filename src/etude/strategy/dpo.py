"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: a policy from pairs of a chosen and a rejected
answer, without a reward model."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from etude.data.loader import Batch
from etude.strategy.layout import Layout, arrange, rows_of, take
from etude.strategy.seq import Metrics


class Pairs(NamedTuple):
    """What a loss may know of B pairs: a, b (B,) are the summed log-probabilities of the chosen and of the rejected
    answer, minus the reference's where the loss has one; n_a, n_b (B,) count their tokens."""

    a: Tensor
    b: Tensor
    n_a: Tensor
    n_b: Tensor
    beta: float
    smoothing: float
    gamma: float

    @property
    def logit(self) -> Tensor:
        return self.beta * (self.a - self.b)

    @property
    def mean_a(self) -> Tensor:
        return self.a / self.n_a.clamp_min(1)

    @property
    def mean_b(self) -> Tensor:
        return self.b / self.n_b.clamp_min(1)


def cdpo(p: Pairs) -> Tensor:
    return -(1 - p.smoothing) * logsigmoid(p.logit) - p.smoothing * logsigmoid(-p.logit)


def robust(p: Pairs) -> Tensor:
    e = p.smoothing
    return (-(1 - e) * logsigmoid(p.logit) + e * logsigmoid(-p.logit)) / (1 - 2 * e)


def exo_pair(p: Pairs) -> Tensor:
    """KL from (q, 1 - q), q = sigmoid(logit), to (1 - e, e)."""
    q, e = torch.sigmoid(p.logit), p.smoothing
    return q * (logsigmoid(p.logit) - math.log1p(-e)) + (1 - q) * (logsigmoid(-p.logit) - math.log(e))


def nca_pair(p: Pairs) -> Tensor:
    a, b = p.beta * p.a, p.beta * p.b
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def orpo(p: Pairs) -> Tensor:
    """The mean NLL of each chosen answer, and the odds ratio of the answers' geometric mean probabilities."""
    return -p.mean_a - p.beta * logsigmoid(log_odds(p.mean_a) - log_odds(p.mean_b))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)), kept finite where p rounds to 1."""
    logp = logp.clamp_max(-1e-6)
    return logp - torch.log(-torch.expm1(logp))


# Each takes Pairs and gives (B,).
LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": lambda p: -logsigmoid(p.logit),  # DPO
    "cdpo": cdpo,  # conservative DPO (Mitchell 2023)
    "hinge": lambda p: torch.relu(1 - p.logit),  # SLiC (Zhao et al. 2023)
    "ipo": lambda p: (p.mean_a - p.mean_b - 1 / (2 * p.beta)).square(),  # Azar et al. 2023
    "robust": robust,  # Chowdhury et al. 2024
    "norm": lambda p: -logsigmoid(p.beta * (p.mean_a - p.mean_b)),  # sigmoid of the means over tokens
    "apo_zero": lambda p: 1 - torch.sigmoid(p.beta * p.a) + torch.sigmoid(p.beta * p.b),  # D'Oosterlinck et al. 2024
    "apo_down": lambda p: torch.sigmoid(p.beta * p.a) + 1 - torch.sigmoid(p.logit),
    "exo_pair": exo_pair,  # Ji et al. 2024
    "nca_pair": nca_pair,  # Chen et al. 2024
    "sppo_hard": lambda p: (p.a - 0.5 / p.beta).square() + (p.b + 0.5 / p.beta).square(),  # Wu et al. 2024
    "simpo": lambda p: -logsigmoid(p.beta * (p.mean_a - p.mean_b) - p.gamma),  # Meng et al. 2024
    "orpo": orpo,  # Hong et al. 2024
}
REFERENCE_FREE = ("simpo", "orpo", "sft")


class DPO:
    """One of LOSSES, or a weighted sum of several; "sft" adds the chosen answers' mean NLL per token (RPO is
    {sigmoid: 1, sft: w}, Liu et al. 2024). Losses of pairs are divided by the pairs of the step, sft by its chosen
    targets: so there are two sums and two weights. `label_smoothing` e is the share of pairs that are labelled the
    wrong way round, `gamma` SimPO's margin. `layout` is how pairs lie in memory (strategy/layout.py) and
    changes no number."""

    kinds = ("pairs",)

    def __init__(
        self,
        *,
        beta: float,
        loss: Literal[
            "sigmoid",
            "cdpo",
            "hinge",
            "ipo",
            "robust",
            "norm",
            "apo_zero",
            "apo_down",
            "exo_pair",
            "nca_pair",
            "sppo_hard",
            "simpo",
            "orpo",
            "sft",
        ]
        | dict[str, float],
        label_smoothing: float,
        gamma: float,
        layout: Literal["rows", "packed", "shared"],
    ):
        self.check(beta, loss, label_smoothing)
        self.beta, self.label_smoothing, self.gamma = beta, label_smoothing, gamma
        self.layout: Layout = layout
        self.terms = dict(loss) if isinstance(loss, dict) else {loss: 1.0}
        self.needs_reference = any(name not in REFERENCE_FREE for name in self.terms)

    @staticmethod
    def check(beta: float, loss: str | dict[str, float], label_smoothing: float) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        names = (
            "sigmoid cdpo hinge ipo robust norm apo_zero apo_down exo_pair nca_pair sppo_hard simpo orpo sft".split()
        )
        terms = loss if isinstance(loss, dict) else {loss: 1.0}
        if not terms:
            raise ValueError("strategy.loss={} names no loss; type strategy.loss=sigmoid")
        for name, weight in terms.items():
            if name not in names:
                raise ValueError(f"strategy.loss: there is no loss {name}; there is: {', '.join(names)}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e9:
                raise ValueError(f"strategy.loss.{name}={weight} should be a number above 0: a weight; or leave it out")
        if not 0 < beta < 1e9:
            raise ValueError(f"strategy.beta={beta} should be a number above 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"strategy.label_smoothing={label_smoothing} should be at least 0 and below 0.5")
        smoothed = {"cdpo", "robust", "exo_pair"}
        if label_smoothing and not smoothed & set(terms):
            raise ValueError(
                f"strategy.label_smoothing={label_smoothing} is used by cdpo, robust and exo_pair alone; type strategy.loss=cdpo, or label_smoothing=0"
            )
        if not label_smoothing and "exo_pair" in terms:
            raise ValueError(
                "exo_pair takes the logarithm of label_smoothing; type strategy.label_smoothing=0.001 or another number above 0"
            )

    def collect(self, model: nn.Module, batches: list[Batch], seeds: list[int], world: Any) -> list[Batch]:
        """tokens, targets, doc_ids of pairs as the loader has them -> as `layout` says, with slots (2 pairs, L)."""
        return [self.arranged(batch) for batch in batches]

    def arranged(self, batch: Batch) -> Batch:
        made = arrange(rows_of(batch), group=2, how=self.layout, limit=None)
        return {name: t.to(batch["tokens"].device) for name, t in made.items()}

    def weight(self, batch: Batch) -> tuple[int, int]:
        """(pairs, targets of chosen answers): what the sums are divided by, over the whole step. Of a loader's batch too."""
        learned = batch["slots"] >= 0 if "slots" in batch else batch["targets"] >= 0
        return len(learned) // 2, int(learned[::2].sum())

    def loss(self, model: nn.Module, ref: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sequences 2i and 2i+1 are the chosen and the rejected one of pair i. -> (2,) summed losses of pairs and of
        chosen targets, and metrics as (sum, count); where there are several terms, loss/<name> of each instead of loss.
        A batch as the loader has it is arranged first."""
        batch = batch if "slots" in batch else self.arranged(batch)
        tokens, slots = batch["tokens"], batch["slots"]
        about = {name: batch[name] for name in ("targets", "doc_ids", "branches") if name in batch}
        scores, aux = model(tokens, **about)
        a, b = pairwise(take(scores.logprob, slots).sum(1))
        n_a, n_b = pairwise((slots >= 0).sum(1))
        given = gained = Pairs(a, b, n_a, n_b, self.beta, self.label_smoothing, self.gamma)
        if self.needs_reference:
            with torch.no_grad():
                before = ref(tokens, **about)[0].logprob
            ref_a, ref_b = pairwise(take(before, slots).sum(1))
            gained = given._replace(a=a - ref_a, b=b - ref_b)

        count = torch.tensor(len(a), device=a.device)
        sums = [a.new_zeros(()), a.new_zeros(())]
        metrics: Metrics = {}
        for name, weight in self.terms.items():
            of_tokens = name == "sft"
            each = -a if of_tokens else LOSSES[name](given if name in REFERENCE_FREE else gained)
            term = weight * each.sum()
            sums[of_tokens] = sums[of_tokens] + term
            shown = "loss" if len(self.terms) == 1 else f"loss/{name}"
            metrics[shown] = term.detach(), n_a.sum() if of_tokens else count
        metrics |= self.metrics(given, gained, count)
        metrics["entropy"] = scores.entropy.sum(), n_a.sum() + n_b.sum()
        metrics["accuracy"] = take(scores.correct, slots)[::2].sum(), n_a.sum()  # of tokens of chosen answers
        if aux is not None:
            of_sequence = take(aux.loss.expand_as(tokens), slots).sum(1) / (slots >= 0).sum(1).clamp_min(1)
            sums[0] = sums[0] + of_sequence.sum() / 2
            metrics |= aux.metrics(batch["targets"] >= 0)
        return torch.stack(sums), metrics

    def metrics(self, given: Pairs, gained: Pairs, count: Tensor) -> Metrics:
        """Rewards are beta times what was gained over the reference; of a loss without one, times the mean
        log-probability of a token, which it ranks by."""
        a, b = (gained.a, gained.b) if self.needs_reference else (given.mean_a, given.mean_b)
        chosen, rejected = self.beta * a.detach(), self.beta * b.detach()
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracy": (chosen > rejected).float(),
            "rewards/margin": chosen - rejected,
            "logps/chosen": given.a.detach(),
            "logps/rejected": given.b.detach(),
        }
        return {name: (value.sum(), count) for name, value in values.items()}


def pairwise(x: Tensor) -> tuple[Tensor, ...]:
    """Of sequences (2 pairs,) -> of the chosen (pairs,) and of the rejected ones."""
    return x.view(-1, 2).unbind(1)

"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): a policy from answers that are each good or bad, without pairs."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude.data.loader import Batch
from etude.parallel import World
from etude.strategy.layout import Row, arrange, rows_of, take
from etude.strategy.seq import Metrics


class KTO:
    """With r = log pi(answer) - log pi_ref(answer), summed over its tokens, the loss of a good answer is
    desirable_weight * sigmoid(-beta (r - z0)), of another undesirable_weight * sigmoid(beta (r - z0)), by `loss`

    kto                z0 is the divergence of the policy from the reference, and no less than 0: the mean of r over the
                       step's prompts, each with the answer to the prompt before it. It carries no gradient
    apo_zero_unpaired  z0 = 0 (APO-zero without pairs, D'Oosterlinck et al. 2024)

    The step is that of all micro-batches and ranks. In validation, where every batch is judged by itself, z0 is a
    batch's own, and 0 of a single answer, to which there is no other. `layout` is how sequences lie in memory
    (strategy/layout.py) and changes no number. `ref` is the reference once there is one: `collect` needs it too."""

    kinds = ("labelled",)
    needs_reference = True
    ref: Any = None

    def __init__(
        self,
        *,
        loss: Literal["kto", "apo_zero_unpaired"],
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        layout: Literal["rows", "packed"],
    ):
        self.check(loss, beta, desirable_weight, undesirable_weight)
        self.shifted = loss == "kto"
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight
        self.layout: Literal["rows", "packed"] = layout

    @staticmethod
    def check(
        loss: str,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        batch_size: int = 2,
        reference: str = "auto",
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if not 0 < beta < 1e9:
            raise ValueError(f"strategy.beta={beta} should be a number above 0")
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            if not 0 <= weight < 1e9:
                raise ValueError(f"strategy.{name}={weight} should be a number of at least 0")
        if not any(weights.values()):
            raise ValueError("desirable_weight and undesirable_weight are both 0: set one of them above 0")
        if loss == "kto" and batch_size < 2:
            raise ValueError(
                f"batch_size={batch_size}: strategy.loss=kto puts each prompt of a step before another one's answer; set batch_size to at least 2, or strategy.loss=apo_zero_unpaired"
            )
        if loss == "kto" and reference == "cached":
            raise ValueError(
                "reference=cached lacks the answers to other prompts by which strategy.loss=kto measures the divergence; set reference=copy, or strategy.loss=apo_zero_unpaired"
            )

    def collect(self, model: nn.Module, batches: list[Batch], seeds: list[int], world: World) -> list[Batch]:
        """Loader's batches of labelled answers, all of a step -> for each tokens, targets, doc_ids (B, T), slots (N, L) as
        layout.py has them, labels (N,) bool and z0 ()."""
        rows = [rows_of(batch) for batch in batches]
        z0 = self.divergence(model, rows, batches[0]["tokens"].device, world) if self.shifted else 0.0
        made = []
        for some, batch in zip(rows, batches):
            device = batch["tokens"].device
            laid = {name: t.to(device) for name, t in arrange(some, 1, self.layout, None).items()}
            made.append(laid | {"labels": batch["labels"], "z0": torch.tensor(z0, device=device)})
        return made

    @torch.no_grad()
    def divergence(self, model: Any, batches: list[list[Row]], device: torch.device, world: World) -> float:
        """z0 of a step, of which this rank has these micro-batches, and rank 0 the first ones: the first prompt of all is put
        before the last answer of all."""
        bare: Any = getattr(model, "module", model)
        flat = [row for rows in batches for row in rows]
        last = answer(flat[-1])
        lasts = world.broadcast(world.gather([last.ids.tolist(), last.learned.tolist()]))
        ids, learned = map(torch.tensor, lasts[world.rank - 1])
        answers = iter([Row(ids, learned), *map(answer, flat)])
        limit = bare.position_limit
        training = bare.training
        bare.eval()  # dropout would make it a matter of chance
        total = 0.0
        try:
            for rows in batches:
                others = [mismatched(row, other, limit) for row, other in zip(rows, answers)]
                batch = {name: t.to(device) for name, t in arrange(others, 1, self.layout, None).items()}
                slots, tokens = batch.pop("slots"), batch.pop("tokens")
                gained = bare(tokens, **batch)[0].logprob - self.ref(tokens, **batch)[0].logprob
                total += float(take(gained, slots).sum(dtype=torch.float64))
        finally:
            bare.train(training)
        total, n = world.sum([total, float(len(flat))])
        return max(total / n, 0.0) if n > 1 else 0.0

    def weight(self, batch: Batch) -> int:
        """How many answers there are: what the loss is divided by, over the whole step."""
        return len(batch["labels"])

    def loss(self, model: nn.Module, ref: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """-> the summed loss of a collected batch's answers, and metrics as (sum, count)."""
        slots, good, z0 = batch["slots"], batch["labels"], batch["z0"]
        tokens, about = batch["tokens"], {name: batch[name] for name in ("targets", "doc_ids")}
        scores, aux = model(tokens, **about)
        logp = take(scores.logprob, slots).sum(1)
        with torch.no_grad():
            before = take(ref(tokens, **about)[0].logprob, slots).sum(1)
        r = logp - before
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        loss = (weight * torch.sigmoid(torch.where(good, -self.beta, self.beta) * (r - z0))).sum()
        count, learned = torch.tensor(len(good), device=good.device), (slots >= 0).sum(1)
        metrics: Metrics = {"loss": (loss.detach(), count), "entropy": (scores.entropy.sum(), learned.sum())}
        if self.shifted:
            metrics["kl"] = z0 * count, count
        for name, those in (("chosen", good), ("rejected", ~good)):
            if those.any():  # a step may have none: then it has no such metric
                metrics[f"rewards/{name}"] = self.beta * r.detach()[those].sum(), those.sum()
                metrics[f"logps/{name}"] = logp.detach()[those].sum(), those.sum()
        if aux is not None:
            of_sequence = take(aux.loss.expand_as(tokens), slots).sum(1) / learned.clamp_min(1)
            loss = loss + of_sequence.sum()
            metrics |= aux.metrics(batch["targets"] >= 0)
        return loss, metrics


def start(row: Row) -> int:
    """Where a sequence's answer begins."""
    return int((row.learned.cumsum(0) == 0).sum())


def answer(row: Row) -> Row:
    """A sequence from its first learned token on."""
    at = start(row)
    return Row(row.ids[at:], row.learned[at:])


def mismatched(row: Row, other: Row, limit: int | None) -> Row:
    """A sequence's prompt with another one's answer, cut off after `limit` inputs."""
    at, end = start(row), None if limit is None else limit + 1
    return Row(torch.cat((row.ids[:at], other.ids))[:end], torch.cat((row.learned[:at], other.learned))[:end])

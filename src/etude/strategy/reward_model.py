"""A reward model (Christiano et al. 2017; Ouyang et al. 2022): how good an answer is, as one number, learnt from pairs of a
chosen and a rejected answer. conf/reward/model.yaml puts it to use."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from etude.data.loader import IGNORED, Batch
from etude.strategy.layout import Layout, Row, arrange, rows_of, take
from etude.strategy.seq import Metrics
from etude.text.tokenizer import Tokenizer


class RewardModel:
    """The reward r of a sequence is a logit behind its last learned token, that of the tokenizer's end token: the final state
    times that token's row of the head. So what is trained is a language model like any other and needs no head of its
    own (the verifiers of Cobbe et al. 2021 read theirs off a special token's logit too). The product is made in fp32, without
    the model's logit_cap: in bf16 most answers that differ little would be worth the same.

    The loss of a pair is -log sigmoid(r_chosen - r_rejected - margin) (Bradley & Terry 1952; the margin: Touvron et al. 2023)
    + center (r_chosen + r_rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023). `layout` is how pairs lie in
    memory (strategy/layout.py) and changes no number."""

    kinds = ("pairs",)
    needs_reference = False
    use = (
        "python train.py strategy=grpo init_from=<a run> ~reward@strategy.rewards.number "
        "+reward@strategy.rewards.model=model strategy.rewards.model.ckpt={run}"
    )

    def __init__(self, tokenizer: Tokenizer, engine: Any, *, margin: float, center: float, layout: Layout):
        self.check(margin, center)
        self.token = end_token(tokenizer)
        self.margin, self.center = margin, center
        self.layout: Layout = layout

    @staticmethod
    def check(margin: float, center: float) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        for name, value in (("margin", margin), ("center", center)):
            if not 0 <= value < 1e9:
                raise ValueError(f"strategy.{name}={value} should be a number of at least 0 (0: none)")

    def collect(self, model: nn.Module, batches: list[Batch], seeds: list[int], world: Any) -> list[Batch]:
        """Loader's batches of pairs -> tokens, targets (all ignored), doc_ids (B, T), perhaps branches, and slots (2 pairs, 1):
        where in the flattened (B T) each sequence is judged."""
        bare: Any = getattr(model, "module", model)
        made = []
        for batch in batches:
            rows = rows_of(batch)
            laid = judgeable(rows, bare.position_limit, 2, self.layout, None, batch["tokens"].device)
            made.append(laid | {"crc": sum(zlib.crc32(row.ids.numpy().tobytes()) for row in rows)})
        return made

    def weight(self, batch: Batch) -> int:
        """How many pairs there are: what the loss is divided by, over the whole step."""
        return len(batch["slots"]) // 2

    def loss(self, model: nn.Module, ref: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sequences 2i and 2i+1 of a collected batch are the chosen and the rejected one of pair i. -> the summed loss of the
        pairs, and metrics as (sum, count)."""
        given: Batch = {name: batch[name] for name in ("tokens", "targets", "doc_ids", "branches") if name in batch}
        found, aux = rewards(model, given, batch["slots"], self.token)
        a, b = found.view(-1, 2).unbind(1)
        loss = (-logsigmoid(a - b - self.margin) + self.center * (a + b).square()).sum()
        count = torch.tensor(len(a), device=a.device)
        values = {
            "rewards/chosen": a,
            "rewards/rejected": b,
            "rewards/margin": a - b,
            "rewards/accuracy": (a > b).float(),
        }
        metrics: Metrics = {name: (value.detach().sum(), count) for name, value in values.items()}
        metrics["loss"] = loss.detach(), count
        if aux is not None:
            loss = loss + take(aux.loss.expand_as(batch["tokens"]), batch["slots"]).sum() / 2
            metrics |= aux.metrics(batch["doc_ids"] >= 0)
        return loss, metrics


def end_token(tokenizer: Tokenizer) -> int:
    """The token whose logit is a reward: where a vocabulary (of characters) has no end token, its first one."""
    return 0 if tokenizer.eos is None else tokenizer.eos


def judgeable(
    rows: list[Row], limit: int | None, group: int, how: Layout, room: int | None, device: torch.device
) -> Batch:
    """Sequences as layout.arrange has them, each up to its last learned token (at most `limit` tokens), all of which are input.
    Its slot is that token's place."""
    ends = [int(row.learned.nonzero()[-1]) + 1 for row in rows]
    ids = [row.ids[:end] if limit is None else row.ids[: min(end, limit)] for row, end in zip(rows, ends)]
    padded = [Row(torch.cat((x, x[-1:])), torch.arange(len(x) + 1) == len(x)) for x in ids]
    laid = {name: t.to(device) for name, t in arrange(padded, group, how, room).items()}
    return laid | {"targets": torch.full_like(laid["targets"], IGNORED)}


def rewards(model: Any, batch: Batch, slots: Tensor, token: int) -> tuple[Tensor, Any]:
    """-> (reward (N,) at each of slots (N, 1), what the sparse layers say)."""
    bare: Any = getattr(model, "module", model)
    states: list[Tensor] = []
    with bare.norm.register_forward_hook(lambda module, inputs, x: states.append(x)):
        _, aux = model(batch["tokens"], **{name: t for name, t in batch.items() if name != "tokens"})
    final = bare.outgoing(states[0].flatten(0, 1)[slots[:, 0]]).float()
    return (final * bare.head.weight[token].float()).sum(-1), aux


@torch.no_grad()
def judged(model: Any, rows: list[Row], token: int, room: int = 4096, at_once: int = 32) -> Tensor:
    """The rewards (N,) of sequences, `at_once` a forward in rows of about `room` tokens."""
    device, found = next(model.parameters()).device, [torch.zeros(0)]
    for i in range(0, len(rows), at_once):
        batch = judgeable(rows[i : i + at_once], model.position_limit, 1, "packed", room, device)
        slots = batch.pop("slots")
        found.append(rewards(model, batch, slots, token)[0].cpu())
    return torch.cat(found)

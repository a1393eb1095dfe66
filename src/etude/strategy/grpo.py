"""Group-relative policy optimisation (Shao et al. 2024) and its relatives: several completions of a prompt, each judged
against the others. They are drawn from the policy and judged by rewards, or given with their rewards. Shapes: P prompts
or groups, N completions, L learned tokens of the longest of them, (B, T) as they lie in memory (layout.py)."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.data.loader import Batch
from etude.data.order import mix
from etude.errors import Refusal
from etude.infer.engine import Settings
from etude.infer.request import Completion
from etude.infer.sampling import Sampling
from etude.parallel import World
from etude.strategy import rollout
from etude.strategy.layout import Layout, Row, arrange, rows_of, take
from etude.strategy.rollout import Judge, Moments, Rollout
from etude.strategy.seq import Metrics
from etude.text import chat
from etude.text.tokenizer import Tokenizer

TEXTS = 4  # completions of a micro-batch that are kept as text


class Reduction(NamedTuple):
    """How tokens' losses x (N, L), 0 outside of completions of n (N,) learned tokens, at most `limit`, become one."""

    total: Callable[[Tensor, Tensor], Tensor]  # (x, n) -> sum
    weight: Callable[[Tensor, int], int]  # (n, limit) -> what the sums of a step are divided by, summed


def _sequences(n: Tensor) -> int:
    """How many completions have something to learn: masked ones count nowhere."""
    return int((n > 0).sum())


REDUCTIONS = {
    # mean over completions of token means
    "grpo": Reduction(lambda x, n: (x.sum(1) / n.clamp_min(1)).sum(), lambda n, limit: _sequences(n)),
    # mean over the tokens of a micro-batch
    "bnpo": Reduction(lambda x, n: x.sum() / n.sum().clamp_min(1), lambda n, limit: int(n.sum() > 0)),
    # all tokens over a constant for each completion (Liu et al. 2025)
    "dr_grpo": Reduction(lambda x, n: x.sum(), lambda n, limit: _sequences(n) * limit),
    # all tokens of a step alike (Yu et al. 2025)
    "dapo": Reduction(lambda x, n: x.sum(), lambda n, limit: int(n.sum())),
}


class GRPO:
    """rho = exp(l - l_old) of each token, l being log pi at `temperature`, or with level="sequence" of each completion,
    exp(mean_t(l - l_old)) (GSPO, Zheng et al. 2025). With an advantage A the loss of a token is, by `objective`,

    clip   -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); `delta` caps the first rho (INTELLECT-2, 2025)
    cispo  -sg(min(rho, e_max)) A l (MiniMax-M1, 2025)
    sapo   -4 sigmoid(tau (rho - 1)) / tau A, tau = tau_pos where A > 0, else tau_neg (Gao et al. 2025)

    times the sampler's weight where `correction` asks for it, plus beta times k3 = exp(ref - l) - (ref - l) - 1 (Schulman
    2020), with `kl_weighted` times rho.

    A completion's advantage is its reward, the sum of `rewards`, less its group's mean, over the standard deviation of
    the group or of all completions of the rollout on all ranks (`scale`). One whose reward failed is left out of both
    and has A = 0. top_k and top_p narrow what is drawn, not what is learnt."""

    kinds = ("prompts", "groups")
    goal = ("reward/mean", -1)  # the loss of completions that were just drawn says little

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Settings,
        *,
        group_size: int,
        max_completion: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        steps_per_rollout: int,
        iterations: int,
        objective: Literal["clip", "cispo", "sapo"],
        clip_low: float,
        clip_high: float,
        delta: float | None,
        e_max: float,
        tau_pos: float,
        tau_neg: float,
        level: Literal["token", "sequence"],
        beta: float,
        kl_weighted: bool,
        sync_interval: int | None,
        scale: Literal["group", "batch", "none"],
        reduction: Literal["grpo", "bnpo", "dr_grpo", "dapo"],
        mask_overlong: bool,
        drop_silent: bool,
        correction: Literal["none", "truncate", "mask"],
        correction_level: Literal["token", "sequence"],
        correction_cap: float,
        layout: Literal["rows", "packed", "shared"],
        rewards: dict[str, Any],
    ):
        self.check(
            group_size,
            max_completion,
            temperature,
            top_k,
            top_p,
            steps_per_rollout,
            iterations,
            objective,
            clip_low,
            clip_high,
            delta,
            e_max,
            tau_pos,
            tau_neg,
            beta,
            sync_interval,
            correction_cap,
            rewards,
        )
        self.tokenizer, self.engine = tokenizer, engine
        self.stop_ids = frozenset(tokenizer.stop_ids | chat.end_of_turn(tokenizer))
        self.group_size, self.max_completion = group_size, max_completion
        self.sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self.steps_per_rollout, self.iterations = steps_per_rollout, iterations
        self.objective = {"clip": self.clip, "cispo": self.cispo, "sapo": self.sapo}[objective]
        self.clip_low, self.clip_high, self.delta = clip_low, clip_high, delta
        self.e_max, self.tau_pos, self.tau_neg, self.level = e_max, tau_pos, tau_neg, level
        self.beta, self.kl_weighted, self.sync_interval = beta, kl_weighted, sync_interval
        self.scale, self.reduction = scale, REDUCTIONS[reduction]
        self.mask_overlong, self.drop_silent = mask_overlong, drop_silent
        self.correction, self.correction_level, self.correction_cap = correction, correction_level, correction_cap
        self.layout, self.judge = layout, Judge(rewards, tokenizer)
        self.needs_reference = beta > 0

    @staticmethod
    def check(
        group_size: int,
        max_completion: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        steps_per_rollout: int,
        iterations: int,
        objective: str,
        clip_low: float,
        clip_high: float,
        delta: float | None,
        e_max: float,
        tau_pos: float,
        tau_neg: float,
        beta: float,
        sync_interval: int | None,
        correction_cap: float,
        rewards: dict,
    ) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if group_size < 2:
            raise ValueError(
                f"strategy.group_size={group_size} should be at least 2: completions are compared in a group"
            )
        counts = {"max_completion": max_completion, "steps_per_rollout": steps_per_rollout, "iterations": iterations}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"strategy.{name}={count} should be at least 1")
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
        if delta is not None and objective != "clip":
            raise ValueError(f"strategy.delta={delta} caps the ratio of objective=clip alone; type strategy.delta=null")
        if delta is not None and not delta > 1:
            raise ValueError(f"strategy.delta={delta} should be above 1 + clip_high, or null for no cap")
        for name, value in {"e_max": e_max, "tau_pos": tau_pos, "tau_neg": tau_neg}.items():
            if not value > 0:
                raise ValueError(f"strategy.{name}={value} should be above 0")
        if not beta >= 0:
            raise ValueError(f"strategy.beta={beta} should be at least 0 (0: no reference)")
        if sync_interval is not None and sync_interval < 1:
            raise ValueError(f"strategy.sync_interval={sync_interval} should be at least 1 step, or null for never")
        if sync_interval is not None and beta == 0:
            raise ValueError(
                f"strategy.sync_interval={sync_interval} renews the reference, and without strategy.beta there is none; type strategy.beta=0.04, or strategy.sync_interval=null"
            )
        if not correction_cap >= 1:
            raise ValueError(
                f"strategy.correction_cap={correction_cap} should be at least 1, which is the weight of a token that the sampler and the trainer agree on"
            )
        if not rewards:
            raise ValueError("strategy.rewards is empty: there is nothing to learn from; see conf/strategy/grpo.yaml")
        if taken := {"mean", "std", "failed", "given"} & set(rewards):
            raise ValueError(
                f"strategy.rewards.{min(taken)}: reward/{min(taken)} is a metric of all; choose another name"
            )
        for name, reward in rewards.items():
            if not callable(reward) and not (isinstance(reward, dict) and reward.get("_partial_") is True):
                raise ValueError(
                    f"strategy.rewards.{name} should be a node with a _target_ and _partial_: true; type +reward@strategy.rewards.{name}=<a file of conf/reward>"
                )

    # ------------------------------------------------------------ rollouts

    def collect(self, model: nn.Module, batches: list[Batch], seeds: list[int], world: World) -> list[Batch]:
        """Loader's batches of prompts (tokens, doc_ids (P, T), fields) or of groups (tokens, targets, doc_ids, group,
        rewards) -> for each one tokens, targets, doc_ids (B, T), slots (N, L) as layout.py has them, advantages (N,),
        metrics, texts; where the sampler said them sampler_logprob (N, L), and where the policy will have moved on before
        it is learnt from, or `correction` asks, old_logprob (N, L)."""
        bare: Any = getattr(model, "module", model)
        training = bare.training
        bare.eval()
        try:
            rollouts = self.rollouts(bare, batches, seeds)
            counted = [self.counted(r) for r in rollouts]
            every = torch.cat([torch.zeros(0, dtype=torch.float64), *counted])
            spread = rollout.deviation(every, world) if self.scale == "batch" else None
            return [
                self.arranged(bare, r, c, spread, batch["tokens"].device)
                for r, c, batch in zip(rollouts, counted, batches)
            ]
        finally:
            bare.train(training)

    def rollouts(self, model: Any, batches: list[Batch], seeds: list[int]) -> list[Rollout]:
        """One of each batch; what is to be drawn is drawn together."""
        prompts = [[] if "group" in b else prompts_of(b) for b in batches]
        keys = [prompt_seed(seed, i) for seed, some in zip(seeds, prompts, strict=True) for i in range(len(some))]
        completions = iter(self.draw(model, list(itertools.chain(*prompts)), keys, self.group_size, self.sampling))
        return [
            self.given(b)
            if "group" in b
            else self.judged(b["fields"], list(itertools.islice(completions, len(some) * self.group_size)))
            for b, some in zip(batches, prompts)
        ]

    def draw(
        self, model: Any, prompts: list[list[int]], seeds: list[int], n: int, sampling: Sampling
    ) -> list[Completion]:
        return rollout.draw(
            model,
            self.tokenizer,
            self.engine,
            prompts,
            seeds,
            n=n,
            max_tokens=self.max_completion,
            sampling=sampling,
            stop_ids=self.stop_ids,
        )

    def judged(self, fields: list[dict[str, Any]], completions: list[Completion]) -> Rollout:
        """Completions of as many prompts as there are `fields`, equally many of each."""
        n = len(completions) // max(1, len(fields))
        rows = [rollout.row_of(c) for c in completions]
        truncated = torch.tensor([c.finish == "length" for c in completions], dtype=torch.bool)
        texts = [rollout.text_of(row, cut, self.tokenizer) for row, cut in zip(rows, truncated.tolist())]
        rewards, metrics = rollout.verdict(self.judge(rows, texts, [f for f in fields for _ in range(n)]))
        return Rollout(
            rows=rows,
            group=torch.arange(len(fields)).repeat_interleave(n),
            rewards=rewards,
            truncated=truncated,
            sampled=[torch.tensor([t.logprob for t in c.tokens], dtype=torch.float32) for c in completions],
            metrics=metrics | rollout.lengths(rows, truncated),
        )

    def given(self, batch: Batch) -> Rollout:
        """Groups of a file, with their rewards."""
        rows, rewards = rows_of(batch), batch["rewards"].cpu().double()
        truncated = torch.tensor([int(r.ids[r.learned][-1]) not in self.stop_ids for r in rows], dtype=torch.bool)
        metrics = rollout.overall(rewards) | rollout.lengths(rows, truncated)
        return Rollout(rows, batch["group"].cpu(), rewards, truncated, None, metrics)

    def counted(self, r: Rollout) -> Tensor:
        """The rewards (N,) that groups are compared by."""
        return torch.where(r.truncated, torch.nan, r.rewards) if self.mask_overlong else r.rewards

    def arranged(self, model: Any, r: Rollout, counted: Tensor, spread: float | None, device: torch.device) -> Batch:
        """A rollout as a batch: without what teaches nothing, but never without a row, because every rank needs a backward
        pass."""
        moments = Moments.of(counted, r.group)
        groups = torch.tensor(len(moments.silent))
        masked = r.truncated if self.mask_overlong else torch.zeros_like(r.truncated)
        metrics = r.metrics | {
            "reward/std": (moments.std.sum(), (moments.n > 1).sum()),  # within a group
            "groups/no_signal": (moments.silent.sum(), groups),
        }
        if self.mask_overlong:
            metrics["completion/masked"] = masked.sum(), torch.tensor(len(r.rows))
        kept = torch.ones_like(masked)
        if self.drop_silent:
            metrics["groups/dropped"] = moments.silent.sum(), groups
            kept = ~moments.silent[r.group]
            if not kept.any():
                kept, masked = r.group == 0, torch.ones_like(masked)
        at = kept.nonzero()[:, 0].tolist()
        made = self.lay([unlearned(r.rows[i]) if masked[i] else r.rows[i] for i in at], r.group[kept], model, device)
        made["advantages"] = rollout.advantages(counted, r.group, self.scale, spread)[kept].float().to(device)
        moves = self.steps_per_rollout * self.iterations > 1 or self.correction != "none"
        exact = self.engine.deterministic and r.sampled is not None
        if moves or exact:
            with torch.no_grad():
                logprob = take(self.scores(model, made)[0].logprob, made["slots"])
            made |= {
                name: logprob.clone() for name, on in {"old_logprob": moves, "sampler_logprob": exact}.items() if on
            }
        if r.sampled is not None and not exact:
            drawn = [r.sampled[i][:0] if masked[i] else r.sampled[i] for i in at]
            wide = nn.utils.rnn.pad_sequence(drawn, batch_first=True)
            made["sampler_logprob"] = F.pad(wide, (0, made["slots"].shape[1] - wide.shape[1])).to(device)
        shown = zip(r.rows[:TEXTS], r.truncated.tolist(), r.rewards.tolist())
        texts = [rollout.told(row, cut, reward, self.tokenizer) for row, cut, reward in shown]
        return made | {"metrics": metrics, "texts": texts}

    def lay(self, rows: list[Row], group: Tensor, model: Any, device: torch.device) -> Batch:
        """The rows in memory; groups of different sizes cannot share their prompts and are packed."""
        sizes = group.unique_consecutive(return_counts=True)[1]
        equal = bool((sizes == sizes[0]).all())
        how: Layout = self.layout if equal or self.layout != "shared" else "packed"
        limit = model.position_limit if how == "rows" else None
        made = arrange(rows, int(sizes[0]) if how == "shared" else 1, how, limit)
        if not made["slots"].shape[1]:  # nothing is learned
            made["slots"] = F.pad(made["slots"], (0, 1), value=-1)
        return {name: t.to(device) for name, t in made.items()}

    # ------------------------------------------------------------ the loss

    def weight(self, batch: Batch) -> int:
        """What the sum of losses is divided by, over the whole step."""
        return self.reduction.weight((batch["slots"] >= 0).sum(1), self.max_completion)

    def scores(self, model: Any, batch: Batch) -> tuple[Any, Any]:
        """(Scores (B, T) at the temperature, aux) of a collected batch."""
        given = {name: batch[name] for name in ("targets", "doc_ids", "branches") if name in batch}
        with tempered(model, self.sampling.temperature):
            return model(batch["tokens"], **given)

    def loss(self, model: nn.Module, ref: nn.Module | None, batch: Batch) -> tuple[Tensor, Metrics]:
        """-> the loss of a collected batch, summed as the reduction says, and metrics as (sum, count)."""
        slots, A = batch["slots"], batch["advantages"][:, None]
        mask = slots >= 0
        n = mask.sum(1)
        scores, aux = self.scores(model, batch)
        logprob = take(scores.logprob, slots)
        old = batch.get("old_logprob", logprob.detach())  # of the policy that drew, as the trainer computes it
        ratio = logprob - old
        if self.level == "sequence":
            ratio = ratio.sum(1, keepdim=True) / n.clamp_min(1)[:, None]
        rho = ratio.exp()
        x, left_alone = self.objective(rho, A, logprob)
        metrics = {name: average(flags.float(), mask) for name, flags in left_alone.items()}
        metrics["ratio/mean"] = average(rho.detach(), mask)
        metrics["entropy"] = scores.entropy.sum(), n.sum()
        if "sampler_logprob" in batch:
            weight, found = self.sampler(old, batch["sampler_logprob"], mask)
            metrics |= found
            if weight is not None:
                x = x * weight
        if self.needs_reference:
            assert ref is not None
            with torch.no_grad():
                before = take(self.scores(ref, batch)[0].logprob, slots)
            gap = before - logprob
            kl = gap.exp() - gap - 1
            kl = rho * kl if self.kl_weighted else kl
            x = x + self.beta * kl
            metrics["kl"] = average(kl.detach(), mask)
        loss = self.reduction.total(x * mask, n)
        metrics["loss"] = loss.detach(), torch.tensor(self.weight(batch))
        if aux is not None:
            loss = loss + self.reduction.total(take(aux.loss.expand(batch["tokens"].shape), slots), n)
            metrics |= aux.metrics(batch["targets"] >= 0)
        return loss, metrics | batch.get("metrics", {})

    def clip(self, rho: Tensor, A: Tensor, logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """rho (N, L) or (N, 1), A (N, 1), logprob (N, L) -> losses, and which of them have no gradient, by metric."""
        flags = {"clip/low": (rho < 1 - self.clip_low) & (A < 0), "clip/high": (rho > 1 + self.clip_high) & (A > 0)}
        clipped = rho.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.delta is not None:
            flags["clip/delta"] = (rho > self.delta) & (A < 0)
            rho = rho.clamp_max(self.delta)
        return -torch.minimum(rho * A, clipped * A), flags

    def cispo(self, rho: Tensor, A: Tensor, logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Every token keeps its gradient; the metric is where the weight of a good one was capped."""
        capped = rho.detach().clamp_max(self.e_max)
        return -capped * A * logprob, {"clip/high": (rho > self.e_max) & (A > 0)}

    def sapo(self, rho: Tensor, A: Tensor, logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing is clipped: a sigmoid closes softly, so there is no metric."""
        tau = torch.where(A > 0, self.tau_pos, self.tau_neg)
        return -4 / tau * torch.sigmoid(tau * (rho - 1)) * A, {}

    def sampler(self, old: Tensor, sampled: Tensor, mask: Tensor) -> tuple[Tensor | None, Metrics]:
        """Log-probabilities of the same policy by trainer and sampler (N, L) -> the weight exp(old - sampled) of each token
        (N, L), or of each completion (N, 1), as `correction` has it, None without; and metrics, which there always are."""
        gap = old.detach() - sampled
        raw = (gap.sum(1, keepdim=True) if self.correction_level == "sequence" else gap).exp()
        metrics = {
            "sampler/gap": average(gap.abs(), mask),
            "sampler/gap_max": (gap.abs().max(), torch.tensor(1)),  # of a micro-batch; the mean over several
            "sampler/weight": average(raw, mask),
        }
        if self.correction == "none":
            return None, metrics
        beyond = raw > self.correction_cap
        metrics["sampler/capped"] = average(beyond.float(), mask)
        if self.correction == "truncate":
            return raw.clamp_max(self.correction_cap), metrics
        return torch.where(beyond, 0, raw), metrics

    # ------------------------------------------------------------ validation

    def evaluate(self, model: nn.Module, batch: Batch, seed: int) -> Metrics:
        """Of prompts: the likeliest completion of each, token by token, judged. Of groups: reward/mean is the reward of that
        completion of each group which the policy finds likeliest, by its mean log-probability a token; reward/given the
        mean of all."""
        bare: Any = getattr(model, "module", model)
        if "group" not in batch:
            prompts = prompts_of(batch)
            greedy = Sampling(temperature=0.0)
            seeds = [prompt_seed(seed, i) for i in range(len(prompts))]
            return self.judged(batch["fields"], self.draw(bare, prompts, seeds, 1, greedy)).metrics
        r = self.given(batch)
        made = self.lay(r.rows, r.group, bare, batch["tokens"].device)
        with torch.no_grad():
            scores, _ = self.scores(bare, made)
        n = (made["slots"] >= 0).sum(1)
        likely = (take(scores.logprob, made["slots"]).sum(1) / n.clamp_min(1)).cpu()
        likely = likely.masked_fill(r.rewards.isnan(), -torch.inf)
        best = [i[likely[i].argmax()] for i in ((r.group == g).nonzero()[:, 0] for g in r.group.unique())]
        metrics = r.metrics | {"reward/given": r.metrics["reward/mean"], "entropy": (scores.entropy.sum(), n.sum())}
        return metrics | {"reward/mean": rollout.overall(r.rewards[torch.stack(best)])["reward/mean"]}


def prompts_of(batch: Batch) -> list[list[int]]:
    return [row[ids >= 0].tolist() for row, ids in zip(batch["tokens"].cpu(), batch["doc_ids"].cpu())]


def prompt_seed(seed: int, i: int) -> int:
    """What the completions of a batch's i-th prompt are drawn by; it depends on no other prompt."""
    return int(mix(seed, i)[0] >> 1)


def unlearned(row: Row) -> Row:
    """As much of a row as a backward pass needs, with nothing to learn: its prompt and one token."""
    n = max(1, int(row.learned.int().argmax())) + 1
    return Row(row.ids[:n], torch.zeros(n, dtype=torch.bool))


def average(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of x (N, L) over what `mask` (N, L) marks, or of x (N, 1) over the completions that it marks at all."""
    mask = mask.any(1, keepdim=True) if x.shape[1] == 1 else mask
    return (x * mask).sum(), mask.sum()


@contextlib.contextmanager
def tempered(model: Any, temperature: float) -> Iterator[None]:
    """The model's logits divided by `temperature`, also where it gives scores instead of them: the states before its head
    are divided, and a cap c of logits, because c tanh(z / c) / t is c' tanh((z / t) / c') with c' = c / t."""
    if temperature == 1:
        yield
        return
    bare = getattr(model, "module", model)
    if not hasattr(bare, "logit_cap"):
        raise Refusal(
            f"reference=cached has log-probabilities at temperature 1, and strategy.temperature={temperature}: set it to 1, or reference=copy"
        )
    cap = bare.logit_cap
    hook = bare.norm.register_forward_hook(lambda module, inputs, x: x / temperature)
    bare.logit_cap = None if cap is None else cap / temperature
    try:
        yield
    finally:
        hook.remove()
        bare.logit_cap = cap

"""The loop: every strategy and every model trains here, in one pass from top to bottom. No callbacks: order is meaning."""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude import diagnosis
from etude.data.loader import Batch, Batches
from etude.display import Display
from etude.errors import Interrupted, NonFinite
from etude.optim import set_lr
from etude.parallel import StopSignals, World
from etude.run import Status
from etude.track import Trackers
from etude.window import Window, key


@dataclasses.dataclass
class Progress:
    """Where a run is: with the weights and the optimizer's state, all that is needed to go on."""

    step: int = 0  # updates done, which is the next step's number
    tokens: int = 0  # training tokens seen, all ranks
    seconds: float = 0.0  # spent training, over all resumes
    best: float = math.inf  # value of the strategy's goal; -inf to begin with where it is to rise
    best_step: int = 0
    bad_evals: int = 0  # since the best
    skipped: int = 0  # updates left out for non-finite gradients


def due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def horizon(settings: dict, batches: Batches, iterations: int, flops_per_token: int) -> int | None:
    """The number of steps at which the first of max_steps, max_epochs, max_tokens and max_flops is reached; None without
    them. Each sample is learnt from `iterations` times before the next."""
    size = settings["batch_size"]
    limits = [settings["max_steps"]]
    if settings["max_epochs"] is not None:
        limits.append(math.ceil(settings["max_epochs"] * batches.epoch_samples / size) * iterations)
    if settings["max_tokens"] is not None:
        limits.append(math.ceil(settings["max_tokens"] / (size * batches.tokens_per_sample)))
    if settings["max_flops"] is not None:
        limits.append(math.ceil(settings["max_flops"] / (size * batches.tokens_per_sample * flops_per_token)))
    return min((n for n in limits if n is not None), default=None)


def fit(
    *,
    settings: dict,
    model: nn.Module,
    ref: nn.Module | None,
    strategy: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int, float], float],
    batches: Batches,
    window: Window,
    parallel: Any,
    world: World,
    progress: Progress,
    tracker: Trackers,
    status: Status,
    display: Display,
    save: Callable[[bool], None],
    sample: Callable[[int], Any],
    evaluate: Callable[[bool], dict[str, float]],
    precision: str,
    peak_flops: float | None,
    folder: Path,
    until: int | None = None,
) -> str:
    """Train from progress.step until a limit; -> why it ended. `settings` are train.py's root keys; `model` is wrapped
    by `parallel`; save(best) writes a checkpoint of `progress`; evaluate(True) is the whole validation split's. Before step
    `until` it only ends: no limit is reached and nothing is written. Raises Interrupted (after saving), NonFinite."""
    size = settings["batch_size"]
    bare: Any = getattr(model, "module", model)
    flops_per_token = bare.flops_per_token(batches.data.seq_len)
    steps_per_epoch = batches.epoch_samples / size * window.iterations
    limit = horizon(settings, batches, window.iterations, flops_per_token)
    status.fields["steps"] = limit
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")
    if world.size > 1:
        warm_up(model, strategy, ref, batches, window.data_step(progress.step), world, autocast)
    if not progress.best_step:
        progress.best = goal(strategy)[1] * math.inf
    display.start(progress.step, limit)
    last_log, begun = (time.perf_counter(), progress.tokens), time.perf_counter() - progress.seconds
    sync_every: int | None = getattr(strategy, "sync_interval", None)
    watch = diagnosis.Watch(settings["spike_above"], settings["spike_window"])
    with StopSignals() as signals, window.reading(progress.step, limit):
        while True:
            step = progress.step
            if step == until:
                return f"step {step} is next"
            progress.seconds = time.perf_counter() - begun
            steps = limit or estimate_steps(step, progress.seconds, settings["max_minutes"])
            collected = window.collected(model, step)
            wanted = float(signals.name is not None)
            out_of_time = float(
                settings["max_minutes"] is not None and progress.seconds >= 60 * settings["max_minutes"]
            )
            tokens = float(sum(map(n_inputs, collected)))
            *weight, tokens, wanted, out_of_time = world.sum([*weigh(strategy, collected), tokens, wanted, out_of_time])
            if wanted:
                save(False)
                raise Interrupted(
                    f"{signals.name or 'a signal to another rank'} after step {step}; go on with: python train.py resume={folder}"
                )
            set_lr(optimizer, schedule(step, steps, steps_per_epoch))
            done = step + 1
            last = "time limit" if out_of_time else "all steps done" if done == limit else ""
            logging = done == 1 or due(done, settings["log_every"]) or bool(last)
            sums, norm = gradients(model, ref, strategy, collected, weight, settings, step, parallel, world, autocast)
            load = router_load(sums, world)
            means = reduce(sums, world) | spread(load) if logging else {}
            seen = {"grad_norm": norm.item()} | ({"loss": means["loss"]} if "loss" in means else {})
            finite = math.isfinite(seen["grad_norm"])
            if (why := watch.step(seen)) is not None:
                unclipped = settings | {"clip": None}
                about = (model, ref, strategy, collected, weight, unclipped, step, parallel, world, autocast)
                looked = diagnosis.look(model, functools.partial(gradients, *about))
                path = diagnosis.dump(
                    "spike" if finite else "nonfinite",
                    why,
                    folder=folder,
                    world=world,
                    step=step,
                    batches=batches,
                    window=window,
                    collected=collected,
                    values=seen,
                    load=load,
                    looked=looked,
                )
                display.say(f"note     step {done}: {why}; see {path}, or: python -m etude.replay {folder} step={done}")
            if not finite:
                if settings["on_nonfinite"] == "stop":
                    raise NonFinite(
                        f"the gradient of step {done} is {norm.item()}: no update was made. Lower optimizer.lr, or on_nonfinite=skip; the batch is in {folder}/logs. To look at it: python -m etude.replay {folder} step={done}"
                    )
                progress.skipped += 1
                optimizer.zero_grad()
            histograms = due(done, settings["histogram_every"]) and [
                (f"{what}/{name}", t)
                for name, p in bare.named_parameters()
                for what, t in (("params", p), ("grads", p.grad))
                if t is not None
            ]
            if histograms and world.rank == 0:
                tracker.histograms(done, histograms)
            optimizer.step()
            optimizer.zero_grad()
            if load is not None:
                bare.balance(load)
            if ref is not None and due(done, sync_every):
                refresh(ref, bare)
            progress.step, progress.tokens = done, progress.tokens + int(tokens)

            values: dict[str, float] = {}
            if logging:
                values = {f"train/{k}": v for k, v in means.items()}
                now = time.perf_counter()
                rate = (progress.tokens - last_log[1]) / (now - last_log[0])
                last_log = now, progress.tokens
                values |= {
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": norm.item(),
                    "tokens": progress.tokens,
                    "flops": progress.tokens * flops_per_token,
                    "perf/seconds": progress.seconds,
                    "epoch": done / steps_per_epoch,
                    "batch": batch_hash(collected, world),
                    "perf/tokens_per_s": rate,
                }
                if progress.skipped:
                    values["skipped"] = progress.skipped
                if peak_flops:
                    values["perf/mfu"] = rate * flops_per_token / (peak_flops * world.size)
            if due(done, settings["eval_every"]) or (last and settings["eval_every"] is not None):
                found = evaluate(False)
                values |= found
                name, sign = goal(strategy)
                better = sign * found[f"val/{name}"] < sign * progress.best
                progress.bad_evals = 0 if better else progress.bad_evals + 1
                if better:
                    progress.best, progress.best_step = found[f"val/{name}"], done
                patience = settings["early_stopping"]
                if patience is not None and progress.bad_evals >= patience:
                    last = last or f"no better validation {name} for {patience} evaluations"
                if reached(strategy, progress, settings["stop_at"]):
                    last = last or f"validation {name} {progress.best:.4g} reached stop_at={settings['stop_at']}"
            if last:
                values |= evaluate(True)
            if world.rank == 0:
                if values:
                    tracker.scalars(done, values)
                    progress.seconds = time.perf_counter() - begun
                    status.beat(done, progress.seconds, values)
                display.update(done, steps, values, logged=bool(values))
            if due(done, settings["sample_every"]) and world.rank == 0:
                for i, text in enumerate(t for batch in collected for t in batch.get("texts", ())):
                    tracker.text(done, f"rollout/{i}", text)
            if due(done, settings["sample_every"]) and not last:
                sample(done)
            progress.seconds = time.perf_counter() - begun
            best = done == progress.best_step
            if due(done, settings["save_every"]) or best or last:
                save(best)
            if (
                due(done, settings["eval_every"])
                or due(done, settings["sample_every"])
                or due(done, settings["save_every"])
            ):
                last_log = time.perf_counter(), progress.tokens  # the pace is that of training alone
            if last:
                return last


@torch.no_grad()
def refresh(ref: nn.Module, model: nn.Module) -> None:
    """Let the reference be the model as it is now."""
    for old, new in zip(ref.parameters(), model.parameters(), strict=True):
        old.copy_(new)


def goal(strategy: Any) -> tuple[str, int]:
    """(metric of evaluations, 1 where the lowest is the best, -1 where the highest): the loss, unless the strategy says."""
    return getattr(strategy, "goal", ("loss", 1))


def reached(strategy: Any, progress: Progress, stop_at: float | None) -> bool:
    """Whether the best evaluation is as good as `stop_at`."""
    return stop_at is not None and bool(progress.best_step) and goal(strategy)[1] * (progress.best - stop_at) <= 0


def weigh(strategy: Any, collected: list[Batch]) -> list[float]:
    """What the sums that a strategy calls its loss are divided by, one number for each: added up over the batches."""
    weights = [w if isinstance(w, tuple) else (w,) for w in map(strategy.weight, collected)]
    return [float(sum(several)) for several in zip(*weights)]


def n_inputs(batch: Batch) -> int:
    """Tokens without padding, as if each sequence had a row of its own: a prompt that several share counts for each."""
    if "doc_ids" not in batch:
        return batch["tokens"].numel()
    real = batch["doc_ids"] >= 0
    if "branches" not in batch:
        return int(real.sum())
    document = batch["doc_ids"].clamp_min(0)
    most = torch.zeros_like(document).scatter_reduce(1, document, batch["branches"] * real, "amax")
    times = torch.where(batch["branches"] == 0, most.gather(1, document).clamp_min(1), 1)  # in a trunk: its branches
    return int((times * real).sum())


def gradients(
    model: nn.Module,
    ref: nn.Module | None,
    strategy: Any,
    collected: list[Batch],
    weight: list[float],
    settings: dict,
    step: int,
    parallel: Any,
    world: World,
    autocast: Any,
    lap: Callable[[str], None] = lambda part: None,
) -> tuple[list[dict], Tensor]:
    """Forward and backward of a step's micro-batches, summed over the ranks and divided by the step's global `weight`,
    then clipped. -> (metrics of each micro-batch, norm before clipping). `lap` is called after each part (bench.py)."""
    sums: list[dict] = []
    for i, batch in enumerate(collected):
        torch.manual_seed(key(settings["seed"], "forward", step, world.rank * len(collected) + i))
        with parallel.sync_gradients(model, last=i == len(collected) - 1):
            with autocast:
                loss, metrics = strategy.loss(model, ref, batch)
            lap("forward")
            (loss * (world.size / loss.new_tensor(weight).clamp_min(1))).sum().backward()
            lap("backward")
        sums.append(metrics)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings["clip"] or math.inf)
    lap("clip")
    return sums, norm


def estimate_steps(step: int, seconds: float, minutes: float | None) -> int:
    """With only a time limit: the steps that fit in at the pace so far, for the schedule. At first, a guess of 1000."""
    if minutes is None:
        raise ValueError("a limit is needed")
    return 1000 if step < 5 else max(step + 1, round(step * 60 * minutes / max(seconds, 1e-9)))


def alone(world: World) -> World:
    """This process by itself: for what the others do not do at the same time."""
    return World(0, 1, world.device)


def warm_up(
    model: nn.Module, strategy: Any, ref: nn.Module | None, batches: Batches, step: int, world: World, autocast: Any
) -> None:
    """One forward and backward for nothing. DDP arranges its buckets anew after its first backward, which changes the
    order of sums: so a resumed run would differ from an unbroken one in every step but the first."""
    indices = batches.sampler.micro_batches(step)[0].tolist()
    batch = batches.to_device(batches.train.__getitems__(indices))
    torch.manual_seed(0)
    with autocast:
        (collected,) = strategy.collect(model, [batch], [0], alone(world))
        loss, _ = strategy.loss(model, ref, collected)
    loss.sum().backward()
    model.zero_grad()


def reduce(sums: list[dict], world: World) -> dict[str, float]:
    """Metrics as (sum, count) of each micro-batch -> their means over all micro-batches and ranks."""
    named = world.gather(sorted({name for metrics in sums for name in metrics}))  # a rank may have had no batch
    names = world.broadcast(sorted({name for names in named for name in names}))
    flat = [float(sum(float(m[n][i]) for m in sums if n in m)) for n in names for i in (0, 1)]
    flat = world.sum(flat)
    means = {n: flat[2 * i] / max(flat[2 * i + 1], 1e-9) for i, n in enumerate(names)}
    terms = [v for n, v in means.items() if n.startswith("loss/")]
    if "loss" not in means and terms:  # each divided by its own count
        means["loss"] = sum(terms)
    # Of answers that are not in pairs: a difference of means over different counts, which no sum of micro-batches gives.
    if "rewards/margin" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def router_load(sums: list[dict], world: World) -> Tensor | None:
    """Take the experts' load out of the micro-batches' metrics: (sparse layers, experts) tokens of the whole step on all
    ranks, None for a dense model."""
    loads = [metrics.pop("router/load")[0] for metrics in sums if "router/load" in metrics]
    if not loads:
        return None
    total = torch.stack(loads).sum(0)
    return torch.tensor(world.sum(total.flatten().tolist()), device=total.device).view_as(total)


def spread(load: Tensor | None) -> dict[str, float]:
    """How even a step's load is: the largest and smallest share of an expert in any layer, 1 being an even one, and how
    many experts saw no token."""
    if load is None:
        return {}
    share = load / load.mean(-1, keepdim=True).clamp_min(1e-9)
    return {
        "router/max_load": share.max().item(),
        "router/min_load": share.min().item(),
        "router/dead": float((load == 0).sum()),
    }


def batch_hash(collected: list[Batch], world: World) -> int:
    """A number for the step's samples, the same however they are spread over micro-batches and ranks."""
    rows = 0
    for batch in collected:
        if "crc" in batch:  # of one whose targets do not tell its samples apart
            rows += batch["crc"]
            continue
        if "slots" in batch:  # however the sequences are laid out
            ids = batch["targets"].flatten()[batch["slots"].clamp_min(0)].cpu().numpy()
            rows += sum(zlib.crc32(r[:n].tobytes()) for r, n in zip(ids, (batch["slots"] >= 0).sum(1).tolist()))
            continue
        padding = (batch["doc_ids"] < 0).sum(1).tolist() if "doc_ids" in batch else [0] * len(batch["tokens"])
        for row, n in zip(batch["tokens"].cpu().numpy(), padding):
            rows += zlib.crc32(row[: len(row) - n].tobytes())
    return int(world.sum([float(rows)])[0])


@torch.no_grad()
def validate(
    model: nn.Module,
    strategy: Any,
    ref: nn.Module | None,
    batches: Iterable[Batch],
    autocast: Any,
    world: World,
    seed: int,
) -> dict[str, float]:
    """Means of the strategy's metrics over `batches`, dropout off, shared over the ranks: of its loss, or of what it
    computes instead. Training's random numbers are
    keyed by step, so nothing here can touch them; what is drawn here is the same at every evaluation."""
    training = model.training
    judge = getattr(strategy, "evaluate", None)
    model.eval()
    sums = []
    for i, batch in enumerate(batches):
        if i % world.size == world.rank:
            drawn = key(seed, "validate", i)
            torch.manual_seed(drawn)
            with autocast:
                if judge is not None:
                    metrics = judge(model, batch, drawn)
                else:
                    (collected,) = strategy.collect(model, [batch], [drawn], alone(world))
                    metrics = strategy.loss(model, ref, collected)[1]
            metrics.pop("router/load", None)
            sums.append({k: (float(s), float(n)) for k, (s, n) in metrics.items()})
    model.train(training)
    totals: dict[str, list[float]] = {}
    for metrics in sums:
        for name, (s, n) in metrics.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += s
            total[1] += n
    return reduce([{k: (s, n) for k, (s, n) in totals.items()}], world)

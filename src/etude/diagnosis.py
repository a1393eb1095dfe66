"""What a step looked like that went wrong: which rows it had, how large gradients and activations were layer by layer, where
the router sent the tokens. Nothing is looked at before something stands out; then the step's forward and backward are done
once more, which gives the same numbers, as every random number of a step is keyed by the step."""

import contextlib
import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.data.loader import Batch, Batches
from etude.parallel import World
from etude.window import Window

LEAST = 20  # values before which nothing can stand out
EVEN = 0.02  # of the median: the least that counts as a deviation, where a number hardly moves
BEFORE = 10  # steps before the one that stands out whose samples are named too
DEPTH = 2  # dots in the names of the modules whose outputs are measured: blocks.0.attn


class Watch:
    """Tells numbers that stand out from the last `window` ones by more than `above` median absolute deviations. None: those
    that are not finite alone."""

    def __init__(self, above: float | None, window: int):
        self.above, self.window = above, window
        self.past: dict[str, deque[float]] = {}
        # Steps for which no more is said of spikes (True) and of what is not finite: the first of several is looked at.
        self.quiet = {True: 0, False: 0}

    def step(self, values: dict[str, float]) -> str | None:
        """What stands out in a step, in words. The same on every rank, as the values are."""
        said = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        for name, value in values.items():
            past = self.past.setdefault(name, deque(maxlen=self.window))
            if self.above is not None and math.isfinite(value):
                said += self.beyond(name, value, past)
                past.append(value)
        self.quiet = {kind: n - 1 for kind, n in self.quiet.items()}
        kind = all(map(math.isfinite, values.values()))
        if not said or self.quiet[kind] > 0:
            return None
        self.quiet[kind] = self.window
        return "; ".join(said)

    def beyond(self, name: str, value: float, past: deque[float]) -> list[str]:
        if len(past) < min(LEAST, self.window):
            return []
        median = middle(past)
        deviation = max(middle([abs(x - median) for x in past]), EVEN * abs(median))
        assert self.above is not None
        if not deviation or value <= median + self.above * deviation:
            return []
        times = (value - median) / deviation
        return [f"{name} {value:.4g} is {times:.0f} deviations above the median {median:.4g} of {len(past)} values"]


def middle(values: Iterable[float]) -> float:
    """The median; the standard library's takes four times as long, which is 0.5 % of a small model's step."""
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[n // 2] + ordered[(n - 1) // 2]) / 2


# ---------------------------------------------------------------- looking at a step


@dataclasses.dataclass
class Looked:
    """What hooks saw in the forward passes of a step, and the gradients after them."""

    squares: dict[str, list[float]] = dataclasses.field(
        default_factory=dict
    )  # [sum of squares, numbers, largest, not finite]
    scored: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # what a forward pass was given, and logprob
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)  # norm of each parameter's

    def activations(self) -> dict[str, dict[str, float]]:
        return {
            name: {"rms": math.sqrt(total / max(n, 1)), "max": most, "nonfinite": bad}
            for name, (total, n, most, bad) in self.squares.items()
        }


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[Looked]:
    """Measure the outputs of the model's parts in every forward pass that gradients are taken of."""
    found, seen = Looked(), set[str]()

    def begin(module: nn.Module, inputs: Any) -> None:
        seen.clear()

    def part(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def measure(module: nn.Module, inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            # A block whose activations are computed again in the backward pass comes by twice.
            if torch.is_grad_enabled() and name not in seen and isinstance(x, Tensor) and x.is_floating_point():
                seen.add(name)
                add(found.squares.setdefault(name, [0.0, 0.0, 0.0, 0.0]), x.detach().float())

        return measure

    def scored(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        logprob = getattr(output[0], "logprob", None) if isinstance(output, tuple) else None
        if torch.is_grad_enabled() and logprob is not None and named.get("targets") is not None:
            for x in (logprob, *states):
                if x.requires_grad:
                    x.retain_grad()  # how much each target, or each place, counts in the loss
            found.scored.append({"tokens": inputs[0], "logprob": logprob, "states": states[-1]} | named)

    def final(module: nn.Module, inputs: Any, output: Tensor) -> None:
        states[:] = [output]

    states: list[Tensor] = []
    parts = {n: m for n, m in model.named_modules() if n and n.count(".") <= DEPTH and not isinstance(m, nn.Identity)}
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin))
        hooks.enter_context(model.register_forward_hook(scored, with_kwargs=True))
        hooks.enter_context(model.get_submodule("norm").register_forward_hook(final))
        for name, module in parts.items():
            hooks.enter_context(module.register_forward_hook(part(name)))
        with torch.compiler.set_stance("force_eager"):  # hooks inside a compiled block would not be called
            yield found


def add(sums: list[float], x: Tensor) -> None:
    finite = x.isfinite()
    known = torch.where(finite, x, 0)
    sums[0] += known.square().sum().item()
    sums[1] += x.numel()
    sums[2] = max(sums[2], known.abs().amax().item() if x.numel() else 0.0)
    sums[3] += x.numel() - int(finite.sum())


def joined(several: list[list[float]]) -> list[float]:
    """What `add` summed up on several ranks."""
    total, n, most, bad = zip(*several)
    return [sum(total), sum(n), max(most), sum(bad)]


def look(model: nn.Module, again: Callable[[], Any]) -> Looked:
    """Do a step's forward and backward once more (`again`) and look. The gradients there were are put back."""
    bare: nn.Module = getattr(model, "module", model)
    kept = {n: p.grad.to("cpu", copy=True) for n, p in bare.named_parameters() if p.grad is not None}
    model.zero_grad()
    with looking(bare) as found:
        again()
    for name, p in bare.named_parameters():
        if p.grad is not None:
            found.gradients[name] = p.grad.norm().item()
            p.grad.copy_(kept[name])
    return found


@dataclasses.dataclass
class Row:
    """A sequence that was learnt from. `losses` (nats) and `targets` are those of its tokens `ids`, None where there is no
    target; `pull` is the sum of |d loss / d log-probability| over them: how much the row counts in the step. A sequence that is
    judged as a whole has no targets: its pull is the sum of |d loss / d final state| over its places."""

    micro_batch: int
    row: int  # of the micro-batch; of a strategy that lays out its sequences itself, the sequence
    begin: int  # where in the row of tokens
    loss: float | None  # the mean over its targets
    pull: float
    ids: list[int]
    targets: list[int | None]
    losses: list[float | None]

    def brief(self, total: float) -> dict[str, Any]:
        n = sum(x is not None for x in self.losses)
        return {
            "micro_batch": self.micro_batch,
            "row": self.row,
            "begin": self.begin,
            "loss": self.loss,
            "share": self.pull / total,
            "targets": n,
        }


def rows(scored: list[dict[str, Any]], collected: list[Batch]) -> list[Row]:
    """The sequences of a step's forward passes, those with the highest loss first; of a strategy that weighs sequences
    differently, those with the largest pull."""
    found = []
    for i, (forward, batch) in enumerate(zip(scored, collected)):
        tokens, targets = forward["tokens"].cpu(), forward["targets"].cpu()
        nll, judged = -forward["logprob"].detach().cpu(), "slots" in batch and not (targets >= 0).any()
        g = forward["states"].grad if judged else forward["logprob"].grad
        pull = torch.zeros_like(nll)
        if g is not None:  # of a sum over all places those without a target are taken away again
            pull = g.norm(dim=-1).float().cpu() if judged else g.abs().float().cpu() * (targets >= 0)
        for row, b, at in sequences(batch) if "slots" in batch else documents(forward):
            learned = (targets[b, at] >= 0).tolist()
            if any(learned) or judged:
                losses = [x if on else None for x, on in zip(nll[b, at].tolist(), learned)]
                following = [x if on else None for x, on in zip(targets[b, at].tolist(), learned)]
                mean = None if judged else sum(x for x in losses if x is not None) / sum(learned)
                found.append(
                    Row(i, row, int(at[0]), mean, float(pull[b, at].sum()), tokens[b, at].tolist(), following, losses)
                )
    return sorted(found, key=worst(any("slots" in batch for batch in collected)))


def worst(by_pull: bool) -> Callable[[Row], tuple[bool, float]]:
    """What to sort rows by: those first that are not finite, then by loss or pull."""

    def key(row: Row) -> tuple[bool, float]:
        value = row.pull if by_pull or row.loss is None else row.loss
        return math.isfinite(value), -value

    return key


def documents(forward: dict[str, Any]) -> Iterator[tuple[int, int, Tensor]]:
    """(row, row, positions) of each document of a batch (B, T), without padding."""
    tokens = forward["tokens"].cpu()
    every = tokens.new_zeros(tokens.shape) if forward.get("doc_ids") is None else forward["doc_ids"].cpu()
    for b, ids in enumerate(every):
        lengths = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        for at in torch.arange(len(ids)).split(lengths):
            if ids[at[0]] >= 0:
                yield b, b, at


def sequences(batch: Batch) -> Iterator[tuple[int, int, Tensor]]:
    """(sequence, row, positions) of each sequence of a batch with slots: of one in a branch, its trunk's and its own."""
    T = batch["tokens"].shape[1]
    ids, branches = batch["doc_ids"].cpu(), batch.get("branches", torch.zeros_like(batch["doc_ids"])).cpu()
    for n, places in enumerate(batch["slots"].cpu()):
        if (places >= 0).any():
            b, t = divmod(int(places[places >= 0][-1]), T)
            own = (branches[b] == 0) | (branches[b] == branches[b, t])
            yield n, b, ((ids[b] == ids[b, t]) & own).nonzero()[:, 0]


# ---------------------------------------------------------------- writing it down


def dump(
    kind: str,
    why: str,
    *,
    folder: Path,
    world: World,
    step: int,
    batches: Batches,
    window: Window,
    collected: list[Batch],
    values: dict[str, float],
    load: Tensor | None,
    looked: Looked,
) -> Path:
    """logs/<kind>_step_<n>_rank_<r>.json: what this rank saw of a step. n counts from 1, as in metrics.jsonl."""
    found = rows(looked.scored, collected)
    samples = lambda s: [m.tolist() for m in batches.sampler.micro_batches(window.source(s))]  # noqa: E731
    record = {
        "step": step + 1,
        "rank": world.rank,
        "why": why,
        "values": values,
        "samples": samples(step),
        "before": {s + 1: samples(s) for s in range(max(0, step - BEFORE), step)},
        "rows": [row.brief(sum(r.pull for r in found) or 1.0) for row in found],
        "gradients": looked.gradients,
        "activations": looked.activations(),
        "router_load": None if load is None else load.tolist(),
        "tokens": [b["tokens"].tolist() for b in collected],
    }
    path = folder / "logs" / f"{kind}_step_{step + 1}_rank_{world.rank}.json"
    path.write_text(json.dumps(record))
    return path

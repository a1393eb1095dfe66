"""The coordinate check (Yang et al. 2022, appendix D.1): how much a few updates change each activation, at several widths.
Where a parametrisation is right, the change of a coordinate does not hang on the width; what grows with it will blow up in a
wider model at the same learning rate, what shrinks will not be learned there.

Products over the whole width (scores of attention, a router's logits, the logits) may fade: in muP what is random in them goes
with width^-1/2, and only what was learned stays. How far the targets' logits rise above the others is learned alone."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etude.analysis.load import need
from etude.analysis.plots import MARKERS, PALETTE
from etude.model.attention import attend

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STEEPEST = 0.25  # change ~ width^slope: the most that passes. What is wrong grows or shrinks like width^0.5 or width
FADING = ("scores", "router", "logits")  # may go with width^-0.5
Make = Callable[[int], tuple[Any, torch.optim.Optimizer]]  # width -> a model, initialised, and its optimizer


class Watch:
    """In place of a layer's cache: keeps the scores (B, H, T, T) of queries and keys, and attends as without one."""

    scores: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None = None) -> Tensor:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        self.scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)[..., seen] * scale
        return attend(q, k, k if v is None else v, None, scale, window)


@contextmanager
def listening(model: Any, heard: dict[str, Tensor]) -> Iterator[None]:
    """Put what the model's parts give in a forward into `heard`, by name."""

    def hear(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            heard[name] = output[0] if isinstance(output, tuple) else output
            if hasattr(module, "router_logits"):
                heard[name.replace("feed-forward", "router")] = module.router_logits(inputs[0].flatten(0, 1))

        return hook

    parts = {"embedding": model.embed}
    for i, block in enumerate(model.blocks):
        parts |= {f"{i} attention": block.attn, f"{i} feed-forward": block.ffn, f"{i} stream": block}
    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.enter_context(part.register_forward_hook(hear(name)))
        yield


@torch.no_grad()
def activations(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What each part of the model gives for tokens (B, T + 1) but the last: the embedding; of each layer the scores before the
    softmax, the attention's and feed-forward's output, a router's logits, the stream; the logits, and how far those of the
    targets are above the mean one, on the average ()."""
    heard: dict[str, Tensor] = {}
    watches = [Watch() for _ in model.blocks]
    with listening(model, heard):
        logits = model(tokens[:, :-1], cache=watches)
    above = (logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.mean(-1)).mean()
    return heard | {f"{i} scores": w.scores for i, w in enumerate(watches)} | {"logits": logits, "targets": above}


def measure(
    make: Make,
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    vocab_size: int,
    rows: int = 8,
    length: int = 32,
) -> "pd.DataFrame":
    """Train models of these widths on one batch of random tokens (rows, length) -> (width, seed, step, layer, size: mean |x|,
    change: mean |x - x at step 0|), of every step from 0 to `steps`."""
    found = []
    for width in widths:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
            torch.manual_seed(seed)
            model, optimizer = make(width)
            first: dict[str, Tensor] = {}
            for step in range(steps + 1):
                now = activations(model, tokens)
                first = first or now
                for layer, x in now.items():
                    change = (x - first[layer]).abs().mean().item()
                    found.append((width, seed, step, layer, x.abs().mean().item(), change))
                scores, aux = model(tokens[:, :-1], tokens[:, 1:])
                loss = -scores.logprob.mean() + (0.0 if aux is None else aux.loss.mean())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return need("pandas").DataFrame(found, columns=["width", "seed", "step", "layer", "size", "change"])


def slopes(table: "pd.DataFrame", what: str = "change") -> dict[str, float]:
    """For each layer the exponent s of what ~ width^s after the last step, by least squares on the logs of means over seeds."""
    last = table[table["step"] == table["step"].max()]
    means = last.groupby(["layer", "width"], sort=False)[what].mean().unstack("width")
    x = [math.log2(w) for w in means.columns]
    middle = sum(x) / len(x)
    spread = sum((a - middle) ** 2 for a in x)
    return {
        layer: sum((a - middle) * math.log2(max(y, 1e-30)) for a, y in zip(x, row)) / spread
        for layer, row in zip(means.index, means.values.tolist())
    }


def failing(table: "pd.DataFrame", steepest: float = STEEPEST) -> dict[str, float]:
    """The parts whose change hangs on the width more than it may, with their slopes; {}: the check passes."""
    lowest = {layer: -steepest - 0.5 * layer.endswith(FADING) for layer in table["layer"].unique()}
    return {layer: s for layer, s in slopes(table).items() if not lowest[layer] <= s <= steepest}


def plot(tables: dict[str, "pd.DataFrame"]) -> "Figure":
    """A panel for each parametrisation (name -> table of `measure`): the change after the last step against the width, a line
    for each part of the last layer, and for the logits."""
    plt = need("matplotlib.pyplot")
    figure, axes = plt.subplots(1, len(tables), figsize=(4.6 * len(tables), 4.2), squeeze=False, sharey=True, layout="constrained")  # fmt: skip
    lines: dict[str, Any] = {}
    for ax, (title, table) in zip(axes[0], tables.items()):
        last = table[table["step"] == table["step"].max()]
        means = last.groupby(["layer", "width"], sort=False)["change"].mean().unstack("width")
        deepest = max(int(name.split()[0]) for name in means.index if name[0].isdigit())
        shown = [n for n in means.index if not n[0].isdigit() or int(n.split()[0]) == deepest]
        for name, color, marker in zip(shown, itertools.cycle(PALETTE), itertools.cycle(MARKERS)):
            (lines[name],) = ax.plot(means.columns, means.loc[name], color=color, marker=marker, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(list(means.columns), [str(w) for w in means.columns])
        ax.set_title(f"{title}: {'fails' if failing(table) else 'passes'}")
        ax.set_xlabel("width (model.dim)")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    steps = next(iter(tables.values()))["step"].max()
    axes[0][0].set_ylabel(f"mean change of an activation after {steps} steps")
    names = [f"layer {n}" if n[0].isdigit() else n for n in lines]
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=4, frameon=False)
    return figure

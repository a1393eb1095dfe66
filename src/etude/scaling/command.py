"""How loss goes with size, and settings with width.

python -m etude.scaling coord [widths=32,64,128,256] [seeds=3] [steps=6] [plot=FILE.png] [train.py's keys ...]
    the coordinate check: does a part's change in a few updates hang on the width? Of muP and the standard parametrisation,
    or of the one that model.mup= says. Exit code 1 where muP fails
python -m etude.scaling lr_transfer RUNS ... [plot=FILE.png] [metric=val/full_loss]
    the best learning rate at each width, after python train.py sweep=lr_transfer
python -m etude.scaling isoflop RUNS ... [plot=FILE.png] [params=params_non_embedding] [metric=val/full_loss]
    the best size at each amount of computing, after python train.py sweep=isoflop
python -m etude.scaling fit RUNS ... [plot=FILE.png] [params=params_active] [metric=val/full_loss] [flops=1e18]
    L(N, D) = E + A / N^alpha + B / D^beta, and the best size for some FLOPs"""

import math
from pathlib import Path
from typing import Any

from etude.analysis.plots import save_figure
from etude.analysis.settings import final
from etude.cli import guard, hydra_line
from etude.errors import Refusal
from etude.scaling import laws, transfer
from etude.signature import did_you_mean

VOCAB = 256  # of the coordinate check's random tokens
OPTIONS: dict[str, dict[str, type]] = {
    "coord": {"widths": str, "seeds": int, "steps": int, "plot": str},
    "lr_transfer": {"plot": str, "metric": str},
    "isoflop": {"plot": str, "metric": str, "params": str},
    "fit": {"plot": str, "metric": str, "params": str, "flops": float},
}


def main(arguments: list[str]) -> int:
    """-> exit code."""
    return guard(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    commands = {"coord": coord, "lr_transfer": lr_transfer, "isoflop": isoflop, "fit": fit}
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    what = arguments[0]
    if what not in commands:
        raise Refusal(f"etude.scaling has no {what}{did_you_mean(what, list(commands))}")
    return commands[what](*parsed(what, arguments[1:]))


def parsed(command: str, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """-> (runs, or train.py's overrides for coord; the command's own options)."""
    rest, options = [], {}
    for argument in arguments:
        key, eq, value = argument.partition("=")
        if key in OPTIONS[command] and eq:
            try:
                options[key] = OPTIONS[command][key](value)
            except ValueError:
                raise Refusal(f"{argument}: {key} is a number") from None
        elif eq and command != "coord" and not Path(argument).exists():
            raise Refusal(f"{command} has no option {key}={did_you_mean(key, list(OPTIONS[command]))}")
        else:
            rest.append(argument)
    return rest, options


def coord(overrides: list[str], options: dict[str, Any]) -> int:
    widths = _widths(options.get("widths", "32,64,128,256"))
    seeds, steps = options.get("seeds", 3), options.get("steps", 6)
    if seeds < 1 or steps < 1:
        raise Refusal(f"seeds={seeds} and steps={steps} should be at least 1")
    if not any(o.startswith("model.mup_base") for o in overrides):
        overrides = [*overrides, f"model.mup_base={widths[0]}"]
    typed = any(o.startswith("model.mup=") for o in overrides)
    configs = [
        _composed(o) for o in ([overrides] if typed else [[*overrides, f"model.mup={m}"] for m in ("true", "false")])
    ]

    import torch

    from etude.config import build
    from etude.scaling import coord as check

    tables, wrong = {}, False
    for cfg in configs:
        torch.set_num_threads(cfg["threads"] or 1)

        def make(width: int, cfg: dict = cfg) -> tuple[Any, Any]:
            model = build(cfg["model"] | {"dim": width}, VOCAB)
            model.init_weights()
            return model, build(cfg["optimizer"], model)

        name = "muP" if cfg["model"]["mup"] else "standard"
        tables[name] = table = check.measure(make, widths, range(seeds), steps, VOCAB)
        slopes, failing = check.slopes(table), check.failing(table)
        print(f"{name}: change after {steps} steps ~ width^slope, widths {widths[0]} to {widths[-1]}, {seeds} seeds")
        for layer, slope in slopes.items():
            fades = "  fades, as it may" if layer.endswith(check.FADING) and slope < -check.STEEPEST else ""
            print(f"  {layer:16} {slope:+.2f}{'  hangs on the width' if layer in failing else fades}")
        print(f"{name} {'fails: ' + ', '.join(failing) if failing else 'passes'}\n")
        wrong |= name == "muP" and bool(failing)
    if file := options.get("plot"):
        save_figure(check.plot(tables), file)
    return int(wrong)


def _widths(text: str) -> list[int]:
    parts = text.strip("[]").split(",")
    widths = sorted({int(p) for p in parts if p.isdecimal() and int(p) > 0})
    if len(parts) < 2 or len(widths) < len(parts):
        raise Refusal(f"widths={text} should be two or more different widths, like widths=32,64,128,256")
    return widths


def _composed(overrides: list[str]) -> dict:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from etude.config import CONF, check

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return check(compose("train", overrides=overrides), "train")
    except HydraException as error:
        raise Refusal(hydra_line(error, "train")) from None


def lr_transfer(places: list[str], options: dict[str, Any]) -> int:
    found = transfer.table(places or ["runs"], options.get("metric", "val/full_loss"))
    result = transfer.transfer(found)
    print("\n".join(transfer.sentences(result)))
    if file := options.get("plot"):
        save_figure(transfer.plot(found, result), file)
    return 0


def isoflop(places: list[str], options: dict[str, Any]) -> int:
    table, params = _final(places, options)
    found = laws.fit_isoflop(table)
    percent = f"{100 * found.confidence:g} %"
    for row in found.minima.itertuples():
        print(
            f"{row.flops:.3g} FLOPs  {row.runs:3} runs  best size {row.params:,.0f} {params} ({percent} {row.params_low:,.0f} .. {row.params_high:,.0f}), {row.tokens:,.0f} tokens, loss {row.loss:.4f}"
        )
    for name, power in (("N", found.params), ("D", found.tokens)):
        low, high = power.interval
        print(f"{name}_opt = {power.factor:.3g} C^{power.exponent:.3f} ({percent} {low:.3f} .. {high:.3f})")
    for why in found.left_out:
        print(f"left out: {why}")
    if found.flat:
        print(
            f"note: in {100 * found.flat:.1f} % of resamples a parabola has no minimum; those are not in the intervals"
        )
    if file := options.get("plot"):
        from etude.scaling.figures import plot_isoflop

        save_figure(plot_isoflop(table, found, params), file)
    return 0


def fit(places: list[str], options: dict[str, Any]) -> int:
    if not 0 < options.get("flops", 1) < math.inf:
        raise Refusal(f"flops={options['flops']:g} should be the FLOPs to spend, like flops=1e18")
    table, params = _final(places, options)
    found = laws.fit_loss(table)
    law, percent = found.law, f"{100 * found.confidence:g} %"
    print(f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}   ({found.runs} runs, N: {params})")  # fmt: skip
    for name in ("E", "A", "alpha", "B", "beta", "size_exponent"):
        low, high = found.interval(name)
        shown = "a in N_opt ~ C^a" if name == "size_exponent" else name
        print(f"  {shown:16} {getattr(law, name):10.4g}  ({percent} {low:.4g} .. {high:.4g})")
    print(f"  runs lie about {100 * found.error:.2g} % off the law")
    if law.E < 0.01 * table["loss"].min():
        print(
            "note: E, the loss that no model gets below, went to nothing: these runs do not tell it; take larger ones too"
        )
    if (flops := options.get("flops")) is not None:
        size, tokens = law.optimum(flops)
        if (times := flops / (6 * table["params"] * table["tokens"]).max()) > 10:
            print(f"note: that is {times:,.0f} times the largest run: the interval holds if the law still does there")
        low, high = found.loss_interval(size, tokens)
        print(f"with {flops:.3g} FLOPs (6 N D): {size:,.0f} {params}, {tokens:,.0f} tokens, loss {law.loss(size, tokens):.4f} ({percent} {low:.4f} .. {high:.4f})")  # fmt: skip
    if file := options.get("plot"):
        from etude.scaling.figures import plot_loss

        save_figure(plot_loss(table, found, params), file)
    return 0


def _final(places: list[str], options: dict[str, Any]) -> tuple[Any, str]:
    params = options.get("params", "params")
    return final(places or ["runs"], options.get("metric", "val/full_loss"), params), params

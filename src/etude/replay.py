"""One step of a run once more: what it trained on, as text, and how large its gradients and activations were.

    python -m etude.replay runs/<run> step=120           the 120th step, as logs/metrics.jsonl counts them
    python -m etude.replay runs/<run> step=120 top=10    with the ten rows that lost most

The step is reached from the nearest whole checkpoint before it, or from the beginning, by the loop itself, and compared with
the log to the bit. Nothing is written into the run."""

import functools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from etude import cli, reproduce, training
from etude import config as conf
from etude import run as runs
from etude.errors import Refusal
from etude.parallel import rank
from etude.redact import remember, scrub
from etude.signature import did_you_mean

# So that the steps between do nothing but train. Every one is logged, to be compared.
TRAIN_ONLY = {
    "log_every": 1,
    "eval_every": None,
    "save_every": None,
    "sample_every": None,
    "histogram_every": None,
    "spike_above": None,
    "early_stopping": None,
    "stop_at": None,
}
WORST = 5  # tokens of a row that are shown one by one
USAGE = "python -m etude.replay runs/<run> step=<n> [top=3]"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    run, step, top = parse(arguments)
    cfg = config_at(run, step)
    remember(cfg)
    data, prepared = training.prepare_data(cfg)
    return conf.build(cfg["parallel"]).launch(work, cfg, data, prepared, run, step, top)


def parse(arguments: list[str]) -> tuple[Path, int, int]:
    """-> run, step, rows to show. Raises Refusal."""
    given = {"step": "", "top": "3"}
    rest = []
    for argument in arguments:
        name, eq, value = argument.partition("=")
        if not eq:
            rest.append(argument)
        elif name not in given:
            raise Refusal(f"unknown key {name}{did_you_mean(name, list(given))}; {USAGE}")
        else:
            given[name] = value
    if len(rest) != 1:
        raise Refusal(f"which run? {USAGE}")
    for name, value in given.items():
        if not value.isdecimal() or int(value) < 1:
            raise Refusal(f"{name}={value} should be a number from 1 on; {USAGE}")
    return Path(rest[0]), int(given["step"]), int(given["top"])


def config_at(run: Path, step: int) -> dict:
    """The config with which the run took that step, with threads and precision as they were. Raises Refusal."""
    from hydra import compose, initialize_config_dir

    if not (run / "meta" / "config.yaml").is_file():
        raise Refusal(f"{run} is not a run: there is no meta/config.yaml in it; {USAGE}")
    last = reached(run)
    ended = runs.recorded(run / "status.json").get("status") == "completed"
    if step > last + (not ended):  # the step that stopped a run is in no log
        raise Refusal(f"step={step} is beyond the end of {run}, which did {last} steps; type step=<1 to {last}>")
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        defaults = conf.check(compose("train"), "train")
    stored = runs.stored_config(run, "run")
    for until, path in reversed(runs.earlier(run)):
        if until >= step:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    cfg = {k: v for k, v in defaults.items() if k not in stored} | stored
    cfg |= {"resume": str(run), "tracker": {}, "reproduce": {"run": None, "code": False}}
    conf.check_targets({k: v for k, v in cfg.items() if isinstance(v, dict)}, cfg["trusted"])
    cfg = reproduce.as_it_was(cfg, run)
    gone = cfg["init_from"] is not None and not Path(cfg["init_from"]).is_dir()
    if gone and "path" in cfg["tokenizer"]:
        cfg["tokenizer"] = cfg["tokenizer"] | {"path": str(run / "artifacts" / "checkpoints" / "last")}
    return cfg


def reached(run: Path) -> int:
    """How many steps the run has done."""
    status = runs.recorded(run / "status.json").get("step", 0)
    return max([status, *reproduce.log(run)])


def work(cfg: dict, data: Any, prepared: list, run: Path, step: int, top: int) -> int:
    """One process of a replay. -> exit code."""
    remember(cfg)
    return cli.guard(lambda: _work(cfg, data, prepared, run, step, top), quiet=rank() != 0)


def _work(cfg: dict, data: Any, prepared: list, run: Path, step: int, top: int) -> int:
    parallel = conf.build(cfg["parallel"])
    with parallel.world(cfg["threads"]) as world, tempfile.TemporaryDirectory(prefix="etude-replay-") as scratch:
        session = training.Session(cfg, data, prepared, parallel, world)
        session.folder = Path(scratch)
        if session.strategy.needs_reference and cfg["reference"] == "cached":
            session.ref = session.cached_reference(print if world.rank == 0 else lambda text: None)
        begin = restore(session, run, step)
        at = session.progress.step
        between, found = replay(session, run, step)
        if world.rank == 0:
            lines = [f"{run}, step {step}: from {begin}" + (f", through {step - 1 - at} more" if step - 1 > at else "")]
            lines += compared(run, step, between, found["values"])
            lines += ["", *shown_rows(session, found, top), "", *shown_layers(found)]
            print(scrub("\n".join(lines)))
    return 0


def restore(session: training.Session, run: Path, step: int) -> str:
    """Take the newest whole checkpoint of the run before `step`; -> which one it was, in words."""
    from etude import checkpoint, saving

    chosen = None
    if session.world.rank == 0:
        for folder in reversed(checkpoint.steps(run / "artifacts" / "checkpoints")):
            if int(folder.name.removeprefix("step_")) < step:
                if (reason := checkpoint.fault(folder)) is None:
                    chosen = str(folder)
                    break
                print(f"warning: checkpoint {folder} is damaged and skipped: {reason}", file=sys.stderr)
    if (chosen := session.world.broadcast(chosen)) is not None:
        saving.load(session, Path(chosen))
        return f"the checkpoint {Path(chosen).name}"
    known = runs.recorded(run / "meta" / "data.json")
    for name, key in (("data", "sha256"), ("tokenizer", "tokenizer_sha256")):
        if key in known and known[key] != session.meta[key]:
            raise Refusal(
                f"the {name} is not what {run} was trained on (sha256 {known[key][:12]} then, {session.meta[key][:12]} now)"
            )
    return "the beginning, as no checkpoint before it is there"


def approach(session: training.Session, run: Path, step: int) -> Any:
    """Train up to `step`, as the run did; -> the model, as the loop has it. Raises Refusal where the run does not come so far."""
    from etude.display import Display
    from etude.track import Jsonl, Trackers

    cfg, folder, main = session.cfg | TRAIN_ONLY, session.folder, session.world.rank == 0
    (folder / "logs").mkdir()
    tracker = Trackers(Jsonl(), {})
    if main:
        tracker.open(folder, session.progress.step)
    model = session.wrapped()
    train = session.fitting(
        model,
        tracker=tracker,
        status=runs.Status(folder),
        display=Display("none"),
        save=lambda best: None,
        sample=lambda step: None,
        evaluate=lambda whole: {},
        peak_flops=None,
        folder=folder,
    )
    try:
        for until, limits in reproduce.stages(run):
            if session.progress.step < until < step:
                train(settings=cfg | limits, until=until)
        ended = train(settings=cfg, until=step - 1)
    finally:
        if main:
            tracker.close()
    at = session.progress.step
    if at != step - 1:
        raise Refusal(f"step {step} is not reached: training ended after step {at} ({ended}); type a step up to {at}")
    return model


def replay(session: training.Session, run: Path, step: int) -> tuple[dict[int, dict], dict[str, Any]]:
    """Train up to `step` and do its forward and backward; -> the log of the steps between, and of the step itself its `values`
    as they are logged, `rows` of all ranks, `gradients`, `activations` and router `load`."""
    from etude import diagnosis, loop

    model = approach(session, run, step)
    cfg, world, at = session.cfg, session.world, session.progress.step
    limit = loop.horizon(
        cfg, session.batches, session.window.iterations, session.model.flops_per_token(session.data.seq_len)
    )
    steps = limit or loop.estimate_steps(at, session.progress.seconds, cfg["max_minutes"])
    per_epoch = session.batches.epoch_samples / cfg["batch_size"] * session.window.iterations
    with session.window.reading(at, limit):
        collected = session.window.collected(model, at)
    weight = world.sum(loop.weigh(session.strategy, collected))
    loop.set_lr(session.optimizer, conf.build(cfg["scheduler"])(at, steps, per_epoch))
    about = (model, session.ref, session.strategy, collected, weight, cfg | {"clip": None}, at, session.parallel, world)
    again = functools.partial(loop.gradients, *about, session.autocast)
    sums, norm = again()
    load = loop.router_load(sums, world)
    values = {f"train/{k}": v for k, v in (loop.reduce(sums, world) | loop.spread(load)).items()}
    values |= {
        "lr": session.optimizer.param_groups[0]["lr"],
        "grad_norm": norm.item(),
        "batch": loop.batch_hash(collected, world),
    }
    looked = diagnosis.look(model, again)
    samples = [m.tolist() for m in session.batches.sampler.micro_batches(session.window.source(at))]
    rows = [(world.rank, place(row, samples, collected), row) for row in diagnosis.rows(looked.scored, collected)]
    everywhere = [r for several in world.gather(rows) for r in several]
    total = sum(row.pull for *_, row in everywhere) or 1.0
    found: dict[str, Any] = {"values": values, "rows": everywhere, "total": total}
    found["by_pull"] = any("slots" in batch for batch in collected)
    parts = world.gather(looked.squares)
    looked.squares = {n: diagnosis.joined([p[n] for p in parts]) for n in looked.squares} if parts else {}
    found |= {"gradients": looked.gradients, "activations": looked.activations(), "load": load}
    return (reproduce.log(session.folder) if world.rank == 0 else {}), found


def place(row: Any, samples: list[list[int]], collected: list[dict]) -> str:
    """Which sample of the training split a row is, where that can be told, and what it was worth."""
    numbers, batch = samples[row.micro_batch], collected[row.micro_batch]
    said = []
    if "advantages" in batch:
        said.append(f"advantage {batch['advantages'][row.row].item():.3g}")
    elif "slots" in batch and len(batch["slots"]) == 2 * len(numbers):
        said.append(f"sample {numbers[row.row // 2]}, {('chosen', 'rejected')[row.row % 2]}")
    elif "slots" not in batch and len(batch["tokens"]) == len(numbers):
        said.append(f"sample {numbers[row.row]}")
    return ", ".join(said)


# ---------------------------------------------------------------- what is said of it


def compared(run: Path, step: int, between: dict[int, dict], values: dict[str, float]) -> list[str]:
    """Whether the step is the one that was logged, and those before it too."""
    log = reproduce.log(run)
    lines = []
    steps = sorted(between.keys() & log.keys())
    if steps:
        found = reproduce.compare(log, between)
        first = found["first"]
        lines.append(
            f"between  {len(steps)} of them are in the log: "
            + ("equal to the bit" if first is None else f"they part at step {first['step']}: {told(first['values'])}")
        )
    if step not in log:
        lines.append(f"log      has no line of step {step}, so there is nothing to compare it with")
        lines += [f"         {name} {value}" for name, value in values.items() if name in ("train/loss", "grad_norm")]
        return lines
    found = reproduce.compare({step: log[step]}, {step: values})
    first = found["first"]
    if first is None:
        lines.append(
            f"log      equal to the bit: {', '.join(f'{n} {values[n]}' for n in ('train/loss', 'grad_norm') if n in values)}"
        )
        return lines + [f"         and {', '.join(n for n in found['names'] if n not in ('train/loss', 'grad_norm'))}"]
    return lines + [f"log      NOT equal: {told(first['values'])}"]


def told(values: dict[str, list[Any]]) -> str:
    return ", ".join(f"{n} {a} in the log, {b} here" for n, (a, b) in values.items())


def shown_rows(session: training.Session, found: dict[str, Any], top: int) -> list[str]:
    """The worst rows as text, with their worst tokens."""
    from etude import diagnosis

    rows, by_pull = found["rows"], found["by_pull"]
    decode = session.tokenizer.decode
    key = diagnosis.worst(by_pull)
    rows = sorted(rows, key=lambda r: key(r[2]))
    lines = [
        f"rows     {len(rows)} in the step, the first {min(top, len(rows))} by {'their part in the gradient' if by_pull else 'loss (nats a target)'}"
    ]
    for i, (rank_, where, row) in enumerate(rows[:top], 1):
        n = sum(x is not None for x in row.losses)
        at = f"micro-batch {row.micro_batch}, row {row.row}" + (f", rank {rank_}" if session.world.size > 1 else "")
        loss = "judged as a whole" if row.loss is None else f"loss {row.loss:.4f} over {n} targets"
        lines.append(
            f"{i:3}. {loss}, {row.pull / found['total']:.1%} of the gradient; {at}{', ' if where else ''}{where}"
        )
        lines.append("     " + repr(decode(row.ids)))
        worst = sorted((t for t in range(len(row.ids)) if row.losses[t] is not None), key=lambda t: -row.losses[t])[
            :WORST
        ]
        if worst:
            told = (f"{decode([row.targets[t]])!r} {row.losses[t]:.2f} at {t + 1}" for t in worst)
            lines.append("     " + "  ".join(told))
    return lines


def shown_layers(found: dict[str, Any]) -> list[str]:
    """Norms of activations and gradients layer by layer, and the router's load."""
    groups: dict[str, float] = {}
    for name, norm in found["gradients"].items():
        parts = name.split(".")
        layer = ".".join(parts[:3] if parts[0] == "blocks" else parts[:1])
        groups[layer] = math.hypot(groups.get(layer, 0.0), norm)
    names = [*found["activations"], *(n for n in groups if n not in found["activations"])]
    wide = max(map(len, names), default=0)
    lines = [f"layers   {'':{max(0, wide - 9)}} {'rms':>10} {'largest':>10} {'not finite':>10} {'gradient':>10}"]
    for name in names:
        a = found["activations"].get(name)
        seen = f"{a['rms']:10.4g} {a['max']:10.4g} {a['nonfinite']:10.0f}" if a else f"{'':32}"
        lines.append(f"{name:{wide}} {seen} " + (f"{groups[name]:10.4g}" if name in groups else ""))
    if found["load"] is not None:
        lines += ["", "router   tokens of each expert, layer by layer"]
        lines += [f"{i:8} " + " ".join(f"{n:6.0f}" for n in row) for i, row in enumerate(found["load"].tolist())]
    return lines


if __name__ == "__main__":
    from etude.replay import main as start  # under its own name: other processes import what they are sent

    sys.exit(cli.guard(lambda: start(sys.argv[1:])))

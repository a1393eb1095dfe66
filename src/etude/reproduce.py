"""reproduce=runs/<run>: the same run once more, from its metadata. It says beforehand in what the two differ, and at the end
whether their logs are equal to the bit, or at which step they part. Both go into reproduction.json of the new run."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from etude import git
from etude import run as runs
from etude.errors import Refusal

LIMITS = "max_steps max_epochs max_tokens max_flops max_minutes".split()
# What may be typed beside reproduce=: where things lie, and what is logged, kept and shown. None of it changes a number.
MAY_CHANGE = (
    "tag runs_dir cache_dir progress tracker keep log_every eval_every save_every sample_every sample_prompts sample_tokens "
    "histogram_every spike_above spike_window trusted data.workers data.prefetch data.path init_from"
).split()
# And what gives the same sums in another order: other roundings.
ROUNDS = "parallel threads micro_batch_size".split()
MACHINE = "processor platform device accelerator threads precision processes".split()


def adopt(cfg: dict, overrides: list[str]) -> dict:
    """The config of the run named by cfg.reproduce.run, with what may be changed of it laid over it. Where it leaves threads
    or precision to the machine, they are as that run had them. Raises Refusal."""
    source = Path(cfg["reproduce"]["run"])
    typed = [o for o in overrides if o.partition("=")[0] != "reproduce.code"]
    new = runs.resumed_config(source, cfg, typed, [*MAY_CHANGE, *ROUNDS], "reproduce")
    stages(source)
    new |= {"resume": None, "dry_run": cfg["dry_run"], "reproduce": cfg["reproduce"]}
    new = as_it_was(new, source)
    return new if new["init_from"] is None else started(new, source)


def as_it_was(cfg: dict, source: Path) -> dict:
    """The config with the threads and the precision that a run had, where they were left to the machine."""
    then = facts(source)
    if cfg["threads"] is None and then.get("threads", "").isdecimal():
        cfg = cfg | {"threads": int(then["threads"])}
    if cfg["precision"] == "auto" and then.get("precision") in ("fp32", "bf16"):
        cfg = cfg | {"precision": then["precision"]}
    return cfg


def started(cfg: dict, source: Path) -> dict:
    """The config with the folder that init_from means: the one that was typed, that of the source, or, where that is gone
    and the source trained adapters, what these lie on. Raises Refusal."""
    from etude.checkpoint import find

    before, folder = runs.stored_config(source, "reproduce")["init_from"], Path(cfg["init_from"])
    if not folder.is_dir() and (base := source / "artifacts" / "base").is_dir():
        folder = base
    try:
        folder = find(str(folder))
    except Refusal as error:
        raise Refusal(f"{str(error).replace('ckpt=', 'init_from=')}; type init_from=<where it is now>") from None
    tokenizer = cfg["tokenizer"]
    if tokenizer.get("path") == before:
        tokenizer = tokenizer | {"path": str(folder)}
    return cfg | {"init_from": str(folder), "tokenizer": tokenizer}


def facts(folder: Path) -> dict[str, str]:
    """meta/env.txt; of a run that did not write down its threads and precision, what a checkpoint says of them."""
    try:
        lines = (folder / "meta" / "env.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    try:
        state = json.loads((folder / "artifacts" / "checkpoints" / "last" / "state.json").read_text())
        found = {k: str(state[k]) for k in ("threads", "precision")} | {"processes": str(state["world_size"])} | found
    except (OSError, ValueError, KeyError):
        pass
    return found


# ---------------------------------------------------------------- a run that was resumed with other limits


def stages(source: Path) -> list[tuple[int, dict[str, Any]]]:
    """(steps done, limits until then) of a run that was resumed with other limits: the learning rate follows them."""
    found = []
    for until, path in runs.earlier(source):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            found.append((until, {k: config.get(k) for k in LIMITS}))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            raise Refusal(f"{path} cannot be read: bring back a copy of it") from None
    return found


def doubts(source: Path, cfg: dict) -> list[str]:
    """Why this run cannot be expected to be equal to the bit, in words."""
    said = []
    known = runs.earlier(source)
    for until, path in known:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for k in ("parallel", "threads", "micro_batch_size", "on_nonfinite"):
            if k in config and config[k] != cfg[k]:
                said.append(
                    f"until step {until} it ran with {k}={short(config[k])}, this one with {short(cfg[k])} throughout"
                )
    resumes = source / "meta" / "resumes"
    lines = resumes.read_text(encoding="utf-8").splitlines() if resumes.exists() else []
    changed = [line for line in lines if not known and any(f" {k}=" in line for k in LIMITS)]
    if changed:
        said.append(
            f"it was resumed with other limits ({changed[-1]}), and what they were before was not kept: its rate was another"
        )
    if cfg["max_minutes"] is not None and all(cfg[k] is None for k in LIMITS if k != "max_minutes"):
        said.append("max_minutes alone ended it: its rate followed the clock")
    return said


def short(value: Any) -> str:
    return str(value.get("_target_", value)).rpartition(".")[2] if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------- what differs


def begin(source: Path, folder: Path, cfg: dict) -> list[str]:
    """Compare the metadata of two runs, the new one's written just now; -> what to say. Written to reproduction.json."""
    differs, same = differences(source, folder)
    said = doubts(source, cfg)
    state = runs.recorded(source / "status.json")
    record = {"source": str(source), "source_status": state.get("status"), "differs": differs, "doubts": said}
    runs.replace(folder / "reproduction.json", json.dumps(record, indent=1))
    lines = [f"again    {source} ({state.get('step', '?')} steps, {state.get('status', 'of unknown status')})"]
    lines += [f"differs  {name}: {shown(what)}" for name, what in differs.items()]
    lines += [f"same     {', '.join(same)}"] if same else []
    return lines + [f"note     {line}" for line in said]


def differences(a: Path, b: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Of two runs: what differs, each thing as lines of text; and what is the same."""
    then, now = facts(a), facts(b)
    data_then, data_now = runs.recorded(a / "meta" / "data.json"), runs.recorded(b / "meta" / "data.json")
    found: dict[str, list[str]] = {"code": code(a, b)}
    found["python"] = pair(then.get("python"), now.get("python"))
    found["packages"] = versions(a / "meta" / "packages.txt", b / "meta" / "packages.txt")
    for name, key in (("data", "sha256"), ("tokenizer", "tokenizer_sha256"), ("beginning", "start_sha256")):
        if key != "start_sha256" or data_then.get(key) or data_now.get(key):
            found[name] = [f"sha256 {line}" for line in pair(data_then.get(key), data_now.get(key), 12)]
    machine = {name: pair(then.get(name), now.get(name)) for name in MACHINE if name in then or name in now}
    found["machine"] = [f"{name} {line}" for name, lines in machine.items() for line in lines]
    same = [name + (f" ({now['python']})" if name == "python" else "") for name, lines in found.items() if not lines]
    return {name: lines for name, lines in found.items() if lines}, same


def pair(a: Any, b: Any, length: int | None = None) -> list[str]:
    return [] if a == b else [f"{str(a)[:length]} then, {str(b)[:length]} now"]


def code(a: Path, b: Path) -> list[str]:
    """The files that differ, with the number of lines; those left out of a patch too."""
    said = git.changes(a / "meta", b / "meta")
    lines = [f"not known: {said}"] if isinstance(said, str) else list(map(str, said))
    left_out = {
        line for run in (a, b) for line in text(run / "meta" / "git.txt") if line.startswith("left out of diff.patch: ")
    }
    names = sorted(name for name in {line.split(": ")[1] for line in left_out} if git.matters(name))
    return lines + [f"{name} (not kept: may differ)" for name in names]


def versions(a: Path, b: Path) -> list[str]:
    then, now = (dict(line.split("==", 1) for line in text(path) if "==" in line) for path in (a, b))
    names = sorted(
        then.keys() | now.keys(), key=lambda n: (n not in ("torch", "numpy", "triton", "tokenizers"), n.lower())
    )
    return [f"{n} {then.get(n, 'none')} then, {now.get(n, 'none')} now" for n in names if then.get(n) != now.get(n)]


def text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def shown(lines: list[str], most: int = 8) -> str:
    more = f", and {len(lines) - most} more (reproduction.json)" if len(lines) > most else ""
    return ", ".join(lines[:most]) + more


# ---------------------------------------------------------------- whether it was reproduced


def conclude(folder: Path) -> str:
    """Compare the logs and the last weights of a run and of the one that it reproduces; -> the outcome in a line, which is
    in reproduction.json too."""
    record = runs.recorded(folder / "reproduction.json")
    source = Path(record["source"])
    record |= compare(log(source), log(folder)) | {"weights": weights(source, folder)}
    line = verdict(record)
    runs.replace(folder / "reproduction.json", json.dumps(record | {"verdict": line}, indent=1))
    return line


def log(folder: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; a last line that is being written is left out."""
    found = {}
    for row in text(folder / "logs" / "metrics.jsonl"):
        try:
            values = json.loads(row)
            found[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            continue
    return found


def compare(then: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Every value that both logs have of a step, times and speeds left out: whether all are equal, and the first step at which
    some are not, with what they were, and `after` which step they were last seen equal. Floats are compared to the bit, as
    they are written."""
    seen: dict[str, list[int]] = {}
    parts: dict[int, dict[str, list[Any]]] = {}
    steps = sorted(then.keys() & now.keys())
    for step in steps:
        common = {n for n in then[step].keys() & now[step].keys() if n != "step" and not n.startswith("perf/")}
        for name in common:
            seen.setdefault(name, []).append(step)
        if other := {n: [then[step][n], now[step][n]] for n in common if repr(then[step][n]) != repr(now[step][n])}:
            parts[step] = other
    first = min(parts, default=None)
    differing = sorted({n for p in parts.values() for n in p})
    by_name = {n: min(s for s in parts if n in parts[s]) for n in differing}
    return {
        "equal": bool(seen) and not parts,
        "steps_compared": len(steps),
        "last_step_compared": steps[-1] if steps else None,
        "steps_logged": [max(then, default=0), max(now, default=0)],
        "names": sorted(seen),
        "first": None if first is None else {"step": first, "values": ordered(parts[first])},
        "first_by_name": by_name,
        "after": {n: max((s for s in seen[n] if s < by_name[n]), default=0) for n in differing},
        "largest": {n: largest(n, parts) for n in differing},
    }


def ordered(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Causes before effects: another batch or rate explains another loss."""
    front = ["batch", "lr", "train/loss", "grad_norm"]
    return dict(sorted(values.items(), key=lambda item: (front.index(item[0]) if item[0] in front else 9, item[0])))


def largest(name: str, parts: dict[int, dict[str, list[Any]]]) -> list[Any]:
    """[step, difference] where a value differs most."""
    found = [
        (abs(b - a), step) for step, p in parts.items() if name in p for a, b in [p[name]] if number(a) and number(b)
    ]
    return [max(found)[1], max(found)[0]] if found else [None, None]


def number(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def weights(a: Path, b: Path) -> bool | None:
    """Whether the newest checkpoints hold the same weights and optimizer, by their hashes; None where they are not of the
    same step."""
    newest = [folder / "artifacts" / "checkpoints" / "last" for folder in (a, b)]
    if len({path.resolve().name for path in newest}) > 1:
        return None
    found = [
        {n: v["sha256"] for n, v in runs.recorded(path / "manifest.json").items() if n.endswith(".safetensors")}
        for path in newest
    ]
    return found[0] == found[1] if all(found) else None


def verdict(record: dict[str, Any]) -> str:
    source, steps = record["source"], record["steps_compared"]
    if not record["names"]:
        return f"there is nothing to compare with {source}: no step is in both logs"
    then, now = record["steps_logged"]
    some = "" if then == now else f" (the logs end at steps {then} and {now})"
    if record["equal"]:
        said = {True: ", and the last weights", None: ""}.get(record["weights"], ", but NOT the last weights")
        return f"reproduced {source}: all {len(record['names'])} values of {steps} logged steps are equal to the bit{said}{some}"
    first = record["first"]
    name, (a, b) = next(iter(first["values"].items()))
    by = f" ({b - a:+.3g})" if number(a) and number(b) else ""
    others = [n for n in first["values"] if n != name]

    def where(name: str) -> str:
        step, after = record["first_by_name"][name], record["after"][name]
        return f"at step {step}" if step == after + 1 else f"between steps {after} and {step}"

    line = f"parts from {source} {where(name)}: {name} {a} there, {b} here{by}"
    line += f"; so do {', '.join(others[:4])}{' ...' if len(others) > 4 else ''}" if others else ""
    if "train/loss" in record["first_by_name"] and "train/loss" not in first["values"]:
        line += f"; the losses part {where('train/loss')}"
    if "train/loss" in record["largest"]:
        at, most = record["largest"]["train/loss"]
        line += f"; the loss by at most {most:.3g} (step {at})" if at is not None else ""
    if changed := record["differs"].get("code"):
        line += f"; the code differs in {shown(changed, 4)}"
    return line + some


# ---------------------------------------------------------------- with the code as it was

# Run by the interpreter that runs this, with the other code first in its path.
DRIVER = """
import json, pathlib, sys

if __name__ == "__main__":
    config, tree, *argv = sys.argv[1:]
    given = json.loads(pathlib.Path(config).read_text())
    sys.argv = argv
    import etude
    from etude import cli, training

    if not pathlib.Path(etude.__file__).resolve().is_relative_to(tree):
        sys.exit(f"error: the code in {tree} cannot be imported: {etude.__file__} comes before it")
    start = getattr(training, "start", None)  # which older code does not have
    sys.exit(cli.guard(lambda: start(given["cfg"], given["overrides"]) if start else training.train(given["cfg"])))
"""


def elsewhere(cfg: dict, overrides: list[str]) -> int:
    """Run with the source's code, checked out into a folder that goes; -> exit code. Signals are passed on."""
    source = Path(cfg["reproduce"]["run"])
    cfg = cfg | {"reproduce": cfg["reproduce"] | {"code": False}}
    with git.worktree(source / "meta") as tree, tempfile.TemporaryDirectory(prefix="etude-run-") as place:
        print(
            f"code     of {source}: commit {git.commit_of((source / 'meta' / 'git.txt').read_text())} and its patch, in {tree}",
            flush=True,
        )
        driver, given = Path(place) / "train.py", Path(place) / "config.json"
        driver.write_text(DRIVER)
        given.write_text(json.dumps({"cfg": cfg, "overrides": overrides}))
        before = set(Path(cfg["runs_dir"]).glob("*"))
        path = os.pathsep.join(filter(None, [str(tree / "src"), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, driver, given, tree, *sys.argv], env=os.environ | {"PYTHONPATH": path}
        )

        def forward(signum: int, frame: Any) -> None:
            process.send_signal(signum)

        handlers = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            status = process.wait()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
    for folder in sorted(set(Path(cfg["runs_dir"]).glob("*")) - before):
        known = (folder / "reproduction.json").exists()  # else by code that knows nothing of reproducing
        if not known and (folder / "meta" / "config.yaml").exists():
            if runs.stored_config(folder, "reproduce").get("reproduce") == cfg["reproduce"]:
                print("\n".join([*begin(source, folder, cfg), conclude(folder)]))
    return status if status >= 0 else 128 - status

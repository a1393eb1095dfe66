"""What is left of a search: the table, the best, the command that goes on from there, and results.json."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from etude.cli import quote
from etude.redact import redact_override
from etude.run import replace
from etude.sweep.place import key_of
from etude.tuning.search import job_of
from etude.tuning.space import overrides, text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ROWS = 60  # of the table; results.json has all


def shown(study: "Study") -> list["FrozenTrial"]:
    """Trials that stand for something: no draws that were there before, and of a trial that was cut off and tried again
    the last."""
    latest = {job_of(t): t for t in study.get_trials(deepcopy=False)}
    return [t for t in latest.values() if "repeats" not in t.user_attrs and t.params]


def best(study: "Study") -> list["FrozenTrial"]:
    """The best trial, or with several objectives those that no other beats in all of them; by their first value."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    found = study.best_trials if len(study.directions) > 1 else [study.best_trial]
    signs = [-1 if d == StudyDirection.MAXIMIZE else 1 for d in study.directions]
    return sorted(found, key=lambda t: [sign * v for sign, v in zip(signs, t.values)])


def status(trial: "FrozenTrial") -> str:
    match trial.state.name:
        case "COMPLETE":
            return "completed"
        case "PRUNED":
            return f"pruned at step {trial.last_step}"
        case "FAIL":
            return f"failed: {trial.user_attrs.get('error', 'stopped with the search')}"
        case _:
            return "cut off"


def write(path: Path, study: "Study", metrics: list[str], directions: list[str], fixed: list[str]) -> None:
    """results.json."""
    trials = [
        {
            "trial": job_of(t),
            "status": {"COMPLETE": "completed", "FAIL": "failed", "RUNNING": "cut off"}.get(
                t.state.name, t.state.name.lower()
            ),
            "values": dict(zip(metrics, t.values)) if t.state.name == "COMPLETE" else None,
            "params": t.params,
            "step": t.last_step,
            "run": t.user_attrs.get("run"),
            "error": t.user_attrs.get("error"),
            "seconds": t.duration.total_seconds() if t.duration else None,
        }
        for t in shown(study)
    ]
    content = {
        "study": study.study_name,
        "metrics": dict(zip(metrics, directions)),
        "overrides": [redact_override(o) for o in fixed],
        "best": [job_of(t) for t in best(study)],
        "trials": trials,
    }
    replace(path, json.dumps(content, indent=1))


def table(study: "Study", metrics: list[str], names: list[str]) -> Grid:
    """Columns trial, parameters, values, status, run. The best have a star."""
    trials, marked = shown(study), {t.number for t in best(study)}
    left_out = len(trials) - ROWS
    grid = Grid(box=None, pad_edge=False, caption_justify="left")
    if left_out > 0:
        grid.caption = f"the {left_out} before these and these are in results.json"
    keys = short(names)
    for column in ("trial", *keys.values(), *metrics):
        grid.add_column(column, overflow="fold")
    grid.add_column("status", overflow="fold")
    grid.add_column("run", overflow="fold")
    for t in trials[-ROWS:]:
        values = t.values if t.state.name == "COMPLETE" else [None] * len(metrics)
        grid.add_row(
            f"{job_of(t)}{'*' if t.number in marked else ''}",
            *(Text(number(t.params[k])) for k in keys),
            *("" if v is None else f"{v:.6g}" for v in values),
            Text(status(t)),
            Text(t.user_attrs.get("run", "")),
            style="bold" if t.number in marked else "",
        )
    return grid


def show(grid: Grid, lines: list[str]) -> None:
    """On a terminal as wide as it is, elsewhere as wide as it takes."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(grid)
    print("\n".join(lines), flush=True)


def short(names: list[str]) -> dict[str, str]:
    """Each key with the last part of its name, or all of it where another ends alike."""
    last = [n.rpartition(".")[2] for n in names]
    return {n: (s if last.count(s) == 1 else n) for n, s in zip(names, last)}


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def typed(override: str) -> str:
    """An override as a user types it: cli.quote puts quotes around free text."""
    key, _, value = override.partition("=")
    return bare if quote(bare := f"{key}={value[1:-1]}") == override else override


def ending(study: "Study", metrics: list[str], fixed: list[str], longer: str | None) -> list[str]:
    """The best trial or the front, and the command that trains the best one on; `longer` is its new limit."""
    found = best(study)
    if not found:
        return ["best     no trial ran to its end"]
    lines = []
    for label, t in zip(["best" if len(found) == 1 else "front", *[""] * len(found)], found):
        values = ", ".join(f"{name} {v:.6g}" for name, v in zip(metrics, t.values))
        lines.append(f"{label:9}trial {job_of(t)}: {values} with {' '.join(overrides(t.params))}")
    kept = [typed(redact_override(o)) for o in fixed if longer is None or key_of(o) != key_of(longer)]
    again = [*kept, *overrides(found[0].params), *([longer] if longer else [])]
    if any(key_of(o) == "sweep" for o in fixed):  # whose other settings stay, but it is a multirun by itself
        again.append("hydra.mode=RUN")
    return [*lines, f"longer   python train.py {shlex.join(again)}"]

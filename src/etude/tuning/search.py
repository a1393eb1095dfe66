"""A search on disk: its storage, its lock, and the trials that are asked for and told."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.errors import Interrupted, Refusal
from etude.redact import redact
from etude.signature import did_you_mean
from etude.tuning.space import Space, overrides, size

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

DRAWS = 100  # in a row that were tried before: then the sampler has nothing new


def storage_of(url: str | None, journal: Path) -> "BaseStorage":
    """A database by its URL, else the journal file, which belongs to this search alone: what a killed process left half
    written in it is cut off, under the search's lock. Raises Refusal."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url is not None:
        try:
            return RDBStorage(url)
        except Exception as error:  # of SQLAlchemy, the database's driver, or the system
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise Refusal(f"hydra.sweeper.storage={redact(url)} could not be opened: {why}") from None
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.exists():
        with journal.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    try:
        return JournalStorage(JournalFileBackend(str(journal)))
    except (ValueError, KeyError) as error:
        raise Refusal(
            f"{journal} cannot be read ({error}); move it away, or name another search with hydra.sweeper.study=<name>"
        ) from None


def open_study(
    storage: "BaseStorage", name: str, directions: Any, pruner: "BasePruner", identity: dict[str, Any]
) -> "Study":
    """The study `name`, new or as it is. `identity` is what all its trials share; raises Refusal where it was another."""
    import optuna

    names = optuna.get_all_study_names(storage)
    if name not in names:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, pruner=pruner)
        study.set_user_attr("etude", identity)
        return study
    study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
    before = study.user_attrs.get("etude")
    if before is None and not study.trials:  # killed between the two lines above
        study.set_user_attr("etude", identity)
    elif before != identity:
        parts = [k for k in identity if before is None or before.get(k) != identity[k]]
        was = "; ".join(f"{k}: {before.get(k)} then, {identity[k]} now" for k in parts) if before else "not by train.py"
        raise Refusal(
            f"the search {name} was begun with other settings ({was}); give this one hydra.sweeper.study=<name>"
        )
    return study


def take_back(study: "Study") -> int:
    """Under the lock no other process has a trial running: such trials were cut off with theirs. They become failed, and
    wait once more with the same parameters. -> how many"""
    from optuna.trial import TrialState

    waiting = {job_of(t) for t in study.get_trials(deepcopy=False) if t.state == TrialState.WAITING}
    cut = [t for t in study.get_trials() if t.state == TrialState.RUNNING]
    for trial in cut:
        known = trial.system_attrs.get("fixed_params", trial.params)
        if known and job_of(trial) not in waiting:
            study.enqueue_trial(known, user_attrs={"retry_of": job_of(trial)})
        study.tell(trial.number, state=TrialState.FAIL)
    return len(cut)


def job_of(trial: "FrozenTrial | Trial") -> int:
    """The number of a trial's job: that of the first trial of these parameters, so that its run goes on in its folder."""
    return trial.user_attrs.get("retry_of", trial.number)


@dataclasses.dataclass
class Search:
    """One start of a search. `ask` gives (job's number, its overrides) until enough trials are finished or under
    way; `watch` sees a running one's metrics and says when to stop it; `tell` takes its end."""

    study: "Study"
    space: Space
    fixed: list[str]
    metrics: list[str]
    prune_metric: str
    total: int
    seed: int
    sampler: Callable[[int, Space, list[dict[str, Any]]], "BaseSampler | None"]
    max_failures: int
    running: dict[int, "Trial"] = dataclasses.field(default_factory=dict)  # by their jobs' numbers
    seen: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # of its metrics: see new_lines
    behind: set[int] = dataclasses.field(default_factory=set)  # told to stop by the pruner
    failed: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # parameters that failed in this start
    in_a_row: int = 0
    refusal: Refusal | None = None
    note: str | None = None  # why the search ended short of its total

    def finished(self) -> int:
        """Trials that count: complete or pruned."""
        return sum(counts(t) for t in self.study.get_trials(deepcopy=False))

    def over(self) -> bool:
        return self.refusal is not None or self.note is not None or self.finished() >= self.total

    def ask(self) -> tuple[int, list[str]] | None:
        from optuna.trial import TrialState

        for _ in range(DRAWS):
            if self.over() or self.finished() + len(self.running) >= self.total:
                return None
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            running = {t.number for t in self.running.values()}
            tried = [t.params for t in trials if counts(t) or t.number in running] + self.failed
            points = size(self.space)
            sampler = self.sampler(self.seed + len({job_of(t) for t in trials}), self.space, tried)
            if not waiting and (sampler is None or (points is not None and different(tried) >= points)):
                if not self.running:
                    self.note = "every combination was tried"
                return None
            if sampler is not None:
                self.study.sampler = sampler
            trial = self.study.ask(self.space)
            if waiting or trial.params not in tried:
                self.running[job_of(trial)] = trial
                return job_of(trial), self.fixed + overrides(trial.params)
            trial.set_user_attr("repeats", True)  # a run would give the same numbers again
            self.study.tell(trial, state=TrialState.FAIL)
        self.note = f"{DRAWS} draws in a row gave nothing that was not tried"
        return None

    def watch(self, number: int, folder: Path) -> bool:
        """Report what is new in a running job's metrics. -> whether the pruner stops it."""
        trial = self.running[number]
        if number not in self.seen:
            trial.set_user_attr("run", str(folder))
        self.seen.setdefault(number, (0, 0))
        reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        lines, self.seen[number] = new_lines(folder / "logs" / "metrics.jsonl", self.seen[number])
        for line in lines:
            value = line.get(self.prune_metric)
            if value is not None and line["step"] not in reported and len(self.metrics) == 1:
                trial.report(value, line["step"])
                if trial.should_prune():
                    self.behind.add(number)
        return number in self.behind

    def tell(self, number: int, result: "JobReturn") -> None:
        """Values of a run that came to its end, pruned if the pruner stopped it, else failed."""
        from hydra.core.utils import JobStatus
        from optuna.trial import TrialState

        trial = self.running.pop(number)
        if result.status == JobStatus.COMPLETED:
            values, error = self.values(result._return_value)
        elif number in self.behind:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.in_a_row = 0
            return
        else:
            values, error = [], str(result._return_value).strip() or repr(result._return_value)
            error = re.sub(r"^job \d+ \w+: ", "", error)  # the table says so already
        if result.working_dir and number not in self.seen:
            trial.set_user_attr("run", result.working_dir)
        if not error:
            self.refusal = self.refusal or self.nothing_to_prune(trial, result.working_dir)
            self.study.tell(trial, values)
            self.in_a_row = 0
            return
        trial.set_user_attr("error", error.splitlines()[-1])
        if getattr(result._return_value, "code", None) != Interrupted.code:  # such a run goes on at the next start
            self.study.tell(trial, state=TrialState.FAIL)
        self.failed.append(trial.params)
        self.in_a_row += 1
        if self.in_a_row >= self.max_failures and self.refusal is None:
            self.refusal = Refusal(
                f"{self.in_a_row} trials in a row failed, the last with: {error.splitlines()[-1]}; mend that and start again, "
                f"or set hydra.sweeper.max_failures={4 * self.max_failures}"
            )

    def nothing_to_prune(self, trial: "Trial", folder: str | None) -> Refusal | None:
        """Of a completed run in which the pruner could not have looked at anything."""
        from optuna.pruners import NopPruner

        found = self.study.get_trials(deepcopy=False)[trial.number]
        run = found.user_attrs.get("run", folder)
        if isinstance(self.study.pruner, NopPruner) or found.intermediate_values or run is None:
            return None
        lines, _ = new_lines(Path(run) / "logs" / "metrics.jsonl", (0, 0))
        names = sorted({name for line in lines for name in line} - {"step"})
        if self.prune_metric in names:  # of a run that ended before it was looked at
            return None
        return Refusal(
            f"hydra.sweeper.prune_metric={self.prune_metric} is not in the log of {run}{did_you_mean(self.prune_metric, names)}; "
            "choose another, evaluate more often (eval_every), or set hydra/sweeper/pruner=none"
        )

    def values(self, metrics: Any) -> tuple[list[float], str]:
        """(the objectives, what is wrong with them)."""
        if not isinstance(metrics, dict):
            return [], "the run gave no metrics"
        for name in self.metrics:
            if not isinstance(metrics.get(name), (int, float)):
                known = sorted(k for k, v in metrics.items() if isinstance(v, (int, float)))
                line = f"hydra.sweeper.metric={name} is not among the run's metrics{did_you_mean(name, known)}"
                self.refusal = self.refusal or Refusal(line)
                return [], line
            if not math.isfinite(metrics[name]):
                return [], f"{name} is {metrics[name]}"
        return [float(metrics[name]) for name in self.metrics], ""


def counts(trial: "FrozenTrial") -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def different(points: list[dict[str, Any]]) -> int:
    return len({json.dumps(p, sort_keys=True) for p in points})


def new_lines(path: Path, seen: tuple[int, int]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """The whole lines of a metrics file that are new since `seen`, (the file's number, how many bytes were read), and what is
    seen now. A resume puts a new file in the place of the old one, which is read from its beginning."""
    try:
        with path.open("rb") as file:
            number, start = os.fstat(file.fileno()).st_ino, seen[1]
            start = start if number == seen[0] else 0
            file.seek(start)
            whole = file.read()
    except FileNotFoundError:
        return [], seen
    whole = whole[: whole.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], (number, start + len(whole))

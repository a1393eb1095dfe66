"""hydra/sweeper=optuna: held against Optuna driven by hand, with runs that are a formula; at the end with train.py."""

import importlib.metadata
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from packaging.requirements import Requirement
from running import start, tiny, train

from etude.config import CONF
from etude.errors import JobFailed, Refusal
from etude.track import _cut
from etude.tuning import report, space
from etude.tuning.search import new_lines

optuna.logging.set_verbosity(optuna.logging.WARNING)
Run = dict[str, Any]
LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
WARMUP = "scheduler.warmup=int(interval(0,200))"
FFN = "model/ffn=swiglu,mlp"
SPACE = {
    "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
    "scheduler.warmup": IntDistribution(0, 200),
    "model/ffn": CategoricalDistribution(["swiglu", "mlp"]),
}


def settings(overrides: Sequence[str]) -> Run:
    parser = OverridesParser.create()
    return {o.get_key_element(): o.value() for o in parser.parse_overrides(list(overrides))}


def bowl(run: Run) -> float:
    """The lower the nearer to lr=0.01, warmup=50; mlp is a little worse."""
    lr, warmup = float(run.get("optimizer.lr", 0.01)), run.get("scheduler.warmup", 50)
    return (lr - 0.01) ** 2 * 1e4 + ((warmup - 50) / 100) ** 2 + 0.1 * (run.get("model/ffn") == "mlp")


def result(value: Callable[[Run], dict], overrides: Sequence[str]) -> JobReturn:
    try:
        return JobReturn(status=JobStatus.COMPLETED, _return_value=value(settings(overrides)))
    except (ArithmeticError, JobFailed) as error:
        return JobReturn(status=JobStatus.FAILED, _return_value=error)


class Batches:
    """A launcher that has only Hydra's own `launch`. `value` gives a run's metrics; ArithmeticError: it failed."""

    def __init__(self, value: Callable[[Run], dict], stop_in: int | None = None):
        self.value, self.left, self.ran = value, stop_in, []  # type: ignore[var-annotated]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        results = []
        for overrides in job_overrides:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.ran.append(settings(overrides))
            results.append(result(self.value, overrides))
        return results


class Late:
    """A launcher with `run`: `at_once` jobs side by side, each writing `curve`'s values to its metrics, one each time the
    sweeper looks."""

    at_once: int | None = 1

    def __init__(self, folder: Path, curve: Callable[[Run], list[float]], stop_in: int | None = None):
        self.folder, self.curve, self.left = folder, curve, stop_in
        self.looks: dict[int, int] = {}

    def run(
        self,
        jobs: Iterator[tuple[int, list[str]]],
        watch: Callable[[int, Path], bool],
        done: Callable[[int, JobReturn], None],
        wanted: int | None = None,
    ) -> list[JobReturn]:
        running: dict[int, tuple[list[str], Iterator[tuple[int, float]]]] = {}
        while True:
            while len(running) < (self.at_once or 1) and (job := next(jobs, None)):
                running[job[0]] = job[1], iter(enumerate(self.curve(settings(job[1])), 1))
            if not running:
                return []
            for number, (overrides, steps) in list(running.items()):
                folder = self.folder / str(number)
                (folder / "logs").mkdir(parents=True, exist_ok=True)
                if (at := next(steps, None)) is None:
                    del running[number]
                    done(number, result(lambda run: {"val/full_loss": self.curve(run)[-1]}, overrides))
                    continue
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                with (folder / "logs" / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": 10 * at[0], "val/loss": at[1]}) + "\n")
                self.looks[number] = at[0]
                if watch(number, folder):
                    del running[number]
                    done(number, JobReturn(status=JobStatus.FAILED, _return_value=JobFailed("pruned", 3)))


def search(folder: Path, launcher: Any, *overrides: str, checked: bool = False, **sweeper: Any) -> optuna.Study:
    """One start of a search with this launcher, without composing (0.3 s each) what `checked` is about. -> its study, read
    back from the journal"""
    given = [f"hydra.sweeper.{k}={v}" for k, v in sweeper.items()]
    typed = ["hydra/sweeper=optuna", "hydra/launcher=basic", "tracker=jsonl", f"runs_dir={folder}", *given, *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("train", typed, RunMode.MULTIRUN)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        made = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=lambda cfg: None, config=config
        )
        made.launcher = launcher  # type: ignore[attr-defined]
        if not checked:
            made.check_space = lambda fixed, found: {"max_steps": 800}  # type: ignore[attr-defined]
            made.identity = lambda fixed, found: {}  # type: ignore[attr-defined]
        made.sweep(OmegaConf.to_container(config.hydra.overrides.task))  # type: ignore[arg-type]
    return stored(folder)


def stored(folder: Path) -> optuna.Study:
    (journal,) = folder.glob("optuna/*/journal.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    return optuna.load_study(storage=storage, study_name=journal.parent.name)


def told(study: optuna.Study) -> list[tuple[Run, Any]]:
    """(parameters, values) of the trials that count, in the order in which they were begun."""
    return [(t.params, t.values) for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("optuna/*/results.json")
    return json.loads(path.read_text())


def loss(run: Run) -> dict:
    return {"val/full_loss": bowl(run), "tokens": 100}


# ---------------------------------------------------------------- samplers


SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, with_margin=True, warn_independent_sampling=False),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_search_is_what_optuna_does_by_hand(name: str, tmp_path: Path) -> None:
    """The same sampler and seed, asked and told by hand: the same parameters, whatever way they went round."""
    by_hand = optuna.create_study()
    for i in range(16):
        by_hand.sampler = SAMPLERS[name](7 + i)
        trial = by_hand.ask(SPACE)
        by_hand.tell(trial, bowl(trial.params))
    study = search(tmp_path, Batches(loss), f"hydra/sweeper/sampler={name}", LR, WARMUP, FFN, n_trials=16, seed=7)
    assert told(study) == told(by_hand)
    assert results(tmp_path)["best"] == [by_hand.best_trial.number]


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Stopped in a run twice and started again: trial for trial what the unbroken search tried, none twice, none lost."""
    common = (LR, WARMUP, "max_steps=100")
    whole = search(tmp_path / "whole", Batches(loss), *common, n_trials=14)
    for stop_in in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "cut", Batches(loss, stop_in), *common, n_trials=14)
    launcher = Batches(loss)
    cut = search(tmp_path / "cut", launcher, *common, n_trials=14)
    assert told(cut) == told(whole) and len(told(cut)) == 14
    assert len(launcher.ran) == 14 - 4 - 8
    assert [t["params"] for t in results(tmp_path / "cut")["trials"]] == [p for p, _ in told(whole)]
    again = Batches(loss)
    search(tmp_path / "cut", again, *common, n_trials=14)
    assert not again.ran, "the total was reached"
    search(tmp_path / "cut", again, *common, n_trials=16)
    assert len(again.ran) == 2, "the total is over all starts"


def test_several_at_once_are_all_taken_up_again(tmp_path: Path) -> None:
    """Of three that ran when the search was killed each is tried again once, in its own job's folder."""
    curve = lambda run: [bowl(run)] * 4  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        launcher = Late(tmp_path / "jobs", curve, stop_in=20)
        launcher.at_once = 3
        search(tmp_path, launcher, LR, WARMUP, n_trials=10)
    cut = [t.params for t in stored(tmp_path).trials if t.state.name == "RUNNING"]
    before = told(stored(tmp_path))
    assert len(cut) == 3 and before
    launcher = Late(tmp_path / "jobs", curve)
    search(tmp_path, launcher, LR, WARMUP, n_trials=10, n_jobs=3)
    assert launcher.at_once == 3
    after = [p for p, _ in told(stored(tmp_path))]
    assert len(after) == 10 and [after.count(p) for p in cut] == [1, 1, 1]
    assert after[: len(before)] == [p for p, _ in before]
    jobs = [t["trial"] for t in results(tmp_path)["trials"]]
    assert len(set(jobs)) == 10 and jobs[:6] == [0, 1, 2, 3, 4, 5]
    assert {p.name for p in (tmp_path / "jobs").iterdir()} == set(map(str, jobs))


def test_grid_is_every_combination_once(tmp_path: Path) -> None:
    """In order, as many as there are without being told; what failed is tried again at the next start, and only that."""
    broken = {"scheduler.warmup": 20, "model/ffn": "mlp"}

    def value(run: Run) -> dict:
        if mend != run and all(run[k] == v for k, v in broken.items()):
            raise ArithmeticError("broken")
        return loss(run)

    overrides = ("hydra/sweeper/sampler=grid", "scheduler.warmup=range(10,40,step=10)", FFN)
    everything = [
        {"scheduler.warmup": w, "model/ffn": f} for w, f in itertools.product([10, 20, 30], ["swiglu", "mlp"])
    ]
    mend: Run | None = None
    launcher = Batches(value)
    search(tmp_path, launcher, *overrides)
    assert [{k: r[k] for k in broken} for r in launcher.ran] == everything
    assert [t["status"] for t in results(tmp_path)["trials"]].count("failed") == 1
    again = Batches(loss)
    study = search(tmp_path, again, *overrides)
    assert [{k: r[k] for k in broken} for r in again.ran] == [broken]
    assert len(told(study)) == 6


def test_a_small_space_is_not_drawn_from_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs repeat to the bit: a combination that was tried is not run again, and a search ends when there is none left."""
    launcher = Batches(loss)
    overrides = ("hydra/sweeper/sampler=random", "scheduler.warmup=range(10,40,step=10)", FFN)
    study = search(tmp_path, launcher, *overrides, n_trials=9)
    assert len(launcher.ran) == 6 == len({json.dumps(p) for p, _ in told(study)})
    assert "every combination was tried" in capsys.readouterr().out
    assert len(results(tmp_path)["trials"]) == 6


def test_cmaes_and_grid_refuse_what_they_cannot_search(tmp_path: Path) -> None:
    """Before the first trial, in one line that says what to use instead."""
    for sampler, overrides, said in (
        ("cmaes", [LR, FFN], "two numbers"),
        ("cmaes", [LR, WARMUP, "hydra.sweeper.metric=[a,b]", "hydra.sweeper.direction=[minimize,minimize]"], "tpe"),
        ("grid", [LR], "optimizer.lr has no end of values"),
    ):
        launcher = Batches(loss)
        with pytest.raises(Refusal, match=said):
            search(tmp_path, launcher, f"hydra/sweeper/sampler={sampler}", *overrides, n_trials=3)
        assert not launcher.ran


# ---------------------------------------------------------------- what comes of trials


def test_failures_do_not_count_and_do_not_stop(tmp_path: Path) -> None:
    """Raised, without a number, not a number: failed, with the reason, and another takes its place."""
    number = itertools.count()

    def value(run: Run) -> dict:
        match next(number):
            case 1:
                raise ArithmeticError("a reason\nof two lines")
            case 3:
                return {"val/full_loss": float("nan")}
            case 4:
                return {"val/full_loss": float("inf")}
        return loss(run)

    study = search(tmp_path, Batches(value), LR, n_trials=5)
    assert [t.state.name for t in study.trials] == [
        "COMPLETE", "FAIL", "COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE",
    ]  # fmt: skip
    errors = {t["trial"]: t["error"] for t in results(tmp_path)["trials"] if t["error"]}
    assert errors == {1: "of two lines", 3: "val/full_loss is nan", 4: "val/full_loss is inf"}


def test_a_run_that_was_stopped_goes_on_at_the_next_start(tmp_path: Path) -> None:
    """Exit code 3, a signal or a time-out, says that a run can go on: its trial is not lost, and its folder is its own."""
    calls = itertools.count()

    def value(run: Run) -> dict:
        if next(calls) == 1:
            raise JobFailed("job 1 interrupted: the sweep was stopped", 3)
        return loss(run)

    study = search(tmp_path, Batches(value), LR, n_trials=3)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    assert results(tmp_path)["trials"][1]["status"] == "cut off"
    study = search(tmp_path, Batches(value), LR, n_trials=4)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert study.trials[4].params == study.trials[1].params
    assert [t["trial"] for t in results(tmp_path)["trials"]] == [0, 1, 2, 3]


def test_a_search_that_only_fails_stops(tmp_path: Path) -> None:
    """A mistake in the command should not fail all night. Mended, the same command goes on."""

    def broken(run: Run) -> dict:
        raise ArithmeticError("out of memory")

    launcher = Batches(broken)
    with pytest.raises(Refusal, match="3 trials in a row failed, the last with: out of memory; .*max_failures=12"):
        search(tmp_path, launcher, LR, n_trials=9, max_failures=3)
    assert len(launcher.ran) == 3
    assert len(told(search(tmp_path, Batches(loss), LR, n_trials=4, max_failures=12))) == 4


def test_a_metric_that_runs_do_not_have(tmp_path: Path) -> None:
    """It is known after the first run, and more runs would not bring it."""
    launcher = Batches(loss)
    with pytest.raises(Refusal, match="metric=val/ful_loss is not among .* did you mean val/full_loss"):
        search(tmp_path, launcher, LR, n_trials=9, metric="val/ful_loss")
    assert len(launcher.ran) == 1


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_several_objectives(n_jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The front is what no other trial beats in both; batches do not go beyond the total."""

    def value(run: Run) -> dict:
        return {"val/full_loss": bowl(run), "flops": run["scheduler.warmup"]}

    study = search(
        tmp_path, Batches(value), LR, WARMUP, n_trials=10, n_jobs=n_jobs,
        metric="[val/full_loss,flops]", direction="[minimize,maximize]",
    )  # fmt: skip
    values = {t.number: (t.values[0], -t.values[1]) for t in study.trials}
    front = [n for n, v in values.items() if not any(w != v and w[0] <= v[0] and w[1] <= v[1] for w in values.values())]
    assert sorted(results(tmp_path)["best"]) == sorted(front) and len(values) == 10
    out = capsys.readouterr().out
    assert "front    trial" in out and out.count("*") >= len(front)
    with pytest.raises(Refusal, match="several objectives cannot be pruned"):
        search(
            tmp_path, Late(tmp_path, lambda run: [1.0]), "hydra/sweeper/pruner=median", LR, n_trials=3,
            metric="[val/full_loss,flops]", direction="[minimize,maximize]",
        )  # fmt: skip


PRUNERS = {
    "median": optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=10),
    "percentile": optuna.pruners.PercentilePruner(25.0, n_startup_trials=3, n_warmup_steps=10),
    "hyperband": optuna.pruners.HyperbandPruner(min_resource=10, max_resource=40, reduction_factor=2),
    "asha": optuna.pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=2),
}
PRUNER_KEYS = {
    "median": ["n_startup_trials=3", "n_warmup_steps=10"],
    "percentile": ["n_startup_trials=3", "n_warmup_steps=10"],
    "hyperband": ["min_resource=10", "max_resource=40", "reduction_factor=2"],
    "asha": ["min_resource=10", "reduction_factor=2"],
}


@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_is_optunas(name: str, tmp_path: Path) -> None:
    """What the runs log as they go decides when they end, as if it had been reported by hand."""

    def curve(run: Run) -> list[float]:
        return [bowl(run) + 1 / step for step in range(1, 5)]

    launcher = Late(tmp_path / "jobs", curve)
    keys = [f"hydra.sweeper.pruner.{k}" for k in PRUNER_KEYS[name]]
    study = search(tmp_path, launcher, f"hydra/sweeper/pruner={name}", *keys, LR, WARMUP, n_trials=12, study="named")

    by_hand = optuna.create_study(pruner=PRUNERS[name], study_name="named")
    looks = {}
    for i in range(12):
        by_hand.sampler = optuna.samplers.TPESampler(seed=i, multivariate=True)
        trial = by_hand.ask({k: SPACE[k] for k in ("optimizer.lr", "scheduler.warmup")})
        for at, value in enumerate(curve(trial.params), 1):
            looks[i] = at
            trial.report(value, 10 * at)
            if trial.should_prune():
                by_hand.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            by_hand.tell(trial, value)
    assert told(study) == told(by_hand)
    assert launcher.looks == looks and min(looks.values()) < 4 == max(looks.values())
    assert [t.state for t in study.trials] == [t.state for t in by_hand.trials]
    assert [t["step"] for t in results(tmp_path)["trials"]] == [10 * n for n in looks.values()]


def test_a_metric_that_runs_do_not_log_cannot_prune(tmp_path: Path) -> None:
    """Else every trial would run to its end without a word: found when the first one has."""
    launcher = Late(tmp_path / "runs", lambda run: [1.0, 2.0])
    with pytest.raises(
        Refusal, match="prune_metric=val/lss is not in the log of .*; did you mean val/loss.*eval_every"
    ):
        search(tmp_path, launcher, "hydra/sweeper/pruner=median", LR, n_trials=3, prune_metric="val/lss")
    assert len(launcher.looks) == 1 and len(results(tmp_path)["best"]) == 1


def test_the_best_of_a_preset_is_trained_longer_as_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sweep=` alone makes a multirun: the command that is printed says otherwise, and what else the preset sets stays."""
    launcher = Late(tmp_path / "jobs", lambda run: [bowl(run)])
    search(tmp_path, launcher, "sweep=optuna_lr", "tag=x", n_trials=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("longer")]
    command = shlex.split(line)
    assert command[1:3] == ["python", "train.py"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None and hydra.get_mode("train", command[3:]) == RunMode.RUN
        config = hydra.compose_config("train", command[3:], RunMode.RUN)
    assert config.max_steps == 3200 and config.tag == "x" and config.eval_every == 100
    assert config.optimizer.lr == results(tmp_path)["trials"][0]["params"]["optimizer.lr"]


def test_a_front_begins_with_the_best_of_the_first_objective() -> None:
    """Which is what the table ends with, as the one to train longer."""
    for first, wanted in (("maximize", [9.0, 1.0]), ("minimize", [1.0, 9.0])):
        study = optuna.create_study(directions=[first, "minimize" if first == "maximize" else "maximize"])
        for value in (1.0, 9.0):
            study.add_trial(optuna.trial.create_trial(values=[value, value], params={}, distributions={}))
        assert [t.values[0] for t in report.best(study)] == wanted


def test_a_launcher_that_cannot_look_into_runs_refuses_pruning(tmp_path: Path) -> None:
    """Else every trial would run to its end while the config says otherwise."""
    with pytest.raises(Refusal, match="add hydra/launcher=isolated"):
        search(tmp_path, Batches(loss), "hydra/sweeper/pruner=asha", LR, n_trials=3)


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    """A line counts once it is whole; a file that a resume cut is read again."""
    path = tmp_path / "metrics.jsonl"
    assert new_lines(path, (0, 0)) == ([], (0, 0))
    path.write_text('{"step": 1}\n{"st')
    lines, at = new_lines(path, (0, 0))
    assert lines == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n{"step": 3}\n')
    lines, at = new_lines(path, at)
    assert lines == [{"step": 2}, {"step": 3}] and new_lines(path, at) == ([], at)
    _cut(path, 1)  # and before the next look the file is longer than it was
    with path.open("a") as file:
        file.write('{"step": 2, "longer": 123456}\n{"step": 3}\n')
    lines, at = new_lines(path, at)
    assert [line["step"] for line in lines] == [1, 2, 3] and new_lines(path, at) == ([], at)


# ---------------------------------------------------------------- storage


def test_two_processes_on_one_search(tmp_path: Path) -> None:
    """The second is refused: it could not tell the first one's running trials from those of a killed process."""

    class Second(Batches):
        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            pid = os.fork()
            if pid == 0:  # a POSIX lock keeps other processes out, not its own
                code = 0
                try:
                    GlobalHydra.instance().clear()
                    search(tmp_path, Batches(loss), LR, n_trials=2)
                except Refusal as error:
                    code = 2 if "is being written by process" in str(error) else 1
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
            return super().launch(job_overrides, initial_job_idx)

    assert len(told(search(tmp_path, Second(loss), LR, n_trials=2))) == 2


def test_half_a_line_in_the_journal(tmp_path: Path) -> None:
    """Killed while writing it: the line is lost, the search is not; nor does a lock stay behind."""
    search(tmp_path, Batches(loss), LR, n_trials=3)
    (journal,) = tmp_path.glob("optuna/*/journal.log")
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x","tri')
    journal.with_name("journal.log.lock").symlink_to(journal)
    begun = time.monotonic()
    assert len(told(search(tmp_path, Batches(loss), LR, n_trials=5))) == 5
    assert time.monotonic() - begun < 20, "waited for a lock that nobody holds"


def test_a_database(tmp_path: Path) -> None:
    """storage=<URL>: SQLite goes on like the journal. A password in a URL that cannot be opened is not shown."""
    url = f"sqlite:///{tmp_path}/trials.db"
    for stop_in in (3, None):
        try:
            search(tmp_path, Batches(loss, stop_in), LR, n_trials=5, storage=f"'{url}'", study="db")
        except KeyboardInterrupt:
            assert stop_in == 3
        except ValueError:  # `stored` looks for a journal
            pass
    study = optuna.load_study(storage=url, study_name="db")
    assert len(told(study)) == 5 and [t.state.name for t in study.trials].count("FAIL") == 1
    with pytest.raises(Refusal) as refused:
        search(tmp_path, Batches(loss), LR, n_trials=5, storage="'nosuch://me:hunter2@host/db'")
    assert "could not be opened" in str(refused.value) and "hunter2" not in str(refused.value)


def test_aim_in_the_same_process(tmp_path: Path) -> None:
    """Both use SQLAlchemy: one environment has to hold a version that suits both, and each has to work with it."""
    for name in ("optuna", "aim"):
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True), line
    code = f"""
import aim, optuna
run = aim.Run(repo={str(tmp_path)!r}, log_system_params=False, capture_terminal_logs=False, system_tracking_interval=None)
study = optuna.create_study(storage="sqlite:///{tmp_path}/trials.db")
study.optimize(lambda trial: run.track(x := trial.suggest_float("x", 0, 1), name="x") or x, n_trials=2)
print(len(study.trials), len(list(run.metrics())))
run.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_another_command_is_another_search(tmp_path: Path) -> None:
    """By its own name; under one name that was given, other settings are refused with what differs."""
    search(tmp_path, Batches(loss), LR, n_trials=2, study="mine", checked=True)
    for overrides, said in (
        ([LR, "batch_size=8"], "batch_size: 16 then, 8 now"),
        (
            ["optimizer.lr=tag(log,interval(1e-4,1))"],
            "space of optimizer.lr: 0.0001..0.1 log then, 0.0001..1.0 log now",
        ),
        ([LR, "hydra.sweeper.direction=maximize"], "val/full_loss: minimize then, maximize now"),
    ):
        with pytest.raises(Refusal, match="begun with other settings") as refused:
            search(tmp_path, Batches(loss), *overrides, n_trials=3, study="mine", checked=True)
        assert said in str(refused.value)
    for overrides in ([LR], [LR, "batch_size=8"], [LR, "hydra.sweeper.seed=1"], [LR, "model=gpt"]):
        with pytest.raises(ValueError):  # `stored`: more than one
            search(tmp_path, Batches(loss), *overrides, n_trials=1)
    assert len(list(tmp_path.glob("optuna/search_*/journal.log"))) == 4


# ---------------------------------------------------------------- search spaces


def test_a_space_in_yaml_and_on_the_command_line() -> None:
    """Both say the same; where both name a key, the command line counts."""
    parser = OverridesParser.create()
    params = {
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "model.n_layers": {"low": 2, "high": 8, "step": 2},
        "model.dim": {"low": 64, "high": 256, "log": True},
        "clip": {"low": 0.5, "high": 1.5, "step": 0.5},
        "model/attn": {"choices": ["gqa", "mla"]},
        "optimizer.betas": {"choices": [[0.9, 0.95], [0.9, 0.99]]},
        "eval_every": {"choices": [None, 10]},
        "max_steps": 100,
        "sample_prompts": ["a b", "c"],
        "seed": "0,1",
    }
    line = [
        "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.n_layers=range(2,9,step=2)",
        "model.dim=tag(log,int(interval(64,256)))", "clip=range(0.5,2.0,step=0.5)", "model/attn=choice(gqa,mla)",
        "optimizer.betas=[0.9,0.95],[0.9,0.99]", "eval_every=null,10", "max_steps=100", "sample_prompts=[a b,c]", "seed=0,1",
    ]  # fmt: skip
    from_yaml, from_line = space.parse(params, [], parser), space.parse({}, line, parser)
    assert from_yaml == from_line
    assert from_line[0] == ["max_steps=100", "sample_prompts=[a b,c]"]
    assert from_line[1]["optimizer.betas"] == CategoricalDistribution(["[0.9,0.95]", "[0.9,0.99]"])
    fixed, searched = space.parse(params, ["optimizer.lr=0.1", "max_steps=1,2"], parser)
    assert "optimizer.lr" not in searched and "optimizer.lr=0.1" in fixed
    assert searched["max_steps"] == CategoricalDistribution([1, 2])


@pytest.mark.parametrize("value", [1e-5, 0.1 + 0.2, 3, True, None, "gqa", "1", "true", "null", "a, b", "it's", "${x}"])
def test_a_choice_comes_back_as_it_was(value: Any) -> None:
    """A value goes through Optuna and an override and stays the same, text that looks like something else too."""
    parser = OverridesParser.create()
    choices = space.from_yaml("key", {"choices": [value, 7]}, parser)
    (override,) = space.overrides({"key": choices.choices[0]})  # type: ignore[attr-defined]
    parsed = parser.parse_override(override)
    assert not parsed.is_sweep_override()
    if isinstance(value, str) and "$" in value:
        assert parsed.value() == value
    else:
        assert OmegaConf.create({"key": parsed.value()}).key == value


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"lo": 1, "high": 2}, "unknown key hydra.sweeper.params.x.lo; did you mean low?"),
        ({"low": 1}, r"should be \{low: 1e-4, high: 1e-2, log: true\}"),
        ({"low": 2, "high": 1}, "x: "),
        ({"low": 0.0, "high": 1.0, "log": True}, "x: "),
        ({"low": 1, "high": 8, "step": 3}, "set high to 7"),
        ({"low": 0.1, "high": 1.0, "step": 0.1, "log": True}, "either log or in steps"),
        ({"low": "a", "high": 2}, "low=a should be a number"),
        ({"low": 1, "high": float("inf")}, "high=inf should be a number"),
        ({"choices": []}, r"should be \{choices: \[one, two\]\}"),
        ({"choices": [1], "low": 2}, r"should be \{choices: \[one, two\]\}"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_wrong_space(node: Run, said: str) -> None:
    """Refused in one line that names the key."""
    with pytest.raises(Refusal, match=said) as refused:
        space.from_yaml("x", node, OverridesParser.create())
    assert "\n" not in str(refused.value)


def test_values_of_steps_are_what_optuna_draws() -> None:
    """A grid's points and a sampler's draws are the same numbers, or a combination would be run twice."""
    for distribution in (FloatDistribution(0.1, 0.7, step=0.1), IntDistribution(3, 11, step=4)):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = {study.ask({"x": distribution}).params["x"] for _ in range(60)}
        assert sorted(drawn) == space.values_of(distribution)


WRONG = [
    (["model.n_layers=interval(1,4)"], "model.n_layers=1.0 should be a whole number"),
    ([LR, "hydra.sweeper.direction=down"], "direction=down should be minimize or maximize"),
    ([LR, "hydra.sweeper.metric=[a,b]"], "give one direction for each metric"),
    (["optimizer.lr=1e-3"], "nothing to search over"),
    ([LR, "hydra.sweeper.n_trials=null"], "how many trials with hydra.sweeper.n_trials=20"),
    ([LR, "hydra.sweeper.n_trials=abc"], "n_trials=abc should be a whole number"),
    ([LR, "hydra.sweeper.n_jobs=0"], "n_jobs=0 should be at least 1"),
    ([LR, "hydra.sweeper.sampler.n_startup_trials=0.5"], "n_startup_trials=0.5 should be a whole number"),
    ([LR, "hydra.sweeper.storage=trials.db"], "storage=trials.db should be a URL, as sqlite:///trials.db"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_settings(overrides: list[str], said: str, tmp_path: Path) -> None:
    """Refused before anything is written or run."""
    launcher = Batches(loss)
    with pytest.raises(Refusal) as refused:
        search(tmp_path, launcher, "hydra.sweeper.n_trials=2", *overrides, checked="n_layers" in overrides[0])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not launcher.ran and not list(tmp_path.iterdir())


def test_a_key_that_there_is_not(tmp_path: Path) -> None:
    """Said before the first trial: one line, exit code 2, and no run's folder."""
    override = "optimizer.lrr=tag(log,interval(1e-4,1e-2))"
    done = train(
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", f"runs_dir={tmp_path}", override, check=False
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "unknown key optimizer.lrr; did you mean optimizer.lr?" in done.stderr
    assert not list(tmp_path.glob("optuna/*")) and not list(tmp_path.glob("sweeps/*/*_*"))


def test_a_choice_that_there_is_not(tmp_path: Path) -> None:
    """Found before the first trial, though the first trials might not draw it."""
    launcher = Batches(loss)
    with pytest.raises(HydraException, match="mpl"):
        search(tmp_path, launcher, "model/ffn=swiglu,mpl", checked=True)
    assert not launcher.ran and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- with runs


def test_a_killed_search_of_real_runs(tmp_path: Path) -> None:
    """kill -9 in the middle, the same command again: the total, no parameters twice, every run's last metric in the study."""
    command = [
        "-m", "hydra/sweeper=optuna", "hydra/launcher=isolated", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2",
        LR, FFN, *tiny(tmp_path, max_steps=3),
    ]  # fmt: skip
    process = start(*command)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if (found := list(tmp_path.glob("runs/optuna/*/journal.log"))) and told(stored(tmp_path / "runs")):
            break
        time.sleep(0.1)
    assert found and process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    before = told(stored(tmp_path / "runs"))
    assert 1 <= len(before) < 3
    done = train(*command)
    study = stored(tmp_path / "runs")
    after = told(study)
    assert len(after) == 3 and after[: len(before)] == before
    assert len({json.dumps(p) for p, _ in after}) == 3
    shown = results(tmp_path / "runs")
    for trial in shown["trials"]:
        status = json.loads((Path(trial["run"]) / "status.json").read_text())
        assert status["status"] == "completed"
        assert trial["values"]["val/full_loss"] == status["metrics"]["val/full_loss"]
        config = json.loads((Path(trial["run"]) / "meta" / "full_config.json").read_text())
        assert config["optimizer"]["lr"] == trial["params"]["optimizer.lr"]
    assert len(list(tmp_path.glob("runs/sweeps/*/*/status.json"))) == 3
    assert min(after, key=lambda t: t[1]) == (study.best_trial.params, study.best_trial.values)
    assert f"best     trial {shown['best'][0]}: " in done.stdout
    (longer,) = [line for line in done.stdout.splitlines() if line.startswith("longer")]
    assert "max_steps=12" in longer and "hydra" not in longer

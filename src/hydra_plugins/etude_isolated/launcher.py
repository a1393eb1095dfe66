"""hydra/launcher=isolated: a process for each job. What one costs, only it pays; the same command goes on."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from etude.errors import Interrupted, JobFailed, Refusal

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from etude.sweep.job import Job
    from etude.sweep.pool import Resources

# Hydra's own settings that are the sweep's, not its jobs'.
OF_THE_SWEEP = ("hydra.launcher", "hydra.sweeper", "hydra.sweep", "hydra.mode", "hydra.callbacks", "hydra.run")


class Result(JobReturn):
    """A job's result whose error is raised without a line of Hydra's: the table has told it."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class IsolatedLauncher(Launcher):
    """conf/hydra/launcher/isolated.yaml says what each setting does."""

    config: Any
    hydra_context: Any

    def __init__(
        self,
        *,
        at_once: int | None,
        threads: int | None,
        timeout_minutes: float | None,
        grace_seconds: float,
        gpus: list[int | str] | None,
        fresh: bool,
        metric: str | None,
    ):
        self.at_once, self.threads, self.timeout_minutes = at_once, threads, timeout_minutes
        self.grace_seconds, self.gpus, self.fresh, self.metric = grace_seconds, gpus, fresh, metric

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        from omegaconf import OmegaConf

        from etude import config as conf

        self.config, self.hydra_context = config, hydra_context
        node: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        conf.check_targets({"hydra": {"launcher": node}}, ["hydra_plugins"])
        for name in ("at_once", "threads", "timeout_minutes", "grace_seconds"):
            if node[name] is not None and node[name] <= 0:
                raise Refusal(f"hydra.launcher.{name}={node[name]} should be above 0")
        if "resume" not in config or "what" in config:
            raise Refusal("hydra/launcher=isolated is for train.py, whose runs can go on; add hydra/launcher=basic")
        if not sys.argv[0].endswith(".py") or not Path(sys.argv[0]).is_file():
            raise Refusal(
                "hydra/launcher=isolated starts a script again for each job, and this is none; add hydra/launcher=basic"
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all; -> a result for each, in order. A failed one raises JobFailed as its return_value is read."""
        if self.config.hydra.sweeper.get("max_batch_size") is not None:
            raise Refusal(
                "hydra.sweeper.max_batch_size gives up after a batch in which a job failed; use hydra.launcher.at_once=N"
            )
        numbered = [(initial_job_idx + i, list(o)) for i, o in enumerate(job_overrides)]
        for _, overrides in numbered:
            self._check_job(overrides)
        return self._run(iter(numbered), len(numbered), None, None)

    def run(
        self,
        jobs: Iterator[tuple[int, list[str]]],
        watch: Callable[[int, Path], bool] | None = None,
        done: Callable[[int, JobReturn], None] | None = None,
        wanted: int | None = None,
    ) -> list[JobReturn]:
        """Run jobs of (number, overrides), each taken when there is room for it. watch(number, folder) is called about once
        a second for each that runs; True stops it, as "pruned". done(number, result) is called as each ends; a result's
        value is the run's metrics by name. `wanted`, of which the lines tell, is how many are to end without failing.
        -> the results in the order of numbers. Raises Interrupted after a signal."""
        return self._run(jobs, None, watch, done, wanted)

    def _run(
        self,
        numbered: Iterator[tuple[int, list[str]]],
        total: int | None,
        watch: Callable[[int, Path], bool] | None,
        done: Callable[[int, JobReturn], None] | None,
        wanted: int | None = None,
    ) -> list[JobReturn]:
        from omegaconf import OmegaConf

        from etude import redact
        from etude.sweep import place
        from etude.sweep.job import find
        from etude.sweep.pool import Pool
        from etude.sweep.table import Table

        sweep = Path(self.config.hydra.sweep.dir)
        place.forget_multirun(sweep)
        redact.remember(OmegaConf.to_container(self.config, resolve=False))
        seen: list[Job] = []
        results: dict[int, JobReturn] = {}

        def found() -> "Iterator[Job]":
            for number, overrides in numbered:
                self._check_job(overrides)
                seen.append(find(sweep, number, overrides, taken={j.folder for j in seen}))
                place.note_jobs(sweep, {seen[-1].folder.name: overrides})
                yield seen[-1]

        def ended(job: "Job") -> None:
            table.check_metric(job)
            results[job.number] = self._result(job)
            if done is not None:
                done(job.number, results[job.number])

        table = Table(self.config.progress, seen, total, list(self.config.hydra.overrides.task), self.metric, wanted)
        pool = Pool(self._resources(), self._command, self._own, bool(self.config.dry_run))
        known = found() if total is None else iter(list(found()))
        try:
            pool.run(known, table, watch, ended)
        finally:
            self._conclude(sweep, table, total)
        return [results[n] for n in sorted(results)]

    def _check_job(self, overrides: Iterable[str]) -> None:
        from etude.sweep.place import key_of

        for override in overrides:
            key, value = key_of(override), override.partition("=")[2]
            if key == "resume" and value != "null":
                raise Refusal(f"{override}: a sweep's jobs are runs of their own; use init_from=, or leave out -m")
            if key == "threads" and self.threads is not None and value not in ("null", str(self.threads)):
                raise Refusal(f"{override} and hydra.launcher.threads={self.threads} disagree; leave one of them out")

    def _resources(self) -> "Resources":
        from etude.parallel import cores
        from etude.sweep.pool import Resources, visible_gpus

        self._check_threads(self.config.threads)
        gpus = visible_gpus() if self.gpus is None else [str(g) for g in self.gpus]
        return Resources(
            at_once=self.at_once,
            threads=self.threads,
            gpus=None if self.gpus is None and not gpus else gpus,
            cores=cores(),
            timeout=None if self.timeout_minutes is None else 60 * self.timeout_minutes,
            grace=self.grace_seconds,
        )

    def _check_threads(self, own: int | None) -> None:
        if own is not None and self.threads not in (None, own):
            raise Refusal(f"threads={own} and hydra.launcher.threads={self.threads} disagree; leave one of them out")

    def _own(self, job: "Job") -> tuple[int | None, int]:
        """(threads, processes) of a job's config: a swept experiment=, or parallel=, may say other ones than the sweep's."""
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, job.overrides)
            threads, processes = config.threads, OmegaConf.select(config, "parallel.nproc")
        except (HydraException, OmegaConfBaseException):  # the job will say so itself
            return None, 1
        count = lambda n: isinstance(n, int) and n > 0  # what is none the job refuses  # noqa: E731
        return threads if count(threads) else None, processes if count(processes) else 1

    def _command(self, job: "Job", overrides: list[str]) -> list[str]:
        """The script that this is, with the same flags and Hydra's settings, and the job's overrides."""
        from etude.sweep.place import key_of

        self._check_threads(job.own_threads)
        flags: list[str] = []
        for argument in sys.argv[1:]:  # cli.flags_first has put them before the overrides
            if "=" in argument and not argument.startswith("-") or argument.startswith("~"):
                break
            if argument not in ("-m", "--multirun"):
                flags.append(argument)
        kept = [
            o for o in self.config.hydra.overrides.hydra if not key_of(o).replace("/", ".").startswith(OF_THE_SWEEP)
        ]
        progress = [] if self.config.progress == "none" else ["progress=lines"]
        return [
            sys.argv[0], *flags, *overrides, *progress, *kept, "hydra.mode=RUN", f"hydra.run.dir={job.folder}"
        ]  # fmt: skip

    def _result(self, job: "Job") -> JobReturn:
        result = Result(overrides=job.overrides, working_dir=str(job.folder))
        if job.status == "completed":
            result.status, result.return_value = JobStatus.COMPLETED, job.metrics
        else:
            result.status = JobStatus.FAILED
            code = (
                Interrupted.code if job.status == "interrupted" else job.code or 1
            )  # killed before it could save, too
            result.return_value = JobFailed(f"job {job.number} {job.status}: {job.why}", code)
        return result

    def _conclude(self, sweep: Path, table: Any, total: int | None) -> None:
        """The last table, and what to type next; only where to look where `total` is None: a sweeper that thinks jobs up as it
        goes has a table of its own, and may go on."""
        if total is not None:
            table.print_last()
        bad = [j for j in table.jobs if j.status not in ("completed", "pruned")]
        if not bad and table.jobs and all(j.earlier for j in table.jobs) and total is not None:
            print(
                f"all      {len(table.jobs)} jobs of this sweep are completed; for a new one add hydra.launcher.fresh=true"
            )
        if names := [j.folder.name for j in bad if j.code is not None]:
            print(f"logs     {sweep}/{names[0] if len(names) == 1 else '{' + ','.join(names) + '}'}/stdout.log")
        if total is None:
            return
        if bad:
            print("again    type the same command: completed jobs are left as they are, the others are tried again")
        if any(j.folder.is_dir() for j in table.jobs):  # else it is removed
            print(f"sweep    {sweep}", flush=True)

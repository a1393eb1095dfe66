"""hydra/sweeper=optuna: a search whose trials are runs. Several starts of one command are one search."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hydra.plugins.sweeper import Sweeper

from etude import config as conf
from etude.errors import Refusal
from etude.redact import redact
from etude.run import flat, locked

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from etude.tuning.search import Search
    from etude.tuning.space import Space

LIMITS = ("max_steps", "max_epochs", "max_tokens", "max_flops", "max_minutes")


@runtime_checkable
class AsksLate(Protocol):
    """A launcher that takes a job when it has room for it, and lets it be watched: hydra/launcher=isolated."""

    at_once: int | None

    def run(
        self,
        jobs: Iterator[tuple[int, list[str]]],
        watch: Callable[[int, Path], bool] | None = None,
        done: "Callable[[int, JobReturn], None] | None" = None,
        wanted: int | None = None,
    ) -> "list[JobReturn]": ...


class OptunaSweeper(Sweeper):
    """conf/hydra/sweeper/optuna.yaml says what each setting does."""

    hydra_context: Any
    config: Any
    launcher: Any

    def __init__(
        self,
        *,
        study: str | None,
        storage: str | None,
        n_trials: int | None,
        n_jobs: int | None,
        seed: int,
        metric: str | list[str],
        direction: str | list[str],
        prune_metric: str,
        max_failures: int,
        params: dict[str, Any],
        sampler: dict[str, Any],
        pruner: dict[str, Any],
    ):
        self.study, self.storage, self.n_trials, self.n_jobs, self.seed = study, storage, n_trials, n_jobs, seed
        self.metrics = [metric] if isinstance(metric, str) else metric
        self.directions: list[Any] = [direction] if isinstance(direction, str) else direction
        self.prune_metric, self.max_failures, self.params = prune_metric, max_failures, params
        self.sampler, self.pruner = sampler, pruner

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import OmegaConf

        try:
            import optuna
        except ImportError:
            raise Refusal("hydra/sweeper=optuna needs optuna: pip install 'optuna>=4.5'") from None
        from etude.sweep import place
        from etude.tuning import report, search, space

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.check_settings()
        fixed, found = space.parse(
            self.params, arguments, OverridesParser.create(config_loader=self.hydra_context.config_loader)
        )
        total = self.total(found)
        first = self.check_space(fixed, found)
        pruner = conf.build(self.pruner)
        if not isinstance(pruner, optuna.pruners.NopPruner):
            if len(self.metrics) > 1:
                raise Refusal("several objectives cannot be pruned; set hydra/sweeper/pruner=none, or one metric")
            if not isinstance(self.launcher, AsksLate):
                raise Refusal(
                    "pruning needs to see into running jobs; add hydra/launcher=isolated, or hydra/sweeper/pruner=none"
                )
        sampler = conf.build(self.sampler)
        try:  # what it cannot search is refused here
            optuna.create_study(directions=self.directions, sampler=sampler(0, found, [])).ask(found)
        except ValueError as error:
            raise Refusal(f"{str(error).rstrip('.')}; use hydra/sweeper/sampler=tpe") from None
        identity = self.identity(fixed, found)
        name = self.study or f"{first.get('tag') or 'search'}_{place.identity(self.config)[:8]}"
        folder = Path(str(OmegaConf.select(self.config, "runs_dir") or "runs")) / "optuna" / name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            storage = search.storage_of(self.storage, folder / "journal.log")
            study = search.open_study(storage, name, self.directions, pruner, identity)
            back = search.take_back(study)
            this = search.Search(
                study, found, fixed, self.metrics, self.prune_metric, total, self.seed, sampler, self.max_failures
            )
            ready = f"{this.finished()} of {total} trials finished" + (
                f", {back} cut off and tried again" if back else ""
            )
            print(f"search   {name}: {ready}, in {folder}")
            print(f"over     {'  '.join(f'{k}={space.describe(d)}' for k, d in found.items())}", flush=True)
            keep = lambda: report.write(folder / "results.json", study, self.metrics, self.directions, fixed)  # noqa: E731
            try:
                self.launch(this, keep)
            finally:
                keep()
                lines = report.ending(study, self.metrics, fixed, longer(first)) + [f"results  {folder}/results.json"]
                if any((sweep := Path(str(self.config.hydra.sweep.dir))).glob("*_*/")):  # else it is removed
                    lines.append(f"sweep    {sweep}")
                report.show(report.table(study, self.metrics, list(found)), lines)
            if this.refusal is not None:
                raise this.refusal
            if this.note is not None:
                print(f"note     {this.note}")

    def launch(self, this: "Search", keep: Callable[[], None]) -> None:
        """Run trials until the search is over: asked for one by one where the launcher can, else n_jobs at a time."""

        def done(number: int, result: "JobReturn") -> None:
            this.tell(number, result)
            keep()

        if isinstance(self.launcher, AsksLate) and self.n_jobs is not None:
            self.launcher.at_once = self.n_jobs

        def jobs() -> Iterator[tuple[int, list[str]]]:
            while (job := this.ask()) is not None:
                yield job

        sweep = Path(str(self.config.hydra.sweep.dir))
        while not this.over():
            if isinstance(self.launcher, AsksLate):
                self.launcher.run(jobs(), this.watch, done, this.total - this.finished())
            else:
                batch = [job for _, job in zip(range(self.n_jobs or 1), jobs())]
                if not batch:
                    continue
                first = batch[0][0]
                results = self.launcher.launch([o for _, o in batch], initial_job_idx=first)
                for i, (number, _) in enumerate(batch):
                    folders = sorted(sweep.glob(f"{first + i}_*"), key=lambda p: p.stat().st_mtime)
                    results[i].working_dir = str(folders[-1]) if folders else None
                    done(number, results[i])

    def check_settings(self) -> None:
        """Raises Refusal for values of the wrong type, by the constructors' sources."""
        from omegaconf import OmegaConf

        node = OmegaConf.to_container(self.config.hydra.sweeper, resolve=True)
        assert isinstance(node, dict)
        given = {k: v for k, v in node.items() if k not in ("_recursive_", "_convert_")}
        trusted = [*self.config.get("trusted", ["etude"]), "hydra_plugins", "optuna"]
        conf.check_targets({"hydra": {"sweeper": given}}, trusted)
        for name, least in (("n_trials", 1), ("n_jobs", 1), ("max_failures", 1), ("seed", 0)):
            if given[name] is not None and given[name] < least:
                raise Refusal(f"hydra.sweeper.{name}={given[name]} should be at least {least}")
        if self.storage is not None and "://" not in self.storage:
            raise Refusal(
                f"hydra.sweeper.storage={self.storage} should be a URL, as sqlite:///trials.db; null: a file in runs_dir"
            )
        if len(self.metrics) != len(self.directions) or len(set(self.metrics)) != len(self.metrics) or not self.metrics:
            raise Refusal(
                f"hydra.sweeper.metric names {len(self.metrics)} and hydra.sweeper.direction {len(self.directions)}; give one direction for each metric"
            )
        for direction in self.directions:
            if direction not in ("minimize", "maximize"):
                raise Refusal(f"hydra.sweeper.direction={direction} should be minimize or maximize")

    def total(self, found: "Space") -> int:
        from etude.tuning.space import size

        if not found:
            raise Refusal(
                "there is nothing to search over; type 'optimizer.lr=tag(log,interval(1e-4,1e-2))', or fill hydra.sweeper.params"
            )
        points = size(found)
        if self.n_trials is None and points is None:
            raise Refusal("this space has no end of combinations; say how many trials with hydra.sweeper.n_trials=20")
        return self.n_trials or points or 0

    def check_space(self, fixed: list[str], found: "Space") -> dict[str, Any]:
        """Compose configs that between them have every choice and every end of a range. -> the first as a dict. Raises
        HydraException for a key or choice that is not there, Refusal where no combination is a sound config."""
        from etude.tuning.space import overrides, probes

        script = self.config.hydra.job.config_name
        first: dict[str, Any] | None = None
        refused: list[Refusal] = []
        for point in probes(found):
            cfg = self.compose(fixed + overrides(point))
            try:
                first = first or conf.check(cfg, script)
            except Refusal as error:
                refused.append(error)
        if first is None:
            raise refused[0]
        return first

    def identity(self, fixed: list[str], found: "Space") -> dict[str, Any]:
        """What all trials of a search share, with dotted keys, and what stands for the files of the choices of a group."""
        import hashlib

        from omegaconf import OmegaConf
        from optuna.distributions import CategoricalDistribution

        from etude.sweep import place
        from etude.tuning.space import describe, text

        config = OmegaConf.to_container(self.compose(fixed), resolve=True)
        assert isinstance(config, dict)
        plain = redact({k: v for k, v in config.items() if k not in place.NOT_COUNTED})
        space = {f"space of {k}": describe(d) for k, d in found.items()}
        choices = {k: map(text, d.choices) for k, d in found.items() if isinstance(d, CategoricalDistribution)}
        swept = [f"{k}=choice({','.join(c)})" for k, c in choices.items()]
        files = {
            name: hashlib.sha256(content.encode()).hexdigest()[:8]
            for name, content in place.choice_files(place.config_folders(self.config), swept).items()
        }
        return json.loads(json.dumps(flat(plain) | space | files | dict(zip(self.metrics, self.directions))))

    def compose(self, overrides: list[str]) -> Any:
        from omegaconf import flag_override

        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            del cfg["hydra"]
        return cfg


def longer(cfg: dict[str, Any]) -> str | None:
    """The limit of a run, four times as far."""
    return next(
        (f"{k}={4 * cfg[k]:g}" if isinstance(cfg[k], float) else f"{k}={4 * cfg[k]}" for k in LIMITS if cfg.get(k)),
        None,
    )

"""MLflow: one database for all runs of a runs_dir: `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`."""

import fcntl
import os
import time
from pathlib import Path

from etude.run import flat
from etude.trackers import group_of, remember, remembered, runs_dir_of, status_of


class MLflow:
    """Scalars, texts as artifacts, and the config as parameters; MLflow has no histograms. Nothing in it can be overwritten:
    a resumed run goes on under its id, and only values that are new or differ are added; of two, the later one counts."""

    def __init__(self, *, uri: str | None, experiment: str | None, name: str | None, tags: list[str], timeout: float):
        self.uri, self.experiment, self.name, self.tags, self.timeout = uri, experiment, name, tags, timeout

    @staticmethod
    def check() -> None:
        import importlib.util

        if importlib.util.find_spec("mlflow") is None or importlib.util.find_spec("sqlalchemy") is None:
            raise ValueError(
                "mlflow is not installed: pip install mlflow-skinny sqlalchemy alembic (or etude[trackers]), or leave it out of tracker="
            )

    def open(self, folder: Path, config: dict, start_step: int) -> int:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.folder, root = folder, runs_dir_of(folder)
        with (root / ".mlflow.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # two that make the database at once would crash
            self.client = MlflowClient(tracking_uri=self.uri or f"sqlite:///{root}/mlflow.db")
            title = self.experiment or group_of(folder) or "etude"
            found = self.client.get_experiment_by_name(title)
            place = None if self.uri else (root / "mlartifacts").as_uri()
            experiment = found.experiment_id if found else self.client.create_experiment(title, artifact_location=place)
        known = remembered(folder, "mlflow")
        try:
            run = self.client.get_run(known) if known else None
        except MlflowException:  # its database is gone
            run = None
        if run is None:
            tags = {"mlflow.runName": self.name or folder.name} | {tag: "" for tag in self.tags}
            run = self.client.create_run(experiment, tags=tags)
            remember(folder, "mlflow", run.info.run_id)
        self.run: str = run.info.run_id
        data = run.data
        params = [Param(k, str(v)[:6000]) for k, v in flat(config).items() if k not in data.params]
        for i in range(0, len(params), 100):  # the most that it takes at once
            self.client.log_batch(self.run, params=params[i : i + 100])
        self.held = {(k, m.step): m.value for k in data.metrics for m in self.client.get_metric_history(self.run, k)}
        return 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {k: float(v) for k, v in values.items() if repr(self.held.get((k, step))) != repr(float(v))}  # NaN too
        self.client.log_batch(self.run, metrics=[Metric(k, v, now, step) for k, v in new.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self.client.log_text(self.run, text, f"{name}/{step}.txt")

    def close(self) -> None:
        ends = {"completed": "FINISHED", "running": "RUNNING", "interrupted": "KILLED"}
        self.client.set_terminated(self.run, ends.get(status_of(self.folder), "FAILED"))

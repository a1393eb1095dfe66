"""Aim: one repository for all runs of a runs_dir, <runs_dir>/.aim: `aim up --repo runs`."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etude.track import Bins
from etude.trackers import group_of, remember, remembered, runs_dir_of, status_of


class Aim:
    """Scalars, histograms as distributions, texts and the config. A resumed run goes on under its hash: a step that comes
    again overwrites what was there."""

    def __init__(self, *, experiment: str | None, name: str | None, tags: list[str], timeout: float):
        self.experiment, self.name, self.tags, self.timeout = experiment, name, tags, timeout

    @staticmethod
    def check() -> None:
        import importlib.util

        if importlib.util.find_spec("aim") is None:
            raise ValueError("aim is not installed: pip install aim (or etude[trackers]), or leave it out of tracker=")

    def open(self, folder: Path, config: dict, start_step: int) -> int:
        import aim
        from aim.ext.exception_resistant import disable_safe_mode

        disable_safe_mode()  # or errors would only be logged
        self.folder, self.root = folder, runs_dir_of(folder)
        known = remembered(folder, "aim")
        with self._locked():
            there = (self.root / ".aim" / "VERSION").exists()
            repo = aim.Repo.from_path(str(self.root), init=not there)
            # Not repo.run_exists, which remembers its answer for half a second.
            resumes = known is not None and (self.root / ".aim" / "meta" / "chunks" / known).is_dir()
            if resumes and start_step == 0:
                if not repo.delete_run(known):
                    raise OSError(f"{self.root / '.aim'} did not let go of this run's earlier record, {known}")
                resumes = False
            self.run: Any = aim.Run(
                known if resumes else None,
                repo=repo,
                experiment=self.experiment or group_of(folder) or "etude",
                force_resume=True,  # of a trainer that was killed; that there is one alone is etude.run.locked's business
                log_system_params=False,
                capture_terminal_logs=False,
                system_tracking_interval=None,
            )
            remember(folder, "aim", self.run.hash)
            self.run.name = self.name or folder.name
            for tag in self.tags:
                if tag not in self.run.tags:
                    self.run.add_tag(tag)
            self.run["config"] = config
        return start_step if resumes else 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.run.track(float(value), name=name, step=step)

    def histograms(self, step: int, bins: Bins) -> None:
        import aim

        for name, b in bins.items():
            value = aim.Distribution(hist=b["counts"], bin_range=(b["low"], b["high"]))
            self.run.track(value, name=name, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import aim

        self.run.track(aim.Text(text), name=name, step=step)

    def close(self) -> None:
        from aim.sdk.index_manager import RepoIndexManager

        self.run["status"] = status_of(self.folder)
        repo, ident = self.run.repo, self.run.hash
        self.run.close()
        with self._locked():  # queries find only what is in the index, which is one for all runs
            RepoIndexManager.get_index_manager(repo).index(ident)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """What concerns the whole repository, one process at a time: two that make it at once would crash."""
        with (self.root / ".aim.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            yield

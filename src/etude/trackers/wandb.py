"""Weights & Biases: logs/wandb of a run, sent on with `wandb sync`, or their server at once."""

import html
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from etude.track import Bins
from etude.trackers import group_of, remember, remembered, status_of


class WandB:
    """`mode=offline` writes files alone; after a resume they are written anew from the run's own logs, so that each step is
    in them once. `mode=online` needs WANDB_API_KEY or `wandb login`; a resumed run goes on under its id, and steps that the
    server has already stay as they are there."""

    def __init__(
        self,
        *,
        mode: Literal["offline", "online"],
        project: str,
        entity: str | None,
        group: str | None,
        name: str | None,
        tags: list[str],
        init_timeout: float,
        timeout: float,
    ):
        self.mode, self.project, self.entity, self.group, self.name, self.tags = (
            mode,
            project,
            entity,
            group,
            name,
            tags,
        )
        self.init_timeout, self.timeout = init_timeout, timeout

    @staticmethod
    def check(init_timeout: float, timeout: float) -> None:
        import importlib.util

        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "wandb is not installed: pip install wandb (or etude[trackers]), or leave it out of tracker="
            )
        if not 0 < init_timeout < timeout:
            raise ValueError(
                f"tracker.wandb.init_timeout={init_timeout:g} should be above 0 and below tracker.wandb.timeout={timeout:g}"
            )

    def open(self, folder: Path, config: dict, start_step: int) -> int:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes out that was not asked for
        import wandb

        self.folder, online = folder, self.mode == "online"
        for old in (folder / "logs" / "wandb").glob("offline-run-*"):
            if not online:
                shutil.rmtree(old)
        settings = wandb.Settings(
            init_timeout=self.init_timeout,
            # What W&B would collect by itself may hold secrets: command line, git remote, environment, console.
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_disable_stats=True,
            silent=True,
            symlink=False,
        )
        ident = remembered(folder, "wandb") or remember(folder, "wandb", secrets.token_hex(4))
        self.run: Any = wandb.init(
            mode=self.mode,
            project=self.project,
            entity=self.entity,
            group=self.group or group_of(folder),
            name=self.name or folder.name,
            tags=self.tags or None,
            id=ident,
            resume="allow" if online else None,
            dir=str(folder / "logs"),
            config=config,
            settings=settings,
        )
        return self.run.step - 1 if online and self.run.resumed else 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def histograms(self, step: int, bins: Bins) -> None:
        import numpy as np
        import wandb

        edges = {n: np.linspace(b["low"], b["high"], len(b["counts"]) + 1) for n, b in bins.items()}
        made = {n: wandb.Histogram(np_histogram=(b["counts"], edges[n])) for n, b in bins.items()}
        self.run.log(made, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish(exit_code=0 if status_of(self.folder) == "completed" else 1)

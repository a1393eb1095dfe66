"""Trackers: where metrics go. logs/metrics.jsonl, with histograms.jsonl and samples.jsonl beside it, is the source of truth
and all that the training process writes. TensorBoard, W&B, Aim and MLflow (etude.trackers) each follow these files in a
process of their own: one that raises, blocks, draws random numbers or crashes cannot reach the run.

    python -m etude.track sync RUN... to=TRACKER [key=value ...]

hands what runs have logged to a tracker (tensorboard, wandb, aim, mlflow), each run anew, so that nothing is doubled;
key=value changes the settings in conf/tracker/TRACKER.yaml: mode=online. A RUN is a folder or a glob, or a folder of runs.
"""

import contextlib
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from etude import config as conf
from etude.cli import guard
from etude.errors import EtudeError, Refusal, StorageFault
from etude.redact import scrub
from etude.signature import did_you_mean

Bins = dict[str, dict[str, Any]]  # by tensor: counts (of each of equally wide bins), low and high (their outer edges)
TIMEOUT = 60.0  # seconds, for a tracker that has no setting of that name


class Tracker(Protocol):
    """What a class named in conf/tracker/*.yaml has. It is built and called in a process of its own, where each call may
    take its setting `timeout` in seconds. A method that it lacks is left out."""

    def open(self, folder: Path, config: dict, start_step: int) -> int | None:
        """Begin writing the run in `folder`, whose config has no secrets; what it has of later steps than `start_step` is
        void. -> the last step that it has; what was logged after it is handed over again. None: start_step."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def histograms(self, step: int, bins: Bins) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None:
        """The run has ended; its status.json says how."""


class Jsonl:
    """logs/metrics.jsonl: one object a line, {"step": n, name: value, ...}, floats written so that they read back to the
    same bits. After a resume each step is in it once."""

    def open(self, folder: Path, start_step: int) -> None:
        self.path = folder / "logs" / "metrics.jsonl"
        self.samples = folder / "logs" / "samples.jsonl"
        self.shapes = folder / "logs" / "histograms.jsonl"
        for path in (self.path, self.samples, self.shapes):
            _cut(path, start_step)
        self.file = self.path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._write(self.file, {"step": step, **values})

    def histograms(self, step: int, tensors: Iterable[tuple[str, Any]]) -> None:
        """logs/histograms.jsonl: edges and counts of 32 bins of each tensor."""
        import torch

        bins = {}
        for name, t in tensors:
            counts, edges = torch.histogram(t.detach().float().cpu().flatten(), bins=32)
            bins[name] = {"counts": counts.int().tolist(), "low": edges[0].item(), "high": edges[-1].item()}
        self._append(self.shapes, {"step": step, "histograms": bins})

    def text(self, step: int, name: str, text: str) -> None:
        """logs/samples.jsonl."""
        self._append(self.samples, {"step": step, "name": name, "text": text})

    def _append(self, path: Path, record: dict) -> None:
        with path.open("a", encoding="utf-8") as file:
            self._write(file, record)

    def _write(self, file: Any, record: dict) -> None:
        try:
            file.write(json.dumps(record) + "\n")
            file.flush()
        except OSError as error:
            raise StorageFault(f"could not write {file.name}: {error.strerror}") from None

    def close(self) -> None:
        self.file.close()


class Follower:
    """This side of a tracker's process: starts it, sees whether it lives, and ends it in bounded time."""

    def __init__(self, name: str, node: dict, folder: Path, start_step: int):
        self.name, self.folder, self.timeout = name, folder, float(node.get("timeout", TIMEOUT))
        self.log = folder / "logs" / f"{name}.log"
        path = os.pathsep.join(p for p in sys.path if p)
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "etude.trackers.follow"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C in the terminal is for the trainer
            )
        job = {"name": name, "node": node, "folder": str(folder.resolve()), "start_step": start_step}
        self._tell(json.dumps(job | {"timeout": self.timeout}))

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; `trouble` says why
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def trouble(self) -> str | None:
        """What made the process end, None while it lives."""
        code = self.process.poll()
        if not code:
            return None if code is None else "it ended by itself"
        text = scrub(self.log.read_text(encoding="utf-8", errors="replace"))
        self.log.write_text(text, encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        if any(line.startswith("Timeout (") for line in lines):
            return f"a call took longer than {self.timeout:g} seconds"
        return lines[-1] if lines else f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"code {code}"

    def end(self) -> None:
        self._tell("end")
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def join(self, until: float) -> str | None:
        """Wait for it until that time (monotonic seconds), then stop it. -> what went wrong."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"it was not done {self.timeout:g} seconds after the run's end"
        if code == 0:
            self.log.unlink(missing_ok=True)
            return None
        return self.trouble()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Trackers:
    """All trackers of a run as one, given as config nodes by name. The JSONL must work; any other that fails is dropped with
    one warning: a tracker never stops, slows or changes a run."""

    def __init__(self, jsonl: Jsonl, nodes: dict[str, dict]):
        self.jsonl, self.nodes = jsonl, nodes
        self.others: list[Follower] = []

    def open(self, folder: Path, start_step: int) -> None:
        """Begin, or go on with, the run in `folder`; lines of later steps than `start_step` are dropped."""
        self.folder = folder
        self.jsonl.open(folder, start_step)
        for name, node in self.nodes.items():
            try:
                self.others.append(Follower(name, node, folder, start_step))
            except OSError as error:
                self._warn(name, str(error))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.jsonl.scalars(step, values)
        self._look()

    def histograms(self, step: int, tensors: Iterable[tuple[str, Any]]) -> None:
        self.jsonl.histograms(step, tensors)
        self._look()

    def text(self, step: int, name: str, text: str) -> None:
        self.jsonl.text(step, name, text)
        self._look()

    def close(self) -> None:
        """Ends all of them at once, and waits no longer than the longest of their settings `timeout`."""
        self.jsonl.close()
        self._look()
        for other in self.others:
            other.end()
        begun = time.monotonic()
        while self.others:
            other = self.others[0]
            if trouble := other.join(begun + other.timeout):
                self._warn(other.name, trouble)
            self.others.pop(0)

    def _look(self) -> None:
        for other in list(self.others):
            if trouble := other.trouble():
                self.others.remove(other)
                other.end()
                self._warn(other.name, trouble)

    def _warn(self, name: str, why: str) -> None:
        where = self.folder / "logs" / f"{name}.log"
        print(
            f"warning: tracker {name} failed and is off for the rest of this run: {why} ({where}); nothing is lost, later:"
            f" python -m etude.track sync {self.folder} to={name}",
            file=sys.stderr,
        )


def _cut(path: Path, start_step: int) -> None:
    """Drop the lines of steps after `start_step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that no run wrote
            if line.endswith(b"\n") and json.loads(line)["step"] <= start_step:
                kept.append(line)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_bytes(b"".join(kept))
    os.replace(making, path)


# ---------------------------------------------------------------- python -m etude.track


def nodes() -> dict[str, dict]:
    """Every tracker that conf/tracker knows, with its settings."""
    from omegaconf import OmegaConf

    found: dict[str, dict] = {}
    for path in sorted((conf.CONF / "tracker").glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(node, dict)
        found |= {str(k): v for k, v in node.items() if isinstance(v, dict)}
    return found


def find(patterns: list[str]) -> list[Path]:
    """The runs at, or anywhere under, the paths and globs given. Raises Refusal for one without any."""
    found: list[Path] = []
    for pattern in patterns:
        paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        runs = [p for p in paths if _is_run(p)]
        runs += [m.parents[1] for p in paths if not _is_run(p) for m in sorted(p.glob("**/logs/metrics.jsonl"))]
        if not runs:
            raise Refusal(f"{pattern} {'holds no run' if paths else 'is not there'}: name a folder like runs/<run>")
        found += [r for r in runs if r not in found]
    return found


def _is_run(path: Path) -> bool:
    return (path / "logs" / "metrics.jsonl").is_file()


def sync(arguments: list[str]) -> int:
    """`sync`'s arguments -> exit code."""
    import yaml

    from etude.run import locked
    from etude.trackers.follow import alone, replay

    runs = [a for a in arguments if not re.match(r"\w+=", a)]
    settings = dict(a.split("=", 1) for a in arguments if re.match(r"\w+=", a))
    known, to = nodes(), settings.pop("to", "")
    if not runs or not to:
        raise Refusal("say what and where: python -m etude.track sync runs/<run> to=<tracker>")
    if to not in known:
        raise Refusal(f"to={to} is no tracker{did_you_mean(to, sorted(known))}; there are {', '.join(sorted(known))}")
    try:
        given = {key: yaml.safe_load(value) for key, value in settings.items()}
    except yaml.YAMLError:
        raise Refusal(f"{' '.join(f'{k}={v}' for k, v in settings.items())}: these values cannot be read") from None
    _checked(to, known[to] | given)
    for run in find(runs):
        path = run / "meta" / "full_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Refusal(f"{path} cannot be read: {run} is no whole run") from None
        had = (config.get("tracker") or {}).get(to) or {}
        node = _checked(
            to, known[to] | had | given | {"_target_": known[to]["_target_"]}
        )  # a run names no code to call
        with locked(run), alone(run, to):
            try:
                n = replay(conf.build(node), run, config)
            except EtudeError:
                raise
            except Exception as error:  # a tracker's own, of whatever kind
                raise EtudeError(f"{to} failed at {run}: {type(error).__name__}: {error}") from error
        print(f"{run}: {n} lines to {to}")
    return 0


def _checked(to: str, node: dict) -> dict:
    conf.check_targets({to: node}, ["etude"])
    conf.check_relations({to: node})
    return node


def main(arguments: list[str]) -> int:
    """-> exit code."""
    return guard(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if arguments[0] != "sync":
        raise Refusal(f"there is no {arguments[0]}{did_you_mean(arguments[0], ['sync'])}")
    return sync(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

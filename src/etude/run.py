"""A run's folder: claimed for one launch alone, with all that is needed to know later what was run, on what."""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from etude import git
from etude.errors import Refusal, StorageFault
from etude.redact import REDACTED, redact, redact_override, scrub

# Environment variables worth knowing of a run. An allow-list: anything else may be a secret.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES HF_HOME KMP_AFFINITY LD_PRELOAD LOCAL_RANK MASTER_ADDR MASTER_PORT MKL_NUM_THREADS NCCL_DEBUG "
    "OMP_NUM_THREADS PYTHONHASHSEED PYTORCH_CUDA_ALLOC_CONF RANK SLURM_JOB_ID TORCHINDUCTOR_CACHE_DIR WORLD_SIZE"
).split()


def claim(runs_dir: str, tag: str) -> Path:
    """A new folder runs_dir/YYYYMMDD_HHMMSS_<tag>[_<n>] that no other launch has, however close in time."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    return _claim(Path(runs_dir), stamp + (f"_{tag}" if tag else ""))


def claim_job(folder: Path) -> Path:
    """A new folder of that name, with _<n> after it if there is one."""
    return _claim(folder.parent, folder.name)


def take(folder: Path) -> Path:
    """A folder that somebody keeps for this run alone. Raises Refusal if it has a run with checkpoints."""
    if any((folder / "artifacts" / "checkpoints").glob("step_*")):
        raise Refusal(f"{folder} is a run already; go on with it: python train.py resume={folder}")
    _subfolders(folder)
    return folder


def _claim(parent: Path, name: str) -> Path:
    folder = new_folder(parent, name)
    _subfolders(folder)
    return folder


def new_folder(parent: Path, name: str) -> Path:
    """Make <parent>/<name>[_<n>], which nobody else has made, however many try at once. Raises StorageFault."""
    for i in range(1, 10000):
        folder = parent / (name if i == 1 else f"{name}_{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageFault(
                f"could not make {folder}: {error.strerror}; choose another place with runs_dir=FOLDER"
            ) from None
    raise StorageFault(f"{parent} has ten thousand folders like {name}")


def _subfolders(folder: Path) -> None:
    for sub in ("artifacts/checkpoints", "logs", "meta"):
        (folder / sub).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run alone. The lock is the kernel's: it goes with the process, so a stale one cannot stay behind."""
    # Unbuffered: what a full disk did not take is not written again as the file closes.
    with (folder / ".lock").open("ab+", buffering=0) as lock:
        try:
            # A POSIX lock: unlike flock, it does not live on in loader workers that outlive a killed trainer.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise Refusal(
                f"{folder} is being written by process {lock.read().decode().strip() or '?'}; wait for it or stop it"
            ) from None
        try:
            try:
                lock.truncate(0)
                lock.write(str(os.getpid()).encode())
            except OSError as error:
                raise StorageFault(f"could not write {folder}/.lock: {error.strerror}") from None
            yield
        except StorageFault:
            _forget(folder)
            raise


def _forget(folder: Path) -> None:
    """Remove a folder in which there is nothing but a lock: the disk was full from the start."""
    inside = list(folder.rglob("*"))
    if all(path.is_dir() or path.name == ".lock" for path in inside):
        (folder / ".lock").unlink()
        for path in sorted((p for p in inside if p.is_dir()), reverse=True):
            path.rmdir()
        folder.rmdir()


def write_metadata(
    folder: Path,
    config: dict,
    overrides: list[str],
    choices: dict[str, Any],
    data: dict,
    model: dict[str, int],
    machine: dict[str, Any],
) -> None:
    """meta/: the resolved config, overrides, choices of config groups, command, git state, environment, packages, size of
    the model, hashes of data and tokenizer. `machine` is what torch knows: device, accelerator, threads and the like."""
    meta = folder / "meta"
    clean = redact(config)
    overrides = [redact_override(o) for o in overrides]
    replace(meta / "config.yaml", yaml.safe_dump(clean, sort_keys=False, allow_unicode=True))
    replace(meta / "full_config.json", json.dumps(clean, indent=1))
    replace(meta / "overrides", "".join(o + "\n" for o in overrides))
    replace(meta / "choices.json", json.dumps(choices, indent=1))
    replace(meta / "command", shlex.join(["python", sys.argv[0], *map(redact_override, sys.argv[1:])]) + "\n")
    replace(meta / "data.json", json.dumps(redact(data), indent=1))
    replace(meta / "model.json", json.dumps(model, indent=1))
    said, patch = git.record()
    replace(meta / "git.txt", said)
    replace(meta / "diff.patch", patch)
    lines = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        **machine,
        "host": platform.node(),
        "folder": os.getcwd(),
    }
    lines |= {k: os.environ[k] for k in ENVIRONMENT if k in os.environ}
    replace(meta / "env.txt", scrub("".join(f"{k}={v}\n" for k, v in lines.items())))
    replace(meta / "packages.txt", "\n".join(packages()) + "\n")


@functools.cache
def packages() -> list[str]:
    """What is installed, as name==version. Each file is read once: every property of a distribution reads it anew."""
    found = [d.metadata for d in importlib.metadata.distributions()]
    return sorted({f"{m['Name']}=={m['Version']}" for m in found if m["Name"]}, key=str.lower)


def note_resume(folder: Path, config: dict, overrides: list[str], step: int) -> None:
    """Record a resume: its overrides and step in meta/resumes, and the config as it is now. One that was another is kept
    as meta/earlier/until_<step>.yaml."""
    meta = folder / "meta"
    noted = meta / "resumes"
    so_far = noted.read_text(encoding="utf-8") if noted.exists() else ""
    replace(noted, so_far + f"{_now()} step {step}: {' '.join(map(redact_override, overrides))}\n")
    config = redact(config | {"resume": None})
    before = meta / "config.yaml"
    # After a damaged checkpoint the run did not come to these.
    void = [path for until, path in earlier(folder) if until > step]
    text = (void or [before])[0].read_text(encoding="utf-8")
    if step and yaml.safe_load(text) != config:
        (meta / "earlier").mkdir(exist_ok=True)
        replace(meta / "earlier" / f"until_{step:08d}.yaml", text)
    for path in void:
        path.unlink()
    replace(before, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    replace(meta / "full_config.json", json.dumps(config, indent=1))


def earlier(folder: Path) -> list[tuple[int, Path]]:
    """(number of steps, config) for each config that a run had until so many steps were done, and not after."""
    found = (folder / "meta" / "earlier").glob("until_*.yaml")
    return sorted((int(path.stem.removeprefix("until_")), path) for path in found)


def _processor() -> str:
    try:
        return next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


class Status:
    """status.json and summary.txt of a run: running, completed, failed or interrupted, and how far it is."""

    def __init__(self, folder: Path):
        self.path = folder / "status.json"
        self.summary = folder / "summary.txt"
        self._written = 0.0
        # A resume goes on with what was known.
        kept = ("started", "step", "steps", "seconds", "metrics")
        before = {k: v for k, v in recorded(self.path).items() if k in kept}
        self.fields: dict[str, Any] = {"started": _now(), **before, "status": "running", "pid": os.getpid()}

    def beat(self, step: int, seconds: float, metrics: dict[str, Any], every: float = 5.0) -> None:
        """Heartbeat, seconds spent training and last metrics, written at most once in `every` seconds."""
        self.fields |= {"step": step, "seconds": seconds, "metrics": self.fields.get("metrics", {}) | metrics}
        if time.monotonic() - self._written > every:
            self.write()

    def end(self, status: str, step: int, error: str | None = None, exit_code: int = 0) -> None:
        self.fields |= {"status": status, "step": step, "exit_code": exit_code, "ended": _now()}
        if error:
            self.fields["error"] = scrub(error)
        self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        self.fields["heartbeat"] = _now()
        replace(self.path, json.dumps(self.fields, indent=1))

    def summarize(self, lines: list[str]) -> None:
        head = f"{self.path.parent.name}: {self.fields['status']}"
        replace(
            self.summary,
            scrub("\n".join([head, *lines, *([self.fields["error"]] if self.fields.get("error") else [])])) + "\n",
        )


def recorded(path: Path) -> dict[str, Any]:
    """An object that was written down; empty where it is not there or, after a power cut, not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def replace(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new text, never a part."""
    making = path.with_name(f".{path.name}.{os.getpid()}")
    whole = content.encode() if isinstance(content, str) else content
    try:
        making.write_bytes(whole)
        os.replace(making, path)
    except OSError as error:
        making.unlink(missing_ok=True)
        raise StorageFault(f"could not write {path}: {error.strerror} ({len(whole)} bytes)") from None


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# ---------------------------------------------------------------- going on with a run


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def stored_config(folder: Path, key: str) -> dict:
    """The config of the run that `key` (resume, reproduce) names. Raises Refusal."""
    try:
        stored = yaml.safe_load((folder / "meta" / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(p.parent.parent for p in folder.parent.glob("*/meta/config.yaml"))
        hint = f"; the newest there is {near[-1]}" if near else ""
        raise Refusal(f"{key}={folder} is not a run: there is no meta/config.yaml in it{hint}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refusal(f"{key}={folder}: meta/config.yaml cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(stored, dict):
        raise Refusal(f"{key}={folder}: meta/config.yaml holds no config; bring back a copy of it")
    return stored


def filled(stored: Any, config: Any, folder: Path, path: str = "") -> Any:
    """A stored config in which what was redacted is as in `config`, which the command line composes to. Raises Refusal."""
    if isinstance(stored, dict):
        below = config if isinstance(config, dict) else {}
        return {k: filled(v, below.get(k), folder, f"{path}.{k}" if path else str(k)) for k, v in stored.items()}
    if isinstance(stored, list) and isinstance(config, list) and len(stored) == len(config):
        return [filled(v, c, folder, path) for v, c in zip(stored, config)]
    if isinstance(stored, (str, list)) and REDACTED in str(stored):
        if config is None:
            raise Refusal(f"{path} is a secret that {folder} does not hold; type {path}=<value>")
        return config
    return stored


def resumed_config(
    folder: Path, config: dict, overrides: list[str], may_change: list[str], key: str = "resume"
) -> dict:
    """The stored config of a run with the typed overrides laid over it. `config` is what the command line composes to, `key`
    its entry that names the run. Raises Refusal with the differences, if one is not in `may_change`."""
    stored = filled(stored_config(folder, key), config, folder)
    # Keys that came into being after the run began have their defaults.
    new = {k: v for k, v in config.items() if k not in stored} | json.loads(json.dumps(stored))
    keys = [o.partition("=")[0].lstrip("+~").split("@")[0].replace("/", ".") for o in overrides]
    if "experiment" in keys:  # it may set anything: then the whole command line is held against the run
        new = dict(config)
        keys = []
    for name in keys:
        if name.split(".")[0] == key:
            continue
        source, target = config, new
        *parents, last = name.split(".")
        try:
            for part in parents:
                source, target = source[part], target[part]
            target[last] = source[last]
        except (KeyError, TypeError):
            raise Refusal(f"{name} is not part of the config of {folder}; leave it out, or start a new run") from None
    new[key] = config[key]
    old_flat, new_flat = flat(stored), flat({k: v for k, v in new.items() if k in stored})
    changed = {k for k in old_flat.keys() | new_flat.keys() if old_flat.get(k) != new_flat.get(k)}
    allowed = (key, *may_change)
    refused = sorted(k for k in changed if not any(k == a or k.startswith(a + ".") for a in allowed))
    if refused:
        difference = ", ".join(f"{k}: {old_flat.get(k)} -> {new_flat.get(k)}" for k in refused[:5])
        what = "Resuming" if key == "resume" else "Reproducing"
        raise Refusal(
            f"this would not be the same run ({difference}); leave that out, or start a new run. {what} may change: {' '.join(may_change)}"
        )
    return new

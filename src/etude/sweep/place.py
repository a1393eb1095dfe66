"""Where a sweep lies: the folder of the same command's earlier sweep, or a new one.

runs/sweeps/<stamp>_<tag>/sweep.json says what the sweep is, `.lock` who runs it, <job>_<hash of its overrides>/ is a run."""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from etude import run as runs
from etude.cli import TEXT_KEYS, guard, quote
from etude.errors import Refusal, StorageFault
from etude.redact import redact_override

# Root keys that change no run, and settings of sweepers that only say how far or how fast a sweep goes.
NOT_COUNTED = ("runs_dir", "cache_dir", "progress")
NOT_COUNTED_OF_SWEEPER = ("max_batch_size", "n_jobs", "n_trials", "max_failures")
RECORD = "sweep.json"


def key_of(override: str) -> str:
    """The key that an override is about: `+model.x=1` -> model.x, `reward@strategy.rewards.a=exact` -> reward."""
    return override.partition("=")[0].lstrip("+~").split("@")[0]


def as_typed(argv: list[str]) -> str:
    """A command as one types it: without the quotes that cli.quote adds, and without secrets."""
    plain = [re.sub(r"^([\w.]+)='([^'\\$]*)'$", r"\1=\2", a) if key_of(a) in TEXT_KEYS else a for a in argv]
    return shlex.join(["python", *map(redact_override, plain)])


def counted(overrides: Iterable[str]) -> list[str]:
    return sorted(o for o in overrides if key_of(o) not in NOT_COUNTED)


def overrides_hash(overrides: Iterable[str]) -> str:
    """8 digits that stand for a job's overrides, in whatever order."""
    return hashlib.sha256(json.dumps(counted(overrides)).encode()).hexdigest()[:8]


def identity(config: DictConfig) -> str:
    """A hash of all that makes a sweep's jobs what they are: what was typed, what the config files say, and the files of
    those choices that are swept over."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    hydra = plain.pop("hydra")
    typed = counted(hydra["overrides"]["task"])
    params = [sweep_of(k, v) for k, v in (hydra["sweeper"].get("params") or {}).items()]
    parts = (
        typed,
        {k: v for k, v in plain.items() if k not in NOT_COUNTED},
        {k: v for k, v in hydra["sweeper"].items() if k not in NOT_COUNTED_OF_SWEEPER},
        choice_files(config_folders(config), [*params, *typed]),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sweep_of(key: str, value: Any) -> str:
    """An entry of hydra.sweeper.params as an override, also where it is Optuna's {choices: [one, two]}."""
    choices = value.get("choices") if isinstance(value, dict) else None
    return f"{key}=choice({','.join(map(str, choices))})" if isinstance(choices, list) else f"{key}={value}"


def config_folders(config: DictConfig) -> list[Path]:
    """Where Hydra looks for config files, in its order."""
    return [Path(s.path) for s in config.hydra.runtime.config_sources if s.schema == "file"]


def choice_files(folders: list[Path], overrides: Iterable[str]) -> dict[str, str]:
    """The contents of the group files that overrides like `model/attn=gqa,mla` lead to, by their names in `folders`."""
    found: dict[str, str] = {}
    todo = list(_swept(folders, overrides))
    for path, base in todo:  # which grows
        pattern = re.sub(r"\$\{[^}]*}", "*", path) + ".yaml"  # an interpolation may become any of them
        # Where two folders have a file of this name the first one's counts.
        for name, file in {str(p.relative_to(f)): p for f in reversed(folders) for p in f.glob(pattern)}.items():
            found[name] = file.read_text(encoding="utf-8")
            todo += [d for d in _defaults(found[name], base) if d not in todo]
    return found


def _swept(folders: list[Path], overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file without its ending, the group that its own defaults list starts from) of each choice of a group."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    for text in overrides:
        with contextlib.suppress(HydraException):  # a sweeper's own grammar; its settings are counted anyhow
            override = OverridesParser.create().parse_override(text)
            group, value = override.key_or_group, override.value()
            if not override.is_discrete_sweep() or not any((f / group).is_dir() for f in folders):
                continue
            names = [p.stem for f in folders for p in (f / group).glob("*.yaml")]
            for one in value.filter(names) if isinstance(value, Glob) else override.sweep_iterator():
                yield from _members(group, one)


def _members(group: str, chosen: Any) -> Iterator[tuple[str, str]]:
    """What `group: chosen` leads to. As Hydra has it, the defaults of a/b start from the group, as one of a list from group/a."""
    for one in chosen if isinstance(chosen, list) else [chosen]:
        path = f"{group}/{getattr(one, 'text', one)}"  # the override parser has quoted text as an object
        yield path, os.path.dirname(path) if isinstance(chosen, list) else group


def _defaults(text: str, base: str) -> Iterator[tuple[str, str]]:
    """What the defaults list of a config file leads to, as _swept has it."""

    def whole(name: str) -> str:  # of `/name`, `name@package` or `override name`, as in the list
        name = name.split(" ")[-1].split("@")[0]
        return (name if name.startswith("/") else f"{base}/{name}").lstrip("/")

    with contextlib.suppress(yaml.YAMLError):
        content = yaml.safe_load(text)
        for entry in (content.get("defaults") or []) if isinstance(content, dict) else []:
            if isinstance(entry, dict):
                for key, chosen in entry.items():
                    yield from _members(whole(key), chosen)
            elif isinstance(entry, str) and entry != "_self_":
                yield whole(entry), os.path.dirname(whole(entry))


def claim(parent: Path, tag: str) -> Path:
    """A new folder <parent>/<stamp>_<tag>[_<n>], however many sweeps start in the same second."""
    stamp = time.strftime("%Y%m%d_%H%M%S") + (f"_{tag}" if re.fullmatch(r"[\w.-]+", tag) else "")
    return runs.new_folder(parent, stamp)


def earlier(parent: Path, wanted: str) -> Iterator[Path]:
    """The sweeps of this identity in `parent`, the newest first."""
    for path in sorted(parent.glob(f"*/{RECORD}"), reverse=True):
        if runs.recorded(path.parent / RECORD).get("identity") == wanted:
            yield path.parent


def note_jobs(sweep: Path, jobs: dict[str, list[str]]) -> None:
    """Add jobs to sweep.json: the name of each one's folder and its overrides, secrets left out."""
    record = runs.recorded(sweep / RECORD)
    added = {name: [redact_override(o) for o in overrides] for name, overrides in jobs.items()}
    runs.replace(sweep / RECORD, json.dumps(record | {"jobs": record.get("jobs", {}) | added}, indent=1))


class Place(Callback):
    """What conf/train.yaml has Hydra do as a multirun begins: hydra.sweep.dir becomes a folder that this sweep alone has.
    With a launcher that goes on with what was begun (it has a setting `fresh`), that of the same command's newest sweep
    which no live process holds."""

    def __init__(self) -> None:
        self.hold = contextlib.ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers that send their jobs elsewhere send this along; the lock stays here

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if code := guard(lambda: self._place(config)):
            raise SystemExit(code)  # Hydra would only warn of an Exception

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if str(config.hydra.mode) == "RunMode.MULTIRUN":
            forget_multirun(Path(config.hydra.sweep.dir))

    def _place(self, config: DictConfig) -> None:
        folder = self._folder(config)
        atexit.register(tidy, Path(folder).absolute())
        # As if it were typed: so every launcher hands it to every job, in whatever process.
        config.hydra.overrides.hydra.append(quote(f"hydra.sweep.dir={folder}"))
        config.hydra.sweep.dir = str(folder)

    def _folder(self, config: DictConfig) -> Path:
        typed = any(key_of(o) == "hydra.sweep.dir" for o in config.hydra.overrides.hydra)
        if typed and any((Path(config.hydra.sweep.dir) / name).is_dir() for name in ("meta", "logs")):
            raise Refusal(f"hydra.sweep.dir={config.hydra.sweep.dir} is a run; give a sweep's folder, or a new one")
        parent = Path(config.runs_dir) / "sweeps"
        if "fresh" not in config.hydra.launcher:
            return Path(config.hydra.sweep.dir) if typed else claim(parent, str(config.tag))
        wanted = identity(config)
        if typed:
            folder = Path(config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.hold.enter_context(runs.locked(folder))
            if runs.recorded(folder / RECORD).get("identity", wanted) != wanted:
                raise Refusal(
                    f"hydra.sweep.dir={folder} holds another sweep ({runs.recorded(folder / RECORD).get('command')}); leave it out, or give another folder"
                )
        else:
            folder = self._found(parent, wanted, config.hydra.launcher.fresh) or self._new(parent, str(config.tag))
        if not runs.recorded(folder / RECORD):
            record = {
                "identity": wanted,
                "command": as_typed(sys.argv),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            try:
                runs.replace(folder / RECORD, json.dumps(record, indent=1))
            except StorageFault:
                tidy(folder)
                raise
        return folder

    def _found(self, parent: Path, wanted: str, fresh: bool) -> Path | None:
        for folder in earlier(parent, wanted) if not fresh else ():
            try:
                self.hold.enter_context(runs.locked(folder))
                return folder
            except Refusal:
                print(f"note: {folder} is the same sweep and still runs; this one gets a folder of its own")
        return None

    def _new(self, parent: Path, tag: str) -> Path:
        folder = claim(parent, tag)
        self.hold.enter_context(runs.locked(folder))
        return folder


def tidy(sweep: Path) -> None:
    """At the end: without Hydra's file, and without the folder where no job was begun, as after a slip in the command."""
    forget_multirun(sweep)
    with contextlib.suppress(OSError):
        if {p.name for p in sweep.iterdir()} <= {RECORD, ".lock"}:
            for name in (RECORD, ".lock"):
                (sweep / name).unlink(missing_ok=True)
            sweep.rmdir()


def forget_multirun(sweep: Path) -> None:
    """Remove the multirun.yaml that Hydra's sweeper writes, secrets and all; sweep.json says what was run."""
    with contextlib.suppress(OSError):
        (sweep / "multirun.yaml").unlink()

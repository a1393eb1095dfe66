"""The scripts' way in: compose the config, check it, run, and turn what went wrong into one line and an exit code."""

import errno
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etude.config import CONF, check, groups
from etude.errors import EtudeError, Interrupted, JobFailed, Refusal, StorageFault
from etude.redact import scrub
from etude.signature import did_you_mean

# Values that are free text: quoted for Hydra's grammar on the way in, so that a prompt may hold any character.
TEXT_KEYS = (
    "prompt",
    "regex",
    "json_schema",
    "ckpt",
    "init_from",
    "gguf",
    "file",
    "out",
    "from",
    "to",
    "system",
    "resume",
    "reproduce.run",
    "against",
    "compare",
    "compare_pattern",
    "data.path",
    "tokenizer.path",
    "separator",
    "data.separator",
    "runs_dir",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "cache_dir",
    "host",
    "key_file",
    "served_name",
    "chat_template",
)


def main(script: str) -> Callable[[Callable[[dict], int | None]], Callable[[], None]]:
    """Decorates `f(cfg: dict) -> exit code`: composes conf/<script>.yaml with the command line, checks it, calls f.

    What the user can act on is printed as one line to stderr and becomes the exit code. In a multirun every job runs,
    gives its run's metrics to the sweeper, and the exit code is the first one that is not 0."""

    def decorate(task: Callable[[dict], int | None]) -> Callable[[], None]:
        def run() -> None:
            sys.exit(_run(script, task))

        return run

    return decorate


def _run(script: str, task: Callable[[dict], int | None]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the one line below is ours
    several = any(a in ("-m", "--multirun") for a in sys.argv)
    try:
        sys.argv[1:] = flags_first([a if several and lists(a) else quote(a) for a in sys.argv[1:]])
    except Refusal as error:
        return _told(error)
    codes: list[int] = []

    def job(cfg: Any) -> dict[str, Any]:
        code = guard(lambda: task(check(cfg, script)))
        codes.append(code)
        if code == Interrupted.code:
            raise KeyboardInterrupt  # the rest of a sweep was not asked for any more
        return _outcome(code)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=script)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        print(scrub(f"error: {hydra_line(error, script)}"), file=sys.stderr)
        return Refusal.code
    except EtudeError as error:  # a sweeper's or a launcher's; a job's own are printed where it runs
        return _told(error)
    except OSError as error:  # of what Hydra itself writes
        place = next((a.partition("=")[2].strip("'") for a in sys.argv if a.startswith("runs_dir=")), "runs")
        return _disk(error, f"the disk under {place}")
    except KeyboardInterrupt:
        return Interrupted.code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return next((c for c in codes if c), 0)


def _outcome(code: int) -> dict[str, Any]:
    """In a multirun, what the job gives its sweeper: the run's last metrics by name. Raises JobFailed for another code
    than 0, which launchers carry home from other processes."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return {}
    if code:
        raise JobFailed(f"job {hydra.job.num} ended with exit code {code}", code)
    written = Path(hydra.sweep.dir).glob(f"{hydra.job.num}_*/status.json")
    newest = max(written, key=lambda p: p.stat().st_mtime, default=None)
    return json.loads(newest.read_text()).get("metrics", {}) if newest else {}


def _told(error: EtudeError) -> int:
    """Print an error as one line; -> its exit code."""
    print(scrub(f"{'stopped' if error.code == Interrupted.code else 'error'}: {error}"), file=sys.stderr)
    return error.code


def _disk(error: OSError, place: str) -> int:
    """Print a disk's error as one line, that of `place` where it names no file (write() does not), any other with its
    traceback; -> the exit code."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES):
        print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
        return 1
    print(scrub(f"error: {error.filename or place}: {error.strerror}"), file=sys.stderr)
    return StorageFault.code


def guard(action: Callable[[], int | None], quiet: bool = False) -> int:
    """Run `action`; -> its exit code, or that of the error it raised, which is printed: one line for what the user can
    act on, the traceback for a bug. `quiet` leaves out the lines, not the tracebacks."""
    try:
        code = action() or 0
        sys.stdout.flush()
        return code
    except EtudeError as error:
        return error.code if quiet else _told(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Interrupted.code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _disk(error, "a file")
    except Exception:
        print(scrub(traceback.format_exc()), file=sys.stderr)
        return 1


def flags_first(arguments: list[str]) -> list[str]:
    """Flags (and the values that follow them) before overrides: the parser takes overrides only in one piece."""
    return sorted(arguments, key=lambda a: "=" in a and not a.startswith("-") or a.startswith("~"))


QUOTED = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\")"""


def lists(argument: str) -> bool:
    """Whether a sweep's `key=value` is a choice that is not to be quoted as one text: 'a','b' or choice(a,b). Raises Refusal
    for paths with bare commas between them."""
    key, _, value = argument.partition("=")
    if re.fullmatch(rf"{QUOTED}(\s*,\s*{QUOTED})+|choice\(.*\)", value, re.DOTALL):
        return True
    parts = re.fullmatch(r"\S+,\S+", value) and quote(argument) != argument and value.split(",")
    if parts and any(map(os.path.exists, parts)) and not os.path.exists(value):
        quoted = ",".join(f"'{part}'" for part in parts)
        raise Refusal(f'{key}={value} does not exist; to sweep over several, type {key}="{quoted}"')
    return False


def quote(argument: str) -> str:
    """`key=value` with a free-text key, quoted as Hydra's grammar wants it; anything else as it is."""
    key, eq, value = argument.partition("=")
    if key == "reproduce":  # runs/<run>, beside which there are reproduce.<key>
        key, argument = "reproduce.run", f"reproduce.run={value}"
    if key == "lora" and value in ("true", "false"):  # choices of a group, which are no booleans for Hydra
        return "lora='true'" if value == "true" else "~lora"
    named = key.lstrip("+") in TEXT_KEYS or re.fullmatch(r"data\.sources\.[\w.]+\.path", key)
    if not eq or not named or value in ("null", "???"):
        return argument
    if re.fullmatch(QUOTED, value, re.DOTALL):
        return argument  # quoted already
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    value = re.sub(r"(\\+)\Z", r"\1\1", value)
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # and before what would be an interpolation
    return f"{key}='{value}'"


def folders() -> list[Path]:
    """Where config files lie: conf/, and the folder of --config-dir."""
    for flag, following in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        if flag.startswith(("--config-dir", "-cd")):
            return [CONF, Path(flag.partition("=")[2] or following).resolve()]
    return [CONF]


def hydra_line(error: Exception, script: str) -> str:
    """One line for an error of Hydra's, with the nearest right spelling."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)  # type: ignore[arg-type]
    text = "\n".join(str(c) for c in causes)
    if m := re.search(r"Could not override '(?P<key>[\w./@]+)'", text) or re.search(r"full_key: (?P<key>[\w.]+)", text):
        return _unknown_key(m["key"].split("@")[0], script)
    if m := re.search(r"(?:Could not find|In '[^']*': Could not find) '(?P<group>[\w./-]+)/(?P<choice>[^/']+)'", text):
        options = sorted(p.stem for folder in folders() for p in (folder / m["group"]).glob("*.yaml"))
        return f"{m['group']} has no choice '{m['choice']}'{did_you_mean(m['choice'], options)}"
    return " ".join(str(error).split())


def _unknown_key(key: str, script: str) -> str:
    """What to say of a key that conf/<script>.yaml and the chosen groups do not have."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    chosen = [a for a in sys.argv[1:] if "=" in a and "," not in a and (CONF / a.split("=")[0].lstrip("+")).is_dir()]
    paths = ",".join(f"file://{folder}" for folder in folders()[1:])
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            searched = [f"hydra.searchpath=[{paths}]"] if paths else []
            cfg = compose(script, overrides=chosen + searched, return_hydra_config=key.startswith("hydra."))
    except HydraException:  # a choice is wrong as well
        return f"unknown key {key}; --help lists what there is"
    path: list[str] = []
    node: Any = cfg
    parts = key.split(".")
    while len(parts) > 1 and isinstance(OmegaConf.select(cfg, ".".join(path + parts[:1])), DictConfig):
        path.append(parts.pop(0))
        node = OmegaConf.select(cfg, ".".join(path))
    prefix = ".".join(path) + "." if path else ""
    options = [str(k) for k in node] + ([] if path else groups())
    line = f"unknown key {key}{did_you_mean(parts[0], [o for o in options if not o.startswith('_')], prefix)}"
    if path:
        choices = [p for folder in folders() for p in sorted((folder / "/".join(path)).glob("*.yaml"))]
        others = [p.stem for p in choices if re.search(rf"^{re.escape(parts[0])}:", p.read_text(), re.M)]
        if others:
            line += f" ({parts[0]} belongs to {'/'.join(path)}={', '.join(others)})"
    return line

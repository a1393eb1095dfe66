"""Config: compose with Hydra, then check everything that can be checked before torch is imported.

A node with `_target_` is one constructor call. Its source is read (ast, not import) to find unknown and missing
arguments and scalars of the wrong type. A constructor's keyword-only parameters are the config's; what code supplies
comes before the `*` and belongs to a `_partial_: true` node.

    python -m etude.config      checks every choice of every group, and every experiment
"""

import __future__

import ast
import dataclasses
import difflib
import importlib.machinery
import os
import re
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etude.errors import EtudeError, Interrupted, Refusal

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """The root keys of train.py that are not groups. conf/train.yaml gives their values and says what each does."""

    tag: str
    seed: int
    deterministic: bool
    max_steps: int | None
    max_epochs: float | None
    max_tokens: int | None
    max_minutes: float | None
    batch_size: int
    micro_batch_size: int | None
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    threads: int | None
    clip: float | None
    on_nonfinite: Literal["stop", "skip"]
    log_every: int
    eval_every: int | None
    eval_iters: int | None
    eval_batch_size: int | None
    histogram_every: int | None
    sample_every: int | None
    sample_prompts: list[str]
    sample_tokens: int
    early_stopping: int | None
    save_every: int | None
    keep: int
    resume: str | None
    runs_dir: str
    cache_dir: str
    progress: Literal["auto", "bar", "lines", "none"]
    trusted: list[str]


# What a resumed run may change, when its new value is typed out; everything else is part of the run's identity.
MAY_CHANGE = (
    "max_steps max_epochs max_tokens max_minutes micro_batch_size threads log_every eval_every eval_iters eval_batch_size "
    "histogram_every sample_every sample_prompts sample_tokens early_stopping save_every keep runs_dir cache_dir progress "
    "trusted on_nonfinite parallel tracker data.workers data.prefetch"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """The root keys of generate.py; conf/generate.yaml says what each does."""

    ckpt: str
    prompt: str | None
    file: str | None
    out: str | None
    n: int
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: list[str]
    seed: int
    stream: bool
    cache: bool
    batch_size: int
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["fp32", "bf16"]
    threads: int | None
    trusted: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Train):
    """bench.py takes all of train.py's keys and these; conf/bench.yaml says what each does."""

    what: Literal["train", "decode", "all"]
    steps: int
    warmup_steps: int
    rounds: int
    decode_tokens: int
    decode_batch: int
    compare: str | None
    compare_pattern: str | None
    compare_tokens: int | None


SCRIPTS: dict[str, type] = {"train": Train, "generate": Generate, "bench": Bench}

# Values that are free text: quoted for Hydra's grammar on the way in, so that a prompt may hold any character.
TEXT_KEYS = (
    "prompt",
    "ckpt",
    "file",
    "out",
    "resume",
    "compare",
    "compare_pattern",
    "data.path",
    "tokenizer.path",
    "runs_dir",
    "cache_dir",
)


# ---------------------------------------------------------------- reading signatures without importing


class Param(NamedTuple):
    name: str
    annotation: ast.expr | None
    required: bool
    keyword_only: bool


class Signature(NamedTuple):
    params: dict[str, Param]
    open: bool  # takes **kwargs


def signature(target: str) -> Signature:
    """The constructor arguments of dotted name `target`, read from its source. Raises Refusal if it is not there."""
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    if found is None:
        names = _names(module)
        raise Refusal(f"there is no {target}{_did_you_mean(name, names, prefix=module + '.')}")
    tree, node = found
    if isinstance(node, ast.FunctionDef):
        return _arguments(node, skip=0)
    return _constructor(tree, node, module)


def _source(module: str) -> Path | None:
    """The file of a dotted module, found on sys.path without importing its parents."""
    path: list[str] | None = None
    spec = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _tree(module: str) -> ast.Module | None:
    source = _source(module)
    return ast.parse(source.read_text(encoding="utf-8")) if source else None


def _find(module: str, name: str, depth: int = 0) -> tuple[ast.Module, ast.ClassDef | ast.FunctionDef] | None:
    tree = _tree(module) if depth < 4 else None
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return tree, node
    for node in tree.body:  # imported from elsewhere, as torch.optim.AdamW is
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            base = (
                module
                if not node.level
                else module.rsplit(".", node.level - (_is_package(module)))[0]
                if node.level > _is_package(module)
                else module
            )
            origin = f"{base}.{node.module}" if node.level else node.module
            real = next(a.name for a in node.names if (a.asname or a.name) == name)
            return _find(origin, real, depth + 1)
    return None


def _is_package(module: str) -> int:
    source = _source(module)
    return int(source is not None and source.name == "__init__.py")


def _names(module: str) -> list[str]:
    tree = _tree(module)
    return [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))] if tree else []


def _arguments(node: ast.FunctionDef, skip: int) -> Signature:
    a = node.args
    positional = (a.posonlyargs + a.args)[skip:]
    n_plain = len(positional) - min(len(a.defaults), len(positional))
    params = [Param(p.arg, p.annotation, i < n_plain, False) for i, p in enumerate(positional)]
    params += [Param(p.arg, p.annotation, d is None, True) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return Signature({p.name: p for p in params}, a.kwarg is not None)


def _constructor(tree: ast.Module, node: ast.ClassDef, module: str) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item, skip=1)
    params: dict[str, Param] = {}
    takes_any = False
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (found := _find(module, base.id)) and isinstance(found[1], ast.ClassDef):
            inherited = _constructor(found[0], found[1], module)
            params |= inherited.params
            takes_any |= inherited.open
    decorator = next((d for d in node.decorator_list if "dataclass" in ast.unparse(d)), None)
    if decorator is not None:
        kw_only = "kw_only=True" in ast.unparse(decorator)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                params[item.target.id] = Param(item.target.id, item.annotation, item.value is None, kw_only)
    return Signature(params, takes_any)


# ---------------------------------------------------------------- checking values


def fits(value: Any, annotation: str) -> bool:
    """Whether a plain value fits an annotation written in Python. Annotations of anything but scalars, lists, dicts and
    Literal of scalars fit everything: what a part expects of a child is the part's own business."""
    tree = ast.parse(annotation, mode="eval").body
    return _fits(value, tree)


def _fits(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _fits(value, node.left) or _fits(value, node.right)
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else value == node.value
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2]
        inner = node.slice
        if name == "Literal":
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return any(isinstance(o, ast.Constant) and value == o.value for o in options)
        if name in ("list", "tuple"):
            first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            return isinstance(value, list) and all(_fits(v, first) for v in value)
        return not isinstance(value, (str, int, float, list)) if name in ("dict", "Callable") else True
    match ast.unparse(node).rpartition(".")[2]:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "list" | "tuple":
            return isinstance(value, list)
        case "dict":
            return isinstance(value, dict)
        case _:
            return True


def _wanted(annotation: str) -> str:
    """An annotation in words."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "dict": "a mapping",
    }
    said = []
    for part in re.split(r"\s*\|\s*", annotation):
        if m := re.fullmatch(r"(?:\w+\.)?Literal\[(.*)\]", part):
            said.append("one of " + re.sub("['\"]", "", m[1]))
        elif m := re.fullmatch(r"(?:list|tuple)\[(\w+).*\]", part):
            said.append(f"a list of {words.get(m[1], m[1]).removeprefix('a ')}s")
        elif part.startswith("Callable"):
            said.append("a part with a _target_")
        else:
            said.append(words.get(part, part))
    return " or ".join(said)


def _did_you_mean(word: str, options: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    if len(options) > 20:
        return "; --help lists what there is"
    return f"; there is: {', '.join(sorted(options))}" if options else ""


def nodes(cfg: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every dict with a `_target_`, with its dotted path, parents first."""
    if isinstance(cfg, dict):
        if "_target_" in cfg:
            yield path, cfg
        for key, value in cfg.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(cfg, list):
        for i, value in enumerate(cfg):
            yield from nodes(value, f"{path}[{i}]")


def check_targets(cfg: dict, trusted: list[str]) -> None:
    """Every `_target_` lies under a trusted prefix and takes exactly the arguments given. Raises Refusal."""
    for path, node in nodes(cfg):
        target = node["_target_"]
        if not isinstance(target, str) or not any(target == t or target.startswith(t + ".") for t in trusted):
            raise Refusal(
                f"{path}._target_={target} is outside trusted={_show(trusted)}; add its package: trusted={_show([*trusted, str(target).split('.')[0]])}"
            )
        try:
            sig = signature(target)
        except Refusal as error:
            raise Refusal(f"{path}._target_: {error}") from None
        given = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
        for key, value in given.items():
            if key not in sig.params:
                if sig.open:
                    continue
                raise Refusal(f"unknown key {path}.{key}{_did_you_mean(key, list(sig.params), path + '.')}")
            annotation = sig.params[key].annotation
            if annotation is not None and not _fits(value, annotation):
                raise Refusal(f"{path}.{key}={_show(value)} should be {_wanted(ast.unparse(annotation))}")
        partial = node.get("_partial_", False)
        for p in sig.params.values():
            if p.required and p.name not in given and (p.keyword_only or not partial):
                raise Refusal(f"missing {path}.{p.name}: {target} needs it; type {path}.{p.name}=<value>")


def check_relations(cfg: dict, parent: dict | None = None) -> None:
    """Run each target class's `check`, a static method of plain Python that raises ValueError for settings that do not fit
    together. It is compiled from its source alone, without importing the module, and takes by name what it wants of
    the node's and its parent's settings. Raises Refusal with its message."""
    target = cfg.get("_target_")
    if target and (function := _check_method(target)) is not None:
        known = (parent or {}) | cfg
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if all(n in known for n in names):
            try:
                function(**{n: known[n] for n in names})
            except ValueError as error:
                raise Refusal(str(error)) from None
    for key, value in cfg.items():
        if isinstance(value, dict):
            check_relations(value, cfg)


def _check_method(target: str) -> Callable[..., None] | None:
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return None
    for item in found[1].body:
        if (
            isinstance(item, ast.FunctionDef)
            and item.name == "check"
            and [ast.unparse(d) for d in item.decorator_list] == ["staticmethod"]
        ):
            item.decorator_list = []
            space: dict[str, Any] = {}
            exec(compile(ast.Module([item], []), module, "exec", flags=__future__.annotations.compiler_flag), space)
            return space["check"]
    return None


def check(cfg: Any, script: str) -> dict:
    """All checks on a composed config; -> it resolved, as plain dicts and lists. Raises Refusal with one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        hint = {"ckpt": "runs/<run>, a checkpoint folder or an export", "data.path": "a file, a folder or a glob"}
        raise Refusal("; ".join(f"{key} is missing: type {key}=<{hint.get(key, 'value')}>" for key in missing))
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise Refusal(f"config: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    fields = {f.name: f for f in dataclasses.fields(SCRIPTS[script])}
    groups = _groups()
    for key, value in plain.items():
        if key in fields:
            annotation = _annotation(fields[key].type)
            if not fits(value, annotation):
                raise Refusal(f"{key}={_show(value)} should be {_wanted(annotation)}")
        elif key not in groups or script == "generate":
            raise Refusal(f"unknown key {key}{_did_you_mean(key, [*fields, *groups])}")
    for name in fields.keys() - plain.keys():
        raise Refusal(f"missing {name}: conf/{script}.yaml does not set it")
    check_targets({k: v for k, v in plain.items() if k not in fields}, plain["trusted"])
    check_relations({k: v for k, v in plain.items() if isinstance(v, dict)})
    if script != "generate":
        _check_train(plain)
    return plain


def _check_train(cfg: dict) -> None:
    if all(cfg[k] is None for k in ("max_steps", "max_epochs", "max_tokens", "max_minutes")):
        raise Refusal("nothing says when to stop: set one of max_steps, max_epochs, max_tokens, max_minutes")
    for key in (
        "batch_size",
        "micro_batch_size",
        "log_every",
        "eval_every",
        "eval_iters",
        "eval_batch_size",
        "save_every",
        "histogram_every",
        "sample_every",
        "sample_tokens",
        "early_stopping",
        "threads",
        "max_steps",
        "max_epochs",
        "max_tokens",
        "max_minutes",
        "clip",
    ):
        if cfg[key] is not None and cfg[key] <= 0:
            raise Refusal(
                f"{key}={cfg[key]} should be above 0"
                + (" (null: never)" if key.endswith("_every") and key != "log_every" else "")
            )
    if cfg["keep"] < 2:
        raise Refusal(
            f"keep={cfg['keep']} is too few: with under 2 checkpoints a damaged one leaves nothing to fall back to"
        )
    if not re.fullmatch(r"[\w.-]*", cfg["tag"]):
        raise Refusal(f"tag={cfg['tag']} becomes part of a folder's name: use letters, digits, '.', '_' and '-'")
    micro = cfg["micro_batch_size"]
    if micro is not None and cfg["batch_size"] % micro:
        raise Refusal(
            f"batch_size={cfg['batch_size']} is not a multiple of micro_batch_size={micro}; set micro_batch_size to a divisor of it"
        )


def _annotation(field_type: Any) -> str:
    """A resolved dataclass annotation as source text."""
    if typing.get_origin(field_type) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(field_type)))}]"
    if isinstance(field_type, types.UnionType):
        return " | ".join("None" if a is type(None) else _annotation(a) for a in typing.get_args(field_type))
    return str(field_type) if typing.get_origin(field_type) else field_type.__name__


def _groups() -> list[str]:
    return [p.name for p in CONF.iterdir() if p.is_dir()]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_show, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, (type(None), bool))
        else str(value)
    )


def build(node: dict, *args: Any) -> Any:
    """Construct a checked node; a `_partial_` one is called with `args`, which code supplies, or returned as a function
    where there are none. A constructor's ValueError becomes a Refusal: it names the key to change."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        made = instantiate(node, _convert_="all")
        return made(*args) if args else made
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, EtudeError):
            raise cause from None
        raise Refusal(str(cause or error).splitlines()[0]) from cause
    except ValueError as error:
        raise Refusal(str(error)) from error


# ---------------------------------------------------------------- the scripts' entry


def main(script: str) -> Callable[[Callable[[dict], int | None]], Callable[[], None]]:
    """Decorates `f(cfg: dict) -> exit code`: composes conf/<script>.yaml with the command line, checks it, calls f.

    What the user can act on is printed as one line to stderr and becomes the exit code. In a multirun every job runs,
    and the exit code is the first one that is not 0."""

    def decorate(task: Callable[[dict], int | None]) -> Callable[[], None]:
        def run() -> None:
            sys.exit(_run(script, task))

        return run

    return decorate


def _run(script: str, task: Callable[[dict], int | None]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the one line below is ours
    OmegaConf.register_new_resolver("sweep_dir", _claim_sweep, use_cache=True, replace=True)
    sys.argv[1:] = [quote(a) for a in sys.argv[1:]]
    codes: list[int] = []

    def job(cfg: Any) -> None:
        code = guard(lambda: task(check(cfg, script)))
        codes.append(code)
        if code == Interrupted.code:
            raise KeyboardInterrupt  # the rest of a sweep was not asked for any more

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=script)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        print(_hydra_line(error, script), file=sys.stderr)
        return Refusal.code
    except KeyboardInterrupt:
        return Interrupted.code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return next((c for c in codes if c), 0)


def guard(action: Callable[[], int | None]) -> int:
    """Run `action`; -> its exit code, or that of the error it raised, which is printed: one line for what the user can
    act on, the traceback for a bug."""
    try:
        return action() or 0
    except EtudeError as error:
        print(f"{type(error).__name__.lower() if error.code != 2 else 'error'}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Interrupted.code
    except Exception:
        traceback.print_exc()
        return 1


def quote(argument: str) -> str:
    """`key=value` with a free-text key, quoted as Hydra's grammar wants it; anything else as it is."""
    key, eq, value = argument.partition("=")
    if not eq or key.lstrip("+") not in TEXT_KEYS or value in ("null", "???"):
        return argument
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return argument
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    value = re.sub(r"(\\+)$", r"\1\1", value)
    value = value.replace("${", r"\${")
    return f"{key}='{value}'"


def _claim_sweep(name: str) -> str:
    """A fresh folder runs/sweeps/<stamp>_<name>, however many sweeps start in the same second."""
    base = f"runs/sweeps/{time.strftime('%Y%m%d_%H%M%S')}" + (f"_{name}" if name else "")
    for i in range(1, 10000):
        folder = base if i == 1 else f"{base}_{i}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
    raise Refusal(f"could not claim a folder like {base}")


def _hydra_line(error: Exception, script: str) -> str:
    """One line for an error of Hydra's, with the nearest right spelling."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)  # type: ignore[arg-type]
    text = "\n".join(str(c) for c in causes)
    if m := re.search(r"Could not override '(?P<key>[\w./@]+)'", text) or re.search(r"full_key: (?P<key>[\w.]+)", text):
        return "error: " + _unknown_key(m["key"].split("@")[0], script)
    if m := re.search(r"(?:Could not find|In '[^']*': Could not find) '(?P<group>[\w./-]+)/(?P<choice>[^/']+)'", text):
        options = sorted(p.stem for p in (CONF / m["group"]).glob("*.yaml"))
        return f"error: {m['group']} has no choice '{m['choice']}'{_did_you_mean(m['choice'], options)}"
    return "error: " + " ".join(str(error).split())


def _unknown_key(key: str, script: str) -> str:
    """What to say of a key that conf/<script>.yaml and the chosen groups do not have."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    chosen = [a for a in sys.argv[1:] if "=" in a and "," not in a and (CONF / a.split("=")[0].lstrip("+")).is_dir()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(script, overrides=chosen)
    path, node = [], cfg
    parts = key.split(".")
    while len(parts) > 1 and isinstance(OmegaConf.select(cfg, ".".join(path + parts[:1])), DictConfig):
        path.append(parts.pop(0))
        node = OmegaConf.select(cfg, ".".join(path))
    prefix = ".".join(path) + "." if path else ""
    options = [str(k) for k in node] + ([] if path else _groups())
    line = f"unknown key {key}{_did_you_mean(parts[0], [o for o in options if not o.startswith('_')], prefix)}"
    if path:
        group = CONF / "/".join(path)
        others = (
            sorted(p.stem for p in group.glob("*.yaml") if re.search(rf"^{re.escape(parts[0])}:", p.read_text(), re.M))
            if group.is_dir()
            else []
        )
        if others:
            line += f" ({parts[0]} belongs to {' and '.join('/'.join(path) + '=' + o for o in others)})"
    return line


def check_all() -> list[str]:
    """Compose and check every root file with every choice of every group; -> one line for each that fails."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    failures = []
    choices = sorted((str(p.parent.relative_to(CONF)), p.stem) for p in CONF.rglob("*.yaml") if p.parent != CONF)
    jobs: list[tuple[str, list[str]]] = [(script, []) for script in SCRIPTS] + [
        ("train", [f"{group}={choice}"]) for group, choice in choices
    ]
    needs = {"text": ["data.path=x"], "file": ["tokenizer.path=x"]}  # what a choice cannot have a default for
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for script, overrides in jobs:
            extra = (
                ["ckpt=x"] if script == "generate" else needs.get(overrides[0].split("=")[1], []) if overrides else []
            )
            try:
                check(compose(script, overrides=overrides + extra), script)
            except (HydraException, Refusal) as error:
                failures.append(f"{script} {' '.join(overrides)}: {str(error).splitlines()[0]}")
    print(f"{len(jobs)} compositions checked, {len(failures)} wrong")
    return failures


if __name__ == "__main__":
    wrong = check_all()
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    sys.exit(Refusal.code if wrong else 0)

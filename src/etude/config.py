"""Config: compose with Hydra, then check everything that can be checked before torch is imported.

A node with `_target_` is one constructor call. Its source is read (ast, not import) to find unknown and missing
arguments and scalars of the wrong type. A constructor's keyword-only parameters are the config's; what code supplies
comes before the `*` and belongs to a `_partial_: true` node.

    python -m etude.config      checks every choice of every group, and every experiment
"""

import ast
import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from etude.errors import EtudeError, Refusal
from etude.redact import has_secret, remember
from etude.signature import check_method, did_you_mean, fits, signature, wanted

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
    max_flops: float | None
    max_minutes: float | None
    batch_size: int
    micro_batch_size: int | None
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    threads: int | None
    clip: float | None
    on_nonfinite: Literal["stop", "skip"]
    spike_above: float | None
    spike_window: int
    log_every: int
    eval_every: int | None
    eval_iters: int | None
    eval_batch_size: int | None
    histogram_every: int | None
    sample_every: int | None
    sample_prompts: list[str] | None
    sample_tokens: int
    early_stopping: int | None
    stop_at: float | None
    save_every: int | None
    keep: int
    dry_run: bool
    init_from: str | None
    reference: Literal["auto", "copy", "cached"]
    resume: str | None
    reproduce: dict[str, Any]
    runs_dir: str
    cache_dir: str
    progress: Literal["auto", "bar", "lines", "none"]
    trusted: list[str]


# What a resumed run may change, when its new value is typed out; everything else is part of the run's identity.
MAY_CHANGE = (
    "max_steps max_epochs max_tokens max_flops max_minutes micro_batch_size threads log_every eval_every eval_iters eval_batch_size "
    "histogram_every sample_every sample_prompts sample_tokens early_stopping stop_at save_every keep runs_dir cache_dir progress "
    "trusted on_nonfinite spike_above spike_window parallel tracker data.workers data.prefetch"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """The root keys of generate.py; conf/generate.yaml says what each does."""

    ckpt: str
    prompt: str | None
    chat: bool
    system: str | None
    file: str | None
    out: str | None
    n: int
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    json_schema: str | None
    regex: str | None
    stop: list[str]
    seed: int
    logprobs: int | None
    stream: bool
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["fp32", "bf16"]
    threads: int | None
    trusted: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """The root keys of serve.py beside the engine; conf/serve.yaml says what each does."""

    ckpt: str
    host: str
    port: int
    keys: list[str]
    key_file: str | None
    served_name: str | None
    chat_template: str | None
    max_body_mb: float
    max_n: int
    body_timeout: float
    request_timeout: float | None
    drain_seconds: float
    access_log: bool
    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["fp32", "bf16"]
    threads: int | None
    trusted: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Train):
    """bench.py takes all of train.py's keys and these; conf/bench.yaml says what each does."""

    what: Literal["train", "decode", "all", "data", "prepare", "engine", "trl"]
    steps: int
    warmup_steps: int
    rounds: int
    decode_tokens: int
    decode_batch: int
    against: str | None
    compare: str | None
    compare_pattern: str | None
    compare_tokens: int | None
    ckpt: str | None
    dtype: Literal["fp32", "bf16"]
    peer: Literal["transformers", "none"]
    gguf: str | None
    decode_batches: list[int]
    prompt_tokens: int
    prefix_tokens: int
    requests: int
    prompt_lengths: list[int]
    new_lengths: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """The root keys of convert.py; conf/convert.yaml says what each does."""

    from_: str  # the key is `from`, which Python keeps for itself
    to: str
    dtype: Literal["keep", "fp32", "bf16", "fp16"]
    shard_gb: float
    trusted: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """The root keys of prepare.py beside the tokenizer; conf/prepare.yaml says what each does."""

    from_: str
    to: str
    kind: Literal["text", "chats", "pairs", "labelled", "prompts", "groups"]
    format: str
    rename: dict[str, str] | None
    separator: str | None
    train_on: Literal["assistant", "completion", "all"]
    on_error: Literal["raise", "skip"]
    duplicates: Literal["keep", "drop"]
    split: Literal["hash", "prompt", "position"]
    val_fraction: float
    processes: int | None
    progress: Literal["auto", "bar", "lines", "none"]
    trusted: list[str]


SCRIPTS: dict[str, type] = {
    "train": Train,
    "generate": Generate,
    "serve": Serve,
    "bench": Bench,
    "convert": Convert,
    "prepare": Prepare,
}


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
                f"{path}._target_={target} is outside trusted={show(trusted)}; add its package: trusted={show([*trusted, str(target).split('.')[0]])}"
            )
        try:
            sig = signature(target)
        except Refusal as error:
            raise Refusal(f"{path}._target_: {error}") from None
        given = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
        for key, value in given.items():
            # Of ours, the keyword-only arguments are the config's: what code supplies cannot come from a file.
            supplied = target.startswith("etude.") and key in sig.params and not sig.params[key].keyword_only
            if key not in sig.params or supplied:
                if sig.open and not key.startswith("_") and not supplied:
                    continue
                raise Refusal(
                    f"unknown key {path}.{key}{did_you_mean(key, [p.name for p in sig.params.values() if p.keyword_only or not node.get('_partial_')], path + '.')}"
                )
            annotation = sig.params[key].annotation
            if annotation is not None and not fits(value, ast.unparse(annotation)):
                raise Refusal(f"{path}.{key}={show(value)} should be {wanted(ast.unparse(annotation))}")
            if annotation is not None and isinstance(value, dict) and "_target_" not in value:
                if not {"dict", "Any", "Mapping"} & {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}:
                    group = f"{path}.{key}".replace(".", "/")
                    raise Refusal(
                        f"{path}.{key} has settings and no _target_: choose a part with {group}=<choice>, or set {path}.{key}=null"
                    )
        partial = node.get("_partial_", False)
        for p in sig.params.values():
            if p.required and p.name not in given and (p.keyword_only or not partial):
                if not p.keyword_only and "_partial_" not in node:
                    raise Refusal(
                        f"missing {path}._partial_: code calls {target} with {p.name}; type +{path}._partial_=true"
                    )
                raise Refusal(f"missing {path}.{p.name}: {target} needs it; type {path}.{p.name}=<value>")


def check_relations(cfg: dict, above: dict | None = None) -> None:
    """Run each target class's `check`, a static method of plain Python that raises ValueError for settings that do not fit
    together. It is compiled from its source alone, without importing the module, and takes by name what it wants of
    the node's settings and of those above it. Raises Refusal with its message."""
    known = (above or {}) | cfg
    target = cfg.get("_target_")
    if target and (function := check_method(target)) is not None:
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if all(n in known for n in names[: len(names) - len(function.__defaults__ or ())]):
            try:
                function(**{n: known[n] for n in names if n in known})
            except ValueError as error:
                raise Refusal(str(error)) from None
            except (TypeError, KeyError, AttributeError) as error:
                settings = ", ".join(f"{n}={show(cfg[n])}" for n in names if n in cfg)
                raise Refusal(f"one of {settings} is of the wrong kind for {target}: {error}") from None
    for value in cfg.values():
        if isinstance(value, dict):
            check_relations(value, known)


def check(cfg: Any, script: str) -> dict:
    """All checks on a composed config; -> it resolved, as plain dicts and lists. Raises Refusal with one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise Refusal(f"config: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from None
    if missing:
        hint = {
            "ckpt": "runs/<run>, a checkpoint folder or an export",
            "data.path": "a file, a folder or a glob",
            "from": "files" if script == "prepare" else "a Hugging Face folder, a .gguf file or runs/<run>",
            "to": "a new .h5 file" if script == "prepare" else "a new folder",
        }
        hints = ((key, hint.get(key) or hint.get(key.rpartition(".")[2], "value")) for key in missing)
        raise Refusal("; ".join(f"{key} is missing: type {key}=<{what}>" for key, what in hints))
    assert isinstance(plain, dict)
    remember(plain)
    if issubclass(SCRIPTS[script], Train):
        plain.setdefault("lora", None)  # a group of which nothing is chosen leaves no key
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(SCRIPTS[script])}
    parts = {"prepare": ["tokenizer"], "generate": ["engine"], "serve": ["engine"]}
    names = groups() if issubclass(SCRIPTS[script], Train) else parts.get(script, [])
    for key, value in ((str(k), v) for k, v in plain.items() if k != "lora" or v is not None):
        if key in fields:
            annotation = _annotation(fields[key].type)
            if not fits(value, annotation):
                raise Refusal(f"{key}={show(value)} should be {wanted(annotation)}")
        elif key not in names:
            raise Refusal(f"unknown key {key}{did_you_mean(key, [*fields, *names])}")
    for name in fields.keys() - plain.keys():
        raise Refusal(f"missing {name}: conf/{script}.yaml does not set it")
    check_targets({k: v for k, v in plain.items() if k not in fields}, plain["trusted"])
    check_relations({k: v for k, v in plain.items() if isinstance(v, dict)}, plain)
    if issubclass(SCRIPTS[script], Train):
        _check_train(plain)
    return plain


def _check_train(cfg: dict) -> None:
    if all(cfg[k] is None for k in ("max_steps", "max_epochs", "max_tokens", "max_flops", "max_minutes")):
        raise Refusal("nothing says when to stop: set one of max_steps, max_epochs, max_tokens, max_flops, max_minutes")
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
        "max_flops",
        "max_minutes",
        "clip",
        "spike_above",
        "spike_window",
    ):
        if cfg[key] is not None and cfg[key] <= 0:
            raise Refusal(
                f"{key}={cfg[key]} should be above 0"
                + (" (null: never)" if key.endswith("_every") and key != "log_every" else "")
            )
    if cfg["stop_at"] is not None and cfg["eval_every"] is None:
        raise Refusal("stop_at is compared at evaluations, and eval_every=null makes none: set eval_every=<steps>")
    if cfg["keep"] < 2:
        raise Refusal(
            f"keep={cfg['keep']} is too few: with under 2 checkpoints a damaged one leaves nothing to fall back to"
        )
    if not re.fullmatch(r"[\w.-]*", cfg["tag"]):
        raise Refusal(f"tag={cfg['tag']} becomes part of a folder's name: use letters, digits, '.', '_' and '-'")
    if has_secret(cfg["tag"]):
        raise Refusal("the tag looks like a secret, and becomes part of a folder's name: choose another")
    run, code = cfg["reproduce"]["run"], cfg["reproduce"]["code"]
    if not isinstance(run, str | None) or not isinstance(code, bool):
        raise Refusal(f"reproduce.run={show(run)} should be text or null, reproduce.code={show(code)} true or false")
    if code and run is None:
        raise Refusal("reproduce.code=true says how to reproduce a run; type reproduce=runs/<run> too")
    if "reward" in cfg:
        raise Refusal("a reward has a name of yours: type +reward@strategy.rewards.<name>=<choice>")
    if cfg["strategy"].get("sync_interval") is not None and (
        cfg["reference"] == "cached" or (cfg["reference"] == "auto" and cfg["lora"] is not None)
    ):
        raise Refusal(
            "strategy.sync_interval changes the reference, which then has to be a model of its own: set reference=copy, or strategy.sync_interval=null"
        )
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


def groups() -> list[str]:
    return [p.name for p in CONF.iterdir() if p.is_dir()]


def show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(show, value)) + "]"
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


def describe(target: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `build`: the `_partial_` node of a class or function with these settings, made of plain values,
    `functools.partial`s and dataclasses."""

    def plain(value: Any) -> Any:
        if isinstance(value, functools.partial):
            return describe(value.func, value.keywords)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            node = describe(type(value), vars(value))
            del node["_partial_"]
            return node
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    node = {"_target_": f"{target.__module__}.{target.__qualname__}", "_partial_": True}
    return node | {n: plain(v) for n, v in settings.items()}


def choosing(group: str, choice: str) -> list[str]:
    """The overrides that put a choice of a group into train.py's config."""
    if group == "reward":  # one of several, by a name of the user's
        return ["strategy=grpo", f"+reward@strategy.rewards.checked={choice}"]
    if group.startswith("hydra/sweeper/"):  # parts of one sweeper
        return ["hydra/sweeper=optuna", f"{group}='{choice}'"]
    return [f"{group}='{choice}'"]  # quoted: true is a word here


def check_all() -> list[str]:
    """Compose and check every root file with every choice of every group; -> one line for each that fails."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    failures = []
    jobs: list[tuple[str, list[str]]] = [(script, []) for script in SCRIPTS]
    for path in sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF):
        group, choice = path.parent.relative_to(CONF), path.stem
        # conf/model/llama/1b.yaml is model=llama/1b; experiments may lie in folders
        if path.parent.with_suffix(".yaml").exists() or group.parent.name == "experiment":
            group, choice = group.parent, f"{group.name}/{choice}"
        jobs.append(("train", choosing(str(group), choice)))
    # What a choice or a script cannot have a default for.
    needs = {
        "generate": ["ckpt=x"],
        "serve": ["ckpt=x"],
        "convert": ["from=x", "to=y"],
        "prepare": ["from=x", "to=y"],
        "data=text": ["data.path=x"],
        "data=h5": ["data.path=x"],
        "data=bin": ["data.path=x"],
        "tokenizer=file": ["tokenizer.path=x"],
        "+reward@strategy.rewards.checked=model": ["strategy.rewards.checked.ckpt=x"],
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for script, overrides in jobs:
            extra = needs.get((overrides[-1] if overrides else script).replace("'", ""), [])
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

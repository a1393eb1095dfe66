"""Measurements: training and decoding of a config, in turn with another program where one is named.

A machine with neighbours is fast one minute and slow the next: so times are medians over rounds in which both programs
take turns, and what counts is their ratio."""

import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from etude import config as conf
from etude.bench_steps import Training, describe
from etude.errors import Refusal


def run(cfg: dict) -> int:
    """-> exit code."""
    from etude.training import Session, prepare_data

    if cfg["rounds"] < 1 or cfg["steps"] < 1 or cfg["warmup_steps"] < 0:
        raise Refusal(
            f"rounds={cfg['rounds']} and steps={cfg['steps']} should be at least 1 and warmup_steps={cfg['warmup_steps']} at least 0"
        )
    if cfg["what"] == "engine":
        from etude.bench_engine import engine_rates

        if cfg["compare"] is not None or cfg["against"] is not None:
            raise Refusal("what=engine has peer= and gguf= to compare with; leave compare= and against= out")
        show(engine_rates(cfg))
        return 0
    if cfg["ckpt"] is not None or cfg["gguf"] is not None:
        raise Refusal("ckpt= and gguf= belong to the engine: type what=engine as well")
    if cfg["what"] == "trl":
        from etude.bench_trl import trl_rates

        if cfg["compare"] is not None or cfg["against"] is not None:
            raise Refusal("what=trl compares with TRL; leave compare= and against= out")
        show(trl_rates(cfg))
        return 0
    if cfg["what"] == "prepare":
        from etude.bench_data import prepare_rates

        show(prepare_rates(cfg))
        return 0
    other_cfg = rival(cfg["against"]) if cfg["against"] is not None else None
    data, prepared = prepare_data(cfg)
    parallel = conf.build(cfg["parallel"])
    if getattr(parallel, "nproc", 1) > 1:
        raise Refusal("bench.py times one process; use parallel=single")
    with parallel.world(cfg["threads"]) as world:
        session = Session(cfg, data, prepared, parallel, world)
        against = None if other_cfg is None else Session(other_cfg, *prepare_data(other_cfg), parallel, world)
        result = measure(cfg, session, against)
    show(result)
    return 0


def rival(overrides: str) -> dict:
    """The config of another side: our command line with `overrides`, separated by spaces. A group that they choose anew
    takes nothing of ours: model=dense drops our model.ffn.n_experts=64."""
    from hydra import compose

    from etude.training import typed_overrides

    key = lambda override: override.partition("=")[0].lstrip("+~")  # noqa: E731
    added = shlex.split(overrides)
    chosen = [key(o) for o in added if key(o) in conf.groups()]
    mine = [o for o in typed_overrides() if key(o) != "against" and re.split(r"[./]", key(o))[0] not in chosen]
    return conf.check(compose("bench", overrides=mine + added), "bench")


def measure(cfg: dict, session: Any, against: Any) -> dict[str, Any]:
    """All figures of one command: each round times us, the other side and the other program in turn."""
    tokens = round(cfg["batch_size"] * session.batches.tokens_per_sample)
    result: dict[str, Any] = {
        "model": cfg["tag"] or cfg["model"]["_target_"].rpartition(".")[2],
        "parameters": session.model.n_params(),
        "active_parameters": session.model.n_active(),
        "device": describe(session.device),
        "precision": session.precision,
        "compile": cfg["compile"],
    }
    if cfg["what"] == "data":
        return result | reading(cfg, session)
    training, decoding = cfg["what"] in ("train", "all"), cfg["what"] in ("decode", "all")
    whole = tokens * cfg["steps"] if training else cfg["decode_tokens"] * cfg["decode_batch"]
    sides = [s for s in (session, against) if s is not None]
    trainings = [Training(s) for s in sides] if training else []
    rounds: list[list[dict[str, float]]] = [[] for _ in sides]
    decoded: list[list[float]] = [[] for _ in sides]
    theirs: list[float] = []
    for _ in range(cfg["rounds"]):
        for i, side in enumerate(sides):
            if training:
                rounds[i].append(trainings[i].round(side.cfg["steps"]))
            if decoding:
                decoded[i].append(decode_rate(side, cfg["decode_tokens"], cfg["decode_batch"]))
        if cfg["compare"] is not None:
            theirs.append(other(cfg, tokens, whole))
    if training:
        result |= summary(rounds[0], tokens, session)
    if decoding:
        result["decode_tokens_per_s"] = statistics.median(decoded[0])
    if against is not None:
        result["against"] = cfg["against"]
        result["against_active_parameters"] = against.model.n_active()
        pairs: list[tuple[str, list[float]]] = []
        if training:
            size = round(against.cfg["batch_size"] * against.batches.tokens_per_sample)
            result["against_tokens_per_s"] = summary(rounds[1], size, against)["tokens_per_s"]
            pairs.append(("against_ratio", [size_ratio(tokens, a, size, b) for a, b in zip(*rounds)]))
        if decoding:
            result["against_decode_tokens_per_s"] = statistics.median(decoded[1])
            pairs.append(("against_decode_ratio", [a / b for a, b in zip(*decoded)]))
        result |= {name: statistics.median(ratios) for name, ratios in pairs}
    if theirs:
        ours = result["tokens_per_s"] if training else result["decode_tokens_per_s"]
        result |= {"their_tokens_per_s": statistics.median(theirs), "ratio": ours / statistics.median(theirs)}
    result["peak_memory_mib"] = peak_memory(session.device)
    return result


def reading(cfg: dict, session: Any) -> dict[str, Any]:
    """Batches a second from the store to the loop, in turn with the other program, which prints "N batches/s"."""
    from etude.bench_data import read_rate

    ours, theirs = [], []
    wanted = cfg | {"compare_pattern": cfg["compare_pattern"] or r"(?P<tps>[\d.,]+) batches/s"}
    for _ in range(cfg["rounds"]):
        ours.append(read_rate(session, cfg["steps"]))
        if cfg["compare"] is not None:
            theirs.append(other(wanted, 1, cfg["steps"]))
    found = {"batches_per_s": statistics.median(ours)}
    if theirs:
        found["their_batches_per_s"] = statistics.median(theirs)
        found["ratio"] = statistics.median(a / b for a, b in zip(ours, theirs))
    return found


def size_ratio(tokens: int, ours: dict[str, float], other: int, theirs: dict[str, float]) -> float:
    """Our tokens a second over the other side's, in one round: neighbours then disturb both alike."""
    return tokens / ours["step"] / (other / theirs["step"])


def summary(rounds: list[dict[str, float]], tokens: int, session: Any) -> dict[str, Any]:
    step = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    rate = tokens / step["step"]
    peak = session.peak_flops
    return {
        "tokens_per_s": rate,
        "step_ms": step.pop("step") * 1e3,
        **{f"{k}_ms": v * 1e3 for k, v in step.items()},
        "tflops": rate * session.model.flops_per_token(session.data.seq_len) / 1e12,
        "mfu": rate * session.model.flops_per_token(session.data.seq_len) / peak if peak else None,
    }


def decode_rate(session: Any, new: int, batch: int) -> float:
    """New tokens a second of `batch` rows after a prompt of 16, greedy."""
    from etude.infer.engine import InferenceEngine
    from etude.infer.request import Request
    from etude.infer.sampling import Sampling

    engine = InferenceEngine(session.model, session.tokenizer, conf.build(session.cfg["engine"]))
    limit = engine.limit
    new = min(new, limit - 16) if limit else new
    prompt = session.prepared[0].ids("train").read(0, 16).tolist()

    def go(count: int) -> float:
        request = Request(
            prompt=prompt, n=batch, max_tokens=count, sampling=Sampling(temperature=0.0), ignore_stop_ids=True
        )
        start = time.perf_counter()
        engine.generate([request])
        return time.perf_counter() - start

    go(2)
    seconds = go(new)
    return batch * new / seconds


def other(cfg: dict, tokens: int, whole: int) -> float:
    """Tokens a second of the other program, by what it prints for steps of `tokens`, or by the time of the whole process,
    which is then taken to have made `whole` tokens."""
    start = time.perf_counter()
    done = subprocess.run(cfg["compare"], shell=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise Refusal(
            f"compare={shlex.quote(cfg['compare'])} ended with exit code {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        )
    per_step = cfg["compare_tokens"] or tokens
    pattern = cfg["compare_pattern"]
    if pattern is not None and not re.search(pattern, done.stdout):
        raise Refusal(f"compare_pattern={pattern} matches nothing that the other program printed")
    tps = [
        float(m.group("tps").replace(",", ""))
        for m in re.finditer(pattern or r"(?P<tps>[\d.,]+) tok(?:ens)?/s", done.stdout)
        if "tps" in m.re.groupindex
    ]
    ms = [] if tps else [float(m[1]) for m in re.finditer(pattern or r"time ([\d.]+) ?ms", done.stdout)]
    if tps:
        return statistics.median(tps[len(tps) // 4 :])  # the first ones are warm-up
    if ms:
        return per_step / statistics.median(ms[len(ms) // 4 :]) * 1e3
    print(
        "note: the other program printed neither tokens/s nor milliseconds a step: its whole process is timed",
        file=sys.stderr,
    )
    return whole / seconds


def peak_memory(device: Any) -> float:
    """MiB: of the GPU's allocator, else of the process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def show(result: dict[str, Any]) -> None:
    table = Table("measure", "value")
    for name, value in result.items():
        table.add_row(name, "n/a" if value is None else f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(result))

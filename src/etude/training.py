"""From a checked config to a finished run: data, model, run folder, loop, summary."""

import contextlib
import functools
import hashlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etude import cli, reproduce
from etude import config as conf
from etude import run as runs
from etude.data.base import Maker
from etude.data.prepare import Prepared, prepare, together
from etude.errors import EtudeError, Interrupted, Refusal
from etude.parallel import rank as parallel_rank
from etude.redact import remember, scrub
from etude.sweep.place import overrides_hash

# torch is imported by `work` alone: bad input is refused before, and a launcher of processes never needs it.


def train(cfg: dict) -> int:
    """Everything that needs no torch, then `work` in as many processes as cfg.parallel says. -> exit code."""
    overrides = typed_overrides()
    if cfg["resume"] is None and cfg["reproduce"]["run"] is not None:
        cfg = reproduce.adopt(cfg, overrides)
        if cfg["reproduce"]["code"]:
            return reproduce.elsewhere(cfg, overrides)
        try:
            conf.check_targets({k: v for k, v in cfg.items() if isinstance(v, dict)}, cfg["trusted"])
        except Refusal as error:
            raise Refusal(f"{error}. If the code has changed since that run: reproduce.code=true") from None
    elif cfg["resume"] is not None:
        cfg = runs.resumed_config(Path(cfg["resume"]), cfg, overrides, list(conf.MAY_CHANGE))
        conf.check_targets({k: v for k, v in cfg.items() if isinstance(v, dict)}, cfg["trusted"])
        gone = cfg["init_from"] is not None and not Path(cfg["init_from"]).is_dir()
        if gone and "path" in cfg["tokenizer"]:
            last = Path(cfg["resume"]) / "artifacts" / "checkpoints" / "last"  # which has the tokenizer too
            cfg["tokenizer"] = cfg["tokenizer"] | {"path": str(last)}
    elif cfg["init_from"] is not None:
        from etude.initial import adopt

        cfg = adopt(cfg, overrides)
    return start(cfg, overrides)


def start(cfg: dict, overrides: list[str]) -> int:
    """A run of a config that is whole. -> exit code."""
    data, prepared = prepare_data(cfg)
    if cfg["dry_run"]:
        from etude.preview import show

        return show(cfg, data, prepared)
    return conf.build(cfg["parallel"]).launch(work, cfg, overrides, chosen(cfg), data, prepared, sweep_job())


def prepare_data(cfg: dict) -> tuple[Any, list[Prepared]]:
    """The data node, and the ids of its parts."""
    data = conf.build(cfg["data"])
    return data, prepare(data, maker_of(cfg["tokenizer"]), cfg["cache_dir"])


def maker_of(node: dict) -> Maker:
    """A tokenizer node as what makes it; its key covers the files that it names, which may change under the same name."""
    key = json.dumps(node)
    if "path" in node:
        path = Path(node["path"]).expanduser()
        files = sorted(path.glob("*.jso*")) + sorted(path.glob("*.jinja")) if path.is_dir() else [path]
        key += "".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file())
    stored = node["_target_"] == "etude.text.tokenizer.stored"
    return Maker(None if stored else key, lambda train, corpus: conf.build(node, train, corpus))


def typed_overrides() -> list[str]:
    """What the user typed, job by job in a sweep; empty outside of Hydra (tests, notebooks)."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def chosen(cfg: dict) -> dict[str, Any]:
    """{config group: choice}, by which runs are compared; of a reproduction what its source's were. Empty outside of Hydra."""
    from hydra.core.hydra_config import HydraConfig

    if cfg["reproduce"]["run"] is not None:
        return runs.recorded(Path(cfg["reproduce"]["run"]) / "meta" / "choices.json")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}


def sweep_job() -> tuple[Path, bool] | None:
    """The folder <sweep>/<job>_<overrides hash> that a sweep has for this job, and whether it is still to be claimed (with
    hydra/launcher=isolated it is there, and named by hydra.run.dir); None outside of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized():
        return None
    h = HydraConfig.get()
    if h.mode == RunMode.MULTIRUN:
        return Path(h.sweep.dir) / f"{h.job.num}_{overrides_hash(h.overrides.task)}", True
    return (Path(h.run.dir), False) if h.run.dir != "." else None


def work(
    cfg: dict,
    overrides: list[str],
    choices: dict[str, Any],
    data: Any,
    prepared: list[Prepared],
    job: tuple[Path, bool] | None,
) -> int:
    """One process of a run. -> exit code."""
    remember(cfg)
    parallel = conf.build(cfg["parallel"])
    first = parallel_rank() == 0  # what is refused is refused on every rank: one of them says it

    def run() -> int:
        with parallel.world(cfg["threads"]) as world, contextlib.ExitStack() as stack:
            session = Session(cfg, data, prepared, parallel, world)
            folder = world.broadcast(str(session.claim(job)) if world.rank == 0 else None)
            session.folder = Path(folder)
            if world.rank == 0:
                stack.enter_context(runs.locked(session.folder))
            return session.run(overrides, choices)

    return cli.guard(run, quiet=not first)


class Session:
    """The parts of one run in this process, and the functions that the loop calls on them."""

    def __init__(self, cfg: dict, data: Any, prepared: list[Prepared], parallel: Any, world: Any):
        import torch

        from etude import initial, memory
        from etude.data.loader import Batches
        from etude.loop import Progress
        from etude.parallel import deterministic, peak_flops, pick_precision
        from etude.window import Window

        self.cfg, self.data, self.prepared, self.parallel, self.world = cfg, data, prepared, parallel, world
        self.device = world.device
        self.precision = pick_precision(cfg["precision"], self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        self.peak_flops = peak_flops(self.device)
        deterministic(cfg["deterministic"])
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.tokenizer = prepared[0].tokenizer
        self.meta = together(dict(zip(data.parts(), prepared)))
        if cfg["init_from"] is not None and cfg["resume"] is None:
            initial.check_tokenizer(Path(cfg["init_from"]), self.tokenizer)
        self.engine = conf.build(cfg["engine"])
        made = conf.build(cfg["strategy"])
        self.strategy = made(self.tokenizer, self.engine) if cfg["strategy"].get("_partial_") else made
        kinds = getattr(self.strategy, "kinds", ("text", "chats"))
        if self.meta["kind"] not in kinds:
            raise Refusal(
                f"this strategy trains on {' or '.join(kinds)} and the data holds {self.meta['kind']}; leave out data=, or choose data={kinds[0]}"
            )
        if cfg["reference"] == "cached" and self.meta["kind"] == "prompts":
            raise Refusal("reference=cached needs completions that are known beforehand; set reference=copy")
        size = cfg["batch_size"]
        if size % world.size:
            raise Refusal(
                f"batch_size={size} does not divide over {world.size} processes; set batch_size to a multiple of {world.size}"
            )
        micro = cfg["micro_batch_size"] or size // world.size
        if (size // world.size) % micro:
            raise Refusal(
                f"batch_size={size} over {world.size} processes is not a multiple of micro_batch_size={micro}; set micro_batch_size to a divisor of {size // world.size}"
            )
        shapes, self.trainable = initial.shapes(cfg, self.tokenizer.vocab_size)
        if (limit := shapes.position_limit) is not None and data.seq_len > limit:
            raise Refusal(
                f"data.seq_len={data.seq_len} is longer than the model's {limit} positions; set data.seq_len or model.max_len"
            )
        copied = self.strategy.needs_reference and (
            cfg["reference"] == "copy" or (cfg["reference"] == "auto" and cfg["lora"] is None)
        )
        rolled = 0
        if self.meta["kind"] == "prompts":
            rolled = memory.rollout(shapes, self.engine, data.seq_len + cfg["strategy"].get("max_completion", 0))
        rows = micro * data.seq_len
        warning = memory.preflight(
            shapes, self.trainable, copied, rolled, self.device, world.size, self.precision, rows
        )
        if warning and world.rank == 0:
            print(f"warning: {warning}", file=sys.stderr)
        self.model = initial.model(cfg, self.tokenizer.vocab_size, needed=self.strategy.needs_reference)
        self.start_sha256 = initial.fingerprint(cfg)
        initial.adapt(self.model, cfg)
        self.model.to(self.device)
        self.ref = initial.reference(self.model, cfg) if self.strategy.needs_reference else None
        if hasattr(self.strategy, "ref"):  # one that collects with it too
            self.strategy.ref = self.ref
        self.optimizer = conf.build(cfg["optimizer"], self.model)
        self.progress = Progress()
        self.batches = Batches(
            data,
            prepared,
            {"batch_size": size, "micro_batch_size": micro, "rank": world.rank, "world_size": world.size},
            cfg["seed"],
            self.device,
        )
        self.window = Window(self.strategy, self.batches, world, cfg["seed"], self.autocast)
        writes = not hasattr(self.strategy, "use")  # else it says what its runs are for
        self.prompts = [p for p in self.sample_prompts() if self.knows(p)] if writes else []
        self.folder = Path()
        self.whole: set[Path] = set()  # checkpoints verified in this process

    def knows(self, prompt: str) -> bool:
        """Whether a sample prompt can be encoded; said once if not, and not found out in the middle of a run."""
        try:
            self.tokenizer.encode(prompt)
            return True
        except Refusal as error:
            if self.world.rank == 0:
                print(f"warning: sample prompt {prompt!r} is left out: {str(error).split(';')[0]}", file=sys.stderr)
            return False

    def sample_prompts(self) -> list[str]:
        """What the config says, else what suits the data: of rows, the first two prompts of the validation split."""
        if self.cfg["sample_prompts"] is not None:
            return self.cfg["sample_prompts"]
        found = self.batches.sets["val"].prompts(2)
        return [self.tokenizer.decode(ids) for ids in found] or list(self.data.prompts)

    def claim(self, job: tuple[Path, bool] | None) -> Path:
        if self.cfg["resume"] is not None:
            return Path(self.cfg["resume"])
        if job is not None:
            return runs.claim_job(job[0]) if job[1] else runs.take(job[0])
        return runs.claim(self.cfg["runs_dir"], self.cfg["tag"])

    @property
    def checkpoints(self) -> Path:
        return self.folder / "artifacts" / "checkpoints"

    # ------------------------------------------------------------ what the loop calls

    def evaluate(self, whole: bool) -> dict[str, float]:
        """Means over eval_iters fixed batches of both splits as val/<name> and train/eval_<name> (over the validation
        split where eval_iters is null), or with `whole` over the validation split as val/full_<name>."""
        n, size = self.cfg["eval_iters"], self.eval_batch_size
        if whole or n is None:
            found = self._validate(self.batches.whole("val", size), "val")
            return {f"val/full_{k}" if whole else f"val/{k}": v for k, v in found.items()}
        found = {f"val/{k}": v for k, v in self._validate(self.batches.fixed("val", n, size), "val").items()}
        return found | {
            f"train/eval_{k}": v for k, v in self._validate(self.batches.fixed("train", n, size), "train").items()
        }

    @property
    def eval_batch_size(self) -> int:
        return self.cfg["eval_batch_size"] or self.batches.sampler.micro_batch_size

    def _validate(self, batches: Any, split: str) -> dict[str, float]:
        from etude.loop import validate

        found = validate(self.model, self.strategy, self.ref, batches, self.autocast, self.world, self.cfg["seed"])
        if "nll" in found:
            found["loss"] = found.pop("nll")  # of the model, without smoothing and penalties
        if "loss" in found and (size := self.meta.get(f"{split}_bytes")) is not None:
            found["bits_per_byte"] = found["loss"] / math.log(2) * self.meta[f"{split}_tokens"] / size
        return found

    def sample(self, step: int) -> list[tuple[str, str]]:
        """Text after each of sample_prompts, written to the trackers by rank 0. -> (prompt, text) pairs."""
        from etude.infer.engine import InferenceEngine
        from etude.infer.sampling import Sampling
        from etude.text.chat import end_of_turn

        if self.world.rank != 0 or not self.prompts:
            return []
        rows = InferenceEngine(self.model, self.tokenizer, self.engine).generate(
            self.prompts,
            sampling=Sampling(temperature=0.8, top_k=50, seed=self.cfg["seed"]),
            max_tokens=self.cfg["sample_tokens"],
            stop_ids=frozenset(end_of_turn(self.tokenizer)),
        )
        pairs = [(p, r.text) for p, r in zip(self.prompts, rows)]
        for i, (prompt, text) in enumerate(pairs):
            self.tracker.text(step, f"sample/{i}", scrub(prompt + text))
        return pairs

    # ------------------------------------------------------------ from start to end

    def run(self, overrides: list[str], choices: dict[str, Any]) -> int:
        """Train to the end, evaluate, export and say what to type next. -> exit code."""
        from etude import saving, summary
        from etude.display import Display
        from etude.loop import goal, horizon, reached
        from etude.track import Jsonl, Trackers

        cfg, main = self.cfg, self.world.rank == 0
        display = Display(cfg["progress"], main)
        if self.strategy.needs_reference and cfg["reference"] == "cached":
            self.ref = self.cached_reference(display.say)
        if cfg["resume"] is not None:
            saving.restore(self)
        per_token = self.model.flops_per_token(self.data.seq_len)
        limit = horizon(cfg, self.batches, self.window.iterations, per_token)
        if limit is not None and self.progress.step >= limit:
            self.conclude()
            display.say(
                f"{self.folder} is complete: {self.progress.step} steps. To train on: python train.py resume={self.folder} max_steps={2 * self.progress.step}"
            )
            return 0
        if reached(self.strategy, self.progress, cfg["stop_at"]):
            self.conclude()
            display.say(
                f"{self.folder} is complete: it reached stop_at. To train on: python train.py resume={self.folder} stop_at=null"
            )
            return 0
        self.tracker = Trackers(Jsonl(), cfg["tracker"])
        status = runs.Status(self.folder)
        name, sign = goal(self.strategy)
        status.fields["goal"] = {"metric": f"val/{name}", "mode": "min" if sign == 1 else "max"}
        if main:
            if cfg["resume"] is None:
                data = self.meta | {"start_sha256": self.start_sha256}
                runs.write_metadata(self.folder, cfg, overrides, choices, data, self.model_size(), self.machine())
            else:
                runs.note_resume(self.folder, cfg, overrides, self.progress.step)
            if cfg["lora"] is not None:
                saving.write_base(self)
            status.write()
            self.tracker.open(self.folder, self.progress.step)
        source = None if cfg["reproduce"]["run"] is None else Path(cfg["reproduce"]["run"])
        try:
            if main and source is not None and not (self.folder / "reproduction.json").exists():
                display.say("\n".join(reproduce.begin(source, self.folder, cfg)))
            display.say(summary.at_start(self, limit))
            model = self.wrapped()
            part = self.fitting(
                model,
                tracker=self.tracker,
                status=status,
                display=display,
                save=lambda best: saving.save(self, best),
                sample=self.sample,
                evaluate=self.evaluate,
                peak_flops=self.peak_flops,
                folder=self.folder,
            )
            for until, limits in [] if source is None else reproduce.stages(source):
                if self.progress.step < until:  # its rate followed other limits then
                    part(settings=cfg | limits, until=until)
            reason = part(settings=cfg)
            if main:
                saving.export(self)
                display.stop()
                status.end("completed", self.progress.step)
                text = summary.at_end(self, reason, status)
                text += [] if source is None else ["", reproduce.conclude(self.folder)]
                status.summarize(text)
                display.say(scrub("\n".join(text)))
            return 0
        except BaseException as error:
            if main:
                stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
                why = str(error) if isinstance(error, EtudeError) else traceback.format_exc()
                with contextlib.suppress(EtudeError, OSError):  # a full disk must not hide the first error
                    status.end(
                        "interrupted" if stopped else "failed",
                        self.progress.step,
                        why,
                        getattr(error, "code", 3 if stopped else 1),
                    )
                    outcome = [] if source is None else [reproduce.conclude(self.folder)]
                    if outcome:
                        display.say(outcome[0])
                    status.summarize([f"step {self.progress.step}", *outcome])
            raise
        finally:
            display.stop()
            if main:
                self.tracker.close()

    def wrapped(self) -> Any:
        """The model as it is trained: compiled, and wrapped for its processes."""
        if self.cfg["compile"]:
            for model in (self.model, self.ref):
                for block in getattr(model, "blocks", ()):
                    block.compile()
        return self.parallel.wrap(self.model, self.world)

    def fitting(self, model: Any, **given: Any) -> Callable[..., str]:
        """loop.fit with the parts of this session; `given` are where it reports to and what it does in between."""
        from etude.loop import fit

        return functools.partial(
            fit,
            model=model,
            ref=self.ref,
            strategy=self.strategy,
            optimizer=self.optimizer,
            schedule=conf.build(self.cfg["scheduler"]),
            batches=self.batches,
            window=self.window,
            parallel=self.parallel,
            world=self.world,
            progress=self.progress,
            precision=self.precision,
            **given,
        )

    def machine(self) -> dict[str, Any]:
        """For meta/env.txt: what decides how sums are rounded, beside the packages."""
        import torch

        found: dict[str, Any] = {"device": self.device}
        if self.device.type == "cuda":
            found["accelerator"] = torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return found | {"threads": threads, "precision": self.precision, "processes": self.world.size}

    def model_size(self) -> dict[str, int]:
        """For meta/model.json. Embedding and position tables count as embeddings, a tied head with them."""
        n = self.model.n_params()
        tables = [t.weight.numel() for t in (self.model.embed, self.model.pos_embed) if t is not None]
        untied = self.model.head.weight is not self.model.embed.weight
        return {
            "params": n,
            "params_trained": self.trainable,
            "params_active": self.model.n_active(),
            "params_non_embedding": n - sum(tables) - untied * self.model.head.weight.numel(),
            "flops_per_token": self.model.flops_per_token(self.data.seq_len),
        }

    def conclude(self) -> None:
        """What a run that was killed between its last checkpoint and its end has left to do."""
        from etude import saving

        if self.world.rank != 0 or runs.recorded(self.folder / "status.json").get("status") == "completed":
            return
        saving.export(self)
        status = runs.Status(self.folder)
        for row in (self.folder / "logs" / "metrics.jsonl").read_text().splitlines():
            status.fields["metrics"] = status.fields.get("metrics", {}) | json.loads(row)
        status.fields["metrics"].pop("step")
        status.end("completed", self.progress.step)
        status.summarize([f"step {self.progress.step}"])

    def cached_reference(self, say: Callable[[str], None]) -> Any:
        """The log-probabilities that the model, still untrained, gives the data."""
        from etude.strategy.reference import precompute

        return precompute(
            self.model,
            self.batches.sets.values(),
            batch_size=self.eval_batch_size,
            precision=self.precision,
            cache_dir=self.cfg["cache_dir"],
            world=self.world,
            say=say,
        )

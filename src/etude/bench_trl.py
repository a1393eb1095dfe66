"""Whole training steps of dpo and grpo against TRL's trainers: the same weights, token ids, batches, settings, precision and
threads, in one process and in turn. Rates are medians over rounds, ratios medians of the rounds' own.

The first step is checked before anything is timed: both sides learn from the same tokens (TRL is given our completions),
and in fp32 their losses and gradient norms have to agree, or it is not the same work."""

import contextlib
import importlib.metadata
import importlib.util
import math
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etude import checkpoint, saving
from etude import config as conf
from etude.bench_steps import Training, describe
from etude.data.loader import ROUND, Batch, Batches
from etude.errors import EtudeError, Refusal
from etude.interop import convert
from etude.loop import reduce, router_load
from etude.model import weights
from etude.model.moe import MoE
from etude.parallel import StopSignals
from etude.strategy.layout import rows_of
from etude.training import Session, prepare_data

LAYOUTS = ("rows", "packed", "shared")
LOSS, NORM = 1e-5, 1e-3  # how far apart first losses (absolute) and gradient norms (relative) may be in fp32
LOSSES = {"norm": "sigmoid_norm"}  # dpo's that TRL calls otherwise
MISSING = ("cdpo", "simpo", "orpo")  # and those that its trainer does not have

Value = Callable[["Step"], float]
Sequence = tuple[list[int], list[int]]  # ids of the prompt, and those that are learned


class Step(NamedTuple):
    """Seconds, seconds of them before the update (data, rollout), tokens of a forward (with padding), learned tokens."""

    seconds: float
    before: float
    tokens: float
    learned: float


class First(NamedTuple):
    """What the first step learned from, sorted, and what came of it."""

    sequences: list[Sequence]
    loss: float
    norm: float


def trl_rates(cfg: dict) -> dict[str, Any]:
    """All figures of what=trl."""
    check(cfg)
    parallel = conf.build(cfg["parallel"])
    if getattr(parallel, "nproc", 1) > 1:
        raise Refusal("bench.py times one process; use parallel=single")
    data, prepared = prepare_data(cfg)
    with parallel.world(cfg["threads"]) as world, tempfile.TemporaryDirectory() as folder:
        own = cfg["strategy"]["layout"]
        layouts = [own, *(name for name in LAYOUTS if name != own)]
        sides = {name: Ours(Session(alike(cfg, name), data, prepared, parallel, world)) for name in layouts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TRL and transformers about each other
            return measure(cfg, sides, TRL(cfg, sides[own].session, Path(folder)))


def check(cfg: dict) -> None:
    """Raises Refusal for what TRL cannot do alike, before anything is loaded."""
    if importlib.util.find_spec("trl") is None:
        raise Refusal("what=trl needs TRL: pip install trl==1.16.0")
    strategy, optimizer = cfg["strategy"], cfg["optimizer"]
    kind = strategy["_target_"].rpartition(".")[2]
    if kind not in ("DPO", "GRPO"):
        raise Refusal("what=trl times strategy=dpo and strategy=grpo; type one of them")
    if cfg["lora"] is not None:
        raise Refusal("what=trl trains all weights on both sides; leave lora= out")
    if optimizer["_target_"] != "etude.optim.adamw" or set(optimizer["lr_scale"].values()) != {1.0}:
        raise Refusal("TRL has AdamW with one rate for all parameters: leave optimizer= and optimizer.lr_scale out")
    window = 1
    if kind == "DPO":
        terms = strategy["loss"] if isinstance(strategy["loss"], dict) else [strategy["loss"]]
        if absent := next((name for name in MISSING if name in terms), None):
            raise Refusal(f"TRL's DPOTrainer has no {absent}; type strategy.loss=sigmoid")
    else:
        wanted: dict[str, Any] = {
            "top_k": None,
            "top_p": None,
            "objective": "clip",
            "level": "token",
            "correction": "none",
        }
        wanted |= {"mask_overlong": False, "drop_silent": False, "sync_interval": None, "steps_per_rollout": 1}
        for name, value in wanted.items():
            if strategy[name] != value:
                raise Refusal(
                    f"strategy.{name}={conf.show(strategy[name])} is not timed against TRL; type strategy.{name}={conf.show(value)}"
                )
        window = strategy["iterations"]
    for name in ("steps", "warmup_steps"):
        if cfg[name] < 1 or cfg[name] % window:
            raise Refusal(
                f"{name}={cfg[name]} should be a multiple of {window}, the steps from one rollout to the next; type {name}={max(1, cfg[name] // window) * window}"
            )


def alike(cfg: dict, layout: str) -> dict:
    """Our side's config: with this layout, rewards that take no time, and warm-up left to `measure`."""
    strategy = cfg["strategy"] | {"layout": layout}
    if "rewards" in strategy:
        strategy["rewards"] = {"varied": {"_target_": "etude.bench_trl.varied", "_partial_": True}}
    return cfg | {"strategy": strategy, "warmup_steps": 0}


def varied(completion: str, fields: dict[str, Any]) -> float:
    """A reward that differs between completions, so that every group has something to teach."""
    return zlib.crc32(completion.encode()) / 2**32


def measure(cfg: dict, sides: dict[str, "Ours"], theirs: "TRL") -> dict[str, Any]:
    """TRL's trainer runs its own loop; before each round of it ours take their turns."""
    layout, own = next(iter(sides.items()))
    session, window = own.session, own.session.window.length
    rounds: dict[str, list[Step]] = {name: [] for name in sides}
    for side in sides.values():
        side.run(cfg["warmup_steps"])
    theirs.completions = own.completions

    def our_turn() -> None:
        if not rounds[layout]:
            compare(own.first, theirs.first, exact=own.exact)
        for name, side in sides.items():
            rounds[name].append(overall(side.run(cfg["steps"]), window))

    theirs.train(our_turn)
    timed_steps = theirs.steps[cfg["warmup_steps"] :]
    parts = [timed_steps[i : i + cfg["steps"]] for i in range(0, len(timed_steps), cfg["steps"])]
    rounds["trl"] = [overall(part, window) for part in parts]
    if len({tuple(s.learned for s in steps) for steps in rounds.values()}) > 1:
        raise EtudeError("the sides learned from different numbers of tokens: not the same is computed")
    result: dict[str, Any] = {
        "model": cfg["tag"] or cfg["model"]["_target_"].rpartition(".")[2],
        "parameters": session.model.n_params(),
        "device": describe(session.device),
        "precision": session.precision,
        "reference": cfg["reference"] if session.strategy.needs_reference else None,
        "trl_version": importlib.metadata.version("trl"),
        "transformers_version": importlib.metadata.version("transformers"),
        "layout": layout,
    }
    result |= figures(rounds, layout, theirs)
    for prefix, first in (("", own.first), ("trl_", theirs.first)):
        assert first is not None
        result |= {f"{prefix}first_loss": first.loss, f"{prefix}first_grad_norm": first.norm}
    return result


def figures(rounds: dict[str, list[Step]], layout: str, theirs: "TRL") -> dict[str, Any]:
    """Rates of each side, and how many times as long the others take as our `layout`."""
    what = "completions" if theirs.grpo else "pairs"
    whole: Value = lambda s: s.seconds  # noqa: E731
    update: Value = lambda s: s.seconds - s.before  # noqa: E731
    result: dict[str, Any] = {f"{what}_per_step": theirs.samples}
    for name, steps in rounds.items():
        prefix = "" if name == layout else f"{name}_"
        result |= {
            f"{prefix}{what}_per_s": theirs.samples / median(steps, whole),
            f"{prefix}step_ms": median(steps, whole) * 1e3,
            f"{prefix}update_ms": median(steps, update) * 1e3,
            f"{prefix}tokens_per_step": statistics.mean(s.tokens for s in steps),
            f"{prefix}learned_per_step": statistics.mean(s.learned for s in steps),
        }
    for name in list(rounds)[1:]:
        result |= {
            f"ratio_to_{name}": ratio(rounds[layout], rounds[name], whole),
            f"update_ratio_to_{name}": ratio(rounds[layout], rounds[name], update),
        }
    if theirs.grpo:
        result["rollout_ratio_to_trl"] = ratio(rounds[layout], rounds["trl"], lambda s: s.before)
    return result


def median(rounds: list[Step], value: Value) -> float:
    return statistics.median(map(value, rounds))


def ratio(ours: list[Step], others: list[Step], value: Value) -> float:
    """How many times as long the others take."""
    return statistics.median(value(b) / value(a) for a, b in zip(ours, others))


def overall(steps: list[Step], window: int) -> Step:
    """Of a round, a step's share of the median rollout and what follows until the next."""
    parts = [steps[i : i + window] for i in range(0, len(steps), window)]
    each = [statistics.median(sum(s[i] for s in part) / window for part in parts) for i in (0, 1)]
    return Step(each[0], each[1], *(statistics.mean(s[i] for s in steps) for i in (2, 3)))


def compare(ours: First | None, theirs: First | None, exact: bool) -> None:
    """Raises EtudeError where TRL's first step is another than ours. `exact`: in fp32, without experts, whose auxiliary
    loss is defined otherwise there."""
    assert ours is not None and theirs is not None
    if ours.sequences != theirs.sequences:
        raise EtudeError("TRL's first batch holds other tokens than ours: not the same is computed")
    loss, norm = abs(ours.loss - theirs.loss), abs(ours.norm / theirs.norm - 1)
    if exact and not (loss <= LOSS and norm <= NORM):
        raise EtudeError(
            f"the first step's loss is {ours.loss:.7f} and TRL's {theirs.loss:.7f}, its gradient's norm {ours.norm:.6f} and {theirs.norm:.6f}: not the same is computed"
        )


# ---------------------------------------------------------------- ours


class Ours:
    """The loop's work on a session in which no token ends a completion: so all are equally long, on both sides."""

    def __init__(self, session: Session):
        session.tokenizer.stop_ids.clear()
        if hasattr(session.strategy, "stop_ids"):
            session.strategy.stop_ids = frozenset()
        if session.ref is None and session.strategy.needs_reference:
            session.ref = session.cached_reference(lambda line: print(line, file=sys.stderr))
        self.session, self.training = session, Training(session)
        experts = any(isinstance(m, MoE) for m in session.model.modules())
        self.exact = session.precision == "fp32" and not experts
        self.first: First | None = None
        self.completions: list[list[int]] = []  # of the first step

    def run(self, steps: int) -> list[Step]:
        found = []
        for _ in range(steps):
            laps = self.training.round(1)
            assert self.training.latest is not None
            batches, metrics, norm = self.training.latest
            if self.first is None:
                self.first = self.begun(batches, metrics, norm.item())
            tokens = sum(b["tokens"].numel() for b in batches)
            learned = sum(int((b["slots"] >= 0).sum()) for b in batches)
            found.append(Step(laps["step"], laps["data"], tokens, learned))
        return found

    def begun(self, batches: list[Batch], metrics: list[dict], norm: float) -> First:
        loaded = loader_batches(self.session, 1)
        if "fields" in loaded[0]:  # of prompts
            self.completions = [ids for b in batches for ids in taken(b)]
            prompts = prompts_of(loaded)
            group = len(self.completions) // len(prompts)
            found = [(prompts[i // group], ids) for i, ids in enumerate(self.completions)]
        else:
            found = sequences_of(loaded)
        router_load(metrics, self.session.world)
        return First(sorted(found), reduce(metrics, self.session.world)["loss"], norm)


def loader_batches(session: Session, steps: int) -> list[Batch]:
    """The loader's micro-batches of the first `steps` steps, of a loader of their own: the session's goes on undisturbed."""
    sampler = session.batches.sampler
    sizes = {"batch_size": sampler.batch_size, "micro_batch_size": sampler.micro_batch_size, "rank": 0, "world_size": 1}
    batches = Batches(session.data, session.prepared, sizes, session.cfg["seed"], session.device)
    with contextlib.closing(batches.steps(0, steps)) as stream:
        return [batch for batches in stream for batch in batches]


def prompts_of(batches: list[Batch]) -> list[list[int]]:
    return [row[ids >= 0].tolist() for b in batches for row, ids in zip(b["tokens"].cpu(), b["doc_ids"].cpu())]


def sequences_of(batches: list[Batch]) -> list[Sequence]:
    """Of a loader's batches; what follows the last learned token is left out."""
    found = []
    for row in (row for batch in batches for row in rows_of(batch)):
        places = row.learned.nonzero()[:, 0].tolist()
        if not places or places[-1] - places[0] >= len(places):
            raise Refusal("TRL learns one answer behind one prompt; choose data without earlier or empty answers")
        ids = row.ids.tolist()
        found.append((ids[: places[0]], ids[places[0] : places[-1] + 1]))
    return found


def taken(batch: Batch) -> list[list[int]]:
    """The learned ids of each sequence of a collected batch, in any layout."""
    ids, there = batch["targets"].flatten()[batch["slots"].clamp_min(0)], batch["slots"] >= 0
    return [row[mask].tolist() for row, mask in zip(ids.cpu(), there.cpu())]


# ---------------------------------------------------------------- TRL


class TRL:
    """TRL's trainer with our weights, and our batches in our order. Its logging, saving, progress bar and gradient
    checkpointing are off, and it is given ids: in its steps nothing is encoded."""

    def __init__(self, cfg: dict, session: Session, folder: Path):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.cfg, self.session, self.folder = cfg, session, folder
        self.grpo = "group_size" in cfg["strategy"]
        self.samples = cfg["batch_size"] * cfg["strategy"].get("group_size", 1)
        self.total = cfg["warmup_steps"] + cfg["rounds"] * cfg["steps"]
        self.completions: list[list[int]] = []  # to take in the first rollout
        self.first: First | None = None
        self.seen: list[tuple[dict, float]] = []  # what losses of the first step were computed of, and they
        self.steps: list[Step] = []
        self.clear()
        self.norm = math.nan
        self.trainer = self.made()

    def clear(self) -> None:
        """A step begins."""
        self.begin, self.before, self.tokens, self.learned = time.perf_counter(), 0.0, 0, 0

    def made(self) -> Any:
        from datasets import Dataset, disable_progress_bars
        from transformers import AutoTokenizer

        disable_progress_bars()
        model = self.exported()
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "theirs")
        given = loader_batches(self.session, self.session.window.data_step(self.total))
        if self.grpo:
            from trl import GRPOTrainer

            data = Dataset.from_list([{"prompt": ids} for ids in prompts_of(given)])
            trainer = timed(GRPOTrainer, self)(
                model=model,
                reward_funcs=[judge],
                args=self.grpo_settings(),
                train_dataset=data,
                processing_class=tokenizer,
            )
            trainer.eos_token_ids = []
            return trainer
        from trl import DPOTrainer

        found = sequences_of(given)
        pairs = [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for (prompt, chosen), (other, rejected) in zip(found[::2], found[1::2])
            if prompt == other
        ]
        if 2 * len(pairs) != len(found):
            raise Refusal("TRL wants one prompt of both answers; in this data they differ before what is learned")
        data = Dataset.from_list(pairs)
        args = self.dpo_settings()
        return timed(DPOTrainer, self)(model=model, args=args, train_dataset=data, processing_class=tokenizer)

    def exported(self) -> Any:
        """Our weights in transformers, by way of a folder that convert.py would write. Raises Refusal for a model that it
        has no architecture for."""
        from transformers import AutoModelForCausalLM

        ours, theirs, s = self.folder / "ours", self.folder / "theirs", self.session
        theirs.mkdir()
        tensors = weights.model_tensors(s.model)
        checkpoint.save(
            ours, {"model.safetensors": tensors, "config.json": saving.model_config(s), **s.tokenizer.files()}
        )
        with StopSignals() as signals:
            writer = convert.Writer(theirs, 2**32, torch.float32, signals)
            convert.to_hugging_face(ours, writer, self.cfg["trusted"])
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(theirs, dtype=torch.float32, attn_implementation="sdpa")
        model.generation_config.eos_token_id = None
        for p in model.parameters():  # memory of its own, as ours has, and not a file's
            p.data = p.data.clone()
        return model

    def settings(self) -> dict[str, Any]:
        """What both trainers are told."""
        cfg, optimizer, cuda = self.cfg, self.cfg["optimizer"], self.session.device.type == "cuda"
        return {
            "output_dir": str(self.folder / "trl"),
            "max_steps": self.total,
            "gradient_accumulation_steps": self.session.batches.micro_batches,
            "learning_rate": optimizer["lr"],
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "adam_beta1": optimizer["betas"][0],
            "adam_beta2": optimizer["betas"][1],
            "adam_epsilon": optimizer["eps"],
            "weight_decay": optimizer["weight_decay"],
            "max_grad_norm": cfg["clip"] or math.inf,
            "bf16": self.session.precision == "bf16",
            "use_cpu": self.session.device.type == "cpu",
            "torch_compile": cfg["compile"],
            "gradient_checkpointing": False,
            "disable_dropout": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": cuda,
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": cfg["seed"],
        }

    def dpo_settings(self) -> Any:
        from trl import DPOConfig

        s = self.cfg["strategy"]
        terms = s["loss"] if isinstance(s["loss"], dict) else {s["loss"]: 1.0}
        return DPOConfig(
            **self.settings(),
            per_device_train_batch_size=self.session.batches.sampler.micro_batch_size,
            train_sampling_strategy="sequential",
            loss_type=[str(LOSSES.get(name, name)) for name in terms],
            loss_weights=list(terms.values()),
            beta=s["beta"],
            label_smoothing=s["label_smoothing"],
            max_length=None,
            pad_to_multiple_of=self.few_shapes(ROUND),
            precompute_ref_log_probs=self.cfg["reference"] == "cached",
        )

    def grpo_settings(self) -> Any:
        from trl import GRPOConfig

        s = self.cfg["strategy"]
        return GRPOConfig(
            **self.settings(),
            per_device_train_batch_size=self.session.batches.sampler.micro_batch_size * s["group_size"],
            steps_per_generation=self.session.batches.micro_batches,
            num_generations=s["group_size"],
            num_iterations=s["iterations"],
            shuffle_dataset=False,
            max_completion_length=s["max_completion"],
            temperature=s["temperature"],
            generation_kwargs={"eos_token_id": None},
            loss_type=s["reduction"],
            epsilon=s["clip_low"],
            epsilon_high=s["clip_high"],
            delta=s["delta"],
            beta=s["beta"],
            use_bias_correction_kl=s["kl_weighted"],
            scale_rewards=s["scale"],
            pad_to_multiple_of=self.few_shapes(8),  # prompts and completions, each by itself
        )

    def few_shapes(self, multiple: int) -> int | None:
        """oneDNN compiles a bf16 product for each new shape: padded to few of them, TRL's steps take less time or as much."""
        return multiple if self.session.precision == "bf16" else None

    def train(self, our_turn: Callable[[], None]) -> None:
        """All steps; `our_turn` is called before each round."""
        from transformers import PrinterCallback, TrainerCallback

        warmup, steps, side = self.cfg["warmup_steps"], self.cfg["steps"], self

        class Turns(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if side.session.device.type == "cuda":
                    torch.cuda.synchronize(side.session.device)
                seconds = time.perf_counter() - side.begin
                side.steps.append(Step(seconds, side.before, side.tokens, side.learned))
                done = len(side.steps)
                if done == 1:
                    side.first = side.begun()
                if warmup <= done < side.total and (done - warmup) % steps == 0:
                    our_turn()
                side.clear()

        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Turns())
        self.trainer.train()

    def saw(self, inputs: dict[str, Tensor], loss: Tensor) -> None:
        """A loss is computed."""
        self.tokens += sum(inputs[n].numel() for n in ("input_ids", "prompt_ids", "completion_ids") if n in inputs)
        self.learned += int(inputs["completion_mask"].sum())
        if self.first is None:
            self.seen.append((inputs, loss.item()))

    def begun(self) -> First:
        found: list[Sequence] = []
        for inputs, _ in self.seen:
            if self.grpo:
                prompts = kept(inputs["prompt_ids"], inputs["prompt_mask"])
                found += zip(prompts, kept(inputs["completion_ids"], inputs["completion_mask"]))
            else:
                ids, learned = inputs["input_ids"], inputs["completion_mask"]
                prompts = kept(ids, inputs["attention_mask"] - learned)
                found += zip(prompts, kept(ids, learned))
        losses = [loss for _, loss in self.seen]
        self.seen.clear()
        return First(sorted(found), sum(losses) if self.grpo else statistics.mean(losses), self.norm)


def kept(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[there.bool()].tolist() for row, there in zip(ids.cpu(), mask.cpu())]


def judge(prompts: list[list[int]], completions: list[str], **kwargs: Any) -> list[float]:
    """`varied` as TRL calls rewards."""
    return [varied(text, {}) for text in completions]


def timed(base: type, side: TRL) -> type:
    """A trainer of TRL's that takes ids, tells `side` what it does, and nobody else."""

    class Timed(base):  # type: ignore[misc, valid-type]
        def _send_telemetry(self) -> None:
            pass

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _tokenize_prompts(self, prompts: Any) -> Any:
            return prompts, None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            if side.completions:
                made, side.completions = side.completions, []
                return made, None
            return super()._generate_single_turn(*args, **kwargs)

        def get_batch_samples(self, *args: Any) -> Any:
            start = time.perf_counter()
            found = super().get_batch_samples(*args)
            side.before += time.perf_counter() - start
            return found

        def _prepare_inputs(self, inputs: Any) -> Any:
            start = time.perf_counter()
            made = super()._prepare_inputs(inputs)
            side.before += time.perf_counter() - start
            return made

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            side.saw(inputs, loss)
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            side.norm = float(norm)
            return norm

    return Timed

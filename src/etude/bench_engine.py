"""Measurements of the inference engine against transformers and llama.cpp: the same weights, token ids, threads and machine,
greedy, stop tokens ignored, in turn in every round. All rates are medians over rounds, ratios medians of the rounds' own."""

import functools
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etude import checkpoint
from etude import config as conf
from etude.errors import EtudeError, Refusal
from etude.infer import kernels
from etude.infer.cache import PagedCache
from etude.infer.engine import InferenceEngine
from etude.infer.load import load
from etude.infer.request import Request
from etude.infer.sampling import Sampling
from etude.interop import convert
from etude.model.mla import MLA
from etude.model.moe import MoE
from etude.model.weights import DTYPES
from etude.parallel import StopSignals

TEXT = "Once upon a time there was a little ship that sailed from one island to the next. Every morning its captain"
SHORT = 16  # tokens of the prompts before tokens are counted one by one
AGREE = 32  # tokens that must be the same in fp32
READ = 100_000_000  # numbers of 4 bytes, far more than any cache of a processor holds
# Ways of transformers to do many requests: generate_batch with so many tokens a step and requests at once, and `generate` of
# so many requests of about one length, padded. Which is fastest depends on the machine: each is tried on half of them.
PAGED = ((512, 4), (512, 8), (512, 16))
PADDED = (4, 8, 16)
PAGE = 64  # positions of a page of generate_batch; its own choice of their number would fill the machine's memory


class Made(NamedTuple):
    """What one call made: new ids of each prompt; seconds until every prompt had its first, and in all; tokens after that."""

    ids: list[list[int]]
    first: float
    seconds: float
    later: int

    @property
    def rate(self) -> float:
        """Tokens a second once all prompts are processed."""
        return self.later / (self.seconds - self.first)


Make = Callable[[list[list[int]], list[int]], Made]  # prompts, new tokens of each
Way = Callable[["Job"], float]  # -> seconds


class Job(NamedTuple):
    """Requests that come at once: prompts, and how many tokens are wanted of each."""

    prompts: list[list[int]]
    new: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(self.new)


class Work(NamedTuple):
    """What is timed: one sample, so many together, one long prompt, many requests, two of one beginning."""

    one: Job
    together: dict[int, Job]
    long: Job
    many: Job
    pair: tuple[Job, Job]


Rates = dict[tuple[str, str], float]  # of (measure, whose), tokens a second; ours are whose ""


def engine_rates(cfg: dict) -> dict[str, Any]:
    """All figures of what=engine."""
    _check(cfg)
    parallel = conf.build(cfg["parallel"])
    if getattr(parallel, "nproc", 1) > 1:
        raise Refusal("bench.py times one process; use parallel=single")
    with parallel.world(cfg["threads"]) as world:
        engine = load(cfg["ckpt"], world.device.type, cfg["dtype"], cfg["trusted"], cfg["engine"])
        _check_lengths(cfg, engine)
        peers: dict[str, Any] = {}
        if cfg["peer"] == "transformers":
            peers["transformers"] = Transformers(cfg, world.device)
        if cfg["gguf"] is not None:
            peers["llama_cpp"] = LlamaCpp(cfg, engine.vocab_size)
        return _measure(cfg, engine, peers)


def _check(cfg: dict) -> None:
    """Raises Refusal for settings that cannot be measured, before anything is loaded."""
    if cfg["ckpt"] is None:
        raise Refusal("what=engine needs weights: type ckpt=<runs/<run>, a checkpoint folder or an export>")
    for name in ("decode_tokens", "prompt_tokens", "prefix_tokens", "requests"):
        if cfg[name] < 2:
            raise Refusal(f"{name}={cfg[name]} should be at least 2")
    for name in ("prompt_lengths", "new_lengths"):
        if len(cfg[name]) != 2 or not 1 <= cfg[name][0] <= cfg[name][1]:
            raise Refusal(f"{name}={conf.show(cfg[name])} should be a least and a greatest length, such as [32,128]")
    if any(not 1 <= b <= cfg["engine"]["max_running"] for b in cfg["decode_batches"]):
        raise Refusal(
            f"decode_batches={conf.show(cfg['decode_batches'])} should be from 1 to engine.max_running={cfg['engine']['max_running']}"
        )
    if cfg["peer"] == "transformers" and importlib.util.find_spec("transformers") is None:
        raise Refusal("peer=transformers is not installed: pip install transformers, or type peer=none")
    if cfg["gguf"] is not None:
        if not Path(cfg["gguf"]).expanduser().is_file():
            raise Refusal(f"gguf={cfg['gguf']} is no file; give the .gguf file of the same weights")
        if importlib.util.find_spec("llama_cpp") is None:
            raise Refusal("gguf= is timed with llama.cpp: pip install llama-cpp-python, or leave gguf= out")


def _check_lengths(cfg: dict, engine: InferenceEngine) -> None:
    longest = {
        "prompt_lengths": cfg["prompt_lengths"][1] + cfg["new_lengths"][1],
        "prefix_tokens": cfg["prefix_tokens"] + SHORT + 1,
        "prompt_tokens": cfg["prompt_tokens"] + 1,
        "decode_tokens": SHORT + cfg["decode_tokens"],
    }
    for name, length in longest.items():
        if length > engine.model.max_len:
            raise Refusal(
                f"{name}={conf.show(cfg[name])} comes to {length} positions, this model was made for {engine.model.max_len}; type a smaller {name}"
            )
    most = max(cfg["requests"], *cfg["decode_batches"], 1)
    if most > engine.settings.max_waiting:
        raise Refusal(f"{most} requests at once need engine.max_waiting={most}")


def _work(cfg: dict, engine: InferenceEngine) -> Work:
    """Random tokens, so that nothing but the pair has a beginning in common; the one sample goes on with a text where the
    tokenizer can encode one, since how many tokens are the same says little behind random ones."""
    rng = random.Random(cfg["seed"])
    ids = lambda n: [rng.randrange(engine.vocab_size) for _ in range(n)]  # noqa: E731
    try:
        text = engine.tokenizer.encode(TEXT)
    except Refusal:
        text = []
    new, n, (low, high) = cfg["decode_tokens"], cfg["requests"], cfg["prompt_lengths"]
    lengths = [low + (high - low) * i // (n - 1) for i in range(n)]
    rng.shuffle(lengths)
    prefix = ids(cfg["prefix_tokens"])
    return Work(
        one=Job([(text + ids(SHORT))[:SHORT]], [new]),
        together={b: Job([ids(SHORT) for _ in range(b)], [new] * b) for b in cfg["decode_batches"]},
        long=Job([ids(cfg["prompt_tokens"])], [1]),
        many=Job([ids(length) for length in lengths], [rng.randint(*cfg["new_lengths"]) for _ in lengths]),
        pair=(Job([prefix + ids(SHORT)], [1]), Job([prefix + ids(SHORT)], [1])),
    )


def _measure(cfg: dict, engine: InferenceEngine, peers: dict[str, Any]) -> dict[str, Any]:
    work = _work(cfg, engine)
    sides: dict[str, Make] = {"": functools.partial(ours, engine)} | {name: p.make for name, p in peers.items()}
    texts = {}
    for who, make in sides.items():  # first calls compile and allocate
        texts[who] = make(*work.one).ids[0]
        make(*work.long)
    same = {who: _common(texts[""], text) for who, text in texts.items() if who}
    exact = cfg["dtype"] == "fp32" and engine.settings.quant is None
    if exact and same.get("transformers", AGREE) < min(AGREE, cfg["decode_tokens"]):
        raise EtudeError(f"transformers' token {same['transformers'] + 1} is another: not the same is computed")
    ours(engine, *work.many)
    ways = peers["transformers"].ways() if "transformers" in peers else {}
    half = Job(work.many.prompts[::2], work.many.new[::2])
    tried = {kind: {name: way(half) for name, way in found.items()} for kind, found in ways.items()}
    best = {kind: min(seconds, key=lambda name: seconds[name]) for kind, seconds in tried.items()}

    rates: list[Rates] = []
    firsts: list[tuple[float, float]] = []
    read: list[float] = []
    for _ in range(cfg["rounds"]):
        read.append(read_rate(engine.device))
        rates.append(_round(work, sides, {kind: ways[kind][name] for kind, name in best.items()}))
        firsts.append(prefix_seconds(engine, *work.pair))

    median = {key: statistics.median(r[key] for r in rates) for key in rates[0]}
    result: dict[str, Any] = {
        "model": Path(cfg["ckpt"]).name,
        "parameters": engine.model.n_params(),
        "device": f"{engine.device.type}, {torch.get_num_threads()} threads",
        "dtype": cfg["dtype"],
        "quant": engine.settings.quant,
        "attention": engine.backend,
        **{f"{name}_version": peer.version for name, peer in peers.items()},
    }
    for (measure, who), rate in median.items():
        result[f"{who}_{measure}_tokens_per_s".lstrip("_")] = rate
        if who:
            ratio = statistics.median(r[measure, ""] / r[measure, who] for r in rates)
            result[f"{measure}_ratio_to_{who}"] = ratio
    result |= {f"same_tokens_as_{name}": n for name, n in same.items()}
    for kind, seconds in tried.items():
        result[f"{kind}_best_of"] = {name: round(half.tokens / s, 1) for name, s in seconds.items()}
    weights, cache = weight_bytes(engine), cache_bytes(engine, SHORT + cfg["decode_tokens"] / 2)
    result["mb_per_token"] = (weights + cache) / 1e6
    result["read_gb_per_s"] = max(read)
    result["bandwidth_share"] = (weights + cache) * median["decode", ""] / (max(read) * 1e9)
    result["first_request_ms"], result["second_request_ms"] = (statistics.median(t) * 1e3 for t in zip(*firsts))
    result["prefix_ratio"] = statistics.median(a / b for a, b in firsts)
    return result


def _round(work: Work, sides: dict[str, Make], ways: dict[str, Way]) -> Rates:
    """Everything but the pair once, side by side."""
    rates: Rates = {("decode", who): make(*work.one).rate for who, make in sides.items()}
    for who, make in sides.items():
        rates["prompt", who] = len(work.long.prompts[0]) / make(*work.long).first
    for b, job in work.together.items():
        for who in [s for s in sides if s != "llama_cpp"]:
            rates[f"batch_{b}", who] = sides[who](*job).rate
    rates["requests", ""] = work.many.tokens / sides[""](*work.many).seconds
    for kind, way in ways.items():
        rates["requests", kind] = work.many.tokens / way(work.many)
    return rates


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- ours


def ours(engine: InferenceEngine, prompts: list[list[int]], new: list[int], forget: bool = True) -> Made:
    """All requests at once, step by step in this thread. `forget`: with nothing cached of an earlier call."""
    if forget:
        engine.pool.forget()
    greedy = Sampling(temperature=0.0)
    start = time.perf_counter()
    requests = [Request(prompt=p, max_tokens=n, sampling=greedy, ignore_stop_ids=True) for p, n in zip(prompts, new)]
    made: dict[str, list[int]] = {engine.add_request(r): [] for r in requests}
    first, before = 0.0, 0
    while engine.has_work():
        for piece in engine.step():
            if piece.error is not None:
                raise EtudeError(piece.error)
            made[piece.request] += [t.id for t in piece.tokens]
        if not first and all(made.values()):
            first, before = time.perf_counter() - start, sum(map(len, made.values()))
    seconds = time.perf_counter() - start
    return _made(list(made.values()), new, first, seconds, before)


def _made(ids: list[list[int]], new: list[int], first: float, seconds: float, before: int) -> Made:
    """Raises EtudeError where not all tokens were made: then the time would be of something else."""
    if [len(i) for i in ids] != new:
        raise EtudeError(f"{sum(new)} tokens were asked for and {sum(map(len, ids))} were made")
    return Made(ids, first, seconds, sum(new) - before)


def prefix_seconds(engine: InferenceEngine, first: Job, second: Job) -> tuple[float, float]:
    """Until the first token of each of two requests with one beginning, one after the other."""
    return ours(engine, *first).first, ours(engine, *second, forget=False).first


def weight_bytes(engine: InferenceEngine) -> float:
    """Bytes of weights that a token is multiplied with, as they are stored, scales with them: not what is only looked up
    (position tables, an untied embedding), not experts that it does not visit."""
    model = engine.model
    linear = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    exact = {id(m.router.weight) for m in model.modules() if isinstance(m, MoE)}  # fp32
    exact |= {id(m.bias) for m in model.modules() if isinstance(m, MoE)}
    whole = {id(m.kv_up.weight) for m in model.modules() if isinstance(m, MLA)}  # absorbed: not quantised
    share = {id(p): m.top_k / m.n_experts for m in model.modules() if isinstance(m, MoE) for p in (m.gate_up, m.out)}
    tables = {id(t.weight) for t in (model.embed, model.pos_embed) if t is not None} - {id(model.head.weight)}
    total = 0.0
    for p in model.parameters():
        if id(p) in tables:
            continue
        matrix = (id(p) in linear or id(p) in share) and id(p) not in whole
        if id(p) in exact:
            total += 4 * p.numel()
        elif engine.settings.quant == "int8" and matrix:
            total += _int8_bytes(p) * share.get(id(p), 1.0)
        else:
            total += p.numel() * engine.dtype.itemsize * share.get(id(p), 1.0)
    return total


def _int8_bytes(weight: Tensor) -> int:
    """Of kernels.quantize: rows filled up to 16, inputs to groups that share a scale of two bytes."""
    *experts, rows, inputs = weight.shape
    groups = -(-rows // 16) * 16 * -(-inputs // kernels.GROUP)
    return (experts[0] if experts else 1) * groups * (kernels.GROUP + 2)


def cache_bytes(engine: InferenceEngine, positions: float) -> float:
    """Bytes of keys and values that one token looks at behind so many positions."""
    windows = [getattr(a, "window", None) for a in engine.model.attentions()]
    shapes = [a.cache_shape() for a in engine.model.attentions()] if engine.cached else []
    each = (PagedCache.bytes_per_token([shape], engine.dtype) for shape in shapes)
    return sum(size * min(positions, window or positions) for size, window in zip(each, windows))


def read_rate(device: torch.device) -> float:
    """GB a second at which this machine's threads read 400 MB: the best of several passes."""
    x = torch.ones(READ, device=device)

    def seconds(read: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        read(x).item()
        return time.perf_counter() - start

    return x.nbytes / 1e9 / min(seconds(read) for _ in range(4) for read in (torch.sum, torch.amax, _square))


def _square(x: Tensor) -> Tensor:
    return torch.dot(x, x)


# ---------------------------------------------------------------- transformers


class Stamps:
    """What `generate` calls a streamer with: its prompts, then each step's new tokens (B,)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """The same weights in transformers, by way of a folder that convert.py would write. Raises Refusal for a model that
    it has no architecture for."""

    def __init__(self, cfg: dict, device: torch.device):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version, self.device = transformers.__version__, device
        dtype = DTYPES[cfg["dtype"]]
        with tempfile.TemporaryDirectory() as folder, StopSignals() as signals:
            writer = convert.Writer(Path(folder), 2**32, dtype, signals)
            try:
                convert.to_hugging_face(checkpoint.find(cfg["ckpt"]), writer, cfg["trusted"])
            except Refusal as error:
                raise Refusal(f"{error}; type peer=none to time this model alone") from None
            auto: Any = transformers.AutoModelForCausalLM
            self.model = auto.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
            for p in self.model.parameters():  # memory of its own, as ours has, and not a file's
                p.data = p.data.clone()
        # What a call is not told is looked up here: no token ends a text.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def ways(self) -> dict[str, dict[str, Way]]:
        """Ways of doing many requests, of two kinds."""
        paged: dict[str, Way] = {
            f"{t}_tokens_{r}_requests": functools.partial(self.paged, tokens=t, rows=r) for t, r in PAGED
        }
        padded: dict[str, Way] = {f"{r}_rows": functools.partial(self.padded, rows=r) for r in PADDED}
        return {"generate_batch": paged, "padded_generate": padded}

    @torch.inference_mode()
    def make(self, prompts: list[list[int]], new: list[int]) -> Made:
        """Prompts of one length, with one number of new tokens."""
        stamps = Stamps()
        start = time.perf_counter()
        tokens = torch.tensor(prompts, device=self.device)
        out = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new[0], streamer=stamps
        )
        ids = out[:, tokens.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        return _made(ids, new, stamps.times[1] - start, seconds, len(prompts))

    @torch.inference_mode()
    def padded(self, work: Job, rows: int) -> float:
        """Seconds: in batches of prompts of about one length, each as long as its longest row."""
        order = sorted(range(len(work.prompts)), key=lambda i: len(work.prompts[i]))
        start = time.perf_counter()
        for at in range(0, len(order), rows):
            batch = order[at : at + rows]
            width = max(len(work.prompts[i]) for i in batch)
            short = [width - len(work.prompts[i]) for i in batch]
            tokens = torch.tensor([[0] * n + work.prompts[i] for n, i in zip(short, batch)], device=self.device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in short], device=self.device)
            self.model.generate(tokens, attention_mask=mask, max_new_tokens=max(work.new[i] for i in batch)).tolist()
        return time.perf_counter() - start

    def paged(self, work: Job, tokens: int, rows: int) -> float:
        """Seconds of what generate_batch does, with each request's own number of new tokens; its cache is made before."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        how = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=sum(-(-(len(p) + n) // PAGE) + 1 for p, n in zip(work.prompts, work.new)),
            max_batch_tokens=tokens,
            max_requests_per_batch=rows,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        lengths: dict[int, int] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=how, timeout=5, warmup=False
        ) as manager:
            start = time.perf_counter()
            for i, (prompt, n) in enumerate(zip(work.prompts, work.new)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=n)
            while len(lengths) < len(work.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    lengths[int(result.request_id)] = len(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise EtudeError(
                        f"transformers' generate_batch ended early: {manager.background_thread_status.fatal_error}"
                    )
            seconds = time.perf_counter() - start
        if [lengths[i] for i in range(len(work.new))] != work.new:
            raise EtudeError(f"transformers made {sum(lengths.values())} tokens of {sum(work.new)}")
        return seconds


# ---------------------------------------------------------------- llama.cpp


class LlamaCpp:
    """A .gguf file in llama.cpp, one prompt at a time. Raises Refusal for a file of another vocabulary."""

    def __init__(self, cfg: dict, vocab_size: int):
        import llama_cpp

        self.version = llama_cpp.__version__
        self.get_logits = llama_cpp.llama_get_logits_ith
        longest = max(SHORT + cfg["decode_tokens"], cfg["prompt_tokens"] + 1)
        threads = torch.get_num_threads()
        try:
            self.model = llama_cpp.Llama(
                str(Path(cfg["gguf"]).expanduser()),
                n_ctx=longest,
                n_batch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise Refusal(f"llama.cpp cannot read gguf={cfg['gguf']}: {error}") from None
        if self.model.n_vocab() != vocab_size:
            raise Refusal(
                f"gguf={cfg['gguf']} has a vocabulary of {self.model.n_vocab()}, ckpt= of {vocab_size}: give the file of the same model"
            )
        self.vocab_size = vocab_size

    def make(self, prompts: list[list[int]], new: list[int]) -> Made:
        import numpy as np

        [prompt], [n] = prompts, new
        self.model.reset()
        start = time.perf_counter()
        ids: list[int] = []
        first = 0.0
        for _ in range(n):
            self.model.eval(prompt if not ids else ids[-1:])
            logits = np.ctypeslib.as_array(self.get_logits(self.model.ctx, -1), shape=(self.vocab_size,))
            ids.append(int(logits.argmax()))
            first = first or time.perf_counter() - start
        return _made([ids], new, first, time.perf_counter() - start, 1)

"""Decoding by recorded forwards: what is replayed at fixed addresses in fixed shapes is what the model computes, and where
it is not, or cannot be recorded, nothing is lost but time. On the CPU a recording keeps what a CUDA graph keeps: which
operations ran, on which memory."""

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine import CHOICES, TOKENIZER, TOLD, at_rest, engine, naive, ragged
from test_model import V, made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etude.errors import Refusal
from etude.infer import cache, graphs
from etude.infer.cache import Chunk, PagedCache
from etude.infer.engine import InferenceEngine, Settings
from etude.infer.graphs import Graphs
from etude.infer.pages import PagePool
from etude.infer.request import Request
from etude.infer.sampling import Sampling
from etude.model.transformer import Transformer

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")


class Recording(TorchDispatchMode):
    """The operations of a forward, to be run again on the very tensors they had: a number that Python read, and an
    operation that was left out because its result was remembered, stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            write(result, func(*args, **kwargs))


def write(to: Any, new: Any) -> None:
    if isinstance(to, Tensor):
        if to.data_ptr() != new.data_ptr():  # a view of what is there, or written in place
            to.copy_(new)
    elif isinstance(to, (list, tuple)):
        for t, n in zip(to, new, strict=True):
            write(t, n)


def record(forward: Callable[[], Tensor]) -> graphs.Replay:
    """What graphs.on_cuda does."""
    forward()
    with Recording() as recording:
        out = forward()

    def replay() -> Tensor:
        recording.replay()
        return out

    return replay


def with_graphs(
    m: Transformer, pages: int | None = None, capture: graphs.Capture = record, **settings: Any
) -> InferenceEngine:
    """An engine whose single tokens are replayed, and whose cache is NaN where nothing was written."""
    e = engine(m, pages, **({"attention": "padded"} | settings))
    e.graphs = e._graphs(lambda: capture)
    for layer in e.cache.layers:
        for t in (layer.k, layer.v):
            if t is not None:
                t[: e.cache.spare] = torch.nan
    return e


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets from one page on."""
    monkeypatch.setattr(graphs, "FEWEST", 4)


def close_to_forward(m: Transformer, prompt: list[int], c: Any) -> None:
    """Tokens are the plain forward's best, log-probabilities its own, to 1e-4."""
    n = len(c.ids)
    assert c.ids == naive(m, prompt, n)
    with torch.no_grad():
        expected = m(torch.tensor([prompt + c.ids[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor([t.logprob for t in c.tokens]), expected[range(n), c.ids], rtol=1e-4, atol=1e-4
    )


# Without experts, which cannot be recorded.
STATIC = ["dense", "gpt", "attn=mla", "attn=mla_q_lora", "attn=local", "attn=gated", "gpt window", "rope=yarn"]


@pytest.mark.parametrize("choice", STATIC)
def test_replays_are_the_forward(choice: str, narrow: None) -> None:
    """Mixed lengths, tables that grow over pages and buckets, batches that shrink and grow, preemption, windows, latent
    caches, learned and rotary positions; in no step a warning."""
    m = made(*CHOICES[choice], n_layers=3)
    rng = random.Random(0)
    e = with_graphs(m, pages=15, max_running=6)
    assert e.graphs is not None and e.graphs.rows == 6
    buckets: set[tuple[int, int]] = set()
    for sizes, n in (([5, 1, 9, 3, 2], 14), ([7], 9), ([2, 12, 4, 1, 1, 6, 3], 11)):
        prompts = ragged(rng, sizes)
        for prompt, c in zip(prompts, e.generate(prompts, sampling=TOLD, max_tokens=n), strict=True):
            close_to_forward(m, prompt, c)
        buckets |= set(e.graphs.made)
    assert e.graphs.off is None and e.graphs.replays > 20
    assert len({rows for rows, _ in buckets}) > 2 and len({pages for _, pages in buckets}) > 2, buckets
    if e.window is None:
        assert e.stats()["preemptions"] > 0
    at_rest(e)


@pytest.mark.parametrize("choice", ["dense", "attn=mla", "attn=local", "gpt window", "window", "deepseek_v3"])
def test_padded_without_graphs(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs without a paged kernel: any model, several groups of lengths a step."""
    monkeypatch.setattr(cache, "SPAN", 32)
    m = made(*CHOICES[choice], n_layers=3)
    prompts = ragged(random.Random(1), [18, 1, 2, 9, 3, 3])
    e = engine(m, attention="padded")
    assert e.graphs is None  # there is no CUDA here
    for prompt, c in zip(prompts, e.generate(prompts, sampling=TOLD, max_tokens=8), strict=True):
        close_to_forward(m, prompt, c)
    at_rest(e)


def test_several_samples_stop_at_once_and_others_join(narrow: None) -> None:
    """By hand: requests that come and go between steps; rows move, and none sees another's pages."""
    m = made("dense")
    rng = random.Random(2)
    e = with_graphs(m, max_running=8)
    prompts = {}
    found: dict[str, list[int]] = {}
    for at in range(60):
        if at % 4 == 0 and at < 40:
            (prompt,) = ragged(rng, [rng.randrange(1, 8)])
            name = e.add_request(Request(prompt=prompt, max_tokens=rng.randrange(3, 25), sampling=TOLD))
            prompts[name], found[name] = prompt, []
        if at == 22:
            gone = next(iter(s.name for s in e.scheduler.running))
            e.abort(gone)
            del prompts[gone], found[gone]
        for piece in e.step():
            found[piece.request] += [t.id for t in piece.tokens]
    while e.has_work():
        for piece in e.step():
            found[piece.request] += [t.id for t in piece.tokens]
    assert len(prompts) == 9 and all(found[n] == naive(m, p, len(found[n])) for n, p in prompts.items())
    assert e.graphs is not None and e.graphs.replays > 20
    at_rest(e)


def test_new_weights_need_new_graphs() -> None:
    """After refresh nothing of the old recordings is used: in them lie the old weights."""
    m = made("dense")
    (prompt,) = ragged(random.Random(3), [6])
    started = []
    e = with_graphs(m)
    e.graphs = e._graphs(lambda: started.append(1) or record)
    for seed in (1, 2):
        (c,) = e.generate([prompt], sampling=TOLD, max_tokens=8)
        close_to_forward(m, prompt, c)
        assert len(e.graphs.made) == 1 and len(started) == seed
        m.load_state_dict(made("dense", seed=seed).state_dict())
        e.refresh()
        assert not e.graphs.made and e.graphs.twin is e.twin


@pytest.mark.parametrize("choice", ["moe", "deepseek_v3"])
def test_what_python_has_to_read_is_not_recorded(choice: str) -> None:
    """Experts' loads are data: one warning that says so, right results, and no second try, not even after refresh."""
    m = made(choice)
    prompts = ragged(random.Random(4), [5, 3])
    e = with_graphs(m)
    with pytest.warns(RuntimeWarning, match=r"no CUDA graphs: the model's forward cannot be recorded \(aten") as warned:
        first = e.generate(prompts, sampling=TOLD, max_tokens=6)
    assert len(warned) == 1
    e.refresh()
    for prompt, *completions in zip(prompts, first, e.generate(prompts, sampling=TOLD, max_tokens=6)):
        for c in completions:
            close_to_forward(m, prompt, c)
    assert e.graphs is not None and not e.graphs.made and e.graphs.replays == 0


def remembers(forward: Callable[[], Tensor]) -> graphs.Replay:
    """A recording that does not look at its inputs again."""
    out = forward().clone()
    return lambda: out


def fails(forward: Callable[[], Tensor]) -> graphs.Replay:
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")


def writes_elsewhere(forward: Callable[[], Tensor]) -> graphs.Replay:
    """A graph that spoils the keys of the tokens it computes, which the eager forward has to write again."""

    def replay() -> Tensor:
        out = forward()
        batch = seen[-1].batch
        for layer in seen[-1].layers:
            layer.k[batch.slots] = 3.0
        return out + 1

    return replay


seen: list[PagedCache] = []


@pytest.mark.parametrize(
    "capture,message",
    [
        (remembers, r"the graph of 2 rows is .* off, at most 0.0001 is rounding"),
        (fails, r"recording failed \(OutOfMemoryError: CUDA out of memory\.\)"),
        (writes_elsewhere, "the graph of 2 rows is"),
    ],
)
def test_a_wrong_graph_costs_a_warning(capture: graphs.Capture, message: str) -> None:
    """One; results are the forward's from the first token on."""
    m = made("dense")
    prompts = ragged(random.Random(5), [5, 3])
    e = with_graphs(m, capture=capture)
    seen.append(e.cache)
    with pytest.warns(RuntimeWarning, match=message) as warned:
        found = e.generate(prompts, sampling=TOLD, max_tokens=12)
    assert len(warned) == 1 and e.graphs is not None and not e.graphs.made
    for prompt, c in zip(prompts, found, strict=True):
        close_to_forward(m, prompt, c)


def test_remembered_angles_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """rope.py remembers angles by the identity of the positions: a forward that showed it the same object twice would
    record no angles, and the comparison finds that."""
    real = Graphs._forward
    kept: dict[int, Tensor] = {}

    def careless(self: Graphs, rows: int, pages: int) -> Tensor:
        hidden = self.twin.hidden

        def with_kept(tokens: Tensor, positions: Tensor, *rest: Any) -> Any:
            return hidden(tokens, kept.setdefault(rows, positions), *rest)

        self.twin.hidden = with_kept
        try:
            return real(self, rows, pages)
        finally:
            self.twin.hidden = hidden

    monkeypatch.setattr(Graphs, "_forward", careless)
    m = made("dense")
    with pytest.warns(RuntimeWarning, match="the graph of 1 rows is"):
        (c,) = with_graphs(m).generate([[1, 2, 3, 4]], sampling=TOLD, max_tokens=5)
    close_to_forward(m, [1, 2, 3, 4], c)


def test_a_nan_fails_its_own_request() -> None:
    """A row of NaN says nothing of a graph, and the rows beside it are not touched."""
    m = made("dense", "model.tied=false")
    bad = V - 1
    with torch.no_grad():
        m.embed.weight[bad] = torch.nan
    e = with_graphs(m)
    prompts = [[1, 2, 3], [4, 5]]
    allowed = Sampling(temperature=0.0, logit_bias={bad: -100.0})
    forced = Sampling(temperature=0.0, logit_bias={bad: 100.0})
    requests = [Request(prompt=p, max_tokens=8, sampling=s) for p, s in zip(prompts * 2, [allowed] * 2 + [forced] * 2)]
    found = e.generate(requests)
    assert [c.finish for c in found] == ["length"] * 2 + ["error"] * 2
    alone = engine(m).generate(requests[:2])
    assert [c.ids for c in found[:2]] == [c.ids for c in alone]
    assert e.graphs is not None and e.graphs.off is None and e.graphs.replays


# ---------------------------------------------------------------- the pieces


def chunks_of(pool: PagePool, starts: list[int]) -> list[Chunk]:
    found = []
    for start in starts:
        table, _ = pool.open([])
        assert pool.grow(table, start + 1)
        found.append(Chunk(table, start, 1))
    return found


def graphs_of(rows: int, pages: int, page_size: int = 16, backend: str = "varlen") -> tuple[Graphs, PagePool]:
    pool = PagePool(1000, page_size)
    store = PagedCache([(1, 4, 4)], pool, torch.float32, CPU, backend)
    return Graphs(None, store, rows, pages, CPU, lambda: record), pool


def test_buckets() -> None:
    """Powers of two that have room, the largest as large as need be; none for other chunks, too many, or too long."""
    g, pool = graphs_of(rows=12, pages=90)
    least = 256 // 16
    for n, rows in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)):
        assert g.bucket(chunks_of(pool, [3] * n)) == (rows, least)
    for start, pages in ((255, 16), (256, 32), (511, 32), (512, 64), (1024, 90), (1439, 90)):
        assert g.bucket(chunks_of(pool, [3, start])) == (2, pages)
    assert g.bucket(chunks_of(pool, [1440])) is None
    assert g.bucket(chunks_of(pool, [3] * 13)) is None
    table, _ = pool.open([])
    pool.grow(table, 8)
    assert g.bucket([*chunks_of(pool, [3]), Chunk(table, 0, 2)]) is None


def test_copies_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`padded` copies rows x pages: where that is too much no graph is made."""
    monkeypatch.setattr(graphs, "SPAN", 4 * 512)
    g, pool = graphs_of(rows=8, pages=90, backend="padded")
    assert g.bucket(chunks_of(pool, [300] * 4)) == (4, 32)
    assert g.bucket(chunks_of(pool, [300] * 5)) is None and g.bucket(chunks_of(pool, [3] * 5)) == (8, 16)


def test_what_a_graph_reads() -> None:
    """The rows of a step, then the page that is nobody's, whatever was there a step before."""
    g, pool = graphs_of(rows=4, pages=8, page_size=4)
    spare = 1000
    rng = random.Random(6)
    live = chunks_of(pool, [0, 9, 30])
    for step in range(40):
        if rng.random() < 0.4 and live:
            gone = live.pop(rng.randrange(len(live)))
            pool.release(gone.table, [0] * gone.start, 0)
        while len(live) < rng.choice([1, 2, 4]):
            live += chunks_of(pool, [rng.randrange(24)])
        if step % 7 == 0:  # as a window of 4 would
            c = live[0]
            pool.commit(c.table, list(range(c.start)), c.start)
            pool.trim(c.table, max(0, c.start - 4))
        ids = [rng.randrange(V) for _ in live]
        rows = g.bucket(live)
        assert rows is not None
        g.fill(ids, live, rows)
        for i in range(rows[0]):
            tokens, positions, slots = g.numbers[:, i].tolist()
            table = g.tables[i, : rows[1]].tolist()
            if i >= len(live):
                assert (tokens, positions, slots) == (0, 0, spare * 4) and set(table) == {spare}
                continue
            c = live[i]
            assert (tokens, positions) == (ids[i], c.start) and slots == c.table.pages[c.start // 4] * 4 + c.start % 4
            assert table == [p if p >= 0 else spare for p in c.table.pages] + [spare] * (rows[1] - len(c.table.pages))
        for c in [c for c in live if c.start == 30]:
            pool.release(c.table, [0] * 30, 0)
        live = [c._replace(start=c.start + 1) for c in live if c.start < 30]
        assert all(pool.grow(c.table, c.start + 1) for c in live)
    for c in live:
        pool.release(c.table, [0] * c.start, 0)
    every, _ = pool.open([])
    assert pool.grow(every, 4000) and spare not in every.pages and not pool.grow(every, 4001)


def test_distance() -> None:
    """The worst row counts; a NaN counts where there should be a number, and a row that should be NaN does not."""
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0], [torch.nan, 1.0]])
    found = expected.clone()
    assert graphs.distance(found, expected) == 0
    found[0, 0] += 0.5
    assert graphs.distance(found, expected) == pytest.approx(0.1)
    found[1, 1] = torch.nan
    assert graphs.distance(found, expected) == float("inf")
    assert graphs.distance(found[2:], expected[2:]) == 0
    assert graphs.tolerance(torch.bfloat16) == 0.0625 and graphs.tolerance(torch.float32) == 1e-4


@pytest.mark.parametrize(
    "forward,found",
    [
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x * float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.long().abs().bincount(), "bincount"),
        (lambda x: x + x.to("meta").sum(0, keepdim=True).shape[0], "_to_copy"),
        (lambda x: x[torch.arange(2)] * 2.0 + x.new_tensor(1.0), None),
        (lambda x: x.topk(2).values.softmax(0).index_add(0, torch.arange(2), x[:2]), None),
    ],
)
def test_obstacles(forward: Callable[[Tensor], Tensor], found: str | None) -> None:
    """What no graph can hold is found by running it, on any device."""
    why = graphs.obstacle(functools.partial(forward, torch.tensor([1.0, -1.0, 2.0])), CPU)
    assert why is None if found is None else found in (why or "")


# ---------------------------------------------------------------- which kernel


def kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: None, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """What torch 2.13 documents of varlen_attn with pages, in sums that anybody can read."""
    assert {t.dtype for t in (cu_q, seqused_k, block_table)} == {torch.int32} and cu_k is None
    assert (
        k.ndim == 4 and len(seqused_k) == len(block_table) == len(cu_q) - 1 and enable_gqa == (q.shape[1] != k.shape[2])
    )
    assert int(seqused_k.max()) <= max_k and int(cu_q.diff().max()) <= max_q
    y = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for i, n in enumerate(seqused_k.tolist()):
        a, b = cu_q[i : i + 2].tolist()
        keys, values = (t[block_table[i].long()].flatten(0, 1)[:n].float() for t in (k, v))
        keys, values = (t.repeat_interleave(q.shape[1] // k.shape[2], 1) for t in (keys, values))
        behind = torch.arange(n - (b - a), n)[:, None] - torch.arange(n)
        hidden = (behind < 0) if window_size[0] < 0 else (behind < 0) | (behind > window_size[0])
        assert window_size[1] == 0
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * scale
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        y[a:b] = torch.einsum("hqk,khd->qhd", p.nan_to_num(), values).to(q.dtype)
    return y


def first_row_only(*args: Any, num_splits: int | None = None, **kwargs: Any) -> Tensor:
    """https://github.com/pytorch/pytorch/issues/194167: with splits, rows behind the first sequence are not written."""
    y = kernel(*args, **kwargs)
    if num_splits != 1 and args[5] == 1:
        y[1:] = torch.nan
    return y


def without(*names: str) -> Callable[..., Tensor]:
    """The kernel of a version of torch that lacks some keywords."""

    def older(*args: Any, **kwargs: Any) -> Tensor:
        for name in names:
            if name in kwargs:
                raise TypeError(f"varlen_attn() got an unexpected keyword argument '{name}'")
        return kernel(*args, **kwargs)

    return older


def deaf_to(name: str, value: Any) -> Callable[..., Tensor]:
    """A kernel that takes a keyword and does not heed it."""
    return lambda *args, **kwargs: kernel(*args, **(kwargs | {name: value}))


def pages_of_256(*args: Any, **kwargs: Any) -> Tensor:
    if args[1].shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    return kernel(*args, **kwargs)


SHAPES = [(2, 16, 16), (1, 24, 0)]
KERNELS: list[tuple[Callable[..., Tensor], int, str]] = [
    (kernel, 32, "varlen"),
    (kernel, 256, "varlen"),
    (first_row_only, 32, "varlen_unsplit"),
    (without("num_splits"), 32, "varlen"),
    (without("block_table", "seqused_k"), 32, "padded"),  # torch 2.11
    (without("window_size"), 32, "padded"),
    (deaf_to("window_size", (-1, 0)), 32, "padded"),
    (deaf_to("scale", 1.0), 32, "padded"),
    (pages_of_256, 32, "padded"),
    (pages_of_256, 256, "varlen"),
]


@pytest.mark.parametrize("stand_in,page_size,expected", KERNELS)
def test_a_gpu_has_the_best_way_that_is_right(
    stand_in: Callable[..., Tensor], page_size: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of torch lack keywords, and some compute something else: neither is used. Asked for by name, a kernel that
    does not work is refused."""
    from torch.nn.attention import varlen

    real = cache.agrees
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(cache, "agrees", lambda name, shapes, size, dtype, device: real(name, shapes, size, dtype, CPU))
    gpu = torch.device("cuda")
    assert cache.choose_backend("auto", SHAPES, page_size, torch.bfloat16, gpu) == expected
    if expected == "padded":
        with pytest.raises(Refusal, match=f"engine.attention=varlen: .* with pages of {page_size} "):
            cache.choose_backend("varlen", SHAPES, page_size, torch.bfloat16, gpu)
    else:
        assert cache.choose_backend("varlen", SHAPES, page_size, torch.bfloat16, gpu) == expected
    assert cache.choose_backend("auto", SHAPES, page_size, torch.float32, gpu) == "padded"
    with pytest.raises(Refusal, match="on cpu"):
        cache.choose_backend("varlen", SHAPES, page_size, torch.bfloat16, CPU)


def test_replays_of_the_paged_kernel(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way of GPUs, with static `longest`: an engine on a stand-in for torch's kernel, which Python may read."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(graphs, "obstacle", lambda forward, device: None)
    monkeypatch.setattr("etude.infer.engine.choose_backend", lambda *a: "varlen")
    m = made("dense", "model/attn=local", "model.attn.window=[5,3,null]", n_layers=3)
    e = with_graphs(m, capture=lambda forward: forward)
    prompts = ragged(random.Random(7), [5, 1, 9])
    for prompt, c in zip(prompts, e.generate(prompts, sampling=TOLD, max_tokens=12), strict=True):
        close_to_forward(m, prompt, c)
    assert e.graphs is not None and e.graphs.off is None and e.graphs.replays > 5


# ---------------------------------------------------------------- on a GPU


def on_gpu(dtype: torch.dtype, page_size: int, attention: str, cuda_graphs: bool, choice: list[str]) -> InferenceEngine:
    m = made(*choice, n_layers=3, dim=256).to("cuda", dtype)
    settings = Settings(page_size=page_size, attention=attention, cuda_graphs=cuda_graphs)  # type: ignore[arg-type]
    return InferenceEngine(m, TOKENIZER, settings, context=1024)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [32, 256])
@pytest.mark.parametrize("choice", [["dense"], ["dense", "model/attn=mla"], ["gpt", "model.attn.window=8"]], ids=str)
def test_cuda_graphs_are_the_eager_engine(dtype: torch.dtype, page_size: int, choice: list[str]) -> None:
    """Real graphs, whatever attention there is: no warning, many replays, and log-probabilities of the reference's own
    tokens within 1e-3 in fp32, 0.15 in bf16 (whose rounding depends on the batch)."""
    rng = random.Random(8)
    prompts = ragged(rng, [3, 25, 300, 1, 7, 2] if "gpt" not in choice else [3, 9, 15, 1])
    n = 40 if "gpt" not in choice else 12
    reference = on_gpu(dtype, page_size, "gather", False, choice)
    assert reference.graphs is None
    expected = reference.generate(prompts, sampling=TOLD, max_tokens=n)
    e = on_gpu(dtype, page_size, "auto", True, choice)
    assert e.graphs is not None and e.backend in cache.STATIC, e.backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            found = e.generate(prompts, sampling=TOLD, max_tokens=n)
            e.refresh()
    assert e.graphs.off is None and e.graphs.replays > n
    far = 1e-3 if dtype == torch.float32 else 0.15
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.tokens, b.tokens):
            assert abs((x.logprob or 0.0) - (y.logprob or 0.0)) < far
            if x.id != y.id:  # two that are equally likely: from here on the texts differ
                break
        assert dtype != torch.float32 or a.ids == b.ids
    at_rest(e)


@CUDA
def test_cuda_graphs_pay() -> None:
    """A small model's decoding takes as long as Python: with graphs it is quicker at batch 1 and at 32."""
    for n in (1, 32):
        times = []
        for cuda_graphs in (False, True):
            e = on_gpu(torch.bfloat16, 256, "auto", cuda_graphs, ["dense"])
            prompts = ragged(random.Random(9), [20] * n)
            e.generate(prompts, max_tokens=60, sampling=TOLD)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            e.generate(prompts, max_tokens=60, sampling=TOLD)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        assert times[1] < times[0], (n, times)


@CUDA
def test_a_failed_recording_leaves_cuda_usable() -> None:
    """A forward that reads a number, unnoticed by the check: capture raises, and what comes after works."""
    capture = graphs.on_cuda(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        capture(lambda: x * float(x.sum()))
    torch.cuda.synchronize()
    assert torch.rand(8, device="cuda").isfinite().all() and torch.equal(x.cpu(), torch.ones(4))
    replay = graphs.on_cuda(torch.device("cuda"))(lambda: x * 2)
    x.fill_(5)
    assert torch.equal(replay().cpu(), torch.full((4,), 10.0))

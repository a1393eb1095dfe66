"""The CPU kernels: their numbers against torch in fp64, their promise that a row's bits are its own, their compilation."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import Forked
from torch import Tensor

from etude.infer import kernels
from etude.model.parts import ACTIVATIONS
from etude.model.rope import Rope, angles

pytestmark = pytest.mark.skipif(kernels._compiler() is None, reason="no C compiler")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest number; a bf16 is rounded by 2^-9 of itself
# The portable code is what a lesser machine runs, whatever vectors its compiler makes of it.
VARIANTS = {"native": None, "plain": ["-O1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as they are compiled for this machine, and as for lesser ones."""
    flags, path = VARIANTS[request.param], folder / f"{request.param}.so"
    if flags is None:
        assert kernels.available(), kernels.why_not()
        return request.param
    if not path.exists():
        assert kernels._compile(kernels._compiler() or [], flags, path) == ""
    library = kernels._open(path)
    monkeypatch.setattr(kernels, "_function", lambda name: getattr(library, name))
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(y: Tensor, wanted: Tensor) -> float:
    """The largest error, of the largest number."""
    assert y.shape == wanted.shape
    return ((y.double() - wanted).abs().max() / wanted.abs().max()).item()


SHAPES = [
    (1, 64, 64),
    (1, 1, 1),
    (2, 33, 17),
    (3, 577, 100),
    (4, 576, 31),
    (5, 48, 16),
    (9, 1536, 40),
    (70, 130, 257),
    (16, 7, 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_product(variant: str, dtype: torch.dtype) -> None:
    """For every shape, also no row at all, with and without a bias: within rounding of fp64."""
    for M, K, N in SHAPES:
        x, w, b = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2)
        product = x.double() @ w.double().T
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert off(kernels.linear(x, w), product) < TOLERANCE[dtype]
            assert off(kernels.linear(x, w, b), product + b.double()) < TOLERANCE[dtype]
    assert kernels.linear(randn(0, 64, dtype=dtype), randn(5, 64, dtype=dtype)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_near_the_product(variant: str, dtype: torch.dtype) -> None:
    """Eight bits on both sides: each output within 1.2 % of their spread, root mean square (no shape is an exception)."""
    for M, K, N in [(1, 64, 64), *SHAPES[2:-1]]:
        x, w, b = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2)
        wanted = x.double() @ w.double().T + b.double()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = kernels.linear_int8(x, kernels.quantize(w), b)
            assert y.dtype == dtype and y.shape == wanted.shape
            assert ((y.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item() < 0.012


def test_int8_arithmetic_is_exact(variant: str) -> None:
    """What is on the grid of 8 bits already loses nothing: the layout, the offset of 128 and zero groups are right."""
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-127, 128, (37, 100), generator=g).float()
    x = torch.randint(-127, 128, (6, 100), generator=g).float()
    w[:, ::16], x[:, ::16] = 127, -127  # so that each group's step is 1
    x[2, 32:64], w[5, 64:96] = 0, 0
    assert torch.equal(kernels.linear_int8(x, kernels.quantize(w)), x @ w.T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_does_not_hide_what_is_not_finite(variant: str, bad: float) -> None:
    """A NaN becomes NaN in its own row and nowhere else, so that a damaged model is noticed."""
    x, w = randn(5, 64), kernels.quantize(randn(32, 64, seed=1))
    good = kernels.linear_int8(x, w)
    x[3, 40] = bad
    y = kernels.linear_int8(x, w)
    assert not y[3].isfinite().any() and torch.equal(y[[0, 1, 2, 4]], good[[0, 1, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_gate_and_rotation(variant: str, dtype: torch.dtype) -> None:
    """Against the model's own formulas in fp64, for widths that no vector divides."""
    for M, D in [(1, 1), (3, 7), (4, 64), (17, 577)]:
        x = randn(M, D, dtype=dtype)
        for w in (randn(D, seed=1), randn(D, seed=1).bfloat16()):
            wanted = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
            assert off(kernels.rms_norm(x, w, 1e-5), wanted) < TOLERANCE[dtype]
        h = torch.cat((randn(M, D, seed=2) * 6, randn(M, D, seed=3)), -1).to(dtype)
        for name, f in ACTIVATIONS.items():
            assert off(kernels.glu(h, name), f(h[:, :D].double()) * h[:, D:].double()) < TOLERANCE[dtype], name
    x = randn(9, 5, 50, dtype=dtype)[:, 1:4]  # strides of a larger tensor
    for layout in ("half", "interleaved"):
        for dim in (50, 24, 2):
            cos, sin = angles(torch.arange(9)[None] * 100, Rope(theta=1e4, dim=dim, layout=layout), dim, CPU)  # type: ignore[arg-type]
            cos, sin = cos[0, 0], sin[0, 0]
            y = x.double()
            t = y[..., :dim]
            other = t.roll(dim // 2, -1) if layout == "half" else t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            wanted = torch.cat((t * cos[:, None] + other * sin[:, None], y[..., dim:]), -1)
            assert off(kernels.rope(x, cos, sin, layout == "half"), wanted) < TOLERANCE[dtype]


def test_activations_far_out(variant: str) -> None:
    """No overflow on the way: large inputs give 0 or themselves, NaN stays NaN."""
    x = torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0, 1e18, float("nan")])
    for name in ("silu", "gelu", "gelu_tanh", "relu"):
        y = kernels.glu(torch.cat((x, torch.ones(7)))[None], name)[0]
        assert torch.equal(y[3:6], x[3:6]) and y[6].isnan() and (y[:3].abs() < 1e-30).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_its_own_bits(variant: str, dtype: torch.dtype) -> None:
    """The same row gives the same bits among any others, in any order, with one thread or two."""
    rng = np.random.default_rng(0)
    for K, N in [(576, 96), (100, 1111), (33, 17)]:
        x, w, b = randn(300, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2)
        q, gain = kernels.quantize(w), randn(K, seed=3)
        cos, sin = randn(300, K // 2 * 2), randn(300, K // 2 * 2, seed=5)
        x2 = randn(300, 2 * K, dtype=dtype, seed=6)

        def rows(i: np.ndarray) -> list[Tensor]:
            r = torch.from_numpy(i)
            return [
                kernels.linear(x[r], w, b),  # noqa: B023
                kernels.linear_int8(x[r], q, b),  # noqa: B023
                kernels.rms_norm(x[r], gain, 1e-6),  # noqa: B023
                kernels.glu(x2[r], "silu"),  # noqa: B023
                kernels.glu(x2[r], "gelu"),  # noqa: B023
                kernels.rope(x[r][:, None], cos[r], sin[r], False),  # noqa: B023
            ]

        torch.set_num_threads(2)
        whole = rows(np.arange(300))
        for M in (1, 1, 2, 3, 4, 5, 8, 13, 64, 299):
            torch.set_num_threads(int(rng.integers(1, 3)))
            some = rng.permutation(300)[:M]
            for a, y in zip(whole, rows(some)):
                assert torch.equal(a[torch.from_numpy(some)], y)


class Sequences:
    """Some sequences' queries, keys and values, and caches in which each has pages of its own, in any order; sequences of
    one `family` have the same first `common` positions on the same pages. Unwritten places are NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 6,
        kv: int = 2,
        dk: int = 24,
        dv: int = 40,
        page: int = 32,
        dtype: torch.dtype = torch.float32,
        latent: bool = False,
        common: int = 0,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.page, self.dv, self.lengths, self.latent = page, dv, lengths, latent
        width = max(-(-n // page) for n in lengths)
        order = rng.permutation(len(lengths) * width + 3)
        self.tables = order[: len(lengths) * width].reshape(len(lengths), width).astype(np.int32)
        self.tables[:, : common // page] = self.tables[0, : common // page]
        self.q = [randn(n, heads, dk, dtype=dtype, seed=9 * i) for i, n in enumerate(lengths)]
        self.k = [randn(n, kv, dk, dtype=dtype, seed=9 * i + 1) for i, n in enumerate(lengths)]
        self.v = [randn(n, kv, dv, dtype=dtype, seed=9 * i + 2) for i, n in enumerate(lengths)]
        for each in (self.k, self.v):
            for t in each:
                t[:common] = each[0][: min(common, len(t))]
        if latent:
            self.v = [k[..., :dv] for k in self.k]
        slots = len(order) * page
        self.k_cache = torch.full((slots, kv, dk), float("nan"), dtype=dtype)
        self.v_cache = None if latent else torch.full((slots, kv, dv), float("nan"), dtype=dtype)

    def slots(self, s: int, start: int, n: int) -> np.ndarray:
        p = np.arange(start, start + n)
        return self.tables[s, p // self.page].astype(np.int64) * self.page + p % self.page

    def attend(self, parts: list[tuple[int, int, int]], window: int | None = None, padding: int = 0) -> list[Tensor]:
        """One call with rows (sequence, start, rows), and `padding` more."""
        cut = lambda each: torch.cat([each[s][a : a + n] for s, a, n in parts] + [each[0][:1]] * padding)  # noqa: E731
        slots = np.concatenate([self.slots(*p) for p in parts] + [np.full(padding, -1)])
        plan = kernels.Plan(self.page, self.tables, [*parts, (-1, 0, padding)])
        v = None if self.latent else cut(self.v)
        y = kernels.attend(
            cut(self.q), cut(self.k), v, self.k_cache, self.v_cache, torch.from_numpy(slots), plan, 0.2, window, self.dv
        )
        assert not y[len(y) - padding :].any()
        return list(y[: len(y) - padding].split([n for *_, n in parts]))

    def wanted(self, s: int, window: int | None = None) -> Tensor:
        q, k, v = (t[s].double() for t in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        ahead = torch.arange(len(q)) - torch.arange(len(q))[:, None]
        seen = (ahead <= 0) & (ahead > -(window or 1 << 40))
        scores = torch.einsum("qhd,khd->hqk", q, k).mul(0.2).masked_fill(~seen, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


KINDS = {
    "gqa": dict(heads=6, kv=2, dk=24, dv=40),
    "smollm": dict(heads=9, kv=3, dk=64, dv=64),
    "mha": dict(heads=2, kv=2, dk=80, dv=80, page=16),
    "odd": dict(heads=5, kv=1, dk=7, dv=3, page=5),
    "mla": dict(heads=4, kv=1, dk=144, dv=128, latent=True, page=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_softmax_over_what_a_row_sees(variant: str, kind: str, dtype: torch.dtype) -> None:
    """Prompts whole, then the rest in one call with a token of another sequence: within rounding of fp64, with and without
    a window, and nothing that was never written is read."""
    for window in (None, 50):
        s = Sequences([600, 37, 300, 1], dtype=dtype, **KINDS[kind])  # type: ignore[arg-type]
        first = s.attend([(1, 0, 36), (0, 0, 530), (3, 0, 1)], window)
        second = s.attend([(0, 530, 70), (1, 36, 1), (2, 0, 300)], window, padding=2)
        got = {0: torch.cat((first[1], second[0])), 1: torch.cat((first[0], second[1])), 2: second[2], 3: first[2]}
        for i, y in got.items():
            assert off(y, s.wanted(i, window)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_has_the_same_bits_however_it_is_cut(variant: str, kind: str, dtype: torch.dtype) -> None:
    """Prompts at once, in random pieces among other sequences, or token by token; other pages; padding; threads: equal."""
    rng = np.random.default_rng(1)
    for window in (None, 100):
        lengths = [530, 262, 40]
        at_once = [
            Sequences(lengths, dtype=dtype, **KINDS[kind]).attend([(i, 0, n)], window)[0] for i, n in enumerate(lengths)
        ]  # type: ignore[arg-type]
        for seed in range(2):
            torch.set_num_threads(seed + 1)
            s = Sequences(lengths, dtype=dtype, seed=seed + 5, **KINDS[kind])  # type: ignore[arg-type]
            done, got = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
            while any(d < n for d, n in zip(done, lengths)):
                parts = []
                for i in rng.permutation(3):
                    most = lengths[i] - done[i]
                    n = min(most, int(rng.choice([0, 1, 1, 3, 17, 100, 256])))
                    if n:
                        parts.append((int(i), done[i], n))
                for (i, _, n), y in zip(parts, s.attend(parts, window, padding=seed) if parts else []):
                    done[i] += n
                    got[i].append(y)
            for y, whole in zip(got, at_once):
                assert torch.equal(torch.cat(y), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_pages_change_no_bit(variant: str, dtype: torch.dtype) -> None:
    """Single tokens of sequences with the same first pages, read once for all of them, against each alone."""
    lengths = [700, 650, 513, 1100, 580, 200]
    for window in (None, 400):
        s = Sequences(lengths, dtype=dtype, common=512, **KINDS["smollm"])  # type: ignore[arg-type]
        for i, n in enumerate(lengths):
            s.attend([(i, 0, n)])
        torch.set_num_threads(2)
        together = [(i, n - 1, 1) for i, n in enumerate(lengths)]
        plan = kernels.Plan(s.page, s.tables, together)
        assert plan.tasks[:, 1].max() == 5 and (plan.partials[:5] >= 0).all()  # chunks 0 and 1 of five sequences
        at_once = s.attend(together, window)
        torch.set_num_threads(1)
        for part, y in zip(together, at_once):
            assert torch.equal(y, s.attend([part], window)[0])
            assert off(y, s.wanted(part[0], window)[-1:]) < TOLERANCE[dtype]


def test_a_later_row_never_shows(variant: str) -> None:
    """NaN in one row's keys and values reaches the rows that see it and none before them, within one block of rows."""
    s = Sequences([20], dtype=torch.float32)
    good = s.attend([(0, 0, 20)])[0]
    s.k[0][7], s.v[0][7] = float("nan"), float("nan")
    y = s.attend([(0, 0, 20)])[0]
    assert torch.equal(y[:7], good[:7]) and y[7:].isnan().all()


# ------------------------------------------------------------------------------------------------ compiling


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_pool_of_threads() -> None:
    """The kernels' threads are torch's: no second OpenMP library is loaded."""
    assert kernels.available(), kernels.why_not()
    torch.set_num_threads(2)
    kernels.linear(randn(64, 64), randn(512, 64))
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len({p for p in paths if "gomp" in p or "libomp" in p or "iomp" in p}) <= 1


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the answer is no, with a reason, and nothing raises until a kernel is called all the same."""
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernels, "_library", kernels._library.__wrapped__)
    monkeypatch.setattr(kernels, "_function", kernels._function.__wrapped__)
    assert not kernels.available() and "no C compiler" in kernels.why_not()
    with pytest.raises(RuntimeError, match="no C compiler"):
        kernels.linear(randn(1, 4), randn(2, 4))


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    kernels.SOURCE.write_text("int linear(void) { return nonsense; }\n")
    library, why = kernels._build(kernels._compiler() or [], tmp_path)
    assert library is None and "nonsense" in why


def test_a_library_that_fails_its_test_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that dies of an illegal instruction, then one that computes nonsense, then a good one: the good one is taken, and
    the next process takes it without compiling."""
    source = kernels.SOURCE.read_text(encoding="utf-8")
    assert source.count("to.start[g] = -128") == 1
    broken = source.replace("to.start[g] = -128", "if (TRAP) __builtin_trap(); to.start[g] = OFFSET")
    (tmp_path / "kernels.c").write_text(broken)
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    fast = ["-O0"]
    attempts = [["-DTRAP=1", "-DOFFSET=-128"], ["-DTRAP=0", "-DOFFSET=-129"], ["-DTRAP=0", "-DOFFSET=-128"]]
    seen, test = [], kernels._test
    monkeypatch.setattr(kernels, "_attempts", lambda features: [fast + a for a in attempts])
    monkeypatch.setattr(kernels, "_test", lambda path: seen.append(test(path)) or seen[-1])
    library, why = kernels._build(kernels._compiler() or [], tmp_path)
    assert library is not None and library.exists() and why == ""
    assert "signal" in seen[0] and "linear_int8" in seen[1] and seen[2:] == [""]
    monkeypatch.setattr(kernels, "_compile", None)
    assert kernels._build(kernels._compiler() or [], tmp_path) == (library, "")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".c", ".json", ".so"]


def test_two_processes_compile_once(tmp_path: Path) -> None:
    """The second waits for the library of the first."""
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shlex.join(kernels._compiler() or [])} "$@"\n')
    compiler.chmod(0o755)
    quicker = "k.FLAGS[k.FLAGS.index('-O3')] = '-O0'"
    program = f"from etude.infer import kernels as k; {quicker}; assert k.available(), k.why_not()"
    (tmp_path / "program.py").write_text(program)
    env = {"ETUDE_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "CC": str(compiler)}
    both = [Forked([str(tmp_path / "program.py")], tmp_path, os.environ | env) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0], [p.communicate() for p in both]
    assert sorted(p.suffix for p in (tmp_path / "kernels").iterdir()) == [".json", ".so"]
    called = log.read_text().splitlines()
    assert called.count("--version") == 2 and len(called) == 4  # and compiled and linked once


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then the library lies in a folder for this process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "file"))
    folder = kernels._folder()
    assert folder.is_dir() and tmp_path not in folder.parents
    kernels._temporary().cleanup()
    kernels._temporary.cache_clear()


def test_the_source_is_installed() -> None:
    """Without the package-data entry a wheel would lack the C file."""
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
    assert "*.c" in project["tool"]["setuptools"]["package-data"]["etude.infer"]
    assert kernels.SOURCE.exists()


def test_gates_are_the_models() -> None:
    """Every activation of the model has a kernel, and a reference here."""
    assert set(kernels.GATES) == set(ACTIVATIONS) and F.silu is ACTIVATIONS["silu"]

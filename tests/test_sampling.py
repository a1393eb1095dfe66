"""From logits to tokens: every setting is what its paper says, and no row depends on its neighbours."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from etude.data.order import mix
from etude.errors import Refusal
from etude.infer import sampling
from etude.infer.sampling import Chooser, Sampling, Token, choose, score, uniform

GREEDY = Sampling(temperature=0)
INF, NAN = math.inf, math.nan


def logits_of(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def chooser(s: Sampling, V: int, choice: int = 0, position: int = 0, **how) -> Chooser:
    """At a position, as if nothing that counts had come before."""
    c = Chooser(s, choice, how.pop("prompt", []), V, **how)
    c.position = position
    return c


def one(logits: list[float], s: Sampling = GREEDY, **how) -> Token | None:
    return choose(torch.tensor([logits]), [chooser(s, len(logits), **how)])[0]


class Only:
    """A constraint of somebody's own: the same tokens at every place."""

    def __init__(self, *mask: bool):
        self.came: list[int] = []
        self.tokens = torch.tensor(mask)

    def mask(self) -> torch.Tensor:
        return self.tokens

    def push(self, token: int) -> None:
        self.came.append(token)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """by_token(row, chooser): the distribution that `choose` draws from. Where u runs over [0, 1) in small steps, every
    token with some probability comes, with its logarithm."""
    n = 500
    monkeypatch.setattr(sampling, "uniform", lambda keys: (torch.arange(len(keys), dtype=torch.float64) + 0.5) / n)
    monkeypatch.setattr(sampling, "CHUNK", 1 << 30)

    def by_token(row: torch.Tensor, c: Chooser) -> list[float]:
        p = [0.0] * len(row)
        for token in choose(row.expand(n, -1), [c] * n):
            assert token is not None and token.drawn_logprob is not None
            p[token.id] = math.exp(token.drawn_logprob)
        return p

    return by_token


# ---------------------------------------------------------------- filters


def naive_distribution(logits: list[float], s: Sampling) -> list[float]:
    """One row, one rule after another, on plain numbers; -> probabilities by token."""
    z = [v / s.temperature for v in logits]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    order = order[: s.top_k] if s.top_k else order
    weights = {i: math.exp(z[i] - z[order[0]]) for i in order}

    def normal(kept: dict[int, float]) -> dict[int, float]:
        total = sum(kept.values())
        return {i: w / total for i, w in kept.items()}

    def reach(kept: dict[int, float], ranks: list[int], mass: float) -> dict[int, float]:
        before, some = 0.0, {}
        for i in ranks:
            if before < mass:
                some[i] = kept[i]
            before += kept[i]
        return some

    p = normal(weights)
    if s.typical_p is not None:
        entropy = -sum(v * math.log(v) for v in p.values())
        p = normal(reach(p, sorted(p, key=lambda i: abs(-math.log(p[i]) - entropy)), s.typical_p))
    if s.top_p is not None:
        p = reach(p, sorted(p, key=lambda i: -p[i]), s.top_p)
    if s.min_p is not None:
        p = {i: v for i, v in p.items() if v >= s.min_p * max(p.values())}
    p = normal(p)
    return [p.get(i, 0.0) for i in range(len(z))]


SETTINGS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m, typical_p=y, logprobs=0)
    for t in (0.5, 1.0, 3.0)
    for k in (None, 1, 5, 100)
    for p in (None, 0.3, 0.9, 1.0)
    for m in (None, 0.0, 0.2, 1.0)
    for y in (None, 0.4, 0.95)
]


def test_filters_against_plain_numbers(grid: Callable) -> None:
    """Every combination of temperature, top-k, typical, top-p and min-p, in this order."""
    row = logits_of(20, seed=3, scale=1.5)
    for s in SETTINGS:
        found = grid(row, chooser(s, 20))
        expected = naive_distribution(row.double().tolist(), s)
        assert all(e > 0 if f else e < 2e-3 for e, f in zip(expected, found)), s  # the grid has that step
        assert found == pytest.approx([e if f else 0.0 for e, f in zip(expected, found)], rel=1e-5), s
        assert sum(found) == pytest.approx(1, abs=20 * 2e-3), s


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.99])
def test_filters_against_transformers(grid: Callable, k: int, share: float) -> None:
    """The same tokens are left as by its processors."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

    pairs = [
        (Sampling(temperature=1, top_k=k, logprobs=0), TopKLogitsWarper(k)),
        (Sampling(temperature=1, top_p=share, logprobs=0), TopPLogitsWarper(share)),
        (Sampling(temperature=1, min_p=share / 10, logprobs=0), MinPLogitsWarper(share / 10)),
        (Sampling(temperature=1, typical_p=share, logprobs=0), TypicalLogitsWarper(share)),
    ]
    for seed in range(3):
        row = logits_of(40, seed=seed, scale=1.0)
        for s, theirs in pairs:
            expected = theirs(torch.zeros(1, 1, dtype=torch.int64), row[None].clone())[0].softmax(-1)
            found = torch.tensor(grid(row, chooser(s, 40)))
            seen = found > 0  # a token below the grid's step may not come
            assert (expected[~seen] < 2e-3).all() and (expected[seen] > 0).all(), (s, theirs)
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_k=8, seed=4),
        Sampling(temperature=1.5, top_p=0.8, min_p=0.05, seed=5),
        Sampling(temperature=1.2, typical_p=0.9, seed=6),
        Sampling(temperature=1.0, min_p=0.1, seed=-1),
    ],
    ids=str,
)
def test_draws_have_the_distribution(s: Sampling) -> None:
    """Chi-square over 10,000 positions, and over as many choices, and no token that was filtered out."""
    row, n = logits_of(20, scale=1.5), 10_000
    p = torch.tensor(naive_distribution(row.double().tolist(), s), dtype=torch.float64)
    for keys in ([(0, i) for i in range(n)], [(i, 7) for i in range(n)]):
        base = chooser(s, 20)
        settings = [base.settings] * n
        tokens, _ = sampling._sample(row.expand(n, -1), settings, uniform([(s.seed, c, at) for c, at in keys]))
        found = torch.bincount(tokens, minlength=20).double()
        assert (found[p == 0] == 0).all()
        there = p > 0
        chi = ((found[there] - n * p[there]) ** 2 / (n * p[there])).sum().item()
        degrees = int(there.sum()) - 1
        assert chi < degrees + 5 * math.sqrt(2 * degrees)


def old_draw(logits: torch.Tensor, s: Sampling, choice: int, position: int) -> int:
    """The function that `choose` replaced, in fp64 throughout: a run that was drawn with it can be drawn again."""
    z, ids = logits / s.temperature, torch.arange(len(logits))
    if s.top_k is not None and s.top_k < len(z):
        z, ids = z.topk(s.top_k)
    elif s.top_p is not None:
        z, ids = z.sort(descending=True)
    p = torch.softmax(z.double(), -1)
    if s.top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= s.top_p, 0.0)
    if s.min_p is not None:
        p = p.masked_fill(p < s.min_p * p.max(), 0.0)
    u = float(mix(s.seed, choice, position)[0] >> np.uint64(11)) * 2.0**-53
    return int(ids[torch.searchsorted(p.cumsum(-1), u * p.cumsum(-1)[-1], right=True)])


@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.8, "min_p": 0.1}, {"top_p": 0.9, "min_p": 0.02}],
    ids=str,
)  # fmt: skip
def test_the_same_seed_still_draws_the_same(how: dict) -> None:
    """As `draw` did, for all the settings that it had."""
    logits = logits_of(60, 3000)
    s = Sampling(temperature=0.8, seed=11, **how)
    found = choose(logits, [chooser(s, 3000, i % 4, 3 * i) for i in range(60)])
    assert [t.id for t in found if t] == [old_draw(row, s, i % 4, 3 * i) for i, row in enumerate(logits)]
    assert [t.id for t in choose(logits, [chooser(GREEDY, 3000)] * 60) if t] == logits.argmax(-1).tolist()


# ---------------------------------------------------------------- penalties, bias, constraints


def test_penalties_and_bias_against_plain_numbers(grid: Callable) -> None:
    """Bias first, then CTRL's rule for tokens of prompt and output, OpenAI's for those of the output, by their number."""
    rng, V = random.Random(0), 12
    for trial in range(40):
        row = logits_of(V, seed=trial, scale=1.0)
        prompt = [rng.randrange(V) for _ in range(rng.randrange(1, 6))]
        out = [rng.randrange(V) for _ in range(rng.randrange(6))]
        bias = {rng.randrange(V): rng.uniform(-2, 2) for _ in range(rng.randrange(3))}
        s = Sampling(
            temperature=1.0,
            repetition_penalty=rng.choice([1.0, 1.7, 0.6]),
            presence_penalty=rng.choice([0.0, 0.5, -0.5]),
            frequency_penalty=rng.choice([0.0, 0.3, -0.2]),
            logit_bias=bias,
            logprobs=0,
        )
        z = [v + bias.get(i, 0.0) for i, v in enumerate(row.double().tolist())]
        for i in {*prompt, *out}:
            z[i] = z[i] / s.repetition_penalty if z[i] > 0 else z[i] * s.repetition_penalty
            z[i] -= s.frequency_penalty * out.count(i) + s.presence_penalty * (i in out)
        expected = torch.tensor(z).softmax(-1).tolist()
        found = grid(row, Chooser(s, 0, prompt, V, out=out))
        assert found == pytest.approx([e if f else 0.0 for e, f in zip(expected, found)], rel=1e-5)
        assert sum(found) > 0.97
        kept = row.clone()
        choose(row[None], [Chooser(s, 0, prompt, V, out=out)])
        assert torch.equal(row, kept), "the model's logits were written to"


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = logits_of(4, 30), torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(1))
    s = Sampling(temperature=1.0, repetition_penalty=1.7)
    found = sampling._edited(logits, [Chooser(s, 0, row[:5], 30, out=row[5:]) for row in ids.tolist()])
    torch.testing.assert_close(found, RepetitionPenaltyLogitsProcessor(1.7)(ids, logits), rtol=1e-6, atol=1e-6)


def test_a_sample_can_be_built_anew() -> None:
    """From its prompt and what came: the same tokens and log-probabilities as one that was never interrupted."""
    V = 50
    s = Sampling(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, logprobs=3)
    lasting, out, said = Chooser(s, 2, [1, 2, 3, 2], V), [], []
    steps = logits_of(200, V)
    for row in steps:
        assert (token := choose(row[None], [lasting])[0]) is not None
        again = choose(row[None], [Chooser(s, 2, [1, 2, 3, 2], V, out=out)])[0]
        assert again == token
        lasting.push(token.id)
        out.append(token.id)
        said.append(token)
    ids, came = lasting.counts
    assert dict(zip(ids.tolist(), came.tolist())) == {i: out.count(i) for i in {1, 2, 3, *out}}
    assert lasting.position == 200 and len(set(out)) > 20


def test_constraints_are_asked_and_told() -> None:
    """Only what the mask has comes, ids beyond it never, and what was pushed is handed on; a bias does not lift a mask."""
    mask = Only(False, True, False, True)
    s = Sampling(temperature=1.0, logit_bias={0: 100.0, 5: 100.0}, logprobs=0)
    rows = [chooser(s, 6, position=i, allowed=mask) for i in range(200)]
    found = [t for t in choose(logits_of(6).expand(200, -1), rows) if t]
    assert {t.id for t in found} == {1, 3} and len(found) == 200
    expected = logits_of(6)[[1, 3]].log_softmax(-1)
    assert {round(t.drawn_logprob or 0, 5) for t in found} == {round(p, 5) for p in expected.tolist()}
    rows[0].push(3)
    assert mask.came == [3]
    assert one([9.0, 0.0, 8.0, 1.0], allowed=Only(False, True, False, True)) == Token(3)


# ---------------------------------------------------------------- a row and its neighbours


def mixed(V: int) -> tuple[torch.Tensor, list[Callable[[], Chooser]]]:
    """Rows with all kinds of settings, some bad, and makers of their choosers."""
    rng = random.Random(V)
    rows, makers = [], []
    for i in range(36):
        rows.append(logits_of(V, seed=100 + i, scale=rng.choice([0.1, 2.0, 8.0])))
        s = Sampling(
            temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 4.0]),
            top_k=rng.choice([None, None, 1, 20, 1500]),
            top_p=rng.choice([None, None, 0.5, 0.95]),
            min_p=rng.choice([None, None, 0.05]),
            typical_p=rng.choice([None, None, None, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logit_bias=rng.choice([{}, {}, {0: 3.0}]),
            seed=rng.randrange(3),
            logprobs=rng.choice([None, 0, 2, 5]),
        )
        prompt, out = [rng.randrange(V) for _ in range(9)], [rng.randrange(V) for _ in range(rng.randrange(9))]
        allowed = Only(*[j % 3 != 1 for j in range(V)]) if rng.random() < 0.2 else None
        makers.append(lambda s=s, i=i, p=prompt, o=out, a=allowed: Chooser(s, i % 4, p, V, a, out=o))
    rows[5] = rows[5].clone()
    rows[5][0] = NAN
    rows[11] = torch.full((V,), -INF)
    rows[17] = rows[17].clone()
    rows[17][V // 2] = INF
    return torch.stack(rows), makers


@pytest.mark.parametrize("V", [1, 7, 1000, 5003, 49_152])
def test_a_row_does_not_depend_on_its_neighbours(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and log-probabilities are the same to the bit alone, among any others, in any order, however the work is cut,
    and in logits that lie elsewhere in memory."""
    logits, makers = mixed(V)
    whole = choose(logits, [m() for m in makers])
    assert [i for i, t in enumerate(whole) if t is None] == [5, 11]
    rng = random.Random(1)
    batches = [[i] for i in range(36)] + [rng.sample(range(36), n) for n in (2, 3, 15, 16, 17, 36)]
    for rows in batches if V < 49_152 else batches[1::3]:
        assert choose(logits[rows], [makers[i]() for i in rows]) == [whole[i] for i in rows], rows
    shifted = torch.empty(logits.numel() + 1)[1:].view(logits.shape)
    shifted.copy_(logits)
    monkeypatch.setattr(sampling, "CHUNK", 5 * V)
    assert choose(shifted, [m() for m in makers]) == whole


def test_a_row_does_not_depend_on_threads() -> None:
    """With two, torch cuts the work elsewhere, and a single row otherwise than several."""
    logits, makers = mixed(49_152)
    whole, before = choose(logits, [m() for m in makers]), torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        for rows in ([0], [3], [8], [30], list(range(0, 36, 3))):
            assert choose(logits[rows], [makers[i]() for i in rows]) == [whole[i] for i in rows], rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.3, 3.0, 6.0])
def test_the_likeliest_first_are_the_whole_sort(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """top-p by the first few tokens, or by all of them: the same to the bit, whether those few are enough or not."""
    logits = logits_of(64, 600, scale=scale)
    s = Sampling(temperature=1.0, top_p=0.9, min_p=0.001, logprobs=0)

    def drawn(head: int) -> list[Token | None]:
        monkeypatch.setattr(sampling, "HEAD", head)
        return choose(logits, [chooser(s, 600, position=i) for i in range(64)])

    assert drawn(600) == drawn(64) == drawn(1)


def test_numbers_are_keyed_by_seed_choice_and_position() -> None:
    flat = torch.zeros(400, 1000)

    def drawn(seed: int, choice: int, first: int = 0) -> list[int]:
        s = Sampling(temperature=1.0, seed=seed)
        return [t.id for t in choose(flat, [chooser(s, 1000, choice, first + i) for i in range(400)]) if t]

    base = drawn(1, 0)
    assert base == drawn(1, 0) and base[100:] == drawn(1, 0, 100)[:300]
    for other in (drawn(2, 0), drawn(1, 1), drawn(-1, 0), drawn(2**64 - 2, 0), drawn(1, 0, 1)):
        assert sum(a == b for a, b in zip(base, other)) < 10


# ---------------------------------------------------------------- edges


def test_the_ends_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least and the largest number never give a token of probability 0; minus infinity is never drawn."""
    for total in (1.0, 1 + 2**-52, 1.5, 2.0, 2 - 2**-52, 3.0, 49_151.7):
        assert (1 - 2**-53) * total < total
    row = [-INF, 1.0, -INF, 2.0, -INF]
    for key, first, ranked in ((0, 1, 3), (2**64 - 1, 3, 1)):
        monkeypatch.setattr(sampling, "mix", lambda *k, key=key: np.array([key], dtype=np.uint64))
        for s in (Sampling(temperature=1.0), Sampling(temperature=1.0, min_p=0.1)):
            assert one(row, s) == Token(first)
        for how in ({"top_p": 0.99}, {"top_k": 2}, {"top_k": 4}, {"top_k": 4, "top_p": 0.999}):
            assert one(row, Sampling(temperature=1.0, **how)) == Token(ranked)
        assert one(row, Sampling(temperature=1.0, typical_p=0.999)) == Token(ranked)


@pytest.mark.parametrize("s", [GREEDY, Sampling(temperature=1.0), Sampling(top_k=2), Sampling(top_p=0.5, logprobs=2)])
def test_bad_rows_fail_alone(s: Sampling) -> None:
    """NaN, nothing finite, everything masked: None for that row with the reason, the others go on."""
    V = 5
    rows = torch.zeros(6, V)
    rows[1, 2], rows[3] = NAN, -INF
    choosers = [chooser(s, V, position=i) for i in range(6)]
    choosers[4] = chooser(s, V, allowed=Only(*[False] * V))
    hidden = chooser(s, V, allowed=Only(True, True, False, True, True))  # the NaN itself is masked
    choosers[1] = hidden
    found = choose(rows, choosers)
    assert [t is None for t in found] == [False, True, False, True, True, False]
    reasons = [c.error or "" for c in choosers]
    assert "NaN" in reasons[1] and "-inf" in reasons[3] and "constraint" in reasons[4] and reasons[0] == ""
    assert found[0] == choose(rows[:1], [chooser(s, V)])[0]
    assert choose(torch.zeros(0, V), []) == []
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        choose(torch.zeros(2, V), [chooser(s, V)])


def test_infinite_logits() -> None:
    """Those with +inf are all that there is, equally likely; log-probabilities stay numbers."""
    row = [1.0, INF, 3.0, INF]
    assert one(row) == Token(1)
    found = [
        one(row, Sampling(temperature=1.0, logprobs=2, top_p=p), position=i) for i in range(60) for p in (None, 0.9)
    ]
    assert {t.id for t in found if t} == {1, 3}
    half = pytest.approx(math.log(0.5))
    assert all(t and t.logprob == half and t.drawn_logprob == half and t.top == ((1, half), (3, half)) for t in found)


def test_ties_go_to_the_lower_id() -> None:
    """Greedy, in what top-k keeps, and among the likeliest."""
    row = [0.0, 2.0, 1.0, 2.0, -0.0, 1.0]
    assert one(row, Sampling(temperature=0, logprobs=6)).id == 1
    assert [i for i, _ in one(row, Sampling(temperature=0, logprobs=6)).top] == [1, 3, 2, 5, 0, 4]
    assert [i for i, _ in one(row, Sampling(temperature=0, logprobs=3)).top] == [1, 3, 2]
    for k, kept in ((1, {1}), (3, {1, 2, 3}), (5, {0, 1, 2, 3, 5})):
        s = Sampling(temperature=3.0, top_k=k)
        found = choose(torch.tensor([row]).expand(300, -1), [chooser(s, 6, position=i) for i in range(300)])
        assert {t.id for t in found if t} == kept
    flat = torch.zeros(500, 3000)
    found = choose(flat, [chooser(Sampling(top_k=40), 3000, position=i) for i in range(500)])
    assert {t.id for t in found if t} == set(range(40))


@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.01}, {"typical_p": 0.9}], ids=str)
def test_extremes(how: dict) -> None:
    """Temperatures and logits at the ends of what floats hold; a vocabulary of one; more top-k than tokens."""
    rows = torch.tensor([[1.0, 3.0, 2.0, -INF], [-3e38, 3e38, 0.0, -INF]])
    for t in (1e-300, 1e-45, 1e-30):
        found = choose(rows, [chooser(Sampling(temperature=t, logprobs=1, **how), 4, position=i) for i in range(2)])
        assert [x and (x.id, x.drawn_logprob) for x in found] == [(1, 0.0), (1, 0.0)]
    hot = [one([1.0, 3.0, 2.0, -INF], Sampling(temperature=1e300, logprobs=0, **how), position=i) for i in range(200)]
    assert {t.id for t in hot if t} <= {0, 1, 2} and not any(math.isnan(t.drawn_logprob or 0) for t in hot if t)
    if not how or "min_p" in how:
        assert {t.id for t in hot if t} == {0, 1, 2}
    assert one([-5.0], Sampling(logprobs=3, **how)) == Token(0, 0.0, 0.0, ((0, 0.0),))
    assert one([0.0, 1.0], Sampling(temperature=1e-6, **(how | {"top_k": 10**12}))) == Token(1)


def test_huge_penalties() -> None:
    """Finite logits stay finite: what has come goes last, and where all have come, one still comes."""
    row, V = [1.0, -2.0, 3.0, 0.0], 4
    for penalty in (1e9, 1e300):
        s = Sampling(temperature=0, repetition_penalty=penalty)
        assert choose(torch.tensor([row]), [Chooser(s, 0, [2], V)])[0] == Token(0)
        for t in (0.0, 1.0):
            s = Sampling(temperature=t, repetition_penalty=penalty, frequency_penalty=100, top_p=0.9)
            found = choose(torch.tensor([row]), [Chooser(s, 0, [], V, out=[0, 1, 2, 3, 1])])[0]
            assert found is not None and found.id != 1
    for t, expected in ((0.0, {0}), (1.0, {0, 2})):  # all as low as can be, but what is impossible stays so
        s = Sampling(temperature=t, repetition_penalty=1e300)
        rows = torch.tensor([-1.0, -INF, -2.0]).expand(50, -1)
        found = choose(rows, [chooser(s, 3, position=i, prompt=[0, 1, 2]) for i in range(50)])
        assert {x and x.id for x in found} == expected
        assert choose(torch.tensor([[INF, 5.0, -1.0]]), [Chooser(s, 0, [0, 1, 2], 3)])[0] == Token(0)
    s = Sampling(temperature=0, repetition_penalty=1e-300)
    assert choose(torch.tensor([row]), [Chooser(s, 0, [0], V)])[0] == Token(0)


# ---------------------------------------------------------------- log-probabilities


def test_logprobs() -> None:
    """By the model's own logits whatever was done to them; as many of the likeliest as each row asks for; none unasked."""
    V, rows = 300, logits_of(6, 300)
    expected = rows.double().log_softmax(-1)
    asked = [None, 0, 1, 5, 100, 7]
    settings = [
        Sampling(temperature=t, top_k=20, repetition_penalty=1.5, logprobs=k) for k, t in zip(asked, [1, 1, 0, 1, 1, 0])
    ]
    found = choose(rows, [Chooser(s, i, [1, 2, 3], V) for i, s in enumerate(settings)])
    assert found[0] is not None and found[0] == Token(found[0].id)
    for b, (token, k, s) in enumerate(zip(found[1:], asked[1:], settings[1:]), 1):
        assert token is not None and token.logprob == pytest.approx(expected[b, token.id].item(), abs=1e-5)
        order = sorted(range(V), key=lambda i: -rows[b, i].item())[:k]
        assert [i for i, _ in token.top] == order
        assert [p for _, p in token.top] == pytest.approx(expected[b, order].tolist(), abs=1e-5)
        assert token.drawn_logprob == 0.0 if s.temperature == 0 else token.drawn_logprob < 0
    full = one([0.5, 1.5, -1.0], Sampling(temperature=1.0, logprobs=100))
    assert full and sum(math.exp(p) for _, p in full.top) == pytest.approx(1) and len(full.top) == 3
    assert full.drawn_logprob == pytest.approx(full.logprob)


def test_scores_of_a_prompt() -> None:
    """The same numbers as for tokens that were drawn, and no number where there is none."""
    rows, tokens = logits_of(40, 50), [i % 50 for i in range(40)]
    found = score(rows, tokens, 3)
    expected = rows.log_softmax(-1)
    assert [t.id for t in found] == tokens
    assert [t.logprob for t in found] == pytest.approx([expected[i, t].item() for i, t in enumerate(tokens)], abs=1e-5)
    assert all(len(t.top) == 3 and t.top[0][1] == pytest.approx(expected[i].max().item()) for i, t in enumerate(found))
    drawn = choose(rows, [chooser(Sampling(temperature=0, logprobs=3), 50)] * 40)
    assert [(t.logprob, t.top) for t in score(rows, [t.id for t in drawn if t], 3)] == [
        (t.logprob, t.top) for t in drawn if t
    ]
    rows[3, 4] = NAN
    assert score(rows, tokens, 0)[3] == Token(3) and score(rows, tokens, 0)[4].logprob == found[4].logprob
    assert score(rows[:0], [], 2) == []


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "name,wrong",
    [
        ("temperature", [-0.1, NAN, INF]),
        ("top_k", [0, -1]),
        ("top_p", [0.0, 1.1, NAN]),
        ("min_p", [-0.1, 2.0, NAN]),
        ("typical_p", [0.0, 1.1, NAN]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF]),
        ("presence_penalty", [101.0, -101.0, NAN, INF]),
        ("frequency_penalty", [101.0, -101.0, NAN, -INF]),
        ("logit_bias", [{-1: 0.0}, {1: 101.0}, {1: NAN}]),
        ("seed", [2**64, -(2**63) - 1]),
        ("logprobs", [-1, 101]),
    ],
)
def test_settings_out_of_range(name: str, wrong: list) -> None:
    for value in wrong:
        with pytest.raises(Refusal, match=name) as refused:
            Sampling(**{name: value})
        assert "\n" not in str(refused.value)


def test_settings_are_values() -> None:
    """Equal ones are equal and hash alike, though a bias is a dict; a bias beyond the vocabulary is refused."""
    a, b = Sampling(logit_bias={3: 1.0}), Sampling(logit_bias={3: 1.0})
    assert a == b and hash(a) == hash(b) and a != Sampling(logit_bias={3: 2.0}) and len({a, b}) == 1
    Chooser(a, 0, [], 4)
    with pytest.raises(Refusal, match="logit_bias names token 3, but the vocabulary ends at 2"):
        Chooser(a, 0, [], 3)

"""From logits to the next token, each row by its own settings. Random numbers are keyed by (seed, choice, position) and
no arithmetic depends on the size of the batch, so what a row draws depends neither on its neighbours nor on how often it
was interrupted."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from etude.data.order import mix
from etude.errors import Refusal

HEAD = 1024  # likeliest tokens that are sorted first; all V only where those have too little of the probability
CHUNK = 1 << 19  # logits that are worked on together on a CPU: what is made of them stays in its cache
LARGEST = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one request are drawn; conf/generate.yaml explains each. Raises Refusal for values out of range."""

    temperature: float = 0.8  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0  # of tokens in prompt and output
    presence_penalty: float = 0.0  # of tokens in the output
    frequency_penalty: float = 0.0  # the same, for each time
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict, hash=False)  # by token id
    seed: int = 0
    logprobs: int | None = None  # None: none; k: of the token and of the k likeliest

    def __post_init__(self) -> None:
        def share(p: float | None) -> bool:
            return p is None or 0 < p <= 1

        checks = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 (0: greedy) and finite"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (share(self.top_p), "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "typical_p": (share(self.typical_p), "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1: none) and finite"),
            "presence_penalty": (abs(self.presence_penalty) <= 100, "between -100 and 100 (0: none)"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "between -100 and 100 (0: none)"),
            "seed": (-(2**63) <= self.seed < 2**64, "a number of 64 bits"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise Refusal(f"{name}={getattr(self, name)} should be {wanted}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not abs(bias) <= 100:
                raise Refusal(f"logit_bias={{{token}: {bias}}} should be a token id and a bias between -100 and 100")


class Token(NamedTuple):
    """One token with its log-probabilities, None where they were not asked for."""

    id: int
    logprob: float | None = None  # by the model's own logits
    drawn_logprob: float | None = (
        None  # by what it was drawn from: after penalties, temperature and filters; 0 if greedy
    )
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids with `logprob`s, the likeliest first, then the lower id


class Constraint(Protocol):
    """What may come next in one sample: guide.Guide, or somebody's own."""

    def mask(self) -> Tensor:
        """-> (V,) bool on the CPU, True for tokens that may come next; ids beyond a shorter one may not."""
        ...

    def push(self, token: int) -> None:
        """`token` came."""
        ...


class Chooser:
    """What one sample needs to choose its tokens: its settings, how often each token came where a penalty asks for it, and
    its position. It can be built anew from the prompt and the tokens that came (`out`), given a fresh `allowed`.

    `error` says why `choose` found no token. Raises Refusal for a logit_bias outside of the vocabulary."""

    def __init__(
        self,
        sampling: Sampling,
        choice: int,
        prompt: Sequence[int],
        vocab_size: int,
        allowed: Constraint | None = None,
        out: Iterable[int] = (),
    ):
        self.sampling, self.choice, self.allowed = sampling, choice, allowed
        self.position, self.error = 0, None  # type: int, str | None
        if (highest := max(sampling.logit_bias, default=0)) >= vocab_size:
            raise Refusal(f"logit_bias names token {highest}, but the vocabulary ends at {vocab_size - 1}")
        self.bias = np.array(list(sampling.logit_bias)), np.array(list(sampling.logit_bias.values()), np.float32)
        s = sampling
        self.settings = _Settings.of(s, vocab_size)
        self.penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        self.penalized = self.penalties != (1.0, 0.0, 0.0)
        ids = np.unique(np.array(prompt, dtype=np.int64)) if s.repetition_penalty != 1.0 else np.empty(0, np.int64)
        self._seen, self._came = ids, np.zeros(len(ids))  # ids, and how often each came in the output
        self._slots = {token: i for i, token in enumerate(ids.tolist())}
        for token in out:
            self.push(token)

    def push(self, token: int) -> None:
        """The sample goes on with `token`."""
        self.position += 1
        if self.allowed is not None:
            self.allowed.push(token)
        if not self.penalized:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._seen):
            more = max(64, slot)  # doubled, so that a long output costs no square
            self._seen = np.concatenate([self._seen, np.zeros(more, np.int64)])
            self._came = np.concatenate([self._came, np.zeros(more)])
        self._seen[slot] = token
        self._came[slot] += 1

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids that a penalty is for (N,), how often each came in the output (N,)). Empty where no penalty is on."""
        return self._seen[: len(self._slots)], self._came[: len(self._slots)]


class _Settings(NamedTuple):
    """Those of one row that filter, as numbers that change nothing where one is off, and the way that they ask for."""

    way: str  # greedy; plain: all V in the order of ids; head, whole: the likeliest first; nucleus: as many as top_p needs
    row: tuple[float, float, float, float, float]  # temperature, top_k, typical_p, top_p, min_p

    @staticmethod
    def of(s: Sampling, vocab_size: int) -> "_Settings":
        k = vocab_size if s.top_k is None else min(s.top_k, vocab_size)
        typical = math.inf if s.typical_p is None or s.typical_p >= 1 else s.typical_p
        p = math.inf if s.top_p is None or s.top_p >= 1 else s.top_p
        # fp32 has no smaller or larger ones without losing bits; they are greedy and uniform long before
        row = (min(max(s.temperature, 1e-37), 1e37), float(k), typical, p, s.min_p or 0.0)
        if s.temperature == 0:
            return _Settings("greedy", row)
        if k < vocab_size:
            return _Settings("head" if k <= HEAD else "whole", row)
        return _Settings("whole" if typical < math.inf else "nucleus" if p < math.inf else "plain", row)


# ---------------------------------------------------------------- all rows


@torch.inference_mode()
def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | None]:
    """logits (B, V), as the model gave them, and one Chooser a row -> the next token of each; nothing is pushed. None, and the
    chooser's `error`, where a logit is NaN or no token is left.

    In this order: logit_bias; repetition penalty (Keskar et al. 2019), frequency and presence penalty (OpenAI's); the
    constraint's mask; temperature; top-k; locally typical (Meister et al. 2022) of what is left; top-p of what is left
    (Holtzman et al. 2020), then min-p (Nguyen et al. 2024). Among equal tokens the lower id is the likelier one. A logit
    of +inf leaves only those that have one. At temperature 0 nothing is filtered: the likeliest is taken."""
    if len(choosers) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(choosers)} choosers")
    if not choosers:
        return []
    step = len(choosers) if logits.is_cuda else max(1, CHUNK // logits.shape[1])
    found: list[Token | None] = []
    for i in range(0, len(choosers), step):
        found += _choose(logits[i : i + step].float(), choosers[i : i + step])
    return found


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Token]:
    """logits (T, V) and the token that came after each -> those tokens with `logprob` and the `top` likeliest, without any
    where a logit is NaN or all are -inf."""
    step = len(tokens) if logits.is_cuda else max(1, CHUNK // logits.shape[1])
    found: list[Token] = []
    for i in range(0, len(tokens), max(1, step)):
        raw, some = logits[i : i + step].float(), tokens[i : i + step]
        best = raw.amax(-1).tolist()
        told = _logprobs(_tame(raw, best), some, [top] * len(some))
        found += [Token(t, p, None, k) if b > -math.inf else Token(t) for b, t, (p, k) in zip(best, some, told)]
    return found


def _choose(raw: Tensor, choosers: Sequence[Chooser]) -> list[Token | None]:
    z = _edited(raw, choosers)
    greedy = all(c.settings.way == "greedy" for c in choosers)
    tokens = z.argmax(-1) if greedy else z.new_empty(len(z), dtype=torch.int64)
    best = z.gather(1, tokens[:, None])[:, 0] if greedy else z.amax(-1)  # both take a NaN for the largest
    highest: list[float] = best.tolist()
    given = highest if z is raw else raw.amax(-1).tolist()  # a mask may have hidden a NaN
    good = [b > -math.inf and g == g for b, g in zip(highest, given)]
    for c, ok, g in zip(choosers, good, given):
        c.error = None if ok else _why(c, g)
    drawn: dict[int, float] = {}
    if greedy:
        ids: list[int] = tokens.tolist()
    else:
        rows = [i for i, ok in enumerate(good) if ok]
        settings = [choosers[i].settings for i in rows]
        u = uniform([(c.sampling.seed, c.choice, c.position) for c in (choosers[i] for i in rows)])
        some, logprob = _sample(_take(_tame(z, highest), rows), settings, u)
        ids = [-1] * len(z)
        for i, token in zip(rows, some.tolist()):
            ids[i] = token
        if any(choosers[i].sampling.logprobs is not None for i in rows):
            drawn = dict(zip(rows, logprob.tolist()))
    told = [i for i, c in enumerate(choosers) if good[i] and c.sampling.logprobs is not None]
    if not told:
        return [Token(t) if ok else None for t, ok in zip(ids, good)]
    asked = [choosers[i].sampling.logprobs or 0 for i in told]
    lines = dict(zip(told, _logprobs(_tame(_take(raw, told), [given[i] for i in told]), [ids[i] for i in told], asked)))
    found: list[Token | None] = []
    for i, (t, ok) in enumerate(zip(ids, good)):
        if i in lines:
            found.append(Token(t, lines[i][0], drawn.get(i, 0.0), lines[i][1]))
        else:
            found.append(Token(t) if ok else None)
    return found


def _why(chooser: Chooser, given: float) -> str:
    if given != given:
        return "the model's logits are NaN: its weights are damaged or overflow in this dtype; try dtype=fp32"
    if given == -math.inf:
        return "the model's logits are all -inf: its weights are damaged or overflow in this dtype; try dtype=fp32"
    reason = getattr(chooser.allowed, "error", None)
    return f"no token may come next: {reason}" if reason else "no token may come next: the constraint forbids all"


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of x, itself where that is all of them."""
    return x if len(rows) == len(x) else x[torch.tensor(rows, dtype=torch.int64, device=x.device)]


def _tame(x: Tensor, highest: list[float]) -> Tensor:
    """x (B, V) with highest values as given: rows with +inf have 0 there and -inf elsewhere, so that nothing becomes NaN."""
    rows = [i for i, h in enumerate(highest) if h == math.inf]
    if not rows:
        return x
    x = x.clone()
    x[rows] = torch.where(x[rows] == math.inf, 0.0, -math.inf)
    return x


def _logprobs(x: Tensor, tokens: Sequence[int], asked: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Logits (R, V) -> a row's (log-probability of its token, the `asked` likeliest ids with theirs)."""
    logprob = x.log_softmax(-1)
    own = logprob.gather(1, torch.tensor(tokens, dtype=torch.int64, device=x.device)[:, None])[:, 0].tolist()
    k = min(max(asked), x.shape[1])
    if k == 0:
        return [(p, ()) for p in own]
    which = (logprob >= _largest(logprob, k)[:, -1:]).nonzero()  # k of them, more only if equal
    values = logprob[which[:, 0], which[:, 1]].cpu().numpy()
    rows, ids = which.T.cpu().numpy()
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    ends = np.searchsorted(rows, np.arange(len(own) + 1))
    for p, n, a, b in zip(own, asked, ends, ends[1:]):
        order = np.argsort(-values[a:b], kind="stable")[:n] + a
        found.append((p, tuple(zip(ids[order].tolist(), values[order].tolist()))))
    return found


def _edited(raw: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """raw (B, V) with logit_bias, penalties and masks; itself where there are none. Only the tokens concerned are touched."""
    biased = [i for i, c in enumerate(choosers) if len(c.bias[0])]
    penalized = [i for i, c in enumerate(choosers) if c.penalized and len(c.counts[0])]
    masked = [i for i, c in enumerate(choosers) if c.allowed is not None]
    if not (biased or penalized or masked):
        return raw
    z = raw.clone()

    def at(rows: list[int], ids: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        row = np.repeat(rows, [len(i) for i in ids])
        return torch.from_numpy(row).to(z.device), torch.from_numpy(np.concatenate(ids)).to(z.device)

    if biased:
        where = at(biased, [choosers[i].bias[0] for i in biased])
        z[where] += torch.from_numpy(np.concatenate([choosers[i].bias[1] for i in biased])).to(z.device)
    if penalized:
        counts = [choosers[i].counts for i in penalized]
        where = at(penalized, [ids for ids, _ in counts])
        per_row = np.array([choosers[i].penalties for i in penalized])
        each = torch.from_numpy(np.repeat(per_row, [len(ids) for ids, _ in counts], 0)).to(z.device)
        came = torch.from_numpy(np.concatenate([n for _, n in counts])).to(z.device)
        old = z[where]
        repetition, presence, frequency = each.unbind(-1)
        new = old.double()
        new = torch.where(new > 0, new / repetition, new * repetition) - frequency * came - presence * (came > 0)
        z[where] = torch.where(old.isinf(), old, new.clamp(-LARGEST, LARGEST).float())  # what is finite stays so
    for i in masked:
        mask = choosers[i].allowed.mask().to(z.device)  # type: ignore[union-attr]
        z[i, : len(mask)].masked_fill_(~mask, -math.inf)
        z[i, len(mask) :] = -math.inf
    return z


# ---------------------------------------------------------------- drawing


def uniform(keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """(seed, choice, position) of each -> numbers (B,) fp64 in [0, 1)."""
    seeds = np.array([seed % 2**64 for seed, _, _ in keys], dtype=np.uint64)
    bits = mix(seeds, np.array([c for _, c, _ in keys]), np.array([p for _, _, p in keys]))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _sample(z: Tensor, settings: Sequence[_Settings], u: Tensor) -> tuple[Tensor, Tensor]:
    """z (B, V) fp32 without NaN or +inf, each row with something finite; u (B,) -> tokens (B,) and their log-probabilities
    (B,) fp64. Rows go together that go one way; no row's numbers depend on which those are."""
    u = u.to(z.device)
    tokens, logprob = torch.zeros_like(u, dtype=torch.int64), torch.zeros_like(u)
    ways: dict[str, list[int]] = {}
    for i, s in enumerate(settings):
        ways.setdefault(s.way, []).append(i)
    for way, rows in ways.items():
        part = _take(z, rows)
        at = torch.tensor(rows, device=z.device)
        if way == "greedy":
            tokens[at] = part.argmax(-1)
            continue
        table = torch.tensor([settings[i].row for i in rows], dtype=torch.float64).to(z.device)
        tokens[at], logprob[at] = _WAYS[way](part, table, u[at])
    return tokens, logprob


def _weights(values: Tensor, best: Tensor, table: Tensor) -> Tensor:
    """exp((values - best) / temperature): probabilities by the largest one. values (B, K) fp32 -> the same fp32.

    Elementwise in fp32, so that the same value has the same bits wherever it stands."""
    return values.sub(best).div_(table[:, :1].float()).exp_()


def _plain(z: Tensor, table: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens in the order of ids, at most without those below min_p. -> as _sample."""
    w = _weights(z, z.amax(-1, keepdim=True), table)
    if (table[:, 4] > 0).any():
        w.masked_fill_(w < table[:, 4:].float(), 0.0)
    return _pick(w, u)


def _pick(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, K), numbers (B,) in [0, 1) -> the first index beyond the share u of their sum (B,), its log-probability.

    Sums are running ones, which go from left to right whatever B is; torch.sum adds up a single row in another order."""
    sums = w.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # A weight of 0 is never the first beyond u; u is 1 - 2^-53 at most, and with that a product is rounded below total.
    at = torch.searchsorted(sums, u[:, None] * total, right=True)
    return at[:, 0], (w.gather(1, at).double() / total).log()[:, 0]


def _head(z: Tensor, table: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return _ranked(z, table, u, int(table[:, 1].max()))


def _whole(z: Tensor, table: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return _ranked(z, table, u, z.shape[1])


def _nucleus(z: Tensor, table: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """top-p of all tokens: by the likeliest HEAD of them where those have that much, which all the others cannot change."""
    total = _weights(z, z.amax(-1, keepdim=True), table).cumsum(-1, dtype=torch.float64)[:, -1:]
    width = min(HEAD, z.shape[1])
    values = _largest(z, width)
    w = _weights(values, values[:, :1], table)
    enough = w.cumsum(-1, dtype=torch.float64)[:, -1] >= table[:, 3] * total[:, 0]
    if width == z.shape[1] or bool(enough.all()):
        return _draw_ranked(z, values, w, table, u, total)
    tokens, logprob = torch.zeros_like(u, dtype=torch.int64), torch.zeros_like(u)
    for settled in (True, False):
        rows = (enough == settled).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        part, few = z[rows], table[rows]
        v = values[rows] if settled else _largest(part, z.shape[1])
        found = _draw_ranked(part, v, _weights(v, v[:, :1], few), few, u[rows], total[rows])
        tokens[rows], logprob[rows] = found
    return tokens, logprob


def _ranked(z: Tensor, table: Tensor, u: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest `width` tokens, of which top_k are left in each row. -> as _sample."""
    values = _largest(z, width)
    w = _weights(values, values[:, :1], table)
    w.masked_fill_(torch.arange(width, device=z.device) >= table[:, 1:2], 0.0)
    total = w.cumsum(-1, dtype=torch.float64)[:, -1:]
    return _draw_ranked(z, values, w, table, u, total)


_WAYS = {"plain": _plain, "head": _head, "whole": _whole, "nucleus": _nucleus}


def _draw_ranked(
    z: Tensor, values: Tensor, w: Tensor, table: Tensor, u: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """values (B, K), the largest of z (B, V) in falling order, their weights, the sum (B, 1) of the weights of all that top-k
    left -> as _sample, after typical, top-p and min-p.

    Every filter keeps some of the ranks, so no ids are sorted: the token of a rank is the one with its value."""
    if (table[:, 2] < math.inf).any():
        w = _typical(w, table[:, 2:3], total)
        total = torch.where(table[:, 2:3] < math.inf, w.cumsum(-1, dtype=torch.float64)[:, -1:], total)
    if (table[:, 3] < math.inf).any():
        before = w.cumsum(-1, dtype=torch.float64).roll(1, -1)
        before[:, 0] = 0.0
        w = w.masked_fill(before >= table[:, 3:4] * total, 0.0)
    if (table[:, 4] > 0).any():
        w = w.masked_fill(w < table[:, 4:5].float() * w.amax(-1, keepdim=True), 0.0)
    rank, logprob = _pick(w, u)
    value = values.gather(1, rank[:, None])
    equal = rank - (values > value).sum(-1)  # how many tokens of this very value come before it
    there = z == value
    token = there.view(torch.uint8).argmax(-1)
    if (rows := equal.nonzero()[:, 0]).numel():
        nth = there[rows].cumsum(-1, dtype=torch.int32) == equal[rows, None] + 1
        token[rows] = nth.view(torch.uint8).argmax(-1)
    return token, logprob


def _typical(w: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """Weights (B, K) without those outside of the smallest set with `mass` (B, 1) whose surprise is nearest to the entropy."""
    p = w.double() / total
    surprise = -p.log()
    entropy = torch.where(w > 0, p * surprise, 0.0).cumsum(-1)[:, -1:]
    far = torch.where(w > 0, (surprise - entropy).abs(), math.inf)
    # It falls and rises again: two runs, which numpy's stable sort merges and torch's does not notice.
    order = far.sort(dim=-1, stable=True).indices if w.is_cuda else torch.from_numpy(far.numpy().argsort(-1, "stable"))
    before = w.gather(1, order).cumsum(-1, dtype=torch.float64).roll(1, -1)
    before[:, 0] = 0.0
    out = torch.zeros_like(w, dtype=torch.bool).scatter(1, order, before >= mass * total)
    return w.masked_fill(out, 0.0)


def _largest(x: Tensor, k: int) -> Tensor:
    """The k largest of each row of x (B, V), in falling order. On a CPU numpy's vectorised partition and sort are 5 to 30
    times as fast as torch's."""
    if x.is_cuda:
        return x.topk(k, dim=-1).values
    a, first = x.numpy(), x.shape[1] - k
    part = np.partition(a, first, axis=-1)[:, first:] if first else a.copy()
    part.sort(axis=-1)
    return torch.from_numpy(part[:, ::-1].copy())

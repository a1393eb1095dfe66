"""GRPO: losses and gradients that TRL recorded, every setting against a naive loop, one step however it is cut and laid out,
rollouts, rewards, and a policy that learns."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import varied_text
from gradients import grads, same
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from test_model import made
from torch import Tensor, nn

from etude import reward
from etude.config import CONF, build, check
from etude.errors import NonFinite, Refusal
from etude.infer.engine import Settings
from etude.interop import architectures, convert
from etude.model.head import Scores
from etude.model.transformer import Transformer
from etude.parallel import World
from etude.strategy import grpo
from etude.strategy.grpo import GRPO, tempered, unlearned
from etude.strategy.layout import Row, arrange, take
from etude.strategy.rollout import Moments, advantages, deviation
from etude.text import tokenizer as tok

GOLDEN = Path(__file__).parent / "golden" / "trl"
CASES = {c["name"]: c for c in json.loads((GOLDEN / "cases.json").read_text())["cases"] if c["strategy"] == "grpo"}
ALONE = World(0, 1, torch.device("cpu"))
ENGINE = Settings(step_tokens=2048, cache_mb=16)
LAYOUTS = ("rows", "packed", "shared")
ONLINE: dict[str, Any] = {
    "group_size": 4,
    "max_completion": 12,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "steps_per_rollout": 1,
    "iterations": 1,
    "objective": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "delta": None,
    "e_max": 1.1,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "level": "token",
    "beta": 0.0,
    "kl_weighted": True,
    "sync_interval": None,
    "scale": "group",
    "reduction": "dapo",
    "mask_overlong": False,
    "drop_silent": False,
    "correction": "none",
    "correction_level": "token",
    "correction_cap": 1.1,
    "layout": "shared",
    "rewards": {"nothing": lambda completion, fields: 0.0},
}


def strategy_of(tokenizer: tok.Tokenizer | None = None, engine: Settings = ENGINE, **changes: Any) -> GRPO:
    assert changes.keys() <= ONLINE.keys()
    return GRPO(tokenizer or tok.byte([], []), engine, **ONLINE | changes)


def step(strategy: Any, model: nn.Module, ref: Any, batches: list[dict]) -> tuple[float, dict[str, float]]:
    """The loop's contract: sums over micro-batches, each divided by its weight over the whole step. -> (loss, metrics);
    gradients are left in the model."""
    model.zero_grad()
    weight = max(1, sum(strategy.weight(b) for b in batches))
    total = 0.0
    sums: dict[str, tuple[Any, Any]] = {}
    for batch in batches:
        loss, metrics = strategy.loss(model, ref, batch)
        (loss / weight).backward()
        total += loss.item() / weight
        for name, (s, n) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + s, before[1] + n
    return total, {k: float(s) / max(float(n), 1e-9) for k, (s, n) in sums.items() if k != "router/load"}


# ---------------------------------------------------------------- what TRL recorded


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Transformer]:
    """The model of tests/golden/trl, fresh at each call."""
    folder = tmp_path_factory.mktemp("golden")
    cfg = {"from": str(GOLDEN / "policy"), "to": str(folder / "policy"), "dtype": "keep", "shard_gb": 1.0}
    assert convert.run(cfg | {"trusted": ["etude"]}) == 0
    return lambda: Transformer.from_pretrained(folder / "policy")


class Recorded(nn.Module):
    """A reference whose log-probabilities were recorded."""

    def __init__(self, logprob: Tensor):
        super().__init__()
        self.logprob, self.norm, self.logit_cap = logprob, nn.Identity(), None

    def forward(self, tokens: Tensor, **_: Any) -> Any:
        zero = torch.zeros_like(self.logprob)
        return Scores(**{n: zero for n in Scores._fields} | {"logprob": self.logprob}), None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", LAYOUTS)
def test_grpo_is_trls(case: str, how: Any, policy: Callable[[], Transformer]) -> None:
    """Completions, advantages and old log-probabilities as recorded, ratios far enough from 1 to be clipped: the loss to 5e-6,
    gradients to 5e-4 of their norm (of embedding and head, every sixteenth row), and the metrics."""
    recorded = load_file(GOLDEN / "tensors.safetensors")
    given = {k.removeprefix(f"{case}/in/"): v for k, v in recorded.items() if k.startswith(f"{case}/in/")}
    rows, per_row = [], {"old_logprob": [], "ref": []}  # type: ignore[var-annotated]
    for i, mask in enumerate(given["completion_mask"] > 0):
        prompt = given["prompt_ids"][i][given["prompt_mask"][i] > 0]
        ids = torch.cat((prompt, given["completion_ids"][i][mask])).long()
        rows.append(Row(ids, torch.arange(len(ids)) >= len(prompt)))
        per_row["old_logprob"].append(given["old_per_token_logps"][i][mask])
        per_row["ref"].append(given["ref_per_token_logps"][i][mask])
    batch = arrange(rows, 1, how, None)
    wide = {k: nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in per_row.items()}
    batch |= {"old_logprob": wide["old_logprob"], "advantages": given["advantages"]}
    config = CASES[case]["config"]
    strategy = strategy_of(
        clip_high=config.get("epsilon_high", 0.2),
        beta=config.get("beta", 0.0),
        reduction=config["loss_type"],
        max_completion=config["max_completion_length"],
    )
    before = torch.zeros(batch["tokens"].numel())
    before[batch["slots"][batch["slots"] >= 0]] = wide["ref"][batch["slots"] >= 0]
    model, ref = policy(), Recorded(before.view_as(batch["tokens"]))
    loss, metrics = step(strategy, model, ref if strategy.needs_reference else None, [batch])
    assert loss == pytest.approx(CASES[case]["loss"], abs=5e-6)
    arch, node = architectures.read(json.loads((GOLDEN / "policy" / "config.json").read_text()))
    ours = {e.theirs[0]: e.ours[0] for e in convert._entries(arch, node, 334) if len(e.theirs) == 1}
    found = grads(model)
    expected = {k.removeprefix(f"{case}/grad/"): v for k, v in recorded.items() if k.startswith(f"{case}/grad/")}
    assert len(expected) >= 7
    same(
        {k: found[ours[k.removesuffix("/some")]][:: 16 if k.endswith("/some") else 1] for k in expected}, expected, 5e-4
    )
    names = {"clip_ratio/low_mean": "clip/low", "clip_ratio/high_mean": "clip/high", "entropy": "entropy", "kl": "kl"}
    told = {ours: CASES[case]["metrics"][theirs] for theirs, ours in names.items() if theirs in CASES[case]["metrics"]}
    assert {k: metrics[k] for k in told} == pytest.approx(told, abs=1e-5) and len(told) >= 3


# ---------------------------------------------------------------- formulas

Given = dict[str, Any]  # rows, and lists or tensors with an entry for each


def completed(seed: int = 0, groups: int = 4, size: int = 2, V: int = 61) -> Given:
    """Random prompts and completions of any lengths with advantages, one of them 0; log-probabilities of then, and those of
    the sampler, differ from now."""
    g = torch.Generator().manual_seed(seed)
    count = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    ids = lambda n: torch.randint(0, V, (n,), generator=g)  # noqa: E731
    rows, model = [], made("dense")
    for prompt in (ids(count(1, 6)) for _ in range(groups)):
        for n in (count(1, 13) for _ in range(size)):
            rows.append(Row(torch.cat((prompt, ids(n))), torch.arange(len(prompt) + n) >= len(prompt)))
    found: Given = {"rows": rows, "advantages": torch.randn(len(rows), generator=g), "old_logprob": []}
    found["advantages"][::3] *= -1
    found["advantages"][1], found["sampler_logprob"] = 0.0, []
    for row in rows:
        with torch.no_grad():
            logp = model(row.ids[None, :-1])[0].log_softmax(-1).gather(1, row.ids[1:, None])[:, 0][row.learned[1:]]
        found["old_logprob"].append(logp + 0.3 * torch.randn(len(logp), generator=g))
        found["sampler_logprob"].append(found["old_logprob"][-1] + 0.1 * torch.randn(len(logp), generator=g))
    return found


def laid(given: Given, how: Any = "rows", at: slice = slice(None), size: int = 2) -> dict[str, Any]:
    """Some of the sequences as a collected batch."""
    part = {k: v[at] for k, v in given.items()}
    rows = part.pop("rows")
    batch = arrange(rows, size if len(rows) % size == 0 else 1, how, None)
    wide = {k: nn.utils.rnn.pad_sequence(v, batch_first=True) for k, v in part.items() if isinstance(v, list)}
    return batch | part | wide


def naive(model: Transformer, ref: Transformer, given: Given, s: dict[str, Any]) -> Tensor:
    """The step's loss as losses.md writes it down, token by token from each sequence's own logits."""
    sums, lengths = [], []
    for i, row in enumerate(given["rows"]):
        own, its = ((m(row.ids[None, :-1])[0] / s["temperature"]).log_softmax(-1) for m in (model, ref))
        A, old, drawn = given["advantages"][i], given["old_logprob"][i], given["sampler_logprob"][i]
        learned = [(t, int(y)) for t, (y, on) in enumerate(zip(row.ids[1:], row.learned[1:])) if on]
        l, before = [own[t, y] for t, y in learned], [its[t, y].detach() for t, y in learned]  # noqa: E741
        mean_ratio = (sum(l) - sum(old)) / len(l)
        together = sum(old) - sum(drawn)
        losses = []
        for t in range(len(l)):
            rho = torch.exp(l[t] - old[t] if s["level"] == "token" else mean_ratio)
            if s["objective"] == "clip":
                capped = rho if s["delta"] is None else min(rho, torch.tensor(s["delta"]))
                x = -min(capped * A, min(max(rho, 1 - s["clip_low"]), 1 + s["clip_high"]) * A)
            elif s["objective"] == "cispo":
                x = -min(rho.item(), s["e_max"]) * A * l[t]
            else:
                tau = s["tau_pos"] if A > 0 else s["tau_neg"]
                x = -4 / (1 + torch.exp(-tau * (rho - 1))) / tau * A
            w = math.exp(old[t] - drawn[t] if s["correction_level"] == "token" else together)
            if s["correction"] == "truncate":
                x = x * min(w, s["correction_cap"])
            elif s["correction"] == "mask":
                x = x * (w if w <= s["correction_cap"] else 0.0)
            gap = before[t] - l[t]
            kl = torch.exp(gap) - gap - 1
            losses.append(x + s["beta"] * (rho * kl if s["kl_weighted"] else kl))
        sums.append(sum(losses))
        lengths.append(len(losses))
    return {
        "grpo": lambda: sum(x / n for x, n in zip(sums, lengths)) / len(sums),
        "bnpo": lambda: sum(sums) / sum(lengths),
        "dr_grpo": lambda: sum(sums) / (len(sums) * s["max_completion"]),
        "dapo": lambda: sum(sums) / sum(lengths),
    }[s["reduction"]]()


WAYS: list[dict[str, Any]] = [{"objective": "clip"}, {"objective": "clip", "delta": 1.25, "clip_high": 0.1}]
WAYS += [{"objective": "cispo"}, {"objective": "sapo", "tau_pos": 2.0, "tau_neg": 3.0}]
SETTINGS = [way | {"level": level} for way in WAYS for level in ("token", "sequence")]
SETTINGS = [s | {"reduction": r} for s, r in zip(SETTINGS * 4, [r for r in grpo.REDUCTIONS for _ in SETTINGS])]
SETTINGS += [{"beta": 0.0}, {"kl_weighted": False}]
SETTINGS += [
    {"correction": c, "correction_level": cl, "level": level, "objective": way}
    for c, cl, level, way in itertools.product(
        ("truncate", "mask"), ("token", "sequence"), ("token", "sequence"), ("clip", "cispo")
    )
]


@pytest.fixture(scope="module")
def two() -> tuple[Transformer, Transformer]:
    return made("dense"), made("dense", seed=1).requires_grad_(False)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda s: " ".join(f"{v}" for v in s.values()))
def test_it_is_its_formula_however_it_is_cut(changes: dict[str, Any], two: tuple[Transformer, Transformer]) -> None:
    """Every objective, level, correction and reduction, with a reference and a temperature: loss and gradients are those of
    a naive loop; 8x1 == 4x2 == 1x8, metrics too, and in each layout (but bnpo, which means a micro-batch)."""
    model, ref = two
    settings = {"beta": 0.1, "temperature": 0.7, "clip_high": 0.28} | changes
    strategy, given = strategy_of(**settings), completed()
    ref_or_none = ref if strategy.needs_reference else None
    model.zero_grad()
    expected = naive(model, ref, given, ONLINE | settings)
    expected.backward()
    wanted = grads(model)
    loss, metrics = step(strategy, model, ref_or_none, [laid(given)])
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    same(grads(model), wanted, 2e-5)
    metrics.pop("sampler/gap_max")
    whole = settings.get("reduction") == "bnpo"
    for how, size in [("packed", 8), ("shared", 8)] + [("rows", 1), ("shared", 2), ("packed", 4)] * (not whole):
        batches = [laid(given, how, slice(i, i + size)) for i in range(0, 8, size)]
        found, cut_metrics = step(strategy, model, ref_or_none, batches)
        cut_metrics.pop("sampler/gap_max")
        assert found == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert cut_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        same(grads(model), wanted, 2e-5)


def test_metrics_say_what_happened(two: tuple[Transformer, Transformer]) -> None:
    """Shares that are clipped, mean ratios, gaps and weights, counted once more by hand, of tokens and of sequences."""
    given = completed()
    batch = laid(given)
    with torch.no_grad():
        l = take(two[0](batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[0].logprob, batch["slots"])  # noqa: E741
    mask, A = batch["slots"] >= 0, given["advantages"]
    rho = [(a[m] - b[m]).exp() for a, b, m in zip(l, batch["old_logprob"], mask)]
    _, found = step(strategy_of(delta=1.5), *two, [batch])
    every = torch.cat(rho)
    each_A = torch.cat([a.expand(len(r)) for a, r in zip(A, rho)])
    assert found["ratio/mean"] == pytest.approx(every.mean().item(), rel=1e-5)
    assert 0.05 < found["clip/low"] == pytest.approx(((every < 0.8) & (each_A < 0)).float().mean().item())
    assert 0.05 < found["clip/high"] == pytest.approx(((every > 1.2) & (each_A > 0)).float().mean().item())
    assert 0 < found["clip/delta"] == pytest.approx(((every > 1.5) & (each_A < 0)).float().mean().item())
    gap = [a - b for a, b in zip(given["old_logprob"], given["sampler_logprob"])]
    assert found["sampler/gap"] == pytest.approx(torch.cat(gap).abs().mean().item(), rel=1e-5)
    assert found["sampler/gap_max"] == pytest.approx(torch.cat(gap).abs().max().item(), rel=1e-5)
    assert found["sampler/weight"] == pytest.approx(torch.cat(gap).exp().mean().item(), rel=1e-5)
    assert "sampler/capped" not in found and "kl" not in found
    whole = strategy_of(level="sequence", correction="mask", correction_level="sequence", clip_high=0.05)
    _, found = step(whole, *two, [batch])
    means = torch.stack([r.log().mean().exp() for r in rho])
    weights = torch.stack([g.sum().exp() for g in gap])
    assert found["ratio/mean"] == pytest.approx(means.mean().item(), rel=1e-5)
    assert 0 < found["clip/high"] == pytest.approx(((means > 1.05) & (A > 0)).float().mean().item())
    assert found["sampler/weight"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert 0 < found["sampler/capped"] == pytest.approx((weights > 1.1).float().mean().item())
    _, found = step(strategy_of(objective="cispo"), *two, [batch])
    assert found["clip/high"] == pytest.approx(((every > 1.1) & (each_A > 0)).float().mean().item())
    assert not any(k.startswith("clip") for k in step(strategy_of(objective="sapo"), *two, [batch])[1])


@pytest.mark.parametrize("how", LAYOUTS)
def test_experts_are_balanced_in_grpo_too(how: str) -> None:
    """A sparse model's auxiliary loss enters with the reduction's own weights, and is cut like the rest."""
    model, given = made("moe"), completed() | {"advantages": torch.zeros(8)}
    strategy, batch = strategy_of(), laid(given, how)
    n = (batch["slots"] >= 0).sum(1)
    with torch.no_grad():
        aux = strategy.scores(model, batch)[1].loss.expand(batch["tokens"].shape)
    loss, _ = step(strategy, model, None, [batch])
    assert loss == pytest.approx(float(take(aux, batch["slots"]).sum() / n.sum()), rel=1e-5) and loss > 0
    wanted = grads(model)
    cut = [laid(given, how, slice(i, i + 2)) for i in range(0, 8, 2)]
    assert step(strategy, model, None, cut)[0] == pytest.approx(loss, rel=1e-5)
    same(
        {k: g for k, g in grads(model).items() if wanted[k].norm() > 0},
        {k: g for k, g in wanted.items() if g.norm() > 0},
        1e-4,
    )


@pytest.mark.parametrize("settings", [{}, {"logit_cap": 3.0}, {"norm_at": "post"}], ids=str)
def test_a_tempered_model_scores_at_the_temperature(settings: dict[str, Any]) -> None:
    """Scores and their gradients are those of logits / temperature; afterwards the model is as it was."""
    model, batch = made("dense", **settings), laid(completed())
    plain = model(batch["tokens"])
    logp = (plain / 0.6).log_softmax(-1)
    at = batch["targets"].clamp_min(0)[..., None]
    expected = logp.gather(-1, at)[..., 0] * (batch["targets"] >= 0)
    expected.sum().backward()
    wanted = grads(model)
    model.zero_grad()
    with tempered(model, 0.6):
        scores, _ = model(batch["tokens"], targets=batch["targets"])
    scores.logprob.sum().backward()
    torch.testing.assert_close(scores.logprob, expected, rtol=1e-5, atol=1e-5)
    same(grads(model), wanted, 1e-5)
    with pytest.raises(ZeroDivisionError), tempered(model, 2.0):
        raise ZeroDivisionError
    with tempered(object(), 1.0):
        pass
    with (
        pytest.raises(Refusal, match="reference=cached has log-probabilities at temperature 1"),
        tempered(object(), 0.6),
    ):
        pass
    assert torch.equal(model(batch["tokens"]), plain)


# ---------------------------------------------------------------- advantages


def naive_advantages(rewards: list[list[float | None]], scale: str) -> list[float]:
    """losses.md, group by group with plain floats."""

    def std(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    every = std([r for group in rewards for r in group if r is not None])
    out = []
    for group in rewards:
        given = [r for r in group if r is not None]
        mean = sum(given) / max(1, len(given))
        by = {"group": std(given or [0.0]) + 1e-4, "batch": every + 1e-4, "none": 1.0}[scale]
        out += [0.0 if r is None else (r - mean) / by for r in group]
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_their_formula(scale: Any) -> None:
    """With rewards that failed, groups of different sizes, one of which one is left, one of which none is, and one that all
    got right (whose sum is no round number, so that its mean is not quite any of them)."""
    rewards: list[list[float | None]] = [[1.0, 0.0, 0.5, 3.0], [None, 2.0, None, 1.0, 1.0], [None, None, 4.0]]
    rewards += [[None] * 2, [0.1 + 0.2] * 6]
    flat = torch.tensor([math.nan if r is None else r for group in rewards for r in group], dtype=torch.float64)
    group = torch.tensor([i for i, g in enumerate(rewards) for _ in g])
    found = advantages(flat, group, scale, deviation(flat, ALONE))
    torch.testing.assert_close(found, torch.tensor(naive_advantages(rewards, scale), dtype=torch.float64))
    assert found[9:].abs().max() < 1e-9
    moments = Moments.of(flat, group)
    assert moments.silent.tolist() == [False, False, True, True, True]
    assert moments.n.tolist() == [4, 3, 1, 0, 6]


def test_the_batchs_deviation_is_that_of_all_ranks() -> None:
    """Two ranks that hold the same rewards: the deviation of both together, wherever their numbers lie."""

    class Two(World):
        def sum(self, values: list[float]) -> list[float]:
            return [2 * v for v in values]

    rewards = torch.tensor([1e6 + 1, 1e6, math.nan, 1e6 + 4], dtype=torch.float64)
    both = torch.cat((rewards, rewards))
    expected = both[~both.isnan()].std().item()
    assert deviation(rewards, Two(0, 2, torch.device("cpu"))) == pytest.approx(expected, rel=1e-9)
    assert deviation(rewards[:1], ALONE) == deviation(rewards[:0], ALONE) == 0.0


# ---------------------------------------------------------------- rollouts

TEXT = varied_text(2000)


def talker(**changes: Any) -> tuple[Transformer, tok.Tokenizer]:
    tokenizer = tok.byte([TEXT], [TEXT])
    return made("dense", vocab_size=tokenizer.vocab_size, init_std=0.02, **changes), tokenizer


def asked(tokenizer: tok.Tokenizer, *prompts: str, **fields: Any) -> dict[str, Any]:
    ids = [tokenizer.encode(p) for p in prompts]
    T = max(map(len, ids)) + 2
    return {
        "tokens": torch.tensor([i + [7] * (T - len(i)) for i in ids]),
        "doc_ids": torch.tensor([[0] * len(i) + [-1] * (T - len(i)) for i in ids]),
        "fields": [dict(fields) for _ in ids],
    }


def one(strategy: GRPO, model: nn.Module, batch: dict[str, Any], seed: int = 3) -> dict[str, Any]:
    (collected,) = strategy.collect(model, [batch], [seed], ALONE)
    return collected


def outputs(batch: dict[str, Any]) -> list[list[int]]:
    """What is learned of each sequence."""
    flat = batch["targets"].flatten()
    return [flat[row[row >= 0]].tolist() for row in batch["slots"]]


def letters(completion: str, fields: dict[str, Any]) -> float:
    return float(len(completion.strip()))


@pytest.mark.parametrize("how", LAYOUTS)
def test_rollouts(how: str) -> None:
    """Every completion stands behind its own prompt, its stop token is a target and not part of what is judged, old
    log-probabilities are the model's without dropout, the engine's are the same but for their last bits, and the same seed
    draws the same."""
    model, tokenizer = talker(dropout=0.5)
    tokenizer = tok.Tokenizer(
        tokenizer.backend, stop_ids=[tokenizer.encode(c)[0] for c in "aeiou"]
    )  # ends some, not all
    model.train()
    heard: list[tuple[str, int]] = []

    def judge(completion: str, fields: dict[str, Any]) -> float:
        heard.append((completion, fields["answer"]))
        return float(len(completion))

    settings = {"group_size": 16, "max_completion": 40, "temperature": 1.3, "iterations": 2, "layout": how}
    strategy = strategy_of(tokenizer, **settings, rewards={"long": judge})
    assert strategy.stop_ids == tokenizer.stop_ids | {
        tokenizer.backend.token_to_id(tok.IM_END)
    }  # a chat's answers end so
    prompts = ("abc", "What is 1 + 1?")
    batch = asked(tokenizer, *prompts, answer=2)
    made_ = one(strategy, model, batch)
    assert model.training
    assert len(made_["slots"]) == 32 == len(heard)
    ended, model_logp = 0, []
    model.eval()
    for i, out in enumerate(outputs(made_)):
        prompt = tokenizer.encode(prompts[i // 16])
        stopped = out[-1] in strategy.stop_ids
        assert not strategy.stop_ids & set(out[:-1])
        ended += stopped
        assert stopped or len(out) == 40
        assert heard[i] == (tokenizer.decode(out[:-1] if stopped else out, skip_special=True), 2)
        logp = (model(torch.tensor([prompt + out[:-1]]))[0] / 1.3).log_softmax(-1)[len(prompt) - 1 :]
        model_logp.append(logp.gather(1, torch.tensor(out)[:, None])[:, 0].detach())
    assert 0 < ended < 32
    assert made_["metrics"]["completion/truncated"] == (32 - ended, 32)
    assert made_["metrics"]["completion/length"][0] == (made_["slots"] >= 0).sum()
    expected = nn.utils.rnn.pad_sequence(model_logp, batch_first=True)
    torch.testing.assert_close(made_["old_logprob"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made_["sampler_logprob"], expected, rtol=1e-5, atol=1e-5)
    text = f"abc -> {heard[0][0]} (reward {len(heard[0][0])})"
    assert made_["texts"][0] == text and len(made_["texts"]) == 4
    model.train()
    assert outputs(one(strategy, model, batch)) == outputs(made_)
    assert outputs(one(strategy, model, batch, seed=4)) != outputs(made_)


def test_prompts_of_several_batches_are_drawn_together() -> None:
    """What a prompt's completions are depends on its batch's seed and its place in it, not on the other batches; two rows
    with the same prompt are two groups, not one twice; with top_k=1 all are the likeliest one."""
    model, tokenizer = talker()
    batch, other = asked(tokenizer, "abc", "abc"), asked(tokenizer, "What?", "x", "y")
    strategy = strategy_of(tokenizer)
    both = strategy.collect(model, [other, batch], [1, 2], ALONE)
    assert [outputs(b) for b in both] == [outputs(one(strategy, model, b, s)) for b, s in ((other, 1), (batch, 2))]
    assert len(set(map(tuple, outputs(both[1])))) == 8
    assert strategy.collect(model, [], [], ALONE) == []
    likeliest = one(strategy_of(tokenizer, top_k=1), model, batch)
    assert len(set(map(tuple, outputs(likeliest)))) == 1
    assert likeliest["metrics"]["groups/no_signal"] == (2, 2)
    assert outputs(one(strategy_of(tokenizer, top_p=1e-6), model, batch)) == outputs(likeliest)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_gap(filters: dict[str, Any], temperature: float) -> None:
    """Measured against the trainer's full softmax at the temperature, whatever narrowed the drawing: the last bits; exactly 0
    with a deterministic engine, of all layouts; and what it is where the weights are not those that drew."""
    model, tokenizer = talker()
    batch = asked(tokenizer, "abc", "What is 1 + 1?")
    settings = {"temperature": temperature, "rewards": {"length": letters}} | filters
    made_ = one(strategy_of(tokenizer, **settings), model, batch)
    assert "old_logprob" not in made_  # the policy learns before it moves
    _, found = step(strategy_of(tokenizer, **settings), model, None, [made_])
    assert found["sampler/gap"] <= found["sampler/gap_max"] < 1e-5
    assert found["sampler/weight"] == pytest.approx(1, abs=1e-5)
    assert found["ratio/mean"] == 1
    for how in LAYOUTS:
        exact = strategy_of(tokenizer, Settings(cache_mb=16, deterministic=True), **settings, layout=how)
        collected = one(exact, model, batch)
        assert outputs(collected) == outputs(made_)
        model.train()  # which changes nothing without dropout
        _, found = step(exact, model, None, [collected])
        model.eval()
        assert found["sampler/gap_max"] == 0 and found["sampler/weight"] == 1
    other = made("dense", vocab_size=tokenizer.vocab_size, init_std=0.02, seed=5)
    assert step(strategy_of(tokenizer, **settings), other, None, [made_])[1]["sampler/gap"] > 1e-3


def test_several_updates_of_a_rollout() -> None:
    """With old log-probabilities the first update is as it would be without; after it the ratio has left 1."""
    model, tokenizer = talker()
    batch = asked(tokenizer, "abc", "What is 1 + 1?")
    for changes in ({"iterations": 2}, {"steps_per_rollout": 2}, {"correction": "truncate"}):
        strategy = strategy_of(tokenizer, **changes, rewards={"length": letters})
        assert (strategy.iterations, strategy.steps_per_rollout) == (
            changes.get("iterations", 1),
            changes.get("steps_per_rollout", 1),
        )
        collected = one(strategy, model, batch)
        loss, found = step(strategy, model, None, [collected])
        assert found["ratio/mean"] == pytest.approx(1, abs=1e-6) and found["clip/low"] == found["clip/high"] == 0
        wanted = grads(model)
        first = one(strategy_of(tokenizer, rewards={"length": letters}), model, batch)
        assert step(strategy_of(tokenizer), model, None, [first])[0] == pytest.approx(loss, abs=1e-5)
        same(grads(model), wanted, 1e-4)
    moved = made("dense", vocab_size=tokenizer.vocab_size, init_std=0.02)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert abs(step(strategy, moved, None, [collected])[1]["ratio/mean"] - 1) > 1e-3


def test_rewards_that_fail_teach_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """None, an exception, a number that is none and a text: no advantage, out of the mean, counted, said once."""
    model, tokenizer = talker()
    calls = itertools.count()

    def odd(completion: str, fields: dict[str, Any]) -> Any:
        i = next(calls)
        return [1.0, None, 1 / 0 if i == 2 else 0.0, math.inf, "text", 3.0, 2.0, math.nan][i]

    strategy = strategy_of(tokenizer, rewards={"odd": odd, "half": lambda c, f: 0.5})
    batch = one(strategy, model, asked(tokenizer, "abc", "def"))
    got = batch["advantages"].tolist()
    assert got == pytest.approx([0, 0, 0, 0, 0, 0.5**0.5, -(0.5**0.5), 0], abs=1e-3)
    found = {k: (float(s), float(n)) for k, (s, n) in batch["metrics"].items()}
    assert found["reward/mean"] == (1.5 + 3.5 + 2.5, 3)
    assert found["reward/odd"] == (6.0, 3) and found["reward/half"] == (4.0, 8)
    assert found["reward/failed"] == (5, 8) and found["groups/no_signal"] == (1, 2)
    assert found["reward/std"] == (pytest.approx(0.5**0.5), 1)
    assert [t.rpartition(" (")[2] for t in batch["texts"]] == ["reward 1.5)", *["no reward)"] * 3]
    said = capsys.readouterr().err
    assert said.count("warning: reward odd raised ZeroDivisionError: division by zero") == 1 and "text" not in said


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("reduction", grpo.REDUCTIONS)
def test_overlong_completions_count_nowhere(how: str, reduction: str) -> None:
    """Loss, gradients and advantages are those of the batch without them."""
    model, tokenizer = talker()
    tokenizer = tok.Tokenizer(tokenizer.backend, stop_ids=[tokenizer.encode(c)[0] for c in "aeiou"])
    settings = {"group_size": 6, "max_completion": 8, "rewards": {"length": letters}, "reduction": reduction}
    settings |= {"temperature": 1.3, "layout": how}
    batch = asked(tokenizer, "abc", "def", "What is it?")
    plain = one(strategy_of(tokenizer, **settings), model, batch)
    strategy = strategy_of(tokenizer, **settings, mask_overlong=True)
    masked = one(strategy, model, batch)
    ends = [out[-1] in strategy.stop_ids for out in outputs(plain)]
    assert 2 < sum(ends) < 16
    assert outputs(masked) == [out if end else [] for out, end in zip(outputs(plain), ends)]
    assert masked["metrics"]["completion/masked"] == plain["metrics"]["completion/truncated"] == (18 - sum(ends), 18)
    assert masked["metrics"]["reward/mean"] == plain["metrics"]["reward/mean"]  # of all that was judged
    rewards: list[list[float | None]] = [[], [], []]
    rows, drawn = [], []
    for i, (out, end) in enumerate(zip(outputs(plain), ends)):
        text = tokenizer.decode(out[:-1] if end else out, skip_special=True)
        rewards[i // 6].append(letters(text, {}) if end else None)
        if end:
            prompt = tokenizer.encode(("abc", "def", "What is it?")[i // 6])
            rows.append(Row(torch.tensor(prompt + out), torch.arange(len(prompt + out)) >= len(prompt)))
            drawn.append(masked["sampler_logprob"][i][: len(out)])
    assert masked["advantages"].tolist() == pytest.approx(naive_advantages(rewards, "group"), abs=1e-5)
    assert not masked["sampler_logprob"][masked["slots"] < 0].any()
    alone = laid({"rows": rows, "advantages": masked["advantages"][torch.tensor(ends)], "sampler_logprob": drawn})
    expected, metrics = step(strategy, model, None, [alone])
    wanted = grads(model)
    loss, found = step(strategy, model, None, [masked])
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert strategy.weight(masked) == strategy.weight(alone)
    assert {k: found[k] for k in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    same(grads(model), wanted, 1e-4)


@pytest.mark.parametrize("how", LAYOUTS)
def test_groups_without_signal_are_dropped(how: str) -> None:
    """They are not even computed, and the update is that of the others; where none is left, there is still a backward pass
    through every parameter, of zeros, and nothing that weighs."""
    model, tokenizer = talker()
    told = lambda c, f: letters(c, f) if f["answer"] else 1.0  # noqa: E731
    strategy = strategy_of(tokenizer, rewards={"told": told}, drop_silent=True, layout=how)
    batch = asked(tokenizer, "abc", "What is it?", "def")
    batch["fields"][1]["answer"], batch["fields"][0]["answer"], batch["fields"][2]["answer"] = True, False, False
    kept = one(strategy, model, batch)
    every = one(strategy_of(tokenizer, rewards={"told": told}, layout=how), model, batch)
    assert outputs(kept) == outputs(every)[4:8] and len(kept["advantages"]) == len(kept["sampler_logprob"]) == 4
    assert kept["metrics"]["groups/dropped"] == (2, 3) == kept["metrics"]["groups/no_signal"]
    assert (kept["doc_ids"] >= 0).sum() < (every["doc_ids"] >= 0).sum() / 2
    assert kept["metrics"]["reward/mean"] == every["metrics"]["reward/mean"]
    torch.testing.assert_close(kept["advantages"], every["advantages"][4:8])
    batch["fields"][1]["answer"] = False
    nothing = one(strategy, model, batch)
    assert nothing["metrics"]["groups/dropped"] == (3, 3)
    for reduction in grpo.REDUCTIONS:
        empty = strategy_of(tokenizer, reduction=reduction, correction="mask", beta=0.1, layout=how)
        assert empty.weight(nothing) == 0
        nothing["old_logprob"] = torch.zeros_like(nothing["sampler_logprob"])
        loss, metrics = step(empty, model, model, [nothing])
        assert loss == 0 and all(math.isfinite(v) for v in metrics.values())
        found = grads(model)
        assert len(found) == len(list(model.parameters())) and not any(g.any() for g in found.values())


def test_what_is_kept_of_a_rollout_can_be_saved() -> None:
    """Tensors, metrics and JSON: a checkpoint in the middle of a window holds all of it."""
    model, tokenizer = talker()
    settings = {"iterations": 2, "drop_silent": True, "mask_overlong": True, "correction": "mask"}
    for how, exact in itertools.product(LAYOUTS, (False, True)):
        engine = Settings(cache_mb=16, deterministic=exact)
        batch = one(strategy_of(tokenizer, engine, **settings, layout=how), model, asked(tokenizer, "abc", answer="x"))
        names = {"tokens", "targets", "doc_ids", "slots", "advantages", "old_logprob", "sampler_logprob"}
        assert {k for k, v in batch.items() if isinstance(v, Tensor)} == names | (
            {"branches"} if how == "shared" else set()
        )
        rest = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
        assert all(isinstance(t, Tensor) for pair in rest.pop("metrics").values() for t in pair)
        assert json.loads(json.dumps(rest)) == rest == {"texts": batch["texts"]}
        stored = [v.untyped_storage().data_ptr() for v in batch.values() if isinstance(v, Tensor)]
        assert len(set(stored)) == len(stored)  # safetensors takes no two tensors over the same memory


def test_validation_is_greedy() -> None:
    """One completion of each prompt, the likeliest token at each place, judged; nothing depends on the seed."""
    model, tokenizer = talker()
    heard: list[str] = []
    strategy = strategy_of(tokenizer, rewards={"heard": lambda c, f: heard.append(c) or len(heard)})  # type: ignore[func-returns-value]
    batch = asked(tokenizer, "abc", "What is 1 + 1?", "")
    batch = {k: v[:2] for k, v in batch.items()}
    found = strategy.evaluate(model, batch, 0)
    for prompt, text in zip(("abc", "What is 1 + 1?"), heard):
        ids = tokenizer.encode(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert tokenizer.decode(ids[len(tokenizer.encode(prompt)) :], skip_special=True).startswith(text)
    assert found["reward/mean"] == found["reward/heard"] == (3.0, 2) and found["reward/failed"] == (0, 2)
    assert found["completion/length"][1] == 2 and len(heard) == 2
    strategy.evaluate(model, batch, 7)
    assert heard[:2] == heard[2:]


# ---------------------------------------------------------------- groups from files


def files(strategy: GRPO, model: nn.Module, batch: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """The completions of a rollout as a loader would give them, with their lengths as rewards."""
    tokenizer = strategy.tokenizer
    whole = [tokenizer.encode(prompts[i // 4]) + out for i, out in enumerate(outputs(batch))]
    starts = [len(tokenizer.encode(prompts[i // 4])) for i in range(len(whole))]
    T = max(map(len, whole)) + 3
    tokens, targets, doc_ids = (
        torch.full((len(whole), T), 9),
        torch.full((len(whole), T), -100),
        torch.full((len(whole), T), -1),
    )
    for row, (ids, start) in enumerate(zip(whole, starts)):
        n = len(ids) - 1
        tokens[row, :n], doc_ids[row, :n] = torch.tensor(ids[:-1]), 0
        targets[row, start - 1 : n] = torch.tensor(ids[start:])
    texts = [
        tokenizer.decode([i for i in out if i not in strategy.stop_ids], skip_special=True) for out in outputs(batch)
    ]
    rewards = torch.tensor([letters(t, {}) for t in texts])
    group = torch.arange(len(prompts)).repeat_interleave(4)
    return {"tokens": tokens, "targets": targets, "doc_ids": doc_ids, "group": group, "rewards": rewards}


@pytest.mark.parametrize("how", LAYOUTS)
def test_groups_of_files_are_learnt_like_those_drawn(how: str) -> None:
    """The same completions with the same rewards: the same loss and gradients; nothing is said of a sampler."""
    model, tokenizer = talker()
    tokenizer = tok.Tokenizer(tokenizer.backend, stop_ids=[tokenizer.encode(c)[0] for c in "aeiou"])
    settings: dict[str, Any] = {"layout": how, "iterations": 2, "mask_overlong": True, "scale": "batch"}
    strategy = strategy_of(tokenizer, **settings, temperature=1.3, rewards={"length": letters})
    prompts = ["abc", "What is 1 + 1?"]
    every = one(strategy_of(tokenizer, temperature=1.3, layout=how), model, asked(tokenizer, *prompts))
    drawn = one(strategy, model, asked(tokenizer, *prompts))
    given = one(strategy, model, files(strategy, model, every, prompts))
    for name in ("tokens", "targets", "doc_ids", "slots", "advantages", "old_logprob"):
        torch.testing.assert_close(given[name], drawn[name])
    assert "sampler_logprob" not in given and given["texts"] == drawn["texts"]
    assert {k: v for k, v in drawn["metrics"].items() if k != "reward/length"} == given["metrics"]
    loss, metrics = step(strategy, model, None, [given])
    assert loss == pytest.approx(step(strategy, model, None, [drawn])[0], rel=1e-6)
    assert not any(k.startswith("sampler") for k in metrics)


def test_groups_of_files_may_be_of_any_size() -> None:
    """Uneven groups, rewards that are missing; their prompts are not shared then. In validation the reward is that of the
    completion that the policy finds likeliest."""
    model, tokenizer = talker()
    strategy = strategy_of(tokenizer)
    prompts = ["abc", "What is 1 + 1?"]
    batch = files(strategy, model, one(strategy, model, asked(tokenizer, *prompts)), prompts)
    batch["group"][3], batch["rewards"][4] = 1, math.nan
    collected = one(strategy, model, batch)
    assert "branches" not in collected and "old_logprob" not in collected
    rewards = [r if r == r else None for r in batch["rewards"].tolist()]
    expected = naive_advantages([rewards[:3], rewards[3:]], "group")
    assert collected["advantages"].tolist() == pytest.approx(expected, abs=1e-5)
    assert collected["metrics"]["reward/failed"] == (1, 8)
    step(strategy, model, None, [collected])
    with torch.no_grad():
        logp = model(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[0].logprob
    mean = (logp.sum(1) / (batch["targets"] >= 0).sum(1)).tolist()
    best = [max(some, key=lambda i: mean[i]) for some in (range(3), [i for i in range(3, 8) if i != 4])]
    found = strategy.evaluate(model, batch, 0)
    assert found["reward/mean"] == (sum(batch["rewards"][i] for i in best), 2)
    assert found["reward/given"] == (batch["rewards"].nansum(), 7)
    assert float(found["entropy"][0] / found["entropy"][1]) > 1


def test_a_row_without_its_completion() -> None:
    """As much as a backward pass needs, also of a prompt of one token."""
    row = Row(torch.tensor([5, 6, 7, 8]), torch.tensor([False, False, True, True]))
    assert unlearned(row).ids.tolist() == [5, 6, 7] and not unlearned(row).learned.any()
    assert unlearned(Row(row.ids, row.learned & False)).ids.tolist() == [5, 6]


# ---------------------------------------------------------------- runs


def test_what_a_user_can_mend_stops_the_run() -> None:
    """A reward that looks at a field which the rows lack; prompts that leave no positions; a prompt of nothing; a model whose
    weights are damaged."""
    model, tokenizer = talker()
    node = {"_target_": "etude.reward.exact", "_partial_": True, "field": "anser", "weight": 1.0}
    strategy = strategy_of(tokenizer, rewards={"exact": build(node)})
    with pytest.raises(Refusal, match="the field anser, and the row has answer, task: set field="):
        one(strategy, model, asked(tokenizer, "abc", answer=1, task="x"))
    with pytest.raises(Refusal, match="a prompt has no tokens"):
        one(strategy, model, asked(tokenizer, "abc", "", anser=1))
    limited = made("gpt", vocab_size=tokenizer.vocab_size, max_len=20)
    with pytest.raises(Refusal, match="of 9 tokens and strategy.max_completion=12 are more than the model's 20"):
        one(strategy, limited, asked(tokenizer, "x" * 9, anser=1))
    rows = strategy_of(tokenizer, rewards={"exact": build(node)}, layout="rows")
    batch = one(rows, limited, asked(tokenizer, "x" * 8, anser=1))
    assert batch["tokens"].shape == (4, 20)  # padded to no more than there are positions
    for how in LAYOUTS:
        other = strategy_of(tokenizer, layout=how)
        found = step(other, limited, None, [one(other, limited, asked(tokenizer, "x" * 8, "y"))])
        assert math.isfinite(found[0])
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    with pytest.raises(NonFinite, match="logits are NaN"):
        one(strategy, model, asked(tokenizer, "abc", anser=1))
    assert not model.training


def test_in_bfloat16_the_ratio_begins_at_one() -> None:
    """Rollouts, old log-probabilities and loss under one autocast: nothing that sampling cached is without gradient."""
    model, tokenizer = talker()
    strategy = strategy_of(tokenizer, rewards={"length": letters}, iterations=2)
    with torch.autocast("cpu", torch.bfloat16):
        batch = one(strategy, model, asked(tokenizer, "abc", "de"))
        loss, metrics = strategy.loss(model, None, batch)
    n = (batch["slots"] >= 0).sum(1)
    assert loss.item() == pytest.approx(float(-(batch["advantages"] * n).sum()), abs=1e-4)
    assert metrics["clip/low"][0] == metrics["clip/high"][0] == 0
    assert 1e-5 < float(metrics["sampler/gap"][0] / metrics["sampler/gap"][1]) < 0.05
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"objective": "cispo", "steps_per_rollout": 2}, {"level": "sequence", "drop_silent": True}], ids=str
)
def test_the_reward_rises(changes: dict[str, Any]) -> None:
    """A bandit: the share of the letter e. From chance to most of what is written in 30 updates of the plain recipe."""
    alphabet = "abcdefgh"
    tokenizer = tok.char([alphabet], [alphabet], unknown="error")
    model = made("dense", vocab_size=tokenizer.vocab_size, init_std=0.05)
    share = lambda completion, fields: completion.count("e") / len(completion)  # noqa: E731
    strategy = strategy_of(tokenizer, group_size=8, max_completion=8, rewards={"share": share}, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = asked(tokenizer, "a", "bcd", "hg", "fab")
    curve = []
    for i in range(0, 30, strategy.steps_per_rollout):
        n = strategy.steps_per_rollout
        for collected in strategy.collect(model, [batch] * n, list(range(i, i + n)), ALONE):
            _, metrics = step(strategy, model, None, [collected])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(metrics["reward/mean"])
    assert sum(curve[:3]) / 3 < 0.3 and sum(curve[-3:]) / 3 > 0.8, curve


# ---------------------------------------------------------------- rewards and config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.0", "1"),
        ("Natalia sold 48/2 = 24 clips.\n#### 72", "72"),
        ("#### 5 and no more than 9", "5"),
        ("so $1,234.50.", "1234.5"),
        (r"\boxed{3} is wrong, so \boxed{-1/2} (of 7)", "-1/2"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("that makes \u22124", "-4"),
        (".5 of it", "0.5"),
        ("1e-3", "1/1000"),
        ("20%", "20"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("0.1", "1/10"),
    ],
)
def test_the_final_number(text: str, number: str) -> None:
    """Written in another way it is the same number, exactly; the sign of a subtraction is not the number's."""
    right = lambda completion, answer: reward.number(completion, {"answer": answer}, field="answer", weight=2.0)  # noqa: E731
    assert right(text, number) == right(number, text) == 2.0
    assert right(text + " 987", number) == (2.0 if "####" in text or "boxed" in text else 0.0)
    assert right("no idea", number) == right(number, "-" + number.replace("-", "7")) == 0.0


def test_answers_that_cannot_be_judged() -> None:
    """A field without a number; divisions by zero and numbers so long that they would take for ever are no answers."""
    judge = lambda completion, answer: reward.number(completion, {"answer": answer}, field="answer", weight=1.0)  # noqa: E731
    assert judge("3", "none") is None and judge("3", None) is None
    assert judge("3", 3) == judge("0.5", 0.5) == judge("1e22", 1e22) == 1.0
    assert judge("1/0", 1) == judge("9" * 100_000, 1) == judge("1e999999999", 1) == judge("####", 1) == 0.0
    assert judge("####", "#### 7") == 0.0
    assert reward.exact(" 4\n", {"a": 4}, field="a", weight=1.0) == 1.0
    assert reward.exact("4.0", {"a": 4}, field="a", weight=1.0) == 0.0
    assert [reward.length("x" * n, {}, limit=10, weight=0.5) for n in (0, 10, 15, 20, 99)] == [0, 0, -0.25, -0.5, -0.5]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>2 + 2 < 5</think><answer>4</answer>", True),
        ("\n<think>\na\n</think>\n\n<answer></answer>\n", True),
        ("<answer>4</answer><think>a</think>", False),
        ("<think>a</think>", False),
        ("<think>a</think><answer>4", False),
        ("<think>a</think>so <answer>4</answer>", False),
        ("well <think>a</think><answer>4</answer>", False),
        ("<think>a</think><answer>4</answer>.", False),
        ("<think>a</think><answer>4</answer><answer>5</answer>", False),
        ("<think>a<think>b</think><answer>4</answer>", False),
        ("<think>a<answer>1</answer></think><answer>4</answer>", False),
        ("<think>a</think><answer>4</think></answer>", False),
        ("", False),
    ],
)
def test_the_format_reward(text: str, right: bool) -> None:
    """Each tag once, in order, around everything."""
    assert reward.format(text, {}, tags=["think", "answer"], weight=0.5) == 0.5 * right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("x = 1", True),
        ("def f(x):\n    return x\n", True),
        ("    indented = 'as in the middle of a file'", True),
        ("Here it is:\n```python\ndef f():\n    pass\n```\nDone, is it not?", True),
        ("```\nx = 1\n```\nand\n```py\ny = x +\n```", False),
        ("```bash\nls -l\n```\n```python\nimport os\n```", True),
        ("```bash\nls -l\n```", False),
        ("```python\nx = (1,\n     2)", True),
        ("1.\n   ```python\n   if x:\n       y()\n   ```", True),
        ("x = '\\d'", True),
        ("def f(:", False),
        ("for what it is worth", False),
        ("# nothing but a remark", False),
        ("```python\n```", False),
        ("x = 1\0", False),
        ("(" * 5000, False),
        ("-" * 100_000 + "1", False),
        ("", False),
    ],
)
def test_the_python_reward(text: str, right: bool) -> None:
    """Syntax alone, of the fenced blocks or of everything; nothing runs, warns or ends the process."""
    assert reward.python(text, {}, weight=1.0) == right


def test_the_regex_reward() -> None:
    assert reward.regex("so\n#### 7", {}, pattern=r"(?m)^####\s*\S", weight=0.5) == 0.5
    assert reward.regex("so #### 7", {}, pattern=r"(?m)^####\s*\S", weight=0.5) == 0.0


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(compose("train", overrides=["strategy=grpo", *overrides]), "train")


def test_each_reward_can_be_added_by_name() -> None:
    """The commands of docs/grpo.md: beside the first one, in its place, or alone; and each can be built and called."""
    names = sorted(p.stem for p in (CONF / "reward").glob("*.yaml"))
    names.remove("model")  # which is given ids, all at once: see test_reward_model.py
    added = [x for n in names for x in (f"+reward@strategy.rewards.my_{n}={n}", f"strategy.rewards.my_{n}.weight=3")]
    rewards = composed(*added)["strategy"]["rewards"]
    assert list(rewards) == ["number", *(f"my_{n}" for n in names)]
    for name in names:
        assert rewards[f"my_{name}"]["_target_"] == f"etude.reward.{name}"
        assert abs(build(rewards[f"my_{name}"])("1" * 9999, {"answer": "1"})) in (0, 3)
    assert composed("reward@strategy.rewards.number=exact")["strategy"]["rewards"]["number"]["_target_"].endswith(
        "exact"
    )
    alone = composed("~reward@strategy.rewards.number", "+reward@strategy.rewards.more=length")
    assert list(alone["strategy"]["rewards"]) == ["more"]


def test_it_can_be_built_from_its_yaml() -> None:
    """With the engine's settings for rollouts, unless engine= says otherwise, and its own data, unless data= does."""
    cfg = composed()
    assert cfg["engine"]["step_tokens"] == 2048 and composed("engine=default")["engine"]["step_tokens"] == 512
    assert cfg["data"]["_target_"].endswith(".Prompts") and composed("data=stdlib")["data"]["_target_"].endswith(
        "Stdlib"
    )
    strategy = build(cfg["strategy"], tok.byte([], []), build(cfg["engine"]))
    assert strategy.kinds == ("prompts", "groups") and not strategy.needs_reference and strategy.sync_interval is None
    assert (strategy.steps_per_rollout, strategy.iterations) == (1, 1)
    tuned = composed("strategy.beta=0.04", "strategy.sync_interval=100", "strategy.iterations=2")
    strategy = build(tuned["strategy"], tok.byte([], []), build(cfg["engine"]))
    assert strategy.needs_reference and (strategy.sync_interval, strategy.iterations) == (100, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"max_completion": 0}, "strategy.max_completion=0 should be at least 1"),
        ({"steps_per_rollout": 0}, "strategy.steps_per_rollout=0 should be at least 1"),
        ({"iterations": 0}, "strategy.iterations=0 should be at least 1"),
        ({"temperature": 0}, "above 0: at 0 a group is one completion"),
        ({"top_k": 0}, "strategy.top_k=0 should be at least 1"),
        ({"top_p": 2}, "strategy.top_p=2 should be above 0 and at most 1"),
        ({"clip_low": 0}, "strategy.clip_low=0 should be above 0"),
        ({"delta": 1}, "strategy.delta=1 should be above 1"),
        ({"delta": 2, "objective": "cispo"}, "caps the ratio of objective=clip alone"),
        ({"e_max": 0}, "strategy.e_max=0 should be above 0"),
        ({"tau_neg": -1}, "strategy.tau_neg=-1 should be above 0"),
        ({"beta": -1}, "at least 0"),
        ({"sync_interval": 10}, "type strategy.beta=0.04, or strategy.sync_interval=null"),
        ({"sync_interval": 0, "beta": 1}, "at least 1 step"),
        ({"correction_cap": 0.5}, "strategy.correction_cap=0.5 should be at least 1"),
        ({"rewards": {}}, "strategy.rewards is empty"),
        ({"rewards": {"std": letters}}, "choose another name"),
        ({"rewards": {"l": 3}}, "type .reward@strategy.rewards.l=<a file of conf/reward>"),
        ({"rewards": {"l": {"_target_": "x.y"}}}, "with a _target_ and _partial_: true"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),  # not a function's address
)
def test_grpo_settings_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strategy_of(**changes)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy.sync_interval=10", "type strategy.beta=0.04, or strategy.sync_interval=null"),
        ("~strategy.rewards.number", "strategy.rewards is empty"),
        ("+strategy.rewards.l={_target_:etude.reward.length,_partial_:true,limit:0,weight:1}", "limit=0"),
        ("+strategy.rewards.l={_target_:etude.reward.lenght,_partial_:true}", "did you mean etude.reward.length"),
        ("strategy.rewards.number=3", "type .reward@strategy.rewards.number=<a file of conf/reward>"),
        ("+reward@strategy.rewards.f=format strategy.rewards.f.tags=[]", "should be different names without brackets"),
        ("+reward@strategy.rewards.r=regex strategy.rewards.r.pattern='('", "is no regular expression"),
        ("strategy.reduction=mean", "should be one of grpo, bnpo, dr_grpo, dapo"),
        ("strategy.layout=row", "should be one of rows, packed, shared"),
    ],
)
def test_what_is_typed_wrong_is_refused_before_torch(override: str, said: str) -> None:
    """The same checks, as config.py runs them, and those of rewards."""
    with pytest.raises(Refusal, match=said):
        composed(*override.split())

"""Strategies: losses and gradients that TRL recorded, naive formulas, one step however it is cut, and GRPO that learns."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import varied_text
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from test_model import made
from torch import Tensor, nn

from etude import reward
from etude.config import CONF, build, check
from etude.errors import Refusal
from etude.interop import architectures, convert
from etude.model.head import Scores
from etude.model.transformer import Transformer
from etude.strategy import dpo, grpo
from etude.strategy.dpo import DPO
from etude.strategy.grpo import GRPO, advantages, assemble, tempered
from etude.strategy.seq import Seq
from etude.text import tokenizer as tok

GOLDEN = Path(__file__).parent / "golden" / "trl"
CASES = {c["name"]: c for c in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
RECORDED = load_file(GOLDEN / "tensors.safetensors")
PAIRS = {"beta": 0.3, "loss": "sigmoid", "label_smoothing": 0.0, "gamma": 1.0}
ONLINE: dict[str, Any] = {
    "group_size": 4,
    "max_completion": 12,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "beta": 0.0,
    "scale": "group",
    "reduction": "dapo",
    "rewards": {"nothing": lambda completion, fields: 0.0},
}


def step(strategy: Any, model: nn.Module, ref: nn.Module | None, batches: list[dict]) -> tuple[float, dict[str, float]]:
    """The loop's contract: sums over micro-batches, each divided by its weight over the whole step. -> (loss, metrics);
    gradients are left in the model."""
    model.zero_grad()
    weights = torch.stack([torch.tensor(strategy.weight(b), dtype=torch.float64) for b in batches]).sum(0)
    total = 0.0
    sums: dict[str, tuple[Any, Any]] = {}
    for batch in batches:
        loss, metrics = strategy.loss(model, ref, batch)
        loss = (loss / weights).sum()
        loss.backward()
        total += loss.item()
        for name, (s, n) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + s, before[1] + n
    found = {k: float(s) / float(n) for k, (s, n) in sums.items() if k != "router/load"}
    return total, {"loss": sum(v for k, v in found.items() if k.startswith("loss/"))} | found


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of each tensor's norm."""
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm(), name


# ---------------------------------------------------------------- what TRL recorded


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Transformer]:
    """A model of tests/golden/trl by name, fresh at each call."""
    folder = tmp_path_factory.mktemp("golden")

    def load(name: str) -> Transformer:
        if not (folder / name).exists():
            cfg = {"from": str(GOLDEN / name), "to": str(folder / name), "dtype": "keep", "shard_gb": 1.0}
            assert convert.run(cfg | {"trusted": ["etude"]}) == 0
        return Transformer.from_pretrained(folder / name)

    return load


def recorded(case: str) -> dict[str, Tensor]:
    tensors = {k.removeprefix(f"{case}/in/"): v for k, v in RECORDED.items() if k.startswith(f"{case}/in/")}
    return {k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}


def hold(case: str, loss: float, model: Transformer, name: str = "policy") -> None:
    """The recorded loss to 5e-6 and gradients to 5e-4 of their norm (of embedding and head, every sixteenth row)."""
    assert loss == pytest.approx(CASES[case]["loss"], abs=5e-6)
    arch, node = architectures.read(json.loads((GOLDEN / name / "config.json").read_text()))
    ours = {e.theirs[0]: e.ours[0] for e in convert._entries(arch, node, 334) if len(e.theirs) == 1}
    found = grads(model)
    expected = {k.removeprefix(f"{case}/grad/"): v for k, v in RECORDED.items() if k.startswith(f"{case}/grad/")}
    assert len(expected) >= 7
    mine = {k: found[ours[k.removesuffix("/some")]][:: 16 if k.endswith("/some") else 1] for k in expected}
    same(mine, expected, 5e-4)


def supervised(case: str) -> dict[str, Tensor]:
    given = recorded(case)
    targets = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
    doc_ids = given["seq_idx"] if "seq_idx" in given else given["attention_mask"] - 1
    return {"tokens": given["input_ids"], "targets": targets, "doc_ids": doc_ids}


@pytest.mark.parametrize("case", ["sft_completion", "sft_assistant_only", "sft_all", "sft_packed_bfd"])
@pytest.mark.parametrize("cut", [1, 4])
def test_sft_is_trls(case: str, cut: int, theirs: Callable[[str], Transformer]) -> None:
    """Completions, assistant turns, everything and packed documents, whole and row by row."""
    model, batch = theirs("policy"), supervised(case)
    batches = [{k: v[i::cut] for k, v in batch.items()} for i in range(min(cut, len(batch["tokens"])))]
    loss, metrics = step(Seq(label_smoothing=0.0, z_loss=0.0), model, None, batches)
    hold(case, loss, model)
    assert metrics["entropy"] == pytest.approx(CASES[case]["metrics"]["entropy"], abs=1e-5)


def test_sft_of_experts_is_trls(theirs: Callable[[str], Transformer]) -> None:
    """Its balance loss is over the tokens of all rows and layers together, ours of each row and layer: theirs is computed
    here from our routers, so that loss and gradients of the rest can be held."""
    model, batch = theirs("policy_moe"), supervised("sft_moe")
    seen: list[Tensor] = []
    for block in model.blocks:
        block.ffn.aux_loss = 0.0
        block.ffn.register_forward_pre_hook(lambda ffn, x: seen.append(F.linear(x[0], ffn.router.weight)))
    loss, metrics = step(Seq(label_smoothing=0.0, z_loss=0.0), model, None, [batch])
    model.zero_grad()
    seen.clear()
    scores, _ = model(batch["tokens"], targets=batch["targets"])
    p = torch.cat([logits[batch["doc_ids"] >= 0] for logits in seen]).softmax(-1)
    chosen = F.one_hot(p.topk(2).indices, 4).float().mean(0).sum(0)
    balance = 4 * (chosen * p.mean(0)).sum()
    assert balance.item() == pytest.approx(CASES["sft_moe"]["metrics"]["aux_loss"], abs=1e-5)
    (-scores.logprob.sum() / (batch["targets"] >= 0).sum() + 0.01 * balance).backward()
    hold("sft_moe", loss + 0.01 * balance.item(), model, "policy_moe")
    assert metrics["entropy"] == pytest.approx(CASES["sft_moe"]["metrics"]["entropy"], abs=1e-5)


def preferences(case: str) -> dict[str, Tensor]:
    """TRL has all chosen rows, then all rejected ones: here they take turns."""
    given = recorded(case)
    labels = given["input_ids"].where(given["completion_mask"] > 0, -100)
    batch = {
        "tokens": given["input_ids"],
        "targets": F.pad(labels[:, 1:], (0, 1), value=-100),
        "doc_ids": given["attention_mask"] - 1,
    }
    return {k: v.view(2, -1, v.shape[1]).transpose(0, 1).flatten(0, 1) for k, v in batch.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("dpo")])
@pytest.mark.parametrize("cut", [1, 3])
def test_dpo_is_trls(case: str, cut: int, theirs: Callable[[str], Transformer]) -> None:
    """Losses, gradients and metrics, three pairs at once and one by one."""
    config = CASES[case]["config"]
    kinds = config["loss_type"]
    loss = dict(zip(kinds, config["loss_weights"])) if isinstance(kinds, list) else kinds
    strategy = DPO(beta=config["beta"], loss=loss, label_smoothing=float(config["label_smoothing"]), gamma=1.0)
    model, ref = theirs("policy"), theirs("ref")
    batch = preferences(case)
    found, metrics = step(strategy, model, ref, pieces(batch, cut, 2))
    hold(case, found, model)
    assert metrics["loss"] == pytest.approx(CASES[case]["loss"], abs=5e-6)
    names = {"accuracy": "accuracies", "margin": "margins"}
    for name, value in CASES[case]["metrics"].items():
        if name == "entropy" or name.startswith(("rewards", "logps")):
            ours = next((name.replace(theirs, ours) for ours, theirs in names.items() if theirs in name), name)
            assert metrics[ours] == pytest.approx(value, abs=1e-5), name
    assert not any(p.grad is not None for p in ref.parameters())


def pieces(batch: dict[str, Any], cut: int, rows: int = 1) -> list[dict[str, Any]]:
    """A batch as `cut` micro-batches of whole samples of `rows` rows each."""
    size = len(batch["tokens"]) // cut
    assert size % rows == 0
    return [{k: v[i : i + size] for k, v in batch.items() if k != "metrics"} for i in range(0, size * cut, size)]


def rolled_out(case: str) -> dict[str, Any]:
    """What GRPO.collect would have made of the recorded completions, with the reference's log-probabilities beside."""
    given = recorded(case)
    prompts = [row[mask > 0].tolist() for row, mask in zip(given["prompt_ids"], given["prompt_mask"])]
    completions = [row[mask > 0].tolist() for row, mask in zip(given["completion_ids"], given["completion_mask"])]
    batch: dict[str, Any] = assemble(prompts, completions, None)
    mask = batch["targets"] >= 0
    for name in ("old", "ref"):
        batch[f"{name}_logprob"] = torch.zeros(mask.shape)
        batch[f"{name}_logprob"][mask] = given[f"{name}_per_token_logps"][given["completion_mask"] > 0]
    return batch | {"advantages": given["advantages"]}


class Recorded(nn.Module):
    """A reference whose log-probabilities were recorded."""

    def __init__(self, logprob: Tensor):
        super().__init__()
        self.logprob, self.norm, self.logit_cap = logprob, nn.Identity(), None

    def forward(self, tokens: Tensor, targets: Tensor, doc_ids: Tensor) -> Any:
        zero = torch.zeros_like(self.logprob)
        return Scores(self.logprob, zero, zero, zero), None


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("grpo")])
def test_grpo_is_trls(case: str, theirs: Callable[[str], Transformer]) -> None:
    """Completions, advantages and old log-probabilities as recorded; ratios far enough from 1 to be clipped."""
    config = CASES[case]["config"]
    settings = {"clip_high": config.get("epsilon_high", 0.2), "beta": config.get("beta", 0.0)}
    settings |= {"reduction": config["loss_type"], "max_completion": config["max_completion_length"]}
    strategy = GRPO(tok.byte([], []), **ONLINE | settings)
    model, batch = theirs("policy"), rolled_out(case) | {"metrics": {}}
    ref = Recorded(batch["ref_logprob"])
    loss, metrics = step(strategy, model, ref if strategy.needs_reference else None, [batch])
    hold(case, loss, model)
    for name, value in CASES[case]["metrics"].items():
        ours = {"clip_ratio/low_mean": "clip/low", "clip_ratio/high_mean": "clip/high"}.get(name, name)
        if ours in metrics:
            assert metrics[ours] == pytest.approx(value, abs=1e-5), name


# ---------------------------------------------------------------- preferences


def ragged(pairs: int = 8, V: int = 61, T: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Random pairs of rows of any lengths, with targets behind prompts of any lengths and some left out."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    tokens = torch.randint(0, V, (rows, T + 1), generator=g)
    length = torch.randint(6, T + 1, (rows,), generator=g)[:, None]
    start = torch.randint(1, 5, (rows,), generator=g)[:, None]
    at = torch.arange(T)
    left_out = torch.rand(rows, T, generator=g) < 0.1
    targets = tokens[:, 1:].where((at >= start) & (at < length) & ~left_out, -100)
    return {"tokens": tokens[:, :-1], "targets": targets, "doc_ids": torch.where(at < length, 0, -1)}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def naive(
    name: str, lc: list[float], lr: list[float], rc: list[float], rr: list[float], beta: float, e: float
) -> float:
    """A pair's loss from the log-probabilities of each token, as losses are written down in their papers; gamma is 1."""
    a, b = sum(lc) - sum(rc), sum(lr) - sum(rr)
    d, logs, s = a - b, log_sigmoid, lambda x: 1 / (1 + math.exp(-x))
    p = s(beta * d)
    odds = lambda l: math.log(math.exp(sum(l) / len(l)) / (1 - math.exp(sum(l) / len(l))))  # noqa: E731, E741
    return {
        "sigmoid": lambda: -logs(beta * d),
        "cdpo": lambda: -(1 - e) * logs(beta * d) - e * logs(-beta * d),
        "hinge": lambda: max(0.0, 1 - beta * d),
        "ipo": lambda: (a / len(lc) - b / len(lr) - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - e) * logs(beta * d) + e * logs(-beta * d)) / (1 - 2 * e),
        "norm": lambda: -logs(beta * (a / len(lc) - b / len(lr))),
        "apo_zero": lambda: 1 - s(beta * a) + s(beta * b),
        "apo_down": lambda: s(beta * a) + 1 - s(beta * d),
        "exo_pair": lambda: p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e),
        "nca_pair": lambda: -logs(beta * a) - 0.5 * logs(-beta * a) - 0.5 * logs(-beta * b),
        "sppo_hard": lambda: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
        "simpo": lambda: -logs(beta * (sum(lc) / len(lc) - sum(lr) / len(lr)) - 1),
        "orpo": lambda: -sum(lc) / len(lc) - beta * logs(odds(lc) - odds(lr)),
    }[name]()


def token_logps(model: Transformer, batch: dict[str, Tensor]) -> list[list[float]]:
    """Of each row's targets, from its own unpadded logits in fp64."""
    rows = []
    for tokens, targets, ids in zip(batch["tokens"], batch["targets"], batch["doc_ids"]):
        n = int((ids >= 0).sum())
        with torch.no_grad():
            logp = model(tokens[None, :n])[0].double().log_softmax(-1)
        rows.append([logp[t, y].item() for t, y in enumerate(targets[:n].tolist()) if y >= 0])
    return rows


SMOOTHED = {"cdpo": 0.1, "robust": 0.1, "exo_pair": 0.1}


@pytest.fixture(scope="module")
def two() -> tuple[Transformer, Transformer]:
    return made("dense"), made("dense", seed=1).requires_grad_(False)


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_each_loss_is_its_formula(name: str, two: tuple[Transformer, Transformer]) -> None:
    """Written down once more with plain floats, on ragged rows; references are there when they are needed and else not."""
    model, ref = two
    strategy = DPO(beta=0.2, loss=name, label_smoothing=SMOOTHED.get(name, 0.0), gamma=1.0)
    assert strategy.needs_reference == (name not in ("simpo", "orpo"))
    batch = ragged()
    ours, before = token_logps(model, batch), token_logps(ref, batch)
    pairs = zip(ours[::2], ours[1::2], before[::2], before[1::2])
    expected = [naive(name, *pair, beta=0.2, e=SMOOTHED.get(name, 0.0)) for pair in pairs]
    loss, metrics = step(strategy, model, ref if strategy.needs_reference else None, [batch])
    assert loss == metrics["loss"] == pytest.approx(sum(expected) / 8, rel=2e-5)
    assert min(float(g.norm()) for g in grads(model).values()) > 0


def test_dpo_names_are_one_list() -> None:
    """The Literal of the constructor and `check`, which see no other code, know what the table knows."""
    for name in [*dpo.LOSSES, "sft"]:
        DPO(**PAIRS | {"loss": name, "label_smoothing": 0.1 if name in SMOOTHED else 0.0})
        with initialize_config_dir(str(CONF), version_base="1.3"):
            smoothing = f"strategy.label_smoothing={0.1 if name in SMOOTHED else 0.0}"
            check(compose("train", overrides=["strategy=dpo", f"strategy.loss={name}", smoothing]), "train")
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal) as refused:
        check(compose("train", overrides=["strategy=dpo", "strategy.loss=x"]), "train")
    said = str(refused.value).removesuffix(" or a mapping").rpartition("one of ")[2]
    assert said.split(", ") == [*dpo.LOSSES, "sft"]
    assert set(dpo.REFERENCE_FREE) == {"simpo", "orpo", "sft"}


@pytest.mark.parametrize("model_name", ["dense", "moe"])
@pytest.mark.parametrize(
    "loss",
    [{"sigmoid": 1.0, "sft": 0.5, "ipo": 0.1}, {"simpo": 1.0, "orpo": 0.3}, {"sft": 2.0}],
    ids=lambda v: "+".join(v),
)
def test_a_step_of_pairs_is_the_same_however_it_is_cut(model_name: str, loss: dict[str, float]) -> None:
    """8x1 == 4x2 == 1x8: losses of pairs are divided by pairs, sft by chosen targets, of the whole step."""
    model, ref = made(model_name), made(model_name, seed=1).requires_grad_(False)
    strategy = DPO(beta=0.2, loss=loss, label_smoothing=0.0, gamma=1.0)
    whole, expected = step(strategy, model, ref, [ragged()])
    wanted = grads(model)
    batch = ragged()
    aux = model(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[1]
    assert whole == pytest.approx(expected["loss"] + (0 if aux is None else aux.loss[:, 0].mean().item()), rel=1e-6)
    for cut in (2, 4, 8):
        found, metrics = step(strategy, model, ref, pieces(ragged(), cut, 2))
        assert found == pytest.approx(whole, rel=1e-5)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        same(grads(model), wanted, 1e-5)


def test_weighted_sums_and_terms(two: tuple[Transformer, Transformer]) -> None:
    """A mixture is the weighted sum of its terms; sft is the token mean of chosen answers; padding changes nothing."""
    batch = ragged()
    terms = {"sigmoid": 1.0, "hinge": 0.5, "simpo": 0.125, "sft": 0.25}
    each = {n: step(DPO(**PAIRS | {"loss": n}), *two, [batch])[0] for n in terms}
    loss, metrics = step(DPO(**PAIRS | {"loss": terms}), *two, [batch])
    assert loss == pytest.approx(sum(w * each[n] for n, w in terms.items()), rel=1e-6)
    assert metrics["loss/hinge"] == pytest.approx(0.5 * each["hinge"], rel=1e-6)
    chosen = [x for row in token_logps(two[0], batch)[::2] for x in row]
    assert each["sft"] == pytest.approx(-sum(chosen) / len(chosen), rel=1e-5)
    wide = {k: F.pad(v, (0, 9), value=f) for (k, v), f in zip(batch.items(), (5, -100, -1))}
    assert step(DPO(**PAIRS | {"loss": terms}), *two, [wide])[0] == pytest.approx(loss, rel=1e-6)


def test_at_the_start_policy_and_reference_agree_to_the_bit() -> None:
    """Also in bfloat16, where both must have the same precision: every reward is 0 and the loss log 2."""
    model, ref = made("dense"), made("dense").requires_grad_(False)
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss, metrics = DPO(**PAIRS).loss(model, ref, ragged())
        assert loss[0].item() == pytest.approx(8 * math.log(2), rel=1e-6)
        assert metrics["rewards/margin"][0] == metrics["rewards/chosen"][0] == 0


def test_an_answer_without_targets_is_no_nan(two: tuple[Transformer, Transformer]) -> None:
    """Nothing left of a rejected answer after truncation, or of both."""
    batch = ragged()
    batch["targets"][1], batch["targets"][2:4] = -100, -100
    for name in [*dpo.LOSSES, "sft"]:
        strategy = DPO(**PAIRS | {"loss": name, "label_smoothing": SMOOTHED.get(name, 0.0)})
        assert math.isfinite(step(strategy, *two, [batch])[0]), name
        assert all(g.isfinite().all() for g in grads(two[0]).values()), name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("strategy.loss={}", "names no loss"),
        ("strategy.loss={sigmod:1}", "there is no loss sigmod"),
        ("strategy.loss={ipo:-1}", "strategy.loss.ipo=-1 should be a number above 0"),
        ("strategy.loss={ipo:true}", "strategy.loss.ipo=True should be"),
        ("strategy.beta=0", "strategy.beta=0 should be"),
        ("strategy.label_smoothing=0.1", "used by cdpo, robust and exo_pair alone"),
        ("strategy.loss=robust strategy.label_smoothing=0.5", "below 0.5"),
        ("strategy.loss=exo_pair", "type strategy.label_smoothing=0.001"),
    ],
)
def test_dpo_settings_that_do_not_fit(overrides: str, said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal, match=said):
        check(compose("train", overrides=["strategy=dpo", *overrides.split()]), "train")


# ---------------------------------------------------------------- completions


def naive_advantages(rewards: list[list[float | None]], scale: str) -> list[list[float]]:
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
        out.append([0.0 if r is None else (r - mean) / by for r in group])
    return out


@pytest.mark.parametrize("scale", grpo.SCALES)
def test_advantages_are_their_formula(scale: str) -> None:
    """With rewards that failed, a group of which one is left, one of which none is, and one that all got right."""
    rewards: list[list[float | None]] = [[1.0, 0.0, 0.5, 3.0], [None, 2.0, None, 1.0], [None, None, 4.0, None]]
    rewards += [[None] * 4, [1.0] * 4]
    flat = torch.tensor([math.nan if r is None else r for group in rewards for r in group], dtype=torch.float64)
    found = advantages(flat, 4, scale)
    torch.testing.assert_close(found.view(-1, 4), torch.tensor(naive_advantages(rewards, scale), dtype=torch.float64))
    assert found.view(-1, 4)[2:].abs().max() < 1e-9


def completed(seed: int = 0, N: int = 8, V: int = 61) -> dict[str, Any]:
    """Random prompts and completions of any lengths with advantages, and old log-probabilities that differ from now."""
    g = torch.Generator().manual_seed(seed)
    size = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    ids = lambda n: torch.randint(0, V, (n,), generator=g).tolist()  # noqa: E731
    prompts, completions = [ids(size(1, 6)) for _ in range(N)], [ids(size(1, 13)) for _ in range(N)]
    batch: dict[str, Any] = assemble(prompts, completions, None)
    batch["advantages"] = torch.randn(N, generator=g)
    noise = 0.3 * torch.randn(batch["tokens"].shape, generator=g)
    with torch.no_grad():
        old = made("dense")(batch["tokens"], targets=batch["targets"])[0].logprob
    batch["old_logprob"] = (old + noise) * (batch["targets"] >= 0)
    return batch | {"metrics": {}}


def naive_grpo(model: Transformer, ref: Transformer, batch: dict[str, Any], s: dict[str, Any]) -> Tensor:
    """The step's loss, token by token from each row's own logits."""
    sums, lengths = [], []
    for tokens, targets, old, A in zip(batch["tokens"], batch["targets"], batch["old_logprob"], batch["advantages"]):
        last = max(t for t, y in enumerate(targets.tolist()) if y >= 0)
        own, its = (m(tokens[None, : last + 1])[0] / s["temperature"] for m in (model, ref))
        own, its = own.log_softmax(-1), its.log_softmax(-1)
        losses = []
        for t, y in enumerate(targets[: last + 1].tolist()):
            if y >= 0:
                rho = (own[t, y] - old[t]).exp()
                gap = its[t, y].detach() - own[t, y]
                clipped = min(max(rho, 1 - s["clip_low"]), 1 + s["clip_high"])
                losses.append(-min(rho * A, clipped * A) + s["beta"] * rho * (gap.exp() - gap - 1))
        sums.append(sum(losses))
        lengths.append(len(losses))
    return {
        "grpo": lambda: sum(x / n for x, n in zip(sums, lengths)) / len(sums),
        "bnpo": lambda: sum(sums) / sum(lengths),
        "dr_grpo": lambda: sum(sums) / (len(sums) * s["max_completion"]),
        "dapo": lambda: sum(sums) / sum(lengths),
    }[s["reduction"]]()


@pytest.mark.parametrize("reduction", grpo.REDUCTIONS)
def test_grpo_is_its_formula_however_it_is_cut(reduction: str, two: tuple[Transformer, Transformer]) -> None:
    """Loss and gradients, with a reference and a temperature; 8x1 == 4x2 == 1x8 but for bnpo, which means a micro-batch."""
    model, ref = two
    settings = ONLINE | {"reduction": reduction, "beta": 0.1, "temperature": 0.7, "clip_high": 0.28}
    batch = completed()
    model.zero_grad()
    expected = naive_grpo(model, ref, batch, settings)
    expected.backward()
    wanted = grads(model)
    strategy = GRPO(tok.byte([], []), **settings)
    loss, metrics = step(strategy, model, ref, [batch])
    assert loss == pytest.approx(expected.item(), rel=2e-5)
    same(grads(model), wanted, 2e-5)
    assert 0 < metrics["clip/low"] < 0.5 and 0 < metrics["clip/high"] < 0.5 and metrics["kl"] > 0
    for cut in (2, 4, 8) if reduction != "bnpo" else ():
        found, cut_metrics = step(strategy, model, ref, [b | {"metrics": {}} for b in pieces(batch, cut)])
        assert found == pytest.approx(loss, rel=1e-5)
        assert cut_metrics == pytest.approx(metrics, rel=1e-5)
        same(grads(model), wanted, 2e-5)


def test_experts_are_balanced_in_grpo_too() -> None:
    """A sparse model's auxiliary loss enters with the reduction's own weights, and is cut like the rest."""
    model = made("moe")
    batch = completed() | {"advantages": torch.zeros(8)}
    strategy = GRPO(tok.byte([], []), **ONLINE)
    n = (batch["targets"] >= 0).sum(1)
    with torch.no_grad():
        aux = model(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[1].loss[:, 0]
    loss, _ = step(strategy, model, None, [batch])
    assert loss == pytest.approx(float((aux * n).sum() / n.sum()), rel=1e-5) and loss > 0
    wanted = grads(model)
    assert step(strategy, model, None, [b | {"metrics": {}} for b in pieces(batch, 8)])[0] == pytest.approx(
        loss, rel=1e-5
    )
    same(
        {k: g for k, g in grads(model).items() if wanted[k].norm() > 0},
        {k: g for k, g in wanted.items() if g.norm() > 0},
        1e-4,
    )


@pytest.mark.parametrize("settings", [{}, {"logit_cap": 3.0}, {"norm_at": "post"}], ids=str)
def test_a_tempered_model_scores_at_the_temperature(settings: dict[str, Any]) -> None:
    """Scores and their gradients are those of logits / temperature; afterwards the model is as it was."""
    model = made("dense", **settings)
    batch = ragged()
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
    assert torch.equal(model(batch["tokens"]), plain)


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


def completions(tokenizer: tok.Tokenizer, batch: dict[str, Any]) -> list[str]:
    return [tokenizer.decode([y for y in row.tolist() if y >= 0]) for row in batch["targets"]]


def test_rollouts() -> None:
    """Every completion stands behind its own prompt, its stop token is a target and not part of what is judged, old
    log-probabilities are the model's without dropout, and the same seed draws the same."""
    model, tokenizer = talker(dropout=0.5)
    tokenizer = tok.Tokenizer(
        tokenizer.backend, stop_ids=[tokenizer.encode(c)[0] for c in "aeiou"]
    )  # ends some, not all
    model.train()
    heard: list[tuple[str, int]] = []

    def reward(completion: str, fields: dict[str, Any]) -> float:
        heard.append((completion, fields["answer"]))
        return float(len(completion))

    settings = ONLINE | {"group_size": 16, "max_completion": 40, "temperature": 1.3, "rewards": {"long": reward}}
    strategy = GRPO(tokenizer, **settings)
    assert strategy.stop_ids == tokenizer.stop_ids | {
        tokenizer.backend.token_to_id(tok.IM_END)
    }  # a chat's answers end so
    batch = asked(tokenizer, "abc", "What is 1 + 1?", answer=2)
    torch.manual_seed(3)
    made_ = strategy.collect(model, batch)
    assert model.training
    assert made_["tokens"].shape == made_["targets"].shape and len(made_["tokens"]) == 32 == len(heard)
    ended = 0
    for i, (tokens, targets, ids) in enumerate(zip(made_["tokens"], made_["targets"], made_["doc_ids"])):
        prompt = tokenizer.encode(("abc", "What is 1 + 1?")[i // 16])
        out = targets[targets >= 0].tolist()
        whole = prompt + out
        n = int((ids >= 0).sum())
        assert tokens[:n].tolist() == whole[:-1] and n == len(whole) - 1
        assert (targets[len(prompt) - 1 : n] >= 0).all() and (targets[n:] == -100).all()
        stopped = out[-1] in strategy.stop_ids
        assert not strategy.stop_ids & set(out[:-1])
        ended += stopped
        assert stopped or len(out) == 40
        assert heard[i] == (tokenizer.decode(out[:-1] if stopped else out, skip_special=True), 2)
    assert 0 < ended < 32
    assert made_["metrics"]["completion/truncated"] == (32 - ended, 32)
    assert made_["metrics"]["completion/length"][0] == (made_["targets"] >= 0).sum()
    model.eval()
    logp = (model(made_["tokens"]) / 1.3).log_softmax(-1).gather(-1, made_["targets"].clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(made_["old_logprob"], logp * (made_["targets"] >= 0), rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    again = strategy.collect(model, batch)
    assert torch.equal(again["targets"], made_["targets"])
    assert not torch.equal(strategy.collect(model, batch)["targets"], made_["targets"])


def test_equal_prompts_draw_different_numbers() -> None:
    """Two rows with the same prompt are two groups, not one twice; with top_k=1 all are the likeliest one."""
    model, tokenizer = talker()
    batch = asked(tokenizer, "abc", "abc")
    texts = completions(tokenizer, GRPO(tokenizer, **ONLINE).collect(model, batch))
    assert len(set(texts)) == 8
    one = GRPO(tokenizer, **ONLINE | {"top_k": 1}).collect(model, batch)
    assert len(set(completions(tokenizer, one))) == 1
    assert one["metrics"]["groups/no_signal"] == (2, 2)
    narrow = GRPO(tokenizer, **ONLINE | {"top_p": 1e-6}).collect(model, batch)
    assert completions(tokenizer, narrow) == completions(tokenizer, one)


def test_rewards_that_fail_teach_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """None, an exception, a number that is none and a text: no advantage, out of the mean, counted, said once."""
    model, tokenizer = talker()
    calls = itertools.count()

    def odd(completion: str, fields: dict[str, Any]) -> Any:
        i = next(calls)
        return [1.0, None, 1 / 0 if i == 2 else 0.0, math.inf, "text", 3.0, 2.0, math.nan][i]

    strategy = GRPO(tokenizer, **ONLINE | {"rewards": {"odd": odd, "half": lambda c, f: 0.5}})
    batch = strategy.collect(model, asked(tokenizer, "abc", "def"))
    got = batch["advantages"].tolist()
    assert got == pytest.approx([0, 0, 0, 0, 0, 0.5**0.5, -(0.5**0.5), 0], abs=1e-3)
    found = {k: (float(s), float(n)) for k, (s, n) in batch["metrics"].items()}
    assert found["reward/mean"] == (1.5 + 3.5 + 2.5, 3)
    assert found["reward/odd"] == (6.0, 3) and found["reward/half"] == (4.0, 8)
    assert found["reward/failed"] == (5, 8) and found["groups/no_signal"] == (1, 2)
    assert found["reward/std"] == (pytest.approx(0.5**0.5), 1)
    said = capsys.readouterr().err
    assert said.count("warning: reward odd raised ZeroDivisionError: division by zero") == 1 and "text" not in said


def test_what_a_user_can_mend_stops_the_run() -> None:
    """A reward that looks at a field which the rows lack; prompts that leave no positions; a prompt of nothing."""
    model, tokenizer = talker()
    node = {"_target_": "etude.reward.exact", "_partial_": True, "field": "anser", "weight": 1.0}
    strategy = GRPO(tokenizer, **ONLINE | {"rewards": {"exact": build(node)}})
    with pytest.raises(Refusal, match="the field anser, and the row has answer, task: set field="):
        strategy.collect(model, asked(tokenizer, "abc", answer=1, task="x"))
    with pytest.raises(Refusal, match="a prompt has no tokens"):
        strategy.collect(model, asked(tokenizer, "abc", "", anser=1))
    limited = made("gpt", vocab_size=tokenizer.vocab_size, max_len=20)
    with pytest.raises(Refusal, match="of 9 tokens and strategy.max_completion=12 are more than the model's 20"):
        strategy.collect(limited, asked(tokenizer, "x" * 9, anser=1))
    batch = strategy.collect(limited, asked(tokenizer, "x" * 8, anser=1))
    assert batch["tokens"].shape == (4, 20)  # padded to no more than there are positions
    strategy.loss(limited, None, batch)


def test_in_bfloat16_the_ratio_begins_at_one() -> None:
    """Rollouts, old log-probabilities and loss under one autocast: nothing that sampling cached is without gradient."""
    model, tokenizer = talker()
    strategy = GRPO(tokenizer, **ONLINE | {"rewards": {"length": lambda c, f: float(len(c.strip()))}})
    with torch.autocast("cpu", torch.bfloat16):
        batch = strategy.collect(model, asked(tokenizer, "abc", "de"))
        loss, metrics = strategy.loss(model, None, batch)
    n = (batch["targets"] >= 0).sum(1)
    assert loss.item() == pytest.approx(float(-(batch["advantages"] * n).sum()), abs=1e-4)
    assert metrics["clip/low"][0] == metrics["clip/high"][0] == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_reward_rises() -> None:
    """A bandit: the share of the letter e. From chance to most of what is written in 30 updates of the plain recipe."""
    letters = "abcdefgh"
    tokenizer = tok.char([letters], [letters], unknown="error")
    model = made("dense", vocab_size=tokenizer.vocab_size, init_std=0.05)
    share = lambda completion, fields: completion.count("e") / len(completion)  # noqa: E731
    strategy = GRPO(tokenizer, **ONLINE | {"group_size": 8, "max_completion": 8, "rewards": {"share": share}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = asked(tokenizer, "a", "bcd", "hg", "fab")
    torch.manual_seed(0)
    curve = []
    for _ in range(30):
        _, metrics = step(strategy, model, None, [strategy.collect(model, batch)])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(metrics["reward/mean"])
    assert sum(curve[:3]) / 3 < 0.25 and sum(curve[-3:]) / 3 > 0.8, curve


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


@pytest.mark.parametrize(("name", "data"), [("sft", "Chats"), ("dpo", "Pairs"), ("grpo", "Prompts")])
def test_a_strategy_brings_its_data(name: str, data: str, tmp_path: Path) -> None:
    """Unless data= is typed; and it can be built from its YAML."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [
            check(compose("train", overrides=o), "train")
            for o in ([f"strategy={name}"], [f"strategy={name}", "data=stdlib"], ["data=stdlib", f"strategy={name}"])
        ]
    assert [c["data"]["_target_"].rpartition(".")[2] for c in chosen] == [data, "Stdlib", "Stdlib"]
    node = chosen[0]["strategy"]
    tokenizer = tok.byte([], [])
    made_ = build(node, tokenizer) if node.get("_partial_") else build(node)
    assert data.lower() in made_.kinds and not made_.needs_reference or name == "dpo"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy.group_size=1", "at least 2"),
        ("strategy.max_completion=0", "at least 1"),
        ("strategy.temperature=0", "above 0: at 0 a group is one completion"),
        ("strategy.top_k=0", "strategy.top_k=0 should be at least 1"),
        ("strategy.top_p=2", "strategy.top_p=2 should be above 0 and at most 1"),
        ("strategy.clip_low=0", "strategy.clip_low=0 should be above 0"),
        ("strategy.beta=-1", "at least 0"),
        ("~strategy.rewards.number", "strategy.rewards is empty"),
        ("+strategy.rewards.std={_target_:etude.reward.exact,_partial_:true,field:a,weight:1}", "choose another name"),
        ("+strategy.rewards.l={_target_:etude.reward.length,_partial_:true,limit:0,weight:1}", "limit=0"),
        (
            "+strategy.rewards.l={_target_:etude.reward.lenght,_partial_:true,weight:1}",
            "did you mean etude.reward.length",
        ),
        ("strategy.reduction=mean", "should be one of grpo, bnpo, dr_grpo, dapo"),
        ("strategy.scale=std", "should be one of group, batch, none"),
    ],
)
def test_grpo_settings_that_do_not_fit(override: str, said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal, match=said):
        check(compose("train", overrides=["strategy=grpo", override]), "train")

"""sft and dpo: losses and gradients that TRL recorded, naive formulas, one step however it is cut and laid out."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import grads, same
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from test_model import made
from torch import Tensor, nn

from etude.config import CONF, build, check
from etude.errors import Refusal
from etude.infer.engine import Settings
from etude.interop import architectures, convert
from etude.model.transformer import Transformer
from etude.parallel import World
from etude.strategy import dpo
from etude.strategy.dpo import DPO
from etude.strategy.seq import Seq
from etude.text import tokenizer as tok

GOLDEN = Path(__file__).parent / "golden" / "trl"
CASES = {c["name"]: c for c in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
RECORDED = load_file(GOLDEN / "tensors.safetensors")
PAIRS: dict[str, Any] = {"beta": 0.3, "loss": "sigmoid", "label_smoothing": 0.0, "gamma": 1.0, "layout": "rows"}
LAYOUTS = ["rows", "packed", "shared"]
PLAIN: dict[str, Any] = {"label_smoothing": 0.0, "z_loss": 0.0, "dft": False, "neftune": 0.0}
ONE = World(0, 1, torch.device("cpu"))


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


def learn(
    strategy: Any, model: nn.Module, ref: nn.Module | None, batches: list[dict]
) -> tuple[float, dict[str, float]]:
    """`step` with what the strategy makes of a loader's batches."""
    return step(strategy, model, ref, strategy.collect(model, batches, list(range(len(batches))), ONE))


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
    loss, metrics = learn(Seq(**PLAIN), model, None, batches)
    hold(case, loss, model)
    assert metrics["entropy"] == pytest.approx(CASES[case]["metrics"]["entropy"], abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(CASES[case]["metrics"]["mean_token_accuracy"], abs=1e-6)


def test_sft_of_experts_is_trls(theirs: Callable[[str], Transformer]) -> None:
    """Its balance loss is over the tokens of all rows and layers together, ours of each row and layer: theirs is computed
    here from our routers, so that loss and gradients of the rest can be held."""
    model, batch = theirs("policy_moe"), supervised("sft_moe")
    seen: list[Tensor] = []
    for block in model.blocks:
        block.ffn.aux_loss = 0.0
        block.ffn.register_forward_pre_hook(lambda ffn, x: seen.append(F.linear(x[0], ffn.router.weight)))
    loss, metrics = learn(Seq(**PLAIN), model, None, [batch])
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
    assert metrics["accuracy"] == pytest.approx(CASES["sft_moe"]["metrics"]["mean_token_accuracy"], abs=1e-6)


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
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [1, 3])
def test_dpo_is_trls(case: str, cut: int, layout: str, theirs: Callable[[str], Transformer]) -> None:
    """Losses, gradients and metrics, three pairs at once and one by one, in every layout."""
    config = CASES[case]["config"]
    kinds = config["loss_type"]
    loss = dict(zip(kinds, config["loss_weights"])) if isinstance(kinds, list) else kinds
    strategy = DPO(
        beta=config["beta"], loss=loss, label_smoothing=float(config["label_smoothing"]), gamma=1.0, layout=layout
    )
    model, ref = theirs("policy"), theirs("ref")
    batch = preferences(case)
    found, metrics = learn(strategy, model, ref, pieces(batch, cut, 2))
    hold(case, found, model)
    assert metrics["loss"] == pytest.approx(CASES[case]["loss"], abs=5e-6)
    ours = {
        "rewards/accuracies": "rewards/accuracy",
        "rewards/margins": "rewards/margin",
        "mean_token_accuracy": "accuracy",
    }
    for name, value in CASES[case]["metrics"].items():
        if not name.startswith("logits") and name != "num_tokens":
            assert metrics[ours.get(name, name)] == pytest.approx(value, abs=1e-5), name
    assert not any(p.grad is not None for p in ref.parameters())


def pieces(batch: dict[str, Any], cut: int, rows: int = 1) -> list[dict[str, Any]]:
    """A batch as `cut` micro-batches of whole samples of `rows` rows each."""
    size = len(batch["tokens"]) // cut
    assert size % rows == 0
    return [{k: v[i : i + size] for k, v in batch.items() if k != "metrics"} for i in range(0, size * cut, size)]


# ---------------------------------------------------------------- next tokens


def probabilities(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """Of every target, from plain logits in fp64."""
    with torch.no_grad():
        p = model(batch["tokens"], doc_ids=batch["doc_ids"]).double().softmax(-1)
    at = (batch["targets"] >= 0).nonzero().tolist()
    return [p[b, t, batch["targets"][b, t]].item() for b, t in at]


def test_dft_is_its_formula() -> None:
    """-p log p of each target, the first p a number: so the gradient is p times the usual one."""
    model, batch = made("dense"), ragged()
    p = probabilities(model, batch)
    loss, metrics = learn(Seq(**PLAIN | {"dft": True}), model, None, [batch])
    assert loss == metrics["loss"] == pytest.approx(-sum(q * math.log(q) for q in p) / len(p), rel=1e-5)
    assert metrics["nll"] == pytest.approx(-sum(math.log(q) for q in p) / len(p), rel=1e-5)
    found = grads(model)
    model.zero_grad()
    logp = model(batch["tokens"], doc_ids=batch["doc_ids"]).log_softmax(-1)[batch["targets"] >= 0]
    picked = logp.gather(-1, batch["targets"][batch["targets"] >= 0][:, None])[:, 0]
    (-(torch.tensor(p, dtype=torch.float32) * picked).mean()).backward()
    same(found, grads(model), 1e-5)


def test_accuracy_counts_the_likeliest_tokens() -> None:
    model, batch = made("dense"), ragged()
    with torch.no_grad():
        best = model(batch["tokens"], doc_ids=batch["doc_ids"]).argmax(-1)
    mask = batch["targets"] >= 0
    batch["targets"] = torch.where(mask & (torch.arange(20) % 3 == 0), best, batch["targets"])  # some are right
    share = (best == batch["targets"])[mask].float().mean().item()
    assert 0.2 < share < 0.6
    assert learn(Seq(**PLAIN), model, None, [batch])[1]["accuracy"] == pytest.approx(share)


class Wrapped(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [False, True])
def test_noise_on_the_embeddings(wrap: bool) -> None:
    """Uniform within alpha / sqrt(L D), L being the document's length: the same packed, with or without padding. None in
    evaluation, and none of it stays with the model."""
    model = made("dense").train()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    strategy = Seq(**PLAIN | {"neftune": 5.0})
    tokens = torch.randint(0, 61, (2, 640), generator=torch.Generator().manual_seed(0))
    lengths = [[40, 600], [320, 300]]
    doc_ids = torch.full((2, 640), -1)
    for row, (a, b) in zip(doc_ids, lengths):
        row[:a], row[a : a + b] = 0, 1
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "doc_ids": doc_ids}
    noisy = Wrapped(model).train() if wrap else model
    torch.manual_seed(0)
    strategy.loss(noisy, None, batch)
    model.eval()
    noisy.eval()
    torch.manual_seed(0)
    strategy.loss(noisy, None, batch)
    noise = seen[0] - seen[1]
    assert torch.equal(seen[1], model.embed(tokens))
    for row, ids, (a, b) in zip(noise, doc_ids, lengths):
        for i, length in enumerate((a, b)):
            part = row[ids == i]
            bound = 5.0 / math.sqrt(length * model.dim)
            assert part.abs().max() == pytest.approx(bound, rel=5e-3) and part.mean().abs() < 0.1 * bound
            assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    model.train()
    noisy.train()
    torch.manual_seed(0)
    strategy.loss(noisy, None, batch)
    assert torch.equal(seen[2], seen[0])
    Seq(**PLAIN).loss(noisy, None, batch)
    assert torch.equal(seen[3], seen[1]) and not model.embed._forward_hooks
    del batch["doc_ids"]
    strategy.loss(noisy, None, batch)
    assert (seen[4] - seen[1]).abs().max() == pytest.approx(5.0 / math.sqrt(640 * model.dim), rel=5e-3)


@pytest.mark.parametrize("model_name", ["dense", "moe"])
@pytest.mark.parametrize("change", [{}, {"dft": True, "z_loss": 0.01}, {"label_smoothing": 0.1}], ids=str)
def test_a_step_of_text_is_the_same_however_it_is_cut(model_name: str, change: dict[str, Any]) -> None:
    """8x1 == 4x2 == 1x8 with ragged masks, one row without any target: the loss is a mean over the step's targets."""
    model, batch = made(model_name), ragged(pairs=4)
    batch["targets"][3] = -100
    strategy = Seq(**PLAIN | change)
    whole, expected = learn(strategy, model, None, [batch])
    wanted = grads(model)
    for cut in (2, 4, 8):
        found, metrics = learn(strategy, model, None, pieces(batch, cut))
        assert found == pytest.approx(whole, rel=1e-5)
        assert metrics == pytest.approx(expected, rel=1e-5)
        same(grads(model), wanted, 1e-5)


def test_nothing_to_learn_is_zero() -> None:
    """A micro-batch without a target: no NaN in loss, metrics or gradients."""
    model, batch = made("moe"), ragged()
    batch["targets"][:] = -100
    strategy = Seq(**PLAIN | {"dft": True, "z_loss": 0.1})
    loss, metrics = strategy.loss(model, None, batch)
    loss.backward()
    assert strategy.weight(batch) == 0 and loss == 0
    assert all(not torch.as_tensor(s).any() for name, (s, n) in metrics.items() if name != "router/load")
    assert all(not g.any() for g in grads(model).values())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy.label_smoothing=1", "at least 0 and below 1"),
        ("strategy.neftune=-1", "strategy.neftune=-1 should be at least 0"),
        ("strategy.z_loss=-0.1", "strategy.z_loss=-0.1 should be at least 0"),
        ("strategy.dft=true strategy.label_smoothing=0.1", "set one of them to 0"),
    ],
)
def test_sft_settings_that_do_not_fit(override: str, said: str) -> None:
    for strategy in ("seq", "sft"):
        with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal, match=said):
            check(compose("train", overrides=[f"strategy={strategy}", *override.split()]), "train")


# ---------------------------------------------------------------- preferences


def ragged(pairs: int = 8, V: int = 61, T: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Random pairs of rows of any lengths, with targets behind prompts of any lengths and some left out. Pair i has the
    first i % 7 tokens in common, and some of them may be learned."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    tokens = torch.randint(0, V, (rows, T + 1), generator=g)
    for i in range(pairs):
        tokens[2 * i + 1, : i % 7] = tokens[2 * i, : i % 7]
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", dpo.LOSSES)
def test_each_loss_is_its_formula(name: str, layout: str, two: tuple[Transformer, Transformer]) -> None:
    """Written down once more with plain floats, on ragged rows; references are there when they are needed and else not."""
    model, ref = two
    e = SMOOTHED.get(name, 0.0)
    strategy = DPO(**PAIRS | {"beta": 0.2, "loss": name, "label_smoothing": e, "layout": layout})
    assert strategy.needs_reference == (name not in ("simpo", "orpo"))
    batch = ragged()
    ours, before = token_logps(model, batch), token_logps(ref, batch)
    pairs = zip(ours[::2], ours[1::2], before[::2], before[1::2])
    expected = [naive(name, *pair, beta=0.2, e=e) for pair in pairs]
    loss, metrics = learn(strategy, model, ref if strategy.needs_reference else None, [batch])
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_name", ["dense", "moe"])
@pytest.mark.parametrize(
    "loss",
    [{"sigmoid": 1.0, "sft": 0.5, "ipo": 0.1}, {"simpo": 1.0, "orpo": 0.3}, {"sft": 2.0}],
    ids=lambda v: "+".join(v),
)
def test_a_step_of_pairs_is_the_same_however_it_is_cut(model_name: str, loss: dict[str, float], layout: str) -> None:
    """8x1 == 4x2 == 1x8: losses of pairs are divided by pairs, sft by chosen targets, of the whole step."""
    model, ref = made(model_name), made(model_name, seed=1).requires_grad_(False)
    strategy = DPO(**PAIRS | {"beta": 0.2, "loss": loss, "layout": layout})
    whole, expected = learn(strategy, model, ref, [ragged()])
    wanted = grads(model)
    batch = ragged()
    aux = model(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[1]
    assert whole == pytest.approx(expected["loss"] + (0 if aux is None else aux.loss[:, 0].mean().item()), rel=1e-6)
    for cut in (2, 4, 8):
        found, metrics = learn(strategy, model, ref, pieces(ragged(), cut, 2))
        assert found == pytest.approx(whole, rel=1e-5)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        same(grads(model), wanted, 1e-5)


@pytest.mark.parametrize("name", ["dense", "dense model/attn=mla", "moe"])
def test_layouts_change_no_number(name: str) -> None:
    """Losses to 2e-6, and gradients and metrics: rows, packed, and with the prompt that a pair shares once; all of a
    balance loss too. A shared prompt saves its tokens."""
    model, ref = made(*name.split()), made(*name.split(), seed=1).requires_grad_(False)
    batch = ragged()
    results, sizes = [], []
    for layout in LAYOUTS:
        strategy = DPO(**PAIRS | {"loss": {"sigmoid": 1.0, "ipo": 0.1, "sft": 0.5}, "layout": layout})
        (arranged,) = strategy.collect(model, [batch], [0], ONE)
        assert strategy.weight(arranged) == strategy.weight(batch)
        results.append((*learn(strategy, model, ref, [batch]), grads(model)))
        sizes.append(int((arranged["doc_ids"] >= 0).sum()))
    (loss, metrics, wanted), *others = results
    for other, found, got in others:
        assert other == pytest.approx(loss, rel=2e-6)
        assert found == pytest.approx(metrics, rel=2e-6, abs=2e-6)
        same(got, wanted, 2e-6)
    assert sizes[0] == sizes[1] == int((batch["doc_ids"] >= 0).sum()) > sizes[2]


def test_weighted_sums_and_terms(two: tuple[Transformer, Transformer]) -> None:
    """A mixture is the weighted sum of its terms; sft is the token mean of chosen answers; padding changes nothing."""
    batch = ragged()
    terms = {"sigmoid": 1.0, "hinge": 0.5, "simpo": 0.125, "sft": 0.25}
    each = {n: learn(DPO(**PAIRS | {"loss": n}), *two, [batch])[0] for n in terms}
    loss, metrics = learn(DPO(**PAIRS | {"loss": terms}), *two, [batch])
    assert loss == pytest.approx(sum(w * each[n] for n, w in terms.items()), rel=1e-6)
    assert metrics["loss/hinge"] == pytest.approx(0.5 * each["hinge"], rel=1e-6)
    chosen = [x for row in token_logps(two[0], batch)[::2] for x in row]
    assert each["sft"] == pytest.approx(-sum(chosen) / len(chosen), rel=1e-5)
    wide = {k: F.pad(v, (0, 9), value=f) for (k, v), f in zip(batch.items(), (5, -100, -1))}
    assert learn(DPO(**PAIRS | {"loss": terms}), *two, [wide])[0] == pytest.approx(loss, rel=1e-6)


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
        assert math.isfinite(learn(strategy, *two, [batch])[0]), name
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


# ---------------------------------------------------------------- config


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
    made_ = build(node, tokenizer, Settings()) if node.get("_partial_") else build(node)
    assert data.lower() in made_.kinds and not made_.needs_reference or name == "dpo"

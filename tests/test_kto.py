"""KTO: losses, metrics and gradients that TRL recorded, its formula, one step however it is cut, laid out and dealt to ranks,
and runs."""

import copy
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import grads, same
from hydra import compose, initialize_config_dir
from running import identity, metrics, run_in
from safetensors.torch import load_file
from test_model import made
from test_post_training import killed_and_resumed, tiny, train
from test_strategies import ONE, pieces, step, token_logps
from torch import Tensor, nn

from etude import lora
from etude.config import CONF, build, check
from etude.errors import Refusal
from etude.interop import architectures, convert
from etude.loop import reduce
from etude.model.transformer import Transformer
from etude.parallel import World
from etude.strategy.kto import KTO, mismatched
from etude.strategy.layout import Row

GOLDEN = Path(__file__).parent / "golden" / "trl"
CASES = {c["name"]: c for c in json.loads((GOLDEN / "kto.json").read_text())["cases"]}
PLAIN: dict[str, Any] = {
    "loss": "kto",
    "beta": 0.3,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "layout": "packed",
}
LAYOUTS = ["rows", "packed"]


def learn(strategy: KTO, model: nn.Module, ref: Any, batches: list[dict]) -> tuple[float, dict[str, float]]:
    """A step of the loop: -> (loss, metrics); gradients are left in the model."""
    strategy.ref = ref
    return step(strategy, model, ref, strategy.collect(model, batches, list(range(len(batches))), ONE))


# ---------------------------------------------------------------- what TRL recorded


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Transformer]:
    """A model of tests/golden/trl by name, fresh at each call."""
    folder = tmp_path_factory.mktemp("golden")
    for name in ("policy", "ref"):
        cfg = {"from": str(GOLDEN / name), "to": str(folder / name), "dtype": "keep", "shard_gb": 1.0}
        assert convert.run(cfg | {"trusted": ["etude"]}) == 0
    return lambda name: Transformer.from_pretrained(folder / name)


def recorded_grads(file: str, case: str, model: Transformer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our gradients and TRL's, by its names; of embedding and head every sixteenth row."""
    arch, node = architectures.read(json.loads((GOLDEN / "policy" / "config.json").read_text()))
    ours = {e.theirs[0]: e.ours[0] for e in convert._entries(arch, node, 334) if len(e.theirs) == 1}
    prefix = f"{case}/grad/"
    expected = {k.removeprefix(prefix): v for k, v in load_file(GOLDEN / file).items() if k.startswith(prefix)}
    found = grads(model)
    named = {k: ours[k.removesuffix("/some")] for k in expected if k in ours or k.endswith("/some")}
    mine = {k: found[name][:: 16 if k.endswith("/some") else 1] for k, name in named.items()}
    return mine, expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [1, 7])
def test_it_is_trls(case: str, layout: Any, cut: int, theirs: Callable[[str], Transformer]) -> None:
    """The loss to 5e-6, gradients to 5e-4 of their norm, and the metrics, of all answers at once and one by one."""
    given = {k.removeprefix("in/"): v for k, v in load_file(GOLDEN / "kto.safetensors").items() if k.startswith("in/")}
    labels = given["input_ids"].long().where(given["completion_mask"] > 0, -100)
    batch = {
        "tokens": given["input_ids"].long(),
        "targets": F.pad(labels[:, 1:], (0, 1), value=-100),
        "doc_ids": given["attention_mask"].long() - 1,
        "labels": given["label"] > 0,
    }
    config = dict(CASES[case]["config"])
    strategy = KTO(loss=config.pop("loss_type"), layout=layout, **config)
    model = theirs("policy")
    loss, found = learn(strategy, model, theirs("ref"), pieces(batch, cut))
    assert loss == pytest.approx(CASES[case]["loss"], abs=5e-6)
    mine, expected = recorded_grads("kto.safetensors", case, model)
    assert len(expected) >= 8
    same(mine, expected, 5e-4)
    for name in ("kl", "entropy", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        if name in found:
            assert found[name] == pytest.approx(CASES[case]["metrics"][name], abs=1e-5), name
    assert ("kl" in found) == (strategy.shifted)


# ---------------------------------------------------------------- its formula


def ragged(n: int = 8, V: int = 61, T: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Random answers of any lengths behind prompts of any lengths, some tokens of which are not learned."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n, T + 1), generator=g)
    length = torch.randint(7, T + 1, (n,), generator=g)[:, None]
    start = torch.randint(1, 6, (n,), generator=g)[:, None]
    at = torch.arange(T)
    kept = (torch.rand(n, T, generator=g) > 0.1) | (at == start)
    targets = tokens[:, 1:].where((at >= start) & (at < length) & kept, -100)
    labels = torch.rand(n, generator=g) < 0.5
    labels[:2] = torch.tensor([True, False])
    return {"tokens": tokens[:, :-1], "targets": targets, "doc_ids": torch.where(at < length, 0, -1), "labels": labels}


def sums(model: Transformer, batch: dict[str, Tensor]) -> list[float]:
    """Of the targets of each row, from its own unpadded logits in fp64."""
    return [sum(row) for row in token_logps(model, batch)]


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each prompt with the answer of the row before it."""
    ids, wanted = [], []
    for tokens, targets, docs in zip(batch["tokens"].tolist(), batch["targets"].tolist(), batch["doc_ids"].tolist()):
        n = docs.count(0)
        ids.append([*tokens[:n], max(targets[n - 1], 0)])
        wanted.append([-100, *targets[:n]])
    starts = [next(i for i, t in enumerate(w) if t >= 0) for w in wanted]
    T = 2 * max(map(len, ids))
    out = {
        "tokens": torch.zeros(len(ids), T, dtype=torch.int64),
        "targets": torch.full((len(ids), T), -100),
        "doc_ids": torch.full((len(ids), T), -1),
    }
    for i, at in enumerate(starts):
        row, learned = ids[i][:at] + ids[i - 1][starts[i - 1] :], wanted[i][:at] + wanted[i - 1][starts[i - 1] :]
        out["tokens"][i, : len(row) - 1] = torch.tensor(row[:-1])
        out["targets"][i, : len(row) - 1] = torch.tensor(learned[1:])
        out["doc_ids"][i, : len(row) - 1] = 0
    return out


@pytest.fixture(scope="module")
def two() -> tuple[Transformer, Transformer]:
    return made("dense"), made("dense", seed=1).requires_grad_(False)


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_it_is_its_formula(loss: Any, layout: Any, turned: bool, two: tuple[Transformer, Transformer]) -> None:
    """With plain floats, on ragged rows. Where policy and reference change places, the divergence's estimate changes its sign:
    below 0 it counts as 0."""
    model, ref = (copy.deepcopy(m).requires_grad_(True) for m in (two[::-1] if turned else two))
    strategy = KTO(
        **PLAIN | {"loss": loss, "layout": layout, "beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    )
    batch = ragged()
    gains = [a - b for a, b in zip(sums(model, batch), sums(ref, batch))]
    other = shifted(batch)
    estimate = sum(a - b for a, b in zip(sums(model, other), sums(ref, other))) / 8
    assert abs(estimate) > 0.1 and (estimate > 0) == turned
    z0 = max(estimate, 0.0) if loss == "kto" else 0.0
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    good = batch["labels"].tolist()
    each = [1.5 * (1 - s(0.2 * (r - z0))) if g else 0.7 * (1 - s(0.2 * (z0 - r))) for r, g in zip(gains, good)]
    found, told = learn(strategy, model, ref, [batch])
    assert found == told["loss"] == pytest.approx(sum(each) / 8, rel=2e-5)
    assert told.get("kl", 0.0) == pytest.approx(z0, rel=1e-4)
    chosen = [0.2 * r for r, g in zip(gains, good) if g]
    assert told["rewards/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)
    assert min(float(g.norm()) for g in grads(model).values()) > 0
    assert not any(p.grad is not None for p in ref.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_step_is_the_same_however_it_is_cut(name: str, layout: Any) -> None:
    """8x1 == 4x2 == 1x8 with ragged masks: the divergence is that of the whole step."""
    seed = int(name == "dense")  # the policy whose divergence is above 0
    model, ref, batch = made(name, seed=seed), made(name, seed=1 - seed), ragged()
    strategy = KTO(**PLAIN | {"layout": layout, "undesirable_weight": 1.3})
    whole, expected = learn(strategy, model, ref, [batch])
    wanted = grads(model)
    assert expected["kl"] > 0.1
    for cut in (2, 4, 8):
        found, told = learn(strategy, model, ref, pieces(batch, cut))
        assert found == pytest.approx(whole, rel=1e-5)
        assert told == pytest.approx(expected, rel=1e-5, abs=1e-7)
        same(grads(model), wanted, 1e-5)


class Rank(World):
    """One of several threads that meet as ranks do."""

    def __init__(self, rank: int, size: int, desk: list[Any], meeting: threading.Barrier):
        super().__init__(rank, size, torch.device("cpu"))
        self.desk, self.meeting = desk, meeting

    def all(self, value: Any) -> list[Any]:
        self.desk[self.rank] = value
        self.meeting.wait()
        found = list(self.desk)
        self.meeting.wait()
        return found

    def sum(self, values: list[float]) -> list[float]:
        return [sum(each) for each in zip(*self.all(values))]

    def gather(self, value: Any) -> list[Any]:
        found = self.all(value)
        return found if self.rank == 0 else []

    def broadcast(self, value: Any) -> Any:
        return self.all(value)[0]


def meet(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What each of so many ranks gives."""
    desk, meeting, found = [None] * size, threading.Barrier(size, timeout=60), {}

    def one(rank: int) -> None:
        found[rank] = work(Rank(rank, size, desk, meeting))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("cut", [1, 2])
def test_ranks_find_one_divergence(cut: int, two: tuple[Transformer, Transformer]) -> None:
    """Two and four ranks: the z0 of one, because each puts its first prompt before the last answer of the rank before it."""
    ref, model = two
    batch = ragged()
    strategy = KTO(**PLAIN)
    strategy.ref = ref
    (alone,) = strategy.collect(model, [batch], [0], ONE)
    assert alone["z0"] > 0
    for size in (2, 4):
        ranks = pieces(batch, size)

        def z0(world: World, ranks: list[dict] = ranks) -> list[float]:
            own = KTO(**PLAIN)
            own.ref = copy.deepcopy(ref)
            parts = pieces(ranks[world.rank], cut)
            made = own.collect(copy.deepcopy(model), parts, [0] * len(parts), world)
            return [float(b["z0"]) for b in made]

        found = [z for rank in meet(size, z0) for z in rank]
        assert len(set(found)) == 1 and found == pytest.approx([float(alone["z0"])] * size * cut, rel=1e-5)


def test_what_one_rank_alone_has_is_logged() -> None:
    """A rank whose answers are all bad has no reward of good ones: the others' is told all the same."""
    one = torch.tensor(1.0)
    metrics = [{"rewards/rejected": (-one, one)}, {"rewards/chosen": (3 * one, one)}, {"rewards/chosen": (one, one)}]
    expected = {"rewards/chosen": 2.0, "rewards/rejected": -1.0, "rewards/margin": 3.0}
    assert meet(3, lambda world: reduce([metrics[world.rank]], world)) == [expected] * 3


def test_a_prompt_with_anothers_answer_fits_the_model() -> None:
    """Cut off at the number of positions, but never all of it."""
    long = Row(torch.arange(9), torch.arange(9) >= 8)
    other = Row(torch.arange(20, 25), torch.ones(5, dtype=torch.bool))
    row = mismatched(long, other, 8)
    assert row.ids.tolist() == [*range(8), 20] and row.learned.tolist() == [False] * 8 + [True]
    assert len(mismatched(long, other, None).ids) == 13
    model, ref = (made("gpt", "model.max_len=20", seed=s) for s in (0, 1))
    assert model.position_limit == 20
    batch = ragged()
    batch["doc_ids"][:] = 0  # rows as long as there are positions
    for layout in LAYOUTS:
        loss, told = learn(KTO(**PLAIN | {"layout": layout}), model, ref, [batch])
        assert math.isfinite(loss) and "kl" in told


def test_one_answer_alone_has_no_other(two: tuple[Transformer, Transformer]) -> None:
    """As the last batch of a validation may be: the divergence is not measured by the answer itself. A kind of answer that is not
    there has no metric."""
    model, ref = two
    batch = {k: v[:1] for k, v in ragged().items()}
    loss, told = learn(KTO(**PLAIN), model, ref, [batch])
    assert told["kl"] == 0 and math.isfinite(loss)
    assert told["rewards/chosen"] > 0 or told["rewards/chosen"] < 0
    assert "rewards/rejected" not in told


def test_dropout_is_off_where_the_divergence_is_measured(two: tuple[Transformer, Transformer]) -> None:
    """And the model is as it was afterwards."""
    ref = two[0]
    model = made("dense", "model.dropout=0.5", seed=1).train()
    strategy = KTO(**PLAIN)
    strategy.ref = ref
    found = {float(strategy.collect(model, [ragged()], [0], ONE)[0]["z0"]) for _ in range(3)}
    assert len(found) == 1 and min(found) > 0 and model.training


def test_the_policy_without_its_adapters_is_a_reference(two: tuple[Transformer, Transformer]) -> None:
    """At the start adapters change nothing: no divergence, no rewards, and the loss is half of each weight."""
    model = copy.deepcopy(two[0])
    lora.LoRA(rank=2, alpha=4.0, dropout=0.0, targets=["blocks.*"], dora=False, rslora=False).apply(model)
    loss, told = learn(KTO(**PLAIN), model, lora.Base(model), [ragged()])
    assert loss == pytest.approx(0.5) and told["kl"] == 0 and told["rewards/chosen"] == 0
    assert all(".lora_" in name for name in grads(model))


# ---------------------------------------------------------------- settings and runs


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("strategy.beta=0", "strategy.beta=0 should be a number above 0"),
        ("strategy.desirable_weight=-1", "strategy.desirable_weight=-1 should be"),
        ("strategy.desirable_weight=0 strategy.undesirable_weight=0", "are both 0"),
        ("strategy.loss=dpo", "strategy.loss=dpo should be"),
        ("batch_size=1", "batch_size=1: strategy.loss=kto puts each prompt"),
        ("reference=cached", "reference=cached lacks the answers to other prompts"),
    ],
)
def test_settings_that_do_not_fit(overrides: str, said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal, match=said):
        check(compose("train", overrides=["strategy=kto", *overrides.split()]), "train")


def test_without_the_divergence_a_batch_of_one_and_a_cache_will_do() -> None:
    overrides = ["strategy=kto", "strategy.loss=apo_zero_unpaired", "batch_size=1", "reference=cached"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = check(compose("train", overrides=overrides), "train")
    assert cfg["data"]["_target_"].endswith(".Labelled") and not build(cfg["strategy"]).shifted


def test_it_trains_and_survives_kill_nine(tmp_path: Path) -> None:
    """On built-in rows, in micro-batches: equal to the unbroken run to the bit, and every metric is logged."""
    train(*tiny(tmp_path / "whole", "strategy=kto"))
    whole = run_in(tmp_path / "whole")
    broken = killed_and_resumed(tiny(tmp_path / "broken", "strategy=kto"), tmp_path / "broken", [7])
    assert identity(broken) == identity(whole)
    last = metrics(whole)[-1]
    assert last["train/rewards/margin"] == pytest.approx(last["train/rewards/chosen"] - last["train/rewards/rejected"])
    assert {"train/kl", "val/full_kl", "val/full_rewards/margin", "train/logps/chosen"} <= last.keys()
    assert metrics(whole)[0]["train/loss"] == pytest.approx(0.5) and metrics(whole)[0]["train/kl"] == 0


def test_pairs_are_two_labelled_answers_and_the_reference_can_be_cached(tmp_path: Path) -> None:
    """data=labelled with a file of preferences."""
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [o for o in tiny(tmp_path / "r", "strategy=kto") if not o.startswith(("max_steps", "data.n="))]
    done = train(
        *settings,
        f"data.path={path}",
        "max_steps=3",
        "strategy.loss=apo_zero_unpaired",
        "reference=cached",
        "batch_size=8",
    )
    run = run_in(tmp_path / "r")
    (good, bad), rows = (
        re.findall(r"(\d+) (?:un)?desirable", done.stdout),
        json.loads((run / "meta/data.json").read_text()),
    )
    assert good == bad and 2 * int(good) == rows["train_documents"] and rows["kind"] == "labelled"
    assert "train/kl" not in metrics(run)[-1] and list((tmp_path / "cache" / "reference").glob("*.safetensors"))

"""Reward models: rewards are transformers', losses and gradients TRL's; one step however it is cut and laid out; and a policy
that learns from one."""

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import grads, same
from hydra import compose, initialize_config_dir
from running import identity, metrics, run_in
from safetensors.torch import load_file
from test_kto import GOLDEN, recorded_grads, theirs  # noqa: F401 - a fixture
from test_model import made
from test_post_training import killed_and_resumed, tiny, train
from test_strategies import LAYOUTS, ONE, pieces, ragged, step
from torch import Tensor, nn

from etude import reward
from etude.config import CONF, check
from etude.errors import Refusal
from etude.model.transformer import Transformer
from etude.strategy.layout import Row, rows_of
from etude.strategy.reward_model import RewardModel, judgeable, judged
from etude.strategy.rollout import Judge
from etude.text import tokenizer as tok

RECORDED = json.loads((GOLDEN / "reward.json").read_text())
CASES = {c["name"]: c for c in RECORDED["cases"]}
END = 2


class Ends(tok.Tokenizer):
    """A tokenizer of which only the end token matters."""

    def __init__(self, eos: int | None = END):
        self.eos = eos


def strategy_of(**changes: Any) -> RewardModel:
    return RewardModel(Ends(), None, **{"margin": 0.0, "center": 0.0, "layout": "shared"} | changes)


def learn(strategy: RewardModel, model: nn.Module, batches: list[dict]) -> tuple[float, dict[str, float]]:
    """A step of the loop: -> (loss, metrics); gradients are left in the model."""
    return step(strategy, model, None, strategy.collect(model, batches, list(range(len(batches))), ONE))


def recorded_batch() -> tuple[dict[str, Tensor], Tensor]:
    """TRL's pairs, all chosen rows and then all rejected ones, as rows in turns; and the rewards of these."""
    given = {k: v.long() if v.dtype == torch.int32 else v for k, v in load_file(GOLDEN / "reward.safetensors").items()}
    ids, mask = given["in/input_ids"], given["in/attention_mask"]
    starts = given["in/prompt_lengths"].repeat(2)[:, None]
    at = torch.arange(ids.shape[1])
    labels = ids.where((at >= starts) & (mask > 0), -100)
    batch = {"tokens": ids, "targets": F.pad(labels[:, 1:], (0, 1), value=-100), "doc_ids": mask - 1}
    turns = torch.arange(len(ids)).view(2, -1).T.flatten()
    return {k: v[turns] for k, v in batch.items()}, given["rewards"][turns]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [1, 6])
def test_it_is_trls(case: str, layout: Any, cut: int, theirs: Any) -> None:  # noqa: F811
    """RewardTrainer's loss to 5e-6, gradients to 5e-4 of their norm, and metrics, of a LlamaForSequenceClassification whose head
    is the end token's row of ours."""
    config, expected = CASES[case]["config"], CASES[case]["metrics"]
    model, (batch, rewards) = theirs("policy"), recorded_batch()
    loss, told = learn(strategy_of(layout=layout, **config), model, pieces(batch, cut, 2))
    assert [loss, told["loss"]] == pytest.approx([CASES[case]["loss"]] * 2, abs=5e-6)
    assert told["rewards/accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert told["rewards/margin"] == pytest.approx(expected["margin"], abs=1e-5)
    mean = (told["rewards/chosen"] + told["rewards/rejected"]) / 2
    assert mean == pytest.approx(expected["mean_reward"], abs=1e-5) == pytest.approx(rewards.mean().item(), abs=1e-5)
    mine, wanted = recorded_grads("reward.safetensors", case, model)
    head = grads(model)["head.weight"]
    same({"score": head[END : END + 1]}, {"score": wanted.pop("score.weight")}, 5e-4)
    assert not head[torch.arange(len(head)) != END].any(), "the other tokens' rows learn nothing"
    assert len(wanted) >= 7
    same(mine, wanted, 5e-4)


def test_rewards_are_transformers(theirs: Any) -> None:  # noqa: F811
    """Each completion's, whatever is judged beside it; and those of a batch of pairs."""
    model, (batch, rewards) = theirs("policy"), recorded_batch()
    rows = rows_of(batch)
    for at_once, room in ((32, 4096), (5, 16), (1, 1)):
        assert judged(model, rows, END, room, at_once).tolist() == pytest.approx(rewards.tolist(), abs=1e-5)
    assert judged(model, [], END).tolist() == []


def test_a_reward_is_read_behind_the_last_learned_token() -> None:
    """What a template puts behind the end of a turn is cut off, and what the model has no position for."""
    row = Row(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([False, False, True, True, False]))
    for limit, inputs in ((None, [5, 6, 7, 8]), (4, [5, 6, 7, 8]), (3, [5, 6, 7])):
        laid = judgeable([row], limit, 1, "rows", None, torch.device("cpu"))
        assert laid["tokens"][laid["doc_ids"] >= 0].tolist() == inputs and laid["slots"].tolist() == [[len(inputs) - 1]]
        assert (laid["targets"] < 0).all()
    model = made("gpt", "model.max_len=20")
    batch = ragged(pairs=4)
    batch["doc_ids"][:], batch["targets"][:, -1] = 0, 3  # 21 ids and 20 positions
    for layout in LAYOUTS:
        assert math.isfinite(learn(strategy_of(layout=layout), model, [batch])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_step_is_the_same_however_it_is_cut(name: str, layout: Any) -> None:
    """8x1 == 4x2 == 1x8 with ragged rows, and the number that tells the step's samples."""
    model, batch = made(name), ragged()
    strategy = strategy_of(layout=layout, margin=0.2, center=0.01)
    whole, expected = learn(strategy, model, [batch])
    wanted = grads(model)
    crc = {sum(b["crc"] for b in strategy.collect(model, pieces(batch, cut, 2), [0] * 8, ONE)) for cut in (1, 2, 4, 8)}
    assert len(crc) == 1
    for cut in (2, 4, 8):
        found, told = learn(strategy, model, pieces(batch, cut, 2))
        assert found == pytest.approx(whole, rel=1e-5)
        assert told == pytest.approx(expected, rel=1e-5, abs=1e-6)
        same(grads(model), wanted, 1e-5)


def test_rewards_are_not_rounded_to_bfloat16() -> None:
    """Where the model computes in it the product with the head is in fp32: else answers that differ little would be alike. A cap
    of the logits is none of rewards."""
    model, rows = made("dense", "model.logit_cap=1"), rows_of(ragged())
    exact = judged(model, rows, END)
    assert exact.abs().max() > 1
    with torch.autocast("cpu", torch.bfloat16):
        found = judged(model, rows, END)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


def test_all_layouts_are_the_same() -> None:
    model, batch = made("dense"), ragged()
    whole, expected = learn(strategy_of(layout="rows"), model, [batch])
    wanted = grads(model)
    for layout in ("packed", "shared"):
        found, told = learn(strategy_of(layout=layout), model, [batch])
        assert found == pytest.approx(whole, rel=1e-5) and told == pytest.approx(expected, rel=1e-4)
        same(grads(model), wanted, 1e-4)


# ---------------------------------------------------------------- as a reward


def of_all(rows: list[Row], tokenizer: Any, *, give: Any) -> Any:
    return give(rows)


of_all.of_rows = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("give", "expected", "said"),
    [
        (lambda rows: [len(r.ids) for r in rows], [2.0, 3.0], ""),
        (lambda rows: torch.tensor([1.0, math.inf]), [1.0, math.nan], ""),
        (lambda rows: [None, "x"], [math.nan, math.nan], "could not convert"),
        (lambda rows: [1.0], [math.nan, math.nan], "1 numbers for 2 completions"),
        (lambda rows: 1 / 0, [math.nan, math.nan], "ZeroDivisionError"),
    ],
)
def test_rewards_of_many_at_once(give: Any, expected: list[float], said: str, capsys: Any) -> None:
    """They are given ids, and what fails is counted as of any other reward."""
    judge = Judge({"all": functools.partial(of_all, give=give), "one": lambda text, fields: 1.0}, Ends())
    rows = [Row(torch.arange(n), torch.arange(n) > 0) for n in (2, 3)]
    found = judge(rows, ["a", "b"], [{}, {}])
    assert found["all"].tolist() == pytest.approx(expected, nan_ok=True) and found["one"].tolist() == [1.0, 1.0]
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that knows something: the answer in few words is chosen."""
    folder = tmp_path_factory.mktemp("reward")
    more = ["optimizer.lr=3e-3", "data.rows_seed=5"]
    train(*tiny(folder / "runs", "strategy=reward_model", "data.overlong=left", *more))
    return run_in(folder / "runs")


def test_it_trains_and_survives_kill_nine(run: Path, tmp_path: Path) -> None:
    """Out of the box: equal to the unbroken run to the bit, with a number for each step's samples; it says what it is for."""
    more = ["data.overlong=left", "optimizer.lr=3e-3", "data.rows_seed=5"]
    broken = killed_and_resumed(tiny(tmp_path / "broken", "strategy=reward_model", *more), tmp_path / "broken", [7])
    assert identity(broken) == identity(run)
    assert len({m["batch"] for m in metrics(run)}) > 10
    last = metrics(run)[-1]
    assert {"train/rewards/accuracy", "val/full_rewards/margin", "val/full_loss"} <= last.keys()
    assert f"strategy.rewards.model.ckpt={run}" in (run / "summary.txt").read_text()


def test_grpo_learns_from_it(run: Path, tmp_path: Path) -> None:
    """The command that its summary ends with: every completion of a rollout is judged, and they are told apart."""
    begin = [
        f"init_from={run}",
        "~reward@strategy.rewards.number",
        "+reward@strategy.rewards.model=model",
        f"strategy.rewards.model.ckpt={run}",
    ]
    more = ["strategy.group_size=4", "strategy.max_completion=6", "strategy.rewards.model.weight=2"]
    settings = [o for o in tiny(tmp_path / "r", "strategy=grpo") if not o.startswith(("max_steps", "model", "tok"))]
    train(*settings, *begin, *more, "max_steps=2", "sample_every=1", "model.max_len=192")
    found = metrics(run_in(tmp_path / "r"))
    assert all(math.isfinite(m["train/reward/model"]) and m["train/reward/failed"] == 0 for m in found)
    assert all(m["train/reward/std"] > 0 for m in found)


def test_its_number_is_that_of_its_export(run: Path) -> None:
    """Read once, times its weight."""
    tokenizer = tok.load(run / "artifacts" / "export")
    ids = tokenizer.encode("What is 1 + 1?2")
    rows = [Row(torch.tensor(ids[:n]), torch.arange(n) >= 5) for n in (8, len(ids))]
    given = reward.model(rows, tokenizer, ckpt=str(run), weight=2.0, device="cpu", trusted=["etude"])
    model = Transformer.from_pretrained(run / "artifacts/checkpoints/last")
    with torch.no_grad():
        expected = [2 * model(r.ids[None])[0, -1, tokenizer.eos].item() for r in rows]
    assert given == pytest.approx(expected, abs=1e-4)
    other = tok.char(["abc"], ["abc"], unknown="error")
    with pytest.raises(Refusal, match="has another tokenizer than the policy"):
        reward.model(rows, other, ckpt=str(run), weight=1.0, device="cpu", trusted=["etude"])


def test_another_runs_model_is_no_reward(run: Path, tmp_path: Path) -> None:
    """What was trained for something else is refused where its run says so."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    path = copied / "meta" / "full_config.json"
    path.write_text(path.read_text().replace("reward_model.RewardModel", "seq.Seq"))
    settings = {"weight": 1.0, "device": "cpu", "trusted": ["etude"]}
    for ckpt in (copied, copied / "artifacts/export", copied / "artifacts/checkpoints/last"):
        with pytest.raises(Refusal, match="is no reward model; train one with"):
            reward.model([], tok.load(run / "artifacts/export"), ckpt=str(ckpt), **settings)
    alone = Path(shutil.copytree(run / "artifacts/export", tmp_path / "alone"))
    assert reward.model([], tok.load(alone), ckpt=str(alone), **settings) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("strategy=reward_model strategy.margin=-1", "strategy.margin=-1 should be a number of at least 0"),
        ("strategy=reward_model strategy.center=-1", "strategy.center=-1 should be"),
        ("strategy=grpo +reward@strategy.rewards.model=model", "ckpt is missing: type strategy.rewards.model.ckpt=<runs/<run>"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(overrides: str, said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Refusal, match=said):
        check(compose("train", overrides=overrides.split()), "train")

"""bench.py what=trl: both sides do the same work to the last step, what is counted is counted right, a difference is found,
and what TRL cannot do alike is refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from etude import bench, bench_trl
from etude import config as conf
from etude.errors import EtudeError, Refusal

TINY = """what=trl parallel.device=cpu threads=1 precision=fp32 data.n=80 batch_size=2 steps=2 rounds=2 warmup_steps=2 model.dim=32
    model.n_layers=2 model.attn.n_heads=2 model.attn.n_kv_heads=1 model.ffn.hidden=48 tokenizer.vocab_size=320
    optimizer.lr=1e-3""".split()
DPO = ["strategy=dpo", "data.seq_len=256", "model.max_len=256"]
GRPO = ["strategy=grpo", "strategy.group_size=4", "strategy.max_completion=6", "engine.attention=views"]


def checked(*overrides: str) -> dict:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        return conf.check(compose("bench", overrides=[*TINY, *overrides]), "bench")


def figures(capsys: Any, *overrides: str) -> dict[str, Any]:
    assert bench.run(checked(*overrides)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """After a measurement: (our weights as transformers names them, TRL's, those at the start)."""
    found: list[Any] = []

    def measure(cfg: dict, sides: dict, theirs: Any) -> dict:
        start = {n: p.clone() for n, p in theirs.trainer.model.state_dict().items()}
        result = plain(cfg, sides, theirs)
        theirs.folder = tmp_path
        found.append((theirs.exported().state_dict(), theirs.trainer.model.state_dict(), start))
        return result

    plain = bench_trl.measure
    monkeypatch.setattr(bench_trl, "measure", measure)
    return found


@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_dpo_trains_the_same_weights(reference: str, trained: list[Any], capsys: Any) -> None:
    """After warm-up and all rounds our model and TRL's are the same: so were batches, gradients, clipping and AdamW. The
    more sequences share, the fewer tokens are computed, and as many are learned."""
    found = figures(
        capsys, *DPO, f"reference={reference}", "strategy.label_smoothing=0.1", "strategy.loss={robust:1,norm:2}"
    )
    [(ours, theirs, start)] = trained
    for name, p in ours.items():
        moved = (p - start[name]).abs().mean()
        assert moved > 1e-4 and (p - theirs[name]).abs().mean() < 0.02 * moved, name
    tokens = [found[f"{who}tokens_per_step"] for who in ("", "packed_", "rows_")]
    assert tokens == sorted(tokens) and len(set(tokens)) == 3
    assert len({found[f"{who}learned_per_step"] for who in ("", "packed_", "rows_", "trl_")}) == 1
    assert found["pairs_per_step"] == 2 and found["reference"] == reference
    assert found["first_loss"] == pytest.approx(3 * math.log(2), abs=1e-6)


def test_grpo_learns_from_as_much(capsys: Any) -> None:
    """With micro-batches, a reference and two updates a rollout; no token ends a completion, on either side."""
    found = figures(capsys, *GRPO, "micro_batch_size=1", "strategy.beta=0.04", "strategy.iterations=2")
    assert found["completions_per_step"] == 8
    assert all(found[f"{who}learned_per_step"] == 48 for who in ("", "packed_", "rows_", "trl_"))
    assert found["tokens_per_step"] < found["packed_tokens_per_step"] <= found["rows_tokens_per_step"]
    assert (
        found["first_grad_norm"] == pytest.approx(found["trl_first_grad_norm"], rel=1e-3)
        and found["first_grad_norm"] > 0
    )
    for who in ("", "trl_"):
        assert 0 < found[f"{who}update_ms"] < found[f"{who}step_ms"]
        assert found[f"{who}completions_per_s"] == pytest.approx(8000 / found[f"{who}step_ms"])


@pytest.mark.parametrize(
    ("strategy", "name", "changed"),
    [(DPO, "dpo_settings", {"beta": 0.2}), (GRPO, "grpo_settings", {"scale_rewards": "none"})],
)
def test_a_difference_is_found(
    strategy: list[str], name: str, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TRL is told something else, nothing is timed: the first gradients say so."""
    plain = getattr(bench_trl.TRL, name)

    def other(self: Any) -> Any:
        made = plain(self)
        for key, value in changed.items():
            setattr(made, key, value)
        return made

    monkeypatch.setattr(bench_trl.TRL, name, other)
    with pytest.raises(EtudeError, match="not the same is computed"):
        bench.run(checked(*strategy))


def test_other_tokens_are_found() -> None:
    same = bench_trl.First([([1, 2], [3])], 0.5, 1.0)
    bench_trl.compare(same, same, exact=True)
    bench_trl.compare(same, same._replace(loss=0.6), exact=False)
    for other in (same._replace(loss=0.50002), same._replace(norm=1.002), same._replace(loss=math.nan)):
        with pytest.raises(EtudeError, match="first step"):
            bench_trl.compare(same, other, exact=True)
    with pytest.raises(EtudeError, match="other tokens"):
        bench_trl.compare(same, same._replace(sequences=[([1], [2, 3])]), exact=False)


def test_a_step_has_its_share_of_a_rollout() -> None:
    """Of six steps in two windows the first of each draws: medians are of windows, not of steps."""
    steps = [bench_trl.Step(10 if i % 3 == 0 else 1, 9 if i % 3 == 0 else 0, 6, 4) for i in range(6)]
    assert bench_trl.overall(steps, 3) == (4, 3, 6, 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=sft"], "strategy=dpo and strategy=grpo"),
        (["strategy=dpo", "strategy.loss=simpo"], "no simpo"),
        (["strategy=dpo", "lora=dora"], "lora="),
        (["strategy=dpo", "optimizer.lr_scale.head=0.5"], "lr_scale"),
        (["strategy=grpo", "strategy.drop_silent=true"], "type strategy.drop_silent=false"),
        (["strategy=grpo", "strategy.iterations=3"], "steps=2 should be a multiple of 3"),
        (["strategy=dpo", "warmup_steps=0"], "type warmup_steps=1"),
        (["strategy=dpo", "against='model=moe'"], "against="),
        (["strategy=dpo", "model=gpt"], "gpt2"),
    ],
)
def test_what_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(Refusal) as error:
        bench.run(checked(*overrides))
    assert said in str(error.value) and "\n" not in str(error.value)

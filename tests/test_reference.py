"""A reference on disk: the same numbers as a copy's in every layout, keyed by all that they depend on, built once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from test_model import made
from test_strategies import LAYOUTS, ONE, PAIRS, grads, learn, pieces, ragged, same

from etude.errors import Refusal, StorageFault
from etude.model.transformer import Transformer
from etude.strategy import reference
from etude.strategy.dpo import DPO


class Rows:
    """A loader's data set of pairs."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["tokens"]) // 2

    def whole(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for i in range(0, 2 * len(self), 2 * batch_size):
            yield {k: v[i : i + 2 * batch_size] for k, v in self.batch.items()}


class Counting:
    """How often a model is called."""

    def __init__(self, model: Transformer):
        self.calls = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def precomputed(
    folder: Path, model: Transformer, *batches: dict, batch_size: int = 4, precision: str = "fp32"
) -> tuple[reference.Cached, list[str]]:
    said: list[str] = []
    cached = reference.precompute(
        model,
        map(Rows, batches),
        batch_size=batch_size,
        precision=precision,
        cache_dir=folder,
        world=ONE,
        say=said.append,
    )
    return cached, said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_stands_for_a_copy(layout: str, precision: str, tmp_path: Path) -> None:
    """Losses, gradients and metrics of both splits, cut in any way: 1e-5, and with the batches that it was made of, to
    the bit."""
    model, ref = made("dense"), made("dense", seed=1)
    train, val = ragged(), ragged(pairs=3, seed=5)
    cached, _ = precomputed(tmp_path, ref, train, val, precision=precision)
    strategy = DPO(**PAIRS | {"layout": layout})
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for batch, cut in ((train, 1), (train, 2), (train, 8), (val, 1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, metrics = learn(strategy, model, ref, pieces(batch, cut, 2))
            wanted = grads(model)
            found = learn(strategy, model, cached, pieces(batch, cut, 2))
        assert found[0] == pytest.approx(loss, rel=tolerance)
        assert found[1] == pytest.approx(metrics, rel=tolerance, abs=tolerance)
        same(grads(model), wanted, tolerance)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for piece in pieces(train, 2, 2):
            tokens = piece.pop("tokens")
            scores, aux = cached(tokens, **piece)
            assert torch.equal(scores.logprob, ref(tokens, **piece)[0].logprob) and aux is None
            assert scores.entropy.isnan().all()  # not known, and not to be taken for zero


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    """What is on disk is used, whatever the batches; what is new is added, and the rest stays to the bit."""
    model = made("dense").train()
    train, val = ragged(), ragged(pairs=3, seed=5)
    first, _ = precomputed(tmp_path, model, train)
    assert model.training
    counting = Counting(model)
    again, _ = precomputed(tmp_path, model, train, batch_size=3)
    assert counting.calls == 0 and again.path == first.path and again.places == first.places
    assert again.logprob.tobytes() == first.logprob.tobytes()
    more, _ = precomputed(tmp_path, model, train, val)
    assert counting.calls == 1 and len(more.places) == 16 + 6
    assert more.logprob[: len(first.logprob)].tobytes() == first.logprob.tobytes()
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]
    assert oct(first.path.stat().st_mode)[-3:] == oct(0o666 & ~_mask())[-3:]


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_pass_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before is kept, and the file becomes the one of an unbroken pass, byte for byte; progress is said."""
    model, batch = made("dense"), ragged()
    unbroken, _ = precomputed(tmp_path / "a", model, batch, batch_size=2)
    monkeypatch.setattr(reference, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(reference, "TELL_EVERY", 0.0)
    real, calls = reference.computed, []

    def stopped(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reference, "computed", stopped)
    with pytest.raises(KeyboardInterrupt):
        precomputed(tmp_path / "b", model, batch, batch_size=2)
    cached, said = precomputed(tmp_path / "b", model, batch, batch_size=2)
    assert len(calls) == 5
    assert said[-1] == "log-probabilities of the reference: 8 of 8 samples"
    assert cached.path.read_bytes() == unbroken.path.read_bytes()


def test_a_row_is_known_by_its_ids_and_its_mask(tmp_path: Path) -> None:
    """Another id, another mask, another length: not there, and said so; rows in another order or place are."""
    model, batch = made("dense"), ragged()
    cached, _ = precomputed(tmp_path, model, batch)
    targets, ids = batch["targets"][1], batch["tokens"][1]
    t = int((targets >= 0).nonzero()[0])
    for name, row, at, value in (
        ("tokens", ids, 0, (int(ids[0]) + 1) % 61),
        ("targets", targets, t, -100),
        ("targets", targets, t, (int(targets[t]) + 1) % 61),
        ("doc_ids", batch["doc_ids"][1], int((batch["doc_ids"][1] >= 0).sum()) - 1, -1),
    ):
        before = int(row[at])
        batch[name][1, at] = value
        with pytest.raises(Refusal, match="lacks a sequence of this batch: .* set reference=copy"):
            cached(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])
        batch[name][1, at] = before
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight = cached(batch["tokens"], targets=batch["targets"], doc_ids=batch["doc_ids"])[0].logprob
    mixed = cached(*(batch[name][order] for name in ("tokens", "targets", "doc_ids")))[0].logprob
    assert torch.equal(mixed, straight[order])


def test_windows_without_documents(tmp_path: Path) -> None:
    """Rows that are one document each and say nothing of it."""
    model, batch = made("dense"), ragged()
    batch = {"tokens": batch["tokens"], "targets": batch["tokens"].roll(-1, 1)}
    cached, _ = precomputed(tmp_path, model, batch, batch_size=8)
    found = cached(batch["tokens"], targets=batch["targets"])[0].logprob
    assert torch.equal(found, model(batch["tokens"], targets=batch["targets"])[0].logprob)


def test_the_key_is_all_that_numbers_depend_on() -> None:
    """One bit of one parameter, its name or dtype, a setting that is no weight, the precision."""
    model = made("dense")
    base = reference.key(model, "fp32")
    assert base == reference.key(made("dense"), "fp32") == reference.key(made("dense").train(), "fp32")
    keys = {base, reference.key(model, "bf16"), reference.key(made("dense", seed=1), "fp32")}
    keys.add(reference.key(made("dense", embed_scale=2.0), "fp32"))  # the same weights
    keys.add(reference.key(made("dense").bfloat16(), "fp32"))
    with torch.no_grad():
        model.blocks[1].attn.q.weight[3, 4] = model.blocks[1].attn.q.weight[3, 4].nextafter(torch.tensor(9.0))
    keys.add(reference.key(model, "fp32"))
    assert len(keys) == 6
    frozen = made("dense").requires_grad_(False)
    assert reference.key(frozen, "fp32") == base


@pytest.mark.parametrize("how", ["cut", "a bit", "emptied", "another file"])
def test_a_damaged_file_is_made_again(how: str, tmp_path: Path) -> None:
    """With one warning, and the same numbers as before."""
    model, batch = made("dense"), ragged()
    first, _ = precomputed(tmp_path, model, batch)
    whole = first.path.read_bytes()
    other = precomputed(tmp_path, made("dense", seed=1), batch)[0].path
    at = len(whole) - 41
    damaged = {
        "cut": whole[:-7],
        "a bit": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "emptied": b"",
        "another file": b"{}" * 100,
    }[how]
    first.path.write_bytes(damaged)
    again, said = precomputed(tmp_path, model, batch)
    assert len(said) == 1 and said[0].startswith(f"warning: {first.path} is damaged and is made again: ")
    assert first.path.read_bytes() == whole and again.places == first.places
    assert precomputed(tmp_path, model, batch)[1] == []
    assert load_file(other)  # no other file was touched


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the folder should be: exit code 4 with the path, and nothing left behind."""
    (tmp_path / "reference").write_text("")
    with pytest.raises(StorageFault, match="could not be written: .* set cache_dir="):
        precomputed(tmp_path, made("dense"), ragged())
    assert [p.name for p in tmp_path.iterdir()] == ["reference"]


def test_other_ranks_read_what_the_first_computed(tmp_path: Path) -> None:
    """They wait as long as it is at work, and compute nothing."""
    model, batch = made("dense"), ragged()
    heard = iter([True, True, False])

    class Second:
        rank, size, device = 1, 2, torch.device("cpu")

        def broadcast(self, value: Any) -> Any:
            said = next(heard)
            if not said:
                precomputed(tmp_path, model, batch)
                counting.calls = 0
            return said

    counting = Counting(model)
    cached = reference.precompute(
        model, [Rows(batch)], batch_size=4, precision="fp32", cache_dir=tmp_path, world=Second(), say=print
    )  # type: ignore[arg-type]
    assert counting.calls == 0 and len(cached.places) == 16 and next(heard, None) is None

"""Windows of steps that share a rollout: which samples a step sees, what is drawn when, and a resume in the middle."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from etude.errors import Refusal
from etude.parallel import World
from etude.window import Window, key

CPU = torch.device("cpu")


class Reader:
    """A loader of numbered micro-batches, two a step and rank."""

    device = CPU

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def steps(self, start: int, stop: int | None) -> Iterator[list[dict[str, Any]]]:
        for step in range(start, 10**6 if stop is None else stop):
            yield [{"tokens": torch.tensor([[step, self.rank, i]])} for i in range(2)]


class Drawing:
    """Keeps the samples, the weights' version, and one number drawn by the key."""

    def __init__(self, steps_per_rollout: int, iterations: int):
        self.steps_per_rollout, self.iterations = steps_per_rollout, iterations
        self.calls: list[int] = []

    def collect(self, model: Any, batches: list, seeds: list[int], world: World) -> list:
        self.calls.append(len(batches))
        made = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            drawn = {"drawn": torch.rand(3), "version": model[0], "texts": [f"of {model[0]}"]}
            made.append(batch | drawn | {"metrics": {"reward/a.b": (torch.tensor(0.5), torch.tensor(2))}})
        return made


def window(strategy: Drawing, rank: int = 0, size: int = 1) -> Window:
    return Window(strategy, Reader(rank), World(rank, size, CPU), 7, torch.autocast("cpu", enabled=False))  # type: ignore[arg-type]


def read(w: Window, start: int, stop: int) -> list[list[dict[str, Any]]]:
    """The batches of steps start..stop-1; the model's version is the step."""
    with w.reading(start, stop):
        return [w.collected([step], step) for step in range(start, stop)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "iterations"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_each_sample_is_learnt_from_so_many_times(n: int, iterations: int) -> None:
    """A window's steps see its samples in turn, with what the weights at its beginning drew, and then the next ones."""
    strategy = Drawing(n, iterations)
    w = window(strategy)
    found = read(w, 0, 2 * n * iterations)
    for step, batches in enumerate(found):
        number, at = divmod(step, n * iterations)
        assert [b["tokens"].tolist() for b in batches] == [[[number * n + at % n, 0, i]] for i in range(2)]
        assert all(b["version"] == number * n * iterations for b in batches)
        assert w.source(step) == number * n + at % n
    assert strategy.calls == [2 * n, 2 * n]
    torch.manual_seed(key(7, "collect", 0, 1))
    assert torch.equal(found[0][1]["drawn"], torch.rand(3)), "keyed by the loader's step and the global micro-batch"


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["drawn"], b["drawn"])
    assert (a["version"], a["texts"]) == (b["version"], b["texts"])
    assert {n: tuple(map(float, p)) for n, p in a["metrics"].items()} == {
        n: tuple(map(float, p)) for n, p in b["metrics"].items()
    }


def test_a_resume_in_the_middle_goes_on_with_the_same_rollout() -> None:
    """Every stop in two windows, through what a checkpoint would hold."""
    whole = read(window(Drawing(2, 2)), 0, 8)
    for stop in range(1, 8):
        first = window(Drawing(2, 2))
        read(first, 0, stop)
        files = first.files(stop)
        assert bool(files) == (stop % 4 != 0), "at a window's beginning there is nothing to keep"
        second = window(Drawing(2, 2))
        if files:
            second.restore(stop, files["rollout.safetensors"], files["rollout.json"])
        for a, b in zip(read(second, stop, 8), whole[stop:], strict=True):
            for x, y in zip(a, b, strict=True):
                same(x, y)


def test_other_numbers_of_processes_share_the_micro_batches() -> None:
    """Two processes take one each of the two that one process had; three cannot."""
    one = window(Drawing(2, 2))
    read(one, 0, 1)
    files = one.files(1)
    for rank in range(2):
        w = window(Drawing(2, 2), rank, 2)
        w.restore(1, files["rollout.safetensors"], files["rollout.json"])
        assert [[b["tokens"].tolist() for b in step] for step in w.held] == [[[[i, 0, rank]]] for i in range(2)]
    with pytest.raises(
        Refusal, match="2 micro-batches, which do not divide over 3 processes; go on with 1 for 3 steps"
    ):
        window(Drawing(2, 2), 0, 3).restore(1, files["rollout.safetensors"], files["rollout.json"])

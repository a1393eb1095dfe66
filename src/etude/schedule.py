"""Learning-rate schedules: pure functions (step, steps, steps_per_epoch) -> factor of the full rate.

`steps` is the last step's number plus one. All of them rise linearly over the first `warmup` steps, from
1/(warmup + 1) on, so that no step is taken with rate 0."""

import math


def _warm(step: int, warmup: int) -> float | None:
    return (step + 1) / (warmup + 1) if step < warmup else None


def _progress(step: int, steps: int, warmup: int) -> float:
    """Part of the steps after warm-up that are done, 0 to 1."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))


def constant(step: int, steps: int, steps_per_epoch: float, *, warmup: int) -> float:
    """1."""
    return _warm(step, warmup) or 1.0


def linear(step: int, steps: int, steps_per_epoch: float, *, warmup: int, min_rate: float) -> float:
    """From 1 down to min_rate in a straight line."""
    return _warm(step, warmup) or 1.0 - (1.0 - min_rate) * _progress(step, steps, warmup)


def cosine(step: int, steps: int, steps_per_epoch: float, *, warmup: int, min_rate: float) -> float:
    """From 1 down to min_rate along half a cosine (Loshchilov & Hutter 2017, without restarts)."""
    return _warm(step, warmup) or _cosine(_progress(step, steps, warmup), min_rate)


def sgdr(
    step: int, steps: int, steps_per_epoch: float, *, warmup: int, cycle: int, t_mult: float, min_rate: float
) -> float:
    """Cosines with restarts (Loshchilov & Hutter 2017): the first lasts `cycle` steps, each next one t_mult times as
    many."""
    if (warm := _warm(step, warmup)) is not None:
        return warm
    t, length = step - warmup, float(max(1, cycle))
    while t >= length:
        t -= length  # type: ignore[assignment]
        length *= max(1.0, t_mult)
    return _cosine(t / length, min_rate)


def wsd(step: int, steps: int, steps_per_epoch: float, *, warmup: int, decay: float, min_rate: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1 until the last `decay` part of the steps, then linear to min_rate."""
    if (warm := _warm(step, warmup)) is not None:
        return warm
    start = max(warmup, steps - round(decay * steps))
    return 1.0 if step < start else 1.0 - (1.0 - min_rate) * _progress(step, steps, start)


def step(step: int, steps: int, steps_per_epoch: float, *, warmup: int, every: float, gamma: float) -> float:
    """gamma to the number of times that `every` epochs have passed."""
    return _warm(step, warmup) or gamma ** int(step / (every * steps_per_epoch))


def _cosine(progress: float, min_rate: float) -> float:
    return min_rate + (1.0 - min_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))

"""Training steps with a clock: what every benchmark of training is made of."""

import contextlib
import statistics
import time
from typing import Any


class Training:
    """The loop's own work on one session, with the clock read between its parts."""

    def __init__(self, session: Any):
        self.session = session
        if session.cfg["compile"]:
            for block in session.model.blocks:
                block.compile()
        self.step, self.reading = 0, contextlib.ExitStack()
        self.latest: tuple[list[Any], list[dict], Any] | None = (
            None  # step's micro-batches, their metrics, gradient's norm
        )
        self.reading.enter_context(session.window.reading(0, None))
        self.round(session.cfg["warmup_steps"])

    def round(self, steps: int) -> dict[str, float]:
        """Median seconds a step of each part over `steps` steps."""
        from etude.loop import gradients, weigh

        s = self.session
        times: list[dict[str, float]] = []
        for _ in range(steps):
            clock = Clock(s.device)
            batches = s.window.collected(s.model, self.step)
            self.step += 1
            clock.lap("data")
            metrics, norm = gradients(
                s.model,
                s.ref,
                s.strategy,
                batches,
                weigh(s.strategy, batches),
                s.cfg,
                0,
                s.parallel,
                s.world,
                s.autocast,
                clock.lap,
            )
            s.optimizer.step()
            s.optimizer.zero_grad()
            clock.lap("optimizer")
            times.append(clock.laps | {"step": sum(clock.laps.values())})
            self.latest = batches, metrics, norm
        return {k: statistics.median(t[k] for t in times) for k in times[0]} if times else {}


class Clock:
    """Seconds spent in named parts; on a GPU each lap waits until its work is done."""

    def __init__(self, device: Any):
        self.device, self.laps, self.last = device, dict[str, float](), time.perf_counter()

    def lap(self, part: str) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[part] = self.laps.get(part, 0.0) + now - self.last
        self.last = now


def describe(device: Any) -> str:
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )

"""What a run will need of memory, told before it begins."""

from pathlib import Path
from typing import Any

from etude.errors import Refusal
from etude.model.head import CHUNK


def preflight(
    model: Any, trainable: int, copied: bool, rolled: int, device: Any, processes: int, precision: str, rows: int
) -> str | None:
    """Raises Refusal where what a run holds from its first step on does not fit into what is free: weights, gradients and
    two moments in fp32; `copied`, a reference; `rolled` bytes of rollouts. `model` may lie on the meta device; `processes`
    share the memory. -> a warning where what a forward keeps of `rows` tokens, which is an estimate, would not fit."""
    n = sum(p.numel() for p in model.parameters())
    parts = {
        "weights": n * 4,
        "gradients and optimizer": trainable * 12,
        "reference": n * 4 if copied else 0,
        "rollout": rolled,
    }
    room, need = free(device) // processes, sum(parts.values())
    if room and need > room:
        advice = {
            "weights": "choose a smaller model",
            "gradients and optimizer": "train an adapter with lora=true, or choose a smaller model",
            "reference": "set reference=cached, or train an adapter with lora=true, which needs no copy",
            "rollout": "lower engine.cache_mb, strategy.max_completion or engine.max_running",
        }
        largest = max(parts, key=lambda name: parts[name])
        told = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items() if size)
        raise Refusal(
            f"this run needs {need / 2**20:,.0f} MiB a process ({told}) and {room / 2**20:,.0f} MiB are free: {advice[largest]}"
        )
    total = need + activations(model, rows, precision)
    if not room or total <= room:
        return None
    return f"about {total / 2**20:,.0f} MiB will be needed at a step and {room / 2**20:,.0f} MiB are free; should it fail, lower micro_batch_size or data.seq_len, or set model.checkpoint=true"


def rollout(model: Any, engine: Any, context: int) -> int:
    """Bytes of an engine beside the model: a packed copy of the weights, and the cache, of which no more is made than twice
    what all samples of `context` positions can fill (see InferenceEngine)."""
    shapes = [a.cache_shape() for a in model.attentions() if hasattr(a, "cache_shape")]
    position = 4 * sum(heads * (dk + dv) for heads, dk, dv in shapes)
    cache = min(engine.cache_mb * 2**20, engine.max_running * 2 * context * position)
    return sum(p.numel() for p in model.parameters()) * 4 + cache


def activations(model: Any, rows: int, precision: str) -> int:
    """Bytes that the blocks keep of `rows` tokens for the backward pass, 17 numbers a channel and layer (after
    Korthikanti et al. 2022, without the attention matrix; 2 with activation checkpointing), and the head's chunk of
    logits three times."""
    width = 2 if precision == "bf16" else 4
    kept = 2 if model.checkpoint else 17
    logits = min(rows * model.vocab_size, CHUNK)
    return rows * model.dim * model.n_layers * kept * width + logits * 12


def free(device: Any) -> int:
    """Bytes that are free on a device; 0 where nobody says. On the CPU also what the control group leaves."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().splitlines()
        held -= next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
        return min(found, limit - held)
    except (OSError, ValueError):  # no control group, or one without a limit
        return found

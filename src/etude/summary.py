"""What a run says when it begins and when it ends."""

from typing import Any

from etude import memory
from etude import run as runs
from etude.display import count
from etude.loop import goal

Session = Any  # etude.training.Session, which imports this module


def at_start(session: Session, limit: int | None) -> str:
    meta, size, seq = session.meta, session.cfg["batch_size"], session.data.seq_len
    n = sum(p.numel() for p in session.model.parameters())
    flops = session.model.flops_per_token(seq)
    rows = session.batches.sampler.micro_batch_size * seq
    needed = 4 * n + 12 * session.trainable + memory.activations(session.model, rows, session.precision)
    each = session.batches.tokens_per_sample
    total = (
        f"{limit:,} steps, {count(limit * size * each)} tokens" if limit else f"{session.cfg['max_minutes']} minutes"
    )
    samples = f"{size} x {seq}" if each == seq else f"{size} x {each:.0f} (at most {seq})"
    accumulation = (
        f" ({session.batches.micro_batches} micro-batches of {session.batches.sampler.micro_batch_size})"
        if session.batches.micro_batches > 1
        else ""
    )
    adapted = f" ({session.trainable:,} of them trained)" if session.trainable < n else ""
    lines = [
        f"run      {session.folder}" + (f", from step {session.progress.step}" if session.progress.step else ""),
        f"model    {n:,} parameters{adapted}, {count(flops)}FLOP a token, about {needed / 2**20:,.0f} MiB to train",
        f"data     {meta['files']} file{'s' * (meta['files'] > 1)} of {meta['source']}: {count(meta['train_tokens'])} + {count(meta['val_tokens'])} tokens of {meta['vocab_size']:,} kinds",
        *(f"rows     {line}" for line in session.batches.accounts()),
        f"train    {total}, {samples} tokens a step{accumulation}, {session.device.type} {session.precision}"
        + (f", {session.world.size} processes" if session.world.size > 1 else ""),
    ]
    if "bigram_loss" in meta:
        lines.append(f"baseline a bigram model's validation loss is {meta['bigram_loss']:.3f}")
    return "\n".join(lines)


def at_end(session: Session, reason: str, status: runs.Status) -> list[str]:
    metrics = status.fields["metrics"]
    minutes, seconds = divmod(round(session.progress.seconds), 60)
    name = goal(session.strategy)[0]
    shown = (
        f"loss     validation {metrics['val/full_loss']:.4f}"
        if name == "loss"
        else f"{name} {metrics[f'val/full_{name}']:.4f} in validation,"
    )
    lines = [
        f"done     {reason}: {session.progress.step:,} steps, {session.progress.tokens:,} tokens in {minutes} min {seconds} s",
        f"{shown} over the whole split"
        + (f" ({metrics['val/full_bits_per_byte']:.3f} bits a byte)" if "val/full_bits_per_byte" in metrics else "")
        + (f"; a bigram model's is {session.meta['bigram_loss']:.3f}" if "bigram_loss" in session.meta else ""),
    ]
    if session.progress.best_step:
        lines.append(
            f"best     step {session.progress.best_step}, validation {name} {session.progress.best:.4f} over the same {session.cfg['eval_iters'] or 'whole'} batches each time"
        )
    if use := getattr(session.strategy, "use", None):
        return [*lines, "", f"use:     {use.format(run=session.folder)}"]
    pairs = session.sample(session.progress.step)
    for prompt, text in pairs:
        lines += ["", f"--- sample after {prompt!r}", prompt + text]
    if session.meta["kind"] == "text":
        prompt = next((p for p in session.prompts if p.strip()), "")
        return [*lines, "", f'generate: python generate.py ckpt={session.folder} prompt="{prompt}"']
    return [*lines, "", f"talk:    python generate.py ckpt={session.folder} chat=true"]

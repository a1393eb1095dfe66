"""`dry_run=true`: what a run would train on, to be looked at before it is paid for."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from etude.data.loader import Batch, Batches, Documents
from etude.data.prepare import Prepared
from etude.text.tokenizer import Tokenizer

SAMPLES = 3
TOKENS = 300  # of a sample that are shown
TARGET, CONTEXT = "bold green", "dim"


def show(cfg: dict, data: Any, prepared: list[Prepared]) -> int:
    """The first samples of step 0 with their targets in colour (in ⟦⟧ where there is none), then counts and lengths. ->
    exit code."""
    console = Console(highlight=False, soft_wrap=True)
    size = cfg["batch_size"]
    one = {"batch_size": size, "micro_batch_size": size, "rank": 0, "world_size": 1}
    batches = Batches(data, prepared, one, cfg["seed"], torch.device("cpu"))
    tokenizer = prepared[0].tokenizer
    indices = batches.sampler.micro_batches(0)[0][:SAMPLES].tolist()
    for number, index in enumerate(indices):
        batch = batches.train.__getitems__([index])
        for row in range(len(batch["tokens"])):
            name = named(batch, row)
            for document, (ids, wanted) in enumerate(documents(batch, row)):
                counts = f"{len(ids)} tokens, {int(wanted.sum())} targets"
                console.print(f"── sample {number}, {name}document {document}: {counts}", style="bold", markup=False)
                console.print(coloured(tokenizer, ids, wanted, console.is_terminal))
        if "fields" in batch:
            console.print(f"fields: {json.dumps(batch['fields'][0], ensure_ascii=False)}", markup=False)
    console.print("── data", style="bold", markup=False)
    for line in summary(batches):
        console.print(line, markup=False)
    strategy = cfg["strategy"]["_target_"].rpartition(".")[2]
    console.print(f"\n{strategy} would train on this; leave out dry_run=true to begin", markup=False)
    return 0


def named(batch: Batch, row: int) -> str:
    """What a row of one sample is, where it has several."""
    if "rewards" in batch:
        reward = batch["rewards"][row].item()
        return f"completion {row}, {'no reward' if math.isnan(reward) else f'reward {reward:g}'}, "
    if "labels" in batch:
        return f"{'desirable' if batch['labels'][row] else 'undesirable'}, "
    return ("chosen " if row == 0 else "rejected ") if len(batch["tokens"]) > 1 else ""


def documents(batch: Batch, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, which of them are targets) of each document in a row, the last target among the ids."""
    tokens = batch["tokens"][row].numpy()
    doc_ids = batch["doc_ids"][row].numpy() if "doc_ids" in batch else np.zeros_like(tokens)
    targets = batch["targets"][row].numpy() if "targets" in batch else np.full_like(tokens, -100)
    for document in np.unique(doc_ids[doc_ids >= 0]):
        at = np.flatnonzero(doc_ids == document)
        ids, wanted = tokens[at], np.concatenate([[False], targets[at] >= 0])
        if wanted[-1]:
            yield np.append(ids, targets[at[-1]]), wanted
        else:
            yield ids, wanted[:-1]


def coloured(tokenizer: Tokenizer, ids: np.ndarray, wanted: np.ndarray, colours: bool) -> Text:
    text = Text()
    shown = min(len(ids), TOKENS)
    edges = [0, *(np.flatnonzero(np.diff(wanted[:shown])) + 1).tolist(), shown]
    for begin, end in zip(edges, edges[1:]):
        part = tokenizer.decode(ids[begin:end].tolist())
        if wanted[begin]:
            text.append(part if colours else f"⟦{part}⟧", TARGET)
        else:
            text.append(part, CONTEXT)
    if shown < len(ids):
        text.append(f" … {len(ids) - shown} more tokens", "italic")
    return text


def summary(batches: Batches) -> list[str]:
    """Per source and split: samples, tokens, lengths, what was left out or cut."""
    lines = []
    for name, prepared in zip(batches.data.parts(), batches.prepared):
        meta, prefix = prepared.meta, f"{name}: " if name else ""
        lines.append(f"{prefix}{meta['kind']} from {meta['source']}, {meta['files']} file{'s' * (meta['files'] > 1)}")
        for split in ("train", "val"):
            lengths = meta.get(f"{split}_lengths")
            line = f"{prefix}{split:<6}{meta[f'{split}_tokens']:,} tokens"
            if lengths:
                line += f" in {meta[f'{split}_documents']:,} documents of {lengths['0']:,} to {lengths['100']:,} tokens, median {lengths['50']:,}"
            lines.append(line)
        if meta.get("duplicates"):
            kept = "kept" if meta["settings"]["duplicates"] == "keep" else "left out"
            lines.append(f"{prefix}{meta['duplicates']:,} documents stand there more than once: {kept}")
    lines += [f"rows  {line}" for line in batches.accounts()]
    full = [s for s in batches.train_sets if isinstance(s, Documents)]
    if not full:
        lines.append(f"windows of {batches.data.seq_len} tokens, {len(batches.train):,} of them")
    return lines

"""Measurements of the data side: reading batches, and preparation against the tokenizers library called directly."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from etude import config as conf
from etude.data.base import Maker
from etude.data.journal import Workers
from etude.data.prepare import Preparation, Texts
from etude.data.source import Source
from etude.errors import Refusal
from etude.parallel import cores
from etude.training import maker_of


def read_rate(session: Any, steps: int) -> float:
    """Batches a second that the loop would be given, if it did nothing with them."""
    stream = session.batches.steps(0, None)
    for _ in range(10):
        next(stream)
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return steps / (time.perf_counter() - start)


def prepare_rates(cfg: dict) -> dict[str, Any]:
    """MB of text a second that each part of a preparation does, in turn with the library on the same texts and cores: the
    trainer fed from a list, and `encode_batch_fast` of many texts at a time with the ids taken as arrays. The library has
    all texts and ids in memory, the preparation only what it works on, and ends with a file."""
    data, maker, n = conf.build(cfg["data"]), maker_of(cfg["tokenizer"]), cores()
    if not hasattr(data, "source"):
        raise Refusal("what=prepare needs files: use data=text data.path=<files>")
    cache = Path(cfg["cache_dir"]).expanduser()
    rounds = [_round(data.source(cache), maker, n) for _ in range(cfg["rounds"])]
    size = rounds[0]["size"]
    median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0] if k != "size"}
    ratio = lambda part: statistics.median(r[f"library_{part}"] / r[part] for r in rounds)  # noqa: E731
    return {
        "text_mb": size,
        "processes": n,
        **{f"{k}_mb_per_s": size / v for k, v in median.items()},
        "train_ratio": ratio("train"),
        "encode_ratio": ratio("encode"),
    }


def _round(source: Source, maker: Maker, processes: int) -> dict[str, float]:
    """Seconds of each part, and `size`, the MB of text."""
    from tokenizers import Tokenizer as Backend

    with tempfile.TemporaryDirectory() as folder, Workers(processes) as workers:
        whole = Preparation(source, Path(folder) / "bench.h5", workers, maker.key)
        scan, _ = _timed(whole.scan)
        train, tokenizer = _timed(lambda: maker.make(Texts([whole], "train"), Texts([whole], None)))
        encode, _ = _timed(lambda: whole.encode(tokenizer))
        texts, own = list(whole.texts(None)), list(whole.texts("train"))
    backend = Backend.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True
    return {
        "scan": scan,
        "train": train,
        "encode": encode,
        "library_train": _timed(lambda: maker.make(own, texts))[0],
        "library_encode": _timed(lambda: _encode_all(backend, texts))[0],
        "size": sum(len(t.encode()) for t in texts) / 1e6,
    }


def _encode_all(backend: Any, texts: list[str]) -> list[np.ndarray]:
    batches = (backend.encode_batch_fast(texts[i : i + 1000]) for i in range(0, len(texts), 1000))
    return [np.array(e.ids, np.uint32) for batch in batches for e in batch]


def _timed(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result

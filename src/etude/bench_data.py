"""Measurements of the data side: reading batches, and preparation against the tokenizers library called directly."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from etude import config as conf
from etude.data.prepare import Preparation, Texts, Workers
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
    from tokenizers import Tokenizer as Backend

    data, maker, n = conf.build(cfg["data"]), maker_of(cfg["tokenizer"]), cores()
    if not hasattr(data, "source"):
        raise Refusal("what=prepare needs files: use data=text data.path=<files>")
    cache = Path(cfg["cache_dir"]).expanduser()
    rounds: list[dict[str, float]] = []
    for _ in range(cfg["rounds"]):
        with tempfile.TemporaryDirectory() as folder, Workers(n) as workers:
            whole = Preparation(data.source(cache), Path(folder) / "bench.h5", workers, maker.key)
            taken = {"scan": _timed(whole.scan)[0]}
            taken["train"], tokenizer = _timed(lambda: maker.make(Texts([whole], "train"), Texts([whole], None)))
            taken["encode"] = _timed(lambda: whole.encode(tokenizer))[0]
            texts = list(whole.texts(None))
            size = sum(len(t.encode()) for t in texts) / 1e6
            backend = Backend.from_str(tokenizer.to_json())
            backend.encode_special_tokens = True
            taken["library_train"] = _timed(lambda: maker.make(list(whole.texts("train")), texts))[0]
            taken["library_encode"] = _timed(lambda: _encode_all(backend, texts))[0]
            rounds.append(taken)
    median = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
    ratio = lambda part: statistics.median(r[f"library_{part}"] / r[part] for r in rounds)  # noqa: E731
    return {
        "text_mb": size,
        "processes": n,
        **{f"{k}_mb_per_s": size / v for k, v in median.items()},
        "train_ratio": ratio("train"),
        "encode_ratio": ratio("encode"),
    }


def _encode_all(backend: Any, texts: list[str]) -> list[np.ndarray]:
    batches = (backend.encode_batch_fast(texts[i : i + 1000]) for i in range(0, len(texts), 1000))
    return [np.array(e.ids, np.uint32) for batch in batches for e in batch]


def _timed(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result

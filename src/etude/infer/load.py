"""An engine from a checkpoint or export, by what lies in its folder alone."""

from typing import Any

from etude import checkpoint, config
from etude.infer.engine import InferenceEngine
from etude.model import weights
from etude.text import tokenizer as tok


def load(
    path: str, device: str, dtype: str, trusted: list[str], settings: dict[str, Any], context: int | None = None
) -> InferenceEngine:
    """The engine of a run, checkpoint or export; `settings` are a config node, `context` as InferenceEngine's, 0: what the
    model was made for. Targets outside `trusted` are refused before anything is imported."""
    folder = checkpoint.find(path)
    model = weights.from_pretrained(folder, device, weights.DTYPES[dtype], trusted)
    context = model.max_len if context == 0 else context
    return InferenceEngine(model, tok.load(folder), config.build(settings), context)

"""What muP multiplies by while it computes, written into the weights: other programs' models have no such factors."""

import torch

from etude.config import build


def factors(node: dict) -> dict[str, float]:
    """For a model's node: what some of its parameters are to be multiplied by, by name, so that the model with mup=false
    computes the same. The last norm takes the head's factor, the queries (or their norm) that of the scores."""
    if not node.get("mup"):
        return {}
    with torch.device("meta"):
        ours, plain = build(node, 1), build(node | {"mup": False}, 1)
    found = {f"norm.{name}": ours.output_scale for name, _ in ours.norm.named_parameters()}
    for i, (mine, its) in enumerate(zip(ours.attentions(), plain.attentions())):
        where = "q" if getattr(mine, "q_norm", None) is None else "q_norm"
        for name, _ in getattr(mine, where).named_parameters():
            found[f"blocks.{i}.attn.{where}.{name}"] = mine.scale / its.scale
    return found

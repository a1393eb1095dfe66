"""From logits to the next token. Random numbers are keyed by (seed, choice, position), so what a row draws depends
neither on its neighbours in the batch nor on how often it was interrupted."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from etude.data.order import mix
from etude.errors import NonFinite, Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; conf/generate.yaml explains each. Raises Refusal for values out of range."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "at least 0 (0: greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1: none)"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise Refusal(f"{name}={getattr(self, name)} should be {wanted}")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (Keskar et al. 2019): logits (B, V) of tokens in seen (B, V) bool are divided by `penalty` if
    positive and multiplied by it if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """logits (B, V) -> (probabilities (B, K) fp64, not normalised; token ids (B, K), None where K is V in order).

    Temperature, then top-k, then top-p of what is left (Holtzman et al. 2020), then min-p (Nguyen et al. 2024)."""
    logits = logits / sampling.temperature
    ids = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = torch.softmax(logits.double(), dim=-1)
    if sampling.top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    if sampling.min_p is not None:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0.0)
    return p, ids


def draw(logits: Tensor, sampling: Sampling, choices: list[int], positions: list[int]) -> Tensor:
    """logits (B, V) -> tokens (B,). Row b is choice choices[b] of its prompt, at its new token number positions[b].
    Raises NonFinite if a logit is NaN."""
    best, likeliest = logits.max(-1)
    if best.isnan().any():  # max takes a NaN for the largest
        raise NonFinite("the model's logits are NaN: its weights are damaged or overflow in this dtype; try dtype=fp32")
    if sampling.temperature == 0:
        return likeliest
    p, ids = distribution(logits, sampling)
    keys = mix(sampling.seed, np.array(choices), np.array(positions))
    u = torch.from_numpy((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(p.device)
    cumulative = p.cumsum(-1)
    at = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)
    # A filtered token has probability 0 and is never the first beyond u; rounding can only overrun the end.
    last = p.shape[-1] - 1 - (p > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    at = torch.minimum(at, last)
    return (at if ids is None else ids.gather(-1, at))[:, 0]

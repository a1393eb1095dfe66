"""Next-token prediction."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from etude.model.head import Scores

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count): sums over micro-batches and ranks, then divided


class Seq:
    """Cross-entropy of every target, with label smoothing e: (1-e) NLL + e mean_v(-log p_v) (Szegedy et al. 2016), and
    z-loss: weight * logsumexp(z)^2 (Chowdhery et al. 2022). With `dft` each target's loss is weighted by the probability
    that it has, which carries no gradient (Wu et al. 2025): what a model finds unlikely pulls less. `neftune` is the
    size of the noise on the embeddings in training."""

    kinds = ("text", "chats")
    needs_reference = False

    def __init__(self, *, label_smoothing: float, z_loss: float, dft: bool = False, neftune: float = 0.0):
        self.check(label_smoothing, z_loss, dft, neftune)
        self.label_smoothing, self.z_loss, self.dft, self.neftune = label_smoothing, z_loss, dft, neftune

    @staticmethod
    def check(label_smoothing: float, z_loss: float, dft: bool, neftune: float) -> None:
        """Raises ValueError for settings that do not fit together; config.py runs it before torch is imported."""
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={label_smoothing} should be at least 0 and below 1; set strategy.label_smoothing"
            )
        for name, value in (("z_loss", z_loss), ("neftune", neftune)):
            if not 0 <= value < 1e9:
                raise ValueError(f"strategy.{name}={value} should be at least 0 (0: none)")
        if dft and label_smoothing:
            raise ValueError(
                f"strategy.dft=true weights the target's own loss, and label_smoothing={label_smoothing} is of all tokens: set one of them to 0"
            )

    def collect(self, model: nn.Module, batches: list[dict], seeds: list[int], world: Any) -> list[dict]:
        return batches

    def weight(self, batch: dict[str, Tensor]) -> int:
        """How many targets the batch has: what the loss's sum is divided by, over the whole step."""
        return int((batch["targets"] >= 0).sum())

    def loss(self, model: nn.Module, ref: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """-> the summed loss over the batch's targets, and metrics as (sum, count)."""
        tokens, targets, doc_ids = batch["tokens"], batch["targets"], batch.get("doc_ids")
        with noisy(model, tokens, doc_ids, self.neftune):
            scores, aux = model(tokens, targets=targets, doc_ids=doc_ids)
        n = (targets >= 0).sum()
        loss = self.total(scores)
        metrics = {
            "loss": (loss.detach(), n),
            "nll": (-scores.logprob.detach().sum(), n),
            "entropy": (scores.entropy.sum(), n),
            "accuracy": (scores.correct.sum(), n),
        }
        if aux is not None:
            mask = targets >= 0
            loss = loss + (aux.loss * mask).sum()
            metrics |= aux.metrics(mask)
        return loss, metrics

    def total(self, scores: Scores) -> Tensor:
        """What is minimised, summed: of an ignored target every score is 0."""
        each = scores.logprob
        loss = -(each.detach().exp() * each if self.dft else each).sum()
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * scores.mean_logprob.sum()
        if self.z_loss:
            loss = loss + self.z_loss * scores.logz.square().sum()
        return loss


@contextlib.contextmanager
def noisy(model: Any, tokens: Tensor, doc_ids: Tensor | None, alpha: float) -> Iterator[None]:
    """Within it, in training, the model's embeddings of `tokens` (B, T) have noise added: uniform in [-1, 1] times
    alpha / sqrt(L D), L being the length of the token's document (NEFTune, Jain et al. 2023). Not of the row, as elsewhere:
    so a document has the same noise however it is packed or padded. It is torch's generator that draws."""
    if not alpha or not model.training:
        yield
        return
    embed = getattr(model, "module", model).embed
    length = lengths(tokens, doc_ids)[..., None]

    def add(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        return x + torch.empty_like(x).uniform_(-alpha, alpha) * (length * x.shape[-1]).rsqrt().to(x.dtype)

    hook = embed.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def lengths(tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
    """How many tokens the document of each token has: (B, T)."""
    if doc_ids is None:
        return torch.full_like(tokens, tokens.shape[1])
    runs = doc_ids.clone()
    runs[:, 1:] = (doc_ids[:, 1:] != doc_ids[:, :-1]).cumsum(1)
    runs[:, 0] = 0
    number = runs + torch.arange(len(runs), device=runs.device)[:, None] * runs.shape[1]
    return number.flatten().bincount()[number]

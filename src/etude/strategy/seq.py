"""Next-token prediction."""

from torch import Tensor, nn

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count): sums over micro-batches and ranks, then divided


class Seq:
    """Cross-entropy of every target, with label smoothing e: (1-e) NLL + e mean_v(-log p_v) (Szegedy et al. 2016), and
    z-loss: weight * logsumexp(z)^2 (Chowdhery et al. 2022)."""

    kinds = ("text", "chats")
    needs_reference = False

    def __init__(self, *, label_smoothing: float, z_loss: float):
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={label_smoothing} should be at least 0 and below 1; set strategy.label_smoothing"
            )
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def collect(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def weight(self, batch: dict[str, Tensor]) -> int:
        """How many targets the batch has: what the loss's sum is divided by, over the whole step."""
        return int((batch["targets"] >= 0).sum())

    def loss(self, model: nn.Module, ref: nn.Module | None, batch: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """-> the summed loss over the batch's targets, and metrics as (sum, count)."""
        scores, aux = model(batch["tokens"], targets=batch["targets"], doc_ids=batch.get("doc_ids"))
        n = (batch["targets"] >= 0).sum()
        nll = -scores.logprob.sum()
        loss = nll
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * nll - self.label_smoothing * scores.mean_logprob.sum()
        if self.z_loss:
            loss = loss + self.z_loss * scores.logz.square().sum()
        metrics = {"loss": (loss.detach(), n), "nll": (nll.detach(), n), "entropy": (scores.entropy.sum(), n)}
        if aux is not None:
            mask = batch["targets"] >= 0
            loss = loss + (aux.loss * mask).sum()
            metrics |= aux.metrics(mask)
        return loss, metrics

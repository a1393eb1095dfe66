"""What each parameter is for: the one table that initialisation (Transformer.init_weights) and learning rates
(optim.adamw) go by, and where scaling by width would be put in (muP, Yang et al. 2022).

| role      | parameters                                         | drawn from                        | decay | rate               |
|-----------|----------------------------------------------------|-----------------------------------|-------|--------------------|
| embedding | tokens (and a head tied to them), learned positions | N(0, init_std)                    | yes   | lr_scale.embedding |
| hidden    | weights of linear layers, of experts, of routers    | N(0, init_std)                    | yes   | lr_scale.hidden    |
| residual  | those named `out`, which write into the residual    | N(0, init_std / sqrt(2 n_layers)) | yes   | lr_scale.residual  |
| head      | an untied head                                      | N(0, init_std)                    | yes   | lr_scale.head      |
| lora_A    | LoRA's first matrices, of low rank from the input   | U(+-1/sqrt(in)), by the layer     | yes   | lr_scale.lora_A    |
| lora_B    | and its second ones (LoRA+: lr_scale.lora_B=16)     | 0                                 | yes   | lr_scale.lora_B    |
| vector    | norms (1), biases (0), DoRA's lengths of rows        | constants                         | no    | lr_scale.vector    |

init_std null is 0.02 sqrt(768 / dim): GPT-2's 0.02 (Radford et al. 2019) at GPT-2's width, and the same size of activations
at others. A part with another need defines `init_weights(self)`, which is called after the table's rule; a parameter that
does not require a gradient is drawn but never trained by the optimizer."""

from torch import Tensor

ROLES = ("embedding", "hidden", "residual", "head", "lora_A", "lora_B", "vector")


def role(name: str, parameter: Tensor) -> str:
    """The row of the table for a parameter of a Transformer, by its dotted name."""
    parts = name.split(".")
    if parameter.dim() < 2:
        return "vector"
    if parts[-1] in ("lora_A", "lora_B"):
        return parts[-1]
    if parts[0] in ("embed", "pos_embed"):
        return "embedding"
    if parts[0] == "head":
        return "head"
    return "residual" if "out" in parts[-2:] else "hidden"


def init_std(role: str, std: float, n_layers: int) -> float:
    """Standard deviation of the table's normal distribution."""
    return std / (2 * n_layers) ** 0.5 if role == "residual" else std

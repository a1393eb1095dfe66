"""What each parameter is for: the one table that initialisation (Transformer.init_weights), learning rates and decay
(optim.adamw) go by, also where they change with the width (muP).

| role      | parameters                                         | drawn from                        | decay | rate               | muP: std, rate    |
|-----------|----------------------------------------------------|-----------------------------------|-------|--------------------|-------------------|
| embedding | tokens (and a head tied to them), learned positions | N(0, init_std)                    | yes   | lr_scale.embedding | 1, 1              |
| hidden    | weights of linear layers, of experts, of routers    | N(0, init_std)                    | yes   | lr_scale.hidden    | 1/sqrt(m)*, 1/m   |
| residual  | those named `out`, which write into the residual    | N(0, init_std / sqrt(2 n_layers)) | yes   | lr_scale.residual  | 1/sqrt(m)*, 1/m   |
| head      | an untied head                                      | N(0, init_std)                    | yes   | lr_scale.head      | 1, 1              |
| lora_A    | LoRA's first matrices, of low rank from the input   | U(+-1/sqrt(in)), by the layer     | yes   | lr_scale.lora_A    | 1, 1/m            |
| lora_B    | and its second ones (LoRA+: lr_scale.lora_B=16)     | 0                                 | yes   | lr_scale.lora_B    | 1, 1              |
| vector    | norms (1), biases (0), DoRA's lengths of rows        | constants                         | no    | lr_scale.vector    | 1, 1              |

init_std null is 0.02 sqrt(768 / dim): GPT-2's 0.02 (Radford et al. 2019) at GPT-2's width, and the same size of activations
at others. A part with another need defines `init_weights(self)`, which is called after the table's rule; a parameter that
does not require a gradient is drawn but never trained by the optimizer.

The last column is the maximal update parametrisation for Adam (Yang et al. 2022, table 8), with model.mup=true: m is how many
times as many inputs a matrix has as its namesake in the base model, and init_std null takes the base model's dim. *1/m where
the outputs are as many as the base's (a router's), as for any layer from the width to a fixed number. The head has its part as a
factor on its input (Transformer.outgoing). Rate times decay, which is what AdamW takes from a weight in a step, stays as in the base
model (as in the authors' package `mup`): weights are forgotten as fast at every width. An adapter's rates are those of LoRA+ (Hayou
et al. 2024)."""

from collections.abc import Mapping

import torch
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


def wider(name: str, parameter: Tensor, base: Mapping[str, torch.Size]) -> tuple[float, float]:
    """How many times as many inputs and outputs a matrix (..., out, in) has as its namesake in `base`, the shapes of muP's base
    model; 1 where muP changes nothing, and without a base."""
    shape = base.get(name.replace(".lora_A", ".weight"))
    if shape is None or role(name, parameter) not in ("hidden", "residual", "lora_A"):
        return 1.0, 1.0
    return parameter.shape[-1] / shape[-1], parameter.shape[-2] / shape[-2]


def init_std(role: str, std: float, n_layers: int, inputs: float = 1.0, outputs: float = 1.0) -> float:
    """Standard deviation of the table's normal distribution, for a matrix so many times wider than the base model's."""
    std = std / (inputs if outputs == 1 else inputs**0.5)
    return std / (2 * n_layers) ** 0.5 if role == "residual" else std

"""LoRA and DoRA: small matrices beside frozen linear layers are all that is trained (the layer: model/adapted.py)."""

import copy
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import Refusal
from etude.interop import architectures, fold
from etude.interop.architectures import Entry
from etude.model import adapted, weights
from etude.model.adapted import Adapted
from etude.model.moe import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """conf/lora/true.yaml says what each does."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    dora: bool
    rslora: bool

    def __post_init__(self) -> None:
        self.check(self.rank, self.alpha, self.dropout, self.targets)

    @staticmethod
    def check(rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        if rank < 1:
            raise ValueError(f"lora.rank={rank} should be at least 1")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"lora.alpha={alpha} should be above 0: what is learned is multiplied by alpha / rank")
        if not 0 <= dropout < 1:
            raise ValueError(f"lora.dropout={dropout} should be at least 0 and below 1")
        if not targets or not all(isinstance(t, str) and t for t in targets):
            raise ValueError(
                f"lora.targets={targets} should be patterns for names of linear layers: lora.targets=[blocks.*] is all of them"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by; rsLoRA's (Kalajdzievski 2023) lets high ranks learn as fast as low ones."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def apply(self, model: nn.Module) -> int:
        """Give the model adapters and freeze all else, in place; -> how many layers have one. The model's weights are to be
        there already: DoRA measures them. Raises Refusal for a target that no linear layer has."""
        if adapted.layers(model):
            raise Refusal("the model has adapters already: merge them first")
        chosen = self.chosen(model)
        for p in model.parameters():
            p.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, MoE):
                module.bias_rate = None  # `balance` would move what no adapter's file holds
        for layer in chosen.values():
            Adapted.turn(layer, rank=self.rank, scale=self.scale, dropout=self.dropout, dora=self.dora)
        return len(chosen)

    @torch.no_grad()
    def join(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Merge an adapter's tensors into the weights of a plain model, in place. Raises Refusal where they do not fit."""
        layers = self.chosen(model)
        sizes = {name: adapted.shapes(layer, self.rank, self.dora) for name, layer in layers.items()}
        _check_fit({f"{name}.{part}": size for name in sizes for part, size in sizes[name].items()}, tensors)
        for name, layer in layers.items():
            a, b, magnitude = (tensors.get(f"{name}.{part}") for part in adapted.NAMES)
            assert a is not None and b is not None
            layer.weight.copy_(adapted.merged_weight(layer.weight, a, b, magnitude, self.scale))

    def chosen(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers that the targets name."""
        there = adaptable(model)
        names: set[str] = set()
        for pattern in self.targets:
            if not (found := fnmatch.filter(there, pattern)):
                raise Refusal(
                    f"lora.targets: {pattern} names no linear layer that can have an adapter{_instead(model, pattern)}; there is: {', '.join(_kinds(there))}"
                )
            names.update(found)
        return {name: layer for name, layer in there.items() if name in names}


def adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can have an adapter, by name: not the head nor routers, whose matrices are read and not
    called, and not experts, whose matrices lie in one tensor."""
    read = {id(m.router) for m in model.modules() if isinstance(m, MoE)} | {id(getattr(model, "head", None))}
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and id(m) not in read}


def _kinds(names: Iterable[str]) -> list[str]:
    """Names of layers with a star for their number, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _instead(model: nn.Module, pattern: str) -> str:
    """What a pattern names that can have no adapter, to be told."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    if stacked := next((n for n in fnmatch.filter(parameters, pattern) if parameters[n].dim() > 2), None):
        return f" ({stacked} holds the matrices of all experts in one tensor)"
    found = [n for n in fnmatch.filter(modules, pattern) if n]
    first = next((n for n in found if isinstance(modules[n], nn.Linear)), found[0] if found else None)
    if first is None:
        return ""
    read = {"head": "the head", "router": "a router"}
    return f" ({first} is {read.get(first.rpartition('.')[2], f'a {type(modules[first]).__name__}')})"


class Base:
    """The policy without its adapters, called as the policy is: the reference that a LoRA run has for free. No gradients,
    no dropout. `module` is the policy's own model: what is laid over a reference (grpo.tempered) is laid over that."""

    def __init__(self, model: Any):
        self.module = getattr(model, "module", model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), adapted.disabled(self.module):
                return self.module(*args, **kwargs)
        finally:
            self.module.train(training)


# ---------------------------------------------------------------- state


def trainable(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name."""
    return {name: t for name, t in weights.model_tensors(model).items() if adapted.is_adapter(name)}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All other parameters by name: those of the plain model that was adapted."""
    return {name: t for name, t in weights.model_tensors(model).items() if not adapted.is_adapter(name)}


@torch.no_grad()
def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors into a model that has adapters. Raises Refusal if names or shapes differ."""
    ours = {name: p for name, p in model.named_parameters() if adapted.is_adapter(name)}
    _check_fit({name: tuple(p.shape) for name, p in ours.items()}, tensors)
    for name, p in ours.items():
        p.copy_(tensors[name])


def _check_fit(sizes: dict[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    if wrong := sorted(sizes.keys() ^ tensors.keys()):
        where = "the model" if wrong[0] in sizes else "the file"
        raise Refusal(f"the adapter does not fit lora.targets and lora.dora: {wrong[0]} is only in {where}")
    for name, size in sizes.items():
        if tensors[name].shape != size:
            raise Refusal(
                f"the adapter does not fit lora.rank or the model: {name} is {tuple(tensors[name].shape)} in the file and should be {size}"
            )


def merged(model: Any) -> Any:
    """A plain model with the merged weights, in evaluation mode. What was not adapted is the model's own storage; the model
    stays as it is."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    adapted.merge(twin)
    return twin


# ---------------------------------------------------------------- PEFT's files


def peft_files(
    model: Any,
    tensors: Mapping[str, Tensor],
    node: dict[str, Any],
    *,
    base: str | None = None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """An adapter of `model`, plain or adapted, with the settings `node`, as the files that peft.PeftModel.from_pretrained
    reads, on top of what convert.py makes of the base model: {"adapter_model.safetensors": tensors,
    "adapter_config.json": dict}. `base` is where that base model will be found; `architecture` is preferred where several
    fit the model. Raises Refusal for a model that no Hugging Face architecture has, and for what PEFT would misread.

    Where several layers of ours are one of theirs (GPT-2's q, k and v), their adapters become one of a higher rank with
    the same product."""
    arch, _ = architectures.write(model.node, architecture)
    sparse = model.node["ffn"].get("sparse", model.node["ffn"])
    parameters = {n: p for n, p in model.named_parameters() if not adapted.is_adapter(n)}
    entries = list(arch.entries(arch.names, list(parameters), sparse.get("n_experts", 0)))
    factors = fold.factors(model.node)  # what convert.py multiplies a row of W by, it must multiply B's and m's by
    factor = lambda layer, part: 1.0 if part == "lora_A" else factors.get(f"{layer}.weight", 1.0)  # noqa: E731
    tensors = {n: t * factor(*n.rsplit(".", 1)) for n, t in tensors.items()}
    rank, dora, rslora = node["rank"], node["dora"], node["rslora"]
    made: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    done: dict[str, bool] = {}  # their modules, and whether their matrix is (in, out)
    for entry in entries:
        layers = [name.removesuffix(".weight") for name in entry.ours]
        if not (some := [name for name in layers if f"{name}.lora_A" in tensors]):
            continue
        theirs = entry.theirs[0].removesuffix(".weight")
        done[theirs] = entry.unpack([torch.empty(1, 2) for _ in layers])[0].shape[0] == 2
        if len(some) > 1:
            ranks[theirs] = len(some) * rank
        b = _diagonal([tensors.get(f"{n}.lora_B", torch.empty(len(parameters[f"{n}.weight"]), 0)) for n in layers])
        parts = {"lora_A.weight": torch.cat([tensors[f"{n}.lora_A"] for n in some]), "lora_B.weight": b}
        if dora:
            rows = [
                tensors[f"{n}.lora_magnitude"] if n in some else _rows(parameters[f"{n}.weight"]) * factor(n, "")
                for n in layers
            ]
            parts["lora_magnitude_vector"] = torch.cat(rows)
        made |= {f"base_model.model.{theirs}.{name}": t.contiguous() for name, t in parts.items()}
    experts = {_last(n.removesuffix(".weight")) for entry in entries if len(entry.theirs) > 1 for n in entry.theirs}
    if misread := [n for n in done if _last(n) in experts]:
        raise Refusal(
            f"an adapter of {misread[0]} cannot be a file of PEFT, which takes that for one of the {arch.model_type}'s experts; lora.targets=[*.attn.*] can"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": node["alpha"],
        "lora_dropout": node["dropout"],
        "target_modules": _suffixes(done, entries),
        "rank_pattern": ranks,
        "alpha_pattern": {n: node["alpha"] * (r / rank) ** (0.5 if rslora else 1) for n, r in ranks.items()},
        "use_dora": dora,
        "use_rslora": rslora,
        "fan_in_fan_out": any(done.values()),
        "bias": "none",
        "inference_mode": True,
    }
    return {"adapter_model.safetensors": made, "adapter_config.json": config}


def _diagonal(parts: list[Tensor]) -> Tensor:
    """Matrices (out_i, r_i) -> (sum of out_i, sum of r_i), zero elsewhere."""
    whole = torch.zeros(sum(len(t) for t in parts), sum(t.shape[1] for t in parts))
    row = column = 0
    for t in parts:
        whole[row : row + len(t), column : column + t.shape[1]] = t
        row, column = row + len(t), column + t.shape[1]
    return whole


def _rows(weight: Tensor) -> Tensor:
    """The lengths of a matrix's rows: the magnitude of a layer without an adapter."""
    return torch.linalg.vector_norm(weight.detach().float(), dim=1).cpu()


def _suffixes(done: Iterable[str], entries: list[Entry]) -> list[str]:
    """What PEFT's target_modules names: last parts of names where all modules of that name have an adapter, whole names
    of others."""
    there = {n.removesuffix(".weight") for e in entries for n in e.theirs if n.endswith(".weight")}
    partly = {_last(name) for name in there - set(done)}
    return sorted({name if _last(name) in partly else _last(name) for name in done})


def _last(name: str) -> str:
    return name.rpartition(".")[2]

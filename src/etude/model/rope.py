"""Rotary positions (Su et al. 2021) and the ways to stretch them over longer texts.

A `Rope` holds numbers only: `rope(x, positions, how)` is a pure function, and there is no buffer to repair after a
meta-device initialisation."""

import dataclasses
import functools
import math
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Channel pair i of `dim` turns by theta^(-2i/dim) radians a position.

    `dim` null turns all channels of a head, else the first `dim` (partial rotary). Layout "half" pairs channel i with
    i + dim/2 (Hugging Face's Llama), "interleaved" 2i with 2i + 1 (the paper, DeepSeek)."""

    theta: float
    dim: int | None
    layout: Literal["half", "interleaved"]

    @staticmethod
    def check(theta: float, dim: int | None) -> None:
        """Raises ValueError for settings out of range; config.py runs it before torch is imported."""
        if theta <= 0:
            raise ValueError(f"rope.theta={theta} should be above 0")
        if dim is not None and (dim < 2 or dim % 2):
            raise ValueError(f"rope.dim={dim} should be even and at least 2: RoPE turns pairs of channels")

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        """Radians a position of each pair of `dim` channels: (dim/2,) fp32."""
        return _powers(self.theta, dim, device)

    @property
    def magnitude(self) -> float:
        """What the turned channels of queries and keys are multiplied by."""
        return 1.0

    @property
    def score_scale(self) -> float:
        """What MLA's scores are multiplied by beyond 1/sqrt(d)."""
        return 1.0


def _powers(theta: float, dim: int, device: torch.device) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRope(Rope):
    """For texts `factor` times as long as those trained on; how, its subclasses say."""

    factor: float

    @staticmethod
    def check(theta: float, dim: int | None, factor: float) -> None:  # type: ignore[override]
        for name, value in (("theta", theta), ("factor", factor)):
            if value <= 0:
                raise ValueError(f"rope.{name}={value} should be above 0")
        if dim is not None and (dim < 4 or dim % 2):
            raise ValueError(
                f"rope.dim={dim} should be even and, to be scaled, at least 4: RoPE turns pairs of channels"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(ScaledRope):
    """Position interpolation (Chen et al. 2023): positions divided by `factor`."""

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        return _powers(self.theta, dim, device) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKRope(ScaledRope):
    """NTK-aware interpolation (bloc97, 2023): theta times factor^(dim / (dim - 2)), so that the slowest pair is
    stretched by `factor` and the fastest not at all. The factor is fixed: keys in a cache stay valid."""

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        return _powers(self.theta * self.factor ** (dim / (dim - 2)), dim, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(ScaledRope):
    """Llama 3.1's: pairs that turn fewer than `low_freq_factor` times in `original_max_len` positions are stretched by
    `factor`, those above `high_freq_factor` are left, in between it is interpolated."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        f = _powers(self.theta, dim, device)
        turns = self.original_max_len * f / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * f / self.factor + keep * f


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(ScaledRope):
    """YaRN (Peng et al. 2023): pairs that turn fewer than `beta_slow` times in `original_max_len` positions are stretched
    by `factor`, those above `beta_fast` are left, by a linear ramp over the pairs in between.

    The turned channels grow by `attention_factor`; null: 0.1 ln(factor) + 1, or with DeepSeek's two `mscale` the quotient
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1), whose denominator's square then scales MLA's
    scores."""

    original_max_len: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        f = _powers(self.theta, dim, device)

        def pair(turns: float) -> float:  # the pair that makes so many turns in the original length
            return dim * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = max(math.floor(pair(self.beta_fast)), 0), min(math.ceil(pair(self.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / max(high - low, 0.001)
        stretched = ramp.clamp(0, 1)
        return f / self.factor * stretched + f * (1 - stretched)

    def _grow(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grow(self.mscale) / self._grow(self.mscale_all_dim)
        return self._grow(1.0)

    @property
    def score_scale(self) -> float:
        return self._grow(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def angles(positions: Tensor | int, how: Rope, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos (..., T, dim) and sin with the sign of the channel they meet, fp32, for positions (B, T) or the number T of them
    from 0 on."""
    if isinstance(positions, int):
        turned = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * how.frequencies(dim, device)
    else:
        turned = positions[:, None, :, None] * how.frequencies(dim, device)
    cos, sin = turned.cos() * how.magnitude, turned.sin() * how.magnitude
    if how.layout == "half":
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


@functools.lru_cache(maxsize=8)
def _memoised(positions: Tensor | int, how: Rope, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, by the identity of `positions`: the layers of a model ask for the same ones. What is made under
    inference_mode could not be saved for a later backward."""
    with torch.inference_mode(not isinstance(positions, int) and positions.is_inference()):
        return angles(positions, how, dim, device)


def rope(x: Tensor, positions: Tensor | None, how: Rope) -> Tensor:
    """Turn the first `how.dim` channels. x (B, H, T, D), positions (B, T) or None for 0..T-1 -> like x."""
    T, D = x.shape[-2:]
    dim = how.dim or D
    if dim < D:
        return torch.cat((rope(x[..., :dim], positions, how), x[..., dim:]), -1)
    made = angles if torch.compiler.is_compiling() else _memoised
    cos, sin = made(T if positions is None else positions, how, dim, x.device)
    y = x if x.dtype == torch.float32 else x.float()
    other = y.roll(dim // 2, -1) if how.layout == "half" else y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    y = torch.addcmul(y * cos, other, sin)
    return y if x.dtype == torch.float32 else y.to(x.dtype)

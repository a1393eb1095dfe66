"""The key-value cache: what attention needs of earlier positions, kept so that each token is computed once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.model.attention import attend, sdpa


class KVCache:
    """Keys and values of B rows of up to `capacity` positions, one contiguous block a layer, (B, H_kv, capacity, D).

    Rows may have different lengths. A forward writes row b's T new tokens at `positions[b]`; afterwards `extend`
    counts them in. Entries beyond a row's length are never looked at: padding needs no care. `shapes` gives each layer's (key heads,
    key channels, value channels)."""

    def __init__(
        self, shapes: list[tuple[int, int, int]], batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.layers = [_Layer(self, shape, batch, capacity, dtype, device) for shape in shapes]
        self._same: int | None = 0  # the length of all rows, where it is the same

    def __getitem__(self, layer: int) -> "_Layer":
        return self.layers[layer]

    def positions(self, T: int) -> Tensor:
        """Where the next T tokens of each row go: (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def extend(self, lengths: list[int]) -> None:
        """Row b now has lengths[b] positions."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        self._same = lengths[0] if len(set(lengths)) == 1 else None
        self._longest = max(lengths)


class _Layer:
    def __init__(
        self,
        owner: KVCache,
        shape: tuple[int, int, int],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        heads, k_dim, v_dim = shape
        self.owner = owner
        self.k = torch.zeros(batch, heads, capacity, k_dim, dtype=dtype, device=device)
        # A latent cache has no values of its own: they are the keys' first channels.
        self.v = torch.zeros(batch, heads, capacity, v_dim, dtype=dtype, device=device) if v_dim else self.k

    def attend(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float, window: int | None = None) -> Tensor:
        """Store k and v (B, H_kv, T, D) and let q (B, H, T, D) look at them and at all before, or at the last `window`
        positions -> (B, H, T, D_v). v None: the values are the keys."""
        same, T = self.owner._same, q.shape[2]
        if same is not None:
            self.k.narrow(2, same, T).copy_(k)
            if v is not None:
                self.v.narrow(2, same, T).copy_(v)
            if same == 0:
                return attend(q, k, k if v is None else v, None, scale, window)
            if T == 1:
                start = max(0, same + 1 - window) if window is not None else 0
                keys, values = self.k.narrow(2, start, same + 1 - start), self.v.narrow(2, start, same + 1 - start)
                return F.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            end = same + T
        else:
            where = self.owner.positions(T)
            rows = torch.arange(len(where), device=where.device)[:, None]
            self.k[rows, :, where] = k.transpose(1, 2)
            if v is not None:
                self.v[rows, :, where] = v.transpose(1, 2)
            end = self.owner._longest + T
        ahead = torch.arange(end, device=q.device) - self.owner.positions(T)[:, None, :, None]
        mask = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        return sdpa(q, self.k[:, :, :end], self.v[:, :, :end], mask, scale)

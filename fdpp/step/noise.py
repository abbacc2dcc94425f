"""The PyTorch twin of the kernels' counter-based noise: same bits, any device."""

from __future__ import annotations

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def mulhi(constant: int, x: Tensor) -> Tensor:
    """The high 32 bits of `constant * x` for 32-bit values held in int64, where the full product would overflow."""
    high, low = constant >> 16, constant & 0xFFFF
    return (high * x + ((low * x) >> 16)) >> 16


def philox_bits(seeds: Tensor, vocabulary: Tensor, positions: Tensor) -> Tensor:
    """First output (as int64 in [0, 2^32)) of Philox4x32-10 (Salmon et al., SC 2011), arguments broadcast together.

    Key: the 64 bits of `seeds`; counter: (`vocabulary`, `positions`, 0, 0).
    """
    key0, key1 = seeds & LOW, (seeds >> 32) & LOW
    c0, c1 = vocabulary & LOW, positions & LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        c0, c1, c2, c3 = (
            mulhi(ROUND_B, c2) ^ c1 ^ key0,
            (ROUND_B * c2) & LOW,
            mulhi(ROUND_A, c0) ^ c3 ^ key1,
            (ROUND_A * c0) & LOW,
        )
        key0, key1 = (key0 + KEY_A) & LOW, (key1 + KEY_B) & LOW
    return c0


def gumbel(seeds: Tensor, positions: Tensor, V: int, dtype: torch.dtype = torch.float32, first_id: int = 0) -> Tensor:
    """Gumbel noise `[n, V]` of the streams `seeds` `[n]` at `positions` `[n]` (both int64), from id `first_id` on."""
    vocabulary = torch.arange(first_id, first_id + V, device=seeds.device)
    u = (philox_bits(seeds[:, None], vocabulary[None], positions[:, None]).to(dtype) + 0.5) * 2.0**-32
    series = u * (1.0 + u * (0.5 + u / 3.0))
    return -torch.where(u < 0.001, series, -torch.log(1.0 - u.clamp(max=0.99999994))).log()

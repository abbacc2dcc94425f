"""The PyTorch twin of the kernels' counter-based noise: same bits, any device."""

from __future__ import annotations

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF

GROUP = 64
CHOICE, PLACE, RENOISE = 0, 1, 2
"""As in `fdpp.kernels.noise`."""


def mulhi(constant: int, x: Tensor) -> Tensor:
    """The high 32 bits of `constant * x`, both below 2^32 in int64: where it wraps around, its 64 bits are the same."""
    return ((constant * x) >> 32) & LOW


def philox(seeds: Tensor, number: Tensor, positions: Tensor, use: int = CHOICE) -> tuple[Tensor, ...]:
    """The four outputs (as int64 in [0, 2^32)) of Philox4x32-10 (Salmon et al., SC 2011), arguments broadcast together.

    Key: the 64 bits of `seeds`; counter: (`number`, `positions`, `use`, 0). Products wrap around, as in `mulhi`.
    """
    key0, key1 = seeds & LOW, (seeds >> 32) & LOW
    c0, c1 = number & LOW, positions & LOW
    c2, c3 = torch.full_like(c0, use), torch.zeros_like(c0)
    for _ in range(10):
        a, b = ROUND_A * c0, ROUND_B * c2
        c0, c1 = ((b >> 32) & LOW) ^ c1 ^ key0, b & LOW
        c2, c3 = ((a >> 32) & LOW) ^ c3 ^ key1, a & LOW
        key0, key1 = (key0 + KEY_A) & LOW, (key1 + KEY_B) & LOW
    return c0, c1, c2, c3


def uniform(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """In (0, 1]; 1 only by rounding."""
    return (bits.to(dtype) + 0.5) * 2.0**-32


def gumbel(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-log(E), E exponential, from random `bits`; see `fdpp.kernels.noise`."""
    u = uniform(bits, dtype)
    series = u * (1.0 + u * (0.5 + u / 3.0))
    return -torch.where(u < 0.001, series, -torch.log(1.0 - u.clamp(max=0.99999994))).log()


def group_gumbel(
    seeds: Tensor, positions: Tensor, groups: int, dtype: torch.dtype = torch.float32, first_group: int = 0
) -> Tensor:
    """The noise `[n, groups]`, from `first_group` on, of the streams `seeds` `[n]` at `positions` `[n]`."""
    first, skipped = divmod(first_group, 4)
    number = torch.arange(first, first + -(-(skipped + groups) // 4), device=seeds.device)
    bits = torch.stack(philox(seeds[:, None], number[None], positions[:, None]), dim=2).flatten(1)
    return gumbel(bits[:, skipped : skipped + groups], dtype)


def place(seeds: Tensor, positions: Tensor, groups: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where in its group each draw falls, uniform `[n]`; all arguments `[n]`."""
    return uniform(philox(seeds, groups, positions, PLACE)[0], dtype)


def renoise(seeds: Tensor, positions: Tensor, V: int) -> Tensor:
    """An id below `V`, uniform to within V / 2^32, for each of `positions`; int64 `[n]`, as all arguments."""
    return mulhi(V, philox(seeds, torch.zeros_like(positions), positions, RENOISE)[0])

"""The rules' device side: which prefixes of a sorted profile a rule accepts.

A predicate sees, for every position at once, the length `n` of the prefix that ends there, the cost `last` of that
position and the sum `total` of the first n costs, all float64. The cost is 1 - c (a rule ordered by confidence) or the
entropy in nats (one ordered by entropy). `p0` and `p1` are the rule's parameters. Only arithmetic and comparisons: the
same body runs on PyTorch tensors where there is no GPU.
"""

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)


@triton.jit
def quota(n, last, total, p0, p1):
    return n <= p0


@triton.jit
def threshold(n, last, total, p0, p1):
    return 1.0 - last >= p0


@triton.jit
def factor(n, last, total, p0, p1):
    return (n + 1) * last < p0


@triton.jit
def frechet(n, last, total, p0, p1):
    return 1.0 - total - last > p0


@triton.jit
def entropy_bound(n, last, total, p0, p1):
    return total - last <= p0

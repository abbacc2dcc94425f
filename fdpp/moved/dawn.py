"""What `fdpp.dawn` held: the rule, its operators, and its step for a loop of one's own."""

from __future__ import annotations

from torch import Tensor

from fdpp.attention import Probe
from fdpp.decoding.choice import everywhere
from fdpp.rules import Proposed
from fdpp.rules.dawn import Dawn, Dependencies, commit, dependency_edges
from fdpp.selection import Selection, candidates
from fdpp.step.operators import confidence as softmax_maximum
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms, pack

__all__ = ["Dawn", "Probe", "commit", "dependency_edges", "select", "softmax_maximum"]


__path__: list[str] = []
"""Makes this module a package, so that `fdpp.dawn.rule` and the others can be imported."""


def select(
    logits: Tensor,
    tokens: Tensor,
    *,
    rule: Dawn,
    mask_id: int,
    edges: Tensor,
    committed_confidence: Tensor,
    first: int,
    params: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """One denoising step of `rule` on a block; the fields are those of `fdpp.select`.

    Committed positions get a proposal too, since they may be anchors; so `nonfinite` counts them as well.

    Args:
        logits: `[b, T, V]` of the block, columns `first..first+T`.
        tokens: `[b, T]` int64.
        edges: int32 `[b, T, ceil(S / 32)]`.
        committed_confidence: `[b, S]` float32; the block's columns are taken from `logits` instead.
        params: `fdpp.step.terms.pack(rule)` on the device, made here if None.
        temperature, seeds: as in `fdpp.step.terms.Terms`.
    """
    params = pack(rule, logits.device) if params is None else params
    step = everywhere(prefix_step, logits, tokens, Terms(params, rule.key(), mask_id, temperature, seeds))
    memory, block = Dependencies(edges, committed_confidence), slice(first, first + tokens.shape[1])
    return rule.decide(Proposed(step, tokens, candidates(tokens, mask_id), mask_id, memory, block))

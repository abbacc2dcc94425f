"""The rule of DAWN (Luo et al., arXiv 2602.06953)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.attention.split_keys import visible
from fdpp.rules.dawn import reference
from fdpp.rules.dawn.decide import commit
from fdpp.rules.dawn.edges import dependency_edges, unpack_bits
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, whole
from fdpp.rules.threshold import threshold
from fdpp.selection import Selection, recommit


class Dependencies(NamedTuple):
    """What `Dawn` remembers.

    Attributes:
        edges: int32 `[b, D, T, ceil(L / 32)]`, the edges of the block's positions, see `dependency_edges`.
        anchors: `[b, D, L]` float32, the model's confidence at committed columns, 0 at masked and padding ones. Columns
            that are not fed keep that of the block's full forward.
    """

    edges: Tensor
    anchors: Tensor


@dataclass(frozen=True)
class Dawn(Rule):
    """Dependency-aware commits (DAWN, arXiv 2602.06953, sections 4.1 to 4.3), every sequence for itself.

    Of the masked positions, c their confidence, these commit:

    1. sure ones, c >= tau_high;
    2. induced ones, c >= tau_induce with an edge from an anchor, a committed position of confidence at least 0.9;
    3. of the others with c >= tau_low, those with no edge from a position that is both sure and induced, a greedy
       independent set: the most confident first (the lower position of equals), both directions of an edge conflict;
    4. if those are none, the most confident one.

    Clause 3 asks for "both sure and induced" as the published code does; sure positions that no anchor induced block
    nothing there.

    `fdpp.select` with it commits what `Threshold(tau_high)` does, its first clause, since it sees no attention.
    `generate` applies all of it.

    Attributes:
        tau_sink: mean incoming attention above which a key column is a sink. Uniform attention over fewer than
            1 / tau_sink columns makes every column one, as published.
        tau_edge: attention that makes an edge.
        layers: how many of the last layers are averaged; None: an eighth of them, at least 1 (4 of LLaDA-8B's 32).
    """

    tau_sink: float = number(0.01, "[0, 1]", "mean attention that makes a column a sink", unit="A")
    tau_edge: float = number(0.07, "(0, 1]", "attention that makes a dependency", unit="A")
    tau_induce: float = number(0.7, "(0, 1]", "confidence beside a committed token it depends on", line=True)
    tau_low: float = number(0.75, "(0, 1]", "confidence of tokens free of dependencies", line=True)
    tau_high: float = number(0.9, "(0, 1]", "confidence of tokens that commit in any case", line=True)
    layers: int | None = whole(None, 1, "how many of the last layers' attention counts (default: an eighth)")
    predicate: ClassVar = threshold
    needs: ClassVar = Needs(logits=True, block=True, fed=True, attention=True)
    name: ClassVar = "dawn"
    title: ClassVar = "DAWN"
    about: ClassVar = "those that do not depend on each other, by the model's attention"

    def params(self) -> tuple[float, float]:
        return float(self.tau_high), 0.0

    def label(self, steps: int | None = None) -> str:
        return f"{self.title} {self.tau_high:g}"

    def probed(self, n_layers: int) -> range:
        """The layers of an `n_layers` model whose attention counts; `ValueError` if it has fewer than `layers`."""
        count = max(n_layers // 8, 1) if self.layers is None else self.layers
        if count > n_layers:
            raise ValueError(f"Dawn: layers={self.layers}, but the model has {n_layers}")
        return range(n_layers - count, n_layers)

    def observe(self, sight: Sight, before: tuple[Tensor, Dependencies] | None) -> Dependencies:
        probe, (b, D, T) = sight.probe, sight.states.shape
        assert probe is not None and isinstance(sight.block, slice)
        mask = None if sight.padding is None else visible(sight.padding, sight.length)
        key_mask = mask if mask is None or probe.shared else mask.repeat_interleave(D, dim=0)
        edges = dependency_edges(
            probe.queries,
            probe.own,
            probe.shared,
            rule=self,
            start=probe.start,
            first=sight.block.start,
            T=T,
            key_mask=key_mask,
        ).unflatten(0, (b, D))
        if not sight.full:
            assert before is not None
            return Dependencies(edges, before[1].anchors.expand(-1, D, -1))
        anchors = sight.fed_confidence().masked_fill(sight.tokens == sight.mask_id, 0.0)
        return Dependencies(edges, anchors if mask is None else anchors.masked_fill(~mask[:, None], 0.0))

    def decide(self, proposed: Proposed) -> Selection:
        step, tokens, candidate, _, memory, block, *_ = proposed
        if memory is None:
            return step
        assert isinstance(block, slice)
        anchors = memory.anchors.clone()
        anchors[:, block] = step.confidence.masked_fill(candidate, 0.0)
        committed = commit(step.confidence, candidate, anchors, memory.edges, rule=self, first=block.start)
        return Selection(
            tokens=torch.where(committed, step.proposal, tokens),
            proposal=torch.where(candidate, step.proposal, tokens),
            confidence=step.confidence.masked_fill(~candidate, 0.0),
            committed=committed,
            remaining=(candidate & ~committed).sum(1, dtype=torch.int32),
            nonfinite=step.nonfinite,
        )

    def reference(self, proposed: Proposed) -> Selection:
        step, tokens, candidate, _, memory, block, *_ = proposed
        if memory is None:
            return step
        assert isinstance(block, slice)
        confidence = step.confidence.masked_fill(~candidate, 0.0)
        anchors = memory.anchors.double()
        anchors[:, block] = step.confidence.double().masked_fill(candidate, 0.0)
        E = unpack_bits(memory.edges, anchors.shape[1])
        committed = reference.commit(confidence, candidate, anchors, E, self, block.start)
        proposal = torch.where(candidate, step.proposal, tokens)
        return recommit(step._replace(proposal=proposal, confidence=confidence), tokens, candidate, committed)

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return 1.0 / (1.0 + residuals[-1]) >= self.tau_high

"""The model's forwards of a decode: which columns are fed, in what layout, and what is read off them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpp import dawn, klass
from fdpp.cache import BlockCache, tree_mask
from fdpp.dawn import Dawn
from fdpp.decoding.evidence import Evidence
from fdpp.klass import Klass
from fdpp.rules import Rule


class Forwards:
    """Runs a model over columns of a decode's sequences.

    Args:
        model: has `model(input_ids, attention_mask, position_ids, cache, start)`, `project(hidden)` and `config`.
        rule: what it asks for beyond the logits is read off too.
        sequences: `[B, L]` int64, shared with the block loop.
        attention_mask: `[B, L]` bool, False at padding; None without padding.
        mask_id: the mask's id.
        layout: of several branches in one forward, see `fdpp.cache.BlockCache`.
    """

    def __init__(
        self, model: Any, rule: Rule, sequences: Tensor, attention_mask: Tensor | None, mask_id: int, layout: str
    ) -> None:
        self.model, self.rule, self.mask_id, self.layout = model, rule, mask_id, layout
        self.sequences, self.attention_mask = sequences, attention_mask
        self.length = sequences.shape[1]
        self.position_ids = torch.arange(self.length, device=sequences.device).expand_as(sequences)
        if attention_mask is not None:
            self.position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.anchors = torch.zeros(sequences.shape, dtype=torch.float32, device=sequences.device)

    def evidence(
        self,
        rows: Tensor,
        states: Tensor,
        columns: slice,
        fed: slice,
        cache: BlockCache | None,
        before: Evidence | None,
    ) -> Evidence:
        """A forward over the columns `fed` of sequences `rows` `[b]`, the block `columns` holding `states` `[b, D, T]`.

        `before` is the evidence of the states before the first ones, None at a block's first forward. The head sees
        the block's positions alone, unless the rule asks how sure the model is of committed ones.
        """
        D, T = states.shape[1:]
        tokens = self.sequences[rows, fed][:, None].repeat(1, D, 1)
        offset = columns.start - fed.start
        tokens[:, :, offset : offset + T] = states
        if cache is not None:
            cache.branches = D
        probe = None
        if isinstance(self.rule, Dawn):
            layers = self.rule.probed(self.model.config.n_layers)
            probe = dawn.Probe(layers, cache, branches=D, layout=self.layout)
        hidden = self.hidden(rows, tokens, fed, probe or cache)
        evidence = Evidence(self.model.project(hidden[:, :, offset : offset + T]))
        if probe is not None:
            return self.with_dependencies(evidence, probe, rows, tokens, hidden, columns, fed)
        if isinstance(self.rule, Klass):
            stable = torch.zeros_like(states)
            if before is not None and before.stable is not None:
                stable = klass.stable_steps(evidence.logits, before.logits[:, 0], before.stable[:, 0], self.rule)
            return evidence._replace(stable=stable)
        return evidence

    def hidden(self, rows: Tensor, tokens: Tensor, fed: slice, cache: BlockCache | None) -> Tensor:
        """Hidden states `[b, D, n, d_model]` of `tokens` `[b, D, n]`, which stand in the columns `fed`."""
        b, D, n = tokens.shape
        positions = self.position_ids[rows, fed][:, None].expand(b, D, n)
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        tree = D > 1 and self.layout == "tree"
        if tree:
            sees = tree_mask(self.length, fed, D, tokens.device)
            if mask is not None:
                sees = sees & torch.cat((mask, mask[:, fed].repeat(1, D - 1)), dim=1)[:, None, :]
            mask = sees.expand(b, -1, -1)[:, None]
        elif mask is not None:
            mask = mask.repeat_interleave(D, dim=0)
        together = (1, 2) if tree else (0, 1)
        hidden = self.model.model(
            tokens.flatten(*together),
            attention_mask=mask,
            position_ids=positions.flatten(*together),
            cache=cache,
            start=fed.start,
        )
        return hidden.unflatten(together[0], (D, n) if tree else (b, D))

    def with_dependencies(
        self,
        evidence: Evidence,
        probe: dawn.Probe,
        rows: Tensor,
        tokens: Tensor,
        hidden: Tensor,
        columns: slice,
        fed: slice,
    ) -> Evidence:
        """`evidence` with the dependency graph of the `probe` and how sure the model is of committed columns."""
        assert isinstance(self.rule, Dawn)
        b, D, n = tokens.shape
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        key_mask = mask if mask is None or probe.shared else mask.repeat_interleave(D, dim=0)
        edges = probe.edges(self.rule, fed.start, columns.start, columns.stop - columns.start, key_mask)
        if n == self.length:
            sure = dawn.softmax_maximum(self.model.project(hidden).flatten(0, 1), self.mask_id).unflatten(0, (b, D))
            anchors = sure.masked_fill(tokens == self.mask_id, 0.0)
            if mask is not None:
                anchors = anchors.masked_fill(~mask[:, None], 0.0)
            self.anchors[rows] = anchors[:, 0]
        else:
            anchors = self.anchors[rows][:, None].expand(b, D, -1)
        return evidence._replace(edges=edges.unflatten(0, (b, D)), anchors=anchors)

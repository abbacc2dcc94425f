"""The model's forwards of a decode: in what layout columns are fed, and what is read off them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpp import dawn, klass
from fdpp.cache import BlockCache, tree_mask
from fdpp.dawn import Dawn
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.state import BlockState, Window
from fdpp.klass import Klass


class Forwards:
    """Runs a model over columns of a decode's sequences.

    Args:
        model: has `model(input_ids, attention_mask, position_ids, cache, start)`, `project(hidden)` and `config`.
        config: what its rule asks for beyond the logits is read off too; its `branches` are the layout of several
            states in one forward, see `fdpp.cache.BlockCache`.
    """

    def __init__(self, model: Any, config: DiffusionGenerationConfig) -> None:
        assert config.mask_token_id is not None
        self.model, self.rule, self.layout, self.mask_id = model, config.rule, config.branches, config.mask_token_id

    def __call__(
        self, state: BlockState, states: Tensor, window: Window, cache: BlockCache | None
    ) -> tuple[Evidence, Tensor | None]:
        """A forward with `states` `[b, D, T]` in the block: the evidence of each, and the state's new anchors.

        The head sees the block's positions alone, unless the rule asks how sure the model is of committed ones.
        """
        D = states.shape[1]
        tokens = state.sequences[:, window.fed][:, None].repeat(1, D, 1)
        tokens[:, :, window.inner] = states
        if cache is not None:
            cache.branches = D
        probe = None
        if isinstance(self.rule, Dawn):
            probe = dawn.Probe(self.rule.probed(self.model.config.n_layers), cache, branches=D, layout=self.layout)
        hidden = self.hidden(state, tokens, window, probe or cache)
        evidence = Evidence(self.model.project(hidden[:, :, window.inner]))
        if probe is not None:
            return self.with_dependencies(evidence, probe, state, tokens, hidden, window)
        if isinstance(self.rule, Klass):
            stable, before = torch.zeros_like(states), state.evidence
            if before is not None and before.stable is not None:
                stable = klass.stable_steps(evidence.logits, before.logits[:, 0], before.stable[:, 0], self.rule)
            evidence = evidence._replace(stable=stable)
        return evidence, state.anchors

    def hidden(self, state: BlockState, tokens: Tensor, window: Window, cache: BlockCache | None) -> Tensor:
        """Hidden states `[b, D, n, d_model]` of `tokens` `[b, D, n]`, which stand in the window's fed columns."""
        b, D, n = tokens.shape
        positions = state.position_ids[:, window.fed][:, None].expand(b, D, n)
        mask = state.attention_mask
        tree = D > 1 and self.layout == "tree"
        if tree:
            sees = tree_mask(state.sequences.shape[1], window.fed, n, D, tokens.device)
            if mask is not None:
                sees = sees & torch.cat((mask, mask[:, window.fed].repeat(1, D - 1)), dim=1)[:, None, :]
            mask = sees.expand(b, -1, -1)[:, None]
        elif mask is not None:
            mask = mask.repeat_interleave(D, dim=0)
        together = (1, 2) if tree else (0, 1)
        hidden = self.model.model(
            tokens.flatten(*together),
            attention_mask=mask,
            position_ids=positions.flatten(*together),
            cache=cache,
            start=window.start(),
        )
        return hidden.unflatten(together[0], (D, n) if tree else (b, D))

    def with_dependencies(
        self,
        evidence: Evidence,
        probe: dawn.Probe,
        state: BlockState,
        tokens: Tensor,
        hidden: Tensor,
        window: Window,
    ) -> tuple[Evidence, Tensor]:
        """`evidence` with the dependency graph of the `probe` and how sure the model is of committed columns."""
        assert isinstance(self.rule, Dawn) and isinstance(window.fed, slice) and state.anchors is not None
        b, D, _ = tokens.shape
        mask = state.attention_mask
        key_mask = mask if mask is None or probe.shared else mask.repeat_interleave(D, dim=0)
        T = evidence.logits.shape[2]
        edges = probe.edges(self.rule, window.fed.start, window.first, T, key_mask).unflatten(0, (b, D))
        if not window.full:
            return evidence._replace(edges=edges, anchors=state.anchors[:, None].expand(b, D, -1)), state.anchors
        sure = dawn.softmax_maximum(self.model.project(hidden).flatten(0, 1), self.mask_id).unflatten(0, (b, D))
        anchors = sure.masked_fill(tokens == self.mask_id, 0.0)
        if mask is not None:
            anchors = anchors.masked_fill(~mask[:, None], 0.0)
        return evidence._replace(edges=edges, anchors=anchors), anchors[:, 0]

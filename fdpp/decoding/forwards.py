"""The model's forwards of a decode: in what layout columns are fed, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdpp import dawn, klass
from fdpp.attention import visible
from fdpp.cache import BlockCache, seen
from fdpp.dawn import Dawn
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.guidance import guided, with_unconditional
from fdpp.decoding.head import head_of
from fdpp.decoding.shaping import processed, without
from fdpp.decoding.state import BlockState, Window
from fdpp.klass import Klass
from fdpp.ops import select_packed


class Forwards:
    """Runs a model over columns of a decode's sequences.

    Args:
        model: has `model(input_ids, attention_mask, position_ids, cache, start, wanted)`, `project(hidden)`, `config`.
        config: what its rule asks for beyond the logits is read off too; its `branches` are the layout of several
            states in one forward, see `fdpp.cache.BlockCache`.
        processor: changes the logits, see `fdpp.decoding.shaping.processed`.
    """

    def __init__(
        self, model: Any, config: DiffusionGenerationConfig, processor: Callable[..., Tensor] | None = None
    ) -> None:
        assert config.mask_token_id is not None
        self.processor, self.cfg_scale = processor, config.cfg_scale
        self.never = config.eos_ids if config.logits_eos_inf else ()
        self.model, self.rule, self.layout, self.mask_id = model, config.rule, config.branches, config.mask_token_id
        self.project, self.step = head_of(model, config.rule, config.head == "fused")
        by_id = processor is not None or bool(self.never or config.last_ids)
        if by_id:
            # Ids are columns of the whole vocabulary, not of a process's slice.
            self.project, self.step = model.project, select_packed
        plain = not by_id and config.passes == 1
        self.only_masked = (
            plain and self.step is select_packed and config.drafts == 1 and not isinstance(config.rule, Klass)
        )

    def __call__(
        self, state: BlockState, states: Tensor, window: Window, cache: BlockCache | None
    ) -> tuple[Evidence, Tensor | None]:
        """A forward with `states` `[b, D, T]` in the block: the evidence of each, and the state's new anchors.

        The head sees the block's positions alone, on a CPU the masked ones where nobody asks for more, and all that
        are fed where the rule asks how sure the model is of committed ones.
        """
        D = states.shape[1]
        tokens = state.sequences[:, window.fed][:, None].repeat(1, D, 1)
        tokens[:, :, window.inner] = states
        if cache is not None:
            cache.branches = D
            padding = state.padding if window.padding is None else window.padding
            cache.pad(0 if padding is None else padding, state.fillers)
        probe = None
        if isinstance(self.rule, Dawn):
            probe = dawn.Probe(self.rule.probed(self.model.config.n_layers), cache, branches=D, layout=self.layout)
        if probe is not None:
            hidden = self.hidden(state, tokens, window, probe, self.mask(state, window, D) if cache is None else None)
            logits = self.shaped(self.project(hidden[:, :, window.inner]), state, states, window)
            evidence = Evidence(logits)
            return self.with_dependencies(evidence, probe, state, tokens, hidden, window)
        fed = state
        if self.cfg_scale > 0.0:
            fed, tokens = with_unconditional(state, tokens, window, self.mask_id)
        mask = self.mask(fed, window, D) if cache is None else None
        hidden = self.hidden(fed, tokens, window, cache, mask, of_block=True)
        if self.only_masked and hidden.device.type == "cpu":
            return Evidence(self.project(hidden[states == self.mask_id])), state.anchors
        evidence = Evidence(self.shaped(self.project(hidden), state, states, window))
        if isinstance(self.rule, Klass):
            stable, before = torch.zeros_like(states), state.evidence
            if before is not None and before.stable is not None:
                stable = klass.stable_steps(evidence.logits, before.logits[:, 0], before.stable[:, 0], self.rule)
            evidence = evidence._replace(stable=stable)
        return evidence, state.anchors

    def shaped(self, logits: Tensor, state: BlockState, states: Tensor, window: Window) -> Tensor:
        """The logits `[b, D, T, V]` that decide, from the model's."""
        if self.cfg_scale > 0.0:
            logits = guided(logits, self.cfg_scale)
        if self.processor is not None:
            logits = processed(self.processor, logits, states, state.sequences[:, : window.first], self.mask_id)
        return without(logits, self.never) if self.never else logits

    def mask(self, state: BlockState, window: Window, D: int) -> Tensor | None:
        """What D states of every sequence may see without a cache, which would say it itself; None: everything."""
        n, tree = window.width(), self.layout == "tree"
        padding = state.padding if window.padding is None else None
        if padding is not None and not tree:
            padding = padding.repeat_interleave(D)
        return seen(padding, n, slice(0, n), n, D if tree else 1, state.sequences.device)

    def hidden(
        self,
        state: BlockState,
        tokens: Tensor,
        window: Window,
        cache: BlockCache | None,
        mask: Tensor | None,
        of_block: bool = False,
    ) -> Tensor:
        """Hidden states `[b, D, n, d_model]` of `tokens` `[b, D, n]`, which stand in the window's fed columns.

        With `of_block` only those of the block's columns, `[b, D, T, d_model]`. `mask` as the model takes it.
        """
        b, D, n = tokens.shape
        positions = state.position_ids[:, window.fed][:, None].expand(b, D, n)
        tree = D > 1 and self.layout == "tree"
        together = (1, 2) if tree else (0, 1)
        early = of_block and not tree and window.block_width() < n
        hidden = self.model.model(
            tokens.flatten(*together),
            attention_mask=mask,
            position_ids=positions.flatten(*together),
            cache=cache,
            start=window.start(),
            wanted=window.inner if early else None,
        ).unflatten(together[0], (D, n) if tree else (b, D))
        return hidden[:, :, window.inner] if of_block and not early else hidden

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
        mask = None if state.padding is None else visible(state.padding, state.sequences.shape[1])
        key_mask = mask if mask is None or probe.shared else mask.repeat_interleave(D, dim=0)
        T = evidence.logits.shape[2]
        edges = probe.edges(self.rule, window.fed.start, window.first, T, key_mask).unflatten(0, (b, D))
        if not window.full:
            return evidence._replace(edges=edges, anchors=state.anchors[:, None].expand(b, D, -1)), state.anchors
        sure = dawn.softmax_maximum(self.project(hidden).flatten(0, 1), self.mask_id).unflatten(0, (b, D))
        anchors = sure.masked_fill(tokens == self.mask_id, 0.0)
        if mask is not None:
            anchors = anchors.masked_fill(~mask[:, None], 0.0)
        return evidence._replace(edges=edges, anchors=anchors), anchors[:, 0]

"""The model's forwards of a decode: in what layout columns are fed, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.attention import Beside, BlockCache, Probe
from fdpp.attention.cache import end_of_block, indices, seen
from fdpp.decoding.contexts import contexts_of
from fdpp.decoding.embedded import embeddings
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.filters import Filters
from fdpp.decoding.guidance import guided, with_unconditional
from fdpp.decoding.head import head_of
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.shaping import processed, without
from fdpp.decoding.state import BlockState, Window, count
from fdpp.rules import Rows, Rule, Sight
from fdpp.step.operators import confidence, prefix_step


class Forwards:
    """Runs a model over columns of a decode's sequences.

    Args:
        model: the model.
        config: its rule says what is read off beside the logits; its `branches` are the layout of several states in
            one forward, see `fdpp.attention.BlockCache`.
        filters: change the logits by token.
        processor: change the logits as well, see `fdpp.decoding.shaping.processed`.
        grid: the length of blocks that see no later one; None: every column sees all.
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: DiffusionGenerationConfig,
        filters: Filters,
        processor: Iterable[Callable[..., Tensor]] | None = None,
        grid: int | None = None,
    ) -> None:
        assert config.mask_token_id is not None
        self.filters, self.grid = filters, grid
        self.processor, self.cfg_scale, self.passes = processor, config.cfg_scale, config.passes
        self.never = config.eos_ids if config.logits_eos_inf else ()
        self.model, self.rule, self.layout, self.mask_id = model, config.rule, config.branches, config.mask_token_id
        needs = config.rule.needs
        self.watches = type(config.rule).observe is not Rule.observe
        # Everything that is fed is read, not the block alone.
        self.reads_all = needs.attention or needs.fed or needs.rows
        self.project, self.step = head_of(model, config.rule, config.head == "fused")
        by_id = processor is not None or bool(self.never or config.last_ids)
        if by_id or filters.active:
            # Ids are columns of the whole vocabulary, not of a process's slice.
            self.project, self.step = model.project, prefix_step
        plain = not by_id and config.passes == 1 and not (needs.logits or needs.block or self.reads_all)
        self.only_masked = plain and self.step is prefix_step and config.drafts == 1

    def __call__(self, state: BlockState, states: Tensor, window: Window, cache: BlockCache | None) -> Evidence:
        """A forward with `states` `[b, D, T]` in the block, the first of which is `state`'s, and the evidence of each.

        The head sees the block's positions, and others only if the rule needs them. On a CPU it sees the masked ones
        alone, if nothing needs more.
        """
        D = states.shape[1]
        tokens = state.sequences[:, window.fed][:, None]
        if D > 1:
            tokens = tokens.repeat(1, D, 1)
            tokens[:, :, window.inner] = states
        if cache is not None:
            prepare(cache, state, window, D)
        needs, probe = self.rule.needs, None
        if needs.attention:
            layers = self.rule.probed(self.model.config.num_hidden_layers)
            probe = Probe(layers, cache, D, self.layout, *self.probed(window))
        fed, fed_tokens = state, tokens
        if self.cfg_scale > 0.0:
            fed, fed_tokens = with_unconditional(state, tokens, window, self.mask_id)
        mask = self.mask(fed, window, D) if cache is None else None
        if needs.rows:
            hidden, beside = self.with_rows(fed, fed_tokens, window, cache, mask)
        else:
            hidden, beside = self.hidden(fed, fed_tokens, window, probe or cache, mask, not self.reads_all), None
        of_block = aligned(hidden[:, :, window.read] if self.reads_all else hidden, fed, window)
        if self.only_masked and hidden.device.type == "cpu":
            return Evidence(self.filtered(self.project(of_block[states == self.mask_id]), state, states, window))
        if beside is None:
            logits, rows = self.project(of_block), None
        else:
            # One product, which reads the head's weight once.
            both = self.project(torch.cat((of_block, beside), dim=2))
            logits, rows = both.tensor_split((of_block.shape[2],), dim=2)
            rows = guided(rows, self.cfg_scale) if self.cfg_scale > 0.0 else rows
        logits = self.shaped(logits, state, states, window)
        if not self.watches:
            return Evidence(logits)
        sight = Sight(
            states=states,
            logits=logits,
            tokens=tokens,
            block=window.block,
            fed=window.fed,
            full=window.full,
            length=self.behind(window) or state.sequences.shape[1],
            padding=state.padding,
            mask_id=self.mask_id,
            rows=rows,
            probe=probe,
            fed_confidence=lambda: self.fed_confidence(hidden, fed, window),
        )
        return Evidence(logits, self.rule.observe(sight, state.evidence))

    def feed(self, state: BlockState, window: Window, cache: BlockCache) -> None:
        """Store the keys and values of the window alone."""
        prepare(cache, state, window)
        tokens = state.sequences[:, window.fed][:, None]
        fed = state
        if self.cfg_scale > 0.0:
            fed, tokens = with_unconditional(state, tokens, window, self.mask_id)
        self.hidden(fed, tokens, window._replace(read=slice(0, 1)), cache, None, True)

    def behind(self, window: Window) -> int | None:
        """The column behind the block of the grid that the window ends in; None: all columns are seen, or might be."""
        if self.grid is None or not isinstance(window.fed, slice):
            return None
        return end_of_block(window.fed.stop, self.grid)

    def probed(self, window: Window) -> tuple[int, int]:
        """The first fed column, and how many columns from there see less than the block does."""
        assert isinstance(window.fed, slice)
        start, behind = window.fed.start, self.behind(window)
        return start, 0 if behind is None or self.grid is None else max(behind - self.grid - start, 0)

    def filtered(self, logits: Tensor, state: BlockState, states: Tensor, window: Window) -> Tensor:
        """The `logits` of the masked positions alone, `[m, V]`, after the filters."""
        contexts = None
        if self.filters.needs_contexts:
            contexts = contexts_of(state, states, window, self.mask_id).at(states == self.mask_id)
        return self.filters.cut(self.filters.by_context(logits, contexts))

    def shaped(self, logits: Tensor, state: BlockState, states: Tensor, window: Window) -> Tensor:
        """The model's `logits` after guidance, filters, processors and `logits_eos_inf`, `[b, D, T, V]`."""
        if self.cfg_scale > 0.0:
            logits = guided(logits, self.cfg_scale)
        contexts = None
        if self.filters.needs_contexts or self.processor is not None:
            contexts = contexts_of(state, states, window, self.mask_id)
        logits = self.filters.by_context(logits, contexts)
        if self.processor is not None and contexts is not None:
            before = state.sequences[:, : window.block_start]
            logits = processed(self.processor, logits, states, before, contexts, self.mask_id)
        return self.filters.cut(without(logits, self.never) if self.never else logits)

    def fed_confidence(self, hidden: Tensor, state: BlockState, window: Window) -> Tensor:
        """The confidence that each fed position would have if it were masked: float32 `[b, D, n]`.

        `hidden` `[b, D, n, d_model]` is of the sequences in `state`.
        """
        if not self.rule.needs.fed:
            raise ValueError(f"{type(self.rule).__name__}: fed_confidence expected needs = Needs(fed=True, ...)")
        if self.model.shift:
            hidden = all_aligned(hidden, state, window)
        logits = self.project(hidden)
        if self.cfg_scale > 0.0:
            logits = guided(logits, self.cfg_scale)
        return confidence(logits.flatten(0, 1), self.mask_id).unflatten(0, logits.shape[:2])

    def mask(self, state: BlockState, window: Window, D: int) -> Tensor | None:
        """The attention mask of D states of every sequence without a cache, which has its own; None: no mask."""
        n, tree = window.width(), self.layout == "tree"
        padding = self.padding(state, window, 1 if tree else D)
        return seen(padding, n, slice(0, n), n, D if tree else 1, state.sequences.device, self.grid)

    def padding(self, state: BlockState, window: Window, D: int) -> Tensor | None:
        """How many of the columns fed without a cache hold no token, int64 `[b * D]`; None: all hold one."""
        padding = state.padding if window.padding is None else None
        if padding is not None and isinstance(window.fed, slice) and window.fed.start:
            padding = padding - window.fed.start
        return None if padding is None else padding.repeat_interleave(D)

    def hidden(
        self,
        state: BlockState,
        tokens: Tensor,
        window: Window,
        cache: BlockCache | None,
        mask: Tensor | None,
        of_block: bool,
        rows: Rows | None = None,
    ) -> Tensor:
        """Hidden states `[b, D, n, d_model]` of `tokens` `[b, D, n]`, which stand in the window's fed columns.

        With `of_block` only those that the window reads. `mask` as the model takes it. Of `rows`, the last tokens are
        theirs.
        """
        b, D, n = tokens.shape
        positions = state.position_ids[:, window.fed]
        if rows is not None:
            positions = torch.cat((positions, state.position_ids[:, rows.columns]), dim=1)
        tree = D > 1 and self.layout == "tree"
        together = (1, 2) if tree else (0, 1)
        if D > 1:
            positions = positions[:, None].expand(b, D, n).flatten(*together)
        cut = of_block and count(window.read) < n
        early = cut and not tree
        embeds = {}
        if state.embeds is not None:
            fed = embeddings(self.model.get_input_embeddings(), tokens, state, window)
            embeds["inputs_embeds"] = fed.flatten(*together)
        hidden = self.model.model(
            tokens.flatten(*together),
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            start=window.start(),
            wanted=window.read if early else None,
            **embeds,
        )
        hidden = hidden.view(b, D, -1, hidden.shape[-1])
        return hidden[:, :, window.read] if cut and not early else hidden

    def with_rows(
        self, state: BlockState, tokens: Tensor, window: Window, cache: BlockCache | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of `tokens` `[b, D, n]`, and those `[b, D, E, d_model]` of the rows beside them."""
        _, D, n = tokens.shape
        rows = self.rows(window, tokens.device)
        tokens = F.pad(tokens, (0, rows.columns.shape[0]), value=self.mask_id)
        first = window.fed.start if isinstance(window.fed, slice) else 0
        beside = Beside(rows.holes, cache, first, mask, self.padding(state, window, D))
        hidden = self.hidden(state, tokens, window, beside, None, False, rows)
        return hidden[:, :, :n], hidden[:, :, n:]

    def queries(self, state: BlockState, window: Window, drafts: int) -> int:
        """How many positions of a sequence a forward feeds to the model, all passes of it."""
        beside = self.rows(window, state.row.device).columns.shape[0] if self.rule.needs.rows else 0
        return drafts * (window.width() + beside) * self.passes

    def rows(self, window: Window, device: torch.device) -> Rows:
        return self.rule.rows(indices(window.block, device))


def prepare(cache: BlockCache, state: BlockState, window: Window, branches: int = 1) -> None:
    """Tell `cache` of the forward to come."""
    cache.branches = branches
    padding = state.padding if window.padding is None else window.padding
    cache.pad(0 if padding is None else padding, state.fillers)


def from_before(rows: Tensor, dim: int, own: Tensor | None = None) -> Tensor:
    """`rows`, each in the place of the one before it along `dim`; the first stays, and so do those where `own` is True.

    `own` has the dimensions of `rows`, of any size 1.
    """
    before = rows.index_select(dim, (torch.arange(rows.shape[dim], device=rows.device) - 1).clamp(min=0))
    return before if own is None else torch.where(own, rows, before)


def aligned(read: Tensor, state: BlockState, window: Window) -> Tensor:
    """The hidden states that predict the block's tokens, `[b, D, T, d_model]`, of those that the window reads."""
    if not window.own:
        return read
    T = window.block_width()
    if read.shape[2] == T:  # no column is before the block
        return from_before(read, 2)
    if state.padding is None:
        return read[:, :, :T]
    start = window.block.start if isinstance(window.block, slice) else window.block[:1]
    alone = (state.padding == start)[:, None, None, None]
    return torch.cat((torch.where(alone, read[:, :, 1:2], read[:, :, :1]), read[:, :, 1:T]), dim=2)


def all_aligned(hidden: Tensor, state: BlockState, window: Window) -> Tensor:
    """The hidden states that predict each fed column `[b, D, n, d_model]`, where a column predicts the next one.

    The first fed column, and a sequence's first token, get their own.
    """
    if state.padding is None:
        return from_before(hidden, 2)
    fed = window.fed
    columns = torch.arange(fed.start, fed.stop, device=hidden.device) if isinstance(fed, slice) else fed
    return from_before(hidden, 2, (columns == state.padding[:, None])[:, None, :, None])

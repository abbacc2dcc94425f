"""What a decode knows of its sequences, as tensors alone: a step is a function of them, and so can be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fdpp.decoding.evidence import Evidence
from fdpp.selection import Selection


class Window(NamedTuple):
    """The columns of one forward, each a slice or, in a captured step, an int64 tensor of columns.

    Attributes:
        fed: `n` columns of the sequence that are fed to the model.
        block: the block's `T` columns of the sequence.
        inner: the block's place within what is fed.
        read: the place of the hidden states that predict the block's tokens: `inner`, or with a shift of 1 one column
            before it. If `own` is set one more is read, that of the block's last column, unless nothing is before the
            block.
        own: whether the block's first token is the first of some sequences, which its own hidden state predicts.
        block_start: the block's first column; -1 in a captured step, which serves every block.
        full: whether everything is fed.
        padding: how many columns on the left hold no token, if it is the same in all sequences and known to the host: a
            full forward does not feed them. None: `BlockState.padding` says it, sequence by sequence.
    """

    fed: slice | Tensor
    block: slice | Tensor
    inner: slice | Tensor
    read: slice | Tensor
    block_start: int
    full: bool
    padding: int | None = 0
    own: bool = False

    @classmethod
    def of(cls, fed: slice, block: slice, full: bool, padding: int | None, shift: int = 0, own: bool = False) -> Window:
        inner = slice(block.start - fed.start, block.stop - fed.start)
        read = slice(max(inner.start - shift, 0), inner.stop if own else inner.stop - shift)
        return cls(fed, block, inner, read, block.start, full, padding, own)

    def start(self) -> int | Tensor:
        """What `model(start=)` takes: the first fed column, or all of them."""
        return self.fed.start if isinstance(self.fed, slice) else self.fed

    def width(self) -> int:
        """How many columns are fed."""
        return count(self.fed)

    def block_width(self) -> int:
        """How many columns the block has."""
        return count(self.block)


def count(columns: slice | Tensor) -> int:
    return columns.stop - columns.start if isinstance(columns, slice) else columns.shape[0]


class BlockState(NamedTuple):
    """The b sequences that take part in a forward.

    Attributes:
        row: `[b]` int64, which sequences of the decode they are.
        sequences: `[b, L]` int64, prompts and responses, masks included.
        commit_step: `[b, L]` int64, the step of its sequence that committed a column, -1 where none did.
        confidence: `[b, L]` float32, that of the token at the step which committed it, 1 where none did.
        nfe, steps, query_tokens: `[b]` int64, forwards, steps and fed positions so far.
        first_step: `[b]` int64, `steps` at the block's start.
        position_ids: `[b, L]` int64.
        padding: `[b]` int64, columns on the left that hold no token; None where there are none.
        may_end: `[b]` int64, the first column at which an EOS ends a sequence: behind the last given token of an
            infill. None: any column of the response.
        fillers: `[b]` bool, rows that only fill up the batch, copies of the first: nothing is stored for them. None:
            there are none.
        streams: `[b]` int64, the noise streams of a decode that samples.
        embeds: `[b, L, d_model]`, the embeddings of a prompt that has some; None: ids alone.
        embedded: `[b]` int64, how many columns from the left these are for.
        offered, accepted: `[b, drafts - 1]` int64, how many drafts were offered and accepted, by depth.
        evidence: of the state before the current one, `[b, 1, ...]`, where drafts or the rule need it; None before a
            block's first forward.
    """

    row: Tensor
    sequences: Tensor
    commit_step: Tensor
    confidence: Tensor
    nfe: Tensor
    steps: Tensor
    query_tokens: Tensor
    first_step: Tensor
    position_ids: Tensor
    padding: Tensor | None = None
    may_end: Tensor | None = None
    fillers: Tensor | None = None
    streams: Tensor | None = None
    embeds: Tensor | None = None
    embedded: Tensor | None = None
    offered: Tensor | None = None
    accepted: Tensor | None = None
    evidence: Evidence | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> BlockState:
        """With `change` applied to every tensor that is there."""
        evidence = None if self.evidence is None else self.evidence.each(change)
        others = (None if f is None or isinstance(f, Evidence) else change(f) for f in self)
        return BlockState(*others)._replace(evidence=evidence)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        """All that are there, those of the evidence last."""
        own = [field for field in self if isinstance(field, Tensor)]
        return own + ([] if self.evidence is None else self.evidence.tensors())

    def ends_allowed(self, columns: slice | Tensor) -> Tensor | None:
        """`[b, n]` bool: at which of the `columns` an EOS ends a sequence; None: at all of them."""
        if self.may_end is None:
            return None
        if isinstance(columns, slice):
            columns = torch.arange(columns.start, columns.stop, device=self.may_end.device)
        return columns >= self.may_end[:, None]

    def take(self, rows: Tensor) -> BlockState:
        """The sequences at `rows`, int64 indices `[c]`."""
        return self.each(lambda field: field.index_select(0, rows))

    def places(self, sequences: Tensor) -> Tensor:
        """Where `sequences` `[c]`, by their numbers in `row`, stand in the batch, int64 `[c]`."""
        return (self.row == sequences[:, None]).long().argmax(1)

    def write(self, part: BlockState) -> None:
        """Write what steps change back to the rows that `part` came from."""
        for name in ("sequences", "commit_step", "confidence", "nfe", "steps", "query_tokens", "offered", "accepted"):
            field = getattr(self, name)
            if field is not None:
                field[part.row] = getattr(part, name)


class Outcome(NamedTuple):
    """What came of a forward.

    Attributes:
        row: `[b]`, the sequences of the decode that took part.
        states, chosen: the states evaluated, `[b, D, T]`, and the step from each of them, `[b, D, ...]`; those of the
            first `accepted` `[b]` states are the decode's.
        remaining: `[b]`, masks left in the block; 0 where the sequence ended in it.
        ended: `[b]` bool, an EOS is committed with everything before it.
        nonfinite: `[b]`, masked positions without usable logits.
        counts: `[4, b]` int64, what the host must know: `nonfinite`, `ended`, `remaining` and `accepted`.
    """

    row: Tensor
    states: Tensor
    chosen: Selection
    accepted: Tensor
    remaining: Tensor
    ended: Tensor
    nonfinite: Tensor
    counts: Tensor

    def front(self, b: int) -> Outcome:
        """Of the first `b` sequences; the counts stay."""
        chosen = Selection(*(field[:b] for field in self.chosen))
        cut = {name: getattr(self, name)[:b] for name in self._fields if name not in ("chosen", "counts")}
        return self._replace(chosen=chosen, **cut)


def ends(tokens: Tensor, mask_id: int, eos: Tensor | None, allowed: Tensor | None = None) -> Tensor:
    """`[...]` bool: where the block's `tokens` `[..., T]` hold a committed EOS and no mask before it.

    `allowed` `[..., T]` bool: where an EOS counts; None: everywhere.
    """
    if eos is None:
        return torch.zeros(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
    masks_before = tokens.eq(mask_id).cumsum(-1)
    # Not `torch.isin`, which for many ids sorts and counts, and waits for the count.
    at_end = tokens == eos if eos.shape[0] == 1 else (tokens[..., None] == eos).any(-1)
    at_end = at_end if allowed is None else at_end & allowed
    return (at_end > masks_before).any(-1)


def written(held: Tensor, columns: slice | Tensor, new: Tensor) -> Tensor:
    """A copy of `held` `[b, L]` that has `new` `[b, T]` at `columns`."""
    if isinstance(columns, slice):
        return held.slice_scatter(new, 1, columns.start, columns.stop)
    return held.index_copy(1, columns, new)

"""The block loop: forward, step, until the block holds no mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteriaList

from fdpp.attention import BlockCache
from fdpp.decoding.advance import Advance, stop_ids
from fdpp.decoding.arena import graph_size
from fdpp.decoding.drafts import Room, cache_for, depth_after, most_drafts
from fdpp.decoding.embedded import for_all_columns
from fdpp.decoding.filters import Filters
from fdpp.decoding.head import settled
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.output import DiffusionGenerationOutput
from fdpp.decoding.refresh import ALL
from fdpp.decoding.runners import EagerRunner, StaticRunner
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import BlockState, Outcome, Window
from fdpp.decoding.static import LENGTH_BUCKET, StaticSteps, bucket_for
from fdpp.decoding.stops import asked
from fdpp.rules import Rule
from fdpp.step.terms import pack


def token_ids(config: DiffusionGenerationConfig, processor: Iterable[Callable[..., Tensor]] | None) -> tuple[int, int]:
    """The mask and padding ids; raises `ValueError` if the loop cannot run with these settings."""
    if config.mask_token_id is None or config.pad_token_id is None:
        raise ValueError("BlockLoop: expected a config with its mask and padding ids filled in")
    if processor is not None and config.head == "fused":
        raise ValueError("head='fused' keeps no logits, which logits_processor reads")
    return config.mask_token_id, config.pad_token_id


class BlockLoop:
    """One decode, seen from the host.

    All sequences end at the same column, so a block is the same columns in every row. Rows leave the batch as soon as
    their block is complete. A forward evaluates one state of every row or, with drafts, several.

    Args:
        given: `[B, max_new_tokens]` int64, the response to fill: its tokens count as committed. None: masks alone.
        embeds: `[B, P, d_model]`, fed in the place of the embeddings of `input_ids`; None: ids alone.
        numbers: `[B]` int64, which noise streams after the seed's the sequences draw from; None: 0, 1, ...

    Attributes:
        whole: the state of all B sequences, up to date for those that take part in no forward at the moment.
        live: indices of the sequences with blocks to come.
        prompts: the prompts and their attention mask, as they are decoded.
        decoded: `[B]` int64, in an infill with a partial refresh the last block that each sequence decoded.
        blocks: start and end of every block, counted from the response's first column.
        end: `[B]` int64, the column behind each sequence's response.
    """

    grid: int | None = None
    bucket_length = LENGTH_BUCKET

    def __init__(
        self,
        model: DiffusionModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: DiffusionGenerationConfig,
        processor: Iterable[Callable[..., Tensor]] | None = None,
        static: StaticSteps | None = None,
        given: Tensor | None = None,
        numbers: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> None:
        self.mask_id, self.pad_id = token_ids(config, processor)
        config = settled(model, config, processor, input_ids.shape[0])
        self.config, self.device, self.static, self.shift = config, input_ids.device, static, model.shift
        self.blocks = config.blocks()
        self.eos = torch.tensor(config.eos_token_id, dtype=torch.int64, device=self.device)
        self.extra = 0 if static is None else -(input_ids.shape[1] + config.max_new_tokens) % self.bucket_length
        self.prompt_length = input_ids.shape[1] + self.extra
        self.length = self.prompt_length + config.max_new_tokens
        self.live = torch.arange(input_ids.shape[0], device=self.device)
        self.decoded, self.end = torch.full_like(self.live, -1), torch.full_like(self.live, self.length)
        padding = None if attention_mask is None else (~attention_mask).sum(1)
        self.padding = self.padding_of_all(padding)
        self.bare = self.shift > 0 and (0 if padding is None else int(padding.amax())) == input_ids.shape[1]
        self.whole = self.initial(*self.in_bucket(input_ids, padding), given, numbers)
        if embeds is not None:
            held, embedded = for_all_columns(embeds, self.extra, self.length)
            self.whole = self.whole._replace(embeds=held, embedded=embedded)
        self.prompts = input_ids, attention_mask
        self.cache, stops, filters = self.memory()
        self.advance = Advance(model, config, stops, processor, filters, self.grid)

    def padding_of_all(self, padding: Tensor | None) -> int | None:
        """Columns on the left that no full forward feeds, given each prompt's padding `[B]`; None: a mask hides them.

        A static full forward leaves out padding that all sequences share, and needs no mask; an eager one masks it.
        """
        if padding is None:
            return self.extra
        least, most = padding.aminmax()
        return self.extra + int(least) if self.static is not None and bool(least == most) else None

    def in_bucket(self, input_ids: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Prompts and their padding, filled up on the left to a multiple of the static steps' lengths."""
        if self.static is None:
            return input_ids, padding
        padding = torch.zeros_like(self.live) if padding is None else padding
        return F.pad(input_ids, (self.extra, 0), value=self.pad_id), padding + self.extra

    def memory(self) -> tuple[BlockCache | None, Tensor | None, Filters]:
        """The cache, the ids that end a sequence, and the filters: those of a bucket stand at fixed addresses."""
        B, room = self.live.shape[0], Room(self.shift)
        if self.grid is not None or self.config.rule.needs.rows:
            room = Room(self.shift, self.grid, B, self.length)
        if self.static is None:
            cache = cache_for(self.config, room)
            return cache, stop_ids(self.config, self.device), Filters(self.config, self.device)
        self.bucket = bucket_for(self.static, self.config, room, self.device, B, self.length)
        return self.bucket.cache, self.bucket.eos, self.bucket.filters

    def runner(self, state: BlockState, block: int) -> EagerRunner | StaticRunner:
        """Who runs the forwards of `block`."""
        schedule = torch.cat([pack(rule, self.device) for rule in self.rules(block)])
        if self.static is not None:
            start, stop = self.blocks[block]
            return StaticRunner(self.static, self.bucket, self.advance, state, schedule, stop - start)
        return EagerRunner(self.advance, state, schedule, self.cache)

    def rules(self, block: int) -> list[Rule]:
        """The rules of the block's successive steps."""
        return self.config.block_rules()[block]

    def seated(self, sequences: Tensor) -> Tensor:
        """`sequences` `[c]`, by their numbers, in the order in which their rows stand in the cache."""
        if self.cache is None or not sequences.shape[0]:
            return sequences
        return torch.tensor(self.cache.seat(sequences.tolist()), dtype=torch.int64, device=self.device)

    def windows(self, block: int, before: int) -> tuple[Window, Window]:
        """The window of a block's first forward, and that of the others; `before` is the block decoded before it.

        Where a column predicts the next token, the one before the block is fed with it, if there is one.
        """
        columns, everything = self.block_columns(block), slice(self.padding or 0, self.length)
        reading = self.shift, self.bare and block == 0
        full = Window.of(everything, columns, True, self.padding, *reading)
        if self.config.cache == "none":
            return full, full
        stop = columns.stop if self.config.cache == "dual" else self.length
        fed = slice(max(columns.start - self.shift, 0), stop)
        padding = 0 if self.whole.padding is None else None
        others = Window.of(fed, columns, False, padding, *reading)
        if block == 0:
            return full, others
        first = self.config.refresh.first(block, columns, self.block_columns(before), everything, fed)
        return full if first == everything else Window.of(first, columns, False, padding, *reading), others

    def parts(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """The sequences `[c]` that decode `block`, and which block they decoded before it.

        In an infill those before which are different blocks come one after another: a partial refresh of theirs feeds
        other columns, and each is to be decoded as it would be alone.
        """
        if self.whole.may_end is None:
            yield block - 1, self.live
            return
        rows = self.live[(self.whole.sequences[self.live, self.block_columns(block)] == self.mask_id).any(1)]
        before = torch.full_like(rows, block - 1) if self.config.refresh == ALL else self.decoded[rows]
        self.decoded[rows] = block
        for last in before.unique().tolist():
            yield last, rows[before == last]

    def usual(self, block: int) -> list[int]:
        """What `parts` may say beside sequences of a decode that is no infill."""
        return [block - 1]

    def prefill(self, runner: EagerRunner | StaticRunner, block: int, before: int) -> int:
        """Feed what no forward of the block will feed; returns what is then in the place of `before`."""
        return before

    def warm_up(self) -> None:
        """Capture every step that a decode of these sequences may take, at every size its batch may shrink to."""
        B, most = self.live.shape[0], most_drafts(self.config.drafts)
        depths = [2**i for i in range(1, most.bit_length())] if self.config.drafts == "auto" else [most]
        for b in sorted({graph_size(b) for b in range(1, B + 1)}, reverse=True):
            rows = self.live[torch.arange(b, device=self.device).clamp(max=B - 1)]
            for block in range(len(self.blocks)):
                for before in self.usual(block):
                    runner = self.runner(self.whole.take(rows), block)
                    assert isinstance(runner, StaticRunner)
                    first, others = self.windows(block, before)
                    runner.step(first, 1)
                for drafts in (1, *depths):
                    runner.step(others, drafts)

    def initial(
        self, input_ids: Tensor, padding: Tensor | None, given: Tensor | None, numbers: Tensor | None
    ) -> BlockState:
        B, new = input_ids.shape[0], self.config.max_new_tokens
        response = input_ids.new_full((B, new), self.mask_id) if given is None else given
        sequences = torch.cat((input_ids, response), dim=1)
        position_ids = torch.arange(self.length, device=self.device).expand(B, -1)
        if padding is not None:
            position_ids = (position_ids - padding[:, None]).clamp(min=0)
        none = torch.zeros(B, dtype=torch.int64, device=self.device)
        state = BlockState(
            row=self.live,
            sequences=sequences,
            commit_step=torch.full_like(sequences, -1),
            confidence=torch.ones_like(sequences, dtype=torch.float32),
            nfe=none,
            steps=none.clone(),
            query_tokens=none.clone(),
            first_step=none.clone(),
            position_ids=position_ids,
            padding=padding,
            may_end=None if given is None else self.behind_given(given),
        )
        if self.config.draws:
            state = state._replace(streams=(self.config.seed or 0) + (self.live if numbers is None else numbers))
        if self.config.drafts != 1:
            depths = most_drafts(self.config.drafts) - 1
            state = state._replace(offered=none.new_zeros(B, depths), accepted=none.new_zeros(B, depths))
        return state

    def behind_given(self, given: Tensor) -> Tensor:
        """`[B]`, the column behind each sequence's last given token."""
        columns = torch.arange(1, given.shape[1] + 1, device=self.device)
        return self.prompt_length + (columns * (given != self.mask_id)).amax(1)

    @property
    def sequences(self) -> Tensor:
        """`[B, P + max_new_tokens]` int64, prompts and responses."""
        return self.whole.sequences[:, self.extra :]

    def of_response(self, held: Tensor) -> Tensor:
        """What `held` `[B, L]` says of the responses, `[B, max_new_tokens]`."""
        return held[:, self.prompt_length :]

    def block_columns(self, block: int) -> slice:
        start, stop = self.blocks[block]
        return slice(self.prompt_length + start, self.prompt_length + stop)

    def block_tokens(self, block: int, draft: bool = False) -> Tensor:
        """The block's tokens `[B, T]` of all sequences, as a streamer gets them: a `draft`, or finished."""
        return self.whole.sequences[:, self.block_columns(block)]

    def finished(self) -> bool:
        return self.live.numel() == 0

    def steps(self, block: int, watch: bool = False) -> Iterator[Outcome]:
        """Decode one block; yields what came of every forward, with `sequences` up to date if `watch` is set.

        The first forward is a full one, or what `refresh` leaves of it, and its logits commit like any other's; the
        following ones feed what the cache leaves over: everything, everything from the block on, or the block alone.
        """
        for before, rows in self.parts(block):
            yield from self.steps_of(rows, block, before, watch)

    def steps_of(self, rows: Tensor, block: int, before: int, watch: bool) -> Iterator[Outcome]:
        """`steps` of some sequences `rows` `[c]`, which decoded the block `before` last."""
        state = self.whole.take(self.seated(rows))
        runner = self.runner(state._replace(first_step=state.steps), block)
        first, others = self.windows(block, self.prefill(runner, block, before))
        window, drafts = first, 1
        while runner.size:
            outcome, (unusable, any_ended, closed, most_remaining, most_accepted) = runner.step(window, drafts)
            if unusable:
                raise FloatingPointError(
                    f"the model's logits held NaN, +inf or only -inf at {int(outcome.nonfinite.sum())} masked "
                    f"positions of sequences {outcome.row[outcome.nonfinite > 0].tolist()} (block {block})"
                )
            if closed or watch:
                self.whole.write(runner.state)
            if any_ended:
                self.end_after_eos(outcome.row[outcome.ended], self.block_columns(block).start)
            if closed:
                runner.go_on_with(self.seated(outcome.row[outcome.remaining.nonzero().flatten()]))
            window, drafts = others, min(depth_after(most_accepted, self.config.drafts), most_remaining)
            yield outcome

    def end_after_eos(self, rows: Tensor, start: int) -> None:
        """Pad `rows` after their first EOS at or after column `start` and take them out of the decode."""
        sequences = self.whole.sequences
        tail = sequences[rows, start:]
        after = self.text_ends(start)[rows].cumsum(1).cumsum(1) > 1
        sequences[rows, start:] = tail.masked_fill(after, self.pad_id)
        self.live = self.live[~torch.isin(self.live, rows)]

    def text_ends(self, start: int) -> Tensor:
        """Where an EOS from column `start` on ends its sequence, bool `[B, length - start]`."""
        at_end = torch.isin(self.whole.sequences[:, start:], self.eos)
        allowed = self.whole.ends_allowed(slice(start, self.length))
        return at_end if allowed is None else at_end & allowed

    def stop(self, criteria: StoppingCriteriaList, block: int) -> None:
        """End the sequences for which `criteria` holds after `block`; masks behind the block become padding.

        The criteria see all B sequences while one is live, so that a row of theirs is always the same sequence.
        """
        if self.finished():
            return
        stop, done = self.block_columns(block).stop, self.ended_by(criteria, block)[self.live]
        tail = self.whole.sequences[self.live[done], stop:]
        self.whole.sequences[self.live[done], stop:] = tail.masked_fill(tail == self.mask_id, self.pad_id)
        self.live = self.live[~done]

    def ended_by(self, criteria: StoppingCriteriaList, block: int) -> Tensor:
        """What `criteria` say of all sequences up to the end of `block`, bool `[B]`."""
        columns = self.block_columns(block)
        sequences = self.whole.sequences[:, self.extra : columns.stop].clone()
        return asked(criteria, sequences, columns.stop - columns.start)

    def output(self) -> DiffusionGenerationOutput:
        commit_step, confidence = map(self.of_response, (self.whole.commit_step, self.whole.confidence))
        before_eos = self.of_response(self.text_ends(0)).cumsum(1) == 0
        written = (before_eos & (commit_step >= 0)).sum(1)
        acceptance = None
        if self.whole.offered is not None and self.whole.accepted is not None:
            acceptance = self.whole.accepted.double() / self.whole.offered
        return DiffusionGenerationOutput(
            sequences=self.sequences,
            nfe=self.whole.nfe,
            tokens_per_forward=written.double() / self.whole.nfe.clamp(min=1),
            commit_step=commit_step,
            confidence=confidence,
            log_prob=confidence.log(),
            query_tokens=self.whole.query_tokens,
            acceptance=acceptance,
        )

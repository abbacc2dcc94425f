"""Stop strings: a response ends before the first of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

if TYPE_CHECKING:
    from fdpp.decoding.loop import BlockLoop
    from fdpp.decoding.settings import DiffusionGenerationConfig


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def before_eos(ids: Sequence[int], eos: Sequence[int]) -> list[int]:
    """`ids` up to the first of `eos`."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return list(ids[:end])


def first_stop(text: str, stops: Sequence[str], begin: int = 0) -> int | None:
    """Where the stop string starts that is complete first among those that end after `begin`; None: there is none.

    Of several that end together it is the longest.
    """
    at = ((text.find(stop, max(begin - len(stop) + 1, 0)), stop) for stop in stops)
    return min(((start + len(stop), start) for start, stop in at if start >= 0), default=(0, None))[1]


def tokens_before(tokenizer: Any, ids: Sequence[int], cut: int) -> int:
    """How many of `ids` have their whole text before the character `cut`."""
    return bisect_right(range(len(ids) + 1), cut, key=lambda n: len(decode(tokenizer, ids[:n]))) - 1


def cut_at_stop(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int]:
    """The text of `ids` before the first stop string, and how many whole tokens it has.

    Stop strings are searched for in the text with special tokens; the returned text is without.
    """
    text = decode(tokenizer, ids)
    cut = first_stop(text, stops)
    if cut is None:
        return decode(tokenizer, ids, skip_special_tokens=True), len(ids)
    kept = tokens_before(tokenizer, ids, cut)
    rest = text[len(decode(tokenizer, ids[:kept])) : cut]
    return decode(tokenizer, ids[:kept], skip_special_tokens=True) + rest, kept


class StopStrings(StoppingCriteria):
    """Ends a sequence whose response, from column `start` on, completes a stop string before its first EOS.

    As in transformers a string that stands in the prompt alone does not count, one that begins there and ends in the
    response does; special tokens have their text. Unlike `StopStringCriteria` it looks at the whole response, so that
    a string in the midst of a block is found.

    Args:
        stops: strings, none of them empty.
        eos: the ids that end a response; none: nothing does.
        tails: the last tokens of every sequence's prompt, where a string may begin; None: look at responses alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        start: int,
        eos: Sequence[int],
        tails: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.tokenizer, self.stops, self.start, self.eos, self.tails = tokenizer, stops, start, eos, tails

    def kept(self, b: int, response: Sequence[int], given: int = 0) -> int | None:
        """How many tokens of the `response` of sequence b stand before its first stop string; None: it has none.

        Tokens are what is kept: that in the midst of which the string begins goes with it, and so does its text before
        the string. The first `given` tokens count as the prompt's.
        """
        ids = before_eos(response[given:], self.eos)
        tail = [*(self.tails[b] if self.tails else []), *response[:given]]
        text = decode(self.tokenizer, [*tail, *ids])
        cut = first_stop(text, self.stops, len(decode(self.tokenizer, tail)) if tail else 0)
        return None if cut is None else given + max(tokens_before(self.tokenizer, [*tail, *ids], cut) - len(tail), 0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [self.kept(b, row) is not None for b, row in enumerate(input_ids[:, self.start :].tolist())]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def stops_of(
    config: DiffusionGenerationConfig, tokenizer: Any, input_ids: Tensor, attention_mask: Tensor | None
) -> StopStrings | None:
    """The stop strings of a decode of `input_ids` `[B, P]`, None if there are none.

    Raises:
        ValueError: there are some, and no tokenizer.
    """
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
    if not stops:
        return None
    if tokenizer is None:
        raise ValueError(
            f"stop_strings={config.stop_strings!r}: expected the model's tokenizer as well, tokenizer=..., got None"
        )
    # A string spans at most a token for each of its characters.
    P, most = input_ids.shape[1], max(map(len, stops))
    rows, padding = input_ids.tolist(), [0] * len(input_ids)
    if attention_mask is not None:
        padding = (P - attention_mask.sum(1)).tolist()
    tails = [row[max(left, P - most) :] for row, left in zip(rows, padding, strict=True)]
    return StopStrings(tokenizer, stops, P, config.eos_ids if config.stop_at_eos else (), tails)


def end_at_strings(loop: BlockLoop, stops: StopStrings, block: int, live: Tensor) -> None:
    """End those of the sequences `live`, which `block` belonged to, whose response holds a stop string.

    The response is padding from the string on; what is cut off counts as never committed.
    """
    whole, start = loop.whole, loop.prompt_length
    stop = loop.block_columns(block).stop
    given = [0] * len(live) if whole.may_end is None else (whole.may_end[live] - start).tolist()
    room = (loop.end[live] - start).tolist()
    responses = whole.sequences[live, start:stop].tolist()
    for b, response, first, length in zip(live.tolist(), responses, given, room, strict=True):
        kept = stops.kept(b, response[:length], first)
        if kept is not None:
            whole.sequences[b, start + kept :] = loop.pad_id
            whole.commit_step[b, start + kept :] = -1
            whole.confidence[b, start + kept :] = 1.0
            loop.live = loop.live[loop.live != b]


def asked(criteria: StoppingCriteriaList, sequences: Tensor, new: int) -> Tensor:
    """What `criteria` say of `sequences` `[B, S]` whose last block has `new` tokens: bool `[B]`.

    They are asked once. `StopStringCriteria` tell whether the last token completes a string, so they are asked for
    every token of the block.
    """
    done = torch.zeros(sequences.shape[0], dtype=torch.bool, device=sequences.device)
    S = sequences.shape[1]
    for criterion in criteria:
        ends = range(S - new + 1, S + 1) if isinstance(criterion, StopStringCriteria) else (S,)
        for end in ends:
            done = done | criterion(sequences[:, :end], None, new_token_length=new)
    return done

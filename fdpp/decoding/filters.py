"""Settings of autoregressive generation that change logits token by token: `repetition_penalty`, `bad_words_ids`,
`suppress_tokens`, `top_k`, `top_p`, `min_p`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdpp.decoding.contexts import Contexts
from fdpp.selection import is_int, is_number

if TYPE_CHECKING:
    from fdpp.decoding.settings import DiffusionGenerationConfig

SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty", "bad_words_ids", "suppress_tokens")

UNITS = 2.0**40
"""A probability of 1 as a whole number. Sums of whole numbers are the same in any order, on any device."""

HEAD = 1024
"""On a CPU the nucleus is looked for among so many of the largest logits before a row is sorted: 126,464 logits sort in
some milliseconds, and a nucleus seldom holds more."""


def is_id(value: object) -> bool:
    return is_int(value) and value >= 0


def check_filters(config: DiffusionGenerationConfig) -> None:
    """`ValueError` on a value that a filter cannot take."""
    if config.top_k is not None and not is_id(config.top_k):
        raise ValueError(f"top_k: expected an int of at least 0, got {config.top_k!r}")
    for name in ("top_p", "min_p"):
        value = getattr(config, name)
        if value is not None and not (is_number(value) and 0.0 <= value <= 1.0):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    penalty = config.repetition_penalty
    if penalty is not None and not (is_number(penalty) and 0.0 < penalty < math.inf):
        raise ValueError(f"repetition_penalty: expected a finite number above 0, got {penalty!r}")
    words, banned = config.bad_words_ids, config.suppress_tokens
    if words is not None and not (
        is_list(words) and all(is_list(word) and len(word) > 0 and all(map(is_id, word)) for word in words)
    ):
        raise ValueError(f"bad_words_ids: expected a list of non-empty lists of token ids, got {words!r}")
    if banned is not None and not (is_list(banned) and all(map(is_id, banned))):
        raise ValueError(f"suppress_tokens: expected a list of token ids, got {banned!r}")


def check_filtered_ids(config: DiffusionGenerationConfig, vocab_size: int) -> None:
    """`ValueError` on ids that the vocabulary lacks, and if no token is left to propose."""
    words = [token for word in config.bad_words_ids or () for token in word]
    for name, ids in (("bad_words_ids", words), ("suppress_tokens", config.suppress_tokens or ())):
        beyond = [token for token in ids if token >= vocab_size]
        if beyond:
            raise ValueError(f"{name}: expected ids below the vocabulary's {vocab_size}, got {beyond[0]}")
    never = {*never_proposed(config), config.mask_token_id}
    if len(never) >= vocab_size:
        raise ValueError(
            f"suppress_tokens, bad_words_ids: expected to leave one of {vocab_size} tokens, got all of them"
        )


def is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def active_filters(config: DiffusionGenerationConfig) -> list[str]:
    """The names of the settings that change anything."""
    neutral = {"top_p": 1.0, "repetition_penalty": 1.0}
    return [name for name in SETTINGS if getattr(config, name) and getattr(config, name) != neutral.get(name)]


def bad_words(config: DiffusionGenerationConfig) -> list[tuple[int, ...]]:
    """The words of `bad_words_ids`; as in transformers EOS alone is none."""
    eos = {(token,) for token in config.eos_ids}
    return [word for word in dict.fromkeys(map(tuple, config.bad_words_ids or ())) if word not in eos]


def never_proposed(config: DiffusionGenerationConfig) -> list[int]:
    """Tokens that no position may propose, whatever precedes it."""
    single = [word[0] for word in bad_words(config) if len(word) == 1]
    return sorted({*single, *(config.suppress_tokens or ())})


class Words:
    """Bad words of n + 1 tokens each: none may be completed.

    Attributes:
        prefixes: `[W, n]` int64, the words without their last tokens.
        ends: `[U]` int64, the last tokens, each once.
        ends_of: `[W, U]` float32, 1 where a word ends in a token.
    """

    def __init__(self, words: list[tuple[int, ...]], device: torch.device) -> None:
        ends = sorted({word[-1] for word in words})
        self.prefixes = torch.tensor([word[:-1] for word in words], dtype=torch.int64, device=device)
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        last = torch.tensor([word[-1] for word in words], dtype=torch.int64, device=device)
        self.ends_of = (last[:, None] == self.ends).float()

    def refuse(self, logits: Tensor, contexts: Contexts) -> None:
        """-inf in `logits` at every token that would complete a word."""
        tail, enough = contexts.last(self.prefixes.shape[1])
        begun = (tail[..., None, :] == self.prefixes).all(-1) & enough[..., None]
        completes = begun.float() @ self.ends_of > 0.0
        column = logits.index_select(-1, self.ends)
        logits.index_copy_(-1, self.ends, column.masked_fill(completes, -torch.inf))


class Filters:
    """What the settings do to logits. Its tensors are constants: a captured step reads them at their addresses.

    No operation waits for the device (on a CPU a shortcut does) or has a shape that depends on data.

    Attributes:
        active: whether there is anything to do.
        needs_contexts: whether `by_context` has anything to do.
    """

    def __init__(self, config: DiffusionGenerationConfig, device: torch.device) -> None:
        assert config.mask_token_id is not None
        self.active = bool(active_filters(config))
        self.penalty = float(config.repetition_penalty or 1.0)
        self.mask_id: int = config.mask_token_id
        self.scale = float(config.temperature) or 1.0
        self.top_k, self.top_p, self.min_p = config.top_k or 0, config.top_p, config.min_p or 0.0
        if self.top_p is not None and self.top_p >= 1.0:
            self.top_p = None
        never = never_proposed(config)
        self.never = torch.tensor(never, dtype=torch.int64, device=device) if never else None
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for word in bad_words(config):
            by_length.setdefault(len(word), []).append(word)
        self.words = [Words(words, device) for n, words in sorted(by_length.items()) if n > 1]
        self.cuts = bool(self.top_k or self.top_p is not None or self.min_p)
        self.needs_contexts = self.penalty != 1.0 or bool(self.words)

    def by_context(self, logits: Tensor, contexts: Contexts | None) -> Tensor:
        """`logits` `[..., V]` after the penalty, bad words and suppressed tokens; the argument stays as it is.

        `contexts` are those of the same positions; they may be None unless `needs_contexts`.
        """
        if not self.needs_contexts and self.never is None:
            return logits
        logits = logits.clone()
        if contexts is not None and self.penalty != 1.0:
            self.penalise(logits, contexts)
        if contexts is not None:
            for words in self.words:
                words.refuse(logits, contexts)
        return logits if self.never is None else logits.index_fill_(-1, self.never, -torch.inf)

    def penalise(self, logits: Tensor, contexts: Contexts) -> None:
        """Divide the logits of a context's tokens by the penalty, or multiply those below 0 by it."""
        # The mask id, which no context holds, stands for no token: its logit is written back as it was.
        ids = torch.where(contexts.inside(), contexts.tokens, self.mask_id)
        score = logits.gather(-1, ids)
        less = torch.where(score < 0, score * self.penalty, score / self.penalty)
        logits.scatter_(-1, ids, torch.where(ids == self.mask_id, score, less))

    def cut(self, logits: Tensor) -> Tensor:
        """`logits` `[..., V]` with -inf at tokens outside of `top_k`, `top_p` and `min_p`."""
        return logits.masked_fill(logits < self.floor(logits)[..., None], -torch.inf) if self.cuts else logits

    def floor(self, logits: Tensor) -> Tensor:
        """The logits' cut-off `[...]` float32: what is below it is cut off, and the best proposal never is.

        Each of the three acts on what the ones before it leave. Equal logits stay or go together.
        """
        V = logits.shape[-1]
        top = logits.amax(-1).float()
        floor = torch.full_like(top, -torch.inf)
        ranked = None
        if self.top_k:
            ranked = logits.topk(min(self.top_k, V)).values.float()
            floor = ranked[..., -1]
        if self.top_p is not None:
            floor = torch.maximum(floor, self.nucleus(logits, top, floor, ranked, self.top_p))
        if self.min_p:
            floor = torch.maximum(floor, top + self.scale * math.log(self.min_p))
        beside = [
            part.amax(-1).float()
            for part in (logits[..., : self.mask_id], logits[..., self.mask_id + 1 :])
            if part.shape[-1]
        ]
        return torch.minimum(floor, torch.stack(beside).amax(0))

    def nucleus(self, logits: Tensor, top: Tensor, floor: Tensor, ranked: Tensor | None, p: float) -> Tensor:
        """The least logit of the smallest set that holds p of the probability at or above `floor`, `[...]`.

        `ranked` are the largest logits in order, at least all above `floor`; None: they are not known.
        """
        kept = logits.float().masked_fill(logits < floor[..., None], -torch.inf)
        log_z = ((kept - top[..., None]) / self.scale).logsumexp(-1)
        if ranked is not None:
            return self.least(ranked, top, log_z, p)[0]
        if logits.device.type != "cpu" or logits.shape[-1] <= 2 * HEAD:
            return self.least(kept.sort(dim=-1, descending=True).values, top, log_z, p)[0]
        least, enough = self.least(kept.topk(HEAD).values, top, log_z, p)
        if not bool(enough.all()):
            wide = ~enough
            ranked = kept[wide].sort(dim=-1, descending=True).values
            least[wide] = self.least(ranked, top[wide], log_z[wide], p)[0]
        return least

    def least(self, ranked: Tensor, top: Tensor, log_z: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """The least of the `ranked` logits `[..., n]` before which there is less than p, and whether they hold p."""
        log_p = ((ranked - top[..., None]) / self.scale).double() - log_z[..., None].double()
        units = (log_p.exp() * UNITS).round().long()
        total = units.cumsum(-1)
        inside = total - units < int(p * UNITS)
        inside[..., 0] = True
        return ranked.masked_fill(~inside, torch.inf).amin(-1), total[..., -1] >= int(p * UNITS)

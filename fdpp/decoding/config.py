"""What a decode is asked to do, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from transformers.utils import ModelOutput

from fdpp.ops import MAX_POSITIONS, check_temperature
from fdpp.rules import Frechet, Quota, Rule

CACHES = ("none", "prefix", "dual")
BRANCHES = ("batch", "tree")
ENGINES = ("auto", "eager", "static")
MAX_DRAFTS = 64


@dataclass(frozen=True)
class DiffusionGenerationConfig:
    """Settings of `generate`. Token ids left at None come from the model's configuration.

    Attributes:
        max_new_tokens: length of the response, at least 1.
        block_length: positions decoded together, 1 to 1024; the last block may be shorter.
        rule: which proposals of a step are committed.
        steps: with `Quota()` alone, the steps of the whole response, shared out evenly over its blocks, and a block's
            masks over its steps (LLaDA's schedule). None commits one position a step.
        cache: "none" (every forward is a full one), "prefix" or "dual" (Fast-dLLM, arXiv 2505.22618).
        stop_at_eos: end a sequence once EOS is committed with everything before it; the rest becomes padding.
        drafts: states a forward evaluates (FreeDave, arXiv 2510.00294): the current one and `drafts - 1` guesses of
            what follows. The result is that of `drafts=1`, in fewer forwards. "auto" doubles what was last accepted.
        branches: how the drafted states share the cache, "batch" or "tree" (see `fdpp.cache.BlockCache`).
        engine: "static" runs steps on static tensors, captured as CUDA graphs on first use (`fdpp.decoding.static`);
            "eager" runs every operation as it comes. "auto" is "static" on a CUDA device, where it can be. Same tokens.
        temperature: 0 for greedy proposals.
        seed: with a temperature, sequence b samples from the stream seed + b.
        return_dict_in_generate: False returns the sequences alone.
        mask_token_id, eos_token_id, pad_token_id: token ids; `eos_token_id` may be several.
    """

    max_new_tokens: int = 256
    block_length: int = 32
    rule: Rule = field(default_factory=Frechet)
    steps: int | None = None
    cache: str = "dual"
    stop_at_eos: bool = True
    drafts: int | str = 1
    branches: str = "batch"
    engine: str = "auto"
    temperature: float = 0.0
    seed: int | None = None
    return_dict_in_generate: bool = True
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, high in (("max_new_tokens", None), ("block_length", MAX_POSITIONS), ("steps", None)):
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            if not is_int(value) or value < 1 or (high is not None and value > high):
                limit = "of at least 1" if high is None else f"from 1 to {high}"
                raise ValueError(f"{name}: expected an int {limit}, got {value!r}")
        if not isinstance(self.rule, Rule):
            raise ValueError(f"rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got {self.rule!r}")
        if self.steps is not None and self.rule != Quota():
            raise ValueError(f"steps={self.steps} is a schedule for rule=Quota(); {self.rule} decides by itself")
        if self.cache not in CACHES:
            raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {self.cache!r}")
        if self.drafts != "auto" and not (is_int(self.drafts) and 1 <= self.drafts <= MAX_DRAFTS):
            raise ValueError(f'drafts: expected an int from 1 to {MAX_DRAFTS} or "auto", got {self.drafts!r}')
        if self.branches not in BRANCHES:
            raise ValueError(f"branches: expected one of {', '.join(BRANCHES)}, got {self.branches!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        check_temperature(self.temperature)
        if self.seed is not None and not is_int(self.seed):
            raise ValueError(f"seed: expected an int, got {self.seed!r}")
        if self.temperature > 0.0 and self.seed is None:
            raise ValueError(f"temperature={self.temperature} samples: expected a seed")

    def blocks(self) -> list[tuple[int, int]]:
        """Start and end of every block, counted from the response's first position."""
        starts = range(0, self.max_new_tokens, self.block_length)
        return [(start, min(start + self.block_length, self.max_new_tokens)) for start in starts]

    def block_rules(self) -> list[list[Rule]]:
        """For every block the rules of its successive steps; the last one goes on for as long as is needed."""
        blocks = self.blocks()
        if self.rule != Quota():
            return [[self.rule] for _ in blocks]
        N, steps = self.max_new_tokens, self.steps or self.max_new_tokens
        # A block's steps are proportional to its length, which is LLaDA's equal share where the blocks are equal.
        return [
            [Quota(k) for k in shares(stop - start, max(steps * stop // N - steps * start // N, 1))]
            for start, stop in blocks
        ]


def shares(total: int, parts: int) -> list[int]:
    """`total` in at most `parts` whole positive parts that differ by at most 1, the larger ones first."""
    base, larger = divmod(total, parts)
    return [base + (part < larger) for part in range(min(parts, total))]


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: `[B, P + max_new_tokens]` int64, prompt and response.
        nfe: `[B]` int64, the forwards each sequence took part in, full and cached ones alike; all drafts that are
            evaluated together are one.
        tokens_per_forward: `[B]` float64, response tokens before the first EOS over `nfe`.
        commit_step: `[B, max_new_tokens]` int64, the step (from 0) of its sequence that committed a position, -1 where
            none did.
        query_tokens: `[B]` int64, positions fed to the model over all forwards, drafts included.
        acceptance: `[drafts - 1]` float64, the share of offered drafts that were accepted, by depth (NaN where none was
            offered); None without drafts.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    commit_step: torch.Tensor | None = None
    query_tokens: torch.Tensor | None = None
    acceptance: torch.Tensor | None = None

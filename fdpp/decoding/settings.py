"""What a decode is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fdpp.decoding.filters import active_filters, check_filters
from fdpp.decoding.refresh import ALL, Refresh
from fdpp.decoding.saved import SavedSettings
from fdpp.rules import Frechet, Rule
from fdpp.selection import MAX_POSITIONS, check_temperature, is_int

CACHES = ("none", "prefix", "dual")
REMASKINGS = ("low_confidence", "random")
BRANCHES = ("batch", "tree")
ENGINES = ("auto", "eager", "static")
HEADS = ("library", "fused", "auto")
MAX_DRAFTS = 64
BLOCK_LENGTH = 32
"""The length of blocks of which neither the settings nor the model say it."""


def check_stop_strings(stops: Any) -> None:
    """`ValueError` on anything but a string, several or None."""
    several = [stops] if isinstance(stops, str) else stops
    if stops is not None and not (
        isinstance(several, (list, tuple)) and all(isinstance(stop, str) and stop for stop in several)
    ):
        raise ValueError(f"stop_strings: expected a string that is not empty or a list of such, got {stops!r}")


@dataclass
class DiffusionGenerationConfig(SavedSettings):
    """Settings of `generate`. Token ids left at None come from the model's `generation_config`, then its `config`.

    They are checked when they are made, and again when a decode uses them: assign to them as you like.
    `save_pretrained` and `from_pretrained` write and read them as `generation_config.json`, with a model or alone.

    Attributes:
        max_new_tokens: length of the response; 0 fills the masks of the prompt (`infill`).
        block_length: positions decoded together, 1 to 1024; the last block may be shorter. None: as the model was
            trained, 32 where it can be any. A block-causal model's blocks are counted from the prompt's first token,
            and no position sees a later one.
        sub_block_length: of a block-causal model, positions decided together within a block, from left to right; None:
            as the model's authors decode it, which for most is the whole block.
        rule: which proposals of a step are committed; also a preset ("careful", "balanced", "fast"), a name, "frechet",
            or a name and numbers, {"name": "Frechet", "margin": 0.25}. The default, `Frechet(0.25)`, is bold: it loses
            answers on every task that was measured here (docs/rules.md).
        steps: for `Quota()` and `Prophet()`, the steps of the whole response (LLaDA's schedule): they are shared out
            evenly over its blocks, and a block's masks over its steps. None commits one position a step. The rules of
            Dream have a schedule of their own for a block's steps.
        cache: "none" (every forward is a full one), "prefix" or "dual" (Fast-dLLM, arXiv 2505.22618). With a
            block-causal model what they keep of finished blocks is exact; they differ where there are sub-blocks:
            "prefix" feeds the block, "dual" the sub-block alone.
        refresh: what a block's first forward feeds under a cache: "all" (everything), "recent" (the block decoded
            before and the block), "block" (the block alone: for measurements, it loses answers), or a `Recent` or a
            `Window` of `fdpp.decoding.refresh`, also as text, "recent:4" or "window:32:end". Columns that are not fed
            keep their keys and values. The first block begins with everything. Refused unless "all": `cache="none"`, a
            rule that reads all columns, drafts where the block before is not fed, a block-causal model, of which
            nothing has to be refreshed.
        stop_at_eos: end a sequence once EOS is committed with everything before it; the rest becomes padding.
        drafts: states a forward evaluates (FreeDave, arXiv 2510.00294): the current one and `drafts - 1` guesses of
            what follows. The result is that of `drafts=1`, in fewer forwards. "auto" doubles what was last accepted.
        branches: how the drafted states share the cache, "batch" or "tree" (see `fdpp.attention.BlockCache`).
        engine: "static" runs steps on static tensors, captured as CUDA graphs on first use (`fdpp.decoding.static`);
            "eager" runs every operation as it comes. "auto" is "static" on a CUDA device, where it can be. Same tokens.
        head: "library" is PyTorch's matrix product: on a CPU of the masked positions alone, on a GPU of the block's.
            "fused" makes the logits of masked positions tile by tile and keeps none of them (`fdpp.step.project`). It
            saves memory and has not been timed on a GPU. Refused with what reads logits. "auto" is "fused" where that
            was measured to be faster on such a device and with so few rows, and nothing refuses it; until a GPU has
            been measured, it is "library" there (`fdpp.decoding.head.FUSED_UP_TO`).
        temperature: 0 for greedy proposals.
        top_k: the k most likely tokens of a position alone are proposed; 0: all.
        top_p: the fewest most likely tokens that hold this much of the probability, 0 to 1, at least one; 1: all.
        min_p: tokens at least this often as likely as the most likely one, 0 to 1; 0: all.
        repetition_penalty: above 1, tokens of a position's context are less likely: their logits are divided by it, or
            multiplied where they are negative; 1: no penalty.
        bad_words_ids: words, each a list of ids, of which the last token is not proposed where the others precede it.
            EOS alone is no word.
        suppress_tokens: ids that are never proposed.
        stop_strings: a string or several; a response ends before the first of them (see `fdpp.decoding.stops`).
            `generate` then needs a `tokenizer`.
        seed: with a temperature, random remasking or a rule that draws, sequence b samples from the stream seed + b.
            None draws a seed from PyTorch's CPU generator, so `torch.manual_seed` and transformers' `set_seed`
            reproduce the decode.
        remasking: which positions keep their masks. "low_confidence": those that the rule does not commit. "random": a
            `Quota` uniformly draws the positions that it commits.
        cfg_scale: above 0, classifier-free guidance: every sequence is also fed with its prompt masked, and the logits
            are u + (cfg_scale + 1)(l - u). Both passes are one forward of twice the rows.
        logits_eos_inf: EOS is never proposed (all of `eos_token_id`).
        confidence_eos_eot_inf: positions that propose EOS or EoT rank last, with confidence 0; the confidence of others
            is that among the other tokens. For rules that rank by confidence.
        return_dict_in_generate: False returns the sequences alone.
        mask_token_id, eos_token_id, pad_token_id, eot_token_id: token ids; `eos_token_id` may be several. EoT (LLaDA's
            end of a turn) is read for `confidence_eos_eot_inf` alone, and need not exist.

    `top_k` to `suppress_tokens` are transformers' settings. They give the logits that transformers' processors of the
    same numbers do, each position with its own context: the tokens before its block, then those before it in the block
    that are committed. A context knows nothing of what follows: where positions commit out of order or together, a
    repetition or a bad word of several tokens can still come about.

    - They act in this order: the penalty, bad words, suppressed tokens, a `logits_processor`, `logits_eos_inf`, then
      `top_k`, `top_p` and `min_p`, each on what the ones before it leave. The last three act at temperature 0 as well.
    - `top_p` and `min_p` take probabilities at the temperature, where there is one. The confidence is that of the
      remaining logits without it.
    - Of equal logits at a cut-off all stay. The mask id counts like any token, is never proposed, and never leaves a
      position without a proposal.

    `remasking`, `cfg_scale` and the EOS options are those of LLaDA's own `generate` (arXiv 2502.09992, appendix B.4).
    They differ in that there

    - the ids of EOS and EoT are fixed;
    - with a temperature only EoT's confidence is lowered: that of EOS is lowered in the noisy logits, which nothing
      reads any more;
    - guidance fails without an attention mask;
    - random positions come from the global generator, so they depend on the rest of the batch.
    """

    max_new_tokens: int = 256
    block_length: int | None = None
    sub_block_length: int | None = None
    rule: Rule = field(default_factory=Frechet)
    steps: int | None = None
    cache: str = "dual"
    refresh: Refresh = ALL
    stop_at_eos: bool = True
    drafts: int | str = 1
    branches: str = "batch"
    engine: str = "auto"
    head: str = "library"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    stop_strings: str | list[str] | None = None
    seed: int | None = None
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    return_dict_in_generate: bool = True
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    eot_token_id: int | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Put a rule and a refresh in the place of their names; raise `ValueError` if a setting does not fit."""
        self.rule, self.refresh = Rule.of(self.rule), Refresh.of(self.refresh)
        limits: dict[str, tuple[int, int | None]] = {"max_new_tokens": (0, None), "steps": (1, None)}
        limits |= {"block_length": (1, MAX_POSITIONS), "sub_block_length": (1, MAX_POSITIONS)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name != "max_new_tokens":
                continue
            if not is_int(value) or value < low or (high is not None and value > high):
                limit = f"of at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name}: expected an int {limit}, got {value!r}")
        if type(self.rule).__hash__ is None:
            raise ValueError(f"rule: expected a dataclass with frozen=True, {type(self.rule).__name__} can change")
        if self.steps is not None and not self.rule.takes_steps():
            raise ValueError(
                f"steps={self.steps} is a schedule for rule=Quota(), Prophet() and Dream's; "
                f"{self.rule} decides by itself"
            )
        if self.cache not in CACHES:
            raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {self.cache!r}")
        if self.drafts != "auto" and not (is_int(self.drafts) and 1 <= self.drafts <= MAX_DRAFTS):
            raise ValueError(f'drafts: expected an int from 1 to {MAX_DRAFTS} or "auto", got {self.drafts!r}')
        if self.branches not in BRANCHES:
            raise ValueError(f"branches: expected one of {', '.join(BRANCHES)}, got {self.branches!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {self.head!r}")
        check_temperature(self.temperature)
        check_filters(self)
        check_stop_strings(self.stop_strings)
        if self.seed is not None and not (is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed: expected an int of 64 bits with its sign, got {self.seed!r}")
        self.check_llada_options()
        self.check_needs()
        self.check_refresh()

    def check_llada_options(self) -> None:
        if self.remasking not in REMASKINGS:
            raise ValueError(f"remasking: expected one of {', '.join(REMASKINGS)}, got {self.remasking!r}")
        if not isinstance(self.cfg_scale, (int, float)) or not 0.0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale: expected a finite number of at least 0, got {self.cfg_scale!r}")
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.confidence_eos_eot_inf and self.rule.order != "confidence":
            raise ValueError(f"confidence_eos_eot_inf: {self.rule} ranks positions by {self.rule.order}")
        if self.confidence_eos_eot_inf and self.rule.draws:
            raise ValueError(f"confidence_eos_eot_inf: {self.rule} draws positions and ranks none")
        if self.remasking != "random":
            return
        if not self.rule.counts:
            raise ValueError(f"remasking='random' needs a number of positions, rule=Quota(...), got {self.rule}")
        if self.confidence_eos_eot_inf:
            raise ValueError("confidence_eos_eot_inf: remasking='random' ranks no position by its confidence")

    def check_needs(self) -> None:
        """Refuse settings beside which the rule cannot see what it needs."""
        needs = self.rule.needs
        if self.head == "fused" and self.reads_logits is not None:
            raise ValueError(f"head='fused' keeps no logits, which {self.reads_logits} reads")
        if self.cfg_scale > 0.0 and needs.attention:
            raise ValueError(f"cfg_scale={self.cfg_scale} joins two passes; {self.rule} reads the attention of one")
        if needs.rows and needs.attention:
            raise ValueError(f"rule={self.rule} reads attention, which is not kept of forwards with rows beside")
        if needs.rows and self.drafts != 1 and self.branches == "tree":
            raise ValueError(f"branches='tree' has no columns for the rows that {self.rule} feeds: expected 'batch'")

    def check_refresh(self) -> None:
        """Refuse a partial refresh beside what needs a full one."""
        if self.refresh == ALL:
            return
        if self.cache == "none":
            raise ValueError(f"refresh='{self.refresh}' keeps keys and values, cache='none' has none: expected 'all'")
        if self.rule.needs.fed or self.rule.needs.attention:
            raise ValueError(
                f"refresh='{self.refresh}': {self.rule} reads all columns in a block's first forward, expected 'all'"
            )
        if self.drafts != 1 and not self.refresh.covers(self.per_block):
            raise ValueError(
                f"refresh='{self.refresh}' keeps what the last forward of the block before stored, which drafts="
                f"{self.drafts!r} would change: expected 'all', 'recent' or a window from {self.per_block} before"
            )

    @property
    def per_block(self) -> int:
        """`block_length`, or what it is where neither the settings nor the model say it."""
        return BLOCK_LENGTH if self.block_length is None else self.block_length

    @property
    def reads_logits(self) -> str | None:
        """The setting that needs the logits of whole positions, None if none does."""
        if self.rule.needs.logits or self.rule.needs.rows:
            return str(self.rule)
        options = ("cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
        return next((name for name in options if getattr(self, name)), next(iter(active_filters(self)), None))

    @property
    def draws(self) -> bool:
        """Whether steps draw noise."""
        return self.temperature > 0.0 or self.remasking == "random" or self.rule.draws

    @property
    def passes(self) -> int:
        """Rows that a forward feeds for every sequence and draft: with guidance also the unconditional one."""
        return 2 if self.cfg_scale > 0.0 else 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def last_ids(self) -> tuple[int, ...]:
        """Ids whose proposals rank last."""
        if not self.confidence_eos_eot_inf:
            return ()
        return self.eos_ids if self.eot_token_id is None else (*self.eos_ids, self.eot_token_id)

    def blocks(self) -> list[tuple[int, int]]:
        """Start and end of every block, counted from the response's first position."""
        starts = range(0, self.max_new_tokens, self.per_block)
        return [(start, min(start + self.per_block, self.max_new_tokens)) for start in starts]

    def block_rules(self) -> list[list[Rule]]:
        """For every block the rules of its successive steps; the last one repeats until the block is finished."""
        N = self.max_new_tokens
        return [self.rule.successive(start, stop, N, self.steps) for start, stop in self.blocks()]
